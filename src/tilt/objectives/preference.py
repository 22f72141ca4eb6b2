"""The second table's rows: objectives on answers that were compared or labelled (reward model, DPO and its family, KTO)."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from tilt.errors import UsageError
from tilt.objectives.comparisons import Baseline, DivergentSpan, Matching, MismatchedKL, Partner, SortedAnswers, SortedMargins
from tilt.objectives.links import Link, Logistic, Verdict
from tilt.objectives.margins import Margin
from tilt.objectives.objective import Metrics
from tilt.objectives.pairs import MOVED, Answers, Pairs, PerPair
from tilt.objectives.regularisers import ChosenNLL, Confidence, Even, NoRegulariser, Regulariser, Weight
from tilt.shapes import Scalar


@dataclass(frozen=True)
class Preference:
    """A row: `margin` gives each answer a reward, `comparison` says what it is held against, `link` makes a loss of it.

    loss = sum_n w_n (weight_n * mean over the pair's comparisons of link(margin) + regulariser_n); a link that judges answers one by one (a verdict) adds
    good(reward - baseline) of the chosen answer and bad(reward - baseline) of the rejected one, and reads labelled answers too.
    The losses of parts of a batch add up to the loss of the batch, except where the row is `coupled`: there `slopes` of the whole do.
    """

    margin: Margin
    link: Link | Verdict = field(default_factory=Logistic)
    regulariser: Regulariser = field(default_factory=NoRegulariser)
    comparison: Matching | Baseline = field(default_factory=Partner)
    weight: Weight = field(default_factory=Even)

    def __post_init__(self) -> None:
        problems = _impossible(self)
        if problems:
            raise UsageError("\n".join(problems))

    @property
    def needs(self) -> frozenset[str]:
        """What is read beside scores and lengths, among reference, heads, confidence, mismatched, span."""
        return self.margin.needs | self.comparison.needs | self.weight.needs

    @property
    def apart(self) -> bool:
        """Whether answers are judged one by one, so that labelled answers serve as well as pairs."""
        return isinstance(self.link, Verdict)

    @property
    def coupled(self) -> bool:
        """Whether the loss of a pair depends on the other pairs of the batch."""
        return self.comparison.coupled

    def check(self, *, paired: bool = True, uneven: bool = False, margins: bool = False, probability: bool = False) -> list[str]:
        """Why this row cannot learn from data that are labelled one by one, weigh their pairs unevenly (rankings), or bring margins or
        probabilities, in the user's words; empty when it can."""
        link, problems = type(self.link).__name__, []
        if not paired and not self.apart:
            problems.append(
                f"{link} compares the two answers of a pair, and the data are labelled answers: use a row such as kto, or data with chosen and rejected"
            )
        if not paired and (type(self.regulariser), type(self.weight)) != (NoRegulariser, Even):
            problems.append("regulariser and weight are those of pairs, and the data are labelled answers: leave both out")
        if not paired and "heads" in self.needs:
            problems.append(
                f"{type(self.margin).__name__} cuts an answer at the length of the other one, and the data are labelled answers: set its tail to 1"
            )
        for given, what in ((margins, "margins"), (probability, "probabilities of the labels")):
            if given and (self.apart or isinstance(self.comparison, (SortedAnswers, SortedMargins))):
                problems.append(f"the data bring {what}, which belong to single pairs, and this row has none: drop that column")
        if uneven and self.coupled:
            problems.append(
                f"{type(self.comparison).__name__} counts every pair alike, and rankings of different lengths do not: give each row one pair"
            )
        return problems

    def notes(self) -> list[str]:
        """What a reader of this row should know although it may run."""
        if not getattr(self.link, "uphill", False):
            return []
        name = type(self.link).__name__
        return [
            f"at a margin of 0 the slope of {name} points down, so a policy that starts at its reference first learns the opposite, and may stay there: "
            "start from one whose margins are positive already (model and reference), or raise link.temperature above 0.103"
        ]

    def each(self, pairs: Pairs) -> PerPair:
        """The loss of each pair, [N]."""
        chosen, rejected = self.margin(pairs.chosen), self.margin(pairs.rejected)
        if isinstance(self.link, Verdict):
            level = self._level(pairs)
            losses: Tensor = self.link.good(chosen - level) + self.link.bad(rejected - level)
        else:
            losses = self._compared(pairs)
        return self.weight(pairs) * losses + self.regulariser(chosen, rejected, pairs)

    def _compared(self, pairs: Pairs) -> PerPair:
        assert not isinstance(self.link, Verdict) and not hasattr(self.comparison, "level")
        margins, pair = self.comparison(self.margin, pairs)  # type: ignore[operator]
        found = self.link(margins - self.margin.offset - pairs.margins[pair], pairs.probability[pair])
        counts = torch.bincount(pair, minlength=len(pairs.margins))
        return found.new_zeros(len(pairs.margins)).index_add(0, pair, found) / counts

    def _level(self, pairs: Pairs) -> Scalar:
        level: Tensor = self.comparison.level(self.margin, pairs)  # type: ignore[union-attr]
        return level

    def loss(self, pairs: Pairs) -> Scalar:
        """The part of the batch's loss that these pairs, or labelled answers, contribute."""
        if pairs.paired:
            return (pairs.weights * self.each(pairs)).sum()
        good, bad = self._sides(pairs)
        return (pairs.chosen.weights * good).sum() + (pairs.rejected.weights * bad).sum()

    def _sides(self, pairs: Pairs) -> tuple[Tensor, Tensor]:
        """The losses of good and of bad answers, [N] and [M]."""
        assert isinstance(self.link, Verdict), self.check(paired=False)
        level = self._level(pairs)
        return self.link.good(self.margin(pairs.chosen) - level), self.link.bad(self.margin(pairs.rejected) - level)

    def slopes(self, pairs: Pairs) -> Pairs:
        """∂loss/∂ of every statistic that the policy moves, in its place: fixed on the whole batch, they make its parts exact (`pull`)."""
        free = {
            (side, name): getattr(getattr(pairs, side), name).detach().requires_grad_() for side in ("chosen", "rejected") for name in MOVED
        }

        def filled(values: dict[tuple[str, str], Tensor]) -> Pairs:
            sides: dict[str, Answers] = {
                side: replace(getattr(pairs, side), **{name: values[side, name] for name in MOVED}) for side in ("chosen", "rejected")
            }
            return replace(pairs, chosen=sides["chosen"], rejected=sides["rejected"])

        with torch.enable_grad():
            found = torch.autograd.grad(self.loss(filled(free)), list(free.values()), allow_unused=True, materialize_grads=True)
        return filled(dict(zip(free, found, strict=True)))

    def advance(self, pairs: Pairs) -> Preference:
        """The row for the next batch: what its comparison remembers of this one (a running mean); most remember nothing."""
        after = getattr(self.comparison, "after", None)
        return self if after is None else replace(self, comparison=after(self.margin, pairs))

    @torch.no_grad()
    def metrics(self, pairs: Pairs) -> Metrics:
        """Accuracy (a tie is half right), margin and rewards of these pairs, as (sum, weight); of labelled answers how many lie on the right side."""
        chosen, rejected = self.margin(pairs.chosen), self.margin(pairs.rejected)
        found = {"rewards/chosen": chosen, "rewards/rejected": rejected}
        if pairs.paired:
            gap = chosen - rejected
            found |= {"loss": self.each(pairs), "accuracy": _right(gap), "margin": gap}
        else:
            level = self._level(pairs)
            found |= {"loss": torch.cat(self._sides(pairs)), "accuracy": torch.cat([_right(chosen - level), _right(level - rejected)])}
        if self.apart:
            found["baseline"] = self._level(pairs)[None]
        return {f"preference/{name}": (x.sum(), x.new_tensor(len(x))) for name, x in found.items()}


def _right(gap: Tensor) -> Tensor:
    """1 where above 0, .5 at 0."""
    return (gap > 0).to(gap) + 0.5 * (gap == 0).to(gap)


def _impossible(row: Preference) -> list[str]:
    """Why these pieces make no row, in the user's words."""
    margin, link, comparison = (type(piece).__name__ for piece in (row.margin, row.link, row.comparison))
    problems = []
    if row.apart != hasattr(row.comparison, "level"):
        wanted = "zero, mismatched_kl or running_mean" if row.apart else "pair, sorted_answers, sorted_margins or span"
        how = "judges answers one by one, against a baseline" if row.apart else "judges the margin of two answers"
        problems.append(f"{link} {how}: set comparison to {wanted}, not {comparison}")
    if row.apart and row.margin.offset:
        problems.append(f"{link} judges answers one by one, so the offset {row.margin.offset:g} of {margin} would do nothing: set it to 0")
    if isinstance(row.comparison, (SortedMargins, MismatchedKL)) and "reference" not in row.margin.needs:
        problems.append(f"{comparison} compares with the reference, and {margin} reads none: set margin to implicit_reward")
    if isinstance(row.comparison, MismatchedKL) and "heads" in row.margin.needs:
        problems.append(
            f"{comparison} reads answers that stand in no pair, so they have no other length to be cut at: set the tail of {margin} to 1"
        )
    if row.margin.reads == "score":
        likely = [piece for piece in (row.regulariser, row.weight) if isinstance(piece, (ChosenNLL, Confidence))]
        problems += [f"{piece!r} reads the likelihood of answers, and {margin} is a reward model's score: leave it out" for piece in likely]
    elif isinstance(row.comparison, DivergentSpan):
        problems.append(
            f"{comparison} reads a reward model's score at every position, and {margin} has one reward per answer: set margin to score"
        )
    return problems
