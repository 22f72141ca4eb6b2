"""Exact values of the processes with known answers (classic.md C2, C3), to the printed digits; and Gymnasium's own tables, where it is installed, say the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tilt.classic.mdp import MDP, uniform
from tilt.classic.planning import evaluate, evaluate_to_horizon, gain, occupancy, plan_to_horizon, policy_iteration, value_iteration
from tilt.classic.tables import LAKE_8, cliff_walking, frozen_lake, random_walk, sutton_barto_grid, taxi
from tilt.errors import UsageError

MAKE: dict[str, Any] = {
    "lake": frozen_lake,
    "lake8": lambda **k: frozen_lake(LAKE_8, **k),
    "dry": lambda **k: frozen_lake(slippery=False, **k),
    "taxi": taxi,
    "cliff": cliff_walking,
    "slip": lambda **k: cliff_walking(slippery=True, **k),
}
# process, discount, mu · v*, mu · v of the uniform policy, sweeps of value iteration to 1e-13, rounds of policy iteration
PRINTED = [
    ("lake", 0.9, ".068890904888", ".0044772607", 196, 6),
    ("lake", 0.95, ".180471578396", ".0077673842", 325, 6),
    ("lake", 0.99, ".542025931999", ".0123561373", 770, 7),
    ("lake", 0.999, ".785533256653", ".0137713740", 1044, 7),
    ("lake8", 0.9, ".006411114261", ".0000307566", 211, 10),
    ("lake8", 0.95, ".048250204081", ".0001841224", None, None),
    ("lake8", 0.99, ".414640361799", ".0010996148", None, None),
    ("lake8", 0.999, ".892635494944", ".0017968212", 1772, 13),
    ("dry", 0.99, ".950990049900", ".0123561373", None, None),
    ("taxi", 0.9, "-1.263323099040", "-39.3859733407", 19, 17),
    ("taxi", 0.99, "6.327464314919", "-384.8040368358", 19, 17),
    ("taxi", 0.999, "7.759898115830", "-2839.9349076719", 19, 17),
    ("cliff", 0.99, "-12.247897700103", "-1072.2360266829", None, None),
    ("cliff", 0.999, "-12.922285286285", "-8891.3827339", None, None),
    ("slip", 0.99, "-46.352672181651", "-1072.2360266829", None, None),
    ("slip", 0.999, "-62.412260562776", "-8891.3827339", None, None),
]
LIMITED = [
    ("lake", ".744190287829"), ("lake8", ".913220150202"), ("dry", "1"), ("taxi", "7.93"),
]  # fmt: skip
# process, discount whose greedy policy is meant, its return within the time limit, without one
STATIONARY = [
    ("lake", 0.99, ".7401648978", ".823529411765"), ("lake", 0.999, ".7401648978", ".823529411765"), ("lake", 0.9, ".7297660174", ".7804878049"),
    ("lake", 0.95, ".7297660174", ".7804878049"), ("lake8", 0.99, ".8629553800", ".8938406104"), ("lake8", 0.999, ".8856539193", "1"),
    ("lake8", 0.9, ".7385758116", ".7487904043"), ("lake8", 0.95, ".7385758116", ".7487904043"),
]  # fmt: skip
RANDOM_5 = """
 3.3090  8.7893  4.4276  5.3224  1.4922
 1.5216  2.9923  2.2501  1.9076  0.5474
 0.0508  0.7382  0.6731  0.3582 -0.4031
