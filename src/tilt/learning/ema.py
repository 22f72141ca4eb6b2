"""The moving average of the trained weights: smoother than the last policy, and as good a model to keep."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


class Ema:
    """ema ← decay · ema + (1 − decay) · theta over a module's trained weights, from theta as it starts (DeepSpeed-Chat's .992, 2308.01320)."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self.followed = [p for p in module.parameters() if p.requires_grad]
        self.weights = [p.detach().clone() for p in self.followed]

    def named(self) -> dict[str, torch.Tensor]:
        """The averages by number."""
        return {str(i): average for i, average in enumerate(self.weights)}

    @torch.no_grad()
    def follow(self) -> None:
        """Once after every optimizer step."""
        for average, weight in zip(self.weights, self.followed, strict=True):
            average.mul_(self.decay).add_(weight, alpha=1 - self.decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Inside, the module has the average's weights; after, its own again, to the bit."""
        own = [p.detach().clone() for p in self.followed]
        self._put(self.weights)
        try:
            yield
        finally:
            self._put(own)

    @torch.no_grad()
    def _put(self, weights: list[torch.Tensor]) -> None:
        for p, weight in zip(self.followed, weights, strict=True):
            p.copy_(weight)
