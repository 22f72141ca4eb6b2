"""Steps that cannot go down: the performance difference, its surrogate, the conservative mixture (Kakade and Langford 2002), the trust region's bound and its exact
maximiser (Schulman et al. 2015). Every function takes many processes at once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from tilt.classic.bellman import greedy
from tilt.classic.mdp import MDP, probabilities
from tilt.classic.planning import TIE, advantages, gain, occupancy
from tilt.errors import UsageError


@dataclass(frozen=True)
class Step:
    """A new policy [..., S, A], the lower bound of its gain that was maximised, and its gain, [...]; `size` is the mixture's share, or max_s KL(old || policy)."""

    policy: Tensor
    bound: Tensor
    gain: Tensor
    size: Tensor


@dataclass(frozen=True)
class Ascent:
    """The last policy [..., S, A], and the gain, its bound and the step's size after each step, [steps, ...]; `start` is the gain before the first."""

    policy: Tensor
    start: Tensor
    gains: Tensor
    bounds: Tensor
    sizes: Tensor


def difference(mdp: MDP, old: Tensor, new: Tensor) -> Tensor:
    """J(new) - J(old) = sum_s rho_new(s) sum_a new(a | s) A_old(s, a), [...], the performance difference (Kakade and Langford 2002, lemma 6.1)."""
    return (occupancy(mdp, new) * _toward(mdp, old, new)).sum(-1)


def surrogate(mdp: MDP, old: Tensor, new: Tensor) -> Tensor:
    """L(new) = J(old) + sum_s rho_old(s) sum_a new(a | s) A_old(s, a), [...]: visits of the old policy, so right to first order at new = old."""
    return gain(mdp, old) + (occupancy(mdp, old) * _toward(mdp, old, new)).sum(-1)


def mixture_bound(mdp: MDP, old: Tensor, target: Tensor, share: Tensor | float) -> Tensor:
    """A lower bound of J of (1 - a) old + a target: L - 2 epsilon gamma / (1 - gamma)^2 a^2, epsilon = max_s |sum_a target A_old|, [...]."""
    gap = _discounted(mdp, "mixture_bound")
    a, toward = torch.as_tensor(share, dtype=torch.float64), _toward(mdp, old, target)
    gained = (occupancy(mdp, old) * toward).sum(-1)
    return gain(mdp, old) + a * gained - 2 * toward.abs().amax(-1) * mdp.discount / gap**2 * a**2


def trust_region_bound(mdp: MDP, old: Tensor, new: Tensor, distance: Literal["kl", "tv"] = "kl") -> Tensor:
    """A lower bound of J(new): L - C max_s D, C = 4 epsilon gamma / (1 - gamma)^2, epsilon = max |A_old|, D = KL(old || new) or the squared total variation
    (1502.05477, theorem 1), [...]."""
    before, after = probabilities(mdp, old), probabilities(mdp, new)
    apart = _kl(before, after) if distance == "kl" else (0.5 * (before - after).abs().sum(-1)).square()
    return surrogate(mdp, old, new) - penalty(mdp, old) * apart.amax(-1)


def penalty(mdp: MDP, policy: Tensor) -> Tensor:
    """C = 4 epsilon gamma / (1 - gamma)^2, epsilon = max_(s,a) |A(s, a)|, [...]."""
    gap = _discounted(mdp, "penalty")
    return 4 * advantages(mdp, policy).abs().amax((-2, -1)) * mdp.discount / gap**2


def mixture(mdp: MDP, old: Tensor, target: Tensor, share: Tensor | float) -> Tensor:
    """(1 - a) old + a target, [..., S, A]."""
    before, a = probabilities(mdp, old), torch.as_tensor(share, dtype=torch.float64)
    if not bool(((a >= 0) & (a <= 1)).all()):
        raise UsageError(f"mixture: share={share} must lie in [0, 1]")
    return before + a[..., None, None] * (probabilities(mdp, target) - before)


# ---------------------------------------------------------------------------------------------- conservative policy iteration


def conservative_step(mdp: MDP, policy: Tensor) -> Step:
    """Mix the greedy policy in at the share that maximises `mixture_bound`: a = (1 - gamma)^2 G / (4 epsilon gamma), at most 1, G = sum rho target A.

    The gain rises by at least a G / 2.
    """
    target = greedy(advantages(mdp, policy))
    toward, gap = _toward(mdp, policy, target), _discounted(mdp, "conservative_step")
    gained, epsilon = (occupancy(mdp, policy) * toward).sum(-1), toward.abs().amax(-1)
    steep = 4 * epsilon * mdp.discount
    share = torch.where(steep > 0, gap**2 * gained / steep.clamp(min=torch.finfo(torch.float64).tiny), 1.0).clamp(0, 1)
    share = torch.where(epsilon > TIE * advantages(mdp, policy).abs().amax((-2, -1)).clamp(min=1.0), share, 0.0)  # nothing is better
    new = mixture(mdp, policy, target, share)
    return Step(new, mixture_bound(mdp, policy, target, share), gain(mdp, new), share)


