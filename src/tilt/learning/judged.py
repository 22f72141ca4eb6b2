"""Judged answers as a learner sees them: pairs, rankings and labelled answers, cut into micro-batches and laid out as comparisons."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, combinations, pairwise
from typing import Any

import torch
from torch import Tensor

from tilt.data.packing import Pack, evenly, pack
from tilt.data.rollouts import Rollout
from tilt.errors import DataError


@dataclass(frozen=True)
class Judged:
    """Answers to one prompt, better before worse; or one answer alone, labelled `good` or bad.

    `margin`: by how much the better answer of a pair should win. `probability`: that it is really the better one. `mismatched`: the same prompt with
    answers to another one, for rows that hold answers against those.
    """

    answers: tuple[Rollout, ...]
    good: bool = True
    margin: float = 0.0
    probability: float = 1.0
    mismatched: tuple[Rollout, ...] = ()

    @property
    def paired(self) -> bool:
        return len(self.answers) > 1

    @property
    def cost(self) -> int:
        """Tokens in a pack, the prompt once."""
        return len(self.answers[0].prompt.tokens) + sum(len(answer.tokens) for answer in self.answers)


def judged(groups: Sequence[Sequence[Rollout]]) -> list[Judged]:
    """Rendered rows as judged answers: their columns `margin`, `probability` and, for an answer alone, `label` say how they were judged."""
    return [_of(tuple(group)) for group in groups]


def _of(answers: tuple[Rollout, ...]) -> Judged:
    columns, where = answers[0].prompt.columns, f"row {answers[0].prompt.id}"
    if len(answers) == 1:
        return Judged(answers, good=bool(columns["label"]))
    margin, probability = _number(columns, "margin", 0.0, where), _number(columns, "probability", 1.0, where)
    if not 0 <= probability <= 1:
        raise DataError(
            f"{where}: probability is {probability}, and must lie in [0, 1]: the chance that the chosen answer is the better one"
        )
    if len(answers) > 2 and (margin, probability) != (0.0, 1.0):
        raise DataError(
            f"{where}: margin and probability are those of one pair, and this row ranks {len(answers)} answers\n  give each pair a row"
        )
    return Judged(answers, margin=margin, probability=probability)


def _number(columns: Mapping[str, Any], name: str, default: float, where: str) -> float:
    """A column of numbers that may be absent or empty."""
    value = columns.get(name)
    if value is None:
        return default
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number) or isinstance(value, bool):
        raise DataError(
            f"{where}: column {name!r} is {value!r}, not a finite number\n  name another column: columns: {{{name}: …}}, or drop it"
        )
    return number


def with_mismatched(examples: Sequence[Judged], more: Sequence[Judged] = ()) -> list[Judged]:
    """Each with its prompt and the answers to another one: those of the next example that asks something else, around the end and then among `more`;
    the same in every epoch."""
    made = []
    for number, example in enumerate(examples):
        prompt = example.answers[0].prompt
        others = chain((examples[(number + k) % len(examples)] for k in range(1, len(examples))), more)
        other = next((x for x in others if x.answers[0].prompt.tokens != prompt.tokens), None)
        if other is None:
            raise DataError(
                "every row asks the same, so no prompt can be read with the answer to another one, which this row of the table needs (kto)"
            )
        made.append(replace(example, mismatched=tuple(replace(answer, prompt=prompt) for answer in other.answers)))
    return made


def portions(examples: Sequence[Judged], budget: int) -> list[range]:
    """Runs of whole examples of at most `budget` tokens, as few as the order allows and of like size; a larger example is a run of its own."""
    if not examples:
        return [range(0)]
    costs = [example.cost for example in examples]

    def starts(limit: int) -> list[int]:
        found, used = [0], 0
        for number, cost in enumerate(costs):
            if number > found[-1] and used + cost > limit:
                found.append(number)
                used = 0
            used += cost
        return found

    return [range(a, b) for a, b in pairwise([*evenly(starts, budget), len(examples)])]


@dataclass(frozen=True)
class Laid:
    """Examples as one pack, and the comparisons among its S sequences.

    Pairs: `chosen` and `rejected` [N] are the sequences of each comparison; a ranking of K answers has K (K - 1) / 2, each of its share of the weight.
    Labelled answers: `chosen` [N] are the good ones, `rejected` [M] the bad ones. `weights` [N] and `against` [M] are theirs in the loss.
    `answers` are the sequences' own tokens, `last` [S] the index of the last of them in the pack (padding may follow).
    """

    pack: Pack
    answers: tuple[tuple[int, ...], ...]
    last: Tensor
    chosen: Tensor
    rejected: Tensor
    weights: Tensor
    against: Tensor
    margins: Tensor
    probability: Tensor
    paired: bool

    def to(self, device: torch.device | str) -> Laid:
        moved = {name: getattr(self, name).to(device) for name in ("pack", *LAID)}
        return replace(self, **moved)


LAID = ("last", "chosen", "rejected", "weights", "against", "margins", "probability")


def lay(examples: Sequence[Judged], whole: int, *, padding: int = -1) -> Laid:
    """These examples of a batch of `whole`, each of weight 1/whole. With `padding` the shorter answers of an example go on with that token to the
    length of its longest."""
    paired = examples[0].paired
    assert all(example.paired == paired for example in examples), "pairs and labelled answers do not mix in one batch"
    better: list[int] = []
    worse: list[int] = []
    columns: list[tuple[float, float, float]] = []
    rollouts: list[Rollout] = []
    for example in examples:
        first, count = len(rollouts), len(example.answers)
        longest = max(len(answer.tokens) for answer in example.answers)
        rollouts += [_longer(answer, longest, padding) if padding >= 0 else answer for answer in example.answers]
        if not paired:
            (better if example.good else worse).append(first)
            continue
        for a, b in combinations(range(first, first + count), 2):
            better.append(a)
            worse.append(b)
            columns.append((2 / (whole * count * (count - 1)), example.margin, example.probability))
    packed = pack(rollouts)
    answers = tuple(answer.tokens for example in examples for answer in example.answers)
    table = torch.tensor(columns).view(-1, 3) if paired else torch.tensor([(1 / whole, 0.0, 1.0)]).repeat(len(better), 1)
    return Laid(
        packed, answers, packed.segments.start[packed.own] + torch.tensor([len(answer) for answer in answers]) - 1,
        torch.tensor(better, dtype=torch.long), torch.tensor(worse, dtype=torch.long), table[:, 0],
        table[:, 0] if paired else torch.full((len(worse),), 1 / whole), table[:, 1], table[:, 2], paired,
    )  # fmt: skip


def _longer(answer: Rollout, length: int, padding: int) -> Rollout:
    """The answer followed by padding, which nobody chose: 7 8 E to length 5 with token 0 → 7 8 E 0 0."""
    more = length - len(answer.tokens)
    return replace(
        answer,
        tokens=answer.tokens + (padding,) * more,
        sampled=answer.sampled + (False,) * more,
        logprobs=answer.logprobs + (math.nan,) * more,
    )
