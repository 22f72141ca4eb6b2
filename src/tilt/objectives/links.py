"""Losses: of a pair by its margin, and of single answers by their reward."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from tilt.errors import UsageError
from tilt.objectives.margins import check_beta
from tilt.objectives.pairs import PerAnswer, PerComparison


class Link(Protocol):
    """The loss of comparisons from their margins h and the probability that the chosen answer is really the better one (1 where labels are certain)."""

    def __call__(self, margin: PerComparison, probability: PerComparison) -> PerComparison: ...


@runtime_checkable
class Verdict(Protocol):
    """The loss of single answers, by how far their reward lies above a baseline: of good ones, and of bad ones."""

    def good(self, reward: PerAnswer) -> PerAnswer: ...

    def bad(self, reward: PerAnswer) -> PerAnswer: ...


def expected(loss: Callable[[Tensor], Tensor], margin: PerComparison, probability: PerComparison) -> PerComparison:
    """p loss(h) + (1 - p) loss(-h): the mean over what the label may be."""
    return probability * loss(margin) + (1 - probability) * loss(-margin)


# --- of pairs -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Logistic:
    """-t log sigmoid(h) - (1 - t) log sigmoid(-h), t = p less a share `smoothing` that goes to the other side (Bradley-Terry; conservative DPO)."""

    smoothing: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.smoothing <= 1:
            raise UsageError(f"Logistic: smoothing={self.smoothing} must lie in [0, 1]")

    def __call__(self, margin: PerComparison, probability: PerComparison) -> PerComparison:
        target = smoothed(probability, self.smoothing)
        return -target * logsigmoid(margin) - (1 - target) * logsigmoid(-margin)


def smoothed(probability: PerComparison, smoothing: float) -> PerComparison:
    """(1 - e) p + e (1 - p)."""
    return (1 - smoothing) * probability + smoothing * (1 - probability)


@dataclass(frozen=True)
class Robust:
    """[-(1 - e) log sigmoid(h) + e log sigmoid(-h)] / (1 - 2e): in the mean the loss of right labels, where a share e is wrong (2403.00409)."""

    smoothing: float = 0.1

    def __post_init__(self) -> None:
        if not 0 <= self.smoothing < 0.5:
            raise UsageError(f"Robust: smoothing={self.smoothing} must lie in [0, .5): where half of the labels are wrong they say nothing")

    def __call__(self, margin: PerComparison, probability: PerComparison) -> PerComparison:
        return expected(self._certain, margin, probability)

    def _certain(self, margin: Tensor) -> Tensor:
        wrong = self.smoothing
        return (-(1 - wrong) * logsigmoid(margin) + wrong * logsigmoid(-margin)) / (1 - 2 * wrong)


@dataclass(frozen=True)
class Squared:
    """(h - 1 / (2 beta))^2: the margin is regressed on a constant instead of growing without end (IPO, 2310.12036)."""

    beta: float = 0.1

    def __post_init__(self) -> None:
        check_beta(self, self.beta)

    def __call__(self, margin: PerComparison, probability: PerComparison) -> PerComparison:
        return expected(lambda h: (h - 1 / (2 * self.beta)).square(), margin, probability)


@dataclass(frozen=True)
class Hinge:
    """max(0, distance - h) (RSO, 2309.06657; SLiC, 2305.10425)."""

    distance: float = 1.0

    def __post_init__(self) -> None:
        if not self.distance > 0:
            raise UsageError(f"Hinge: distance={self.distance} must be above 0, else a margin of 0 already costs nothing")

    def __call__(self, margin: PerComparison, probability: PerComparison) -> PerComparison:
        return expected(lambda h: (self.distance - h).relu(), margin, probability)


@dataclass(frozen=True)
class Fidelity:
    """1 - sqrt(P t) - sqrt((1 - P)(1 - t)), P = sigmoid(h), t the probability of the label, `target` where it is certain (FRank, 2007).

    It lies in [0, 1], and its gradient vanishes at both ends: a pair far on the wrong side pulls no more.
    """

    target: float = 1.0

    def __post_init__(self) -> None:
        if not 0.5 < self.target <= 1:
            raise UsageError(f"Fidelity: target={self.target} must lie in (.5, 1]: the probability that a certain label asks for")

    def __call__(self, margin: PerComparison, probability: PerComparison) -> PerComparison:
        target = smoothed(probability, 1 - self.target)
        return 1 - target.sqrt() * (0.5 * logsigmoid(margin)).exp() - (1 - target).sqrt() * (0.5 * logsigmoid(-margin)).exp()


@dataclass(frozen=True)
class ReverseKL:
    """KL(q || label), q = sigmoid(h): q (log q - log t) + (1 - q)(log(1 - q) - log(1 - t)), t = p smoothed by e > 0 (EXO on pairs, 2402.00856)."""

    smoothing: float = 0.1

    def __post_init__(self) -> None:
        if not 0 < self.smoothing < 0.5:
            raise UsageError(
                f"ReverseKL: smoothing={self.smoothing} must lie in (0, .5): KL(q || label) is infinite where a label excludes an answer"
            )

    def __call__(self, margin: PerComparison, probability: PerComparison) -> PerComparison:
        target = smoothed(probability, self.smoothing)
        win, lose = logsigmoid(margin), logsigmoid(-margin)
        return win.exp() * (win - target.log()) + lose.exp() * (lose - (1 - target).log())


@dataclass(frozen=True)
class DiscoPop:
    """(1 - m)(-log sigmoid(h)) + m exp(-h), m = sigmoid(h / temperature): found by search (2406.08414).

    Not convex: its slope at h = 0 is (1 - log 2) / (4 temperature) - 3/4, above 0 for small temperatures (`uphill`).
    """

    temperature: float = 0.05

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise UsageError(f"DiscoPop: temperature={self.temperature} must be above 0")

    @property
    def uphill(self) -> bool:
        """Whether a margin of 0 is pushed down: there the loss falls towards smaller margins."""
        return self.temperature < (1 - math.log(2)) / 3

    def __call__(self, margin: PerComparison, probability: PerComparison) -> PerComparison:
        return expected(self._certain, margin, probability)

    def _certain(self, margin: Tensor) -> Tensor:
        mix = margin / self.temperature
        return mix.neg().sigmoid() * -logsigmoid(margin) + (logsigmoid(mix) - margin).exp()


@dataclass(frozen=True)
class Misorder:
    """1 - sigmoid(h): the probability of the wrong order (the pair's part of APO-down, 2408.06266)."""

    def __call__(self, margin: PerComparison, probability: PerComparison) -> PerComparison:
        return expected(lambda h: h.neg().sigmoid(), margin, probability)


# --- of single answers ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class NoiseContrast:
    """Good -log sigmoid(x) - .5 log sigmoid(-x), bad -.5 log sigmoid(-x) (NCA on pairs, 2402.05369)."""

    def good(self, reward: PerAnswer) -> PerAnswer:
        return -logsigmoid(reward) - 0.5 * logsigmoid(-reward)

    def bad(self, reward: PerAnswer) -> PerAnswer:
        return -0.5 * logsigmoid(-reward)


@dataclass(frozen=True)
class Classifier:
    """Good -log sigmoid(x), bad -log sigmoid(-x) (BCO, 2404.04656)."""

    def good(self, reward: PerAnswer) -> PerAnswer:
        return -logsigmoid(reward)

    def bad(self, reward: PerAnswer) -> PerAnswer:
        return -logsigmoid(-reward)


@dataclass(frozen=True)
class WinRate:
    """Good (x - 1 / (2 beta))^2, bad (x + 1 / (2 beta))^2: the reward is regressed on how often an answer wins (SPPO with hard labels, 2405.00675)."""

    beta: float = 0.1

    def __post_init__(self) -> None:
        check_beta(self, self.beta)

    def good(self, reward: PerAnswer) -> PerAnswer:
        return (reward - 1 / (2 * self.beta)).square()

    def bad(self, reward: PerAnswer) -> PerAnswer:
        return (reward + 1 / (2 * self.beta)).square()


@dataclass(frozen=True)
class Prospect:
    """Good desirable (1 - sigmoid(x)), bad undesirable (1 - sigmoid(-x)): losses that saturate on both sides (KTO, 2402.01306; APO-zero, 2408.06266)."""

    desirable: float = 1.0
    undesirable: float = 1.0

    def __post_init__(self) -> None:
        for name in ("desirable", "undesirable"):
            if not 0 < getattr(self, name) < math.inf:
                raise UsageError(f"Prospect: {name}={getattr(self, name)} must be above 0")

    def good(self, reward: PerAnswer) -> PerAnswer:
        return self.desirable * torch.sigmoid(-reward)

    def bad(self, reward: PerAnswer) -> PerAnswer:
        return self.undesirable * torch.sigmoid(reward)
