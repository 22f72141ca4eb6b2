"""A step inside a trust region, number by number, of a policy with one parameter per action: the logit of the token that was sampled against all others."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from tilt.distributions import kl
from tilt.inspect.entries import Notebook
from tilt.objectives import Experience, NoValue, Objective, Outputs, TrustRegion
from tilt.optim.trust_region import Vector, axpy, conjugate_gradient, dot, hessian_product, trust_region_step

SURROGATE = "1502.05477 eq. 14; 002:183-185"


def trace_step(note: Notebook, row: Objective, experience: Experience, rule: TrustRegion) -> None:
    """From policy = old: gradient, Fisher matrix, natural direction, first length, and what the line search accepts."""
    gain = replace(row, value=NoValue())
    old = experience.signals.old.detach().clamp(max=-1e-6)
    theta = (old - torch.log(-torch.expm1(old))).requires_grad_()
    before = torch.stack([theta.detach(), torch.zeros_like(old)], 1)

    def surrogate() -> Tensor:
        return -gain.loss(Outputs.of(logsigmoid(theta), sequences=experience.layout.sequences), experience)

    def divergence() -> Tensor:
        return kl(before, torch.stack([theta, torch.zeros_like(theta)], 1)).mean()

    def measure() -> tuple[float, float]:
        with torch.no_grad():
            return float(surrogate()), float(divergence())

    note(
        "theta",
        "logit of p_old of the sampled token against all others: one parameter per action",
        logsigmoid,
        "this page",
        theta,
        "action",
    )
    note("L(old)", "sum_t w_t rho_t Adv_t at policy = old", Objective.loss, SURROGATE, surrogate(), "batch")
    (gradient,) = torch.autograd.grad(surrogate(), theta)
    note("g", "d L / d theta", torch.autograd.grad, SURROGATE, gradient, "action")
    fisher = hessian_product(divergence, [theta])
    note(
        "F",
        "Hessian of mean KL(old || policy) at old: diagonal here, p (1 - p) / A",
        hessian_product,
        "1502.05477 app. C",
        fisher([torch.ones_like(theta)])[0],
        "action",
    )

    def damped(v: Vector) -> Vector:
        return axpy(rule.damping, v, fisher(v))

    x = conjugate_gradient(damped, [gradient], rule.iterations)
    note(
        "x",
        f"(F + {rule.damping:g}) x = g by at most {rule.iterations} conjugate gradients",
        conjugate_gradient,
        "1502.05477 app. C",
        x[0],
        "action",
    )
    curvature = dot(x, fisher(x))
    note("x'Fx", "curvature along x", dot, "1502.05477 app. C", curvature, "batch")
    note(
        "first length",
        f"sqrt(2 * {rule.limit:g} / x'Fx): the quadratic model of the KL is at the limit",
        trust_region_step,
        "1502.05477 app. C",
        (2 * rule.limit / curvature) ** 0.5,
        "batch",
    )
    taken = trust_region_step(
        [theta],
        [gradient],
        fisher,
        measure,
        limit=rule.limit,
        iterations=rule.iterations,
        damping=rule.damping,
        backtracks=rule.backtracks,
        decay=rule.decay,
    )
    for name, formula, value in (
        ("accepted", f"1 where KL <= {rule.limit:g} and L has risen; else every parameter keeps its bits", float(taken.accepted)),
        ("lengths tried", f"each {rule.decay:g} times the last", float(taken.tried)),
        ("KL(old || policy)", "mean over states, exact", taken.kl),
        ("rise of L", "L(policy) - L(old)", taken.improvement),
    ):
        note(name, formula, trust_region_step, "1502.05477 app. C; 002:185", value, "batch")
    note("policy after the step", "log p(token | tokens before it)", logsigmoid, "this page", logsigmoid(theta), "action")
