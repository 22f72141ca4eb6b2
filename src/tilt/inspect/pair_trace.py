"""One step of a preference row, number by number, on the pairs of fixture P."""

from __future__ import annotations

import torch
from torch import Tensor

from tilt.errors import UsageError
from tilt.inspect.entries import Entry, Notebook
from tilt.inspect.fixtures import PairBatch
from tilt.objectives import Answers, Pairs, Preference
from tilt.objectives.card import words

KNOWN = frozenset({"reference", "heads"})
LIKELIHOOD = "tilt.learning.pairs:Likelihoods.__call__"


def answers(sums: Tensor, reference: Tensor, lengths: Tensor, other: Tensor) -> Answers:
    """One side of the pairs; within an answer every action has the same log-probability."""
    share = torch.minimum(lengths, other) / lengths
    return Answers.of(sums, reference=reference, lengths=lengths, heads=sums * share, reference_heads=reference * share)


def trace_pairs(row: Preference, batch: PairBatch, name: str) -> list[Entry]:
    """Every intermediate number of one step of this row, in the order in which an update computes them."""
    if row.needs - KNOWN or row.margin.reads == "score":
        more = "a reward model's scores" if row.margin.reads == "score" else " and ".join(sorted(row.needs - KNOWN))
        raise UsageError(
            f"{name} reads {more}, and fixture P has the log-probabilities and lengths of two pairs alone: trace dpo, ipo, simpo or another such row"
        )
    note = Notebook()
    chosen, rejected = batch.chosen.clone().requires_grad_(), batch.rejected.clone().requires_grad_()
    pairs = Pairs.of(
        answers(chosen, batch.reference_chosen, batch.chosen_lengths, batch.rejected_lengths),
        answers(rejected, batch.reference_rejected, batch.rejected_lengths, batch.chosen_lengths),
    )
    note("pairs", "N", Pairs.of, "2305.18290; 002:538", torch.tensor(float(len(chosen))), "batch")
    note.stage = "responses"
    for side, x in (("chosen", batch.chosen_lengths), ("rejected", batch.rejected_lengths)):
        note(f"length of the {side}", "n, the stop token included", Answers.of, "002:553 (pads are no actions)", x, "pair")
    note.stage = "experience"
    if "reference" in row.needs:
        for side, x in (("chosen", batch.reference_chosen), ("rejected", batch.reference_rejected)):
            note(f"reference of the {side}", "sum_t log p_reference", LIKELIHOOD, "002:549, 003:158", x, "pair")
    note.stage = "update"
    for side, x in (("chosen", chosen), ("rejected", rejected)):
        note(
            f"policy of the {side}",
            "sum_t log p_policy: a sum, since p(answer) is a product",
            LIKELIHOOD,
            "002:547-549, 002:609",
            x,
            "pair",
        )
    if "reference" in row.needs:
        for side, x, anchor in (("c", chosen, batch.reference_chosen), ("r", rejected, batch.reference_rejected)):
            note(side, "log policy - log reference", torch.sub, "2305.18290; 002:536", x - anchor, "pair")
    rewards = [row.margin(side) for side in (pairs.chosen, pairs.rejected)]
    for side, x in zip(("chosen", "rejected"), rewards, strict=True):
        note(f"reward of the {side}", words(row.margin), row.margin, "2305.18290; 002:536", x, "pair")
    if row.apart:
        level = row.comparison.level(row.margin, pairs)  # type: ignore[union-attr]
        note("baseline", words(row.comparison), row.comparison.level, "docs/algorithms.md", level, "batch")  # type: ignore[union-attr]
    else:
        margins, pair = row.comparison(row.margin, pairs)  # type: ignore[operator]
        h = margins - row.margin.offset - pairs.margins[pair]
        note(
            "h",
            words(row.comparison) + (f", less {row.margin.offset:g}" if row.margin.offset else ""),
            row.comparison,
            "2305.18290; 002:541-549 (the sign of 002:541 is reversed)",
            h,
            "pair",
        )
        note("P(chosen is better)", "sigmoid(h)", torch.sigmoid, "Bradley and Terry 1952; 002:541", h.sigmoid(), "pair")
    each = row.each(pairs)
    note("loss of each pair", words(row.link), Preference.each, "2305.18290; 002:547", each, "pair")
    loss = row.loss(pairs)
    note("loss", "mean over the pairs", Preference.loss, "002:547", loss, "batch")
    slopes = torch.autograd.grad(loss, (chosen, rejected))
    for side, slope in zip(("chosen", "rejected"), slopes, strict=True):
        note(
            f"push of the {side}",
            "-d loss / d log p_policy(answer): the weight of its gradient",
            torch.autograd.grad,
            "2305.18290 eq. 7",
            -slope,
            "pair",
        )
    for key, (total, weight) in row.metrics(pairs).items():
        note(key, "the metric of this name, docs/algorithms.md", Preference.metrics, "docs/algorithms.md", total / weight, "batch")
    return note.entries
