"""Categorical distributions over the vocabulary: log-probabilities, entropy, exact KL, its sampled estimators, and a chunked vocabulary head."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from tilt.shapes import ActionIndex, PerAction

BatchLogits = Float[Tensor, "*batch V"]
Batch = Float[Tensor, "*batch"]
BatchActions = Int[Tensor, "*batch"]
ActionHidden = Float[Tensor, "A D"]

SMALL = 2**24
"""Actions times vocabulary up to which the logits are kept for the backward pass (64 MiB in float32)."""


def logprobs(logits: BatchLogits, actions: BatchActions) -> Batch:
    """log softmax(logits)[action]."""
    return logits.gather(-1, actions.unsqueeze(-1)).squeeze(-1) - logits.logsumexp(-1)


def entropy(logits: BatchLogits) -> Batch:
    """-sum_v p_v log p_v; a logit of -inf contributes nothing."""
    finite = logits.masked_fill(logits == -torch.inf, 0)
    return logits.logsumexp(-1) - (logits.softmax(-1) * finite).sum(-1)


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


def score_actions(
    hidden: ActionHidden, head: Callable[[Tensor], Tensor], actions: ActionIndex, *, temperature: float, entropy: bool, chunk: int
) -> tuple[PerAction, PerAction]:
    """Log-probabilities of the actions, and entropies (NaN where not asked for), under softmax(head(hidden) / temperature).

    The head runs on `chunk` actions at a time; with gradients and more than SMALL logits each chunk is recomputed in the
    backward pass, so that the logits [A, V] never exist at once. The softmax is float32 at least, float64 for a float64 head.
    """
    assert temperature > 0 and chunk > 0

    def score(part: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
        logits = head(part)
        logits = (logits if logits.dtype == torch.float64 else logits.float()) / temperature
        found = logprobs(logits, chosen)
        return found, _entropy(logits) if entropy else torch.full_like(found, torch.nan).detach()

    if len(actions) == 0:
        return score(hidden, actions)
    recompute = torch.is_grad_enabled() and len(actions) * _width(head, hidden) > SMALL
    parts = [
        checkpoint(score, h, a, use_reentrant=False) if recompute else score(h, a)
        for h, a in zip(torch.split(hidden, chunk), torch.split(actions, chunk), strict=True)
    ]
    return torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])


_entropy = entropy  # the function, where a parameter has its name


def _width(head: Callable[[Tensor], Tensor], hidden: Tensor) -> int:
    """Size of the vocabulary, from one row."""
    with torch.no_grad():
        return head(hidden[:1]).shape[-1]
