"""What trust regions stand on (algorithms.md 5.1-5.7), exact on thousands of random pairs of policies: the performance difference, its surrogate, and their bounds."""

from __future__ import annotations

import pytest
import torch

COUNT = 4000


@pytest.fixture
def pair(processes):
    """Processes with two policies each, near and far from each other: (processes, logits of the first, first, second)."""
    world = processes(COUNT)
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(COUNT, 5, 3, generator=generator)
    apart = torch.logspace(-3, 0.5, COUNT)[:, None, None]
    other = logits + apart * torch.randn(COUNT, 5, 3, generator=generator)
    return world, logits, logits.softmax(-1), other.softmax(-1)


def surrogate(world, old, new):
    """L = J(old) + sum_s rho_old sum_a new A_old."""
    return world.gain(old) + torch.einsum("bs,bsa,bsa->b", world.visits(old), new, world.advantages(old))


def largest(world, old):
    """C / epsilon = 4 gamma / (1 - gamma)^2, and epsilon = max |A|."""
    return 4 * world.gamma / (1 - world.gamma) ** 2, world.advantages(old).abs().amax((1, 2))


def test_visits_add_up_and_give_the_gain(pair):
    world, _, old, _ = pair
    visits = world.visits(old)
    assert (visits > 0).all() and torch.allclose(visits.sum(-1), torch.full((COUNT,), 1 / (1 - world.gamma)))
    assert torch.allclose(torch.einsum("bs,bsa,bsa->b", visits, old, world.rewards), world.gain(old), atol=1e-12)


def test_the_performance_difference_is_exact(pair):
    world, _, old, new = pair
    found = torch.einsum("bs,bsa,bsa->b", world.visits(new), new, world.advantages(old))
    assert (found - (world.gain(new) - world.gain(old))).abs().max() < 1e-12


def test_the_surrogate_agrees_to_first_order_and_is_no_bound(pair):
    world, logits, old, new = pair
    free = logits.clone().requires_grad_()
    truth = torch.autograd.grad(world.gain(free.softmax(-1)).sum(), free)[0]
    found = torch.autograd.grad(surrogate(world, old, free.softmax(-1)).sum(), free)[0]
    assert (found - truth).abs().max() < 1e-10
    assert (found - world.visits(old)[..., None] * old * world.advantages(old)).abs().max() < 1e-10
    assert (surrogate(world, old, new) > world.gain(new)).double().mean() > 0.3


def test_a_mixture_improves_by_at_least_the_conservative_bound(pair):
    """(1 - a) old + a new: J >= L - 2 epsilon gamma / (1 - gamma)^2 a^2, epsilon = max_s |E_new A|."""
    world, _, old, new = pair
    share = torch.rand(COUNT, generator=torch.Generator().manual_seed(2))
    mixed = old + share[:, None, None] * (new - old)
    epsilon = (new * world.advantages(old)).sum(-1).abs().amax(-1)
    bound = surrogate(world, old, mixed) - 2 * epsilon * world.gamma / (1 - world.gamma) ** 2 * share**2
    slack = world.gain(mixed) - bound
    assert slack.min() > -1e-12
    tenth = surrogate(world, old, mixed) - 0.02 * epsilon * world.gamma / (1 - world.gamma) ** 2 * share**2
    assert (world.gain(mixed) < tenth).any(), "a much smaller penalty is no bound"


@pytest.mark.parametrize("distance", ["kl", "tv"])
def test_the_trust_region_bound_holds_on_every_pair(pair, distance):
    """J(new) >= L - C max_s KL(old || new), C = 4 epsilon gamma / (1 - gamma)^2, epsilon = max |A|; also with TV^2."""
    world, _, old, new = pair
    factor, epsilon = largest(world, old)
    apart = (old * (old / new).log()).sum(-1) if distance == "kl" else (0.5 * (old - new).abs().sum(-1)).square()
    slack = world.gain(new) - (surrogate(world, old, new) - factor * epsilon * apart.amax(-1))
    assert slack.min() > -1e-12
    assert (world.gain(new) < surrogate(world, old, new) - 0.001 * factor * epsilon * apart.amax(-1)).any()


def test_any_sampling_policy_gives_the_same_surrogate(pair):
    """E_(a ~ q)[new / q A] does not depend on q: the old policy, or the uniform one."""
    world, _, old, new = pair
    exact = (new * world.advantages(old)).sum(-1)
    for q in (old, torch.full_like(old, 1 / 3)):
        assert torch.allclose((q * (new / q) * world.advantages(old)).sum(-1), exact, atol=1e-12)


def test_the_exact_penalised_step_never_lowers_the_gain(processes):
    """Raising M = L - C max KL from 0 can only raise J (minorise and maximise): 60 steps on 50 processes."""
    world = processes(50, seed=3)
    logits = torch.zeros(50, 5, 3)
    gains = [world.gain(logits.softmax(-1))]
    for _ in range(60):
        old = logits.softmax(-1)
        factor, epsilon = largest(world, old)
        visits, advantages, best = world.visits(old), world.advantages(old), torch.zeros(50)
        start = logits
        for length in torch.logspace(-5, 0, 40):
            tried = start + length * advantages
            new = tried.softmax(-1)
            bound = torch.einsum("bs,bsa,bsa->b", visits, new, advantages) - factor * epsilon * (old * (old / new).log()).sum(-1).amax(-1)
            better = bound > best
            logits, best = torch.where(better[:, None, None], tried, logits), torch.where(better, bound, best)
        assert (best > 0).all()
        gains.append(world.gain(logits.softmax(-1)))
        assert (gains[-1] - gains[-2] >= best - 1e-12).all()
    assert (gains[-1] > gains[0]).all()
