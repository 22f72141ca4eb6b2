"""The common decoder's training forward, straight from its modules' weights: norms, rotations and gates are one operation each, with gradients of their own."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from tilt import linear_head
from tilt.data.packing import Segments
from tilt.models import flex
from tilt.models.anatomy import angles_of, epsilon_of, gain_of, is_common, kinds_of, window_of
from tilt.models.attention import Attend
from tilt.models.projection import once, projected


def fits(body: PreTrainedModel) -> bool:
    """Whether `hidden` computes what this body's modules compute: a decoder without hooks, LoRA at most, whole precision, nothing dropped or recomputed."""
    if not linear_head.fused() or torch.is_autocast_enabled(body.device.type) or not is_common(body):
        return False
    parts: Any = body
    recomputed = body.training and any(getattr(block, "gradient_checkpointing", False) for block in parts.layers)
    dropped = body.training and any(block.self_attn.attention_dropout for block in parts.layers)
    return body.dtype in (torch.float32, torch.float64) and not recomputed and not dropped


def hidden(body: PreTrainedModel, tokens: Tensor, positions: Tensor, segments: Segments, at: Tensor | None) -> Tensor:
    """Last hidden states of one row, [T, D]; or of the tokens `at` alone, [N, D], for which the last layer asks only where something is wanted.

    `at` may name any token of a segment that nothing hangs under, and the last of the others.
    """
    parts: Any = body
    x = parts.embed_tokens(tokens)
    turns, plan = _turns(parts, x, positions), flex.plan(segments)
    last = len(parts.layers) - 1
    for number, block in enumerate(parts.layers[: last if at is not None else None]):
        x = _block(block, number, x, turns, plan)
    if at is None:
        return _norm(parts.norm, x)
    plan, wanted = flex.closing(segments)
    x = _block(parts.layers[last], last, x, turns, plan, wanted)
    place = torch.zeros_like(tokens)
    place[wanted] = torch.arange(len(wanted), device=tokens.device)
    return _norm(parts.norm, F.embedding(place[at], x))


def _block(
    block: Any, number: int, x: Tensor, turns: dict[str | None, tuple[Tensor, Tensor]], plan: Attend, wanted: Tensor | None = None
) -> Tensor:
    """The block's output for every token, or for those that are wanted, which alone ask; all of them answer."""
    attention, inner, sandwich = block.self_attn, block.mlp, hasattr(block, "pre_feedforward_layernorm")
    read = _norm(block.input_layernorm, x)
    cos, sin = turns[attention.layer_type if sandwich else None]
    turn = (cos, sin) if wanted is None else (cos[wanted], sin[wanted])
    asking = read if wanted is None else F.embedding(wanted, read)
    x = x if wanted is None else F.embedding(wanted, x)
    query, key, value = (
        projected(layer, given).unflatten(1, (-1, attention.head_dim))
        for layer, given in ((attention.q_proj, asking), (attention.k_proj, read), (attention.v_proj, read))
    )
    if hasattr(attention, "q_norm"):
        query, key = _norm(attention.q_norm, query), _norm(attention.k_norm, key)
    query, key = _Turn.apply(query, *turn), _Turn.apply(key, cos, sin)  # type: ignore[no-untyped-call]
    seen = plan.attend(
        *(part.transpose(0, 1)[None] for part in (query, key, value)),
        layer=number, scaling=float(attention.scaling), window=window_of(block), softcap=None, sinks=None,
    ).reshape(len(x), -1)  # fmt: skip
    if sandwich:
        x = x + _norm(block.post_attention_layernorm, projected(attention.o_proj, seen))
        found = _gated(inner, _norm(block.pre_feedforward_layernorm, x))
        return x + _norm(block.post_feedforward_layernorm, projected(inner.down_proj, found))
    x = projected(attention.o_proj, seen, x)
    return projected(inner.down_proj, _gated(inner, _norm(block.post_attention_layernorm, x)), x)


def _gated(inner: Any, x: Tensor) -> Tensor:
    gate, up = projected(inner.gate_proj, x), projected(inner.up_proj, x)
    if type(inner.act_fn).__name__ in ("SiLU", "SiLUActivation"):
        return _Gate.apply(gate, up)  # type: ignore[no-any-return, no-untyped-call]
    return inner.act_fn(gate) * up  # type: ignore[no-any-return]


def _norm(module: Any, x: Tensor) -> Tensor:
    return _Norm.apply(x, gain_of(module, module.weight), epsilon_of(module))  # type: ignore[no-any-return, no-untyped-call]


@torch.no_grad()
def _turns(parts: Any, x: Tensor, positions: Tensor) -> dict[str | None, tuple[Tensor, Tensor]]:
    """Cosines and signed sines of each kind of layer, [T, 1, width] each."""
    found = {kind: angles_of(parts, x[:1, :1], positions, kind) for kind in kinds_of(parts)}
    return {kind: (cos[:, None], sin[:, None]) for kind, (cos, sin) in found.items()}


class _Norm(torch.autograd.Function):
    """x / √(mean x² + ε) · w over the last axis; with r = 1/√(…): ∂/∂x = r (g w - x r² mean(g w x)), ∂/∂w = Σ g x r."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:  # type: ignore[override]
        size = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        rate = size.square_().mul_(1 / x.shape[-1]).add_(epsilon).rsqrt_()
        ctx.save_for_backward(x, weight, rate)
        return (x * rate).mul_(weight)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, Tensor | None, None]:  # type: ignore[override]
        once()
        x, weight, rate = ctx.saved_tensors
        below = slope = None
        if ctx.needs_input_grad[1]:
            slope = torch.mv((g * x).reshape(-1, x.shape[-1]).t(), rate.reshape(-1))
        if ctx.needs_input_grad[0]:
            scaled = g * weight
            along = torch.linalg.vecdot(scaled, x).unsqueeze(-1).mul_(rate).mul_(rate).mul_(-1 / x.shape[-1])
            below = scaled.addcmul_(x, along).mul_(rate)
        return below, slope, None


class _Turn(torch.autograd.Function):
    """x cos + roll(x) sin, by half the width; ∂/∂x = g cos + roll(g sin)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(cos, sin)
        return (x * cos).addcmul_(x.roll(x.shape[-1] // 2, -1), sin)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        once()
        cos, sin = ctx.saved_tensors
        return (g * sin).roll(g.shape[-1] // 2, -1).addcmul_(g, cos), None, None


class _Gate(torch.autograd.Function):
    """silu(a) b; with s = sigmoid(a): ∂/∂a = g b s (1 + a (1 - s)), ∂/∂b = g a s. Only a and b are kept."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(a, b)
        return F.silu(a).mul_(b)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        once()
        a, b = ctx.saved_tensors
        return torch.ops.aten.silu_backward(g * b, a), F.silu(a).mul_(g)
