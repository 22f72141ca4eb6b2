"""Rewards of answers, whose differences are margins: a reward model's scores, and what a policy's likelihoods imply."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from tilt.errors import UsageError
from tilt.objectives.credit import NOTHING
from tilt.objectives.pairs import Answers, PerAnswer

REFERENCE = frozenset({"reference"})


class Margin(Protocol):
    """One reward per answer. The margin of a pair is the chosen answer's reward less the rejected one's, less `offset`.

    `reads` says whose statistics these are: a reward model's scores or a policy's likelihoods. `needs` names what else is read: reference, heads.
    """

    reads: ClassVar[Literal["score", "likelihood"]]

    @property
    def needs(self) -> frozenset[str]: ...

    @property
    def offset(self) -> float: ...

    def __call__(self, answers: Answers) -> PerAnswer: ...


def check_beta(piece: object, beta: float) -> None:
    if not 0 < beta < math.inf:
        raise UsageError(f"{type(piece).__name__}: beta={beta} must be above 0")


@dataclass(frozen=True)
class ScoreMargin:
    """A reward model's score; margin s_c - s_r - offset (2203.02155; with an offset: 2307.09288)."""

    offset: float = 0.0
    reads: ClassVar[Literal["score", "likelihood"]] = "score"
    needs: ClassVar[frozenset[str]] = NOTHING

    def __call__(self, answers: Answers) -> PerAnswer:
        return answers.scores


@dataclass(frozen=True)
class ImplicitReward:
    """beta u, u = log policy - log reference of the answer (DPO, 2305.18290).

    `mean` divides u by the answer's length (2411.15124). `tail` below 1 counts the actions beyond the other answer's length less (LD-DPO, 2409.06411):
    log p = sum over the first min(n_w, n_l) actions + tail * sum over the others.
    """

    beta: float = 0.1
    offset: float = 0.0
    mean: bool = False
    tail: float = 1.0
    reads: ClassVar[Literal["score", "likelihood"]] = "likelihood"

    def __post_init__(self) -> None:
        check_beta(self, self.beta)
        if not 0 <= self.tail <= 1:
            raise UsageError(f"ImplicitReward: tail={self.tail} must lie in [0, 1]: 1 counts every action fully")
        if self.mean and self.tail != 1:
            raise UsageError("ImplicitReward: mean and tail both answer the question of length; set tail to 1, or mean to false")

    @property
    def needs(self) -> frozenset[str]:
        return REFERENCE if self.tail == 1 else REFERENCE | {"heads"}

    def __call__(self, answers: Answers) -> PerAnswer:
        ratio = answers.scores - answers.reference
        if self.tail != 1:
            ratio = self.tail * ratio + (1 - self.tail) * (answers.heads - answers.reference_heads)
        return self.beta * (ratio / answers.lengths if self.mean else ratio)


@dataclass(frozen=True)
class ForwardKL:
    """beta (1 - exp(-u)), u = log policy - log reference: f'(ratio) of forward KL, less its constant (f-DPO, 2309.16240)."""

    beta: float = 0.1
    offset: float = 0.0
    reads: ClassVar[Literal["score", "likelihood"]] = "likelihood"
    needs: ClassVar[frozenset[str]] = REFERENCE

    def __post_init__(self) -> None:
        check_beta(self, self.beta)

    def __call__(self, answers: Answers) -> PerAnswer:
        return -self.beta * torch.expm1(answers.reference - answers.scores)


@dataclass(frozen=True)
class JensenShannon:
    """beta (log 2 + log sigmoid(u)), u = log policy - log reference: f'(ratio) of the Jensen-Shannon divergence (f-DPO, 2309.16240)."""

    beta: float = 0.1
    offset: float = 0.0
    reads: ClassVar[Literal["score", "likelihood"]] = "likelihood"
    needs: ClassVar[frozenset[str]] = REFERENCE

    def __post_init__(self) -> None:
        check_beta(self, self.beta)

    def __call__(self, answers: Answers) -> PerAnswer:
        return self.beta * (math.log(2) + logsigmoid(answers.scores - answers.reference))


@dataclass(frozen=True)
class AlphaDivergence:
    """beta (exp((alpha - 1) u) - 1) / (alpha - 1), u = log policy - log reference (f-DPO, 2309.16240): alpha 0 is forward KL, alpha -> 1 reverse KL."""

    beta: float = 0.1
    alpha: float = 0.5
    offset: float = 0.0
    reads: ClassVar[Literal["score", "likelihood"]] = "likelihood"
    needs: ClassVar[frozenset[str]] = REFERENCE

    def __post_init__(self) -> None:
        check_beta(self, self.beta)
        if not 0 <= self.alpha < 1:
            raise UsageError(
                f"AlphaDivergence: alpha={self.alpha} must lie in [0, 1); 1 is the reverse KL of direct preference optimisation: use implicit_reward"
            )

    def __call__(self, answers: Answers) -> PerAnswer:
        power = self.alpha - 1
        return self.beta * torch.expm1(power * (answers.scores - answers.reference)) / power


@dataclass(frozen=True)
class Likelihood:
    """beta log policy of the answer, no reference (CPO, 2401.08417); `mean` divides by the answer's length (SimPO, 2405.14734)."""

    beta: float = 0.1
    offset: float = 0.0
    mean: bool = False
    reads: ClassVar[Literal["score", "likelihood"]] = "likelihood"
    needs: ClassVar[frozenset[str]] = NOTHING

    def __post_init__(self) -> None:
        check_beta(self, self.beta)

    def __call__(self, answers: Answers) -> PerAnswer:
        return self.beta * (answers.scores / answers.lengths if self.mean else answers.scores)


@dataclass(frozen=True)
class LogOdds:
    """p - log(1 - exp(p)), p the mean log-probability of the answer's actions, no reference (ORPO, 2403.07691).

    The odds of an answer that is certain, p within a rounding error of 0, stop growing there.
    """

    offset: float = 0.0
    reads: ClassVar[Literal["score", "likelihood"]] = "likelihood"
    needs: ClassVar[frozenset[str]] = NOTHING

    def __call__(self, answers: Answers) -> PerAnswer:
        mean = answers.scores / answers.lengths
        certain: Tensor = mean.clamp(max=-torch.finfo(mean.dtype).eps)
        return certain - (-torch.expm1(certain)).log()
