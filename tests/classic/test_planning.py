"""Dynamic programming against other ways to the same numbers: a thousand random processes at once, every policy of small ones, long sums, and duality."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
import torch
from torch import Tensor

from tilt.classic.bellman import (
    action_backup,
    action_values,
    backup,
    greedy,
    optimal_action_backup,
    optimal_backup,
    optimal_residual,
    residual,
    state_values,
    under,
)
from tilt.classic.mdp import MDP, probabilities, uniform
from tilt.classic.planning import (
    advantages,
    evaluate,
    evaluate_iteratively,
    evaluate_to_horizon,
    gain,
    improved,
    occupancy,
    plan_to_horizon,
    policy_iteration,
    value_iteration,
)
from tilt.classic.tables import cliff_walking, frozen_lake, random_processes, random_walk
from tilt.errors import UsageError

COUNT = 1000


@pytest.fixture(scope="module")
def many() -> MDP:
    """A thousand processes of 5 states and 3 actions, gamma .9."""
    return random_processes(COUNT)


@pytest.fixture(scope="module")
def policies() -> Tensor:
    return torch.randn(COUNT, 5, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64).softmax(-1)


def close(a: Tensor, b: Tensor, atol: float = 1e-12) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=atol)


def every_policy(mdp: MDP) -> Tensor:
    """All A^S deterministic policies, [A^S, S]."""
    return torch.tensor(list(product(range(mdp.action_count), repeat=mdp.state_count)))


# ---------------------------------------------------------------------------------------------- Bellman


def test_bellman_by_loops() -> None:
    """Sums over actions, next states and outcomes as the equations are written."""
    mdp = frozen_lake(discount=0.9)
    generator = torch.Generator().manual_seed(3)
    v = torch.randn(16, generator=generator, dtype=torch.float64)
    pi = torch.randn(16, 4, generator=generator, dtype=torch.float64).softmax(-1)
    q = torch.zeros(16, 4, dtype=torch.float64)
    for s, a, k in product(range(16), range(4), range(3)):
        q[s, a] += mdp.chance[s, a, k] * (mdp.earned[s, a, k] + 0.9 * v[mdp.following[s, a, k]])
    close(action_values(mdp, v), q)
    close(state_values(mdp, pi, q), torch.stack([sum((pi[s, a] * q[s, a] for a in range(4)), torch.zeros(())) for s in range(16)]).double())
    close(backup(mdp, pi, v), (pi * q).sum(-1))
    close(optimal_backup(mdp, v), torch.tensor([max(row) for row in q.tolist()], dtype=torch.float64))
    close(optimal_action_backup(mdp, q), action_values(mdp, q.amax(-1)))
    assert greedy(torch.tensor([[1.0, 3.0, 3.0], [0.0, 0.0, -1.0]])).tolist() == [1, 0], "the first of equals"


def test_the_solution_has_no_residual(many: MDP, policies: Tensor) -> None:
    v = evaluate(many, policies)
    q = action_values(many, v)
    close(residual(many, policies, v), torch.zeros_like(v))
    close(action_backup(many, policies, q), q)
    close(state_values(many, policies, q), v)
    best = policy_iteration(many).values
    close(optimal_residual(many, best), torch.zeros_like(v))
    assert residual(many, policies, v + 1).abs().min() > 0.09


def test_the_operators_contract(many: MDP, policies: Tensor) -> None:
    """|T v - T w| <= gamma |v - w| in the largest difference, for both operators, for states and for actions; and the bound is nearly met."""
    generator = torch.Generator().manual_seed(2)
    v, w = (3 * torch.randn(20, COUNT, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    q, p = (3 * torch.randn(20, COUNT, 5, 3, generator=generator, dtype=torch.float64) for _ in range(2))
    for found, before in (
        ((backup(many, policies, v) - backup(many, policies, w)).abs().amax(-1), (v - w).abs().amax(-1)),
        ((optimal_backup(many, v) - optimal_backup(many, w)).abs().amax(-1), (v - w).abs().amax(-1)),
        ((action_backup(many, policies, q) - action_backup(many, policies, p)).abs().amax((-2, -1)), (q - p).abs().amax((-2, -1))),
        ((optimal_action_backup(many, q) - optimal_action_backup(many, p)).abs().amax((-2, -1)), (q - p).abs().amax((-2, -1))),
    ):
        assert (found <= 0.9 * before + 1e-12).all()
    close((backup(many, policies, v + 1) - backup(many, policies, v)), torch.full_like(v, 0.9))


def test_values_are_long_sums(many: MDP, policies: Tensor) -> None:
    """v = sum_t gamma^t P_pi^t r_pi, term by term."""
    moves, earned = under(many, policies)
    total, term = torch.zeros_like(earned), earned
    for _ in range(320):
        total, term = total + term, 0.9 * (moves @ term.unsqueeze(-1)).squeeze(-1)
    close(evaluate(many, policies), total)
    close(gain(many, policies), (many.start * total).sum(-1))


def test_iterative_evaluation_keeps_its_bound(many: MDP, policies: Tensor) -> None:
    exact = evaluate(many, policies)
    for theta in (1e-2, 1e-6, 1e-12):
        found = evaluate_iteratively(many, policies, theta=theta)
        assert (found.values - exact).abs().max() <= found.bound + 1e-13 and found.bound < 9 * theta
    close(found.values, exact, 1e-10)
    rough = evaluate_iteratively(many, policies, theta=1e-2)
    assert (rough.values - exact).abs().max() > rough.bound / 20


def test_advantages_have_mean_zero_and_visits_give_the_gain(many: MDP, policies: Tensor) -> None:
    close((policies * advantages(many, policies)).sum(-1), torch.zeros(COUNT, 5, dtype=torch.float64))
    visits = occupancy(many, policies)
    close(visits.sum(-1), torch.full((COUNT,), 10.0, dtype=torch.float64), 1e-11)
    close((visits * under(many, policies)[1]).sum(-1), gain(many, policies), 1e-11)


# ---------------------------------------------------------------------------------------------- the best policy


def test_value_iteration_policy_iteration_and_every_policy_agree() -> None:
    """Every one of 3^5 policies of 20 processes is no better anywhere, and one is as good everywhere."""
    for seed in range(20):
        mdp = random_processes(seed=seed)
        swept, found = value_iteration(mdp, theta=1e-13), policy_iteration(mdp)
        values = evaluate(mdp, every_policy(mdp))
        close(values.amax(0), found.values)
        assert (values <= found.values + 1e-12).all() and ((values - found.values).abs().amax(-1) < 1e-12).any()
        close(swept.values, found.values, 1e-11)
        assert torch.equal(swept.policy, found.policy)


def test_the_best_values_solve_the_linear_programme(many: MDP) -> None:
    """min mu · v with v >= T_a v for all a, and its dual, max sum rho r over visits that balance: both feasible, one objective, so both are solved."""
    found = policy_iteration(many)
    assert (found.values.unsqueeze(-1) >= action_values(many, found.values) - 1e-12).all()
    x = occupancy(many, found.policy).unsqueeze(-1) * probabilities(many, found.policy)
    arriving = many.start + 0.9 * torch.einsum("bsa,bsat->bt", x, many.transition)
    assert (x >= 0).all()
    close(x.sum(-1), arriving, 1e-12)
    close((x * many.reward).sum((-2, -1)), (many.start * found.values).sum(-1), 1e-11)


def test_value_iteration_keeps_its_bound(many: MDP) -> None:
    """The greedy policy's own value is within 2 theta gamma / (1 - gamma) of the best; sweeps contract."""
    best = policy_iteration(many).values
    for theta in (3.0, 1e-1, 1e-3, 1e-8):
        found = value_iteration(many, theta=theta)
        lost = best - evaluate(many, found.policy)
        assert lost.min() > -1e-11 and lost.max() <= found.bound < 2 * theta * 9
        assert len(found.path) == found.sweeps
        assert found.bound == pytest.approx(2 * 0.9 / 0.1 * float((found.path[-1] - ([0 * best, *found.path])[-2]).abs().max()), rel=1e-9)
        gaps = (found.path - best).abs().amax(-1)
        assert (gaps[1:] <= 0.9 * gaps[:-1] + 1e-11).all()
    assert (best - evaluate(many, value_iteration(many, theta=3.0).policy)).max() > 0.05, "with a loose theta the policy is not the best"


