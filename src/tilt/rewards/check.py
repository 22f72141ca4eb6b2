"""A reward tried on known answers before training: does it tell good from bad, and does it vary at all?"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tilt.data.rollouts import Prompt, Rollout
from tilt.errors import DataError
from tilt.rewards.score import Scorer, earned_by
from tilt.rewards.text import Text, inert


@dataclass(frozen=True)
class Verdict:
    """One part (or the total) on known answers: its range, how many it left unscored, and how often a good answer outscores a bad one (ties count half)."""

    name: str
    lowest: float
    mean: float
    highest: float
    unscored: int
    separation: float


@dataclass(frozen=True)
class Check:
    """Verdicts per part and in total, and what is wrong in words."""

    rows: int
    verdicts: tuple[Verdict, ...]
    warnings: tuple[str, ...]
    failures: Mapping[str, str]

    def __str__(self) -> str:
        lines = [f"{self.rows} answers scored", f"{'part':<20}{'lowest':>10}{'mean':>10}{'highest':>10}{'unscored':>10}{'good > bad':>12}"]
        for v in self.verdicts:
            told = "–" if v.separation != v.separation else f"{v.separation:.1%}"
            lines.append(f"{v.name:<20}{v.lowest:>10.4g}{v.mean:>10.4g}{v.highest:>10.4g}{v.unscored:>10}{told:>12}")
        return "\n".join([*lines, *(f"WARNING: {w}" for w in self.warnings), *(f"failed: {m}" for m in self.failures.values())])


def check(scorer: Scorer, rows: Sequence[Mapping[str, Any]], encode: Callable[[str], Sequence[int]], *, good: str = "label") -> Check:
    """Score rows {prompt, completion, columns …}; where a row has the column `good`, a true value marks an answer that should earn more.

    `encode` makes the tokens that reward models and length rules read.
    """
    if not rows:
        raise DataError("there are no answers to score: give rows with prompt and completion.")
    for i, row in enumerate(rows):
        if lacking := [name for name in ("prompt", "completion") if not isinstance(row.get(name), str)]:
            raise DataError(f"row {i} has no text under {' and '.join(lacking)}; it has: {', '.join(map(str, row))}.")
    texts = [Text(row["prompt"], row["completion"]) for row in rows]
    rollouts = [_answer(i, row, encode) for i, row in enumerate(rows)]
    rewards = scorer(rollouts, texts)
    labels = [bool(row[good]) if row.get(good) is not None else None for row in rows]
    columns = {name: values.tolist() for name, values in rewards.parts.items()}
    total = [
        value if seen else float("nan") for value, seen in zip(earned_by(rollouts, rewards).tolist(), rewards.scored.tolist(), strict=True)
    ]
    verdicts = [_verdict(name, values, labels) for name, values in columns.items()]
    if len(columns) > 1:
        verdicts.append(_verdict("total", total, labels))
    return Check(len(rows), tuple(verdicts), tuple(w for v in verdicts for w in _warnings(v, texts)), scorer.report.messages)


def _answer(number: int, row: Mapping[str, Any], encode: Callable[[str], Sequence[int]]) -> Rollout:
    columns = {key: value for key, value in row.items() if key != "completion"}
    tokens = tuple(encode(row["completion"])) or tuple(encode(" "))
    return Rollout.demonstration(Prompt(tuple(encode(row["prompt"])) or tuple(encode(" ")), number, columns), tokens)


def _verdict(name: str, values: Sequence[float], labels: Sequence[bool | None]) -> Verdict:
    seen = [v for v in values if v == v]
    high = [v for v, label in zip(values, labels, strict=True) if label is True and v == v]
    low = [v for v, label in zip(values, labels, strict=True) if label is False and v == v]
    nan = float("nan")
    return Verdict(
        name,
        min(seen, default=nan),
        sum(seen) / len(seen) if seen else nan,
        max(seen, default=nan),
        len(values) - len(seen),
        separation(high, low) if high and low else nan,
    )


def separation(high: Sequence[float], low: Sequence[float]) -> float:
    """Probability that a value of `high` exceeds one of `low`, ties counted half: [1, 2] against [0, 1] → 0.875."""
    merged = sorted([(v, 1) for v in high] + [(v, 0) for v in low])
    won, below, i = 0.0, 0, 0
    while i < len(merged):
        j = i
        while j < len(merged) and merged[j][0] == merged[i][0]:
            j += 1
        ups = sum(side for _, side in merged[i:j])
        downs = j - i - ups
        won += ups * (below + 0.5 * downs)
        below += downs
        i = j
    return won / (len(high) * len(low))


def _warnings(verdict: Verdict, texts: Sequence[Text]) -> list[str]:
    """What a person must hear before training on this reward."""
    if verdict.unscored == len(texts):
        return [f"{verdict.name} scored none of {len(texts)} answers: nothing can be learned from it"]
    found = []
    if verdict.lowest == verdict.highest and len(texts) > 1:
        found.append(
            f"{verdict.name} gave every answer {verdict.lowest:g}: nothing can be learned from it; the first completion was {inert(texts[0].completion)}"
        )
    elif verdict.separation < 0.5:
        found.append(f"{verdict.name} puts bad answers above good ones ({verdict.separation:.1%}): is its sign right?")
    elif verdict.separation == 0.5:
        found.append(f"{verdict.name} cannot tell good answers from bad ones")
    return found
