"""A linear layer as its weights say it: one matrix, and beside it the low-rank products of the adapters that are on (LoRA, arXiv 2106.09685)."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ADAPTED = ("peft.tuners.lora.layer", "Linear")


class LowRank(NamedTuple):
    """scaling · B A beside a matrix [out, in]: A [rank, in], B [out, rank]."""

    a: Tensor
    b: Tensor
    scaling: float


def is_adapted(module: nn.Module) -> bool:
    """Whether this is peft's LoRA around a linear layer."""
    return (type(module).__module__, type(module).__name__) == ADAPTED


def is_projection(module: nn.Module) -> bool:
    """Whether a layer is a matrix and a bias, or LoRA of the plain kind around one: x Wᵀ + b + Σ scaling · x Aᵀ Bᵀ.

    Variants (DoRA and the like), biases and dropout of the adapter's own, and adapters that have been merged in: no.
    """
    if not is_adapted(module):
        return type(module) is nn.Linear
    layer: Any = module
    return (
        type(layer.base_layer) is nn.Linear
        and not (layer.lora_variant or layer.merged_adapters or layer.fan_in_fan_out)
        and not len(layer.lora_embedding_A)
        and all(type(part) is nn.Linear and part.bias is None for pair in (layer.lora_A, layer.lora_B) for part in pair.values())
        and all(getattr(dropout, "p", 0.0) == 0.0 for dropout in layer.lora_dropout.values())
    )


def matrix_of(layer: Any) -> nn.Linear:
    """The layer without its adapters."""
    found: nn.Linear = layer.base_layer if is_adapted(layer) else layer
    return found


def adapters_of(layer: Any) -> list[LowRank]:
    """Those that are on."""
    if not is_adapted(layer) or layer.disable_adapters:
        return []
    names = [name for name in layer.active_adapters if name in layer.lora_A]
    return [LowRank(layer.lora_A[name].weight, layer.lora_B[name].weight, float(layer.scaling[name])) for name in names]


def projected(layer: Any, x: Tensor, onto: Tensor | None = None) -> Tensor:
    """The layer's output for x [T, in], adapters included; with `onto` [T, out] added to that."""
    matrix, adapters = matrix_of(layer), adapters_of(layer)
    if adapters:
        found: Tensor = _Adapted.apply(x, onto, matrix.weight, matrix.bias, *adapters[0])  # type: ignore[no-untyped-call]
        for a, b, scaling in adapters[1:]:
            found = torch.addmm(found, F.linear(x, a), b.t(), alpha=scaling)
        return found
    if onto is None:
        return F.linear(x, matrix.weight, matrix.bias)
    found = torch.addmm(onto, x, matrix.weight.t())
    return found if matrix.bias is None else found + matrix.bias


def merged(layer: Any) -> Tensor:
    """The matrix with what adapters add to it, [out, in], detached: the layer's own weight where none is on."""
    weight = matrix_of(layer).weight.detach()
    for a, b, scaling in adapters_of(layer):
        weight = torch.addmm(weight, b.detach(), a.detach(), alpha=scaling)
    return weight


class _Adapted(torch.autograd.Function):
    """y = x Wᵀ + bias + s (x Aᵀ) Bᵀ, and `onto` besides; with l = s g B: ∂/∂x = g W + l A, ∂/∂A = lᵀ x, ∂/∂B = s gᵀ (x Aᵀ). A frozen W has no gradient."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: Tensor, onto: Tensor | None, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scaling: float
    ) -> Tensor:
        low = x @ a.t()
        y = x @ weight.t() if onto is None else torch.addmm(onto, x, weight.t())
        if bias is not None:
            y.add_(bias)
        ctx.save_for_backward(x, weight, a, b, low)
        ctx.scaling = scaling
        return y.addmm_(low, b.t(), alpha=scaling)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        once()
        x, weight, a, b, low = ctx.saved_tensors
        wanted = ctx.needs_input_grad
        down = (g @ b).mul_(ctx.scaling)
        return (
            (g @ weight).addmm_(down, a) if wanted[0] else None,
            g if wanted[1] else None,
            g.t() @ x if wanted[2] else None,
            g.sum(0) if wanted[3] else None,
            down.t() @ x if wanted[4] else None,
            (g.t() @ low).mul_(ctx.scaling) if wanted[5] else None,
            None,
        )


def once() -> None:
    """Refuse to differentiate a gradient: what is computed straight from weights has one derivative."""
    if torch.is_grad_enabled():
        raise RuntimeError("this forward has one derivative: differentiate twice inside linear_head.plain()")
