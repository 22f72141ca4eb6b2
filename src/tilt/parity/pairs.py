"""Pairs of padded answers as DeepSpeed-Chat compares them: the divergent span of its reward model, the label mask of its DPO step."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import logsigmoid

from tilt.errors import UsageError
from tilt.shapes import Scalar

PairTokens = Int[Tensor, "N L"]
PairScores = Float[Tensor, "N L"]
PairMask = Bool[Tensor, "N L"]
PerPair = Float[Tensor, "N"]


@dataclass(frozen=True)
class PairQuirks:
    """`pads_in_span`: the span runs to the end of the longer answer, through the shorter one's pads. `prefix_masked`: the common beginning is
    left out of the summed log-probabilities, which changes the reported rewards and not the loss. Both off is the corrected mode."""

    pads_in_span: bool = False
    prefix_masked: bool = False


DEEPSPEED_PAIRS = PairQuirks(pads_in_span=True, prefix_masked=True)


@dataclass(frozen=True)
class PairSpan:
    """Where the answers of a pair part, and where each ends (one past its last token), [N] each."""

    start: Int[Tensor, "N"]
    chosen: Int[Tensor, "N"]
    rejected: Int[Tensor, "N"]

    def mask(self, length: int, quirks: PairQuirks = DEEPSPEED_PAIRS) -> PairMask:
        """Positions that are compared: from where the answers part to the end of the longer one; corrected, to the end of the shorter one,
        or the two ends where one answer continues the other (no position)."""
        end = torch.maximum(self.chosen, self.rejected) if quirks.pads_in_span else torch.minimum(self.chosen, self.rejected)
        slots = torch.arange(length, device=end.device)[None]
        return (slots >= self.start[:, None]) & (slots < end[:, None])


def span_of(chosen: PairTokens, rejected: PairTokens, pad: int, padding_at_beginning: int = 0) -> PairSpan:
    """d = first token that differs; ends = the (padding_at_beginning + 1)-th pad of each, or the length. Equal pairs: the last position alone.

    1 2 3 P against 1 4 P P → start 1, ends 3 and 2.
    """
    length = chosen.shape[1]

    def end_of(ids: PairTokens) -> Tensor:
        reached = (ids == pad).long().cumsum(1) > padding_at_beginning
        return torch.where(reached.any(1), reached.long().argmax(1), length)

    differs = chosen != rejected
    parted = differs.any(1)
    start = torch.where(parted, differs.long().argmax(1), length - 1)
    if bool((start == 0).any()):
        raise UsageError("span_of: the answers of a pair differ in their first token, so they share no prompt")
    ends = torch.where(parted, end_of(chosen), length), torch.where(parted, end_of(rejected), length)
    return PairSpan(start, *ends)


def span_loss(chosen: PairScores, rejected: PairScores, span: PairSpan, quirks: PairQuirks = DEEPSPEED_PAIRS) -> Scalar:
    """mean_i mean_{t in span} -log sigmoid(s^c_t - s^r_t)."""
    mask = span.mask(chosen.shape[1], quirks)
    each = -logsigmoid(torch.where(mask, chosen - rejected, 0))
    ends = -logsigmoid(torch.sub(*end_scores(chosen, rejected, span)))
    count = mask.sum(1)
    return torch.where(count > 0, torch.where(mask, each, 0).sum(1) / count.clamp(min=1), ends).mean()


def end_scores(chosen: PairScores, rejected: PairScores, span: PairSpan) -> tuple[PerPair, PerPair]:
    """The scores at the last token of each answer, by which it is judged."""
    found = (s.gather(1, (end - 1)[:, None])[:, 0] for s, end in ((chosen, span.chosen), (rejected, span.rejected)))
    return next(found), next(found)


def label_mask(ids: PairTokens, other: PairTokens, pad: int, prompt: int, quirks: PairQuirks = DEEPSPEED_PAIRS) -> PairMask:
    """Tokens whose log-probabilities are summed: no pads, and nothing before the first token that differs from the other answer
    (equal pairs keep everything); corrected, nothing of the `prompt` first tokens."""
    slots = torch.arange(ids.shape[1], device=ids.device)[None]
    differs = ids != other
    start = torch.where(differs.any(1), differs.long().argmax(1), 0)[:, None] if quirks.prefix_masked else prompt
    return (ids != pad) & (slots >= start)


def summed_logprobs(logits: Float[Tensor, "N L V"], ids: PairTokens, mask: PairMask) -> PerPair:
    """sum over the mask of log p(token | tokens before it): logits shifted by one, gathered, masked, summed."""
    logprobs = logits[:, :-1].log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0]
    return torch.where(mask[:, 1:], logprobs, 0).sum(1)


def dpo_loss(
    policy: tuple[PerPair, PerPair], reference: tuple[PerPair, PerPair], *, beta: float = 0.1, smoothing: float = 0.0
) -> tuple[Scalar, PerPair, PerPair]:
    """Mean of -(1 - e) log sigmoid(h) - e log sigmoid(-h), and the rewards beta log(policy / reference) of chosen and rejected answers,
    from the summed log-probabilities of (chosen, rejected)."""
    chosen, rejected = (beta * (log - anchor) for log, anchor in zip(policy, reference, strict=True))
    margin = chosen - rejected
    return (-(1 - smoothing) * logsigmoid(margin) - smoothing * logsigmoid(-margin)).mean(), chosen, rejected
