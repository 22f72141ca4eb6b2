"""What is added to the loss of a pair, and the fixed factor by which a pair counts."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch

from tilt.errors import UsageError
from tilt.objectives.credit import NOTHING, check_not_negative
from tilt.objectives.pairs import Pairs, PerPair


class Regulariser(Protocol):
    """What is added to the loss of each pair, from the rewards of its answers and their statistics."""

    def __call__(self, chosen: PerPair, rejected: PerPair, pairs: Pairs) -> PerPair: ...


@dataclass(frozen=True)
class NoRegulariser:
    """Nothing is added."""

    def __call__(self, chosen: PerPair, rejected: PerPair, pairs: Pairs) -> PerPair:
        return torch.zeros_like(chosen)


@dataclass(frozen=True)
class Centring:
    """k (s_c + s_r)^2: keeps scores near 0, since Bradley-Terry leaves their level free (2312.09244)."""

    coefficient: float = 0.01

    def __post_init__(self) -> None:
        check_not_negative(self, coefficient=self.coefficient)

    def __call__(self, chosen: PerPair, rejected: PerPair, pairs: Pairs) -> PerPair:
        return self.coefficient * (chosen + rejected).square()


@dataclass(frozen=True)
class ChosenNLL:
    """-coefficient log policy of the chosen answer, a sum over its actions or with `mean` their mean (RPO, 2405.16436; 2404.19733)."""

    coefficient: float = 1.0
    mean: bool = False

    def __post_init__(self) -> None:
        check_not_negative(self, coefficient=self.coefficient)

    def __call__(self, chosen: PerPair, rejected: PerPair, pairs: Pairs) -> PerPair:
        likelihood = pairs.chosen.scores / pairs.chosen.lengths if self.mean else pairs.chosen.scores
        return -self.coefficient * likelihood


@dataclass(frozen=True)
class LowerChosen:
    """sigmoid(reward of the chosen answer): pushes it down, as where the policy already writes better answers than the data (APO-down, 2408.06266)."""

    def __call__(self, chosen: PerPair, rejected: PerPair, pairs: Pairs) -> PerPair:
        return chosen.sigmoid()


class Weight(Protocol):
    """The factor of each pair's loss, without gradient; it does not touch the regulariser. `needs` names what is read: confidence."""

    needs: ClassVar[frozenset[str]]

    def __call__(self, pairs: Pairs) -> PerPair: ...


@dataclass(frozen=True)
class Even:
    """Every pair counts once."""

    needs: ClassVar[frozenset[str]] = NOTHING

    def __call__(self, pairs: Pairs) -> PerPair:
        return torch.ones_like(pairs.margins)


@dataclass(frozen=True)
class Constant:
    """Every pair counts `factor` times: the weight of the pair beside its regulariser (the lambda of ORPO, 2403.07691)."""

    factor: float = 0.1
    needs: ClassVar[frozenset[str]] = NOTHING

    def __post_init__(self) -> None:
        if not 0 < self.factor < math.inf:
            raise UsageError(f"Constant: factor={self.factor} must be above 0")

    def __call__(self, pairs: Pairs) -> PerPair:
        return torch.full_like(pairs.margins, self.factor)


@dataclass(frozen=True)
class Confidence:
    """w(y_w) w(y_l), w = exp(mean_t[logprobs_t - log sum_v p(v)^2]): pairs that the policy could have written count more (WPO, 2406.11827).

    1 where every action is as likely as a sampled one on average; `cap` bounds the product (TRL 0.12.1: 1).
    """

    cap: float = math.inf
    needs: ClassVar[frozenset[str]] = frozenset({"confidence"})

    def __post_init__(self) -> None:
        if not self.cap > 0:
            raise UsageError(f"Confidence: cap={self.cap} must be above 0")

    def __call__(self, pairs: Pairs) -> PerPair:
        return (pairs.chosen.confidence + pairs.rejected.confidence).detach().exp().clamp(max=self.cap)