-0.9736 -0.4355 -0.3549 -0.5856 -1.1831
-1.8577 -1.3452 -1.2293 -1.4229 -1.9752"""
BEST_5 = """
21.9775 24.4194 21.9775 19.4194 17.4775
19.7797 21.9775 19.7797 17.8018 16.0216
17.8018 19.7797 17.8018 16.0216 14.4194
16.0216 17.8018 16.0216 14.4194 12.9775
14.4194 16.0216 14.4194 12.9775 11.6797"""


def printed(found: torch.Tensor | float, text: str) -> None:
    """`found` rounds to these digits."""
    half = 0.5 * 10.0 ** -len(text.partition(".")[2]) if "." in text else 1e-9
    assert float(found) == pytest.approx(float(text), rel=0, abs=half * (1 + 1e-3)), text


@pytest.mark.parametrize(("name", "discount", "best", "even", "sweeps", "rounds"), PRINTED)
def test_values_to_the_printed_digits(name: str, discount: float, best: str, even: str, sweeps: int | None, rounds: int | None) -> None:
    """The printed digits are those of value iteration to 1e-13, which stops up to 3e-12 below; policy iteration agrees to 1e-11."""
    mdp = MAKE[name](discount=discount)
    swept, found = value_iteration(mdp, theta=1e-13), policy_iteration(mdp)
    printed((mdp.start * swept.values).sum(), best)
    printed(gain(mdp, uniform(mdp)), even)
    assert (swept.values - found.values).abs().max() < 1e-11
    assert (evaluate(mdp, swept.policy) - found.values).abs().max() < 1e-11
    assert sweeps in (None, swept.sweeps) and rounds in (None, found.sweeps)


@pytest.mark.parametrize(("name", "best"), LIMITED)
def test_the_best_within_the_time_limit(name: str, best: str) -> None:
    mdp = MAKE[name](discount=1.0)
    plan = plan_to_horizon(mdp)
    printed((mdp.start * plan.values[0]).sum(), best)
    torch.testing.assert_close(evaluate_to_horizon(mdp, plan.policy), plan.values[0], rtol=0, atol=1e-12)
    if name == "lake":
        assert (plan.policy != plan.policy[0]).any(), "what is best depends on the steps that are left"


@pytest.mark.parametrize(("name", "discount", "limited", "free"), STATIONARY)
def test_one_policy_for_all_times(name: str, discount: float, limited: str, free: str) -> None:
    policy = policy_iteration(MAKE[name](discount=discount)).policy
    mdp = MAKE[name](discount=1.0)
    printed((mdp.start * evaluate_to_horizon(mdp, policy)).sum(), limited)
    printed(gain(mdp, policy), free)


@pytest.mark.parametrize(("name", "best"), [("cliff", "-13"), ("slip", "-64.709175909962")])
def test_the_cliff_without_a_discount(name: str, best: str) -> None:
    """Value iteration, policy iteration from a policy that ends, and a long horizon agree where every best policy ends."""
    mdp = MAKE[name](discount=1.0)
    swept, found = value_iteration(mdp, theta=1e-13), policy_iteration(mdp, initial=uniform(mdp))
    printed((mdp.start * found.values).sum(), best)
    for values in (swept.values, plan_to_horizon(mdp, 1200).values[0]):
        torch.testing.assert_close(values, found.values, rtol=0, atol=1e-11)
    with pytest.raises(UsageError, match="earns for ever"):
        policy_iteration(mdp)


def test_fourteen_seventeenths() -> None:
    """The greedy policy of gamma .99 on the small lake reaches the goal with probability 14/17."""
    assert gain(frozen_lake(discount=1.0), policy_iteration(frozen_lake(discount=0.99)).policy).item() == pytest.approx(14 / 17, abs=1e-12)


def test_a_uniform_policy_does_not_notice_slipping() -> None:
    for wet, dry in (("lake", "dry"), ("slip", "cliff")):
        first, second = MAKE[wet](discount=0.99), MAKE[dry](discount=0.99)
        torch.testing.assert_close(evaluate(first, uniform(first)), evaluate(second, uniform(second)), rtol=1e-12, atol=1e-10)


def test_the_grid_of_sutton_and_barto() -> None:
    mdp = sutton_barto_grid()
    for values, table in ((evaluate(mdp, uniform(mdp)), RANDOM_5), (policy_iteration(mdp).values, BEST_5)):
        for found, text in zip(values, table.split(), strict=True):
            printed(found, text)


@pytest.mark.parametrize("states", [1, 5, 19])
def test_the_random_walk(states: int) -> None:
    mdp = random_walk(states)
    wanted = torch.tensor([0, *(i / (states + 1) for i in range(1, states + 1)), 0], dtype=torch.float64)
    torch.testing.assert_close(evaluate(mdp, uniform(mdp)), wanted, rtol=0, atol=1e-14)


def test_taxi_has_500_states_and_ends_on_delivery() -> None:
    mdp = taxi()
    assert mdp.state_count == 500 and mdp.terminal.sum() == 100 and (mdp.start > 0).sum() == 300
    assert mdp.states[0] == "0,0 R→R" and mdp.name(((0 * 5 + 4) * 5 + 4) * 4 + 1) == "0,4 t→G"


def test_a_map_that_is_none_is_refused() -> None:
    for rows in (("SF", "G"), ("SX",), ("FG",), ("SF",)):
        with pytest.raises(UsageError, match="a map has rows of one length"):
            frozen_lake(rows)
    with pytest.raises(UsageError, match="states=0"):
        random_walk(0)


GYM: list[tuple[str, dict[str, Any], str]] = [
    ("FrozenLake-v1", {}, "lake"), ("FrozenLake8x8-v1", {}, "lake8"), ("FrozenLake-v1", {"is_slippery": False}, "dry"),
    ("Taxi-v3", {}, "taxi"), ("Taxi-v4", {}, "taxi"), ("CliffWalking-v1", {}, "cliff"), ("CliffWalking-v1", {"is_slippery": True}, "slip"),
]  # fmt: skip


@pytest.mark.parametrize(("env", "arguments", "name"), GYM)
def test_the_tables_of_gymnasium_have_the_same_values(env: str, arguments: dict[str, Any], name: str) -> None:
    gymnasium: Any = pytest.importorskip("gymnasium")
    try:
        made = gymnasium.make(env, **arguments)
    except gymnasium.error.Error as error:
        pytest.skip(str(error))
    theirs, ours = MDP.from_env(made, discount=0.99), MAKE[name](discount=0.99)
    seen = ~ours.terminal
    seen &= occupancy(ours, uniform(ours)) > 0
    for solve in (lambda m: policy_iteration(m).values, lambda m: evaluate(m, uniform(m))):
        torch.testing.assert_close(solve(theirs)[: len(seen)][seen], solve(ours)[seen], rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(theirs.start[: len(seen)], ours.start, rtol=0, atol=1e-15)
    assert theirs.limit == ours.limit and theirs.grid == ours.grid
