"""The gates of control, one seed each: the presets master CartPole and Pendulum within their steps (`make classic-bench` has the seeds)."""

from __future__ import annotations

import pytest

from tilt.classic.agents import evaluate
from tilt.classic.environments import environments
from tilt.classic.presets import preset, train

GATES = [
    ("ppo", "CartPole-v1", 475),
    ("trpo", "CartPole-v1", 475),
    ("dqn", "CartPole-v1", 475),
    ("reinforce", "CartPole-v1", 475),
    ("ppo", "Pendulum-v1", -250),
]


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(("method", "name", "bar"), GATES)
def test_a_preset_reaches_its_bar(method: str, name: str, bar: float) -> None:
    found = preset(method, name)
    agent = train(found.settings, environments(name, found.settings.envs), steps=found.steps, seed=0, name=name, method=method).agent
    assert evaluate(agent, environments(name, 100), seed=10_000).mean() >= bar
