"""The trust-region step: its Fisher products, its solver, its line search, and monotone improvement where everything is exact."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from tilt.optim.trust_region import conjugate_gradient, hessian_product, trust_region_step

SETTINGS = {"limit": 0.01, "iterations": 15, "damping": 0.0, "backtracks": 10, "decay": 0.8}


def flat(vector) -> Tensor:
    return torch.cat([part.flatten() for part in vector])


def shaped(vector: Tensor, like) -> list[Tensor]:
    return [part.view_as(p) for part, p in zip(vector.split([p.numel() for p in like]), like, strict=True)]


class Small:
    """A network of 29 weights over 7 states and 4 actions, one of them unused by the policy; states weigh unequally."""

    def __init__(self, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.states = torch.randn(7, 2, generator=generator)
        weights = torch.rand(7, generator=generator)
        self.weights = weights / weights.sum()
        shapes = ((2, 3), (3,), (3, 4), (4,), (4,))
        self.parameters = [torch.randn(*shape, generator=generator).requires_grad_() for shape in shapes]
        self.advantages = torch.randn(7, 4, generator=generator)
        self.old = self.logprobs().detach()

    def logprobs(self, parameters=None) -> Tensor:
        a, b, c, d, _ = self.parameters if parameters is None else parameters
        return (torch.tanh(self.states @ a + b) @ c + d).log_softmax(-1)

    def kl(self, parameters=None, *, reverse: bool = False) -> Tensor:
        """Mean KL(old || policy); reversed KL(policy || old)."""
        p, q = (self.logprobs(parameters), self.old) if reverse else (self.old, self.logprobs(parameters))
        return (self.weights * (p.exp() * (p - q)).sum(-1)).sum()

    def surrogate(self) -> Tensor:
        return (self.weights[:, None] * self.logprobs().exp() * self.advantages).sum()

    def gradient(self) -> tuple[Tensor, ...]:
        return torch.autograd.grad(self.surrogate(), self.parameters, allow_unused=True, materialize_grads=True)

    def measure(self) -> tuple[float, float]:
        with torch.no_grad():
            return float(self.surrogate()), float(self.kl())

    def fisher(self, *, reverse: bool = False) -> Tensor:
        """The Hessian of the KL here, dense."""
        product = hessian_product(lambda: self.kl(reverse=reverse), self.parameters)
        return torch.stack([flat(product(shaped(row, self.parameters))) for row in torch.eye(sum(p.numel() for p in self.parameters))])

    def step(self, **settings):
        return trust_region_step(
            self.parameters, self.gradient(), hessian_product(self.kl, self.parameters), self.measure, **(SETTINGS | settings)
        )


# --- products and solver ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reverse", [False, True])
def test_the_product_is_that_of_the_dense_hessian_and_of_the_fisher_matrix(reverse):
    small = Small()

    def of(vector: Tensor) -> Tensor:
        return small.kl(shaped(vector, small.parameters), reverse=reverse)

    dense = torch.autograd.functional.hessian(of, flat(small.parameters).detach())
    columns = small.fisher(reverse=reverse)
    assert (columns - dense).abs().max() < 1e-12 and (columns - columns.T).abs().max() < 1e-12

    fisher = torch.zeros_like(columns)
    for state in range(7):
        for action in range(4):
            score = flat(torch.autograd.grad(small.logprobs()[state, action], small.parameters, allow_unused=True, materialize_grads=True))
            fisher += small.weights[state] * small.old[state, action].exp() * torch.outer(score, score)
    assert (columns - fisher).abs().max() < 1e-12 and fisher.abs().max() > 0.1


def test_products_of_parts_add_up():
    small = Small()
    vector = [torch.randn(p.shape, generator=torch.Generator().manual_seed(5)) for p in small.parameters]
    whole = flat(hessian_product(small.kl, small.parameters)(vector))
    weights, found = small.weights, torch.zeros_like(whole)
    for part in (slice(0, 3), slice(3, 7)):
        small.weights = torch.zeros(7)
        small.weights[part] = weights[part]
        found += flat(hessian_product(small.kl, small.parameters)(vector))
    assert torch.allclose(found, whole, atol=1e-14)


def test_a_function_without_curvature_has_product_zero():
    x = torch.ones(3, requires_grad=True)
    assert not hessian_product(lambda: 2 * x.sum(), [x])([torch.ones(3)])[0].any()


def test_conjugate_gradients_solve_in_as_many_steps_as_there_are_eigenvalues():
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(12, 12, generator=generator))[0]
    target = torch.randn(12, generator=generator)
    matrix = basis @ torch.diag(torch.tensor([0.1] * 4 + [1.0] * 4 + [5.0] * 4)) @ basis.T
    parts = [target[:5], target[5:]]

    def product(v):
        out = matrix @ torch.cat(list(v))
        return [out[:5], out[5:]]

    truth = torch.linalg.solve(matrix, target)
    assert torch.allclose(torch.cat(list(conjugate_gradient(product, parts, 3, 0.0))), truth, atol=1e-12)
    assert (torch.cat(list(conjugate_gradient(product, parts, 2, 0.0))) - truth).norm() > 1e-3
    counted = []
    conjugate_gradient(lambda v: counted.append(1) or product(v), parts, 50)
    assert len(counted) == 3, "it stops where it has arrived"
    assert torch.equal(torch.cat(list(parts)), target), "the target is left as it is"


def test_conjugate_gradients_stop_at_a_direction_without_curvature():
    assert not conjugate_gradient(lambda v: [0 * x for x in v], [torch.ones(3)], 5)[0].any()
    assert not conjugate_gradient(lambda v: v, [torch.zeros(3)], 5)[0].any()


# --- the step --------------------------------------------------------------------------------------------------------------------


def test_the_first_length_puts_the_quadratic_model_on_the_limit():
    """1/2 s'Fs = limit for the step s; the true KL differs by its third order, and by less the smaller the limit."""
    errors = []
    for limit in (1e-2, 1e-4, 1e-6):
        small = Small(1)
        start, fisher = flat(small.parameters).detach(), small.fisher()
        taken = small.step(limit=limit, damping=0.1)
        moved = flat(small.parameters).detach() - start
        assert taken.accepted
        assert float(moved @ fisher @ moved) / 2 == pytest.approx(limit * 0.8 ** (2 * (taken.tried - 1)), rel=1e-9)
        errors.append(abs(taken.kl / (limit * 0.8 ** (2 * (taken.tried - 1))) - 1))
    assert errors[0] < 0.3 and errors[1] < 0.03 and errors[2] < 0.003


