"""Why a rule scored as it did: what it read in the answer, what was asked for, and a sentence."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from functools import singledispatch
from typing import Any, TypedDict

import regex

from tilt.rewards.rules import Contains, Exact, Format, Length, NonRepetition, Numeric, Overlong, Regex

LONGEST = 200


class Reason(TypedDict):
    """What a rule took out of an answer, what the data asks for, both None where there is no such thing, and why it scored as it did."""

    extracted: str | None
    gold: str | None
    reason: str


def reasons(rule: object, completions: Sequence[str], columns: Mapping[str, Sequence[Any]]) -> list[Reason] | None:
    """One reason per completion; None for what is no rule of the library."""
    if reason.dispatch(type(rule)) is reason.dispatch(object):
        return None
    golds = columns.get(getattr(rule, "answer", "") or "", [None] * len(completions))
    lengths = columns.get("lengths", [0] * len(completions))
    return [reason(rule, text, gold, int(length)) for text, gold, length in zip(completions, golds, lengths, strict=True)]


@singledispatch
def reason(rule: Any, text: str, gold: Any, length: int) -> Reason:
    """Why `rule` scored a completion, `length` tokens long, as it did beside the column's value."""
    raise TypeError(type(rule).__name__)


def _said(extracted: str | None, gold: Any, why: str) -> Reason:
    return Reason(extracted=_cut(extracted), gold=None if gold is None else _cut(str(gold)), reason=why)


def _cut(text: str | None) -> str | None:
    return text if text is None or len(text) <= LONGEST else text[: LONGEST - 1] + "…"


@reason.register
def _(rule: Exact, text: str, gold: Any, length: int) -> Reason:
    found = text.strip()
    if gold is None:
        return _said(found, None, "the row has no answer to compare with")
    wanted = str(gold).strip()
    if rule._fold(text) == rule._fold(wanted):
        return _said(found, wanted, "equal")
    place = next((i for i, (a, b) in enumerate(zip(found, wanted, strict=False)) if a != b), min(len(found), len(wanted)))
    return _said(found, wanted, f"differs from character {place} on")


@reason.register
def _(rule: Numeric, text: str, gold: Any, length: int) -> Reason:
    found = rule.read(text)
    if gold is None:
        return _said(None if found is None else str(found), None, "the row has no answer to compare with")
    wanted = rule._gold(gold, 0)
    if found is None:
        return _said(None, wanted, "no marked answer" if rule.marked else "no number in the answer")
    return _said(str(found), wanted, "the same number" if found == wanted else "another number")


@reason.register
def _(rule: Regex, text: str, gold: Any, length: int) -> Reason:
    try:
        found = list(regex.finditer(rule.pattern, text, flags=regex.MULTILINE, timeout=rule.seconds))
    except TimeoutError:
        return _said(None, gold, "the pattern took too long")
    if not found:
        return _said(None, gold, "the pattern does not occur")
    if not rule.answer:
        return _said(found[0][0], None, "the pattern occurs")
    said = found[-1][1]
    same = said is not None and gold is not None and said.strip() == str(gold).strip()
    return _said(said, gold, "the last occurrence is the answer" if same else "the last occurrence is another answer")


@reason.register
def _(rule: Format, text: str, gold: Any, length: int) -> Reason:
    try:
        match = regex.fullmatch(rule.pattern, text, flags=regex.DOTALL, timeout=rule.seconds, partial=True)
    except TimeoutError:
        return _said(None, None, "the pattern took too long")
    if match is None:
        return _said(None, None, "the answer has another form")
    return _said(None, None, "the answer ends before the form does" if match.partial else "the answer has the form")


@reason.register
def _(rule: Length, text: str, gold: Any, length: int) -> Reason:
    size = {"tokens": length, "words": len(text.split()), "characters": len(text)}[rule.unit]
    where = "within" if rule.low <= size <= rule.high else "below" if size < rule.low else "above"
    return _said(f"{size} {rule.unit}", f"{rule.low} to {rule.high}", f"{where} the range")


@reason.register
def _(rule: Overlong, text: str, gold: Any, length: int) -> Reason:
    free = rule.limit - rule.buffer
    where = "short enough" if length <= free else "beyond the limit" if length > rule.limit else "in the buffer before the limit"
    return _said(f"{length} tokens", f"{free} free, {rule.limit} at most", where)


@reason.register
def _(rule: Contains, text: str, gold: Any, length: int) -> Reason:
    wanted = [*rule.words, *([] if gold is None else [str(gold)])]
    missing = [word for word in wanted if rule._fold(word) not in rule._fold(text)]
    there = ", ".join(word for word in wanted if word not in missing)
    return _said(there or None, ", ".join(wanted), f"missing: {', '.join(missing)}" if missing else "all of them occur")


@reason.register
def _(rule: NonRepetition, text: str, gold: Any, length: int) -> Reason:
    words = text.split()
    grams = Counter(zip(*(words[i:] for i in range(rule.n)), strict=False))
    often, times = max(grams.items(), key=lambda item: item[1], default=((), 0))
    if times < 2:
        return _said(None, None, f"no {rule.n} words in a row come twice")
    return _said(" ".join(often), None, f"these {rule.n} words in a row come {times} times")
