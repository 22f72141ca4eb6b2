"""Rewards that are rules: frozen dataclasses called with completions and the data set's columns, one score (or None) per completion.

A rule never evaluates model text, is linear in its length, and compares numbers exactly.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from fractions import Fraction
from typing import Any, ClassVar, Literal

import regex

from tilt.errors import DataError, UsageError
from tilt.rewards.text import inert

Scores = list[float | None]
Unit = Literal["tokens", "words", "characters"]

DIGITS = 300  # a longer run of digits is a runaway completion, not a number
NUMBER = re.compile(
    r"(?:(?<![\w)\]])[-\u2212\u2013])?+(?:[$€£][-\u2212\u2013]?+)?+"  # −$12 and $−12; in 16-3 the dash is no sign
    r"(?P<size>(?:[0-9]{1,3}+(?:,[0-9]{3})++|[0-9]++)(?:\.[0-9]++)?|\.[0-9]++)"
    r"(?:/(?P<over>[0-9]++))?(?:[eE](?P<power>[-+]?[0-9]{1,3})(?!\w))?"
)
FRACTION = re.compile(r"\\d?frac\{([0-9]{1,300})\}\{([0-9]{1,300})\}")


def last_number(text: str) -> Fraction | None:
    """The last number of a text, exactly: `3 eggs cost −$1,080.50` → -1080.5, `3/4.` → 0.75; None where there is none or it is no number (`9/0`)."""
    text = FRACTION.sub(r"\1/\2", text.replace("{,}", ",").replace("\\$", "$"))
    last = None
    for last in NUMBER.finditer(text):  # noqa: B007
        pass
    return None if last is None else _value(last)


def _value(match: re.Match[str]) -> Fraction | None:
    size, over = match["size"].replace(",", ""), match["over"] or "1"
    if max(len(size), len(over)) > DIGITS or int(over) == 0:
        return None
    value = Fraction(size) / int(over) * Fraction(10) ** int(match["power"] or 0)
    before = match.string[match.start() : match.start("size")]
    return -value if before.strip("$€£") else value


def answer_text(text: str, markers: Sequence[str]) -> str | None:
    """What follows the marker in the last line that starts with one, else what the last `\\boxed{…}` holds, else None: `so 3\\n#### 18 eggs` → ` 18 eggs`."""
    for line in reversed(text.splitlines()):
        bare = line.lstrip(" \t*>")
        for marker in markers:
            if bare.startswith(marker):
                return bare[len(marker) :]
    return _boxed(text)


def _boxed(text: str) -> str | None:
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    depth = 0
    for i in range(start + 6, len(text)):
        depth += (text[i] == "{") - (text[i] == "}")
        if depth == 0:
            return text[start + 7 : i]
    return None


def column(columns: Mapping[str, Sequence[Any]], name: str, rule: object) -> Sequence[Any]:
    """The column that a rule needs, or an error that names those there are."""
    if name not in columns:
        there = ", ".join(sorted(columns)) or "none"
        raise UsageError(
            f"the reward rule {type(rule).__name__.lower()} needs the column '{name}'; the data has: {there}.\nName another one: {{{rule_name(rule)}: {{answer: COLUMN}}}}."
        )
    return columns[name]


def _search(
    pattern: str, text: str, timeout: float, rule: object, number: int, *, whole: bool, last: bool = False
) -> regex.Match[str] | None:
    """Match under a time limit: a pattern that backtracks is an error that names the completion, not a run that hangs."""
    try:
        if whole:
            return regex.fullmatch(pattern, text, flags=regex.DOTALL, timeout=timeout)
        if not last:
            return regex.search(pattern, text, flags=regex.MULTILINE, timeout=timeout)
        found = None
        for found in regex.finditer(pattern, text, flags=regex.MULTILINE, timeout=timeout):  # noqa: B007
            pass
        return found
    except TimeoutError:
        raise DataError(
            f"the pattern {inert(pattern)} took more than {timeout:g} s on completion {number} ({len(text):,} characters): {inert(text)}\n"
            "It backtracks: write it without nested quantifiers such as (a+)+, or with possessive ones (a++)."
        ) from None


@dataclass(frozen=True)
class Exact:
    """1 where the completion equals the column's text, blanks at both ends aside."""

    name: ClassVar[str] = "exact"
    answer: str = "answer"
    ignore_case: bool = False

    def __call__(self, completions: Sequence[str], **columns: Sequence[Any]) -> Scores:
        golds = column(columns, self.answer, self)
        return [
            None if gold is None else float(self._fold(text) == self._fold(str(gold)))
            for text, gold in zip(completions, golds, strict=True)
        ]

    def _fold(self, text: str) -> str:
        return text.strip().casefold() if self.ignore_case else text.strip()


