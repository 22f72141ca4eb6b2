"""The value term: how the critic is fitted to the returns, or that there is none."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from typing import ClassVar, Protocol

import torch

from tilt.errors import UsageError
from tilt.objectives.credit import NOTHING, check_not_negative
from tilt.shapes import ActionMask, PerAction


class Value(Protocol):
    """The critic's loss per action [A], before `coefficient`."""

    needs: ClassVar[frozenset[str]] = frozenset({"values"})

    @property
    def coefficient(self) -> float: ...

    def __call__(self, values: PerAction, old: PerAction, returns: PerAction) -> PerAction: ...

    def clipped(self, values: PerAction, old: PerAction, returns: PerAction) -> ActionMask:
        """Actions on which clipping decides the loss."""
        return torch.zeros_like(values, dtype=torch.bool)


@dataclass(frozen=True)
class NoValue(Value):
    """There is no critic."""

    needs: ClassVar[frozenset[str]] = NOTHING

    @property
    def coefficient(self) -> float:
        return 0.0

    def __call__(self, values: PerAction, old: PerAction, returns: PerAction) -> PerAction:
        return torch.zeros_like(returns)


@dataclass(frozen=True)
class ValueLoss(Value):
    """.5 max((V - R)^2, (clip(V, V_old - clip, V_old + clip) - R)^2), times `coefficient` in the loss; clip inf is the plain square."""

    coefficient: float = 0.1
    clip: float = inf

    def __post_init__(self) -> None:
        check_not_negative(self, clip=self.clip)
        if not self.coefficient > 0:
            raise UsageError(f"ValueLoss: coefficient={self.coefficient} must be above 0; `none` is the value term without a critic")

    def __call__(self, values: PerAction, old: PerAction, returns: PerAction) -> PerAction:
        if self.clip == inf:
            return 0.5 * (values - returns).square()
        return 0.5 * torch.maximum((values - returns).square(), (self._near(values, old) - returns).square())

    def clipped(self, values: PerAction, old: PerAction, returns: PerAction) -> ActionMask:
        return (self._near(values, old) - returns).square() > (values - returns).square()

    def _near(self, values: PerAction, old: PerAction) -> PerAction:
        return values.clamp(old - self.clip, old + self.clip)
