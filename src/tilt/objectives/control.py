"""What is added to the gain for entropy, and what moves a coefficient from step to step: the row itself is the state."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, TypeVar

import torch

from tilt.errors import UsageError
from tilt.objectives.credit import check_not_negative, check_positive
from tilt.objectives.experience import Outputs
from tilt.objectives.penalty import OldKL
from tilt.shapes import PerAction

if TYPE_CHECKING:
    from tilt.objectives.objective import Objective


class Bonus(Protocol):
    """What is added to the gain of each action [A]."""

    @property
    def coefficient(self) -> float: ...

    def __call__(self, outputs: Outputs) -> PerAction: ...


@dataclass(frozen=True)
class NoBonus(Bonus):
    """Nothing is added."""

    @property
    def coefficient(self) -> float:
        return 0.0

    def __call__(self, outputs: Outputs) -> PerAction:
        return torch.zeros_like(outputs.logprobs)


@dataclass(frozen=True)
class EntropyBonus(Bonus):
    """coefficient H_t, the exact entropy of the policy in the state: keeps exploring (1602.01783)."""

    coefficient: float = 0.01

    def __post_init__(self) -> None:
        check_not_negative(self, coefficient=self.coefficient)

    def __call__(self, outputs: Outputs) -> PerAction:
        return self.coefficient * outputs.entropy


class Control(Protocol):
    """The row of the next step, from this row and what this step measured. `reads` names the metrics; `moves` the coefficient it changes."""

    reads: ClassVar[tuple[str, ...]] = ()
    moves: ClassVar[str] = ""

    def __call__(self, objective: Objective, measured: Mapping[str, float]) -> Objective:
        return objective


@dataclass(frozen=True)
class NoControl(Control):
    """Every step has the same row."""


@dataclass(frozen=True)
class Doubling(Control):
    """The penalty's beta doubles where the step's KL(old || policy) exceeds 1.5 target and halves where it is under target / 1.5 (1707.06347, section 4)."""

    target: float = 0.01
    reads: ClassVar[tuple[str, ...]] = ("policy/kl_old",)
    moves: ClassVar[str] = "beta"

    def __post_init__(self) -> None:
        check_positive(self, target=self.target)

    def __call__(self, objective: Objective, measured: Mapping[str, float]) -> Objective:
        kl = measured[self.reads[0]]
        factor = 2.0 if kl > 1.5 * self.target else 0.5 if kl < self.target / 1.5 else 1.0
        return replace(objective, penalty=_with(objective.penalty, beta=_bounded(coefficient(objective) * factor)))


@dataclass(frozen=True)
class Proportional(Control):
    """beta *= 1 + clip(KL / target - 1, -limit, limit) n / horizon after n answers, KL of a sequence to the reference (1909.08593)."""

    target: float = 6.0
    horizon: float = 10000.0
    limit: float = 0.2
    reads: ClassVar[tuple[str, ...]] = ("objective/kl", "sequences")
    moves: ClassVar[str] = "kl"

    def __post_init__(self) -> None:
        check_positive(self, target=self.target, horizon=self.horizon, limit=self.limit)

    def __call__(self, objective: Objective, measured: Mapping[str, float]) -> Objective:
        kl, answers = (measured[name] for name in self.reads)
        off = max(-self.limit, min(self.limit, kl / self.target - 1))
        return with_kl(objective, _bounded(coefficient(objective) * (1 + off * answers / self.horizon)))


def _bounded(coefficient: float) -> float:
    """Within 1e-10 and 1e10: neither 0, from which no factor leads back, nor infinite."""
    return min(1e10, max(1e-10, coefficient))


@dataclass(frozen=True)
class EntropyTarget(Control):
    """The entropy coefficient rises by `step` where the policy's entropy is under `target`, else falls by it, within [0, most] (Skywork-OR1, 2505.22312)."""

    target: float = 0.2
    step: float = 0.005
    most: float = 1.0
    reads: ClassVar[tuple[str, ...]] = ("policy/entropy_avg",)
    moves: ClassVar[str] = "entropy"

    def __post_init__(self) -> None:
        check_positive(self, target=self.target, step=self.step, most=self.most)

    def __call__(self, objective: Objective, measured: Mapping[str, float]) -> Objective:
        assert isinstance(objective.bonus, EntropyBonus)
        moved = objective.bonus.coefficient + (self.step if measured[self.reads[0]] < self.target else -self.step)
        return replace(objective, bonus=replace(objective.bonus, coefficient=min(self.most, max(0.0, moved))))


def coefficient(objective: Objective) -> float:
    """What the row's controller moves: the KL divergence's coefficient, the penalty's beta or the entropy's coefficient."""
    held = {"kl": kl_coefficient(objective), "beta": float(getattr(objective.penalty, "beta", 0.0)), "entropy": objective.bonus.coefficient}
    return held[objective.control.moves]


def kl_coefficient(objective: Objective) -> float:
    """What the row multiplies the divergence from the reference with: `kl` of its credit, else `beta` of its penalty; 0 where it has neither."""
    beta = getattr(objective.penalty, "beta", 0.0) if getattr(objective.penalty, "against", "none") != "old" else 0.0
    return float(getattr(objective.credit, "kl", 0.0) or beta)


def with_kl(objective: Objective, coefficient: float) -> Objective:
    """The row with another coefficient of the divergence from the reference."""
    if getattr(objective.credit, "kl", 0.0):
        return replace(objective, credit=_with(objective.credit, kl=coefficient))
    return replace(objective, penalty=_with(objective.penalty, beta=coefficient))


Piece = TypeVar("Piece")


def _with(piece: Piece, **changes: float) -> Piece:
    made: Any = piece
    found: Piece = replace(made, **changes)
    return found


def check_control(objective: Objective) -> None:
    """Refuse a controller whose coefficient the row does not have."""
    moves = getattr(objective.control, "moves", "")
    name = type(objective.control).__name__
    if moves == "kl" and not kl_coefficient(objective) > 0:
        raise UsageError(f"{name} moves the coefficient of a KL divergence, and this row has none above 0: set credit.kl or a penalty")
    if moves == "entropy" and not isinstance(objective.bonus, EntropyBonus):
        raise UsageError(f"{name} moves the coefficient of the entropy, and this row has no entropy bonus: set bonus to entropy")
    if moves == "beta" and not (isinstance(objective.penalty, OldKL) and objective.penalty.beta > 0):
        raise UsageError(f"{name} measures KL(old || policy) and moves its beta: set penalty to old_kl, with a beta above 0")
