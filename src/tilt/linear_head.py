"""A vocabulary head that is one matrix: log-probabilities and entropies of actions with their gradients, a tile of logits at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

ROWS, COLUMNS = 1024, 4096
"""Actions and tokens of one tile of logits: 16 MiB in float32, about what a core's caches hold."""
KEPT = 2**24
"""Actions times vocabulary up to which log-probabilities are kept for the backward pass (64 MiB in float32) instead of computed again."""

_fused: ContextVar[bool] = ContextVar("fused", default=True)


@dataclass(frozen=True)
class LinearHead:
    """Hidden states [N, D] → scale · hidden · weightᵀ [N, V], by a layer without bias whose weights it reads when it is called."""

    layer: nn.Linear
    scale: float = 1.0

    def __call__(self, hidden: Tensor) -> Tensor:
        logits: Tensor = self.layer(hidden)
        return logits if self.scale == 1.0 else logits * self.scale


def fits(head: object) -> TypeGuard[LinearHead]:
    """Whether the tiles may be used: a head that is one matrix, and nobody has asked for the plain way."""
    return isinstance(head, LinearHead) and fused()


def fused() -> bool:
    """Whether operations with gradients of their own may be used: everywhere but inside `plain`."""
    return _fused.get()


@contextmanager
def without(switch: ContextVar[bool]) -> Iterator[None]:
    """Inside, this switch is off."""
    token = switch.set(False)
    try:
        yield
    finally:
        switch.reset(token)


def plain() -> AbstractContextManager[None]:
    """Inside, models and scores are computed from plain operations by autograd: what the others are tested against."""
    return without(_fused)


def scores(hidden: Tensor, head: LinearHead, actions: Tensor, *, temperature: float, entropy: bool) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the actions under softmax(head(hidden) / temperature), and entropies where asked for, NaN elsewhere; [A] each, float32 at least.

    The products run in the dtype of the autocast, where there is one; everything else in float32 at least. There is one derivative, not two.
    """
    weight, dtype = head.layer.weight, _dtype(hidden)
    with torch.autocast(hidden.device.type, enabled=False):
        return _Scores.apply(hidden.to(dtype), weight, actions, head.scale / temperature, entropy, dtype)  # type: ignore[no-any-return, no-untyped-call]


def _dtype(hidden: Tensor) -> torch.dtype:
    kind = hidden.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) and hidden.dtype != torch.float64 else hidden.dtype


class _Scores(torch.autograd.Function):
    """log p(a) = z_a - lse z and H = lse z - Σ p z for z = scale · W h; ∂log p(a)/∂z = 1_a - p, ∂H/∂z = -p (log p + H)."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, hidden: Tensor, weight: Tensor, actions: Tensor, scale: float, entropy: bool, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        matrix = weight.detach().to(dtype)
        trained = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        keep = trained and len(actions) * len(weight) <= KEPT
        kind = torch.float64 if dtype == torch.float64 else torch.float32
        chosen, lse, mean, kept = _read(hidden, matrix, actions, scale, entropy, kind, keep)
        logprobs = chosen - lse
        spread = lse - mean if entropy else torch.full_like(lse, math.nan)
        if trained:
            ctx.save_for_backward(hidden, weight, actions, lse, spread, *([] if kept is None else [kept]))
            ctx.scale, ctx.entropy, ctx.dtype = scale, entropy, dtype
        if not entropy:
            ctx.mark_non_differentiable(spread)
        return logprobs, spread

    @staticmethod
    def backward(ctx: Any, along: Tensor | None, across: Tensor | None) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError("the tiled head has one derivative: differentiate twice inside linear_head.plain()")
        hidden, weight, actions, lse, spread, *kept = ctx.saved_tensors
        matrix, scale = weight.to(ctx.dtype), ctx.scale
        slope = torch.zeros_like(lse) if along is None else along * scale
        bend = None if across is None or not ctx.entropy or not across.any() else across * scale
        wanted = ctx.needs_input_grad
        below = torch.zeros(hidden.shape, dtype=lse.dtype, device=hidden.device) if wanted[0] else None
        matrix_slope = torch.zeros(weight.shape, dtype=lse.dtype, device=weight.device) if wanted[1] else None
        for columns in _blocks(len(weight), COLUMNS):
            tile = matrix[columns]
            for rows in _blocks(len(actions), ROWS):
                part = hidden[rows]
                z = kept[0][rows, columns].clone() if kept else _product(part, tile, scale, lse.dtype)
                slopes = _slopes(z.sub_(lse[rows, None]), slope[rows], None if bend is None else bend[rows], spread[rows])
                at, place = _inside(actions[rows], columns)
                slopes[at, place] += slope[rows][at]
                slopes = slopes.to(ctx.dtype)
                if below is not None:
                    _add_product(below[rows], slopes, tile)
                if matrix_slope is not None:
                    _add_product(matrix_slope[columns], slopes.t(), part)
        found_below = None if below is None else below.to(hidden.dtype)
        return found_below, None if matrix_slope is None else matrix_slope.to(weight.dtype), None, None, None, None


