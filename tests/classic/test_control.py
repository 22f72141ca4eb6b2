"""On-policy control: the loss is the objective's own, rollouts keep what an episode's end means, every method learns what is rewarded, seeds fix everything."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from toy_environments import Clock, Endless, Identity

from tilt.classic.agents import evaluate
from tilt.classic.dynamics import Continuous, Discrete
from tilt.classic.flat import FlatAdam, owned
from tilt.classic.networks import Activation, Categorical, Critic, Gaussian, Perceptron, Policy
from tilt.classic.normalisation import RewardScale, Running
from tilt.classic.on_policy import Columns, Learner, OnPolicy, critic_loss, policy_loss, prepared, train
from tilt.classic.presets import row
from tilt.classic.rollouts import Collector, Flat, Rollout
from tilt.errors import UsageError
from tilt.objectives.control import EntropyBonus
from tilt.objectives.experience import Outputs
from tilt.objectives.penalty import OldKL, TrustRegion
from tilt.objectives.policy import Clip, GeometricRatio, Importance
from tilt.segments import Layout

METHODS = ("reinforce", "a2c", "ppo", "ppo-kl", "trpo")


def quick(method: str, **changes: Any) -> OnPolicy:
    """Settings under which a method learns a toy in a second."""
    common: dict[str, Any] = dict(envs=4, length=64, lr=1e-2, hidden=(16,))
    own: dict[str, dict[str, Any]] = {
        "reinforce": dict(length=0, critic_passes=5),
        "a2c": dict(length=8),
        "ppo": dict(batch=64, passes=4),
        "ppo-kl": dict(batch=64, passes=4),
        "trpo": dict(length=16, critic_passes=3),
    }
    return OnPolicy(row(method, 0.5, 0.9, entropy=0.0), **{**common, **own[method], **changes})


# ---------------------------------------------------------------------------------------------- the loss


def doubled(continuous: bool) -> tuple[Rollout, Policy, Critic]:
    """A rollout of random numbers in float64, on pieces of unequal lengths."""
    generator = torch.Generator().manual_seed(3)
    layout = Layout.of([1, 4, 7, 2])
    actions = Continuous((-1.0, -1.0), (1.0, 1.0)) if continuous else Discrete(3)
    policy, critic = Policy(5, actions, (8,), "tanh", 1).double(), Critic(5, (8,), "tanh", 2).double()

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    taken = normal(14, 2) if continuous else torch.randint(3, (14,), generator=generator)
    return Rollout(normal(14, 5), taken, normal(14), layout, normal(4, 5), torch.tensor([True, False, False, True])), policy, critic


@pytest.mark.parametrize("continuous", [False, True])
@pytest.mark.parametrize(
    "changes", [{}, {"surrogate": Importance(), "penalty": OldKL(0.7)}, {"bonus": EntropyBonus(0.3)}], ids=["clip", "old_kl", "entropy"]
)
def test_minibatches_add_up_to_the_loss_of_the_row(continuous: bool, changes: dict[str, Any]) -> None:
    rollout, policy, critic = doubled(continuous)
    objective = replace(row("ppo", 0.9, 0.8), **changes)
    old, experience = prepared(objective, rollout, policy, critic)
    with torch.no_grad():  # the policy moves, as after some minibatches
        for parameter in (*policy.parameters(), *critic.parameters()):
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64))
    parameters = [*policy.parameters(), *critic.parameters()]
    said = policy(rollout.observations)
    whole = objective.loss(
        Outputs.of(
            said.logprobs(rollout.actions), entropy=said.entropy(), kl=said.kl_from(old), values=critic(rollout.observations), sequences=4
        ),
        experience,
    )
    columns, total = Columns.of(rollout, old, experience), torch.zeros((), dtype=torch.float64)
    for part in (columns.take(which) for which in (torch.tensor([3, 0, 9, 13]), torch.tensor([1, 2, 4, 5, 6, 7, 8, 10, 11, 12]))):
        total = total + policy_loss(objective, part, policy) + objective.value.coefficient * critic_loss(objective, part, critic)
    torch.testing.assert_close(total, whole, rtol=0, atol=1e-12)
    for a, b in zip(torch.autograd.grad(total, parameters), torch.autograd.grad(whole, parameters), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_advantages_bootstrap_where_a_piece_was_cut_off() -> None:
    """GAE by its sum over later TD errors, episode by episode."""
    rollout, policy, critic = doubled(False)
    objective = row("a2c", 0.9, 0.7)
    _, experience = prepared(objective, rollout, policy, critic)
    values, after = critic(rollout.observations).tolist(), critic(rollout.last).tolist()
    at = 0
    for length, ended, final in zip([1, 4, 7, 2], rollout.ended.tolist(), after, strict=True):
        v = [*values[at : at + length], 0.0 if ended else final]
        delta = [float(rollout.rewards[at + t]) + 0.9 * v[t + 1] - v[t] for t in range(length)]
        for t in range(length):
            expected = sum((0.9 * 0.7) ** (k - t) * delta[k] for k in range(t, length))
            assert float(experience.advantages[at + t]) == pytest.approx(expected, abs=1e-12)
        at += length
    returns = prepared(row("reinforce", 0.9), rollout, policy, critic)[1].returns
    ahead = after[1]  # the second piece was cut off
    for t in reversed(range(1, 5)):
        ahead = float(rollout.rewards[t]) + 0.9 * ahead
        assert float(returns[t]) == pytest.approx(ahead, abs=1e-12)
    assert float(returns[0]) == pytest.approx(float(rollout.rewards[0]), abs=1e-12)  # the first ended


# ---------------------------------------------------------------------------------------------- distributions and networks


def test_distributions_are_those_of_torch() -> None:
    generator = torch.Generator().manual_seed(0)
    logits, other = (torch.randn(6, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    ours, theirs = Categorical.of(logits), torch.distributions.Categorical(logits=logits)
    actions = torch.tensor([0, 1, 2, 3, 0, 2])
    torch.testing.assert_close(ours.logprobs(actions), theirs.log_prob(actions))
    torch.testing.assert_close(ours.entropy(), theirs.entropy())
    kl = torch.distributions.kl_divergence
    torch.testing.assert_close(ours.kl_from(Categorical.of(other)), kl(torch.distributions.Categorical(logits=other), theirs))
    mean, deviation = logits[:, :2], torch.tensor([0.3, -0.4], dtype=torch.float64)
    normal = torch.distributions.Independent(torch.distributions.Normal(mean, deviation.exp()), 1)
    before = torch.distributions.Independent(torch.distributions.Normal(other[:, :2], torch.ones(2, dtype=torch.float64)), 1)
    told = Gaussian(mean, deviation)
    torch.testing.assert_close(told.logprobs(other[:, 2:]), normal.log_prob(other[:, 2:]))
    torch.testing.assert_close(told.entropy(), normal.entropy())
    torch.testing.assert_close(told.kl_from(Gaussian(other[:, :2], torch.zeros(2, dtype=torch.float64))), kl(before, normal))


def test_actions_are_drawn_with_their_probabilities() -> None:
    said = Categorical.of(torch.tensor([[0.2, 0.5, 0.3]]).log())
    drawn = said.sample(torch.linspace(0, 0.9999, 1000).unsqueeze(1).T.squeeze(0).reshape(1000))  # one state, many uniforms
    assert torch.bincount(drawn, minlength=3).tolist() == pytest.approx([200, 500, 300], abs=1)
    normal = Gaussian(torch.zeros(1, 1), torch.tensor([0.7]))
    torch.testing.assert_close(normal.sample(torch.tensor([[1.0]])), torch.tensor([[0.7]]).exp())


def test_the_start_is_orthogonal() -> None:
    body = Perceptron([4, 64, 64, 2], "tanh").orthogonal(torch.Generator().manual_seed(0), 0.01)
    first, second, last = (layer.weight for layer in body.layers)
    torch.testing.assert_close(first.T @ first, 2 * torch.eye(4))
    torch.testing.assert_close(second.T @ second, 2 * torch.eye(64), atol=1e-5, rtol=0)
    torch.testing.assert_close(last @ last.T, 1e-4 * torch.eye(2))
    assert not any(layer.bias.any() for layer in body.layers)


@pytest.mark.parametrize(("activation", "hidden"), [("tanh", (5, 4)), ("relu", (6,)), ("relu", ())])
def test_one_taped_vector_is_stepped_like_many_tensors(activation: Activation, hidden: tuple[int, ...]) -> None:
    """Two networks, one read twice by a loss, and a log standard deviation: the gradients that autograd finds over separate tensors, clipped together, and Adam."""

    def networks() -> tuple[Policy, Critic]:
        return Policy(3, Continuous((-1.0, -1.0), (1.0, 1.0)), hidden, activation, 1).double(), Critic(3, hidden, activation, 2).double()

    def loss(policy: Policy, critic: Critic, x: torch.Tensor) -> torch.Tensor:
        said = policy(x)
        return 10 * (said.mean.square() * said.log_std.exp()).sum() + critic(x).sin().sum() + critic(2 * x[:4]).square().sum()

    ours, theirs = networks(), networks()
    flat = FlatAdam(ours, 1e-2, 1e-5, 0.5)
    parameters = [p for network in theirs for p in network.parameters()]
    plain = torch.optim.Adam(parameters, lr=1e-2, eps=1e-5)
    for step in range(5):
        x = torch.randn(7, 3, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        found = loss(*ours, x)
        torch.testing.assert_close(found, loss(*theirs, x), rtol=0, atol=1e-12)
        flat.step(found)
        plain.zero_grad()
        loss(*theirs, x).backward()
        slope = torch.cat([p.grad.flatten() for p in parameters if p.grad is not None])
        share = min(1.0, 0.5 / float(slope.norm()))
        torch.testing.assert_close(flat.slope, slope * share, rtol=0, atol=1e-12)
        for parameter in parameters:
            parameter.grad *= share
        plain.step()
    for a, b in zip((p for network in ours for p in network.parameters()), parameters, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
    x = torch.randn(7, 3, dtype=torch.float64)
    with torch.no_grad():
        taped = [network(x) for network in (ours[0].body, ours[1].body)]
    assert not any(tape.kept for tape in flat.tapes)
    assert all(torch.allclose(a, b.body(x), rtol=0, atol=1e-12) and b.body(x).grad_fn is not None for a, b in zip(taped, map(owned, ours)))


# ---------------------------------------------------------------------------------------------- rollouts


def test_the_worked_example_of_flat() -> None:
    over = np.array([[True, False], [False, False], [True, True]])
    flat = Flat(np.ones_like(over), over)
    assert flat.layout.sequence.tolist() == [0, 1, 1, 2, 2, 2] and flat.stops.tolist() == [0, 2, 5]
    assert flat(np.array([[1, 4], [2, 5], [3, 6]])).tolist() == [1, 2, 3, 4, 5, 6]


def test_pieces_of_episodes_keep_their_order_their_ends_and_their_last_observation() -> None:
    environments = Clock(3)  # these end after 2, 3 and 4 steps
    collector = Collector(environments, 0)
    policy = Policy(1, environments.actions, (4,), "tanh", 0)
    first = collector.collect(policy, 5)
    assert first.layout.lengths.tolist() == [2, 2, 1, 3, 2, 4, 1]
    assert first.observations[:, 0].tolist() == [0, 1, 10, 11, 20, 0, 1, 2, 10, 11, 0, 1, 2, 3, 10]
    assert first.rewards.tolist() == [1, 2, 1, 2, 1, 1, 2, 3, 1, 2, 1, 2, 3, 4, 1]
    assert first.last[:, 0].tolist() == [2, 12, 21, 3, 12, 4, 11]
    assert first.ended.tolist() == [True, True, False, True, False, True, False]
    second = collector.collect(policy, 2)
    assert second.observations[:, 0].tolist() == [21, 30, 12, 20, 11, 12]  # where the first one stopped
    assert collector.steps == 21
    assert [(earned, length) for _, earned, length in collector.finished] == [(3, 2), (6, 3), (3, 2), (10, 4), (3, 2), (6, 3)]


def test_whole_episodes_are_one_in_each_environment() -> None:
    environments = Clock(4)  # the last is cut off after 4 steps
    collector = Collector(environments, 0)
    found = collector.collect(Policy(1, environments.actions, (4,), "tanh", 0), 0)
    assert found.layout.lengths.tolist() == [2, 3, 4, 4] and collector.steps == 13
    assert found.ended.tolist() == [True, True, True, False] and found.last[:, 0].tolist() == [2, 3, 4, 4]
    again = collector.collect(Policy(1, environments.actions, (4,), "tanh", 0), 0)
    assert (again.observations[again.layout.starts, 0] % 10 == 0).all() and len(collector.finished) == 8


# ---------------------------------------------------------------------------------------------- normalisation


def test_running_moments_do_not_depend_on_the_split() -> None:
    rows = np.random.default_rng(0).normal(3, 2, (50, 3))
    whole, parts = Running(3), Running(3)
    whole.update(rows)
    for part in np.split(rows, [1, 4, 30]):
        parts.update(part)
    np.testing.assert_allclose(parts.mean, rows.mean(0))
    np.testing.assert_allclose(parts.variance, rows.var(0))
    np.testing.assert_allclose(whole.centred(rows), (rows - rows.mean(0)) / rows.std(0), atol=1e-5)
    assert whole.centred(np.full((1, 3), 1e9)).max() == 10


def test_rewards_are_divided_by_the_deviation_of_the_running_return() -> None:
    rewards, over = np.random.default_rng(1).normal(0, 5, (20, 2)), np.zeros((20, 2), dtype=bool)
    over[7, 0] = True
    sums, running = [], np.zeros(2)
    for t in range(20):
        running = 0.9 * running + rewards[t]
        sums.append(running)
        running = np.where(over[t], 0, running)
    scale = RewardScale(2, 0.9)
    np.testing.assert_allclose(scale(rewards, over), rewards / np.std(sums), atol=1e-6)


# ---------------------------------------------------------------------------------------------- learning


@pytest.mark.parametrize("continuous", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_learns_which_action_is_rewarded(method: str, continuous: bool) -> None:
    settings = quick(method, log_std=-1.0 if continuous else 0.0)
    found = train(settings, Identity(4, continuous), steps=16_000 if method == "reinforce" else 5000, seed=0)
    earned = evaluate(found.agent, Identity(4, continuous), seed=9)
    assert earned.mean() >= (-3 if continuous else 97)


@pytest.mark.parametrize("method", METHODS)
def test_a_time_limit_is_no_end(method: str) -> None:
    """1 a step for ever, cut off after 8: V = 1 / (1 - .98) = 50, which only the bootstrap at the cut can find."""
    settings = replace(quick(method, length=0 if method == "reinforce" else 16, lr=0.1), row=row(method, 0.98, 1.0))
    learner = Learner(settings, Endless(4), 0)
    for _ in range(150):
        learner.iterate(0.0)
    with torch.no_grad():
        assert float(learner.critic(torch.ones(1, 1))) == pytest.approx(50, rel=0.05)


@pytest.mark.parametrize("method", ["ppo", "trpo"])
def test_a_seed_fixes_everything(method: str) -> None:
    def weights(seed: int) -> torch.Tensor:
        found = train(quick(method), Identity(4), steps=1000, seed=seed)
        return torch.cat([p.flatten() for p in found.agent.policy.parameters()])

    assert torch.equal(weights(1), weights(1)) and not torch.equal(weights(1), weights(2))


@pytest.mark.parametrize("continuous", [False, True])
def test_the_trust_region_holds(continuous: bool) -> None:
    """Also against a copy of the old policy, which nothing that the step moves can reach."""
    learner = Learner(quick("trpo", length=64), Identity(4, continuous), 0)
    seen = torch.from_numpy(np.eye(2, dtype=np.float32)[np.arange(200) % 2])
    for _ in range(3):
        before = copy.deepcopy(learner.policy)
        learner.iterate(0.0)
        assert learner.taken is not None and learner.taken.accepted
        assert 0 < learner.taken.kl <= 0.01 and learner.taken.improvement > 0
        with torch.no_grad():
            assert 0.2 * learner.taken.kl < float(learner.policy(seen).kl_from(before(seen)).mean()) < 2 * learner.taken.kl


def test_the_controller_moves_the_penalty() -> None:
    learner = Learner(quick("ppo-kl", lr=1e-5), Identity(4), 0)
    learner.iterate(0.0)
    assert isinstance(learner.row.penalty, OldKL) and learner.row.penalty.beta == 0.5  # the step was far shorter than the target


def test_schedules_end_at_zero() -> None:
    learner = Learner(quick("ppo", schedule="linear", clip_schedule="linear"), Identity(4), 0)
    before = torch.cat([p.detach().flatten().clone() for p in learner.policy.parameters()])
    learner.iterate(1.0)
    assert torch.equal(before, torch.cat([p.detach().flatten() for p in learner.policy.parameters()]))


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: quick("ppo", envs=0), "envs=0"),
        (lambda: quick("ppo", lr=0.0), "lr=0.0"),
        (lambda: quick("trpo", passes=2), "passes=2"),
        (lambda: quick("trpo", critic_passes=0), "critic_passes=0"),
        (lambda: quick("a2c", passes=2), "1 pass"),
        (lambda: quick("a2c", clip_schedule="linear"), "no clip to shrink"),
        (lambda: replace(quick("ppo"), row=replace(row("ppo", 0.9), ratio=GeometricRatio())), "single actions"),
        (lambda: Perceptron([4, 0, 2]), "at least 1 unit"),
        (lambda: train(quick("ppo"), Identity(3), steps=100), "envs=4"),
    ],
)
def test_settings_that_cannot_be_are_refused(make: Any, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        make()


def test_the_rows_are_those_of_the_table() -> None:
    assert isinstance(row("ppo", 0.9).surrogate, Clip) and isinstance(row("trpo", 0.9).penalty, TrustRegion)
    assert isinstance(row("ppo-kl", 0.9).penalty, OldKL)
