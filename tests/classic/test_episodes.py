"""Sampled and enumerated trajectories: the same draws whoever else is drawn, the probabilities of the process, and the policy gradient without a model."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tilt.classic.episodes import World, cumulative_of, draws, sample, score, trajectories
from tilt.classic.mdp import MDP, uniform
from tilt.classic.planning import evaluate_to_horizon, gain, policy_iteration
from tilt.classic.tables import cliff_walking, frozen_lake, random_processes, random_walk, taxi
from tilt.errors import UsageError


@pytest.fixture(scope="module")
def short() -> MDP:
    """Three states and two actions; the third state ends episodes, which are cut off after four steps."""
    base = random_processes(states=3, actions=2, discount=0.8, seed=3)
    return MDP.of(base.transition, base.reward, discount=0.8, start=[0.6, 0.4, 0.0], terminal=[2], limit=4)


def test_draws_are_counted() -> None:
    first, again = draws(3, 5), draws(3, 5)
    rows = [next(first) for _ in range(100)]
    assert rows == [next(again) for _ in range(100)] and all(0 <= u < 1 for row in rows for u in row)
    assert rows[0] not in (next(draws(3, 6)), next(draws(4, 5))) and len({u for row in rows for u in row}) == 400
    with pytest.raises(UsageError, match="seed=-1"):
        next(draws(-1, 0))


def test_an_episode_is_the_same_in_any_company() -> None:
    mdp = frozen_lake()
    many, one = sample(mdp, uniform(mdp), 6, seed=2), sample(mdp, uniform(mdp), 1, seed=2, first=4)
    part = many.layout.actions_of(torch.tensor([4]))
    assert torch.equal(many.states[part], one.states) and torch.equal(many.actions[part], one.actions) and many.last[4] == one.last[0]


def test_running_sums_never_fall_off_the_end() -> None:
    assert cumulative_of([0.0, 0.3, 0.0, 0.7, 0.0]) == [0.0, 0.3, 0.3, 1.0, 1.0]
    assert cumulative_of([1 / 3] * 3)[-1] == 1.0
    world = World.of(cliff_walking(slippery=True))
    assert [world.step(36, 0, u) for u in (0.0, 0.34, 0.99)] == [(36, -1.0, False), (24, -1.0, False), (36, -100.0, False)]


def test_sampled_frequencies_are_the_probabilities(short: MDP) -> None:
    """6,000 episodes: first states, outcomes of every action, and returns, all within four standard errors."""
    policy = torch.tensor([[0.3, 0.7], [0.9, 0.1], [0.5, 0.5]], dtype=torch.float64)
    found = sample(short, policy, 6_000, seed=1)
    starts = found.states[found.layout.starts]
    assert abs((starts == 0).double().mean() - 0.6) < 4 * (0.24 / 6_000) ** 0.5
    here = (found.states == 1) & (found.actions == 0)
    after = torch.where(
        found.layout.positions + 1 == found.layout.lengths[found.layout.sequence], found.last[found.layout.sequence], found.states.roll(-1)
    )
    for s in range(3):
        p = short.transition[1, 0, s]
        assert abs((after[here] == s).double().mean() - p) < 4 * (p * (1 - p) / here.sum()) ** 0.5
    returns = found.returns(0.8)
    truth = (short.start * evaluate_to_horizon(short, policy)).sum()
    assert abs(returns.mean() - truth) < 4 * returns.std() / 6_000**0.5
    assert (found.layout.lengths <= 4).all() and found.ended.any() and (~found.ended).any()
    assert torch.equal(found.ended, found.last == 2)


def test_every_trajectory_with_its_probability(short: MDP) -> None:
    """Probabilities add up to 1; their mean return is J within the limit; each is the product over its steps."""
    policy = torch.tensor([[0.3, 0.7], [0.9, 0.1], [0.5, 0.5]], dtype=torch.float64)
    found = trajectories(short, policy)
    episodes = found.episodes
    assert found.chance.sum().item() == pytest.approx(1, abs=1e-12)
    assert found.mean(episodes.returns(0.8)).item() == pytest.approx(
        (short.start * evaluate_to_horizon(short, policy)).sum().item(), abs=1e-12
    )
    seen = set()
    for e in range(len(found.chance)):
        steps = episodes.layout.actions_of(torch.tensor([e])).tolist()
        states = [*episodes.states[steps].tolist(), int(episodes.last[e])]
        seen.add((*states, *episodes.actions[steps].tolist()))
        likely = short.start[states[0]].item()
        for t, step in enumerate(steps):
            a = int(episodes.actions[step])
            likely *= policy[states[t], a].item() * short.transition[states[t], a, states[t + 1]].item()
        assert found.chance[e].item() == pytest.approx(likely, rel=1e-12)
    assert len(seen) == len(found.chance), "no trajectory is listed twice"


def test_an_episode_that_must_end_has_its_gain_without_a_limit() -> None:
    """J = sum_tau P(tau) G(tau) = mu · v, on a lake that always ends within six steps."""
    mdp = frozen_lake(("SFF", "FFG"), slippery=False, discount=0.9)
    policy = torch.zeros(6, 4, dtype=torch.float64)
    policy[:, 1:3] = torch.tensor([0.4, 0.6], dtype=torch.float64)
    policy[3:5] = torch.tensor([0.0, 0.0, 1.0, 0.0], dtype=torch.float64)
    policy[2] = torch.tensor([0.0, 1.0, 0.0, 0.0], dtype=torch.float64)
    found = trajectories(mdp, policy, 6)
    assert found.episodes.ended.all()
    assert found.mean(found.episodes.returns(0.9)).item() == pytest.approx(gain(mdp, policy).item(), abs=1e-12)


def test_the_gradient_of_a_trajectory_knows_no_environment(short: MDP) -> None:
    """grad log P(tau) = sum_t grad log pi, so E[sum_t grad log pi G(tau)] is grad J by finite differences, and its mean without G is 0."""
    theta = torch.randn(3, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()
    found = trajectories(short, theta.softmax(-1))
    scores = score(theta.log_softmax(-1), found.episodes)
    slope = torch.autograd.grad(found.mean(scores * found.episodes.returns(0.8)), theta, retain_graph=True)[0]
    assert torch.autograd.grad(found.mean(scores), theta)[0].abs().max() < 1e-15
    for s in range(3):
        for a in range(2):
            nudged = [theta.detach().clone() for _ in range(2)]
            nudged[0][s, a] += 1e-5
            nudged[1][s, a] -= 1e-5
            high, low = ((short.start * evaluate_to_horizon(short, x.softmax(-1))).sum().item() for x in nudged)
            assert slope[s, a].item() == pytest.approx((high - low) / 2e-5, abs=1e-8)


def test_what_cannot_be_walked_is_refused() -> None:
    walk, lake = random_walk(), frozen_lake()
    with pytest.raises(UsageError, match=r"from one process, not from \(3,\)"):
        sample(random_processes(3), torch.zeros(5).long(), 1)
    with pytest.raises(UsageError, match="under one policy"):
        sample(lake, uniform(lake).expand(2, 16, 4), 1)
    with pytest.raises(UsageError, match="count=0"):
        sample(lake, uniform(lake), 0)
    with pytest.raises(UsageError, match="limit=0"):
        sample(lake, uniform(lake), 1, limit=0)
    with pytest.raises(UsageError, match="horizon=None"):
        trajectories(walk, uniform(walk))
    with pytest.raises(UsageError, match="more than 50 within 10 steps"):
        trajectories(walk, uniform(walk), 10, most=50)


def test_an_episode_without_an_end_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    from tilt.classic import episodes

    monkeypatch.setattr(episodes, "ENDLESS", 500)
    mdp = cliff_walking()
    with pytest.raises(UsageError, match="had not ended after 500 steps: set a limit"):
        sample(mdp, torch.zeros(48).long(), 1)


def test_the_best_policy_of_taxi_earns_its_value() -> None:
    mdp = taxi(discount=1.0)
    found = sample(mdp, policy_iteration(replace(mdp, discount=0.99)).policy, 500, seed=4)
    returns = found.returns(1.0)
    assert found.ended.all() and abs(returns.mean() - 7.93) < 4 * returns.std() / 500**0.5
