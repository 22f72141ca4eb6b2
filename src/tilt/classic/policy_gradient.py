"""The policy gradient without noise: a softmax per state, grad J, the Fisher matrix, and three ways up: the gradient, the natural gradient, the trust region."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from tilt.classic.mdp import MDP
from tilt.classic.planning import advantages, gain, occupancy
from tilt.errors import UsageError
from tilt.optim.trust_region import hessian_product, trust_region_step


@dataclass(frozen=True)
class Climb:
    """The last logits [..., S, A], and J before the first step and after each, [steps + 1, ...]."""

    logits: Tensor
    gains: Tensor


def exact_gradient(mdp: MDP, logits: Tensor) -> Tensor:
    """grad J = rho(s) pi(a | s) A(s, a) for logits of a softmax in every state, [..., S, A] (Sutton et al. 2000); with gamma < 1 rho holds gamma^t."""
    policy = logits.softmax(-1)
    return occupancy(mdp, policy).unsqueeze(-1) * policy * advantages(mdp, policy)


def natural_gradient(mdp: MDP, logits: Tensor) -> Tensor:
    """F^+ grad J for the `fisher` matrix below, [..., S, A]: the advantages, less their even mean, where the policy goes at all (Kakade 2001)."""
    found = advantages(mdp, logits.softmax(-1))
    seen = occupancy(mdp, logits.softmax(-1)) > 0
    return torch.where(seen.unsqueeze(-1), found - found.mean(-1, keepdim=True), 0.0)


def fisher(mdp: MDP, logits: Tensor) -> Tensor:
    """F = sum_s rho(s) sum_a pi grad log pi grad log pi^T, the blocks rho(s) (diag pi - pi pi^T), [S A, S A]: the Hessian of sum_s rho_old(s) KL(old || new) at new = old."""
    policy = logits.softmax(-1)
    blocks = torch.diag_embed(policy) - policy.unsqueeze(-1) * policy.unsqueeze(-2)
    return torch.block_diag(*(occupancy(mdp, policy)[:, None, None] * blocks))


def gradient_ascent(mdp: MDP, logits: Tensor, *, rate: float, steps: int) -> Climb:
    """theta <- theta + rate grad J; J rises at every step where the rate is small."""
    return _climb(mdp, logits, steps, lambda at: at + rate * exact_gradient(mdp, at))


def natural_ascent(mdp: MDP, logits: Tensor, *, rate: float, steps: int) -> Climb:
    """theta <- theta + rate F^+ grad J, that is pi(a | s) <- pi(a | s) exp(rate A(s, a)) / Z: J rises at every step, at any rate (Agarwal et al. 2021, lemma 5.2)."""
    return _climb(mdp, logits, steps, lambda at: at + rate * natural_gradient(mdp, at))


def trust_region_ascent(mdp: MDP, logits: Tensor, *, limit: float = 0.01, damping: float = 1e-6, iterations: int = 50, steps: int) -> Climb:
    """TRPO's step with exact numbers: the surrogate L and the mean of KL(old || policy) over the states that the old policy visits, rho normalised.

    It is `tilt.optim.trust_region`, which steps language models; a step that finds nothing better inside the limit leaves the logits as they are.
    """

    def step(at: Tensor) -> Tensor:
        old, theta = at.softmax(-1), at.clone().requires_grad_()
        visits, better = occupancy(mdp, old), advantages(mdp, old)
        share = visits / visits.sum(-1, keepdim=True)

        def apart() -> Tensor:
            return (share * (old * (at.log_softmax(-1) - theta.log_softmax(-1))).sum(-1)).sum()

        def measure() -> tuple[float, float]:
            return float((visits.unsqueeze(-1) * theta.softmax(-1) * better).sum()), float(apart())

        trust_region_step(
            [theta], [exact_gradient(mdp, at)], hessian_product(apart, [theta]), measure,
            limit=limit, iterations=iterations, damping=damping, backtracks=20, decay=0.8,
        )  # fmt: skip
        return theta.detach()

    return _climb(mdp, logits, steps, step)


def _climb(mdp: MDP, logits: Tensor, steps: int, step: Callable[[Tensor], Tensor]) -> Climb:
    if steps < 1:
        raise UsageError(f"steps={steps} must be at least 1")
    at = logits.detach().to(torch.float64)
    gains = [gain(mdp, at.softmax(-1))]
    for _ in range(steps):
        at = step(at)
        gains.append(gain(mdp, at.softmax(-1)))
    return Climb(at, torch.stack(gains))
