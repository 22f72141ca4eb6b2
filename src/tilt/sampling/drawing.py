"""One token per row from its logits and one uniform: the inverse of the cumulative distribution; greedy; top-k, top-p, min-p; inside a mask."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import log
from typing import NamedTuple

import torch
from torch import Tensor

from tilt.data.rollouts import Sampling
from tilt.kept import Kept

SCORES = 2**23  # vocabulary scores in memory at once: rows are drawn in parts of so many
BLOCK = 512  # tokens whose mass is summed together where a vocabulary is searched in two steps

Head = Callable[[Tensor], Tensor]


class Drawn(NamedTuple):
    """The next token of each row, its log-probability, and what it was drawn among where that is to be kept."""

    tokens: Tensor
    logprobs: Tensor
    kept: Kept | None = None


def choose(
    head: Head, hidden: Tensor, vocabulary: int, uniforms: Tensor, sampling: Sampling, allowed: Callable[[Tensor], Tensor] | None = None
) -> Drawn:
    """The next token of each row from hidden states [rows, D], a part of the rows at a time where the vocabulary is large.

    `allowed` gives the mask [rows, V] of the tokens that may be drawn; with it, or with `sampling.keep_sets`, the sets come back.
    """
    rows = max(1, SCORES // vocabulary)
    if not sampling.keep_sets and allowed is None:
        if len(hidden) <= rows:
            return Drawn(*draw(head(hidden), uniforms, sampling))
        parts = [draw(head(h), u, sampling) for h, u in zip(hidden.split(rows), uniforms.split(rows), strict=True)]
        return Drawn(torch.cat([tokens for tokens, _ in parts]), torch.cat([logprobs for _, logprobs in parts]))
    found = [
        draw_kept(head(h), u, sampling, None if allowed is None else allowed(h))
        for h, u in zip(hidden.split(rows), uniforms.split(rows), strict=True)
    ]
    tokens, logprobs, kept = zip(*found, strict=True)
    return Drawn(torch.cat(tokens), torch.cat(logprobs), Kept.join(kept))


def draw(logits: Tensor, uniforms: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """Tokens [rows] chosen from logits [rows, vocabulary] with uniforms [rows] (float64), and their log-probabilities.

    A log-probability is the token's under the whole distribution at the temperature (temperature 1 for greedy), also where truncation
    narrowed the choice. Rows whose logits are not finite come back with a log-probability that is not finite.
    """
    if sampling.temperature and not sampling.truncated:
        mass = tempered(logits, sampling.temperature).softmax(-1)
        tokens = invert(mass, uniforms)
        return tokens, mass.gather(-1, tokens[:, None])[:, 0].log()
    logprobs = whole(logits, sampling.temperature)
    if sampling.temperature == 0:
        tokens = logits.argmax(-1)
    else:
        kept = truncate(logprobs, sampling.top_k, sampling.top_p, sampling.min_p)
        tokens = invert(kept.exp(), uniforms)
    return tokens, logprobs.gather(-1, tokens[:, None])[:, 0]


def draw_kept(logits: Tensor, uniforms: Tensor, sampling: Sampling, allowed: Tensor | None) -> Drawn:
    """The same from the tokens that truncation leaves of the allowed ones: log-probabilities of that distribution, renormalised, and its sets."""
    logprobs = whole(logits, sampling.temperature)
    if allowed is not None:
        logprobs = logprobs.masked_fill(~allowed, -torch.inf)
    kept = truncate(logprobs, sampling.top_k, sampling.top_p, sampling.min_p)
    tokens = invert(kept.exp(), uniforms)
    return Drawn(tokens, kept.log_softmax(-1).gather(-1, tokens[:, None])[:, 0], Kept.among(kept > -torch.inf))


def whole(logits: Tensor, temperature: float) -> Tensor:
    """log softmax(logits / temperature), in float32 at least; temperature 0 stands for 1 here."""
    return tempered(logits, temperature).log_softmax(-1)


def tempered(logits: Tensor, temperature: float) -> Tensor:
    """logits / temperature, in float32 at least; temperature 0 stands for 1 here."""
    scores = logits if logits.dtype == torch.float64 else logits.float()
    return scores if temperature in (0.0, 1.0) else scores / temperature


def invert(mass: Tensor, uniforms: Tensor) -> Tensor:
    """The first index at which the cumulated mass [rows, vocabulary] exceeds u · total, so that no index of mass 0 is ever chosen; sums in float64.

    A large vocabulary is searched in two steps: first the block of tokens by the blocks' sums, then the token inside it.
    """
    rows, vocabulary = mass.shape
    if vocabulary <= 8 * BLOCK:
        cumulative = mass.cumsum(-1, dtype=torch.float64)
        return search(cumulative, uniforms * cumulative[:, -1])
    blocks = vocabulary // BLOCK
    sums = mass[:, : blocks * BLOCK].view(rows, blocks, BLOCK).sum(-1, dtype=torch.float64)
    sums = torch.cat((sums, mass[:, blocks * BLOCK :].sum(-1, keepdim=True, dtype=torch.float64)), -1)
    cumulative = sums.cumsum(-1)
    target = uniforms * cumulative[:, -1]
    block = search(cumulative, target)[:, None]
    rest = (target[:, None] - cumulative.gather(-1, block) + sums.gather(-1, block)).clamp(min=0)[:, 0]
    index = block * BLOCK + torch.arange(BLOCK, device=mass.device)
    inside = mass.gather(-1, index.clamp(max=vocabulary - 1)).masked_fill(index >= vocabulary, 0)
    last = torch.where(inside > 0, index, 0).amax(-1)  # where rounding left the target at the block's very end
    return torch.minimum(search(inside.cumsum(-1, dtype=torch.float64), rest) + block[:, 0] * BLOCK, last)


def search(cumulative: Tensor, target: Tensor) -> Tensor:
    """The first index [rows] whose cumulated mass exceeds the row's target."""
    return torch.searchsorted(cumulative, target[:, None], right=True)[:, 0].clamp(max=cumulative.shape[1] - 1)


def truncate(logprobs: Tensor, top_k: int, top_p: float, min_p: float = 0.0) -> Tensor:
    """Log-probabilities with -inf outside the top_k most likely tokens, then outside the smallest set of those that holds top_p of their mass,
    and wherever a token is less than min_p times as likely as the likeliest."""
    if top_k or top_p < 1:
        logprobs = likeliest(logprobs, top_k, top_p)
    return logprobs if not min_p else logprobs.masked_fill(logprobs < logprobs.amax(-1, keepdim=True) + log(min_p), -torch.inf)


def likeliest(logprobs: Tensor, top_k: int, top_p: float) -> Tensor:
    """The top-k and top-p part of `truncate`: the top_k alone are sorted, or all where top_k leaves none out."""
    some = 0 < top_k < logprobs.shape[-1]
    best, ids = torch.topk(logprobs, top_k) if some else torch.sort(logprobs, descending=True, stable=True)
    if top_p < 1:
        mass = best.softmax(-1)
        best = best.masked_fill(mass.cumsum(-1) - mass >= top_p, -torch.inf)
    return torch.full_like(logprobs, -torch.inf).scatter_(-1, ids, best)


def nucleus(logits: Tensor, temperature: float, top_p: float, always: Sequence[int]) -> Tensor:
    """The mask [rows, V] of the smallest set that holds top_p of the mass at the temperature, with the tokens `always` in it."""
    allowed = truncate(whole(logits, temperature), 0, top_p) > -torch.inf
    allowed[:, list(always)] = True
    return allowed
