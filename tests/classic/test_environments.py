"""Environments: our dynamics are Gymnasium's step for step, ends are told apart, seeds are counted, and Gymnasium's own vector environments read alike."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import pytest

from tilt.classic.dynamics import DYNAMICS, Continuous, Discrete, MountainCar
from tilt.classic.environments import Gymnasium, Simulated, environments
from tilt.errors import UsageError

gym = pytest.importorskip("gymnasium")


def drawn(name: str, count: int, generator: np.random.Generator) -> Any:
    actions = DYNAMICS[name].actions
    if isinstance(actions, Continuous):
        return generator.uniform(-2.5, 2.5, (count, actions.size)).astype(np.float32)
    return generator.integers(actions.count, size=count)


@pytest.mark.parametrize("name", DYNAMICS)
def test_dynamics_are_gymnasiums_step_for_step(name: str) -> None:
    """From the same states under the same actions: observations, rewards and ends, over episodes that end and that are cut off."""
    ours, count, generator = Simulated(DYNAMICS[name], 3, seed=1), 3, np.random.default_rng(0)
    theirs = [gym.make(name) for _ in range(count)]
    seen = ours.reset()
    for i, env in enumerate(theirs):
        env.reset(seed=0)
        env.unwrapped.state = ours.states[i].copy()
    assert seen.dtype == np.float32
    ends = 0
    for t in range(700):
        if name == "MountainCar-v0":  # push along the speed, so that it arrives
            actions = np.where(ours.states[:, 1] >= 0, 2, 0) if t % 7 else drawn(name, count, generator)
        else:
            actions = drawn(name, count, generator)
        moved = ours.step(actions)
        for i, env in enumerate(theirs):
            observed, reward, terminated, truncated, _ = env.step(actions[i])
            np.testing.assert_allclose(moved.last[i], observed, rtol=0, atol=1e-6)
            assert moved.rewards[i] == pytest.approx(float(reward), abs=1e-9)
            assert (moved.terminated[i], moved.truncated[i]) == (terminated, truncated and not terminated)
            if terminated or truncated:
                ends += 1
                env.reset()
                env.unwrapped.state = ours.states[i].copy()
    assert ends >= 3


@pytest.mark.parametrize("name", DYNAMICS)
def test_starts_spread_like_gymnasiums(name: str) -> None:
    ours, env = Simulated(DYNAMICS[name], 2000, seed=3), gym.make(name)
    theirs = np.stack([env.reset(seed=i)[0] for i in range(2000)])
    seen = ours.reset()
    np.testing.assert_allclose(seen.mean(0), theirs.mean(0), atol=0.06)
    np.testing.assert_allclose(seen.std(0), theirs.std(0), atol=0.05)
    np.testing.assert_allclose(seen.max(0), theirs.max(0), atol=0.06)


def test_a_start_depends_on_seed_environment_and_episode_alone() -> None:
    few, many = Simulated(DYNAMICS["CartPole-v1"], 2, seed=5), Simulated(DYNAMICS["CartPole-v1"], 7, seed=5)
    first = few.reset()
    np.testing.assert_array_equal(first, many.reset()[:2])
    for _ in range(40):  # past the first block of starts
        later, again = few.reset(), many.reset()
        np.testing.assert_array_equal(later, again[:2])
    np.testing.assert_array_equal(few.reset(5), first)
    assert not np.array_equal(few.reset(6), first)


def test_the_last_observation_survives_the_new_episode() -> None:
    env = Simulated(MountainCar(), 2, seed=0, limit=3)
    env.reset()
    for _ in range(3):
        moved = env.step(np.array([2, 0]))
    assert moved.truncated.all() and not moved.terminated.any()
    assert not np.array_equal(moved.last, moved.observations)
    np.testing.assert_array_equal(moved.observations[:, 1], 0.0)  # an episode starts at rest
    assert (env.age == 0).all()


def test_gymnasiums_environments_keep_the_last_observation_too() -> None:
    ours, theirs = Simulated(DYNAMICS["CartPole-v1"], 2, seed=0), Gymnasium("CartPole-v1", 2, seed=4)
    assert theirs.actions == Discrete(2) and theirs.observation == 4
    theirs.reset()
    ours.reset()
    ours.states = np.stack([env.unwrapped.state for env in theirs.inner.envs])
    for _ in range(300):
        actions = np.array([1, 1])
        a, b = ours.step(actions), theirs.step(actions)
        np.testing.assert_allclose(a.last, b.last, atol=1e-6)
        np.testing.assert_array_equal(a.terminated, b.terminated)
        ours.states = np.stack([env.unwrapped.state for env in theirs.inner.envs])
    np.testing.assert_array_equal(theirs.reset(9), theirs.reset(9))


def test_a_truncated_episode_of_gymnasium() -> None:
    env = Gymnasium("Pendulum-v1", 1, seed=0, max_episode_steps=5)
    env.reset()
    for _ in range(5):
        moved = env.step(np.array([[9.0]]))
    assert moved.truncated.all() and not moved.terminated.any() and not np.array_equal(moved.last, moved.observations)


def test_discrete_observations_are_one_hot() -> None:
    env = environments("FrozenLake-v1", 3)
    assert env.observation == 16
    np.testing.assert_array_equal(env.reset().argmax(1), 0)


def test_ids_of_our_dynamics_are_simulated() -> None:
    assert isinstance(environments("Acrobot-v1", 2), Simulated)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: environments("CartPoll-v1", 2), "CartPoll"),
        (lambda: environments("CartPole-v1", 0), "envs=0"),
        (lambda: Simulated(MountainCar(), 2, seed=-1), "seed=-1"),
        (lambda: environments("Blackjack-v1", 2), "Blackjack-v1 observes"),
    ],
)
def test_bad_input_is_named(call: Any, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        call()


def test_without_gymnasium_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gymnasium", None)
    environments("CartPole-v1", 1).reset()
    with pytest.raises(UsageError, match=r"tilt-rl\[classic\]"):
        environments("LunarLander-v3", 1)