def test_policy_iteration_never_falls_and_ends_at_the_best(many: MDP) -> None:
    found = policy_iteration(many, initial=torch.full((5,), 2))
    assert (found.path[1:] - found.path[:-1]).min() > -1e-12 and 3 <= found.sweeps <= 12
    close(found.values, value_iteration(many, theta=1e-13).values, 1e-11)
    stochastic = policy_iteration(many, initial=uniform(many))
    close(stochastic.values, found.values)
    close(stochastic.path[0], evaluate(many, uniform(many)))


def test_policy_iteration_ends_where_all_is_equal() -> None:
    """Without rewards, and where two actions are the same: the old action stays."""
    mdp = MDP.of(random_processes().transition, torch.zeros(5, 3), discount=0.9)
    start = torch.tensor([2, 1, 0, 1, 2])
    found = policy_iteration(mdp, initial=start)
    assert found.sweeps == 1 and torch.equal(found.policy, start) and not found.values.any()
    twin = random_processes(seed=4)
    doubled = MDP.of(
        torch.cat([twin.transition, twin.transition], 1), torch.cat([twin.reward, twin.reward + 1e-14], 1), discount=0.9, start=twin.start
    )
    close(policy_iteration(doubled).values, policy_iteration(twin).values)
    kept, changed = improved(doubled, policy_iteration(twin).policy, policy_iteration(twin).values)
    assert not changed and torch.equal(kept, policy_iteration(twin).policy)


