"""The policy term: ratio, surrogate and average, each on the action axis (algorithms.md, sections 1-2)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from tilt.errors import UsageError
from tilt.objectives.credit import NOTHING, check_not_negative, check_positive
from tilt.segments import Layout, segment_mean, segment_sum, spread
from tilt.shapes import ActionMask, PerAction, SequenceMask

OLD: frozenset[str] = frozenset({"old"})
Sides = tuple[ActionMask, ActionMask]


def nowhere(x: PerAction) -> Sides:
    """No action on either side."""
    none = torch.zeros_like(x, dtype=torch.bool)
    return none, none


# ------------------------------------------------------------------------------------------------ ratios


class Ratio(Protocol):
    """policy / old per action [A]; `per_sequence` when all actions of a sequence share one number, `bounded` when it cannot run away."""

    needs: ClassVar[frozenset[str]] = OLD
    per_sequence: ClassVar[bool] = False
    bounded: ClassVar[bool] = False

    def __call__(self, logprobs: PerAction, old: PerAction, layout: Layout, advantages: PerAction) -> PerAction: ...

    def clipped(self, logprobs: PerAction, old: PerAction, advantages: PerAction) -> Sides:
        """Actions that the ratio itself holds still, because theirs is too low, and because it is too high."""
        return nowhere(logprobs)


@dataclass(frozen=True)
class NoRatio(Ratio):
    """No ratio: ones, and the old policy is not read."""

    needs: ClassVar[frozenset[str]] = NOTHING

    def __call__(self, logprobs: PerAction, old: PerAction, layout: Layout, advantages: PerAction) -> PerAction:
        return torch.ones_like(logprobs)


@dataclass(frozen=True)
class TokenRatio(Ratio):
    """exp(D_t), D = l - l_old."""

    def __call__(self, logprobs: PerAction, old: PerAction, layout: Layout, advantages: PerAction) -> PerAction:
        return (logprobs - old).exp()


@dataclass(frozen=True)
class ProductRatio(Ratio):
    """exp(sum_t D_t): the importance weight of the whole sequence."""

    per_sequence: ClassVar[bool] = True

    def __call__(self, logprobs: PerAction, old: PerAction, layout: Layout, advantages: PerAction) -> PerAction:
        return spread(segment_sum(logprobs - old, layout).exp(), layout)


@dataclass(frozen=True)
class GeometricRatio(Ratio):
    """exp(mean_t D_t): the geometric mean of the token ratios (GSPO, 2507.18071)."""

    per_sequence: ClassVar[bool] = True

    def __call__(self, logprobs: PerAction, old: PerAction, layout: Layout, advantages: PerAction) -> PerAction:
        return spread(segment_mean(logprobs - old, layout).exp(), layout)


@dataclass(frozen=True)
class GeometricTokenRatio(Ratio):
    """sg[exp(mean D)] exp(l_t - sg[l_t]): the value of the geometric ratio, each action's own gradient (GSPO-token)."""

    per_sequence: ClassVar[bool] = True

    def __call__(self, logprobs: PerAction, old: PerAction, layout: Layout, advantages: PerAction) -> PerAction:
        return spread(segment_mean(logprobs - old, layout).exp(), layout).detach() * (logprobs - logprobs.detach()).exp()


@dataclass(frozen=True)
class ClippedGeometricRatio(Ratio):
    """exp(mean_t m_t), m_t = min(D_t, clip(D_t, -width, width)) where Adv > 0, else max(D_t, clip(D_t, -width, width)) (GMPO, 2507.20673)."""

    width: float = 0.4
    per_sequence: ClassVar[bool] = True
    bounded: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_positive(self, width=self.width)

    def __call__(self, logprobs: PerAction, old: PerAction, layout: Layout, advantages: PerAction) -> PerAction:
        change = logprobs - old
        near = change.clamp(-self.width, self.width)
        kept = torch.where(advantages > 0, torch.minimum(change, near), torch.maximum(change, near))
        return spread(segment_mean(kept, layout).exp(), layout)

    def clipped(self, logprobs: PerAction, old: PerAction, advantages: PerAction) -> Sides:
        change = logprobs - old
        return (change < -self.width) & (advantages < 0), (change > self.width) & (advantages > 0)


