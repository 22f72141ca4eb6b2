"""A question with places for texts, as tokens: what a judge is asked about an answer, or about two."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from tilt.data.rendering import render_chat
from tilt.data.templates import opens_with_bos
from tilt.errors import UsageError

PLACES = ("prompt", "first", "second", "answer")
_PLACE = re.compile(r"\{(" + "|".join(PLACES) + r")\}")
_MARK, _MARKED = "\u241f{}\u241f", re.compile("\u241f(" + "|".join(PLACES) + ")\u241f")


def check_template(template: str, places: Sequence[str], where: str) -> None:
    """Refuse a template that does not show every one of these places, or shows a place that is not among them."""
    found = set(_PLACE.findall(template))
    wanted = ", ".join(f"{{{name}}}" for name in places)
    if lacking := [f"{{{name}}}" for name in places if name not in found]:
        raise UsageError(f"`{where}` has no {' and no '.join(lacking)}: it must hold {wanted}, where the texts are put")
    if strange := [f"{{{name}}}" for name in PLACES if name in found and name not in places]:
        raise UsageError(f"`{where}` has {' and '.join(strange)}, which is not given here: its places are {wanted}")


@dataclass(frozen=True)
class Wording:
    """wording(prompt=…, first=…, second=…) → tokens of the template with these texts in its places, blanks at their ends left off.

    With `chat` it is one user turn of the tokenizer's template, up to where the answer begins. A control token that a text spells stays text, while those
    of the template act: an answer cannot open turns of its own before its judge.
    """

    tokenizer: Any
    template: str
    chat: bool

    def __call__(self, **texts: str) -> tuple[int, ...]:
        given = [texts[piece].strip() if number % 2 else piece for number, piece in enumerate(self._frame)]
        if not any(map(self._control.search, given[1::2])):
            return tuple(self._encode("".join(given)))
        runs: list[str] = [""]  # texts and the template's control tokens in turn: only the latter act
        for number, piece in enumerate(given):
            parts = [piece] if number % 2 else self._control.split(piece)
            runs[-1] += parts[0]
            runs += parts[1:]
        return tuple(i for number, run in enumerate(runs) for i in self._encode(run, literal=not number % 2))

    @cached_property
    def _frame(self) -> tuple[str, ...]:
        """What stands around the places, and their names, in turn: "Q {prompt} A" → "Q ", "prompt", " A"."""
        if not self.chat:
            start = self.tokenizer.bos_token if opens_with_bos(self.tokenizer) else ""
            return tuple(_PLACE.split(start + self.template))
        marked = _PLACE.sub(lambda place: _MARK.format(place[1]), self.template)
        pieces = _MARKED.split(render_chat(self.tokenizer, [{"role": "user", "content": marked}], None, answer_next=True))
        if pieces[1::2] != _PLACE.findall(self.template):
            raise UsageError("the chat template does not show a user turn as it is: set rendering: text, or use another tokenizer")
        return tuple(pieces)

    @cached_property
    def _control(self) -> re.Pattern[str]:
        """Any control token of the tokenizer, as a group of its own; the longest first."""
        marks = sorted(set(self.tokenizer.all_special_tokens), key=len, reverse=True)
        return re.compile("(" + "|".join(map(re.escape, marks)) + ")" if marks else r"(?!)")

    def _encode(self, text: str, *, literal: bool = False) -> list[int]:
        return [int(i) for i in self.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=literal)] if text else []