@dataclass(frozen=True)
class Numeric:
    """1 where the completion's number equals the column's: the last number of the last line that starts with a marker, else of `\\boxed{}`, else of the text.

    Commas, currency signs, a final period, a Unicode minus and `18.0` for `18` do not matter; a marker without a number is no answer.
    With `marked` the marker is compulsory. The column may hold numbers or texts such as GSM8K's `… #### 18`.
    """

    name: ClassVar[str] = "numeric"
    answer: str = "answer"
    markers: tuple[str, ...] = ("####", "A:", "Answer:")
    marked: bool = False

    def __call__(self, completions: Sequence[str], **columns: Sequence[Any]) -> Scores:
        golds = column(columns, self.answer, self)
        return [
            None if gold is None else float(self.read(text) == self._gold(gold, i))
            for i, (text, gold) in enumerate(zip(completions, golds, strict=True))
        ]

    def read(self, text: str) -> Fraction | None:
        """The number that a completion answers, None where it gives none."""
        answer = answer_text(text, self.markers)
        if answer is None:
            answer = "" if self.marked else text
        return last_number(answer)

    def _gold(self, gold: Any, number: int) -> Fraction:
        if isinstance(gold, int) and not isinstance(gold, bool):
            return Fraction(gold)
        if isinstance(gold, float) and gold == gold and abs(gold) != float("inf"):
            return Fraction(repr(gold))  # 0.1 is one tenth, as the completion writes it
        found = last_number(answer_text(gold, self.markers) or gold) if isinstance(gold, str) else None
        if found is None:
            raise DataError(
                f"the column '{self.answer}' holds no number for sample {number}: {inert(str(gold))}\nName the column with the true answer: {{numeric: {{answer: COLUMN}}}}."
            )
        return found


@dataclass(frozen=True)
class Regex:
    """1 where the pattern occurs; with an `answer` column, where the last occurrence's first group equals the column's text."""

    name: ClassVar[str] = "regex"
    pattern: str
    answer: str = ""
    seconds: float = 1.0

    def __post_init__(self) -> None:
        if compile_pattern(self.pattern).groups < 1 and self.answer:
            raise UsageError(
                f"the pattern {inert(self.pattern)} has no group to compare with the column '{self.answer}': put ( ) around the answer."
            )

    def __call__(self, completions: Sequence[str], **columns: Sequence[Any]) -> Scores:
        if not self.answer:
            return [
                float(_search(self.pattern, text, self.seconds, self, i, whole=False) is not None) for i, text in enumerate(completions)
            ]
        scores: Scores = []
        for i, (text, gold) in enumerate(zip(completions, column(columns, self.answer, self), strict=True)):
            match = _search(self.pattern, text, self.seconds, self, i, whole=False, last=True)
            said = None if match is None or match[1] is None else match[1].strip()
            scores.append(None if gold is None else float(said == str(gold).strip()))
        return scores


@dataclass(frozen=True)
class Format:
    """1 where the whole completion matches the pattern; `.` matches line ends too: `<think>.*</think>\\s*<answer>.*</answer>`."""

    name: ClassVar[str] = "format"
    pattern: str
    seconds: float = 1.0

    def __post_init__(self) -> None:
        compile_pattern(self.pattern)

    def __call__(self, completions: Sequence[str], **columns: Sequence[Any]) -> Scores:
        return [float(_search(self.pattern, text, self.seconds, self, i, whole=True) is not None) for i, text in enumerate(completions)]


