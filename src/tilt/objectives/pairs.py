"""What the models said about answers that people compared or labelled: statistics per answer, and the pairs that they form."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tilt.shapes import Scalar

PerAnswer = Float[Tensor, "N"]
PerPair = Float[Tensor, "N"]
PerComparison = Float[Tensor, "C"]
PairIndex = Int[Tensor, "C"]


@dataclass(frozen=True)
class Answers:
    """Statistics of N answers, [N] each; one that nobody asked for is NaN.

    `scores`: a reward model's score, or the policy's log-probability of the answer (sum over its actions). `reference`: that sum under the reference.
    `lengths`: actions. `heads`, `reference_heads`: the sums over the first min(n_w, n_l) actions, those that the other answer of the pair has too.
    `confidence`: mean over actions of logprobs - log sum_v p(v)^2, no gradient. `weights`: in the loss, fixed on the whole batch (1/N of its pairs).
    """

    scores: PerAnswer
    reference: PerAnswer
    lengths: PerAnswer
    heads: PerAnswer
    reference_heads: PerAnswer
    confidence: PerAnswer
    weights: PerAnswer

    @staticmethod
    def of(
        scores: PerAnswer,
        *,
        reference: PerAnswer | None = None,
        lengths: PerAnswer | None = None,
        heads: PerAnswer | None = None,
        reference_heads: PerAnswer | None = None,
        confidence: PerAnswer | None = None,
        weights: PerAnswer | None = None,
    ) -> Answers:
        """The answers of a whole batch, each of weight 1/N unless said otherwise."""
        nan = torch.full_like(scores, torch.nan)

        def known(x: Tensor | None) -> Tensor:
            return nan if x is None else x.to(nan)

        even = torch.full_like(nan, 1 / max(len(scores), 1)) if weights is None else weights
        return Answers(scores, known(reference), known(lengths), known(heads), known(reference_heads), known(confidence), even)

    def take(self, answers: Tensor) -> Answers:
        """These answers; their weights stay those of the whole."""
        return Answers(**{f.name: getattr(self, f.name)[answers] for f in fields(self)})

    @property
    def anchor(self) -> Answers:
        """The same answers as the reference sees them, against nothing."""
        zero = torch.zeros_like(self.reference)
        return replace(self, scores=self.reference, heads=self.reference_heads, reference=zero, reference_heads=zero)

    @property
    def alone(self) -> Answers:
        """The same answers against nothing instead of the reference."""
        zero = torch.zeros_like(self.reference)
        return replace(self, reference=zero, reference_heads=zero)

    def detach(self) -> Answers:
        return Answers(**{f.name: getattr(self, f.name).detach() for f in fields(self)})


@dataclass(frozen=True)
class Span:
    """A reward model's scores at the P positions at which the two answers of a pair are compared, and which pair each position belongs to, [P] each."""

    chosen: Float[Tensor, "P"]
    rejected: Float[Tensor, "P"]
    pair: Int[Tensor, "P"]

    def take(self, pairs: Tensor, count: int) -> Span:
        """The positions of these of the `count` pairs, pairs renumbered in the order given."""
        place = torch.full((count,), -1, dtype=torch.long, device=self.pair.device)
        place[pairs] = torch.arange(len(pairs), device=place.device)
        moved = place[self.pair]
        return Span(self.chosen[moved >= 0], self.rejected[moved >= 0], moved[moved >= 0])


