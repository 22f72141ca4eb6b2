"""What is taken off the gain: estimates of the KL divergence from the reference, exact divergences, or a constraint on the step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol

import torch
from torch import Tensor

from tilt.distributions import k1, k2, k3
from tilt.errors import UsageError
from tilt.objectives.credit import NOTHING, check_fraction, check_not_negative, check_positive
from tilt.objectives.experience import Outputs, Signals
from tilt.segments import Layout, segment_sum, spread
from tilt.shapes import PerAction

REFERENCE: frozenset[str] = frozenset({"reference"})
Level = Literal["token", "sequence"]
Against = Literal["none", "reference", "old"]


class Penalty(Protocol):
    """What is taken off the gain of each action [A]. `against` names the policy that `outputs.kl` must compare with, over the whole vocabulary."""

    against: ClassVar[Against] = "none"

    @property
    def needs(self) -> frozenset[str]:
        return REFERENCE

    def __call__(self, outputs: Outputs, signals: Signals, layout: Layout) -> PerAction: ...


@dataclass(frozen=True)
class NoPenalty(Penalty):
    """Nothing is taken off, and the reference is not read."""

    @property
    def needs(self) -> frozenset[str]:
        return NOTHING

    def __call__(self, outputs: Outputs, signals: Signals, layout: Layout) -> PerAction:
        return torch.zeros_like(outputs.logprobs)


class Estimate(Penalty, Protocol):
    """beta kind(u), a one-sample estimate of KL(policy || reference): u = l - l_ref of the action or, summed, of its sequence.

    `weighted`: times policy / old of the same level, differentiated.
    """

    beta: float
    level: Level
    weighted: bool

    def __post_init__(self) -> None:
        check_not_negative(self, beta=self.beta)

    @property
    def needs(self) -> frozenset[str]:
        return REFERENCE | {"old"} if self.weighted else REFERENCE

    @staticmethod
    def kind(u: Tensor) -> Tensor: ...

    def __call__(self, outputs: Outputs, signals: Signals, layout: Layout) -> PerAction:
        whole = self.level == "sequence"

        def of_level(x: Tensor) -> Tensor:
            return segment_sum(x, layout) if whole else x

        each = self.beta * self.kind(of_level(outputs.logprobs - signals.reference))
        if self.weighted:
            each = of_level(outputs.logprobs - signals.old).exp() * each
        return spread(each, layout) if whole else each


@dataclass(frozen=True)
class K1(Estimate):
    """beta u, u = l - l_ref. Its expected gradient is 0 unless it is `weighted` by policy / old: then it is that of KL(policy || reference)."""

    beta: float = 0.05
    level: Level = "token"
    weighted: bool = False
    kind = staticmethod(k1)


@dataclass(frozen=True)
class K2(Estimate):
    """beta u^2 / 2: pulls along KL(policy || reference), of the sequence exactly, of tokens with prefixes frozen."""

    beta: float = 0.01
    level: Level = "token"
    weighted: bool = False
    kind = staticmethod(k2)


@dataclass(frozen=True)
class K3(Estimate):
    """beta (exp(-u) + u - 1): pulls along KL(reference || policy) (DeepSeekMath, 2402.03300; of the whole answer: DeepSeek-R1, 2501.12948).

    `weighted` by policy / old it pulls along KL(policy || reference) (2512.02556).
    """

    beta: float = 0.04
    level: Level = "token"
    weighted: bool = False
    kind = staticmethod(k3)


@dataclass(frozen=True)
class ExactKL(Penalty):
    """beta KL(policy || reference) of each state, over the whole vocabulary: no noise from the sampled action."""

    beta: float = 0.05
    against: ClassVar[Against] = "reference"

    def __post_init__(self) -> None:
        check_not_negative(self, beta=self.beta)

    def __call__(self, outputs: Outputs, signals: Signals, layout: Layout) -> PerAction:
        return self.beta * outputs.kl


@dataclass(frozen=True)
class OldKL(Penalty):
    """beta KL(old || policy) of each state, over the whole vocabulary: the penalty form of PPO (1707.06347, section 4)."""

    beta: float = 1.0
    against: ClassVar[Against] = "old"

    def __post_init__(self) -> None:
        check_not_negative(self, beta=self.beta)

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"old"})

    def __call__(self, outputs: Outputs, signals: Signals, layout: Layout) -> PerAction:
        return self.beta * outputs.kl


@dataclass(frozen=True)
class TrustRegion(Penalty):
    """Nothing is taken off: the step itself keeps mean KL(old || policy) <= limit (TRPO, 1502.05477).

    Natural gradient by `iterations` of conjugate gradients with `damping`, then a line search of at most `backtracks` steps, each `decay` times the last.
    The Fisher products are taken on a `share` of the answers, evenly spaced; surrogate and KL of the line search on all.
    """

    limit: float = 0.01
    iterations: int = 10
    damping: float = 0.1
    backtracks: int = 10
    decay: float = 0.8
    share: float = 1.0
    against: ClassVar[Against] = "old"

    def __post_init__(self) -> None:
        check_positive(self, limit=self.limit, iterations=self.iterations, backtracks=self.backtracks, decay=self.decay, share=self.share)
        check_not_negative(self, damping=self.damping)
        check_fraction(self, decay=self.decay, share=self.share)
        if self.decay == 1:
            raise UsageError("TrustRegion: decay=1 never shortens the step; set it below 1")

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"old"})

    def __call__(self, outputs: Outputs, signals: Signals, layout: Layout) -> PerAction:
        return torch.zeros_like(outputs.logprobs)
