"""A saved agent acts as it did, with the same settings; presets are legal; damaged folders are named."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from toy_environments import Identity

from tilt.classic.agents import Agent
from tilt.classic.deep_q import DeepQ
from tilt.classic.environments import environments
from tilt.classic.presets import METHODS, preset, train
from tilt.classic.saving import load, save
from tilt.errors import DataError, UsageError


@pytest.mark.parametrize(
    ("method", "name"), [("ppo", "Acrobot-v1"), ("ppo-kl", "Pendulum-v1"), ("dqn", "CartPole-v1"), ("trpo", "CartPole-v1")]
)
def test_a_saved_agent_acts_as_it_did(method: str, name: str, tmp_path: Path) -> None:
    settings = preset(method, name).settings
    settings = settings if isinstance(settings, DeepQ) else replace(settings, length=8)
    agent: Agent = train(settings, environments(name, settings.envs), steps=300, seed=3, name=name, method=method).agent
    back, told = load(save(agent, tmp_path / "agent", {"steps": 300}))
    seen = np.random.default_rng(0).normal(size=(50, told["observation"])).astype(np.float32)
    noise = torch.rand(50) if method != "ppo-kl" else torch.randn(50, 1)
    np.testing.assert_array_equal(agent.act(seen), back.act(seen))
    np.testing.assert_array_equal(agent.act(seen, noise), back.act(seen, noise))
    assert (back.settings, back.actions, back.method, back.environment, back.seed) == (settings, agent.actions, method, name, 3)
    assert told["steps"] == 300


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["CartPole-v1", "Acrobot-v1", "MountainCar-v0", "Pendulum-v1", "LunarLander-v3", "another"])
def test_presets_are_legal_and_survive_the_file(method: str, name: str, tmp_path: Path) -> None:
    found = preset(method, name)
    assert found.steps > 0 and isinstance(found.settings, DeepQ) == (method == "dqn")


def test_bad_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no saved agent"):
        load(tmp_path)
    agent = train(preset("a2c", "x").settings, Identity(8), steps=10, seed=0).agent
    place = save(agent, tmp_path / "a")
    with pytest.raises(UsageError, match="exists already"):
        save(agent, place)
    (place / "agent.json").write_text("{")
    with pytest.raises(DataError, match=r"agent\.json is damaged"):
        load(place)
    with pytest.raises(UsageError, match="none of dqn, reinforce"):
        preset("sarsa", "CartPole-v1")
