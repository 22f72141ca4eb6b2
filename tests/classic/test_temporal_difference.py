"""Learning from steps: what each rule converges to, the lambda-return, truncation, and the printed numbers of the cliff."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tilt.classic.episodes import COIN, OUTCOME, World, draws, sample
from tilt.classic.mdp import MDP, uniform
from tilt.classic.planning import evaluate, evaluate_to_horizon, policy_iteration
from tilt.classic.tables import cliff_walking, frozen_lake, random_processes, random_walk, taxi
from tilt.classic.temporal_difference import (
    Learned,
    choose,
    double_q_learning,
    expected_sarsa,
    monte_carlo,
    q_learning,
    sarsa,
    temporal_difference,
)
from tilt.errors import UsageError
from tilt.objectives import GAE, Rewards, Signals

Rule = Callable[..., Learned]


def chain(length: int = 5, discount: float = 0.9) -> MDP:
    """A row of states that always leads on and earns 1, 2, …; after the last one the episode ends."""
    moves = torch.zeros(length + 1, 1, length + 1)
    moves[torch.arange(length), 0, torch.arange(1, length + 1)] = 1
    start = torch.zeros(length + 1)
    start[0] = 1
    return MDP.of(moves, torch.arange(1.0, length + 2).unsqueeze(1), discount=discount, terminal=[length], start=start)


def endless(limit: int = 8, discount: float = 0.98) -> MDP:
    """One state that earns 1 for ever: its value is 1 / (1 - gamma), however short the episodes are."""
    return MDP.of([[[1.0], [1.0]]], [[1.0, 1.0]], discount=discount, limit=limit)


def greedy_return(mdp: MDP, found: Learned, horizon: int = 100) -> float:
    return float((mdp.start * evaluate_to_horizon(replace(mdp, discount=1.0), found.policy, horizon)).sum())


# ---------------------------------------------------------------------------------------------- prediction


@pytest.mark.parametrize("lam", [0.0, 0.5, 1.0])
def test_td_settles_at_the_solution_on_a_chain(lam: float) -> None:
    """Nothing is random there, so the fixed point (I - gamma P)^-1 r is reached exactly."""
    mdp = chain()
    found = temporal_difference(mdp, torch.zeros(6).long(), episodes=200, alpha=0.5, lam=lam)
    torch.testing.assert_close(found.values, evaluate(mdp, torch.zeros(6).long()), rtol=0, atol=1e-12)
    assert found.visits.tolist() == [200] * 5 + [0] and found.history.shape == (200, 6)


def test_one_step_by_hand() -> None:
    """Chain of two, alpha .5, gamma .9: V = 0 0 → .5, 1 → .5 + .5 (1 + .9 - .5), 1 + .5 (2 - 1)."""
    found = temporal_difference(chain(2), torch.zeros(3).long(), episodes=2, alpha=0.5)
    assert found.history.flatten().tolist() == pytest.approx([0.5, 1.0, 0.0, 0.5 + 0.5 * (1 + 0.9 - 0.5), 1.5, 0.0])


@pytest.mark.parametrize(("visits", "lam"), [("first", None), ("every", None), (None, 0.0), (None, 0.8), (None, 1.0)])
def test_prediction_approaches_the_values_of_the_random_walk(visits: str | None, lam: float | None) -> None:
    mdp = random_walk()
    policy = uniform(mdp)
    if lam is None:
        found = monte_carlo(mdp, policy, episodes=3000, visits=visits)  # type: ignore[arg-type]
    else:
        found = temporal_difference(mdp, policy, episodes=3000, alpha=lambda i: 0.2 / (1 + i / 20), lam=lam)
    error = (found.history - evaluate(mdp, policy)).square().mean(1).sqrt()
    assert error[-1] < 0.025 and error[-1] < error[30] < error[0]


def test_first_and_every_visit_by_hand() -> None:
    """Returns of one episode that comes back to a state: the first visit's, or the mean of all."""
    mdp = replace(random_walk(), discount=0.9)
    steps = sample(mdp, uniform(mdp), 1, seed=5)
    states, rewards = steps.states.tolist(), steps.rewards.tolist()
    assert states == [3, 4, 3, 4, 5, 4, 5] and sum(rewards) == 1
    returns = [sum(0.9**k * r for k, r in enumerate(rewards[t:])) for t in range(len(states))]
    first, every = (monte_carlo(mdp, uniform(mdp), episodes=1, seed=5, visits=v) for v in ("first", "every"))  # type: ignore[arg-type]
    for s in set(states):
        seen = [t for t, state in enumerate(states) if state == s]
        assert first.values[s].item() == pytest.approx(returns[seen[0]], abs=1e-12)
        assert every.values[s].item() == pytest.approx(sum(returns[t] for t in seen) / len(seen), abs=1e-12)
        assert first.visits[s] == 1 and every.visits[s] == len(seen)
    moved = monte_carlo(mdp, uniform(mdp), episodes=1, seed=5, alpha=0.25)
    torch.testing.assert_close(moved.values, 0.25 * first.values)


