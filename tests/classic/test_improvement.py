"""Steps that cannot go down, on a thousand random processes at once: the identity, both bounds, and both ways of climbing them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tilt.classic.bellman import greedy
from tilt.classic.improvement import (
    conservative_policy_iteration,
    conservative_step,
    difference,
    minorise_maximise,
    minorise_maximise_step,
    mixture,
    mixture_bound,
    penalty,
    surrogate,
    trust_region_bound,
)
from tilt.classic.mdp import MDP, uniform
from tilt.classic.planning import advantages, gain, occupancy, policy_iteration
from tilt.classic.tables import cliff_walking, random_processes
from tilt.errors import UsageError

COUNT = 1000
Pair = tuple[MDP, Tensor, Tensor]


@pytest.fixture(scope="module")
def pair() -> Pair:
    """Processes with two policies each, near and far from each other."""
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(COUNT, 5, 3, generator=generator, dtype=torch.float64)
    apart = torch.logspace(-3, 0.5, COUNT, dtype=torch.float64)[:, None, None]
    return (
        random_processes(COUNT),
        logits.softmax(-1),
        (logits + apart * torch.randn(COUNT, 5, 3, generator=generator, dtype=torch.float64)).softmax(-1),
    )


def test_the_performance_difference_is_exact(pair: Pair) -> None:
    mdp, old, new = pair
    assert (difference(mdp, old, new) - (gain(mdp, new) - gain(mdp, old))).abs().max() < 1e-12


def test_the_surrogate_is_right_to_first_order_and_no_bound(pair: Pair) -> None:
    mdp, old, new = pair
    assert (surrogate(mdp, old, old) - gain(mdp, old)).abs().max() < 1e-12
    slope = (surrogate(mdp, old, mixture(mdp, old, new, 1e-6)) - gain(mdp, mixture(mdp, old, new, 1e-6))).abs()
    assert slope.max() < 1e-9
    by_hand = gain(mdp, old) + torch.einsum("bs,bsa,bsa->b", occupancy(mdp, old), new, advantages(mdp, old))
    torch.testing.assert_close(surrogate(mdp, old, new), by_hand, rtol=0, atol=1e-12)
    assert (surrogate(mdp, old, new) > gain(mdp, new) + 1e-6).double().mean() > 0.3


def test_the_conservative_bound_holds_on_every_mixture(pair: Pair) -> None:
    mdp, old, new = pair
    share = torch.rand(COUNT, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    slack = gain(mdp, mixture(mdp, old, new, share)) - mixture_bound(mdp, old, new, share)
    assert slack.min() > -1e-12
    straight = surrogate(mdp, old, mixture(mdp, old, new, share))
    assert (gain(mdp, mixture(mdp, old, new, share)) < straight - 0.01 * (straight - mixture_bound(mdp, old, new, share))).any(), (
        "a much smaller penalty is no bound"
    )


def test_the_bound_of_a_mixture_by_its_formula(pair: Pair) -> None:
    mdp, old, new = pair
    away = (new * advantages(mdp, old)).sum(-1)
    by_hand = gain(mdp, old) + 0.3 * (occupancy(mdp, old) * away).sum(-1) - 2 * away.abs().amax(-1) * 0.9 / 0.01 * 0.09
    torch.testing.assert_close(mixture_bound(mdp, old, new, 0.3), by_hand, rtol=0, atol=1e-11)


@pytest.mark.parametrize("distance", ["kl", "tv"])
def test_the_trust_region_bound_holds_on_every_pair(pair: Pair, distance: str) -> None:
    mdp, old, new = pair
    bound = trust_region_bound(mdp, old, new, distance)  # type: ignore[arg-type]
    assert (gain(mdp, new) - bound).min() > -1e-12
    assert (gain(mdp, new) < surrogate(mdp, old, new) - 0.001 * (surrogate(mdp, old, new) - bound)).any()
    apart = (old * (old / new).log()).sum(-1).amax(-1) if distance == "kl" else (0.5 * (old - new).abs().sum(-1)).square().amax(-1)
    by_hand = surrogate(mdp, old, new) - 4 * advantages(mdp, old).abs().amax((1, 2)) * 0.9 / 0.01 * apart
    torch.testing.assert_close(bound, by_hand, rtol=1e-12, atol=1e-11)


def test_conservative_policy_iteration_climbs_to_the_best(pair: Pair) -> None:
    """Every step gains at least a G / 2, no share on a grid promises more, and the gain approaches J of the best policy."""
    mdp, old, _ = pair
    step = conservative_step(mdp, old)
    best = greedy(advantages(mdp, old))
    gained = (occupancy(mdp, old) * advantages(mdp, old).amax(-1)).sum(-1)
    assert (step.gain - gain(mdp, old) >= step.size * gained / 2 - 1e-12).all() and (step.size < 1).all()
    for share in torch.linspace(0, 1, 21):
        assert (mixture_bound(mdp, old, best, share) <= step.bound + 1e-12).all()
    climb = conservative_policy_iteration(mdp, old, steps=10)
    gains = torch.cat([climb.start.unsqueeze(0), climb.gains])
    assert (gains[1:] - gains[:-1]).min() > 0 and (climb.gains - climb.bounds).min() > -1e-12
    few = random_processes(20, seed=8)
    top = (few.start * policy_iteration(few).values).sum(-1)
    end = conservative_policy_iteration(few, uniform(few), steps=200).gains[-1]
    assert ((top - end) / (top - gain(few, uniform(few)))).max() < 0.2


def test_where_nothing_is_better_conservative_steps_stay() -> None:
    mdp = random_processes(3, seed=2)
    best = torch.nn.functional.one_hot(policy_iteration(mdp).policy, 3).double()
    step = conservative_step(mdp, best)
    assert step.size.abs().max() < 1e-12 and torch.allclose(step.policy, best)
    still = MDP.of(mdp.transition, torch.zeros(3, 5, 3), discount=0.9)
    assert torch.equal(conservative_step(still, uniform(mdp).expand(3, 5, 3)).policy, uniform(mdp).expand(3, 5, 3))
    assert torch.allclose(minorise_maximise_step(still, uniform(mdp)).policy, uniform(mdp).expand(3, 5, 3))


def test_without_a_discount_ahead_greed_is_taken_whole() -> None:
    """gamma = 0: nothing is lost by moving, so the whole greedy policy is taken."""
    mdp = random_processes(discount=0.0)
    step = conservative_step(mdp, uniform(mdp))
    assert step.size == 1 and torch.equal(step.policy, torch.nn.functional.one_hot(mdp.reward.argmax(-1), 3).double())


def test_the_exact_penalised_step_is_the_best_of_its_neighbours(pair: Pair) -> None:
    """M is concave in the policy, so no neighbour at any distance may be better; it is above J(old), and J is above it."""
    mdp, old, _ = pair
    step = minorise_maximise_step(mdp, old)
    assert (step.bound - gain(mdp, old)).min() > 0 and (step.gain - step.bound).min() > -1e-12
    generator = torch.Generator().manual_seed(3)
    for spread in (1e-1, 1e-2, 1e-3, 1e-4, 1e-5):
        near = (step.policy.log() + spread * torch.randn(COUNT, 5, 3, generator=generator, dtype=torch.float64)).softmax(-1)
        assert (trust_region_bound(mdp, old, near) <= step.bound + 1e-13).all()
    for share in (0.9, 0.99, 0.999, 1.001, 1.01, 1.1):
        along = old + share * (step.policy - old)
        assert (trust_region_bound(mdp, old, along) <= step.bound + 1e-13).all()


def test_the_exact_penalised_step_has_its_closed_form(pair: Pair) -> None:
    """In every state new / old is proportional to 1 / (n - A), and all states are as far away."""
    mdp, old, _ = pair
    step, away = minorise_maximise_step(mdp, old), advantages(mdp, old)
    inverse = old / step.policy  # linear in A
    for first, second, third in ((0, 1, 2),):
        rise = (inverse[..., first] - inverse[..., second]) * (away[..., second] - away[..., third])
        other = (inverse[..., second] - inverse[..., third]) * (away[..., first] - away[..., second])
        assert (rise - other).abs().max() < 1e-9
    apart = (old * (old / step.policy).log()).sum(-1)
    assert ((apart - step.size.unsqueeze(-1)).abs() / step.size.unsqueeze(-1)).max() < 1e-6


def test_minorise_and_maximise_never_goes_down() -> None:
    few = random_processes(10, seed=3)
    climb = minorise_maximise(few, uniform(few), steps=6)
    gains = torch.cat([climb.start.unsqueeze(0), climb.gains])
    assert (gains[1:] - gains[:-1]).min() > 0 and (climb.gains - climb.bounds).min() > -1e-12
    assert (climb.bounds - gains[:-1]).min() > 0


def test_bounds_need_a_discount() -> None:
    mdp = cliff_walking()
    for call in (
        lambda: penalty(mdp, uniform(mdp)),
        lambda: mixture_bound(mdp, uniform(mdp), uniform(mdp), 0.5),
        lambda: trust_region_bound(mdp, uniform(mdp), uniform(mdp)),
        lambda: conservative_step(mdp, uniform(mdp)),
    ):
        with pytest.raises(UsageError, match="discount below 1"):
            call()
    with pytest.raises(UsageError, match=r"share=1.5 must lie in \[0, 1\]"):
        mixture(mdp, uniform(mdp), uniform(mdp), 1.5)
    with pytest.raises(UsageError, match="steps=0"):
        minorise_maximise(random_processes(), uniform(random_processes()), steps=0)
