"""Answers in steps: where each step ends among the tokens, and rows with a label for every step as tokens."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from tilt.data.rendering import Renderer, TooLong
from tilt.data.rollouts import Rollout
from tilt.data.sources import Row
from tilt.errors import DataError, UsageError

SEPARATOR = "\n"
Decode = Callable[[Sequence[int]], str]


@dataclass(frozen=True)
class Stepwise:
    """An answer in steps: its tokens, the index among them of each step's last token, and for each step the chance that it is right."""

    rollout: Rollout
    ends: tuple[int, ...]
    labels: tuple[float, ...]

    @property
    def marked(self) -> Rollout:
        """The answer with the ends of its steps as the only trained tokens, to be shown."""
        return replace(self.rollout, sampled=tuple(i in self.ends for i in range(len(self.rollout.tokens))))


def step_ends(tokens: Sequence[int], separator: str, decode: Decode, text: str | None = None) -> list[int]:
    """Index of the last token of each step: the one that completes the separator after it, and the answer's last token for the last step.

    "a=1" "⏎" "b=" "2" "E" with separator ⏎ → 1 4. Blank steps are none: their separators belong to the steps beside them, so "a⏎⏎b⏎E" has the ends of a and b.
    An answer that is blank throughout is one step. `text` is what other tokens of the same answer spell: it decides which steps are blank.
    """

    @cache
    def complete(count: int) -> int:
        return decode(tokens[:count]).count(separator)

    *pieces, rest = (decode(tokens) if text is None else text).split(separator)
    if complete(len(tokens)) != len(pieces):
        raise DataError(f"an answer of {len(pieces) + 1} steps has {complete(len(tokens)) + 1} in other tokens: {str(text)[:120]!r}")
    cuts = [bisect_left(range(len(tokens) + 1), number, key=complete) - 1 for number in range(1, len(pieces) + 1)]
    ends = [cut for cut, piece in zip(cuts, pieces, strict=True) if piece.strip()]
    return [*ends, len(tokens) - 1] if rest.strip() or not ends else [*ends[:-1], len(tokens) - 1]


def decoder(tokenizer: Any) -> Decode:
    """Tokens to text, special tokens left out."""
    return lambda tokens: str(tokenizer.decode(list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False))


def check_separator(separator: str, tokenizer: Any) -> None:
    """Refuse a separator that is empty, or that the tokenizer's text does not show."""
    ids = tokenizer.encode(separator, add_special_tokens=False)
    if not separator or decoder(tokenizer)(ids) != separator:
        raise UsageError(
            f"separator {separator!r}: the tokenizer does not spell it as text, so no step could be told from the next\n"
            "  choose one that it spells, such as '\\n', and no special token"
        )


def stepwise(render: Renderer, separator: str, row: Row, id: int) -> Stepwise:
    """A row {prompt, steps, labels} as tokens, the steps joined by the separator; of an answer that is cut only whole steps keep their labels."""
    if holds := [number for number, step in enumerate(row["steps"]) if separator in step]:
        raise DataError(f"row {id}: step {holds[0]} holds the separator {separator!r}\n  split it, or set another separator")
    answer = render.demonstration({**row, "completion": separator.join(row["steps"])}, id)
    ends = step_ends(answer.tokens, separator, decoder(render.tokenizer))
    if answer.stop == "length":
        ends = ends[:-1]
        if not ends:
            raise TooLong(f"row {id}: no step ends within {render.max_tokens} tokens")
    elif len(ends) != len(row["labels"]):
        raise DataError(f"row {id}: {len(row['labels'])} steps are read as {len(ends)} when tokenised; look at its blanks")
    return Stepwise(answer, tuple(ends), tuple(row["labels"][: len(ends)]))
