"""Bellman: values of states and actions, the two operators and their residuals, advantages, and greedy policies. Every function takes many processes or policies at once."""

from __future__ import annotations

import torch
from torch import Tensor

from tilt.classic.mdp import MDP, probabilities


def action_values(mdp: MDP, values: Tensor) -> Tensor:
    """q(s, a) = sum_(s',r) p(s', r | s, a) (r + gamma v(s')), [..., S, A]."""
    if mdp.lead or mdp.chance.shape[-1] == mdp.state_count:
        return mdp.reward + mdp.discount * (mdp.transition @ values[..., None, :, None]).squeeze(-1)
    return (mdp.chance * (mdp.earned + mdp.discount * values[..., mdp.following])).sum(-1)  # few outcomes: taxi has 1 for its 500 states


def state_values(mdp: MDP, policy: Tensor, q: Tensor) -> Tensor:
    """v(s) = sum_a pi(a | s) q(s, a), [..., S]."""
    return (probabilities(mdp, policy) * q).sum(-1)


def backup(mdp: MDP, policy: Tensor, values: Tensor) -> Tensor:
    """Bellman's expectation operator, a gamma-contraction whose fixed point is v_pi: (T v)(s) = sum_a pi(a | s) sum_(s',r) p (r + gamma v(s')), [..., S]."""
    return state_values(mdp, policy, action_values(mdp, values))


def action_backup(mdp: MDP, policy: Tensor, q: Tensor) -> Tensor:
    """The same for actions: (T q)(s, a) = sum_(s',r) p (r + gamma sum_a' pi(a' | s') q(s', a')), [..., S, A]."""
    return action_values(mdp, state_values(mdp, policy, q))


def optimal_backup(mdp: MDP, values: Tensor) -> Tensor:
    """Bellman's optimality operator, whose fixed point is v*: (T v)(s) = max_a sum_(s',r) p (r + gamma v(s')), [..., S]."""
    return action_values(mdp, values).amax(-1)


def optimal_action_backup(mdp: MDP, q: Tensor) -> Tensor:
    """The same for actions, whose fixed point is q*: sum_(s',r) p (r + gamma max_a' q(s', a')), [..., S, A]."""
    return action_values(mdp, q.amax(-1))


def residual(mdp: MDP, policy: Tensor, values: Tensor) -> Tensor:
    """T_pi v - v, [..., S]: 0 everywhere at v_pi alone."""
    return backup(mdp, policy, values) - values


def optimal_residual(mdp: MDP, values: Tensor) -> Tensor:
    """T v - v, [..., S]: 0 everywhere at v* alone."""
    return optimal_backup(mdp, values) - values


def greedy(q: Tensor) -> Tensor:
    """argmax_a q(s, a), the first where several are best, [..., S]."""
    best = (q == q.amax(-1, keepdim=True)).to(torch.int8)
    return best.argmax(-1)


def under(mdp: MDP, policy: Tensor) -> tuple[Tensor, Tensor]:
    """The chain that a policy makes of a process: P_pi(s' | s) [..., S, S'] and r_pi(s) [..., S]."""
    chosen = probabilities(mdp, policy)
    return (chosen.unsqueeze(-2) @ mdp.transition).squeeze(-2), (chosen * mdp.reward).sum(-1)
