"""Dynamic programming: exact and iterative evaluation, value iteration, policy iteration, and backward induction under a time limit."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf

import torch
from torch import Tensor

from tilt.classic.bellman import action_values, backup, greedy, optimal_backup, under
from tilt.classic.mdp import MDP, probabilities
from tilt.errors import UsageError

TIE = 1e-12
"""An action replaces another only where it is better by more than this (times the largest value, where that is above 1)."""


@dataclass(frozen=True)
class Plan:
    """Values [..., S] and a policy that is greedy on them [..., S]; `sweeps` over all states, or rounds of policy iteration, that it took.

    `bound`: how far at most the policy's own value lies below the best, in any state. `path`: the values after every sweep or round, [sweeps, ..., S].
    """

    values: Tensor
    policy: Tensor
    sweeps: int
    bound: float
    path: Tensor


@dataclass(frozen=True)
class Evaluated:
    """Values [..., S] found sweep by sweep, how many sweeps it took, and how far they are from the truth at most."""

    values: Tensor
    sweeps: int
    bound: float


@dataclass(frozen=True)
class HorizonPlan:
    """The best that can be earned in the steps that are left: `values` [H + 1, ..., S] at each time (0 at the end), and what to do then, `policy` [H, ..., S]."""

    values: Tensor
    policy: Tensor


# ---------------------------------------------------------------------------------------------- evaluation


def evaluate(mdp: MDP, policy: Tensor) -> Tensor:
    """v_pi = (I - gamma P_pi)^-1 r_pi, [..., S].

    With gamma = 1 states from which nothing is ever earned again have the value 0, and the policy must reach them from everywhere.
    """
    return _solved(mdp, *under(mdp, policy))


def _solved(mdp: MDP, moves: Tensor, earned: Tensor) -> Tensor:
    system, spent = _system(mdp, moves, earned)
    return torch.linalg.solve(system, torch.where(spent, 0.0, earned))


def evaluate_iteratively(mdp: MDP, policy: Tensor, *, theta: float = 1e-10, sweeps: int = 100_000) -> Evaluated:
    """v <- sum_a pi sum p (r + gamma v) from 0 until no value changes by theta or more; then |v - v_pi| <= gamma / (1 - gamma) times the last change."""
    probabilities(mdp, policy)
    values = torch.zeros(mdp.state_count, dtype=torch.float64)
    for sweep in range(1, _counted(theta, sweeps) + 1):
        new = backup(mdp, policy, values)
        change = float((new - values).abs().max())
        values = new
        if change < theta:
            return Evaluated(values, sweep, _error(mdp, change))
    raise _unsettled("evaluate_iteratively", mdp, theta, sweeps, change)


def gain(mdp: MDP, policy: Tensor) -> Tensor:
    """J(pi) = E[sum_t gamma^t r_t] = mu · v_pi, [...]. With gamma = 1 the policy must end from the states that it reaches, and no others."""
    moves, earned = under(mdp, policy)
    if mdp.discount == 1:
        met = _leading_to(moves.mT, (mdp.start > 0).expand(earned.shape))
        moves, earned = torch.where(met.unsqueeze(-1), moves, 0.0), torch.where(met, earned, 0.0)
    return (mdp.start * _solved(mdp, moves, earned)).sum(-1)


def advantages(mdp: MDP, policy: Tensor) -> Tensor:
    """A(s, a) = q_pi(s, a) - v_pi(s), [..., S, A]; its mean over the policy's actions is 0 in every state."""
    values = evaluate(mdp, policy)
    return action_values(mdp, values) - values.unsqueeze(-1)


def occupancy(mdp: MDP, policy: Tensor) -> Tensor:
    """rho(s) = sum_t gamma^t P(s_t = s) = ((I - gamma P_pi^T)^-1 mu)(s), [..., S]; sums to 1 / (1 - gamma), and sum_s rho r_pi = J.

    With gamma = 1 these are visits before nothing is earned any more, 0 in the states after that.
    """
    system, spent = _system(mdp, *under(mdp, policy))
    return torch.where(spent, 0.0, torch.linalg.solve(system.mT, mdp.start.expand(system.shape[:-1])))


def _system(mdp: MDP, moves: Tensor, earned: Tensor) -> tuple[Tensor, Tensor]:
    """I - gamma P_pi, and the states [..., S] whose value is 0 by right and whose row is cut off (none where gamma < 1)."""
    one = torch.eye(mdp.state_count, dtype=torch.float64)
    if mdp.discount < 1:
        return one - mdp.discount * moves, torch.zeros_like(earned, dtype=torch.bool)
    spent = ~_leading_to(moves, earned.abs() > 1e-14 * mdp.earned.abs().max())  # rewards may cancel up to rounding
    lost = ~_leading_to(moves, spent)
    if bool(lost.any()):
        where = mdp.name(int(lost.nonzero()[0, -1]))
        raise UsageError(
            f"with discount 1 this policy earns for ever from {int(lost.sum())} state(s), {where} the first, so it has no value there: "
            "give a policy that ends from everywhere, a discount below 1, or a horizon (evaluate_to_horizon)"
        )
    return one - torch.where(spent.unsqueeze(-1), 0.0, moves), spent


