"""Learning from judged answers: what a policy or a reward model says of them, and the step that a preference row asks for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Protocol

import torch
from torch import Tensor

from tilt.errors import UsageError
from tilt.learning.judged import Judged, Laid, lay, portions
from tilt.learning.learner import NonFinite
from tilt.learning.meter import Meter
from tilt.models import compat
from tilt.models.policy import Policy, RewardModel
from tilt.objectives import Answers, Pairs, Preference, Span, pull
from tilt.optim.optimizers import Optimizer
from tilt.segments import Layout, segment_mean, segment_sum, spread

NOTHING: Mapping[str, Tensor] = MappingProxyType({})
Precision = Callable[[], AbstractContextManager[object]]


class Reader(Protocol):
    """What a model says of laid-out answers, in one or several views (a reward model's score at the end, and its mean along the answer).

    `padding` is the token with which shorter answers are to be lengthened, -1 for none.
    """

    @property
    def padding(self) -> int: ...

    @property
    def device(self) -> torch.device: ...

    def look(self, laid: Laid) -> Tensor:
        """What the model itself says: log-probabilities of the actions [A], or scores."""
        ...

    def views(self, laid: Laid, said: Tensor) -> list[Pairs]:
        """The comparisons, from what `look` gave."""
        ...

    def __call__(self, laid: Laid) -> list[Pairs]: ...


# --- readers --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Likelihoods:
    """A policy's log-probabilities of answers, summed over their actions, with what `needs` names besides (heads, confidence)."""

    policy: Policy
    needs: frozenset[str] = frozenset()
    padding: int = -1

    @property
    def device(self) -> torch.device:
        return compat.device_of(self.policy)

    def __call__(self, laid: Laid) -> list[Pairs]:
        return self.views(laid, self.look(laid))

    def look(self, laid: Laid) -> Tensor:
        return _exact(self.policy(laid.pack).logprobs)

    def views(self, laid: Laid, said: Tensor) -> list[Pairs]:
        layout, logprobs = laid.pack.layout, said
        total, lengths = segment_sum(logprobs, layout), layout.lengths.to(logprobs)
        known = {"lengths": lengths}
        if "confidence" in self.needs:
            known["confidence"] = segment_mean(logprobs.detach() - _exact(self.policy.collisions(laid.pack)), layout)
        sides = [{name: x[side] for name, x in known.items()} for side in (laid.chosen, laid.rejected)]
        if "heads" in self.needs and laid.paired:
            short = torch.minimum(lengths[laid.chosen], lengths[laid.rejected])
            for side, given in zip((laid.chosen, laid.rejected), sides, strict=True):
                given["heads"] = head_sums(logprobs, layout, side, short)
        return [pairs_of(laid, total, *sides)]


@dataclass(frozen=True)
class EndScores:
    """A reward model's score at the last token; with `along` also the mean of the scores read after every token of the answer, as a second view."""

    model: RewardModel
    along: bool = False
    padding: int = -1

    @property
    def device(self) -> torch.device:
        return compat.device_of(self.model)

    def __call__(self, laid: Laid) -> list[Pairs]:
        return self.views(laid, self.look(laid))

    def look(self, laid: Laid) -> Tensor:
        """The score of each sequence [S]; `along` that read after every token of the pack [T]."""
        return _exact(self.model.everywhere(laid.pack) if self.along else self.model(laid.pack))

    def views(self, laid: Laid, said: Tensor) -> list[Pairs]:
        if not self.along:
            return [pairs_of(laid, said)]
        layout, tokens = token_layout(laid)
        return [pairs_of(laid, said[laid.last]), pairs_of(laid, segment_mean(said[tokens], layout))]


@dataclass(frozen=True)
class SpanScores:
    """A reward model's score at the last token, and at every position from the first difference of a pair to the end of its longer answer.

    The shorter answer goes on with `padding` to the length of the longer one (DeepSpeed-Chat); the score at its end is read before that.
    """

    model: RewardModel
    padding: int

    @property
    def device(self) -> torch.device:
        return compat.device_of(self.model)

    def __call__(self, laid: Laid) -> list[Pairs]:
        return self.views(laid, self.look(laid))

    def look(self, laid: Laid) -> Tensor:
        """The score read after every token of the pack [T]."""
        return _exact(self.model.everywhere(laid.pack))

    def views(self, laid: Laid, said: Tensor) -> list[Pairs]:
        everywhere = said
        first = (laid.last + 1).tolist()  # one past the end of each answer
        chosen: list[int] = []
        rejected: list[int] = []
        owner: list[int] = []
        for number, (a, b) in enumerate(zip(laid.chosen.tolist(), laid.rejected.tolist(), strict=True)):
            steps = divergent_span(laid.answers[a], laid.answers[b])
            chosen += [first[a] - len(laid.answers[a]) + t for t in steps]
            rejected += [first[b] - len(laid.answers[b]) + t for t in steps]
            owner += [number] * len(steps)
        at = [torch.tensor(index, dtype=torch.long, device=everywhere.device) for index in (chosen, rejected, owner)]
        (pairs,) = [pairs_of(laid, everywhere[laid.last])]
        return [replace(pairs, span=Span(everywhere[at[0]], everywhere[at[1]], at[2]))]


def divergent_span(chosen: Sequence[int], rejected: Sequence[int]) -> range:
    """Positions from the first at which two answers differ to the end of the longer one: 5 6 7 E, 5 8 E → 1 2 3. Equal answers have their last alone."""
    longest = max(len(chosen), len(rejected))
    parting = next((t for t, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), min(len(chosen), len(rejected)))
    return range(min(parting, longest - 1), longest)


def _exact(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def head_sums(x: Tensor, layout: Layout, sequences: Tensor, limit: Tensor) -> Tensor:
    """Sum of x over the first `limit` actions of each of these sequences: 1 2 3 | 4 5, limits 2 2 → 3 9."""
    own = layout.take(sequences)
    return segment_sum(torch.where(own.positions < spread(limit, own), x[layout.actions_of(sequences)], 0), own)


def token_layout(laid: Laid) -> tuple[Layout, Tensor]:
    """Every token of each answer, padding left out, as ragged runs, and where they are in the pack."""
    lengths = torch.tensor([len(answer) for answer in laid.answers], device=laid.last.device)
    layout = Layout(torch.repeat_interleave(torch.arange(len(lengths), device=lengths.device), lengths), laid.pack.layout.prompt)
    return layout, (laid.last - lengths + 1)[layout.sequence] + layout.positions


def pairs_of(laid: Laid, scores: Tensor, chosen: Mapping[str, Tensor] = NOTHING, rejected: Mapping[str, Tensor] = NOTHING) -> Pairs:
    """The comparisons of laid-out answers with these scores [S], and what else is known of either side."""
    return Pairs.of(
        Answers.of(scores[laid.chosen], weights=laid.weights.to(scores), **chosen),
        Answers.of(scores[laid.rejected], weights=laid.against.to(scores), **rejected),
        margins=laid.margins, probability=laid.probability, paired=laid.paired,
    )  # fmt: skip


# --- reading and updating -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Anchors:
    """What the reference says of every comparison of a data set, and of its mismatched answers; `ends` [E + 1, 3] is where each example's begin.

    `said` has for each example its log-probabilities of the actions of all its answers.
    """

    pairs: Pairs
    mismatched: Tensor
    ends: Tensor
    said: tuple[Tensor, ...] = ()

    def of(self, examples: Sequence[int]) -> Anchors:
        """Those of these examples, in this order."""
        picked = [
            torch.cat([torch.arange(int(self.ends[e, kind]), int(self.ends[e + 1, kind])) for e in examples])
            if examples
            else torch.zeros(0).long()
            for kind in range(3)
        ]
        each = torch.stack([self.ends[e + 1] - self.ends[e] for e in examples]) if examples else self.ends.new_zeros(0, 3)
        ends = torch.cat([each.new_zeros(1, 3), each.cumsum(0)])
        return Anchors(self.pairs.take(picked[0], picked[1]), self.mismatched[picked[2]], ends, tuple(self.said[e] for e in examples))


def counts(example: Judged) -> tuple[int, int, int]:
    """How many chosen, rejected and mismatched answers an example brings to its batch."""
    if not example.paired:
        return int(example.good), int(not example.good), len(example.mismatched)
    pairs = len(example.answers) * (len(example.answers) - 1) // 2
    return pairs, pairs, len(example.mismatched)


def read_anchors(reader: Reader, examples: Sequence[Judged], micro_tokens: int, autocast: Precision = nullcontext) -> Anchors:
    """The first view of the reference, without gradient, on the CPU."""
    said: list[Tensor] = []
    (pairs, *_) = read(reader, examples, micro_tokens, autocast, said)
    ends = torch.tensor([(0, 0, 0), *map(counts, examples)]).cumsum(0)
    sizes = [sum(len(answer.tokens) for answer in example.answers) for example in examples]
    return Anchors(
        pairs.to("cpu"), read_mismatched(reader, examples, micro_tokens, autocast).scores.cpu(), ends, torch.cat(said).cpu().split(sizes)
    )


def read(
    reader: Reader, examples: Sequence[Judged], micro_tokens: int, autocast: Precision = nullcontext, keep: list[Tensor] | None = None
) -> list[Pairs]:
    """Every view of a whole batch or data set, without gradient; what the model itself says is added to `keep`."""
    views = []
    with torch.no_grad():
        for part in portions(examples, micro_tokens):
            with autocast():
                laid = lay([examples[i] for i in part], len(examples), padding=reader.padding).to(reader.device)
                said = reader.look(laid)
                views.append(reader.views(laid, said))
            if keep is not None:
                keep.append(said)
    return [Pairs.join(view) for view in zip(*views, strict=True)]


def read_mismatched(reader: Reader, examples: Sequence[Judged], micro_tokens: int, autocast: Precision = nullcontext) -> Answers:
    """The mismatched answers of all examples, in order, without gradient."""
    others = [Judged((answer,)) for example in examples for answer in example.mismatched]
    return read(reader, others, micro_tokens, autocast)[0].chosen if others else Answers.of(torch.zeros(0, device=reader.device))


def held_against(pairs: Pairs, anchors: Anchors | None) -> Pairs:
    """Pairs with the reference's statistics beside the policy's."""
    if anchors is None:
        return pairs
    other = anchors.pairs.to(pairs.margins.device)
    sides = [
        replace(own, reference=ref.scores.to(own.scores), reference_heads=ref.heads.to(own.scores))
        for own, ref in ((pairs.chosen, other.chosen), (pairs.rejected, other.rejected))
    ]
    return replace(pairs, chosen=sides[0], rejected=sides[1])


def whole_batch(
    reader: Reader, row: Preference, examples: Sequence[Judged], anchors: Anchors | None, micro_tokens: int, autocast: Precision = nullcontext
) -> list[Pairs]:  # fmt: skip
    """Every view of these examples beside the reference, mismatched answers included, without gradient: what the row's metrics read."""
    others = _mismatched(reader, row, examples, anchors, micro_tokens, autocast)
    return [replace(held_against(view, anchors), mismatched=others) for view in read(reader, examples, micro_tokens, autocast)]


def _mismatched(
    reader: Reader, row: Preference, examples: Sequence[Judged], anchors: Anchors | None, micro_tokens: int, autocast: Precision
) -> Answers:  # fmt: skip
    if "mismatched" not in row.needs or anchors is None:
        return Answers.of(torch.zeros(0, device=reader.device))
    found = read_mismatched(reader, examples, micro_tokens, autocast)
    return replace(found, reference=anchors.mismatched.to(found.scores))


def update_pairs(
    reader: Reader, optimizer: Optimizer, row: Preference, examples: Sequence[Judged], anchors: Anchors | None,
    *, views: Sequence[float] = (1.0,), micro_tokens: int, autocast: Precision = nullcontext,
) -> tuple[dict[str, float], Preference]:  # fmt: skip
    """One optimizer step on a batch, in micro-batches of whole examples; each view has its share `views` of the loss. Returns the metrics, which are
    those of the first view, and the row for the next batch.

    Where the row couples the pairs of a batch and there are several micro-batches, the batch is read once more, without gradient, for its slopes.
    """
    if anchors is None and "reference" in row.needs:
        raise UsageError(
            f"{type(row.margin).__name__} compares with a reference, and there is none: give its log-probabilities, or use a row without (simpo)"
        )
    others = _mismatched(reader, row, examples, anchors, micro_tokens, autocast)
    parts, lr = portions(examples, micro_tokens), optimizer.lr
    coupled = row.coupled and len(parts) > 1
    slopes = [row.slopes(view) for view in whole_batch(reader, row, examples, anchors, micro_tokens, autocast)] if coupled else []
    ends = torch.tensor([(0, 0, 0), *map(counts, examples)]).cumsum(0)
    seen: list[list[Pairs]] = []
    for part in parts:
        laid = lay([examples[i] for i in part], len(examples), padding=reader.padding).to(reader.device)
        near = None if anchors is None else anchors.of(part)
        with autocast():
            found = reader(laid)
        found = [replace(held_against(view, near), mismatched=others) for view in found]
        if coupled:
            place = [torch.arange(int(ends[part.start, side]), int(ends[part.stop, side])) for side in (0, 1)]
            losses = [pull(view, slope.take(*(x.to(reader.device) for x in place))) for view, slope in zip(found, slopes, strict=True)]
        else:
            losses = [row.loss(view) for view in found]
        loss = torch.stack([share * value for share, value in zip(views, losses, strict=True)]).sum()
        if not torch.isfinite(loss):
            finite = all(torch.isfinite(side.scores).all() for view in found for side in (view.chosen, view.rejected))
            raise NonFinite("the loss of the pairs" if finite else "the model's scores", laid.pack)
        loss.backward()  # type: ignore[no-untyped-call]
        seen.append([view.detach() for view in found])
    whole = [Pairs.join(view) for view in zip(*seen, strict=True)]
    total = torch.stack([share * row.loss(view) for share, view in zip(views, whole, strict=True)]).sum()
    norm = optimizer.step()
    if not torch.isfinite(norm):
        raise NonFinite("the gradient", laid.pack)
    return measured(row, whole[0]) | {"loss": float(total), "grad_norm": float(norm), "lr": lr}, row.advance(whole[0])


@dataclass(frozen=True)
class Asked:
    """A micro-batch before its step: what the model `said` (log-probabilities [A], or scores), and `push` = −∂loss/∂said, of the same shape."""

    laid: Laid
    said: Tensor
    push: Tensor


def asked(
    reader: Reader, row: Preference, examples: Sequence[Judged], anchors: Anchors | None,
    *, views: Sequence[float] = (1.0,), micro_tokens: int, autocast: Precision = nullcontext,
) -> list[Asked]:  # fmt: skip
    """What the step that `update_pairs` takes on this batch asks of each action, or of each score; nothing is learned and no gradient is left."""
    others = _mismatched(reader, row, examples, anchors, micro_tokens, autocast)
    parts, seen, found = portions(examples, micro_tokens), [], []
    for part in parts:
        laid = lay([examples[i] for i in part], len(examples), padding=reader.padding).to(reader.device)
        with torch.no_grad(), autocast():
            said = reader.look(laid)
        said = said.detach().requires_grad_()
        near = None if anchors is None else anchors.of(part)
        with autocast():
            seen.append([replace(held_against(view, near), mismatched=others) for view in reader.views(laid, said)])
        found.append((laid, said))
    whole = [Pairs.join(view) for view in zip(*seen, strict=True)]
    loss = torch.stack([share * row.loss(view) for share, view in zip(views, whole, strict=True)]).sum()
    slopes = torch.autograd.grad(loss, [said for _, said in found], allow_unused=True)
    pairs = zip(found, slopes, strict=True)
    return [Asked(laid, said.detach(), torch.zeros_like(said) if slope is None else -slope) for (laid, said), slope in pairs]


def measured(row: Preference, pairs: Pairs) -> dict[str, float]:
    """The row's metrics of a whole batch or data set; of labelled answers the margin is that of the two means."""
    meter = Meter()
    meter.add(row.metrics(pairs))
    found = {name.removeprefix("preference/"): value for name, value in meter.read().items()}
    if not pairs.paired and {"rewards/chosen", "rewards/rejected"} <= found.keys():
        found["margin"] = found["rewards/chosen"] - found["rewards/rejected"]
    return found
