"""Factors on the weights of the policy term: for samples of another policy, and for the actions worth training on (algorithms.md, section 3)."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from typing import ClassVar, Literal, Protocol

import torch

from tilt.errors import UsageError
from tilt.objectives.credit import check_fraction, check_not_negative, check_positive
from tilt.objectives.experience import Experience, Outputs, Signals
from tilt.segments import Layout, segment_mean, segment_sum, spread
from tilt.shapes import ActionMask, PerAction

MISMATCH: frozenset[str] = frozenset({"old", "sampler"})


class Correction(Protocol):
    """One factor per action [A] on the weight of the policy term, without gradient; denominators keep what they counted.

    `fixed` is computed once on the whole batch, where `seen` actions count; the call is made with every part, under the policy as it then is.
    """

    needs: ClassVar[frozenset[str]] = MISMATCH

    def fixed(self, signals: Signals, layout: Layout, seen: ActionMask) -> PerAction:
        return torch.ones_like(signals.sampler)

    def __call__(self, outputs: Outputs, experience: Experience) -> PerAction:
        return torch.ones_like(experience.weights)


def mismatch(signals: Signals, layout: Layout, level: Literal["token", "sequence"]) -> PerAction:
    """old / sampler of each action, or of its whole sequence: exp(sum_t (l_old - l_smp)_t)."""
    gap = signals.old - signals.sampler
    return spread(segment_sum(gap, layout), layout).exp() if level == "sequence" else gap.exp()


@dataclass(frozen=True)
class TruncatedImportance(Correction):
    """min(old / sampler, cap): corrects for a sampler that is not `old` (1606.02647); cap inf is the factor of decoupled PPO (2110.00641).

    Of the token it is biased as an estimate for sequences; of the `sequence`, uncapped, it is not.
    """

    cap: float = 2.0
    level: Literal["token", "sequence"] = "token"

    def __post_init__(self) -> None:
        if not self.cap >= 1:
            raise UsageError(f"TruncatedImportance: cap={self.cap} must be at least 1; inf leaves the factor as it is")

    def __call__(self, outputs: Outputs, experience: Experience) -> PerAction:
        return mismatch(experience.signals, experience.layout, self.level).clamp(max=self.cap)


@dataclass(frozen=True)
class MaskedImportance(Correction):
    """x if low <= x <= high else 0, x = old / sampler: what the sampler saw too differently is left out (IcePop, 2510.18855)."""

    low: float = 0.5
    high: float = 5.0
    level: Literal["token", "sequence"] = "token"

    def __post_init__(self) -> None:
        check_not_negative(self, low=self.low)
        if not self.low < 1 < self.high:
            raise UsageError(f"MaskedImportance: low={self.low} and high={self.high} must enclose 1, the factor of equal policies")

    def __call__(self, outputs: Outputs, experience: Experience) -> PerAction:
        x = mismatch(experience.signals, experience.layout, self.level)
        return torch.where((x >= self.low) & (x <= self.high), x, 0)


@dataclass(frozen=True)
class SequenceMask(Correction):
    """1 if Adv >= 0 or mean_t (l_smp - l)_t <= delta, else 0: a bad answer that the policy has left behind is not pushed further (2512.02556)."""

    delta: float = 0.1
    needs: ClassVar[frozenset[str]] = frozenset({"sampler"})

    def __post_init__(self) -> None:
        check_not_negative(self, delta=self.delta)

    def __call__(self, outputs: Outputs, experience: Experience) -> PerAction:
        layout = experience.layout
        gone = segment_mean(experience.signals.sampler - outputs.logprobs, layout) > self.delta
        return (~(spread(gone, layout) & (experience.advantages < 0))).to(experience.weights)


@dataclass(frozen=True)
class HighEntropy(Correction):
    """1 where the old policy's entropy is among the highest `share` of the batch's actions, else 0 (2506.01939)."""

    share: float = 0.2
    needs: ClassVar[frozenset[str]] = frozenset({"entropy"})

    def __post_init__(self) -> None:
        check_fraction(self, share=self.share)
        check_positive(self, share=self.share)

    def fixed(self, signals: Signals, layout: Layout, seen: ActionMask) -> PerAction:
        among = signals.entropy[seen].sort().values
        place = (1 - self.share) * max(0, len(among) - 1)
        around = among[int(place) : int(place) + 2]
        bar = torch.lerp(around[0], around[-1], place - int(place)) if len(among) else inf
        return (signals.entropy >= bar).to(signals.entropy)
