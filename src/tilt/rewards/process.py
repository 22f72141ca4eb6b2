"""Rewards for steps: a process reward model, or a function, judges every step of an answer, and what it says is earned where the step ends."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from tilt.data.packing import pack
from tilt.data.rollouts import Rollout
from tilt.data.steps import Decode, step_ends
from tilt.errors import DataError, NumericError
from tilt.models.policy import RewardModel
from tilt.rewards.functions import RewardFunction, Scored
from tilt.rewards.model import Retokenise
from tilt.rewards.score import columns_of
from tilt.rewards.text import Text, inert

Judgement = list[list[float | None]]


class StepJudge(Protocol):
    """What the steps of each answer earn, None where one cannot be judged; `ends` are the tokens of the answers at which they end."""

    def __call__(self, rollouts: Sequence[Rollout], texts: Sequence[Text], ends: Sequence[Sequence[int]]) -> tuple[Judgement, int, str]: ...


@dataclass(frozen=True)
class ProcessReward:
    """A part of the reward that lies on steps: each earns what the judge says, at the step's last action. The part's own value is the mean over an answer's steps."""

    separator: str
    decode: Decode
    judge: StepJudge

    def __call__(self, rollouts: Sequence[Rollout], texts: Sequence[Text]) -> Scored:
        ends = [
            step_ends(rollout.tokens, self.separator, self.decode, text.completion) for rollout, text in zip(rollouts, texts, strict=True)
        ]
        said, failures, message = self.judge(rollouts, texts, ends)
        judged = [
            [(end, value) for end, value in zip(own, values, strict=True) if value is not None]
            for own, values in zip(ends, said, strict=True)
        ]
        steps = [[(action_at(rollout, end), value) for end, value in own] for rollout, own in zip(rollouts, judged, strict=True)]
        means = [sum(value for _, value in own) / len(own) if own else None for own in judged]
        return Scored(means, failures, message, steps)


def action_at(rollout: Rollout, token: int) -> int:
    """Number of the last action at or before a token of the answer; the first action where there is none before."""
    return max(0, sum(rollout.sampled[: token + 1]) - 1)


@dataclass(frozen=True)
class StepModel:
    """The chance that each step is right, sigmoid of the process reward model's score after its last token; `budget` is the number of tokens in one forward."""

    name: str
    model: RewardModel
    separator: str
    decode: Decode
    retokenise: Retokenise
    budget: int = 16384

    def __post_init__(self) -> None:
        self.model.requires_grad_(False).eval()

    @torch.no_grad()
    def __call__(self, rollouts: Sequence[Rollout], texts: Sequence[Text], ends: Sequence[Sequence[int]]) -> tuple[Judgement, int, str]:
        if not rollouts:
            return [], 0, ""
        read = [self.retokenise(rollout, text) for rollout, text in zip(rollouts, texts, strict=True)]
        own = [
            given if new is old else step_ends(new.tokens, self.separator, self.decode, text.completion)
            for new, old, given, text in zip(read, rollouts, ends, texts, strict=True)
        ]
        row, device = pack(read), next(self.model.parameters()).device
        found: Judgement = [[] for _ in rollouts]
        for part in row.split(self.budget):
            numbers = part.tolist()
            scores = torch.sigmoid(self.model.after(row.take(part).to(device), [own[i] for i in numbers]).float()).cpu()
            for i, values in zip(numbers, scores.split([len(own[i]) for i in numbers]), strict=True):
                found[i] = values.tolist()
        for i, chances in enumerate(found):
            if not all(chance is not None and math.isfinite(chance) for chance in chances):
                raise NumericError(
                    f"the process reward model {self.name} is not finite on sample {i}: prompt {inert(texts[i].prompt)}, completion {inert(texts[i].completion)}\n"
                    "Look at its training run, or load it in float32."
                )
        return found, 0, ""


@dataclass(frozen=True)
class StepFunction:
    """A function that is asked once about all steps: `steps` are their texts, `completions` the answers up to and with each, `last` whether the answer ends with it.
    It gives a number, or None, for each."""

    function: RewardFunction
    separator: str

    def __call__(self, rollouts: Sequence[Rollout], texts: Sequence[Text], ends: Sequence[Sequence[int]]) -> tuple[Judgement, int, str]:
        steps = [[step for step in text.completion.split(self.separator) if step.strip()] or [text.completion] for text in texts]
        counts = [len(own) for own in steps]
        columns = columns_of(rollouts)
        if taken := [name for name in ("steps", "last") if name in columns]:
            raise DataError(
                f"the data has a column named {taken[0]}, which a judge of steps already gets under that name: rename it with `columns:`."
            )
        columns = {name: [value for value, n in zip(values, counts, strict=True) for _ in range(n)] for name, values in columns.items()}
        prompts = [text.prompt for text, n in zip(texts, counts, strict=True) for _ in range(n)]
        so_far = [self.separator.join(own[: k + 1]) for own in steps for k in range(len(own))]
        columns |= {"steps": [step for own in steps for step in own], "last": [k == n - 1 for n in counts for k in range(n)]}
        said = self.function(prompts, so_far, columns)
        values = iter(said.values)
        return [[next(values) for _ in range(n)] for n in counts], said.failures, said.message
