"""A step to the edge of a trust region: F x = g by conjugate gradients, sqrt(2 limit / x'Fx) x, backtracked until it is inside and better (TRPO, 1502.05477).

A vector is one tensor per parameter. The policy is only seen through closures, so any differentiable one will do.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Vector = Sequence[Tensor]
Product = Callable[[Vector], Vector]
"""A symmetric matrix as what it does to a vector."""


@dataclass(frozen=True)
class Taken:
    """What a step did: KL(old || policy) and the gain of the surrogate where it ended, both 0 where nothing was accepted.

    `tried` counts the lengths that were measured, `residual` is |g - (F + damping) x| / |g| after the conjugate gradients.
    """

    accepted: bool
    kl: float
    improvement: float
    tried: int
    residual: float


@torch.no_grad()
def trust_region_step(
    parameters: Vector,
    gradient: Vector,
    fisher: Product,
    measure: Callable[[], tuple[float, float]],
    *,
    limit: float,
    iterations: int,
    damping: float,
    backtracks: int,
    decay: float,
) -> Taken:
    """Raise a surrogate with this gradient inside KL(old || policy) <= limit; parameters that find no such point keep every bit.

    `fisher` multiplies by the Hessian F of the KL at the present parameters, `measure` gives (surrogate, KL) of the present parameters.
    x solves (F + damping) x = g; the first length makes the quadratic model x'Fx / 2 of the KL equal to the limit, each further one is `decay` times the last.
    """
    x = conjugate_gradient(lambda v: axpy(damping, v, fisher(v)), gradient, iterations)
    curved = fisher(x)
    rest = axpy(-damping, x, axpy(-1.0, curved, gradient))
    residual = math.sqrt(dot(rest, rest) / max(dot(gradient, gradient), torch.finfo(torch.float64).tiny))
    curvature = dot(x, curved)
    if not (math.isfinite(curvature) and curvature > 0):
        return Taken(False, 0.0, 0.0, 0, residual)
    start, (before, _) = [p.detach().clone() for p in parameters], measure()
    length = math.sqrt(2 * limit / curvature)
    for tried in range(1, backtracks + 1):
        _place(parameters, axpy(length * decay ** (tried - 1), x, start))
        surrogate, kl = measure()
        if kl <= limit and surrogate > before:
            return Taken(True, kl, surrogate - before, tried, residual)
    _place(parameters, start)
    return Taken(False, 0.0, 0.0, backtracks, residual)


@torch.no_grad()
def conjugate_gradient(product: Product, target: Vector, iterations: int, tolerance: float = 1e-10) -> Vector:
    """x with product(x) ≈ target for a positive definite matrix, from 0, until |rest|^2 <= tolerance |target|^2; exact after as many iterations as it has different eigenvalues."""
    x: Vector = [torch.zeros_like(t) for t in target]
    rest, direction = target, target
    square = goal = dot(rest, rest)
    for _ in range(iterations):
        if not square > tolerance * goal:
            break
        curved = product(direction)
        curvature = dot(direction, curved)
        if not curvature > 0:
            break
        x = axpy(square / curvature, direction, x)
        rest = axpy(-square / curvature, curved, rest)
        square, last = dot(rest, rest), square
        direction = axpy(square / last, direction, rest)
    return x


def hessian_product(function: Callable[[], Tensor], parameters: Vector) -> Product:
    """v → (second derivatives of `function` here) v = ∇(∇f · v) (Pearlmutter 1994). f is evaluated once; its graph lives as long as the product.

    With f the mean of KL(old || policy) at policy = old this is the Fisher matrix, and so is that of KL(policy || old).
    """
    with torch.enable_grad():
        slopes = torch.autograd.grad(function(), list(parameters), create_graph=True, allow_unused=True, materialize_grads=True)

    def product(v: Vector) -> Vector:
        with torch.enable_grad():
            along = sum((slope * part).sum() for slope, part in zip(slopes, v, strict=True) if slope.requires_grad)
        if not isinstance(along, Tensor):
            return [torch.zeros_like(p) for p in parameters]
        return torch.autograd.grad(along, list(parameters), retain_graph=True, allow_unused=True, materialize_grads=True)

    return product


def dot(a: Vector, b: Vector) -> float:
    """Sum of a_i b_i."""
    return float(sum((x * y).sum(dtype=torch.float64) for x, y in zip(a, b, strict=True)))


def axpy(factor: float, a: Vector, b: Vector) -> Vector:
    """factor a + b, in tensors of its own."""
    return [y + factor * x for x, y in zip(a, b, strict=True)]


def _place(parameters: Vector, values: Vector) -> None:
    for parameter, value in zip(parameters, values, strict=True):
        parameter.copy_(value)
