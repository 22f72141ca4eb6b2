"""What the reward of an answer is held against: the other answer of its pair, the batch's order statistics, position by position, or a baseline."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from tilt.errors import UsageError
from tilt.objectives.credit import NOTHING
from tilt.objectives.pairs import Answers, PairIndex, Pairs, PerAnswer, PerComparison
from tilt.shapes import Scalar

Reward = Callable[[Answers], PerAnswer]


class Matching(Protocol):
    """Margins of C comparisons, and the pair that each belongs to; the loss of a pair is the mean over its comparisons.

    `coupled`: a margin depends on the other pairs of the batch, so the loss is one of the whole batch.
    """

    needs: ClassVar[frozenset[str]]
    coupled: ClassVar[bool]

    def __call__(self, reward: Reward, pairs: Pairs) -> tuple[PerComparison, PairIndex]: ...


class Baseline(Protocol):
    """A reward that separates good answers from bad ones, without gradient. `coupled`: it depends on the rewards of the batch."""

    needs: ClassVar[frozenset[str]]
    coupled: ClassVar[bool]

    def level(self, reward: Reward, pairs: Pairs) -> Scalar: ...


def _every(pairs: Pairs) -> Tensor:
    return torch.arange(len(pairs.margins), device=pairs.margins.device)


@dataclass(frozen=True)
class Partner:
    """The chosen answer's reward less the rejected one's."""

    needs: ClassVar[frozenset[str]] = NOTHING
    coupled: ClassVar[bool] = False

    def __call__(self, reward: Reward, pairs: Pairs) -> tuple[PerComparison, PairIndex]:
        return reward(pairs.chosen) - reward(pairs.rejected), _every(pairs)


@dataclass(frozen=True)
class SortedAnswers:
    """The k-th smallest reward of the chosen answers less the k-th smallest of the rejected ones (AOT on unpaired answers, 2406.05882)."""

    needs: ClassVar[frozenset[str]] = NOTHING
    coupled: ClassVar[bool] = True

    def __call__(self, reward: Reward, pairs: Pairs) -> tuple[PerComparison, PairIndex]:
        return reward(pairs.chosen).sort().values - reward(pairs.rejected).sort().values, _every(pairs)


@dataclass(frozen=True)
class SortedMargins:
    """The k-th smallest margin under the policy less the k-th smallest under the reference (AOT on pairs, 2406.05882)."""

    needs: ClassVar[frozenset[str]] = frozenset({"reference"})
    coupled: ClassVar[bool] = True

    def __call__(self, reward: Reward, pairs: Pairs) -> tuple[PerComparison, PairIndex]:
        policy = reward(pairs.chosen.alone) - reward(pairs.rejected.alone)
        anchor = reward(pairs.chosen.anchor) - reward(pairs.rejected.anchor)
        return policy.sort().values - anchor.sort().values, _every(pairs)


@dataclass(frozen=True)
class DivergentSpan:
    """Score against score at every position from where the answers part to the end of the longer one (DeepSpeed-Chat, 2308.01320)."""

    needs: ClassVar[frozenset[str]] = frozenset({"span"})
    coupled: ClassVar[bool] = False

    def __call__(self, reward: Reward, pairs: Pairs) -> tuple[PerComparison, PairIndex]:
        return pairs.span.chosen - pairs.span.rejected, pairs.span.pair


@dataclass(frozen=True)
class Zero:
    """No baseline: an answer is held against 0, where policy and reference agree."""

    needs: ClassVar[frozenset[str]] = NOTHING
    coupled: ClassVar[bool] = False

    def level(self, reward: Reward, pairs: Pairs) -> Scalar:
        return pairs.margins.new_zeros(())


@dataclass(frozen=True)
class MismatchedKL:
    """max(0, mean reward of prompts with answers to other prompts): an estimate of beta KL(policy || reference) (KTO, 2402.01306)."""

    needs: ClassVar[frozenset[str]] = frozenset({"mismatched"})
    coupled: ClassVar[bool] = False

    def level(self, reward: Reward, pairs: Pairs) -> Scalar:
        return reward(pairs.mismatched).detach().mean().clamp(min=0)


@dataclass(frozen=True)
class RunningMean:
    """Mean reward of all answers so far, this batch's included; its state is `mean` over the `count` answers before (BCO, 2404.04656)."""

    mean: float = 0.0
    count: int = 0
    needs: ClassVar[frozenset[str]] = NOTHING
    coupled: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.count < 0:
            raise UsageError(f"RunningMean: count={self.count} must not be negative")

    def level(self, reward: Reward, pairs: Pairs) -> Scalar:
        seen = torch.cat([reward(pairs.chosen), reward(pairs.rejected)]).detach()
        return (self.mean * self.count + seen.sum()) / (self.count + len(seen))

    def after(self, reward: Reward, pairs: Pairs) -> RunningMean:
        """The state after a batch."""
        return replace(
            self, mean=float(self.level(reward, pairs)), count=self.count + len(pairs.chosen.scores) + len(pairs.rejected.scores)
        )
