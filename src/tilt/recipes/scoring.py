"""From a recipe's `reward:` to a scorer: rules, functions and reward models, with the text that they read."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from tilt.data.rendering import renderer
from tilt.data.rollouts import Rollout
from tilt.models.loading import load_reward_model
from tilt.models.policy import RewardModel
from tilt.objectives import Rewards
from tilt.rewards.model import ModelReward, Rerendered, own_tokens, same_tokenizer
from tilt.rewards.score import Scorer, build
from tilt.rewards.spec import Model, RewardSpec
from tilt.rewards.text import Text, read

Read = Callable[[Sequence[Rollout]], list[Text]]


@dataclass(frozen=True)
class Scoring:
    """A scorer, how rollouts are read, and the reward models in it with whether each reads the policy's own tokens."""

    score: Scorer
    read: Read
    models: tuple[tuple[RewardModel, bool], ...]

    @property
    def critic_source(self) -> RewardModel | None:
        """The reward model that a critic can start from: the first that reads the policy's tokens."""
        return next((model for model, shared in self.models if shared), None)

    def judge(self, rollouts: Sequence[Rollout], *, training: bool = False) -> tuple[list[Text], Rewards]:
        """The answers as text, and what they earn; in `training` normalised parts learn from them."""
        texts = self.read(rollouts)
        return texts, self.score(rollouts, texts, training=training)

    def __call__(self, rollouts: Sequence[Rollout]) -> Rewards:
        return self.judge(rollouts)[1]

    def close(self) -> None:
        """End the workers of isolated functions."""
        self.score.close()


def reader(tokenizer: Any) -> Read:
    """Rollouts to text; special tokens, the stop token among them, are not part of it."""

    def decode(tokens: Sequence[int]) -> str:
        return str(tokenizer.decode(list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False))

    return lambda rollouts: read(rollouts, decode)


def scoring(reward: Any, tokenizer: Any, device: torch.device, *, missing_stop_penalty: float = 0.0, clip: float | None = None) -> Scoring:
    """The scorer that `reward:` asks for: names, rules, Python functions, reward models, or a list of them."""
    found: list[tuple[RewardModel, bool]] = []

    def load(spec: RewardSpec) -> ModelReward:
        assert isinstance(spec.source, Model)
        model, words = load_reward_model(spec.source.path, device=device)
        shared = same_tokenizer(words, tokenizer)
        found.append((model, shared))
        how = own_tokens if shared else Rerendered(renderer(words, "auto"))
        return ModelReward(spec.name, model, how, spec.source.budget)

    bounds = (-math.inf, math.inf) if clip is None else (-clip, clip)
    score = build(reward, load_model=load, missing_eos_penalty=missing_stop_penalty, clip=bounds)
    return Scoring(score, reader(tokenizer), tuple(found))