def test_the_direction_is_the_damped_natural_gradient():
    small = Small(2)
    start, gradient, damped = flat(small.parameters).detach(), flat(small.gradient()), small.fisher()
    damped += 0.3 * torch.eye(len(damped))
    x = torch.linalg.solve(damped, gradient)
    taken = small.step(damping=0.3, iterations=60)
    moved = flat(small.parameters).detach() - start
    assert taken.residual < 1e-5
    assert torch.allclose(moved / moved.norm(), x / x.norm(), atol=2e-5)
    few = Small(2).step(damping=0.3, iterations=1)
    assert few.residual == pytest.approx(float(_rest_after_one(damped, gradient)), rel=1e-9)


def _rest_after_one(matrix: Tensor, target: Tensor) -> Tensor:
    """|g - A x| / |g| with x the point of steepest descent."""
    x = (target @ target) / (target @ matrix @ target) * target
    return (target - matrix @ x).norm() / target.norm()


def test_accepted_steps_are_inside_and_better():
    taken = []
    for seed in range(40):
        small = Small(seed)
        before = small.measure()[0]
        step = small.step(limit=0.3, damping=0.01, iterations=5)
        surrogate, kl = small.measure()
        assert step.accepted and kl <= 0.3 and surrogate > before
        assert (step.kl, step.improvement) == (kl, surrogate - before)
        taken.append(step.tried)
    assert max(taken) > 1, "some had to be shortened"


