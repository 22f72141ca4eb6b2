"""Text of a model on its way to a person: short, on one line, and unable to move a cursor or hide itself."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from tilt.data.rollouts import Rollout


class Text(NamedTuple):
    """A rollout as a person reads it: what was asked and what was answered."""

    prompt: str
    completion: str


def read(rollouts: Sequence[Rollout], decode: Callable[[Sequence[int]], str]) -> list[Text]:
    """Prompts and completions as text; tokens that come several times are decoded once."""
    known: dict[tuple[int, ...], str] = {}

    def text(tokens: tuple[int, ...]) -> str:
        if tokens not in known:
            known[tokens] = decode(list(tokens))
        return known[tokens]

    return [Text(text(rollout.prompt.tokens), text(rollout.tokens)) for rollout in rollouts]


def inert(text: str, limit: int = 120) -> str:
    """A quoted text of at most about `limit` characters, cut in the middle, with controls, direction marks and lone surrogates written as escapes."""
    if len(text) > limit:
        text = text[: limit // 2] + "…" + text[len(text) - (limit - limit // 2) + 1 :]
    return '"' + "".join(_escaped(text)) + '"'


def _escaped(text: str) -> Iterable[str]:
    for letter in text:
        if letter in '"\\':
            yield "\\" + letter
        elif unicodedata.category(letter)[0] == "C" or unicodedata.category(letter) in ("Zl", "Zp"):
            yield letter.encode("unicode_escape").decode("ascii")
        else:
            yield letter
