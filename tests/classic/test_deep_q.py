"""DQN: on one-hot states it is Q-learning bit for bit; replay, n-step returns and targets against loops; it learns what is rewarded."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from toy_environments import Endless, Identity

from tilt.classic import tables
from tilt.classic.agents import evaluate
from tilt.classic.deep_q import Ahead, DeepQ, DeepQLearner, Replay, bootstrapped, train
from tilt.classic.episodes import ACTION, EXPLORE, draws
from tilt.classic.one_hot import OneHot
from tilt.classic.temporal_difference import q_learning
from tilt.errors import UsageError

TABLE = DeepQ(
    gamma=0.95, lr=0.5, batch=1, buffer=1, learn_after=0, every=1, updates=1, target=1, loss="square", optimizer="sgd", clip_norm=0.0,
    hidden=(), dtype="float64", epsilon=0.3, epsilon_end=0.3,
)  # fmt: skip


@pytest.mark.parametrize("slippery", [False, True])
def test_it_is_q_learning_bit_for_bit(slippery: bool) -> None:
    """One-hot states, a buffer of one step, the target copied every step, plain gradient steps: Q += alpha (r + gamma max Q(s', .) - Q), the same bits."""
    mdp = tables.cliff_walking(slippery=slippery, discount=0.95, limit=60)
    exact = q_learning(mdp, episodes=20, alpha=0.5, epsilon=0.3, seed=4)
    environments = OneHot(mdp, 1, 4)
    learner = DeepQLearner(TABLE, environments, 4, total=10**6)
    for episode in range(20):
        drawn = draws(4, episode)
        next(drawn)
        length = len(learner.book.finished)
        while len(learner.book.finished) == length:
            now = next(drawn)
            learner._step(np.array([now[EXPLORE] < 0.3]), np.array([now[ACTION]]))
            learner.learn()
    found = learner.q.body.weight.detach().T
    assert torch.equal(found, exact.q)
    assert [earned for _, earned, _ in learner.book.finished] == exact.returns.tolist()
    assert [length for *_, length in learner.book.finished] == exact.lengths.tolist()
    assert bool(found.any())


def test_returns_of_several_steps_end_with_the_episode() -> None:
    replay = Replay(10, 1, torch.float64)
    ahead = Ahead(replay, 3, 0.5, 1)
    states = [np.array([float(t)]) for t in range(8)]
    for t in range(4):  # terminates after 4 steps with rewards 1 2 3 4
        ahead.add(0, states[t], t, t + 1.0, states[t + 1], t == 3, t == 3)
    for t in range(2):  # then is cut off after 2 with rewards 5 6
        ahead.add(0, states[t], t, t + 5.0, states[t + 1], False, t == 1)
    before, actions, rewards, factors, after = replay.take(torch.arange(len(replay)))
    assert before[:, 0].tolist() == [0, 1, 2, 3, 0, 1] == actions.tolist()
    assert rewards.tolist() == [1 + 0.5 * 2 + 0.25 * 3, 2 + 0.5 * 3 + 0.25 * 4, 3 + 0.5 * 4, 4, 5 + 0.5 * 6, 6]
    assert factors.tolist() == [0.125, 0, 0, 0, 0.25, 0.5]
    assert after[:, 0].tolist() == [3, 4, 4, 4, 2, 2]


def test_the_oldest_transition_makes_room() -> None:
    replay = Replay(3, 1)
    for t in range(5):
        replay.add([t], t, 0.0, 1.0, [t + 1])
    assert len(replay) == 3 and sorted(replay.actions.tolist()) == [2, 3, 4]


@pytest.mark.parametrize("double", [False, True])
def test_targets(double: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    online, target = (torch.randn(4, 3, generator=generator) for _ in range(2))
    part = (
        torch.zeros(4, 1),
        torch.zeros(4, dtype=torch.long),
        torch.tensor([1.0, 2, 3, 4]),
        torch.tensor([0.9, 0.0, 0.81, 0.9]),
        torch.arange(4),
    )
    found = bootstrapped(lambda s: online[s], lambda s: target[s], part, double)  # type: ignore[arg-type]
    for i in range(4):
        best = target[i, online[i].argmax()] if double else target[i].max()
        assert float(found[i]) == pytest.approx(float(part[2][i] + part[3][i] * best))


def test_batched_targets_are_those_of_each_minibatch() -> None:
    learner = DeepQLearner(QUICK, Identity(1), 0, 1000)
    learner.play(200)
    parts = learner.replay.take(torch.randint(200, (QUICK.updates, QUICK.batch), generator=torch.Generator().manual_seed(0)))
    goals = learner._goals(parts)
    for k in range(QUICK.updates):
        torch.testing.assert_close(goals[k], bootstrapped(learner.q, learner.target, tuple(x[k] for x in parts), False))


QUICK = DeepQ(gamma=0.5, lr=5e-3, learn_after=100, every=16, updates=16, target=64, hidden=(16,), buffer=2000, explore=0.5)


@pytest.mark.parametrize("changes", [{}, {"double": True, "returns": 3, "envs": 4, "schedule": "linear"}], ids=["plain", "double, 3 steps"])
def test_it_learns_which_action_is_rewarded(changes: dict[str, Any]) -> None:
    settings = replace(QUICK, **changes)
    found = train(settings, Identity(settings.envs), steps=1600, seed=0)
    assert evaluate(found.agent, Identity(4), seed=9).mean() >= 97


def test_a_time_limit_is_no_end() -> None:
    settings = replace(QUICK, gamma=0.98, hidden=(), optimizer="sgd", lr=0.5, every=8, updates=4, target=8, loss="square")
    learner = DeepQLearner(settings, Endless(1), 0, 10**6)
    for _ in range(200):
        learner.play(8)
        learner.learn()
    with torch.no_grad():
        assert float(learner.q(torch.ones(1, 1)).max()) == pytest.approx(50, rel=0.1)


def test_a_seed_fixes_everything() -> None:
    def weights(seed: int) -> torch.Tensor:
        return torch.cat([p.flatten() for p in train(QUICK, Identity(1), steps=300, seed=seed).agent.policy.parameters()])

    assert torch.equal(weights(1), weights(1)) and not torch.equal(weights(1), weights(2))


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: DeepQ(gamma=1.5), "gamma=1.5"),
        (lambda: DeepQ(buffer=0), "buffer=0"),
        (lambda: DeepQ(buffer=2, envs=4), "buffer=2"),
        (lambda: train(QUICK, Identity(1, continuous=True), steps=10), "finitely many"),
        (lambda: train(QUICK, Identity(2), steps=10), "envs=1"),
    ],
)
def test_settings_that_cannot_be_are_refused(make: Any, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        make()
