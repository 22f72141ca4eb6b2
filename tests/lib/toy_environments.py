"""Environments with obvious answers, for the control methods."""

from __future__ import annotations

import numpy as np

from tilt.classic.dynamics import Actions, Array, Continuous, Discrete
from tilt.classic.environments import Moved


class Identity:
    """The observation (one of two, one-hot) says which action earns 1; episodes of 100 steps. With `continuous` the reward is -(action - target)² for targets ±0.5."""

    observation = 2

    def __init__(self, count: int, continuous: bool = False) -> None:
        self.count, self.continuous = count, continuous
        self.actions: Actions = Continuous((-1.0,), (1.0,)) if continuous else Discrete(2)

    def reset(self, seed: int | None = None) -> Array:
        if seed is not None:
            self.generator = np.random.default_rng(seed)
        self.age = np.zeros(self.count, dtype=np.int64)
        return self._draw()

    def _draw(self) -> Array:
        self.state = self.generator.integers(2, size=self.count)
        return np.eye(2, dtype=np.float32)[self.state]

    def step(self, actions: Array) -> Moved:
        rewards = -np.square(actions[:, 0] - (self.state - 0.5)) if self.continuous else (actions == self.state).astype(np.float64)
        self.age += 1
        late = self.age >= 100
        self.age[late] = 0
        seen = self._draw()
        return Moved(seen, rewards, np.zeros(self.count, dtype=bool), late, seen)


class Endless:
    """Nothing to see, 1 a step whatever is done, cut off after 8 steps: with gamma .98 every state is worth 50."""

    observation = 1
    actions: Actions = Discrete(2)

    def __init__(self, count: int) -> None:
        self.count = count

    def reset(self, seed: int | None = None) -> Array:
        self.age = 0
        return np.ones((self.count, 1), dtype=np.float32)

    def step(self, actions: Array) -> Moved:
        self.age += 1
        late = np.full(self.count, self.age % 8 == 0)
        seen = np.ones((self.count, 1), dtype=np.float32)
        return Moved(seen, np.ones(self.count), np.zeros(self.count, dtype=bool), late, seen)


class Clock:
    """Environment i's observation is 10 e + t, its episode e and step t; the reward is the step's number; it terminates after i + 2 steps, or is cut off after 4."""

    observation = 1
    actions: Actions = Discrete(2)

    def __init__(self, count: int) -> None:
        self.count = count

    def reset(self, seed: int | None = None) -> Array:
        if seed is not None:
            self.episode = np.full(self.count, -1)
        self.episode = self.episode + 1
        self.age = np.zeros(self.count, dtype=np.int64)
        return self._seen()

    def _seen(self) -> Array:
        return (10 * self.episode + self.age).astype(np.float32)[:, None]

    def step(self, actions: Array) -> Moved:
        self.age = self.age + 1
        rewards, last = self.age.astype(np.float64), self._seen()
        terminated = self.age >= np.arange(self.count) + 2
        truncated = (self.age >= 4) & ~terminated
        over = terminated | truncated
        self.episode = self.episode + over
        self.age = np.where(over, 0, self.age)
        return Moved(self._seen(), rewards, terminated, truncated, last)