@pytest.mark.parametrize("lam", [0.0, 0.3, 0.9, 1.0])
@pytest.mark.parametrize("limit", [None, 4])
def test_offline_traces_are_the_lambda_return(lam: float, limit: int | None) -> None:
    """The changes of an episode add up to alpha (G_t^lam - V(s_t)), and G^lam - V is the GAE of language models."""
    mdp = replace(random_walk(), discount=0.9)
    start = torch.linspace(-1, 1, 7, dtype=torch.float64)
    start[[0, 6]] = 0.0
    for seed in range(5):
        found = temporal_difference(mdp, uniform(mdp), episodes=1, alpha=0.1, lam=lam, offline=True, seed=seed, limit=limit, initial=start)
        steps = sample(mdp, uniform(mdp), 1, seed=seed, limit=limit)
        signals = Signals.of(torch.zeros_like(steps.rewards), values=start[steps.states], final=start[steps.last])
        credit = GAE(gamma=0.9, lam=lam, whitened=False)(Rewards.of(torch.zeros(1).double(), steps=steps.rewards), signals, steps.layout)
        torch.testing.assert_close(found.values, start.index_add(0, steps.states, 0.1 * credit.advantages), rtol=0, atol=1e-12)
        by_hand = start.clone()
        for t in range(len(steps.rewards)):
            by_hand[steps.states[t]] += 0.1 * (lambda_return(steps.rewards.tolist()[t:], start[steps.states].tolist()[t:], start[steps.last].item(), 0.9, lam) - start[steps.states[t]])  # fmt: skip
        torch.testing.assert_close(found.values, by_hand, rtol=0, atol=1e-12)


def lambda_return(rewards: list[float], values: list[float], final: float, gamma: float, lam: float) -> float:
    """(1 - lam) sum_n lam^(n-1) G^(n) with the last weight lam^(T-1), from the n-step returns."""
    n_step = [
        sum(gamma**k * r for k, r in enumerate(rewards[:n])) + gamma**n * (final if n == len(rewards) else values[n])
        for n in range(1, len(rewards) + 1)
    ]
    weights = [(1 - lam) * lam**n for n in range(len(rewards) - 1)] + [lam ** (len(rewards) - 1)]
    return sum(w * g for w, g in zip(weights, n_step))


def test_replacing_traces_do_not_pile_up() -> None:
    """A state that is seen again carries a trace of 1 instead of more; without discount and lam 1 that is the first visit's way."""
    mdp, start = random_walk(), torch.linspace(-1, 1, 7, dtype=torch.float64)
    found = {
        t: temporal_difference(mdp, uniform(mdp), episodes=1, alpha=0.1, lam=0.9, traces=t, seed=5, initial=start).values
        for t in ("accumulating", "replacing")
    }  # type: ignore[arg-type]
    steps = sample(mdp, uniform(mdp), 1, seed=5)
    states = steps.states
    values, trace = torch.where(mdp.terminal, 0.0, start), torch.zeros(7).double()
    for s, after, r in zip(states.tolist(), [*states[1:].tolist(), int(steps.last)], steps.rewards.tolist()):
        delta = r + values[after].item() - values[s].item()
        trace *= 0.9
        trace[s] = 1.0
        values += 0.1 * delta * trace
    torch.testing.assert_close(found["replacing"], values, rtol=0, atol=1e-14)
    assert not torch.equal(found["replacing"], found["accumulating"])