# ---------------------------------------------------------------------------------------------- without a discount, and within a limit


def test_without_a_discount_values_are_sums_until_the_end() -> None:
    lake = frozen_lake(discount=1.0)
    close(evaluate(lake, uniform(lake)), evaluate_to_horizon(lake, uniform(lake), 500))
    mdp = cliff_walking(slippery=True)
    policy = uniform(mdp)
    visits = occupancy(mdp, policy)
    assert (visits * under(mdp, policy)[1]).sum().item() == pytest.approx(gain(mdp, policy).item(), rel=1e-12) and visits[47] == 0
    walk = random_walk()
    close(occupancy(walk, uniform(walk)), torch.tensor([0, 1, 2, 3, 2, 1, 0], dtype=torch.float64))


def test_without_a_discount_many_processes_are_solved_as_one_by_one() -> None:
    """Five states, the last two of which end episodes; and one process among many that never ends is found."""
    base = random_processes(7, states=5, seed=9)
    mdp = MDP.of(base.transition, base.reward, discount=1.0, terminal=[3, 4])
    policy = torch.randn(7, 5, 3, generator=torch.Generator().manual_seed(4), dtype=torch.float64).softmax(-1)
    for i in range(7):
        one = MDP.of(base.transition[i], base.reward[i], discount=1.0, terminal=[3, 4])
        close(evaluate(mdp, policy)[i], evaluate(one, policy[i]))
        close(occupancy(mdp, policy)[i], occupancy(one, policy[i]))
        close(policy_iteration(mdp, initial=policy).values[i], policy_iteration(one, initial=policy[i]).values, 1e-10)
    shut = base.transition.clone()
    shut[4, 2] = torch.eye(5, dtype=torch.float64)[2]
    with pytest.raises(UsageError, match=r"from 1 state\(s\), 2 the first"):
        evaluate(MDP.of(shut, base.reward, discount=1.0, terminal=[3, 4]), policy)


def test_without_a_discount_a_policy_may_go_on_where_it_earns_nothing() -> None:
    """Round and round for nothing has the value 0; round and round for a reward has none, and the state is named."""
    mdp = frozen_lake(slippery=False, discount=1.0)
    close(evaluate(mdp, torch.zeros(16, dtype=torch.long)), torch.zeros(16, dtype=torch.float64))
    ring = MDP.of([[[0.0, 1.0]], [[1.0, 0.0]]], [[0.0], [0.0]], discount=1.0)
    close(evaluate(ring, torch.zeros(2, dtype=torch.long)), torch.zeros(2, dtype=torch.float64))
    third = MDP.from_table([[[(1 / 3, 0, 0.1, False), (1 / 3, 0, 0.2, False), (1 / 3, 0, -0.3, False)]]], discount=1.0, start=0)
    assert evaluate(third, torch.zeros(1, dtype=torch.long)).tolist() == [0.0] and third.reward.item() != 0, (
        "rewards that cancel, up to rounding"
    )
    paid = MDP.of([[[0.0, 1.0]], [[1.0, 0.0]]], [[0.0], [1.0]], discount=1.0, states=("a", "b"))
    with pytest.raises(UsageError, match=r"earns for ever from 2 state\(s\), a the first"):
        evaluate(paid, torch.zeros(2, dtype=torch.long))
    with pytest.raises(UsageError, match="values still change by 1 after 50 sweeps"):
        value_iteration(paid, sweeps=50)
    with pytest.raises(UsageError, match="evaluate_iteratively: values still change"):
        evaluate_iteratively(paid, torch.zeros(2, dtype=torch.long), sweeps=50)


