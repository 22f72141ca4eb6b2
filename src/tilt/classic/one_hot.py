"""A finite process as N environments whose observation is the state, one-hot: what networks learn there can be held against the exact answer."""

from __future__ import annotations

import numpy as np

from tilt.classic.dynamics import Actions, Array, Discrete
from tilt.classic.environments import Moved
from tilt.classic.episodes import OUTCOME, World, draws, steps_of
from tilt.classic.mdp import MDP
from tilt.errors import UsageError


class OneHot:
    """N walks through a process; episode e of walk i has the draws of (seed, e N + i), so one walk meets what `tilt.classic.temporal_difference` meets."""

    def __init__(self, mdp: MDP, count: int, seed: int = 0) -> None:
        if count < 1:
            raise UsageError(f"envs={count} must be at least 1")
        self.mdp, self.world, self.limit = mdp, World.of(mdp), steps_of(mdp, None)
        self.count, self.observation = count, mdp.state_count
        self.actions: Actions = Discrete(mdp.action_count)
        self.rows = np.eye(mdp.state_count, dtype=np.float32)
        self._begin(seed)

    def _begin(self, seed: int) -> None:
        self.seed, self.episodes = seed, np.zeros(self.count, dtype=np.int64)
        self.states, self.age = np.zeros(self.count, dtype=np.int64), np.zeros(self.count, dtype=np.int64)
        self.drawn = [draws(seed, i) for i in range(self.count)]

    def reset(self, seed: int | None = None) -> Array:
        """Begin N new episodes."""
        if seed is not None:
            self._begin(seed)
        for i in range(self.count):
            self._fresh(i)
        return self.rows[self.states]

    def step(self, actions: Array) -> Moved:
        """One action in each walk, [N]."""
        last = np.empty_like(self.states)
        rewards, terminated, truncated = np.empty(self.count), np.zeros(self.count, dtype=bool), np.zeros(self.count, dtype=bool)
        for i, action in enumerate(actions.tolist()):
            last[i], rewards[i], terminated[i] = self.world.step(int(self.states[i]), action, next(self.drawn[i])[OUTCOME])
            self.states[i] = last[i]
            self.age[i] += 1
            truncated[i] = self.age[i] >= self.limit and not terminated[i]
            if terminated[i] or truncated[i]:
                self._fresh(i)
        return Moved(self.rows[self.states], rewards, terminated, truncated, self.rows[last])

    def _fresh(self, i: int) -> None:
        self.drawn[i] = draws(self.seed, int(self.episodes[i]) * self.count + i)
        self.episodes[i] += 1
        self.states[i], self.age[i] = self.world.begin(next(self.drawn[i])[0]), 0
