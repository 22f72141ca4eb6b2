"""One token per row from its logits and one uniform: the inverse of the cumulative distribution; greedy, top-k and top-p for evaluation."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tilt.data.rollouts import Sampling

SCORES = 2**23  # vocabulary scores in memory at once: rows are drawn in parts of so many


def choose(
    head: Callable[[Tensor], Tensor], hidden: Tensor, vocabulary: int, uniforms: Tensor, sampling: Sampling
) -> tuple[Tensor, Tensor]:
    """The next token of each row from hidden states [rows, D], and its log-probability, a part of the rows at a time where the vocabulary is large."""
    rows = max(1, SCORES // vocabulary)
    if len(hidden) <= rows:
        return draw(head(hidden), uniforms, sampling)
    parts = [draw(head(h), u, sampling) for h, u in zip(hidden.split(rows), uniforms.split(rows), strict=True)]
    return torch.cat([tokens for tokens, _ in parts]), torch.cat([logprobs for _, logprobs in parts])


def draw(logits: Tensor, uniforms: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """Tokens [rows] chosen from logits [rows, vocabulary] with uniforms [rows] (float64), and their log-probabilities.

    A log-probability is the token's under the whole distribution at the temperature (temperature 1 for greedy), also where top-k or top-p
    narrowed the choice. Rows whose logits are not finite come back with a log-probability that is not finite.
    """
    scores = logits if logits.dtype == torch.float64 else logits.float()
    if sampling.temperature not in (0.0, 1.0):
        scores = scores / sampling.temperature
    logprobs = scores.log_softmax(-1)
    if sampling.temperature == 0:
        tokens = scores.argmax(-1)
    else:
        kept = logprobs if not sampling.truncated else truncate(logprobs, sampling.top_k, sampling.top_p)
        tokens = invert(kept.exp().cumsum(-1, dtype=torch.float64), uniforms)
    return tokens, logprobs.gather(-1, tokens[:, None])[:, 0]


def invert(cumulative: Tensor, uniforms: Tensor) -> Tensor:
    """The first index whose cumulative mass exceeds u · total, so that no index of probability 0 is ever chosen."""
    target = uniforms * cumulative[:, -1]
    return torch.searchsorted(cumulative, target[:, None], right=True)[:, 0].clamp(max=cumulative.shape[1] - 1)


def truncate(logprobs: Tensor, top_k: int, top_p: float) -> Tensor:
    """Log-probabilities with -inf outside the top_k most likely tokens, and then outside the smallest set of those that holds top_p of their mass."""
    order = torch.sort(logprobs, dim=-1, descending=True, stable=True)
    best = order.values
    if 0 < top_k < best.shape[1]:
        best = best.masked_fill(torch.arange(best.shape[1], device=best.device) >= top_k, -torch.inf)
    if top_p < 1:
        mass = best.softmax(-1)
        best = best.masked_fill(mass.cumsum(-1) - mass >= top_p, -torch.inf)
    return torch.empty_like(logprobs).scatter_(-1, order.indices, best)
