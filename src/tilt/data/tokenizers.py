"""Tokenizers trained on the spot for models from scratch: byte-level BPE, characters, words."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from tilt.data.templates import END, ROLE_TOKENS, chat_template
from tilt.errors import DataError, UsageError

PAD, START, UNKNOWN = "<|pad|>", "<|start|>", "<|unknown|>"
SPECIAL = (PAD, START, END, *ROLE_TOKENS)


def train_bpe(texts: Iterable[str], vocabulary: int) -> Any:
    """A byte-level BPE tokenizer with `vocabulary` entries in all: 256 bytes, 7 special tokens, the rest learned. Every text round-trips."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    least = 256 + len(SPECIAL)
    if vocabulary < least:
        raise UsageError(f"vocabulary must be at least {least} (256 bytes and {len(SPECIAL)} special tokens), got {vocabulary}")
    learned = Tokenizer(models.BPE())
    learned.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    learned.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=list(SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    learned.train_from_iterator(texts, trainer)
    return _wrap(learned)


def characters(alphabet: Iterable[str]) -> Any:
    """One token a character: `characters("0123456789+=")`, or of all characters in some texts. Others become <|unknown|>."""
    from tokenizers import Regex

    return _closed(sorted({letter for text in alphabet for letter in text}), Regex(r"[\s\S]"))


def words(vocabulary: Sequence[str]) -> Any:
    """One token a word, and one for each run of blanks: `words(["red", "blue"])`. Other words become <|unknown|>."""
    from tokenizers import Regex

    return _closed([*dict.fromkeys(vocabulary), *(blank for blank in (" ", "\n") if blank not in vocabulary)], Regex(r"\s|[^\s]+"))


def _closed(entries: Sequence[str], pattern: Any) -> Any:
    """A tokenizer whose pieces are whole entries of a closed list."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    if not entries:
        raise DataError("a tokenizer needs at least one entry in its alphabet")
    vocabulary = {entry: n for n, entry in enumerate([*SPECIAL, UNKNOWN, *entries])}
    closed = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    closed.pre_tokenizer = pre_tokenizers.Split(pattern, "isolated")
    closed.decoder = decoders.Fuse()
    return _wrap(closed, unk_token=UNKNOWN)


def _wrap(tokenizer: Any, **named: str) -> Any:
    """As a transformers tokenizer with distinct pad, start, end and role tokens and the chat template `tilt`."""
    from transformers import PreTrainedTokenizerFast

    whole = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=START,
        eos_token=END,
        extra_special_tokens=list(ROLE_TOKENS),
        clean_up_tokenization_spaces=False,
        **named,
    )
    whole.chat_template = chat_template("tilt", whole)
    return whole