# -------------------------------------------------------------------------------------------- surrogates


class Surrogate(Protocol):
    """The gain per action [A], to be raised. `passes`: how often one sampled action may be trained on (None: any number)."""

    passes: ClassVar[int | None] = None

    def __call__(self, ratio: PerAction, logprobs: PerAction, advantages: PerAction) -> PerAction: ...

    def clipped(self, ratio: PerAction, advantages: PerAction) -> Sides:
        """Actions whose gradient is cut because the ratio is too low, and because it is too high."""
        return nowhere(ratio)


@dataclass(frozen=True)
class Score(Surrogate):
    """l Adv: the likelihood-ratio gradient, right for one pass over fresh samples."""

    passes: ClassVar[int | None] = 1

    def __call__(self, ratio: PerAction, logprobs: PerAction, advantages: PerAction) -> PerAction:
        return logprobs * advantages


@dataclass(frozen=True)
class Importance(Surrogate):
    """rho Adv, unbounded: one pass, unless something else holds the policy near the old one."""

    passes: ClassVar[int | None] = 1

    def __call__(self, ratio: PerAction, logprobs: PerAction, advantages: PerAction) -> PerAction:
        return ratio * advantages


@dataclass(frozen=True)
class Clip(Surrogate):
    """min(rho Adv, clip(rho, 1 - low, 1 + high) Adv) (PPO, 1707.06347; asymmetric: DAPO, 2503.14476)."""

    low: float = 0.2
    high: float = 0.2

    def __post_init__(self) -> None:
        check_not_negative(self, low=self.low, high=self.high)

    def __call__(self, ratio: PerAction, logprobs: PerAction, advantages: PerAction) -> PerAction:
        return torch.minimum(ratio * advantages, ratio.clamp(1 - self.low, 1 + self.high) * advantages)

    def clipped(self, ratio: PerAction, advantages: PerAction) -> Sides:
        return (ratio < 1 - self.low) & (advantages < 0), (ratio > 1 + self.high) & (advantages > 0)


@dataclass(frozen=True)
class TwoSided(Surrogate):
    """min(min(rho, delta) Adv, clip(rho, 1 - low, 1 + high) Adv): Clip that also bounds rho where Adv < 0 (dual clip, 1912.09729)."""

    low: float = 0.2
    high: float = 0.2
    delta: float = 3.0

    def __post_init__(self) -> None:
        check_not_negative(self, low=self.low, high=self.high)
        if not self.delta > 1 + self.high:
            raise UsageError(f"TwoSided: delta={self.delta} must exceed 1 + high = {1 + self.high}")

    def __call__(self, ratio: PerAction, logprobs: PerAction, advantages: PerAction) -> PerAction:
        return torch.minimum(ratio.clamp(max=self.delta) * advantages, ratio.clamp(1 - self.low, 1 + self.high) * advantages)

    def clipped(self, ratio: PerAction, advantages: PerAction) -> Sides:
        high = ((ratio > 1 + self.high) & (advantages > 0)) | ((ratio > self.delta) & (advantages < 0))
        return (ratio < 1 - self.low) & (advantages < 0), high


@dataclass(frozen=True)
class CappedScore(Surrogate):
    """sg[min(rho, cap)] Adv l: every action keeps a gradient, its weight is bounded (CISPO, 2506.13585). `cap` is absolute."""

    cap: float = 1.28
    passes: ClassVar[int | None] = 1

    def __post_init__(self) -> None:
        if not self.cap >= 1:
            raise UsageError(f"CappedScore: cap={self.cap} must be at least 1; it is the largest ratio itself, not its distance from 1")

    def __call__(self, ratio: PerAction, logprobs: PerAction, advantages: PerAction) -> PerAction:
        return ratio.clamp(max=self.cap).detach() * advantages * logprobs

    def clipped(self, ratio: PerAction, advantages: PerAction) -> Sides:
        """Here the weight is capped; the gradient stays."""
        return torch.zeros_like(ratio, dtype=torch.bool), ratio > self.cap


