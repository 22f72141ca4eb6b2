"""Metrics as (sum, weight) pairs, added over micro-batches and read once a step."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


class Meter:
    """Adds (sum, weight) pairs without leaving the device; `read` divides: (1, 2) and (5, 1) → 6 / 3 = 2."""

    def __init__(self) -> None:
        self._pairs: dict[str, tuple[Tensor, Tensor]] = {}

    def copy(self) -> Meter:
        """One that goes on from here by itself."""
        made = Meter()
        made._pairs = dict(self._pairs)
        return made

    def add(self, pairs: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        """Add pairs to those of the same name."""
        for name, (value, weight) in pairs.items():
            value, weight = value.detach(), weight.detach()
            known = self._pairs.get(name)
            self._pairs[name] = (value, weight) if known is None else (known[0] + value, known[1] + weight)

    def read(self) -> dict[str, float]:
        """Every metric as a number; one without weight was not measured and is left out."""
        if not self._pairs:
            return {}
        table = torch.tensor([[float(value), float(weight)] for value, weight in self._pairs.values()], dtype=torch.float64)
        return {name: float(value / weight) for name, (value, weight) in zip(self._pairs, table, strict=True) if float(weight) > 0}
