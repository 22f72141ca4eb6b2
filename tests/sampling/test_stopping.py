"""Stop ids and stop strings: the token that completes the string is the last, however the text is cut into tokens."""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from tilt.sampling.stopping import Stops, ends_within


def word_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE over a few lines with markup, line ends and characters of several bytes."""
    lines = ["the answer is 42.\n\nQ: next", "<a>x</a> ## ### naïve 你好 🙂 end", "User: hello\nBot: 🙂🙂 hi </a>\n\n"] * 20
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        lines,
        trainers.BpeTrainer(
            vocab_size=330, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), special_tokens=["<|end|>"], show_progress=False
        ),
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>")


TOKENIZER = word_tokenizer()


def decode(tokens: Sequence[int]) -> str:
    return str(TOKENIZER.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False))


@pytest.mark.parametrize("strings", [("\n\n",), ("</a>",), ("###", "User:"), ("🙂",), ("你好", "ïv"), ("a",), ("<|end|>",), (" is 42",)])
def test_stops_exactly_where_the_text_first_contains_a_stop_string(strings: tuple[str, ...]) -> None:
    """Against decoding the whole answer after every token: random tokens, and texts that contain each string, cut in the usual way and byte by byte."""
    rng = random.Random(0)
    size = len(TOKENIZER)
    answers = [[rng.randrange(size) for _ in range(60)] for _ in range(40)]
    for text in (f"well {strings[0]} more", f"x{strings[-1]}", f"{strings[0]}{strings[-1]}", "nothing of the kind"):
        answers.append(TOKENIZER.encode(text))
        answers.append([token for byte in text.encode() for token in [TOKENIZER.convert_tokens_to_ids(byte_symbol(byte))]])
    stopped = 0
    stops = Stops(size, (), strings, decode)
    for answer in answers:
        for length in range(1, len(answer) + 1):
            found = bool(stops.ended(np.array([answer[length - 1]]), lambda row, text=answer[:length]: text)[0])  # type: ignore[misc]
            contained = any(s in decode(answer[:length]) for s in strings)
            assert found == contained
            if contained:
                stopped += 1
                break
    assert stopped >= 6


def byte_symbol(byte: int) -> str:
    """The byte-level alphabet's character for a byte."""
    return pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str(bytes([byte]).decode())[0][0] if byte < 128 else BYTES[byte]


def byte_table() -> dict[int, str]:
    """GPT-2's map from bytes to printable characters, from its definition."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in plain]
    return {b: chr(b) for b in plain} | {b: chr(256 + i) for i, b in enumerate(others)}


BYTES = byte_table()


def test_several_rows_at_once_and_only_suspects_are_decoded() -> None:
    """Of a thousand rows, the text is decoded for those whose new token could end the string."""
    asked: list[int] = []
    pieces = ["cat", "##", "#", " dog", "a#b", "E"]

    def text_of(tokens: Sequence[int]) -> str:
        return "".join(pieces[t] for t in tokens)

    def answer(row: int) -> list[int]:
        asked.append(row)
        return [1, tokens[row]]

    stops = Stops(6, (5,), ("###",), text_of)
    tokens = np.array([0] * 995 + [1, 2, 3, 4, 5])
    assert np.flatnonzero(stops.ended(tokens, answer)).tolist() == [995, 996, 999]
    assert asked == [995, 996]


@pytest.mark.parametrize(
    ("string", "piece", "can"),
    [
        ("</a>", "a>b", True),
        ("</a>", "</a", False),
        ("</a>", "x</a>y", True),
        ("\n\n", "\n", True),
        ("ab", "b", True),
        ("ab", "a", False),
        ("ab", "cb", False),
        ("ab", "ba", True),
    ],
)
def test_ends_within(string: str, piece: str, can: bool) -> None:
    assert ends_within(string, piece) == can