@dataclass(frozen=True)
class SoftGate(Surrogate):
    """(4 / tau) sigmoid(tau (rho - 1)) Adv, tau = `positive` where Adv > 0, else `negative` (SAPO, 2511.20347)."""

    positive: float = 1.0
    negative: float = 1.05

    def __post_init__(self) -> None:
        check_positive(self, positive=self.positive, negative=self.negative)

    def __call__(self, ratio: PerAction, logprobs: PerAction, advantages: PerAction) -> PerAction:
        tau = torch.where(advantages > 0, ratio.new_tensor(self.positive), ratio.new_tensor(self.negative))
        return 4 / tau * torch.sigmoid(tau * (ratio - 1)) * advantages


@dataclass(frozen=True)
class ProbabilityScore(Surrogate):
    """sg[exp(l)] l Adv: likelihood that trusts a surprising action less, by its own probability (DFT, 2508.05629)."""

    passes: ClassVar[int | None] = 1

    def __call__(self, ratio: PerAction, logprobs: PerAction, advantages: PerAction) -> PerAction:
        return logprobs.detach().exp() * logprobs * advantages


@dataclass(frozen=True)
class SmoothWeight(Surrogate):
    """sg[phi(w)] Adv l, phi(w) = w^k exp(lam (1 - w)) of the whole answer's ratio w: 1 at w = 1, 0 at both ends (VESPO).

    (k, lam) = (`power`, `decay`) where Adv >= 0, and exchanged where Adv < 0.
    """

    power: float = 2.0
    decay: float = 3.0

    def __post_init__(self) -> None:
        check_positive(self, power=self.power, decay=self.decay)

    def __call__(self, ratio: PerAction, logprobs: PerAction, advantages: PerAction) -> PerAction:
        good = advantages >= 0
        power = torch.where(good, ratio.new_tensor(self.power), ratio.new_tensor(self.decay))
        decay = torch.where(good, ratio.new_tensor(self.decay), ratio.new_tensor(self.power))
        return (decay + power * ratio.log() - decay * ratio).exp().detach() * advantages * logprobs


# ---------------------------------------------------------------------------------------------- averages


class Average(Protocol):
    """One weight per action [A], fixed on the whole batch; sequences that do not count weigh nothing and are in no denominator."""

    def __call__(self, layout: Layout, counted: SequenceMask) -> PerAction: ...

    def share(self, weights: PerAction, layout: Layout) -> Tensor:
        """The part of the whole batch that these actions are; the parts of a batch add up to 1."""
        return weights.sum()


@dataclass(frozen=True)
class TokenAverage(Average):
    """w = 1 / A: every action counts the same."""

    def __call__(self, layout: Layout, counted: SequenceMask) -> PerAction:
        seen = spread(counted, layout).to(torch.float64)
        return seen / seen.sum().clamp(min=1)


@dataclass(frozen=True)
class SequenceAverage(Average):
    """w = 1 / (S n_i): every sequence counts the same."""

    def __call__(self, layout: Layout, counted: SequenceMask) -> PerAction:
        each = counted.to(torch.float64) / counted.sum().clamp(min=1)
        return spread(each / layout.lengths, layout)


@dataclass(frozen=True)
class PerBudget(Average):
    """w = 1 / (S L): sum over actions, mean over sequences, divided by a constant length (Dr. GRPO, 2503.20783)."""

    length: int = 1

    def __post_init__(self) -> None:
        if self.length < 1:
            raise UsageError(f"PerBudget: length={self.length} must be at least 1")

    def __call__(self, layout: Layout, counted: SequenceMask) -> PerAction:
        return spread(counted.to(torch.float64) / (counted.sum().clamp(min=1) * self.length), layout)

    def share(self, weights: PerAction, layout: Layout) -> Tensor:
        return (weights * self.length / spread(layout.lengths, layout)).sum()
