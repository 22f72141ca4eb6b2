"""Metrics as (sum, weight) pairs, added over micro-batches and read once a step."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


class Meter:
    """Adds (sum, weight) pairs without leaving the device; `read` divides."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._weights: dict[str, Tensor] = {}
        self._totals: set[str] = set()

    def add(self, pairs: Mapping[str, tuple[Tensor, Tensor]], *, total: bool = False) -> None:
        """Add pairs; a `total` is read as sum times weight instead of sum over weight."""
        for name, (value, weight) in pairs.items():
            self._sums[name] = self._sums.get(name, torch.zeros(())) + value.detach().float().cpu() * (weight if total else 1)
            self._weights[name] = self._weights.get(name, torch.zeros(())) + weight.detach().float().cpu()
            if total:
                self._totals.add(name)

    def read(self) -> dict[str, float]:
        """Every metric as a number; one without weight is left out."""
        return {
            k: float(v if k in self._totals else v / self._weights[k])
            for k, v in self._sums.items()
            if k in self._totals or float(self._weights[k]) > 0
        }
