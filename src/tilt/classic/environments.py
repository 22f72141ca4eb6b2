"""N environments stepped together: their own batched dynamics, or any of Gymnasium's. An episode that ends begins again at once; its last observation is kept."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from tilt.classic.dynamics import DYNAMICS, Actions, Array, Continuous, Discrete, Dynamics
from tilt.errors import UsageError

STARTS = 32
"""How many episodes' starts of one environment are drawn at a time."""


@dataclass(frozen=True)
class Moved:
    """What a step of N environments gave: `observations` to act on next [N, D], `rewards` [N], which episodes `terminated` and which were `truncated` [N].

    `last` [N, D] is where each action led; it differs from `observations` where an episode ended and the next one has begun.
    """

    observations: Array
    rewards: Array
    terminated: Array
    truncated: Array
    last: Array


class Environments(Protocol):
    """N environments of one kind: `reset` begins N episodes, `step` takes one action in each. Observations are float32 [N, observation].

    A seed fixes everything that follows a `reset(seed)`; without one the episodes go on being counted.
    """

    count: int
    observation: int
    actions: Actions

    def reset(self, seed: int | None = None) -> Array: ...

    def step(self, actions: Array) -> Moved: ...


class Simulated:
    """N environments of our own dynamics. The start of episode e of environment i is a function of (seed, i, e) alone."""

    def __init__(self, dynamics: Dynamics, count: int, seed: int = 0, limit: int | None = None) -> None:
        _check_count(count)
        self.dynamics, self.count, self.actions = dynamics, count, dynamics.actions
        self.observation, self.limit = dynamics.observation, dynamics.limit if limit is None else limit
        self._begin(seed)

    def _begin(self, seed: int) -> None:
        if seed < 0:
            raise UsageError(f"seed={seed} must not be negative")
        self.seed, self.drawn = seed, np.zeros(self.count, dtype=np.int64)
        self.starts = np.zeros((self.count, STARTS, self.dynamics.state))
        self.states, self.age = np.zeros((self.count, self.dynamics.state)), np.zeros(self.count, dtype=np.int64)

    def reset(self, seed: int | None = None) -> Array:
        """Begin N new episodes."""
        if seed is not None:
            self._begin(seed)
        self._fresh(np.arange(self.count))
        return self.dynamics.observe(self.states)

    def step(self, actions: Array) -> Moved:
        """One action in each environment, [N] or [N, action]."""
        self.states, rewards, terminated = self.dynamics.step(self.states, actions)
        last = self.dynamics.observe(self.states)
        self.age += 1
        late = self.age >= self.limit
        over = late | terminated
        if not over.any():
            return Moved(last, rewards, terminated, late, last)
        self._fresh(np.flatnonzero(over))
        return Moved(self.dynamics.observe(self.states), rewards, terminated, late & ~terminated, last)

    def _fresh(self, which: Array) -> None:
        for i in which.tolist():
            block, slot = divmod(int(self.drawn[i]), STARTS)
            if slot == 0:
                generator = np.random.Generator(np.random.Philox(key=self.seed, counter=[0, 0, block, i]))
                self.starts[i] = self.dynamics.start(generator.random((STARTS, self.dynamics.state)))
            self.states[i] = self.starts[i, slot]
            self.drawn[i] += 1
            self.age[i] = 0