@dataclass(frozen=True)
class Length:
    """0 for a length within [low, high], then falling linearly to -1 at a distance of `ramp`: -min(1, distance / ramp).

    A target is low = high.
    """

    name: ClassVar[str] = "length"
    high: int
    low: int = 0
    ramp: int = 0
    unit: Unit = "tokens"

    def __post_init__(self) -> None:
        if not 0 <= self.low <= self.high or self.ramp < 0 or self.unit not in ("tokens", "words", "characters"):
            raise UsageError(f"length: expected 0 <= low <= high, ramp >= 0 and a unit of tokens, words, characters; got {self!r}")

    def __call__(self, completions: Sequence[str], **columns: Sequence[Any]) -> Scores:
        ramp = self.ramp or max(1, self.high)
        lengths = (
            column(columns, "lengths", self)
            if self.unit == "tokens"
            else [len(t.split() if self.unit == "words" else t) for t in completions]
        )
        return [0.0 - min(1.0, max(self.low - n, n - self.high, 0) / ramp) for n in lengths]


@dataclass(frozen=True)
class Overlong:
    """DAPO's soft overlong punishment (arXiv 2503.14476, eq. 13), n tokens: 0 up to limit - buffer, then ((limit - buffer) - n) / buffer, and -1 beyond `limit`.

    limit 20, buffer 4: n = 16, 17, 18, 20, 21 → 0, -0.25, -0.5, -1, -1. The limit is the `sampling.max_tokens` of the run.
    """

    name: ClassVar[str] = "overlong"
    limit: int
    buffer: int

    def __post_init__(self) -> None:
        if not 0 < self.buffer <= self.limit:
            raise UsageError(f"overlong: expected 0 < buffer <= limit, in tokens; got {self!r}")

    def __call__(self, completions: Sequence[str], **columns: Sequence[Any]) -> Scores:
        free = self.limit - self.buffer
        return [0.0 if n <= free else -1.0 if n > self.limit else (free - n) / self.buffer for n in column(columns, "lengths", self)]


@dataclass(frozen=True)
class Contains:
    """The share of the given words, and of the column's word, that occur in the completion."""

    name: ClassVar[str] = "contains"
    words: tuple[str, ...] = ()
    answer: str = ""
    ignore_case: bool = True

    def __post_init__(self) -> None:
        if not (self.words or self.answer) or "" in self.words:
            raise UsageError("contains needs words, none of them empty, or an answer column: {contains: {words: [please, thank you]}}.")

    def __call__(self, completions: Sequence[str], **columns: Sequence[Any]) -> Scores:
        golds = column(columns, self.answer, self) if self.answer else [None] * len(completions)
        scores: Scores = []
        for text, gold in zip(completions, golds, strict=True):
            wanted = [*self.words, *([] if gold is None else [str(gold)])]
            there = self._fold(text)
            scores.append(sum(self._fold(word) in there for word in wanted) / len(wanted) if wanted else None)
        return scores

    def _fold(self, text: str) -> str:
        return text.casefold() if self.ignore_case else text


@dataclass(frozen=True)
class NonRepetition:
    """distinct-n (Li et al. 2016): different n-grams of words over all n-grams; 1 where there are fewer than n words."""

    name: ClassVar[str] = "non_repetition"
    n: int = 2

    def __post_init__(self) -> None:
        if self.n < 1:
            raise UsageError(f"non_repetition: expected n >= 1, got {self.n}")

    def __call__(self, completions: Sequence[str], **columns: Sequence[Any]) -> Scores:
        return [self._distinct(text.split()) for text in completions]

    def _distinct(self, words: list[str]) -> float:
        total = len(words) - self.n + 1
        return len(set(zip(*(words[i:] for i in range(self.n)), strict=False))) / total if total > 0 else 1.0


Rule = Exact | Numeric | Regex | Format | Length | Overlong | Contains | NonRepetition
RULES: Mapping[str, type[Rule]] = {rule.name: rule for rule in (Exact, Numeric, Regex, Format, Length, Overlong, Contains, NonRepetition)}


def rule_name(rule: object) -> str:
    return getattr(rule, "name", type(rule).__name__.lower())


def compile_pattern(pattern: str) -> regex.Pattern[str]:
    """The compiled pattern, or an error that shows where it breaks off."""
    try:
        return regex.compile(pattern)
    except regex.error as error:
        raise UsageError(f"the pattern {inert(pattern)} is not a regular expression: {error}") from None


def options(rule: type[Rule]) -> dict[str, str]:
    """The settings of a rule and their types, as the configuration names them."""
    return {f.name: str(f.type) for f in fields(rule)}
