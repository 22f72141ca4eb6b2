"""What training leaves: an agent that acts, is saved as a folder and comes back the same, and its evaluation on whole episodes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tilt.classic.dynamics import Actions, Array, Continuous
from tilt.classic.environments import Environments
from tilt.classic.normalisation import Running
from tilt.classic.rollouts import NOISE, counted
from tilt.errors import UsageError


@dataclass(frozen=True)
class Report:
    """Where training stands: steps taken, of how many, and (steps, return, length) of every episode that is over."""

    steps: int
    total: int
    finished: Sequence[tuple[int, float, int]]

    @property
    def recent(self) -> float:
        """Mean return of the last 100 episodes; NaN before the first ends."""
        return float(np.mean([earned for _, earned, _ in self.finished[-100:]])) if self.finished else float("nan")


@dataclass(frozen=True)
class Agent:
    """Networks, their settings, and the statistics that observations are scaled with. A policy network draws its actions; action values act greedily."""

    environment: str
    method: str
    settings: Any
    actions: Actions
    policy: nn.Module
    critic: nn.Module | None
    observed: Running | None
    seed: int

    @torch.inference_mode()
    def act(self, observations: Array, noise: Tensor | None = None) -> Array:
        """An action for each observation [N, D]: the likeliest one, or one drawn with `noise` (uniforms [N], or normals [N, n])."""
        seen = observations if self.observed is None else self.observed.centred(observations)
        said = self.policy(torch.from_numpy(np.ascontiguousarray(seen, dtype=np.float32)))
        if isinstance(said, Tensor):
            return said.argmax(-1).numpy()
        return (said.mode() if noise is None else said.sample(noise)).numpy()


@dataclass(frozen=True)
class Trained:
    """The agent, (steps taken by then, return, length) of every episode while it learned, and how many steps that took."""

    agent: Agent
    finished: Sequence[tuple[int, float, int]]
    steps: int


def evaluate(agent: Agent, environments: Environments, *, seed: int, deterministic: bool = True) -> Array:
    """What one whole episode in each environment earned, [N]: no episode counts more for being short."""
    now = environments.reset(seed)
    earned, going = np.zeros(environments.count), np.ones(environments.count, dtype=bool)
    generator = counted(seed, NOISE, 2**32)
    while going.any():
        moved = environments.step(agent.act(now, None if deterministic else _noise(agent.actions, environments.count, generator)))
        earned += moved.rewards * going
        going &= ~(moved.terminated | moved.truncated)
        now = moved.observations
    return earned


def _noise(actions: Actions, count: int, generator: np.random.Generator) -> Tensor:
    if isinstance(actions, Continuous):
        return torch.from_numpy(generator.standard_normal((count, actions.size), dtype=np.float32))
    return torch.from_numpy(generator.random(count, dtype=np.float32))


def check_numbers(
    settings: Any,
    *,
    at_least_one: Sequence[str] = (),
    not_negative: Sequence[str] = (),
    positive: Sequence[str] = (),
    fraction: Sequence[str] = (),
) -> None:
    """Refuse settings that are out of range, by name."""
    kind = type(settings).__name__
    rules = (
        (at_least_one, lambda x: x >= 1, "must be at least 1"),
        (not_negative, lambda x: x >= 0, "must not be negative"),
        (positive, lambda x: x > 0, "must be above 0"),
        (fraction, lambda x: 0 <= x <= 1, "must lie in [0, 1]"),
    )
    for names, fine, told in rules:
        for name in names:
            if not fine(getattr(settings, name)):
                raise UsageError(f"{kind}: {name}={getattr(settings, name)} {told}")


def check_training(envs: int, environments: Environments, steps: int) -> None:
    """Refuse to train for no steps, or on another number of environments than the settings say."""
    if steps < 1 or environments.count != envs:
        raise UsageError(f"train: steps={steps} must be at least 1 and envs={envs} be the {environments.count} environments given")
