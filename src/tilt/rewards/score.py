"""From rollouts to Rewards: every part scored under its clock, weighted and added; what no part could score is left out."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from tilt.data.rollouts import Rollout
from tilt.errors import DataError, UsageError
from tilt.objectives.credit import earned
from tilt.objectives.experience import Rewards
from tilt.rewards.ahead import Ahead
from tilt.rewards.functions import RewardFunction, Scored
from tilt.rewards.pace import Pace, advice
from tilt.rewards.programs import Code, Programs
from tilt.rewards.reasons import Reason, reasons
from tilt.rewards.spec import Function, Judge, LoadModel, Model, Process, RewardSpec, function_of, parse
from tilt.rewards.text import Text
from tilt.segments import Layout

Steps = Sequence[Sequence[tuple[int, float]]]
EMPTY: Mapping[str, Steps] = MappingProxyType({})
MISSING_STOP = "missing_stop"
RESERVED = ("prompts", "completions", "lengths", "stops")


@dataclass
class Running:
    """Mean and standard deviation (divisor n) of every score seen so far, batches joined as Chan, Golub and LeVeque do (1979)."""

    count: float = 0.0
    mean: float = 0.0
    squares: float = 0.0

    @property
    def deviation(self) -> float:
        return math.sqrt(self.squares / self.count) if self.count else 0.0

    def see(self, scores: Tensor) -> None:
        """Join a batch of scores, NaN left out."""
        new = scores[~scores.isnan()].double()
        if not len(new):
            return
        both, away = self.count + len(new), float(new.mean()) - self.mean
        self.squares += float((new - new.mean()).square().sum()) + away**2 * self.count * len(new) / both
        self.mean += away * len(new) / both
        self.count = both

    def __call__(self, scores: Tensor) -> Tensor:
        """(x - mean) / deviation; 0 where every score so far was the same."""
        return (scores - self.mean) / self.deviation if self.deviation else torch.where(scores.isnan(), scores, 0.0)


@dataclass(frozen=True)
class Part:
    """One part of the reward, ready to be called; with `running` its scores are normalised in training by all that training has seen. `advice` is for a slow one."""

    name: str
    weight: float
    call: Callable[[Sequence[Rollout], Sequence[Text]], Scored]
    running: Running | None = None
    advice: str = ""


@dataclass(frozen=True)
class Report:
    """What scoring a batch cost: seconds and failed samples of each part, and in words the first failure (with on_error zero or skip) and that a part is slow; the running
    mean and deviation of the parts that are normalised."""

    seconds: Mapping[str, float] = field(default_factory=dict)
    failures: Mapping[str, int] = field(default_factory=dict)
    messages: Mapping[str, str] = field(default_factory=dict)
    running: Mapping[str, tuple[float, float]] = field(default_factory=dict)

    @staticmethod
    def join(given: Sequence[Report]) -> Report:
        """What scoring several batches cost; of each part the first failure in words, and the running figures of the last."""
        seconds, failures, messages = Counter[str](), Counter[str](), dict[str, str]()
        for report in given:
            seconds.update(report.seconds)  # type: ignore[arg-type]
            failures.update(report.failures)
            messages = {**report.messages, **messages}
        return Report(dict(seconds), dict(failures), messages, given[-1].running)

    def metrics(self) -> dict[str, tuple[Tensor, Tensor]]:
        """`reward/NAME_seconds`, `_failed`, and where it is normalised `_running_mean` and `_running_std`, as (sum, weight)."""
        one = torch.ones(())
        found = {f"reward/{name}_seconds": (torch.tensor(s), one) for name, s in self.seconds.items()}
        for name, (mean, deviation) in self.running.items():
            found |= {
                f"reward/{name}_running_mean": (torch.tensor(mean), one),
                f"reward/{name}_running_std": (torch.tensor(deviation), one),
            }
        return found | {f"reward/{name}_failed": (torch.tensor(float(n)), one) for name, n in self.failures.items()}


@dataclass
class Scorer:
    """Scorer(rollouts, texts) → Rewards: total = clip(sum over parts that scored of weight · score) − missing_eos_penalty where the answer did not end by itself.

    A part that gives None is left out of that sequence's sum; without any part a sequence is unscored and its total 0. `parts` holds every part as it
    scored, NaN for None, and the penalty as a part of its own, `missing_stop`, -1 or 0. In `training` normalised parts are learned from and enter
    the total normalised; elsewhere they are as they are. `report` tells of the latest batch.
    """

    parts: Sequence[Part]
    missing_eos_penalty: float = 0.0
    clip: tuple[float, float] = (-math.inf, math.inf)
    report: Report = field(default_factory=Report)
    pace: Pace = field(default_factory=Pace)

    def __post_init__(self) -> None:
        if not self.clip[0] < self.clip[1]:
            raise UsageError(f"the reward's clip {list(self.clip)} is no interval: give [low, high] with low < high.")
        if not 0 <= self.missing_eos_penalty < math.inf:
            raise UsageError(f"missing_eos_penalty is {self.missing_eos_penalty}: expected a number ≥ 0, which is subtracted.")
        if any(part.name == MISSING_STOP for part in self.parts):
            raise UsageError(
                f"the reward has a part named {MISSING_STOP}, which is the name of the penalty for it: give it another `name:`."
            )

    def __call__(self, rollouts: Sequence[Rollout], texts: Sequence[Text], *, training: bool = False) -> Rewards:
        assert len(rollouts) == len(texts), "one text per rollout"
        seconds, failures, messages, scores, dense = {}, {}, {}, {}, {}
        for part in self.parts:
            begin = time.perf_counter()
            said = part.call(rollouts, texts)
            seconds[part.name], failures[part.name] = time.perf_counter() - begin, said.failures
            if said.message:
                messages[part.name] = said.message
            scores[part.name] = torch.tensor([math.nan if v is None else v for v in said.values], dtype=torch.float32)
            if said.steps is not None:
                dense[part.name] = said.steps
            if training and part.running is not None:
                part.running.see(scores[part.name])
        kept = {part.name: (part.running.mean, part.running.deviation) for part in self.parts if training and part.running is not None}
        if training and (slow := self.pace.step(seconds)):
            messages[f"{slow.part} is slow"] = f"{slow} {next(part.advice for part in self.parts if part.name == slow.part)}".strip()
        self.report = Report(seconds, failures, messages, kept)
        return self.combine(scores, rollouts, training, dense)

    def combine(
        self, scores: Mapping[str, Tensor], rollouts: Sequence[Rollout], training: bool = False, dense: Mapping[str, Steps] = EMPTY
    ) -> Rewards:
        """The weighted sum of the parts, clipped, less the penalty: weights 1 and 2, scores 0.5 and NaN → 0.5.

        A part that judged steps (`dense`) weighs 0 in it: its rewards, times its weight, stand at the actions where the steps end.
        """
        table = torch.stack(
            [part.running(scores[part.name]) if training and part.running is not None else scores[part.name] for part in self.parts]
        )
        seen = ~table.isnan()
        given = {part.name: 0.0 if part.name in dense else part.weight for part in self.parts}
        weights = torch.tensor(list(given.values()))[:, None]
        scored = seen.any(0)
        unended = torch.tensor([rollout.stop != "stop" for rollout in rollouts], dtype=torch.bool)
        total = torch.where(seen, weights * table, 0).sum(0).clamp(*self.clip) - self.missing_eos_penalty * unended
        if not total.isfinite().all():
            raise DataError("the weighted sum of the rewards overflows: lower the weights, or clip the reward.")
        parts = dict(scores)
        if self.missing_eos_penalty:
            parts[MISSING_STOP], given[MISSING_STOP] = 0.0 - unended.float(), self.missing_eos_penalty
        steps, ends = self._along(dense, rollouts)
        return Rewards.of(torch.where(scored, total, 0), steps, parts=parts, scored=scored, weights=given, ends=ends)

    def _along(self, dense: Mapping[str, Steps], rollouts: Sequence[Rollout]) -> tuple[Tensor, Tensor]:
        """Rewards per action [A], and where steps end: 2 and 3 actions, steps (1, .5) and (0, .2) (2, .3) → 0 .5 .2 0 .3."""
        lengths = torch.tensor([sum(r.sampled) for r in rollouts])
        starts = (lengths.cumsum(0) - lengths).tolist()
        steps, ends = torch.zeros(int(lengths.sum())), torch.zeros(int(lengths.sum()), dtype=torch.bool)
        for part in self.parts:
            for start, given in zip(starts, dense.get(part.name, ()), strict=False):
                for action, value in given:
                    steps[start + action] += part.weight * value
                    ends[start + action] = True
        return steps, ends

    @property
    def notes(self) -> list[str]:
        """What the first lines of a run say of parts that run programs."""
        functions = [part.call.call if isinstance(part.call, Ahead) else part.call for part in self.parts]
        found = [function.function.call for function in functions if isinstance(function, Called)]
        return [call.note for call in found if isinstance(call, Programs)]

    def reasons(self, rollouts: Sequence[Rollout], texts: Sequence[Text]) -> list[dict[str, Reason]]:
        """For each answer why each rule of the library scored it as it did, by part; functions and models do not say."""
        found: list[dict[str, Reason]] = [{} for _ in rollouts]
        calls = {
            part.name: getattr(part.call, "plain", part.call) for part in self.parts
        }  # a replay reads scores, and asks the rule itself why
        rules = {name: call.function.call for name, call in calls.items() if isinstance(call, Called)}
        columns = columns_of(rollouts) if rules else {}
        for name, rule in rules.items():
            for mine, reason in zip(found, reasons(rule, [t.completion for t in texts], columns) or (), strict=False):
                mine[name] = reason
        return found

    @property
    def overlaps(self) -> bool:
        """Whether a part can judge some answers while others are generated."""
        return any(isinstance(part.call, Ahead) and part.call.early for part in self.parts)

    def begin(self, rollouts: Sequence[Rollout], texts: Sequence[Text]) -> None:
        """Let the parts that can begin with the answers to one prompt; what they say is read with the whole batch."""
        for part in self.parts:
            if isinstance(part.call, Ahead) and part.call.early:
                part.call.begin(rollouts, texts)

    def close(self) -> None:
        """End the workers of isolated functions."""
        for part in self.parts:
            called = part.call
            if isinstance(called, Ahead):
                called.close()
                called = called.call
            if isinstance(called, Called):
                called.close()


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


def earned_by(rollouts: Sequence[Rollout], rewards: Rewards) -> Tensor:
    """What each answer earned in all, [S]: as a whole and at its steps."""
    lengths = [sum(rollout.sampled) for rollout in rollouts]
    return earned(rewards, Layout.of(lengths)) if rewards.steps.numel() else rewards.total


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

    def called(spec: RewardSpec) -> Callable[[Sequence[Rollout], Sequence[Text]], Scored]:
        if isinstance(spec.source, Model | Process | Judge):
            return load_model(spec)
        function = Called(function_of(spec, base))
        if not isinstance(spec.source, Function | Code) or not (spec.source.overlap or spec.source.workers):
            return function
        return Ahead(function, spec.source.workers or 1, spec.source.overlap)

    parts = [Part(spec.name, spec.weight, called(spec), Running() if spec.normalise else None, advice(spec)) for spec in parse(reward)]
    return Scorer(parts, missing_eos_penalty, clip)
