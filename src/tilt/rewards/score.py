"""From rollouts to Rewards: every part scored under its clock, weighted and added; what no part could score is left out."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tilt.data.rollouts import Rollout
from tilt.errors import DataError, UsageError
from tilt.objectives.experience import Rewards
from tilt.rewards.functions import RewardFunction, Scored
from tilt.rewards.spec import LoadModel, Model, RewardSpec, function_of, parse
from tilt.rewards.text import Text

RESERVED = ("prompts", "completions", "lengths", "stops")


@dataclass(frozen=True)
class Part:
    """One part of the reward, ready to be called."""

    name: str
    weight: float
    call: Callable[[Sequence[Rollout], Sequence[Text]], Scored]


@dataclass(frozen=True)
class Report:
    """What scoring a batch cost: seconds and failed samples of each part, and the first failure in words (with on_error zero or skip)."""

    seconds: Mapping[str, float] = field(default_factory=dict)
    failures: Mapping[str, int] = field(default_factory=dict)
    messages: Mapping[str, str] = field(default_factory=dict)

    @staticmethod
    def join(given: Sequence[Report]) -> Report:
        """What scoring several batches cost; of each part the first failure in words."""
        seconds, failures, messages = Counter[str](), Counter[str](), dict[str, str]()
        for report in given:
            seconds.update(report.seconds)  # type: ignore[arg-type]
            failures.update(report.failures)
            messages = {**report.messages, **messages}
        return Report(dict(seconds), dict(failures), messages)

    def metrics(self) -> dict[str, tuple[Tensor, Tensor]]:
        """`reward/NAME_seconds` and `reward/NAME_failed` as (sum, weight)."""
        one = torch.ones(())
        found = {f"reward/{name}_seconds": (torch.tensor(s), one) for name, s in self.seconds.items()}
        return found | {f"reward/{name}_failed": (torch.tensor(float(n)), one) for name, n in self.failures.items()}


@dataclass
class Scorer:
    """Scorer(rollouts, texts) → Rewards: total = clip(sum over parts that scored of weight · score) − missing_eos_penalty where the answer did not end by itself.

    A part that gives None is left out of that sequence's sum; without any part a sequence is unscored and its total 0. `parts` holds NaN for None.
    `report` tells of the latest batch.
    """

    parts: Sequence[Part]
    missing_eos_penalty: float = 0.0
    clip: tuple[float, float] = (-math.inf, math.inf)
    report: Report = field(default_factory=Report)

    def __post_init__(self) -> None:
        if not self.clip[0] < self.clip[1]:
            raise UsageError(f"the reward's clip {list(self.clip)} is no interval: give [low, high] with low < high.")
        if not 0 <= self.missing_eos_penalty < math.inf:
            raise UsageError(f"missing_eos_penalty is {self.missing_eos_penalty}: expected a number ≥ 0, which is subtracted.")

    def __call__(self, rollouts: Sequence[Rollout], texts: Sequence[Text]) -> Rewards:
        assert len(rollouts) == len(texts), "one text per rollout"
        seconds, failures, messages, scores = {}, {}, {}, {}
        for part in self.parts:
            begin = time.perf_counter()
            said = part.call(rollouts, texts)
            seconds[part.name], failures[part.name] = time.perf_counter() - begin, said.failures
            if said.message:
                messages[part.name] = said.message
            scores[part.name] = torch.tensor([math.nan if v is None else v for v in said.values], dtype=torch.float32)
        self.report = Report(seconds, failures, messages)
        return self.combine(scores, rollouts)

    def combine(self, scores: Mapping[str, Tensor], rollouts: Sequence[Rollout]) -> Rewards:
        """The weighted sum of the parts, clipped, less the penalty: weights 1 and 2, scores 0.5 and NaN → 0.5."""
        table = torch.stack([scores[part.name] for part in self.parts])
        seen = ~table.isnan()
        weights = torch.tensor([part.weight for part in self.parts])[:, None]
        scored = seen.any(0)
        unended = torch.tensor([rollout.stop != "stop" for rollout in rollouts], dtype=torch.bool)
        total = torch.where(seen, weights * table, 0).sum(0).clamp(*self.clip) - self.missing_eos_penalty * unended
        if not total.isfinite().all():
            raise DataError("the weighted sum of the rewards overflows: lower the weights, or clip the reward.")
        given = {part.name: part.weight for part in self.parts}
        return Rewards.of(
            torch.where(scored, total, 0), parts=dict(scores), scored=scored, weights=given, actions=sum(sum(r.sampled) for r in rollouts)
        )

    def close(self) -> None:
        """End the workers of isolated functions."""
        for part in self.parts:
            if isinstance(part.call, Called):
                part.call.close()


@dataclass(frozen=True)
class Called:
    """A rule or function as a part: rollouts and texts become prompts, completions and columns."""

    function: RewardFunction

    def __call__(self, rollouts: Sequence[Rollout], texts: Sequence[Text]) -> Scored:
        return self.function([t.prompt for t in texts], [t.completion for t in texts], columns_of(rollouts))

    def close(self) -> None:
        stop = getattr(self.function.call, "stop", None)
        if callable(stop):
            stop()


def columns_of(rollouts: Sequence[Rollout]) -> dict[str, list[Any]]:
    """The data's columns, one value per rollout (None where a row lacks it), with `lengths` (tokens sampled) and `stops` (why each answer ended)."""
    names = dict.fromkeys(name for rollout in rollouts for name in rollout.prompt.columns)
    if taken := [name for name in names if name in RESERVED]:
        raise DataError(
            f"the data has a column named {', '.join(taken)}, which the reward already gets under that name: rename it with `columns:`."
        )
    found: dict[str, list[Any]] = {name: [rollout.prompt.columns.get(name) for rollout in rollouts] for name in names}
    return found | {"lengths": [sum(rollout.sampled) for rollout in rollouts], "stops": [rollout.stop for rollout in rollouts]}


def no_models(spec: RewardSpec) -> Callable[[Sequence[Rollout], Sequence[Text]], Scored]:
    """The loader where there can be no reward model."""
    raise UsageError(f"the reward `{spec.name}` is a model, which cannot be loaded here: give a rule or a function.")


def build(
    reward: Any,
    *,
    base: Path = Path(),
    load_model: LoadModel = no_models,
    missing_eos_penalty: float = 0.0,
    clip: tuple[float, float] = (-math.inf, math.inf),
) -> Scorer:
    """The scorer that a configuration's `reward:` asks for; files are relative to `base`, reward models come from `load_model`."""
    parts = [
        Part(spec.name, spec.weight, load_model(spec) if isinstance(spec.source, Model) else Called(function_of(spec, base)))
        for spec in parse(reward)
    ]
    return Scorer(parts, missing_eos_penalty, clip)