def _leading_to(moves: Tensor, goal: Tensor) -> Tensor:
    """States from which a goal is reached with some probability, [..., S]; the goals themselves are among them."""
    there, found = (moves > 0).to(torch.float64), goal
    while True:
        more = found | ((there @ found.unsqueeze(-1).to(torch.float64)).squeeze(-1) > 0)
        if bool((more == found).all()):
            return found
        found = more


# ---------------------------------------------------------------------------------------------- the best policy


def value_iteration(mdp: MDP, *, theta: float = 1e-10, sweeps: int = 100_000) -> Plan:
    """v <- max_a sum p (r + gamma v) from 0 until no value changes by theta or more; the greedy policy is then at most 2 theta gamma / (1 - gamma) below v*.

    `bound` has the last change in place of theta (Williams and Baird 1993).
    """
    values = torch.zeros(*mdp.lead, mdp.state_count, dtype=torch.float64)
    path = []
    for sweep in range(1, _counted(theta, sweeps) + 1):
        new = optimal_backup(mdp, values)
        change = float((new - values).abs().max())
        values = new
        path.append(values)
        if change < theta:
            return Plan(values, greedy(action_values(mdp, values)), sweep, 2 * _error(mdp, change), torch.stack(path))
    raise _unsettled("value_iteration", mdp, theta, sweeps, change)


def policy_iteration(mdp: MDP, *, initial: Tensor | None = None, rounds: int = 1000) -> Plan:
    """Evaluate, improve greedily, and again until no action changes; an action is kept unless another is better by more than 1e-12, so equals do not alternate.

    Starts from `initial`, deterministic or not, or from action 0 everywhere. Values never fall from round to round.
    """
    policy = torch.zeros(mdp.state_count, dtype=torch.long) if initial is None else initial
    path = []
    for done in range(1, rounds + 1):
        values = evaluate(mdp, policy)
        path.append(values)
        better, changed = improved(mdp, policy, values)
        if not changed:
            return Plan(values, policy, done, 0.0, torch.stack(path))
        policy = better
    raise UsageError(f"policy_iteration: actions still changed after {rounds} rounds; raise `rounds`")


def improved(mdp: MDP, policy: Tensor, values: Tensor) -> tuple[Tensor, bool]:
    """A policy made greedy on these values, [..., S], and whether that changed any action; a stochastic policy keeps none."""
    q = action_values(mdp, values)
    if policy.is_floating_point():
        return greedy(q), True
    now = policy.expand(q.shape[:-1])
    better = q.amax(-1) > q.gather(-1, now.unsqueeze(-1)).squeeze(-1) + TIE * max(1.0, float(q.abs().max()))
    return torch.where(better, greedy(q), now), bool(better.any())


def _error(mdp: MDP, change: float) -> float:
    """|v_k - v| <= gamma / (1 - gamma) |v_k - v_(k-1)|; no bound without a discount, unless nothing changed at all."""
    if mdp.discount < 1:
        return mdp.discount / (1 - mdp.discount) * change
    return inf if change else 0.0


def _counted(theta: float, sweeps: int) -> int:
    if not theta > 0 or sweeps < 1:
        raise UsageError(f"theta={theta} must be above 0, and sweeps={sweeps} at least 1")
    return sweeps


def _unsettled(name: str, mdp: MDP, theta: float, sweeps: int, change: float) -> UsageError:
    return UsageError(
        f"{name}: values still change by {change:.3g} after {sweeps} sweeps, more than theta={theta}: raise theta or `sweeps`"
        + ("; with discount 1 a policy that earns for ever has no value" if mdp.discount == 1 else "")
    )


# ---------------------------------------------------------------------------------------------- a time limit


def plan_to_horizon(mdp: MDP, horizon: int | None = None) -> HorizonPlan:
    """Backward induction, v_t(s) = max_a sum p (r + gamma v_(t+1)(s')), v_H = 0: what to do depends on the steps that are left. The horizon is `mdp.limit` unless given."""
    steps = _steps(mdp, horizon)
    values = [torch.zeros(*mdp.lead, mdp.state_count, dtype=torch.float64)]
    policy = []
    for _ in range(steps):
        q = action_values(mdp, values[-1])
        values.append(q.amax(-1))
        policy.append(greedy(q))
    return HorizonPlan(torch.stack(values[::-1]), torch.stack(policy[::-1]))


def evaluate_to_horizon(mdp: MDP, policy: Tensor, horizon: int | None = None) -> Tensor:
    """What a policy earns from each state in that many steps, [..., S]; the policy is one for all times, or has an axis of times in front, [H, ..., S(, A)]."""
    steps = _steps(mdp, horizon)
    still = policy.dim() - policy.is_floating_point() <= 1 + len(mdp.lead)
    if not still and len(policy) != steps:
        raise UsageError(f"evaluate_to_horizon: a policy for {len(policy)} times and a horizon of {steps}")
    values = torch.zeros(*mdp.lead, mdp.state_count, dtype=torch.float64)
    for t in reversed(range(steps)):
        values = backup(mdp, policy if still else policy[t], values)
    return values


def _steps(mdp: MDP, horizon: int | None) -> int:
    steps = mdp.limit if horizon is None else horizon
    if steps is None or steps < 1:
        raise UsageError(f"horizon={horizon}: this process has no time limit of its own, so name a horizon of at least 1 step")
    return steps