class Gymnasium:
    """N environments of Gymnasium, stepped one after the other in this process and reset within the step that ends them (AutoresetMode.SAME_STEP).

    Box observations are flattened to float32, Discrete ones become one-hot; actions are Discrete, or a Box, whose bounds clip what is asked for.
    """

    def __init__(self, name: str, count: int, seed: int = 0, **options: Any) -> None:
        _check_count(count)
        gym = gymnasium()
        same_step = gym.vector.AutoresetMode.SAME_STEP
        try:
            self.inner = gym.make_vec(
                name, num_envs=count, vectorization_mode="sync", vector_kwargs={"autoreset_mode": same_step}, **options
            )
        except gym.error.Error as error:
            raise UsageError(f"Gymnasium cannot make {name}: {error}") from None
        except ImportError as error:
            raise UsageError(f"Gymnasium cannot make {name}: {error}; install what it names") from None
        if self.inner.metadata.get("autoreset_mode") is not same_step:
            raise UsageError(f"{name}: autoreset mode {self.inner.metadata.get('autoreset_mode')} is not SAME_STEP, which this code reads")
        self.count, self.next_seed = count, seed
        self.observation, self.labels = _observed(name, self.inner.single_observation_space, gym)
        self.actions, self.first = _acting(name, self.inner.single_action_space, gym)
        self.shape = self.inner.single_action_space.shape
        self.seeded = False

    def reset(self, seed: int | None = None) -> Array:
        """Begin N new episodes; environment i is seeded with seed + i."""
        if seed is None and self.seeded:
            return self._flat(self.inner.reset()[0])
        self.seeded = True
        return self._flat(self.inner.reset(seed=self.next_seed if seed is None else seed)[0])

    def step(self, actions: Array) -> Moved:
        """One action in each environment, [N] or [N, action]."""
        if isinstance(self.actions, Continuous):
            told: Array = np.clip(actions, self.actions.low, self.actions.high).astype(np.float32).reshape(self.count, *self.shape)
        else:
            told = actions + self.first
        observed, rewards, terminated, truncated, extra = self.inner.step(told)
        observations = self._flat(observed)
        over = terminated | truncated
        last = observations
        if over.any():
            last = observations.copy()
            for i in np.flatnonzero(over):
                last[i] = self._flat(np.asarray(extra["final_obs"][i])[None])[0]
        return Moved(observations, rewards.astype(np.float64), terminated, truncated & ~terminated, last)

    def _flat(self, observed: Array) -> Array:
        if self.labels is not None:
            return np.eye(self.observation, dtype=np.float32)[observed - self.labels]
        return observed.reshape(len(observed), -1).astype(np.float32)


def environments(name: str, count: int, seed: int = 0, **options: Any) -> Environments:
    """N environments by Gymnasium's id: simulated here where the id is one of `DYNAMICS` (and no options are given), else made by Gymnasium."""
    if name in DYNAMICS and not options:
        return Simulated(DYNAMICS[name], count, seed)
    return Gymnasium(name, count, seed, **options)


def gymnasium() -> Any:
    """The package of the extra `classic`."""
    try:
        return importlib.import_module("gymnasium")
    except ImportError:
        raise UsageError(
            f"only {', '.join(DYNAMICS)} are simulated without Gymnasium; for any other environment: pip install 'tilt-rl[classic]'"
        ) from None


def _observed(name: str, space: Any, gym: Any) -> tuple[int, int | None]:
    """The length of an observation vector, and the first label of Discrete observations."""
    if isinstance(space, gym.spaces.Discrete):
        return int(space.n), int(space.start)
    if isinstance(space, gym.spaces.Box):
        return int(np.prod(space.shape)), None
    raise UsageError(f"{name} observes {space}: only Box and Discrete observations can be read by these networks")


def _acting(name: str, space: Any, gym: Any) -> tuple[Actions, int]:
    """The actions, and the first label of Discrete ones."""
    if isinstance(space, gym.spaces.Discrete):
        return Discrete(int(space.n)), int(space.start)
    if isinstance(space, gym.spaces.Box) and np.isfinite(space.low).all() and np.isfinite(space.high).all():
        return Continuous(tuple(space.low.ravel().tolist()), tuple(space.high.ravel().tolist())), 0
    raise UsageError(f"{name} acts in {space}: only Discrete actions and bounded Box actions are known")


def _check_count(count: int) -> None:
    if count < 1:
        raise UsageError(f"envs={count} must be at least 1")
