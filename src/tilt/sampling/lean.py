"""The common decoder computed straight from its modules' weights: the same numbers as the modules give, in about a third of their operations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from tilt.models.anatomy import angles_of, epsilon_of, gain_of, kinds_of, window_of
from tilt.models.attention import Attend
from tilt.models.projection import adapters_of, matrix_of, merged, projected

FUSED_BYTES = 2**28
"""Weights are laid side by side, adapters added, in a copy, while the copies stay below this; of larger ones none is made, and adapters are products of their own."""

Function = Callable[[Tensor], Tensor]


class Lean:
    """Embedding, layers and last norm of a body that `anatomy.is_common` knows, on one row of tokens. Weights are read when it is made: one for each `generate`.

    Norms, angles and the softmax are at least float32, whatever the weights; in float64 all of it is.
    """

    def __init__(self, body: PreTrainedModel) -> None:
        parts: Any = body
        self.embed: Function = parts.embed_tokens
        copied = sum(p.numel() * p.element_size() for layer in parts.layers for p in layer.parameters())
        self.angles = Angles(body)
        self.layers = [Layer(block, i, copied <= FUSED_BYTES) for i, block in enumerate(parts.layers)]
        self.norm = Norm(parts.norm)

    def __call__(self, tokens: Tensor, positions: Tensor, reach: int, plan: Attend) -> Tensor:
        """Last hidden states [T, D]; every position is below `reach`, and `plan` decides who sees whom."""
        x = self.embed(tokens)
        turns = {kind: self.angles.at(kind, positions, reach) for kind in self.angles.kinds}
        for layer in self.layers:
            x = layer(x, turns[layer.kind], plan)
        return self.norm(x)


class Layer:
    """One block: x + attention of the normed x, then x + the gated feed-forward of the normed x; Gemma 3 norms what is added, too."""

    def __init__(self, block: Any, number: int, fuse: bool) -> None:
        attention, inner = block.self_attn, block.mlp
        self.number, self.window, self.scaling = number, window_of(block), float(attention.scaling)
        self.kind = getattr(attention, "layer_type", None) if hasattr(block, "pre_feedforward_layernorm") else None
        self.width = attention.head_dim
        self.heads, self.kv_heads = (matrix_of(p).out_features // self.width for p in (attention.q_proj, attention.k_proj))
        self.qkv = product((attention.q_proj, attention.k_proj, attention.v_proj), fuse)
        self.norm_heads = None
        if hasattr(attention, "q_norm"):
            scales = (n.expand(count, -1) for n, count in ((scale(attention.q_norm), self.heads), (scale(attention.k_norm), self.kv_heads)))
            self.norm_heads = Norm(attention.q_norm, torch.cat(list(scales)))
        self.gates = product((inner.gate_proj, inner.up_proj), fuse)
        self.inner, self.act = matrix_of(inner.gate_proj).out_features, inner.act_fn
        self.first = Norm(block.input_layernorm)
        if hasattr(block, "pre_feedforward_layernorm"):
            self.second = Norm(block.pre_feedforward_layernorm)
            self.out = added(attention.o_proj, fuse, Norm(block.post_attention_layernorm))
            self.down = added(inner.down_proj, fuse, Norm(block.post_feedforward_layernorm))
        else:
            self.second = Norm(block.post_attention_layernorm)
            self.out, self.down = added(attention.o_proj, fuse), added(inner.down_proj, fuse)

    def __call__(self, x: Tensor, turn: tuple[Tensor, Tensor], plan: Attend) -> Tensor:
        """The block's output in place of its input x [T, D]; `turn` holds cosines and signed sines, [T, 1, width] each."""
        asking = self.heads + self.kv_heads
        parts = self.qkv(self.first(x)).view(len(x), asking + self.kv_heads, self.width)
        turned, value = parts[:, :asking], parts[:, asking:]
        if self.norm_heads is not None:
            turned = self.norm_heads(turned)
        turned = torch.addcmul(turned * turn[0], turned.roll(self.width // 2, -1), turn[1])
        query, key = turned[:, : self.heads], turned[:, self.heads :]
        seen = plan.attend(
            *(part.transpose(0, 1)[None] for part in (query, key, value)),
            layer=self.number, scaling=self.scaling, window=self.window, softcap=None, sinks=None,
        )  # fmt: skip
        x = self.out(x, seen.reshape(len(x), -1))
        gates = self.gates(self.second(x))
        return self.down(x, self.act(gates[:, : self.inner]) * gates[:, self.inner :])


class Norm:
    """x / √(mean x² + ε) · scale over the last axis; `scales` [heads, width] where each head has its own."""

    def __init__(self, module: Any, scales: Tensor | None = None) -> None:
        weight = scale(module) if scales is None else scales
        self.scale = weight
        self.share = 1.0 / weight.shape[-1]
        self.epsilon = weight.new_tensor(epsilon_of(module))

    def __call__(self, x: Tensor) -> Tensor:
        precise = x if x.dtype == self.scale.dtype else x.to(self.scale.dtype)
        size = torch.linalg.vector_norm(precise, dim=-1, keepdim=True)
        out = (precise * torch.addcmul(self.epsilon, size, size, value=self.share).rsqrt_()).mul_(self.scale)
        return out if x.dtype == out.dtype else out.to(x.dtype)


class Angles:
    """Cosines and signed sines of each kind of layer by position; the table doubles when a text outgrows it."""

    def __init__(self, body: PreTrainedModel) -> None:
        parts: Any = body
        self.body, self.like, self.kinds = parts, parts.embed_tokens.weight[:1, :1], kinds_of(parts)
        self.tables: dict[str | None, Tensor] = {}

    def at(self, kind: str | None, positions: Tensor, reach: int) -> tuple[Tensor, Tensor]:
        """Cosines and signed sines [T, 1, width] at positions below `reach`."""
        if kind not in self.tables or len(self.tables[kind]) < reach:
            places = torch.arange(max(256, 1 << (reach - 1).bit_length()), device=positions.device)
            self.tables[kind] = torch.stack(angles_of(self.body, self.like, places, kind), 1)
        both = self.tables[kind].index_select(0, positions)
        return both[:, :1], both[:, 1:]


def scale(module: Any) -> Tensor:
    """What a norm multiplies by, in float32 at least: its weight, or one more than it in Gemma."""
    weight = module.weight.detach()
    return gain_of(module, weight if weight.dtype == torch.float64 else weight.float())


def product(layers: Sequence[Any], fuse: bool) -> Function:
    """x → the layers' outputs side by side, by one product with a copy of their weights, or by one each."""
    if not fuse:
        return lambda x: torch.cat([projected(layer, x) for layer in layers], -1)
    matrices = [matrix_of(layer) for layer in layers]
    weight = torch.cat([merged(layer) for layer in layers])
    biases = [weight.new_zeros(layer.out_features) if layer.bias is None else layer.bias.detach() for layer in matrices]
    bias = None if all(layer.bias is None for layer in matrices) else torch.cat(biases)
    return lambda x: F.linear(x, weight, bias)


def added(layer: Any, fuse: bool, norm: Norm | None = None) -> Callable[[Tensor, Tensor], Tensor]:
    """(x, y) → x + layer(y), in place of x; with a norm, x + norm(layer(y))."""
    if adapters_of(layer) and not fuse:
        return lambda x, y: projected(layer, y, x) if norm is None else x.add_(norm(projected(layer, y)))
    weight, bias = merged(layer), None if matrix_of(layer).bias is None else matrix_of(layer).bias.detach()
    if norm is not None:
        return lambda x, y: x.add_(norm(F.linear(y, weight, bias)))
    turned = weight.t()
    return lambda x, y: x.addmm_(y, turned) if bias is None else x.addmm_(y, turned).add_(bias)
