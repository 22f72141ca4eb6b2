"""Pretraining beside reinforcement learning, against forgetting (PPO-ptx, InstructGPT, 2203.02155): one more loss in every optimizer step of the policy."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from tilt.data.packing import Pack, pack
from tilt.data.rollouts import Rollout
from tilt.data.streams import Stream
from tilt.models.policy import Policy


@dataclass(frozen=True)
class Pretraining:
    """`batch` texts a step, whose coefficient · mean over tokens of −log policy is added to the policy's loss, at temperature 1 whatever the answers'."""

    texts: Stream[Rollout]
    batch: int
    coefficient: float

    def draw(self, step: int) -> Pack:
        """The texts of optimizer step `step`; the count is the only state."""
        return pack(self.texts.draw(step, self.batch))

    def nll(self, policy: Policy, part: Pack, actions: int) -> Tensor:
        """What these whole texts contribute to the mean over the batch's `actions`, nats a token; the parts of a batch add up."""
        total: Tensor = policy(part).logprobs.sum()
        return -total / actions
