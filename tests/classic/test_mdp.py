"""Finite processes: arrays, tables and environments say the same, names do not matter, and what is no process is refused."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from tilt.classic.mdp import MDP, probabilities, uniform
from tilt.classic.planning import evaluate, gain, policy_iteration
from tilt.classic.tables import cliff_walking, frozen_lake, random_processes, taxi
from tilt.errors import UsageError

P = [[[0.5, 0.5], [1.0, 0.0]], [[0.0, 1.0], [0.3, 0.7]]]
R = [[1.0, 2.0], [0.0, -1.0]]


def tables(mdp: MDP) -> list[list[list[tuple[float, int, float, bool]]]]:
    """P[s][a] of a process."""
    return [
        [
            [
                (mdp.chance[s, a, k].item(), n := int(mdp.following[s, a, k]), mdp.earned[s, a, k].item(), bool(mdp.terminal[n]))
                for k in range(mdp.chance.shape[-1])
            ]
            for a in range(mdp.action_count)
        ]
        for s in range(mdp.state_count)
    ]


def relabelled(mdp: MDP, order: Tensor, swap: Tensor) -> MDP:
    """State i becomes state order[i], action a becomes swap[a]."""
    back, turn = order.argsort(), swap.argsort()
    return replace(
        mdp, chance=mdp.chance[back][:, turn], following=order[mdp.following[back][:, turn]], earned=mdp.earned[back][:, turn], start=mdp.start[back],
        terminal=mdp.terminal[back], states=(), actions=(), grid=None,
    )  # fmt: skip


@pytest.mark.parametrize(
    "make", [frozen_lake, cliff_walking, lambda **k: cliff_walking(slippery=True, **k), taxi, lambda **k: random_processes(**k)]
)
def test_rows_add_up_and_labels_do_not_matter(make: Any) -> None:
    mdp = make(discount=0.9)
    assert (mdp.transition.sum(-1) - 1).abs().max() < 1e-12
    generator = torch.Generator().manual_seed(1)
    order, swap = torch.randperm(mdp.state_count, generator=generator), torch.randperm(mdp.action_count, generator=generator)
    other = relabelled(mdp, order, swap)
    policy = torch.rand(mdp.state_count, mdp.action_count, generator=generator, dtype=torch.float64)
    policy /= policy.sum(-1, keepdim=True)
    moved = policy[order.argsort()][:, swap.argsort()]
    torch.testing.assert_close(gain(mdp, policy), gain(other, moved), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(evaluate(mdp, policy), evaluate(other, moved)[order], rtol=1e-11, atol=1e-11)
    best, again = policy_iteration(mdp), policy_iteration(other)
    torch.testing.assert_close(best.values, again.values[order], rtol=1e-11, atol=1e-11)


def test_arrays_tables_and_environments_say_the_same() -> None:
    by_hand = MDP.of(P, R, discount=0.8, start=[0.25, 0.75])
    table = {s: {a: [(P[s][a][n], n, R[s][a], False) for n in range(2)] for a in range(2)} for s in range(2)}
    for other in (
        MDP.of(P, torch.tensor(R).unsqueeze(-1).expand(2, 2, 2), discount=0.8, start=[0.25, 0.75]),
        MDP.from_table(table, discount=0.8, start=[0.25, 0.75]),
        MDP.from_env(SimpleNamespace(unwrapped=SimpleNamespace(P=table, initial_state_distrib=[0.25, 0.75])), discount=0.8),
    ):
        assert (
            torch.equal(other.transition, by_hand.transition)
            and torch.equal(other.reward, by_hand.reward)
            and torch.equal(other.start, by_hand.start)
        )


def test_a_reward_may_depend_on_where_an_action_leads() -> None:
    by_next = torch.arange(8.0).view(2, 2, 2)
    mdp = MDP.of(P, by_next, discount=0.5)
    assert mdp.reward.flatten().tolist() == pytest.approx([0.5, 2.0, 5.0, 6.7])


def test_two_outcomes_may_lead_to_one_state_with_two_rewards() -> None:
    """On the slippery cliff a step up from the start may stay for -1 or fall for -100; both lead to the start."""
    mdp = cliff_walking(slippery=True)
    assert sorted(zip(mdp.following[36, 0].tolist(), mdp.earned[36, 0].tolist())) == [(24, -1.0), (36, -100.0), (36, -1.0)]
    assert mdp.transition[36, 0, 36].item() == pytest.approx(2 / 3) and mdp.reward[36, 0].item() == pytest.approx(-34)


def test_a_state_that_is_entered_both_ways_gets_an_end_beside_it() -> None:
    """From 0 the first action ends in 1, the second goes on through 1, which earns 5 once more."""
    last = [(1.0, 1, 5.0, True)]
    table = [[[(1.0, 1, 1.0, True)], [(1.0, 1, 1.0, False)]], [last, last]]
    mdp = MDP.from_table(table, discount=0.5, start=0, states=("a", "b"))
    assert mdp.state_count == 3 and mdp.states == ("a", "b", "end") and mdp.terminal.tolist() == [False, False, True]
    assert evaluate(mdp, torch.tensor([0, 0, 0])).tolist() == [1.0, 5.0, 0.0]
    assert evaluate(mdp, torch.tensor([1, 0, 0])).tolist() == [3.5, 5.0, 0.0]


def test_the_rows_of_terminal_states_are_replaced() -> None:
    for terminal in ([1], [False, True], torch.tensor([False, True])):
        mdp = MDP.of(P, R, discount=1.0, terminal=terminal)
        assert (
            mdp.transition[1].tolist() == [[0.0, 1.0], [0.0, 1.0]]
            and mdp.reward[1].tolist() == [0.0, 0.0]
            and mdp.start.tolist() == [1.0, 0.0]
        )


def test_deterministic_policies_are_stochastic_ones_of_one_action() -> None:
    mdp = frozen_lake()
    policy = torch.randint(4, (16,), generator=torch.Generator().manual_seed(0))
    one_hot = torch.nn.functional.one_hot(policy, 4).double()
    assert torch.equal(probabilities(mdp, policy), one_hot)
    assert torch.equal(evaluate(mdp, policy), evaluate(mdp, one_hot))
    assert torch.equal(uniform(mdp).sum(-1), torch.ones(16).double())
    single = torch.randn(16, 4, generator=torch.Generator().manual_seed(0)).softmax(-1)
    assert (probabilities(mdp, single).sum(-1) - 1).abs().max() < 1e-15 and (single.double().sum(-1) - 1).abs().max() > 1e-9


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"transition": [[[0.5, 0.4], [1.0, 0.0]], P[1]]}, r"action 0 in state 0 .* add up to 0\.9"),
    ({"transition": [P[0], [[1.5, -0.5], [1.0, 0.0]]], "states": ["x", "y"]}, "action 0 in state y .* none may be negative"),
    ({"transition": [[0.5, 0.5]]}, r"shape \(1, 2\)"),
    ({"transition": [[[0.5, 0.5]]]}, r"shape \(1, 1, 2\)"),
    ({"transition": [[["a"]]]}, "not an array of numbers"),
    ({"reward": [1.0, 2.0, 3.0]}, r"reward has shape \(3,\), not \(2, 2\)"),
    ({"reward": [[1.0, float("nan")], [0.0, 0.0]]}, "reward is not finite"),
    ({"discount": 1.1}, r"discount=1.1 must lie in \[0, 1\]"),
    ({"discount": -0.1}, "discount"),
    ({"start": [0.5, 0.4]}, "start"),
    ({"start": [1.5, -0.5]}, "start"),
    ({"start": [1.0, 0.0], "terminal": [0]}, "cannot start in a terminal state"),
    ({"terminal": [2]}, "list of states in 0"),
    ({"terminal": [True]}, "mask of shape"),
    ({"limit": 0}, "limit=0"),
    ({"states": ["a"]}, "1 names for 2 states"),
    ({"actions": ["a", "b", "c"]}, "3 names for 2 actions"),
    ({"grid": (2, 2)}, "grid of 2 × 2"),
]


@pytest.mark.parametrize(("changed", "told"), WRONG, ids=lambda x: x if isinstance(x, str) else next(iter(x)))
def test_what_is_no_process_is_refused(changed: dict[str, Any], told: str) -> None:
    arguments: dict[str, Any] = {"transition": P, "reward": R, "discount": 0.9} | changed
    with pytest.raises(UsageError, match=told):
        MDP.of(arguments.pop("transition"), arguments.pop("reward"), **arguments)


def test_tables_and_environments_that_are_none_are_refused() -> None:
    with pytest.raises(UsageError, match="same actions"):
        MDP.from_table([[[(1.0, 0, 0.0, False)]], [[(1.0, 0, 0.0, False)]] * 2], discount=0.9, start=0)
    with pytest.raises(UsageError, match="next state in 0 … 0"):
        MDP.from_table([[[(1.0, 1, 0.0, False)]]], discount=0.9, start=0)
    for start in (1, -1, 0.5, [0.5, 0.5]):
        with pytest.raises(UsageError, match="must be a state in 0 … 0, or 1 probabilities"):
            MDP.from_table([[[(1.0, 0, 0.0, False)]]], discount=0.9, start=start)
    with pytest.raises(UsageError, match="add up to 0.5"):
        MDP.from_table([[[(0.5, 0, 0.0, False)]]], discount=0.9, start=0)
    with pytest.raises(UsageError, match="has no P"):
        MDP.from_env(SimpleNamespace(unwrapped=object()), discount=0.9)
    with pytest.raises(UsageError, match="has no initial_state_distrib"):
        MDP.from_env(SimpleNamespace(P={}), discount=0.9)
    with pytest.raises(UsageError, match="lead to itself"):
        mdp = MDP.of(P, R, discount=0.9, start=[1.0, 0.0])
        replace(mdp, terminal=torch.tensor([False, True]))


def test_policies_that_are_none_are_refused() -> None:
    mdp = MDP.of(P, R, discount=0.9)
    for policy, told in (
        (torch.tensor([0, 2]), r"one action in 0 … 1"),
        (torch.tensor([0]), "one action"),
        (torch.tensor([True, False]), "not bool"),
        (torch.tensor([0.0, 1.0]), r"pi\(a \| s\)"),
        (torch.tensor([[0.5, 0.4], [0.5, 0.5]]), "add up to 1"),
        (torch.tensor([[1.5, -0.5], [0.5, 0.5]]), "softmax"),
    ):
        with pytest.raises(UsageError, match=told):
            evaluate(mdp, policy)