@pytest.mark.parametrize("why", ["outside", "worse", "equal", "nan", "flat"])
def test_a_line_search_that_finds_nothing_leaves_every_bit(why):
    """In float32 p + d - d is not p: only a copy gives it back; signed zeros and subnormal numbers included."""
    torch.set_default_dtype(torch.float32)
    parameters = [
        torch.randn(50, generator=torch.Generator().manual_seed(0)) * 10.0 ** torch.linspace(-42, 3, 50),
        torch.tensor([-0.0, 0.0]),
    ]
    bits = [p.view(torch.int32).clone() for p in parameters]
    seen = []

    def measure() -> tuple[float, float]:
        seen.append([p.clone() for p in parameters])
        first = len(seen) == 1
        return {"outside": (1.0 * (not first), 0.02), "worse": (-1.0 * (not first), 0.0), "equal": (0.0, 0.0), "nan": (math.nan * (not first), 0.0), "flat": (1.0, 0.0)}[why]  # fmt: skip

    matrix = 0.0 if why == "flat" else 1.0
    gradient = [torch.randn(p.shape, generator=torch.Generator().manual_seed(1)) for p in parameters]
    taken = trust_region_step(parameters, gradient, lambda v: [matrix * x for x in v], measure, **SETTINGS | {"backtracks": 7})
    assert not taken.accepted and (taken.kl, taken.improvement) == (0.0, 0.0) and taken.tried == (0 if why == "flat" else 7)
    assert all(torch.equal(p.view(torch.int32), b) for p, b in zip(parameters, bits, strict=True))
    if why != "flat":
        lengths = [float(sum((a - b).square().sum() for a, b in zip(tried, seen[0], strict=True)).sqrt()) for tried in seen[1:]]
        assert lengths == pytest.approx([lengths[0] * 0.8**k for k in range(7)], rel=1e-4) and lengths[0] > 0.1


def test_the_first_length_that_is_inside_and_better_is_taken():
    parameter = torch.zeros(1)
    answers = iter([(0.0, 0.0), (5.0, 0.011), (-1.0, 0.0), (2.0, 0.01), (9.0, 0.0)])
    taken = trust_region_step([parameter], [torch.ones(1)], lambda v: v, lambda: next(answers), **SETTINGS)
    assert taken.accepted and (taken.kl, taken.improvement, taken.tried, taken.residual) == (0.01, 2.0, 3, 0.0)
    assert float(parameter) == pytest.approx(math.sqrt(0.02) * 0.8**2)


def test_it_works_on_a_module_and_leaves_frozen_weights_alone():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2))
    net[0].requires_grad_(False)
    frozen, x, y = net[0].weight.clone(), torch.randn(20, 3), torch.randint(0, 2, (20,))
    old = net(x).log_softmax(-1).detach()
    parameters = [p for p in net.parameters() if p.requires_grad]

    def both() -> tuple[Tensor, Tensor]:
        new = net(x).log_softmax(-1)
        return new[torch.arange(20), y].mean(), (old.exp() * (old - new)).sum(-1).mean()

    def measure() -> tuple[float, float]:
        gain, kl = both()
        return float(gain), float(kl)

    taken = trust_region_step(
        parameters, torch.autograd.grad(both()[0], parameters), hessian_product(lambda: both()[1], parameters), measure, **SETTINGS
    )
    assert taken.accepted and 0.005 < taken.kl <= 0.01 and torch.equal(net[0].weight, frozen)


# --- learning --------------------------------------------------------------------------------------------------------------------


class Tabular:
    """A softmax policy on one process, with exact advantages and visits; states weigh as often as they are visited."""

    def __init__(self, world) -> None:
        self.world, self.logits = world, torch.zeros(1, 5, 3, requires_grad=True)

    def gain(self) -> float:
        return float(self.world.gain(self.logits.detach().softmax(-1)))

    def step(self, **settings):
        old = self.logits.detach().softmax(-1)
        visits, advantages = self.world.visits(old) * (1 - self.world.gamma), self.world.advantages(old)

        def surrogate() -> Tensor:
            return torch.einsum("bs,bsa,bsa->", visits, self.logits.softmax(-1), advantages)

        def kl() -> Tensor:
            return (visits * (old * (old.log() - self.logits.log_softmax(-1))).sum(-1)).sum()

        return trust_region_step(
            [self.logits], torch.autograd.grad(surrogate(), [self.logits]), hessian_product(kl, [self.logits]),
            lambda: (float(surrogate()), float(kl())), **(SETTINGS | settings),
        )  # fmt: skip


@pytest.mark.parametrize("seed", range(6))
def test_exact_steps_on_a_tabular_process_rise_to_the_optimum(processes, seed):
    """J rises at every step until 99.9 % of the way to the optimum, in at most 120 steps of KL 0.01."""
    tabular = Tabular(processes(1, seed=seed))
    best, first, last = float(tabular.world.best()), tabular.gain(), -math.inf
    for _ in range(120):
        taken, now = tabular.step(damping=1e-4), tabular.gain()
        assert taken.accepted and taken.kl <= 0.01 and now > last
        last = now
        if now > best - 1e-3 * (best - first):
            break
    assert last > best - 0.01 * (best - first)
