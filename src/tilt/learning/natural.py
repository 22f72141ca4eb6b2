"""The learner's step inside a trust region (TRPO, 1502.05477): Fisher products and line search over a whole batch, micro-batch by micro-batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tilt.data.packing import Pack
from tilt.learning.anchoring import Remembered, remember
from tilt.learning.shares import placed, share_of
from tilt.models.attention import twice_differentiable
from tilt.models.policy import Policy
from tilt.objectives import Experience, NoValue, Objective, Outputs, TrustRegion
from tilt.optim.trust_region import Product, Taken, Vector, axpy, hessian_product, trust_region_step

LOGITS = 2**27
"""Tokens times vocabulary of one part of a Fisher product, whose graph keeps the logits (512 MiB in float32)."""


@dataclass(frozen=True)
class Ground:
    """A batch as the step sees it: the sequences that count, in micro-batches, and the old policy's distributions and log-probabilities, fixed before the step."""

    policy: Policy
    objective: Objective
    batch: Pack
    experience: Experience
    parts: Sequence[Tensor]
    old: Remembered
    temperature: float
    device: torch.device

    @torch.no_grad()
    def measure(self) -> tuple[float, float]:
        """The surrogate with its corrections and bonus, and mean KL(old || policy) over the actions that count, at the weights as they are."""
        gain, distance = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
        for part in self.parts:
            said, share = self._say(part, entropy=bool(self.objective.bonus.coefficient))
            gain -= self.objective.loss(said, share).cpu()
            distance += self._distance(said, share, self.experience.weights).cpu()
        return float(gain), float(distance)

    def fisher(self, parameters: Vector, share: float, tokens: int) -> Product:
        """The Hessian of mean KL(old || policy) over a share of the sequences, evenly spaced, as a product; parts of at most `tokens` tokens add up.

        The graph of a single part is kept, those of several are rebuilt for every product. Share 0.4 of 10 sequences → 0 2 5 7.
        """
        every = torch.cat(list(self.parts)).sort().values
        chosen = every[(torch.arange(max(1, round(len(every) * share))) / share).long()]
        weights = share_of(self.experience, chosen).weights
        parts = self.batch.split(tokens, chosen)
        if len(parts) == 1:
            return self._curvature(parts[0], weights, parameters)

        def product(v: Vector) -> Vector:
            total: Vector = [torch.zeros_like(p) for p in parameters]
            for part in parts:
                total = axpy(1.0, self._curvature(part, weights, parameters)(v), total)
            return total

        return product

    def _curvature(self, part: Tensor, weights: Tensor, parameters: Vector) -> Product:
        with twice_differentiable():
            return hessian_product(lambda: self._distance(*self._say(part, entropy=False), weights), parameters)

    def _say(self, part: Tensor, *, entropy: bool) -> tuple[Outputs, Experience]:
        anchor = self.old.of(self.batch.layout.actions_of(part), self.device)
        small = share_of(self.batch, part).to(self.device)
        return self.policy(small, temperature=self.temperature, entropy=entropy, against=anchor), placed(
            share_of(self.experience, part), self.device
        )

    def _distance(self, said: Outputs, share: Experience, weights: Tensor) -> Tensor:
        """This part of the mean KL over the actions with these weights: each that counts weighs the same."""
        return torch.where(share.weights != 0, said.kl, 0).sum() / (weights != 0).sum()


def natural_step(
    policy: Policy,
    parameters: Vector,
    objective: Objective,
    batch: Pack,
    experience: Experience,
    sequences: Tensor,
    *,
    temperature: float,
    micro_tokens: int,
    device: torch.device,
) -> Taken:
    """Move the parameters, which hold the gradient of the batch's loss, to where the surrogate is higher and mean KL(old || policy) <= limit, or not at all.

    Everything is computed in the precision of the weights. The graph of a Fisher product is several times that of a gradient, so its parts are smaller.
    """
    rule, parts = objective.penalty, batch.split(micro_tokens, sequences)
    assert isinstance(rule, TrustRegion)
    old = remember(policy, batch, parts, "from", device)
    ground = Ground(policy, replace(objective, value=NoValue()), batch, experience, parts, old, temperature, device)
    with torch.no_grad():
        vocabulary = old.head(old.hidden[:1].to(device)).shape[-1]
    return trust_region_step(
        parameters,
        [torch.zeros_like(p) if p.grad is None else -p.grad for p in parameters],
        ground.fisher(parameters, rule.share, max(1, min(micro_tokens // 4, LOGITS // vocabulary))),
        ground.measure,
        limit=rule.limit,
        iterations=rule.iterations,
        damping=rule.damping,
        backtracks=rule.backtracks,
        decay=rule.decay,
    )
