"""Rollouts of N environments on the action axis: a step is an action, a piece of an episode a sequence, and the state where a piece stops has its own value."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tilt.classic.dynamics import Array, Continuous
from tilt.classic.environments import Environments
from tilt.classic.networks import Policy
from tilt.classic.normalisation import RewardScale, Running
from tilt.segments import Layout

NOISE, SHUFFLE, REPLAY = 1, 2, 3
"""What a stream of counted draws is for; 0 are the starts of episodes."""
ROWS = 128


def counted(seed: int, purpose: int, block: int) -> np.random.Generator:
    """Draws that are a function of (seed, purpose, block) alone."""
    return np.random.Generator(np.random.Philox(key=seed, counter=[0, purpose, block, 0]))


@dataclass(frozen=True)
class Rollout:
    """Pieces of episodes end to end: `observations` [A, D] and `rewards` [A] as the networks see them, `actions` [A] or [A, n].

    `last` [S, D] is the observation where a piece stopped; it `ended` there [S], or the episode was cut off and would have gone on.
    """

    observations: Tensor
    actions: Tensor
    rewards: Tensor
    layout: Layout
    last: Tensor
    ended: Tensor


class Book:
    """Steps taken in N environments together, and (steps taken by then, return, length) of every episode that is over, as the environment pays."""

    def __init__(self, environments: int) -> None:
        self.earned, self.length = np.zeros(environments), np.zeros(environments, dtype=np.int64)
        self.steps = 0
        self.finished: list[tuple[int, float, int]] = []

    def add(self, rewards: Array, over: Array, going: Array | None = None) -> None:
        """A step of every environment [N], or of those that are `going` alone."""
        if going is None:
            self.steps += len(rewards)
            self.earned += rewards
            self.length += 1
        else:
            self.steps += int(going.sum())
            self.earned += rewards * going
            self.length += going
            over = over & going
        if over.any():
            for i in np.flatnonzero(over).tolist():
                self.finished.append((self.steps, float(self.earned[i]), int(self.length[i])))
            self.drop(over)

    def drop(self, which: Array | slice = slice(None)) -> None:
        """Begin the count of these environments' episodes anew."""
        self.earned[which], self.length[which] = 0.0, 0


class Collector:
    """Plays a policy in N environments: what goes on from rollout to rollout is where the episodes stand, and what has been seen of observations and rewards.

    Statistics change between rollouts only, so the old and the new policy see the same numbers.
    """

    def __init__(self, environments: Environments, seed: int, scale: RewardScale | None = None, observed: Running | None = None) -> None:
        self.environments, self.scale, self.observed = environments, scale, observed
        self.now = environments.reset(seed)
        self.noise = _noise(environments, seed)
        self.book = Book(environments.count)

    @property
    def steps(self) -> int:
        """Steps taken in all environments together."""
        return self.book.steps

    @property
    def finished(self) -> list[tuple[int, float, int]]:
        """The episodes that are over."""
        return self.book.finished

    def seen(self, observations: Array) -> Array:
        """Observations as the networks see them."""
        return observations if self.observed is None else self.observed.centred(observations)

    def collect(self, policy: Policy, steps: int) -> Rollout:
        """`steps` steps in each environment; with steps 0 one whole episode in each, from its start."""
        whole = steps == 0
        if whole and self.steps:
            self.now = self.environments.reset()
            self.book.drop()
        waiting = np.zeros(self.environments.count, dtype=bool)
        kept: list[tuple[Array, ...]] = []
        while len(kept) < steps or (whole and not waiting.all()):
            with torch.inference_mode():
                actions = policy(torch.from_numpy(self.seen(self.now))).sample(next(self.noise)).numpy()
            moved = self.environments.step(actions)
            kept.append((self.now, actions, moved.rewards, moved.terminated, moved.terminated | moved.truncated, moved.last, ~waiting))
            self.now = moved.observations
            self.book.add(moved.rewards, kept[-1][4], ~waiting if whole else None)
            if whole:
                waiting |= kept[-1][4]
        columns = tuple(np.stack(column) for column in zip(*kept, strict=True))
        observations, actions, rewards, terminated, over, last, alive = columns
        over = over.copy()
        over[-1] = True
        flat = Flat(alive, over)
        rollout = self._rollout(flat, observations, actions, rewards, terminated, last, columns[4])
        if self.observed is not None:
            self.observed.update(flat(observations))
        return rollout

    def _rollout(
        self, flat: Flat, observations: Array, actions: Array, rewards: Array, terminated: Array, last: Array, over: Array
    ) -> Rollout:
        paid = rewards if self.scale is None else self.scale(rewards, over)
        return Rollout(
            torch.from_numpy(self.seen(flat(observations))),
            torch.from_numpy(flat(actions)),
            torch.from_numpy(flat(paid).astype(np.float32)),
            flat.layout,
            torch.from_numpy(self.seen(flat(last)[flat.stops])),
            torch.from_numpy(flat(terminated)[flat.stops]),
        )


class Flat:
    """[T, N, …] → [A, …], environment after environment, steps in order, without those that do not count.

    Environments a, b with an end after a's first step: a0 | a1 a2 | b0 b1 b2 → sequence 0 1 1 2 2 2, stops 0 2 5.
    """

    def __init__(self, alive: Array, over: Array) -> None:
        self.alive = None if alive.all() else alive.T
        ends = self(over)
        self.stops = np.flatnonzero(ends)
        sequence = np.cumsum(ends) - ends
        self.layout = Layout(torch.from_numpy(sequence), torch.arange(len(self.stops)))

    def __call__(self, x: Array) -> Array:
        turned = x.swapaxes(0, 1)
        if self.alive is not None:
            return turned[self.alive]
        return np.ascontiguousarray(turned).reshape(-1, *x.shape[2:])


def _noise(environments: Environments, seed: int) -> Iterator[Tensor]:
    """What each step's actions are drawn with: a uniform for a discrete action, normals for a continuous one."""
    actions, block = environments.actions, 0
    while True:
        generator = counted(seed, NOISE, block)
        if isinstance(actions, Continuous):
            rows = generator.standard_normal((ROWS, environments.count, actions.size), dtype=np.float32)
        else:
            rows = generator.random((ROWS, environments.count), dtype=np.float32)
        yield from torch.from_numpy(rows)
        block += 1