def _read(
    hidden: Tensor, matrix: Tensor, actions: Tensor, scale: float, entropy: bool, kind: torch.dtype, keep: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """z_a, lse z, and Σ p z where the entropy is asked for, [A] each; z [A, V] where it is to be kept. One pass over the tiles, the running maximum subtracted."""
    count = len(hidden)
    kept = torch.empty(count, len(matrix), dtype=kind, device=hidden.device) if keep else None
    chosen, lse, mean = (torch.empty(count, dtype=kind, device=hidden.device) for _ in range(3))
    for rows in _blocks(count, ROWS):
        part = hidden[rows]
        top = torch.full((len(part),), -torch.inf, dtype=kind, device=hidden.device)
        mass, moment = torch.zeros_like(top), torch.zeros_like(top)
        for columns in _blocks(len(matrix), COLUMNS):
            z = _product(part, matrix[columns], scale, kind)
            at, place = _inside(actions[rows], columns)
            chosen[rows][at] = z[at, place]
            if kept is not None:
                kept[rows, columns] = z
            higher = torch.maximum(top, z.amax(1))
            ease = (top - higher).exp_()
            weights = z.sub(higher[:, None]).exp_()
            mass = mass * ease + weights.sum(1)
            if entropy:
                moment = moment * ease + torch.linalg.vecdot(weights, z)
            top = higher
        lse[rows] = top + mass.log()
        mean[rows] = moment / mass
    return chosen, lse, mean, kept


def _inside(actions: Tensor, columns: slice) -> tuple[Tensor, Tensor]:
    """Which of these actions lie in the tile, and in which of its columns."""
    at = ((actions >= columns.start) & (actions < columns.stop)).nonzero()[:, 0]
    return at, actions[at] - columns.start


def _product(hidden: Tensor, tile: Tensor, scale: float, kind: torch.dtype) -> Tensor:
    z = (hidden @ tile.t()).to(kind)
    return z if scale == 1.0 else z.mul_(scale)


def _slopes(z: Tensor, slope: Tensor, bend: Tensor | None, spread: Tensor) -> Tensor:
    """-p · (slope + bend · (log p + H)) from log p = `z`, whose storage may be used."""
    p = z.exp()
    if bend is None:
        return p.mul_(-slope[:, None])
    return p.mul_(z.add_(spread[:, None]).mul_(bend[:, None]).add_(slope[:, None]).neg_())


def _add_product(to: Tensor, a: Tensor, b: Tensor) -> None:
    """to += a · b, in the dtype of `to`."""
    if a.dtype == to.dtype:
        to.addmm_(a, b)
    else:
        to.add_(a @ b)


def _blocks(count: int, size: int) -> Iterator[slice]:
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))