def conservative_policy_iteration(mdp: MDP, policy: Tensor, *, steps: int) -> Ascent:
    """Conservative steps one after the other: no gain is below the one before."""
    return _ascend(mdp, policy, steps, conservative_step)


# ---------------------------------------------------------------------------------------------- minorise and maximise


def minorise_maximise_step(mdp: MDP, policy: Tensor) -> Step:
    """The policy that maximises M(new) = L(new) - C max_s KL(old || new) exactly; J(new) >= M(new) >= M(old) = J(old).

    Every state may go as far as the farthest, d, where sum_a new A is largest at new(a) = l old(a) / (n - A(a)), n > max A; d is where sum_s rho l = C.
    """
    old, away = probabilities(mdp, policy), advantages(mdp, policy)
    rho, factor = occupancy(mdp, policy), penalty(mdp, policy)
    away = torch.where(old > 0, away, 0.0)
    top = away.amax(-1).clamp(min=torch.finfo(torch.float64).tiny)
    flat = away.amax(-1) <= 1e-13 * away.abs().amax((-2, -1)).unsqueeze(-1)  # nothing to choose between there

    def at(place: Tensor) -> tuple[Tensor, Tensor]:
        """KL and l for n = max A (1 + e^place), one place a state."""
        n = top * (1 + place.exp())
        odds = away / n.unsqueeze(-1)
        more = (old * odds / (1 - odds)).sum(-1)  # sum old / (1 - A / n) - 1
        return (old * torch.log1p(-odds)).sum(-1) + torch.log1p(more), n / (1 + more)

    def spots(distance: Tensor, halvings: int = 40) -> Tensor:
        """The places where each state is this far away, by bisection: KL falls with the place."""
        low, high = torch.full_like(top, -36.0), torch.full_like(top, 36.0)
        for _ in range(halvings):
            middle = (low + high) / 2
            far = at(middle)[0] > distance.unsqueeze(-1)
            low, high = torch.where(far, middle, low), torch.where(far, high, middle)
        return (low + high) / 2

    low, high = (
        torch.full_like(factor, -80.0),
        torch.full_like(factor, 3.0),
    )  # logarithms of d, where M is flat; the multiplier l falls with d
    for _ in range(30):
        middle = (low + high) / 2
        steep = torch.where(flat, 0.0, rho * at(spots(middle.exp()))[1]).sum(-1) > factor
        low, high = torch.where(steep, middle, low), torch.where(steep, high, middle)
    place = spots(((low + high) / 2).exp(), 52)
    weights = old / (1 - away / (top * (1 + place.exp())).unsqueeze(-1))
    new = torch.where(flat.unsqueeze(-1), old, weights / weights.sum(-1, keepdim=True))
    return Step(new, trust_region_bound(mdp, policy, new), gain(mdp, new), _kl(old, new).amax(-1))


def minorise_maximise(mdp: MDP, policy: Tensor, *, steps: int) -> Ascent:
    """Exact penalised steps one after the other: no gain is below the one before, and each is above its bound."""
    return _ascend(mdp, policy, steps, minorise_maximise_step)


def _ascend(mdp: MDP, policy: Tensor, steps: int, step: Callable[[MDP, Tensor], Step]) -> Ascent:
    if steps < 1:
        raise UsageError(f"steps={steps} must be at least 1")
    start, taken = gain(mdp, policy), []
    for _ in range(steps):
        taken.append(step(mdp, policy))
        policy = taken[-1].policy
    return Ascent(policy, start, *(torch.stack([getattr(one, name) for one in taken]) for name in ("gain", "bound", "size")))


def _toward(mdp: MDP, old: Tensor, new: Tensor) -> Tensor:
    """sum_a new(a | s) A_old(s, a), [..., S]."""
    return (probabilities(mdp, new) * advantages(mdp, old)).sum(-1)


def _kl(p: Tensor, q: Tensor) -> Tensor:
    """KL(p || q) in every state, [..., S]; infinite where q forbids what p does."""
    return torch.where(p > 0, p * (p / q).log(), 0.0).sum(-1)


def _discounted(mdp: MDP, what: str) -> float:
    if mdp.discount >= 1:
        raise UsageError(f"{what}: the bound divides by 1 - gamma, so it needs a discount below 1")
    return 1 - mdp.discount
