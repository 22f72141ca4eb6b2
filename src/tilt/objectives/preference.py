"""The second table: objectives on pairs of answers, from a margin, a link and a regulariser (reward model, DPO)."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import ClassVar, Protocol

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import logsigmoid

from tilt.errors import UsageError
from tilt.objectives.credit import NOTHING, check_not_negative
from tilt.objectives.objective import Metrics
from tilt.shapes import Scalar

PerPair = Float[Tensor, "N"]


@dataclass(frozen=True)
class Pairs:
    """What the models said about N pairs, [N] each: the policy's log-probability of each answer (sum over its actions) or a reward model's score,
    the reference's log-probabilities (NaN where not asked for), and each pair's weight in the loss, 1/N of the whole batch."""

    chosen: PerPair
    rejected: PerPair
    reference_chosen: PerPair
    reference_rejected: PerPair
    weights: PerPair

    @staticmethod
    def of(
        chosen: PerPair,
        rejected: PerPair,
        *,
        reference_chosen: PerPair | None = None,
        reference_rejected: PerPair | None = None,
        weights: PerPair | None = None,
    ) -> Pairs:
        """The pairs of a whole batch, each of weight 1/N unless said otherwise."""
        nan = torch.full_like(chosen, torch.nan).detach()
        return Pairs(
            chosen,
            rejected,
            nan if reference_chosen is None else reference_chosen,
            nan if reference_rejected is None else reference_rejected,
            torch.full_like(nan, 1 / max(len(chosen), 1)) if weights is None else weights,
        )

    def take(self, pairs: Tensor) -> Pairs:
        """A part of the batch; the weights stay those of the whole."""
        return Pairs(**{f.name: getattr(self, f.name)[pairs] for f in fields(self)})


class Margin(Protocol):
    """Two rewards per pair, whose difference less `offset` is the margin the link judges."""

    needs: ClassVar[frozenset[str]] = NOTHING

    @property
    def offset(self) -> float: ...

    def rewards(self, pairs: Pairs) -> tuple[PerPair, PerPair]: ...


@dataclass(frozen=True)
class ScoreMargin:
    """The reward model's scores; margin s_c - s_r - offset (2203.02155; with an offset: 2307.09288)."""

    offset: float = 0.0
    needs: ClassVar[frozenset[str]] = NOTHING

    def rewards(self, pairs: Pairs) -> tuple[PerPair, PerPair]:
        return pairs.chosen, pairs.rejected


@dataclass(frozen=True)
class ImplicitReward:
    """beta (log policy - log reference) of each answer (DPO, 2305.18290); margin h = beta (c - r) - offset."""

    beta: float = 0.1
    offset: float = 0.0
    needs: ClassVar[frozenset[str]] = frozenset({"reference"})

    def __post_init__(self) -> None:
        if not self.beta > 0:
            raise UsageError(f"ImplicitReward: beta={self.beta} must be above 0")

    def rewards(self, pairs: Pairs) -> tuple[PerPair, PerPair]:
        return self.beta * (pairs.chosen - pairs.reference_chosen), self.beta * (pairs.rejected - pairs.reference_rejected)


class Link(Protocol):
    """The loss of a pair from its margin."""

    def __call__(self, margin: PerPair) -> PerPair: ...


@dataclass(frozen=True)
class Logistic:
    """-(1 - e) log sigmoid(h) - e log sigmoid(-h): Bradley-Terry; e = `smoothing` is the chance that a label is wrong (conservative DPO)."""

    smoothing: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.smoothing <= 1:
            raise UsageError(f"Logistic: smoothing={self.smoothing} must lie in [0, 1]")

    def __call__(self, margin: PerPair) -> PerPair:
        return -(1 - self.smoothing) * logsigmoid(margin) - self.smoothing * logsigmoid(-margin)


class Regulariser(Protocol):
    """What is added to the loss of each pair."""

    def __call__(self, chosen: PerPair, rejected: PerPair) -> PerPair: ...


@dataclass(frozen=True)
class NoRegulariser:
    """Nothing is added."""

    def __call__(self, chosen: PerPair, rejected: PerPair) -> PerPair:
        return torch.zeros_like(chosen)


@dataclass(frozen=True)
class Centring:
    """k (s_c + s_r)^2: keeps scores near 0, since Bradley-Terry leaves their level free (2312.09244)."""

    coefficient: float = 0.01

    def __post_init__(self) -> None:
        check_not_negative(self, coefficient=self.coefficient)

    def __call__(self, chosen: PerPair, rejected: PerPair) -> PerPair:
        return self.coefficient * (chosen + rejected).square()


@dataclass(frozen=True)
class Preference:
    """loss = sum_n weight_n (link(margin_n) + regulariser_n); the losses of parts of a batch add up to the loss of the batch."""

    margin: Margin
    link: Link = field(default_factory=Logistic)
    regulariser: Regulariser = field(default_factory=NoRegulariser)

    @property
    def needs(self) -> frozenset[str]:
        """`reference` where the reference's log-probabilities are read."""
        return self.margin.needs

    def each(self, pairs: Pairs) -> PerPair:
        """The loss of each pair, [N]."""
        chosen, rejected = self.margin.rewards(pairs)
        return self.link(chosen - rejected - self.margin.offset) + self.regulariser(chosen, rejected)

    def loss(self, pairs: Pairs) -> Scalar:
        """The part of the batch's loss that these pairs contribute."""
        return (pairs.weights * self.each(pairs)).sum()

    @torch.no_grad()
    def metrics(self, pairs: Pairs) -> Metrics:
        """Accuracy (a tie is half right), margin and rewards of these pairs, as (sum, weight)."""
        chosen, rejected = self.margin.rewards(pairs)
        gap = chosen - rejected
        count = gap.new_tensor(len(gap))
        right = (gap > 0).to(gap) + 0.5 * (gap == 0).to(gap)
        named = {"loss": self.each(pairs), "accuracy": right, "margin": gap, "rewards/chosen": chosen, "rewards/rejected": rejected}
        return {f"preference/{name}": (x.sum(), count) for name, x in named.items()}
