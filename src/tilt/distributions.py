"""Categorical distributions over the vocabulary: log-probabilities, entropy, exact KL, its sampled estimators, and a chunked vocabulary head."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from tilt import linear_head
from tilt.errors import UsageError
from tilt.kept import Kept
from tilt.shapes import ActionIndex, PerAction

BatchLogits = Float[Tensor, "*batch V"]
Batch = Float[Tensor, "*batch"]
BatchActions = Int[Tensor, "*batch"]
ActionHidden = Float[Tensor, "A D"]
OtherHidden = Float[Tensor, "A E"]

SMALL = 2**24
"""Actions times vocabulary up to which the logits are kept for the backward pass (64 MiB in float32)."""


def logprobs(logits: BatchLogits, actions: BatchActions) -> Batch:
    """log softmax(logits)[action]."""
    return logits.gather(-1, actions.unsqueeze(-1)).squeeze(-1) - logits.logsumexp(-1)


def entropy(logits: BatchLogits) -> Batch:
    """-sum_v p_v log p_v; a logit of -inf contributes nothing."""
    finite = logits.masked_fill(logits == -torch.inf, 0)
    return logits.logsumexp(-1) - (logits.softmax(-1) * finite).sum(-1)


def collision(logits: BatchLogits) -> Batch:
    """log sum_v p_v^2: the log-probability that two draws agree."""
    return (2 * logits).logsumexp(-1) - 2 * logits.logsumexp(-1)


def kl(logits_p: BatchLogits, logits_q: BatchLogits) -> Batch:
    """KL(p || q) = sum_v p_v (log p_v - log q_v), exact; inf where q excludes what p allows."""
    excluded = logits_p == -torch.inf
    gap = logits_p.log_softmax(-1).masked_fill(excluded, 0) - logits_q.log_softmax(-1).masked_fill(excluded, 0)
    return (logits_p.softmax(-1) * gap).sum(-1)


def k1(u: Tensor) -> Tensor:
    """u = log policy - log reference of a sampled action: unbiased for KL(policy || reference), of either sign."""
    return u


def k2(u: Tensor) -> Tensor:
    """u^2 / 2: biased in value; as a loss its expected gradient is that of KL(policy || reference)."""
    return 0.5 * u * u


def k3(u: Tensor) -> Tensor:
    """exp(-u) + u - 1 >= 0: unbiased in value; as a loss its expected gradient is that of KL(reference || policy)."""
    return torch.expm1(-u) + u


@dataclass(frozen=True)
class Anchor:
    """The distributions of another policy, as its hidden states before the actions and its head; they are rebuilt where they are needed.

    `direction` "to" measures KL(policy || anchor), "from" KL(anchor || policy). Nothing here receives a gradient.
    """

    hidden: OtherHidden
    head: Callable[[Tensor], Tensor]
    direction: Literal["to", "from"]


class Scores(NamedTuple):
    """What a vocabulary head says of actions, [A] each; NaN where it was not asked."""

    logprobs: PerAction
    entropy: PerAction
    kl: PerAction


def score_actions(
    hidden: ActionHidden,
    head: Callable[[Tensor], Tensor],
    actions: ActionIndex,
    *,
    temperature: float,
    entropy: bool,
    chunk: int,
    against: Anchor | None = None,
    kept: Kept | None = None,
) -> Scores:
    """Log-probabilities of the actions under softmax(head(hidden) / temperature); where asked for entropies, and the exact KL with an anchor.

    All three are of the distributions renormalised over each action's kept set, where there are some; the sets become a mask [chunk, V] for one
    chunk at a time. A head that is one matrix, without sets and without an anchor, goes a tile of logits at a time (`linear_head`). Other heads
    run on `chunk` actions at a time; with gradients and more than SMALL logits each chunk is recomputed in the backward pass. Either way the
    logits [A, V] never exist at once. The softmax is float32 at least, float64 for a float64 head.
    """
    assert temperature > 0 and chunk > 0
    if linear_head.fits(head) and against is None and not (kept is not None and kept.narrows):
        found, spread = linear_head.scores(hidden, head, actions, temperature=temperature, entropy=entropy)
        return Scores(found, spread, torch.full_like(found, torch.nan))

    def score(part: Tensor, chosen: Tensor, other: Tensor, sets: Kept | None) -> Scores:
        logits = _within(sets, _tempered(head(part), temperature))
        found = logprobs(logits, chosen)
        nan = torch.full_like(found, torch.nan)
        return Scores(
            found, _entropy(logits) if entropy else nan, nan if against is None else _kl_with(against, other, logits, sets, temperature)
        )

    others = hidden.new_zeros(len(actions), 0) if against is None else against.hidden
    if len(actions) == 0:
        return score(hidden, actions, others, None)
    recompute = torch.is_grad_enabled() and len(actions) * _width(head, hidden) > SMALL
    ragged = [torch.split(x, chunk) for x in (hidden, actions, others)]
    parts = [
        checkpoint(score, *part, use_reentrant=False) if recompute else score(*part)
        for part in zip(*ragged, _sets(kept, len(actions), chunk), strict=True)
    ]
    return Scores(*(torch.cat(each) for each in zip(*parts, strict=True)))


def _tempered(logits: Tensor, temperature: float) -> Tensor:
    return (logits if logits.dtype == torch.float64 else logits.float()) / temperature


def _within(sets: Kept | None, logits: Tensor) -> Tensor:
    return logits if sets is None else sets.restrict(logits)


def _kl_with(anchor: Anchor, hidden: Tensor, logits: Tensor, sets: Kept | None, temperature: float) -> Tensor:
    """Exact KL between policy and anchor in the anchor's direction, both within the same sets, with a gradient for the policy alone."""
    with torch.no_grad():
        other = _tempered(anchor.head(hidden), temperature)
    if other.shape != logits.shape:
        raise UsageError(
            f"exact KL compares whole distributions, but the policy's vocabulary has {logits.shape[-1]} entries and the other's {other.shape[-1]}.\n"
            "Name a reference with the same number, or use a penalty on the sampled tokens (k2, k3)."
        )
    other = _within(sets, other)
    return kl(logits, other) if anchor.direction == "to" else kl(other, logits)


_entropy = entropy  # the function, where a parameter has its name


def _sets(kept: Kept | None, actions: int, chunk: int) -> list[Kept | None]:
    """The kept sets of each chunk; None where nothing is left out."""
    starts = range(0, actions, chunk)
    return [None if kept is None or not kept.narrows else kept.part(i, min(i + chunk, actions)) for i in starts]


def _width(head: Callable[[Tensor], Tensor], hidden: Tensor) -> int:
    """Size of the vocabulary, from one row."""
    with torch.no_grad():
        return head(hidden[:1]).shape[-1]