def test_backward_induction_equals_every_plan() -> None:
    """Two states, two actions, three steps: the best of all 4^3 plans for every start."""
    mdp = random_processes(states=2, actions=2, seed=5)
    rules = every_policy(mdp)
    plans = [torch.stack(plan) for plan in product(rules, repeat=3)]
    best = torch.stack([evaluate_to_horizon(mdp, plan, 3) for plan in plans]).amax(0)
    found = plan_to_horizon(mdp, 3)
    close(found.values[0], best)
    assert found.values.shape == (4, 2) and not found.values[3].any()
    close(evaluate_to_horizon(mdp, found.policy, 3), best)
    lake = frozen_lake(discount=1.0)
    plan = plan_to_horizon(lake, 12)
    close(evaluate_to_horizon(lake, plan.policy, 12), plan.values[0])
    assert (evaluate_to_horizon(lake, plan.policy.flip(0), 12) < plan.values[0] - 1e-3).any(), "the order of times matters"


def test_a_long_horizon_is_no_limit(many: MDP, policies: Tensor) -> None:
    close(plan_to_horizon(many, 300).values[0], policy_iteration(many).values, 1e-11)
    close(evaluate_to_horizon(many, policies, 300), evaluate(many, policies), 1e-11)
    few = evaluate_to_horizon(many, policies, 2)
    close(few, backup(many, policies, backup(many, policies, torch.zeros(COUNT, 5, dtype=torch.float64))))


def test_the_limit_of_the_process_is_the_horizon() -> None:
    mdp = replace(frozen_lake(), limit=7)
    close(plan_to_horizon(mdp).values, plan_to_horizon(mdp, 7).values)
    for call in (
        lambda: plan_to_horizon(cliff_walking()),
        lambda: evaluate_to_horizon(cliff_walking(), torch.zeros(48).long()),
        lambda: plan_to_horizon(mdp, 0),
    ):
        with pytest.raises(UsageError, match="horizon"):
            call()
    with pytest.raises(UsageError, match="a policy for 7 times and a horizon of 8"):
        evaluate_to_horizon(mdp, plan_to_horizon(mdp).policy, 8)


def test_settings_that_cannot_be_met_are_refused() -> None:
    mdp = frozen_lake()
    for call in (lambda: value_iteration(mdp, theta=0.0), lambda: evaluate_iteratively(mdp, uniform(mdp), sweeps=0)):
        with pytest.raises(UsageError, match="theta"):
            call()
    with pytest.raises(UsageError, match="raise `rounds`"):
        policy_iteration(mdp, rounds=2)


def test_undiscounted_gain_asks_of_the_states_that_are_met_alone() -> None:
    """From a the episode ends, reward 2; b, never met from a, earns 1 for ever: J = 2 from a, none from b."""
    transition = torch.zeros(3, 1, 3, dtype=torch.float64)
    transition[0, 0, 2] = transition[1, 0, 1] = transition[2, 0, 2] = 1
    reward = torch.tensor([[2.0], [1.0], [0.0]], dtype=torch.float64)
    stay, ends = torch.zeros(3, dtype=torch.long), [False, False, True]
    met = MDP.of(transition, reward, discount=1.0, start=[1.0, 0, 0], terminal=ends)
    assert float(gain(met, stay)) == 2.0
    with pytest.raises(UsageError, match="earns for ever"):
        evaluate(met, stay)
    with pytest.raises(UsageError, match="earns for ever"):
        gain(MDP.of(transition, reward, discount=1.0, start=[0.5, 0.5, 0], terminal=ends), stay)
