"""The bridge: a tree of answers is a finite process, and dynamic programming with a soft maximum gives the policy that KL-regularised language models approach."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from tilt.classic.bellman import action_values
from tilt.classic.mdp import MDP, probabilities, uniform
from tilt.errors import UsageError


class Tree(Protocol):
    """Every answer to some prompts, as `tilt.oracle.token_mdp.TokenMDP` lists them: G prompts, N answers of A tokens in all, X prefixes, V tokens."""

    @property
    def answers(self) -> Sequence[tuple[int, ...]]: ...

    @property
    def prefixes(self) -> Sequence[tuple[int, ...]]: ...

    @property
    def vocabulary(self) -> int: ...

    @property
    def rewards(self) -> Tensor:
        """What an answer earns in all at its end, [G, N]."""

    @property
    def steps(self) -> Tensor:
        """What each of its tokens earns, [G, A]."""


@dataclass(frozen=True)
class SoftPlan:
    """Soft values [..., S], the policy that attains them [..., S, A], and how many sweeps they took."""

    values: Tensor
    policy: Tensor
    sweeps: int


def token_process(tree: Tree) -> MDP:
    """The process whose states are prompt and prefix, g X + x, and one end; its actions are tokens, gamma = 1, and every prompt is as likely.

    A token leads from a prefix to the longer one, or ends the answer, and earns what that answer earns.
    """
    prompts, prefixes, width = len(tree.rewards), list(tree.prefixes), tree.vocabulary
    number, end = {prefix: i for i, prefix in enumerate(prefixes)}, prompts * len(prefixes)
    shape = (end + 1, width)
    following, earned = torch.full((*shape, 1), end), torch.full((*shape, 1), torch.nan, dtype=torch.float64)
    for g in range(prompts):
        paid = iter(tree.steps[g].tolist())
        for answer, reward in zip(tree.answers, tree.rewards[g].tolist(), strict=True):
            for t, token in enumerate(answer):
                s, last = g * len(prefixes) + number[answer[:t]], t + 1 == len(answer)
                r = next(paid) + (reward if last else 0.0)
                if not (bool(earned[s, token, 0].isnan()) or float(earned[s, token, 0]) == r):
                    raise UsageError(
                        f"token_process: token {token} after {list(answer[:t])} earns {float(earned[s, token, 0]):g} in one answer and {r:g} in another; "
                        "a reward that looks ahead is no reward of a process: pay it at the end of the answer"
                    )
                earned[s, token, 0] = r
                following[s, token, 0] = end if last else g * len(prefixes) + number[answer[: t + 1]]
    earned[end] = 0.0
    start = torch.zeros(end + 1, dtype=torch.float64)
    start[torch.arange(prompts) * len(prefixes) + number[()]] = 1 / prompts
    names = [f"{g}: {' '.join(map(str, prefix))}".rstrip() for g in range(prompts) for prefix in prefixes]
    ends = torch.arange(end + 1) == end
    return MDP(torch.ones(*shape, 1, dtype=torch.float64), following, earned, start, ends, 1.0, states=(*names, "end"))


def state_policy(policy: Tensor) -> Tensor:
    """pi(a | s) [G X + 1, V] of logits [G, X, V] of a tree; the end takes any token."""
    last = torch.full((1, policy.shape[-1]), 1 / policy.shape[-1], dtype=torch.float64)
    return torch.cat([policy.to(torch.float64).softmax(-1).flatten(0, 1), last])


def soft_value_iteration(
    mdp: MDP, beta: float, *, reference: Tensor | None = None, theta: float = 1e-13, sweeps: int = 100_000
) -> SoftPlan:
    """V(s) <- beta log sum_a reference(a | s) exp(Q(s, a) / beta), Q = sum p (r + gamma V): the most that E[sum gamma^t (r_t - beta log pi / reference)] can be.

    It is attained by pi(a | s) = reference(a | s) exp((Q - V) / beta); with gamma = 1 and a tree of answers, pi(y) is reference(y) exp(r(y) / beta) / Z.
    Without a reference it is the uniform policy, so the second term is the entropy, less that of the uniform policy.
    """
    if not beta > 0:
        raise UsageError(f"soft_value_iteration: beta={beta} must be above 0; value_iteration is the limit beta → 0")
    prior = probabilities(mdp, uniform(mdp) if reference is None else reference).log()
    values = torch.zeros(*mdp.lead, mdp.state_count, dtype=torch.float64)
    for sweep in range(1, sweeps + 1):
        scores = prior + action_values(mdp, values) / beta
        new = torch.where(mdp.terminal, 0.0, beta * scores.logsumexp(-1))
        change = float((new - values).abs().max())
        values = new
        if change < theta:
            return SoftPlan(values, (prior + action_values(mdp, values) / beta).softmax(-1), sweep)
    raise UsageError(
        f"soft_value_iteration: values still change by {change:.3g} after {sweeps} sweeps, more than theta={theta}: raise theta or `sweeps`"
    )
