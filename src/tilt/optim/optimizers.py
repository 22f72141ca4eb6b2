"""AdamW with decay groups, learning-rate schedules, and gradient clipping by global norm."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

Schedule = Literal["constant", "linear", "cosine"]


@dataclass(frozen=True)
class AdamW:
    """Adam with decoupled weight decay (arXiv 1711.05101) on matrices only, a warm-up and a schedule that ends at `final` times `lr`."""

    lr: float
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.0
    warmup: int = 0
    schedule: Schedule = "constant"
    final: float = 0.0
    clip_norm: float = 1.0

    def factor(self, step: int, total: int) -> float:
        """Share of `lr` used at optimizer step `step` (from 0) of `total`: linear warm-up, then the schedule."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        done = min(1.0, (step - self.warmup) / max(1, total - self.warmup))
        shape = {"constant": 1.0, "linear": 1.0 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done))}[self.schedule]
        return self.final + (1 - self.final) * shape if self.schedule != "constant" else 1.0


class Optimizer:
    """One module's AdamW: clips, steps, and clears; counts its steps so that the schedule needs no other state."""

    def __init__(self, module: nn.Module, settings: AdamW, total: int) -> None:
        trained = [p for p in module.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in trained if p.ndim >= 2], "weight_decay": settings.weight_decay},
            {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
        ]
        self.settings, self.total, self.steps = settings, total, 0
        self.parameters = trained
        self.inner = torch.optim.AdamW(
            [g for g in groups if g["params"]], lr=settings.lr, betas=settings.betas, eps=settings.eps, fused=True
        )

    @property
    def lr(self) -> float:
        """The learning rate of the next step."""
        return self.settings.lr * self.settings.factor(self.steps, self.total)

    def step(self) -> Tensor:
        """Clip to the global norm, step, clear the gradients; returns the norm before clipping. A norm that is not finite leaves the weights as they are."""
        norm = clip(self.parameters, self.settings.clip_norm)
        if torch.isfinite(norm):
            for group in self.inner.param_groups:
                group["lr"] = self.lr
            self.inner.step()
            self.steps += 1
        self.inner.zero_grad(set_to_none=True)
        return norm

    def clear(self) -> None:
        self.inner.zero_grad(set_to_none=True)


def clip(parameters: Iterable[nn.Parameter], limit: float) -> Tensor:
    """Scale gradients so that their global norm is at most `limit` (0 leaves them alone); returns the norm before."""
    parameters = list(parameters)
    norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    if limit > 0:
        nn.utils.clip_grads_with_norm_(parameters, limit, norm)
    return norm