@dataclass(frozen=True)
class Pairs:
    """N pairs of answers to one prompt each, or, where not `paired`, answers that were labelled good (`chosen`, N) and bad (`rejected`, M).

    `margins`: by how much the chosen answer should win, [N]. `probability`: that it is really the better one, [N]. `mismatched`: prompts with answers to
    other prompts, of the whole batch whatever part of it these pairs are. `span`: positions compared one by one.
    """

    chosen: Answers
    rejected: Answers
    margins: PerPair
    probability: PerPair
    mismatched: Answers
    span: Span
    paired: bool

    @staticmethod
    def of(
        chosen: Answers | Tensor,
        rejected: Answers | Tensor,
        *,
        margins: Tensor | None = None,
        probability: Tensor | None = None,
        mismatched: Answers | None = None,
        span: Span | None = None,
        paired: bool = True,
    ) -> Pairs:
        """Pairs, certain and without margins unless said otherwise; a tensor stands for the scores of answers of which nothing else is known."""
        better = chosen if isinstance(chosen, Answers) else Answers.of(chosen)
        worse = rejected if isinstance(rejected, Answers) else Answers.of(rejected)
        scores = better.scores
        none = scores.new_zeros(0)
        return Pairs(
            better,
            worse,
            torch.zeros_like(scores) if margins is None else margins.to(scores),
            torch.ones_like(scores) if probability is None else probability.to(scores),
            Answers.of(none) if mismatched is None else mismatched,
            Span(none, none, none.long()) if span is None else span,
            paired,
        )

    @staticmethod
    def labelled(good: Answers | Tensor, bad: Answers | Tensor, *, mismatched: Answers | None = None) -> Pairs:
        """Answers labelled one by one, of the whole batch: each weighs 1/(N + M)."""
        sides = [x if isinstance(x, Answers) else Answers.of(x) for x in (good, bad)]
        total = max(1, sum(len(x.scores) for x in sides))
        good, bad = (replace(x, weights=torch.full_like(x.scores, 1 / total)) for x in sides)
        return Pairs.of(good, bad, mismatched=mismatched, paired=False)

    @property
    def weights(self) -> PerPair:
        """The weight of each pair in the loss."""
        return self.chosen.weights

    def take(self, chosen: Tensor, rejected: Tensor | None = None) -> Pairs:
        """These pairs (or these good and these bad answers); weights stay those of the whole, and so do the mismatched answers."""
        other = chosen if rejected is None else rejected
        span = self.span.take(chosen, len(self.margins))
        return replace(
            self, chosen=self.chosen.take(chosen), rejected=self.rejected.take(other), margins=self.margins[chosen],
            probability=self.probability[chosen], span=span,
        )  # fmt: skip

    def to(self, device: torch.device | str) -> Pairs:
        sides = (self.chosen, self.rejected, self.mismatched)
        moved = [Answers(**{f.name: getattr(side, f.name).to(device) for f in fields(side)}) for side in sides]
        span = Span(*(getattr(self.span, f.name).to(device) for f in fields(self.span)))
        return Pairs(moved[0], moved[1], self.margins.to(device), self.probability.to(device), moved[2], span, self.paired)

    def detach(self) -> Pairs:
        span = Span(self.span.chosen.detach(), self.span.rejected.detach(), self.span.pair)
        return replace(self, chosen=self.chosen.detach(), rejected=self.rejected.detach(), span=span)

    @staticmethod
    def join(parts: Sequence[Pairs]) -> Pairs:
        """Parts of a batch as one, in the given order; they share their mismatched answers."""

        def joined(sides: Sequence[Answers]) -> Answers:
            return Answers(**{f.name: torch.cat([getattr(side, f.name) for side in sides]) for f in fields(Answers)})

        counts = torch.tensor([0, *(len(part.margins) for part in parts)]).cumsum(0).tolist()
        span = Span(
            torch.cat([part.span.chosen for part in parts]),
            torch.cat([part.span.rejected for part in parts]),
            torch.cat([part.span.pair + first for part, first in zip(parts, counts, strict=False)]),
        )
        return replace(
            parts[0], chosen=joined([part.chosen for part in parts]), rejected=joined([part.rejected for part in parts]),
            margins=torch.cat([part.margins for part in parts]), probability=torch.cat([part.probability for part in parts]), span=span,
        )  # fmt: skip


MOVED = ("scores", "heads")
"""The statistics that the policy can move: the others are fixed or carry no gradient."""


def pull(pairs: Pairs, slopes: Pairs) -> Scalar:
    """sum of slope * statistic: where `slopes` holds ∂loss/∂statistic of the whole batch, its gradient is the part of the loss's gradient that goes through these pairs."""
    total = pairs.chosen.scores.new_zeros(())
    for side, slope in ((pairs.chosen, slopes.chosen), (pairs.rejected, slopes.rejected)):
        for name in MOVED:
            rate = getattr(slope, name)
            total = total + torch.where(rate == 0, 0, rate * getattr(side, name)).sum()
    return total