@pytest.mark.parametrize(
    "rule",
    [
        lambda m: temporal_difference(m, torch.zeros(1).long(), episodes=4000, alpha=0.5).values,
        lambda m: temporal_difference(m, torch.zeros(1).long(), episodes=400, alpha=0.5, lam=0.9).values,
        lambda m: monte_carlo(m, torch.zeros(1).long(), episodes=400, alpha=0.5).values,
        lambda m: q_learning(m, episodes=400).q.amax(-1),
        lambda m: sarsa(m, episodes=400).q.amax(-1),
        lambda m: expected_sarsa(m, episodes=400).q.amax(-1),
        lambda m: double_q_learning(m, episodes=800).q.amax(-1),
    ],
)
def test_being_cut_off_is_not_the_end(rule: Callable[[MDP], Tensor]) -> None:
    """gamma .98, episodes of 8 steps: V = 50, because the last step goes on with V; where it truly ends after 8 it is (1 - .98^8) / .02."""
    assert rule(endless()).item() == pytest.approx(50, abs=1e-2)
    ends = chain(8, 0.98)
    ends = replace(ends, earned=torch.where(ends.terminal[:, None, None], 0.0, torch.ones(())).double().expand_as(ends.earned))
    ended = temporal_difference(ends, torch.zeros(9).long(), episodes=300, alpha=0.5).values[0]
    assert ended.item() == pytest.approx((1 - 0.98**8) / 0.02, abs=1e-9)


# ---------------------------------------------------------------------------------------------- control


@pytest.fixture(scope="module")
def cliff() -> dict[str, list[Learned]]:
    """Five seeds of each rule on the cliff: alpha .5, epsilon .1, gamma 1, 500 episodes."""
    mdp = cliff_walking()
    return {r.__name__: [r(mdp, episodes=500, seed=s) for s in range(5)] for r in (q_learning, sarsa, expected_sarsa, double_q_learning)}


def test_q_learning_finds_the_shortest_way_along_the_cliff(cliff: dict[str, list[Learned]]) -> None:
    assert [greedy_return(cliff_walking(), found) for found in cliff["q_learning"]] == [-13.0] * 5


def test_sarsa_learns_the_safe_way_and_falls_less(cliff: dict[str, list[Learned]]) -> None:
    """Greedy -17 to -19 on every seed; online, the last hundred episodes earn about 20 more than those of Q-learning."""
    assert {greedy_return(cliff_walking(), found) for found in cliff["sarsa"]} <= {-17.0, -19.0}
    online = {name: torch.stack([found.returns[-100:].mean() for found in many]) for name, many in cliff.items()}
    assert -36 < online["sarsa"].mean() < -20 and -62 < online["q_learning"].mean() < -40
    assert (online["sarsa"] > online["q_learning"]).all() and (online["expected_sarsa"] > online["sarsa"]).all()


def test_learning_is_counted(cliff: dict[str, list[Learned]]) -> None:
    again, shorter = q_learning(cliff_walking(), episodes=500, seed=3), q_learning(cliff_walking(), episodes=200, seed=3)
    assert torch.equal(again.q, cliff["q_learning"][3].q) and torch.equal(again.returns[:200], shorter.returns)
    assert not torch.equal(again.q, cliff["q_learning"][4].q)


@pytest.mark.parametrize("rule", [q_learning, sarsa, expected_sarsa, double_q_learning])
def test_each_rule_by_loops(rule: Rule) -> None:
    """Written from the papers, on the same draws."""
    mdp, gamma, alpha, epsilon = replace(frozen_lake(), limit=20), 0.9, 0.3, 0.4
    mdp = replace(mdp, discount=gamma)
    world = World.of(mdp)
    tables = [[[0.1] * 4 if not end else [0.0] * 4 for end in world.terminal] for _ in range(2)]

    def behave() -> list[list[float]]:
        if rule is double_q_learning:
            return [[(x + y) / 2 for x, y in zip(*rows)] for rows in zip(*tables)]
        return tables[0]

    for episode in range(30):
        stream = draws(7, episode)
        s, now, steps, done = world.begin(next(stream)[0]), next(stream), 0, False
        a = choose(behave()[s], epsilon, now)
        while not done and steps < 20:
            after, r, done = world.step(s, a, now[OUTCOME])
            then = next(stream)
            b = choose(tables[0][after], epsilon, then)
            mine = int(now[COIN] >= 0.5) if rule is double_q_learning else 0
            q = tables[mine][after]
            if rule is q_learning:
                ahead = max(q)
            elif rule is sarsa:
                ahead = q[b]
            elif rule is expected_sarsa:
                chances = [epsilon / 4 + (1 - epsilon) * (i == q.index(max(q))) for i in range(4)]
                ahead = sum(p * x for p, x in zip(chances, q))
            else:
                ahead = tables[1 - mine][after][q.index(max(q))]
            target = r + (0.0 if done else gamma * ahead)
            tables[mine][s][a] += alpha * (target - tables[mine][s][a])
            s, steps, now = after, steps + 1, then
            a = b if rule is sarsa else choose(behave()[s], epsilon, now)
    found = rule(mdp, episodes=30, alpha=alpha, epsilon=epsilon, seed=7, initial=0.1)
    torch.testing.assert_close(found.q, torch.tensor(behave(), dtype=torch.float64), rtol=0, atol=1e-14)
    assert found.q.count_nonzero() > 20


def test_q_learning_on_a_random_process_finds_the_best_policy() -> None:
    mdp = replace(random_processes(seed=2), limit=100)
    found = q_learning(mdp, episodes=300, epsilon=0.5, alpha=lambda i: max(0.02, 0.5 / (1 + i / 10)))
    best = policy_iteration(mdp)
    assert (found.q.amax(-1) - best.values).abs().max() < 0.25 and torch.equal(found.policy, best.policy)


def test_taxi() -> None:
    """alpha 1, gamma .99, epsilon .1, 3000 episodes: within .15 of the best, 7.93."""
    mdp = taxi()
    found = q_learning(mdp, episodes=3000, alpha=1.0)
    assert 7.78 < greedy_return(mdp, found, 200) < 7.93


def test_two_tables_do_not_flatter_themselves() -> None:
    """Left leads to ten actions worth -.1 ± 1 each, right to the end: one table goes left for a hundred episodes, two for a few (Sutton and Barto, example 6.7)."""
    left, done = [(1.0, 1, 0.0, False)], [(1.0, 2, 0.0, True)]
    noisy = [(0.5, 2, 0.9, True), (0.5, 2, -1.1, True)]
    mdp = MDP.from_table([[left, *[done] * 9], [noisy] * 10, [done] * 10], discount=1.0, start=0)
    single, double = (
        torch.stack([rule(mdp, episodes=150, alpha=0.1, seed=s).lengths == 2 for s in range(40)]).double().mean(0)
        for rule in (q_learning, double_q_learning)
    )
    assert single[:50].mean() > 0.7 and double[:50].mean() < 0.3 and single[50:].mean() > 5 * double[50:].mean()


def test_rates_may_fall() -> None:
    mdp = cliff_walking()
    fixed, falling = q_learning(mdp, episodes=60, epsilon=0.2), q_learning(mdp, episodes=60, epsilon=lambda i: 0.2 if i < 30 else 0.0)
    assert torch.equal(fixed.returns[:30], falling.returns[:30]) and not torch.equal(fixed.returns[30:], falling.returns[30:])


def test_settings_that_cannot_be_met_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    mdp = cliff_walking()
    for call, told in (
        (lambda: q_learning(mdp, episodes=0), "episodes=0"),
        (lambda: q_learning(mdp, episodes=1, alpha=0.0), r"alpha=0.0 must lie in \(0, 1\]"),
        (lambda: sarsa(mdp, episodes=1, epsilon=1.5), r"epsilon=1.5 must lie in \[0, 1\]"),
        (lambda: sarsa(mdp, episodes=1, limit=0), "limit=0"),
        (lambda: temporal_difference(mdp, uniform(mdp), episodes=1, lam=2.0), "lam=2.0"),
        (lambda: temporal_difference(mdp, uniform(mdp), episodes=1, initial=torch.zeros(3)), r"initial has shape \(3,\), not \(48,\)"),
        (lambda: monte_carlo(mdp, uniform(mdp), episodes=1, alpha=-1.0), "alpha=-1.0"),
    ):
        with pytest.raises(UsageError, match=told):
            call()
    monkeypatch.setattr("tilt.classic.temporal_difference.ENDLESS", 300)
    monkeypatch.setattr("tilt.classic.episodes.ENDLESS", 300)
    still = MDP.of([[[1.0, 0.0]], [[0.0, 1.0]]], [[-1.0], [0.0]], discount=1.0, terminal=[1])
    with pytest.raises(UsageError, match="had not ended after 300 steps"):
        q_learning(still, episodes=1)
