"""What each use of k1, k2, k3 is worth and where it pulls, by enumeration: u = log policy - log reference."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tilt.distributions import k1, k2, k3
from tilt.objectives import (
    K1,
    K2,
    K3,
    ExactKL,
    GroupRelative,
    NoRatio,
    Objective,
    OldKL,
    Penalty,
    PerBudget,
    Return,
    ReturnToGo,
    Score,
    SequenceAverage,
)
from tilt.oracle import token_mdp as exact
from tilt.oracle.expectation import Situation, compare, expect, expect_by_prompt
from tilt.oracle.token_mdp import TokenMDP

ESTIMATORS = {"k1": k1, "k2": k2, "k3": k3}


@pytest.fixture(scope="module")
def free(mdp: TokenMDP) -> TokenMDP:
    """Nothing is earned: all that is left of a row is its KL term."""
    return replace(mdp, rewards=torch.zeros_like(mdp.rewards))


def same(found: Tensor, target: Tensor, atol: float = 1e-10) -> None:
    torch.testing.assert_close(found, target, rtol=0, atol=atol)


def forward(mdp: TokenMDP, policy: Tensor) -> Tensor:
    """grad KL(policy || reference)."""
    return exact.gradient(lambda p: exact.divergence(mdp, p, mdp.reference), policy)


def backward(mdp: TokenMDP, policy: Tensor) -> Tensor:
    """grad KL(reference || policy)."""
    return exact.gradient(lambda p: exact.divergence(mdp, mdp.reference, p), policy)


def frozen_forward(mdp: TokenMDP, policy: Tensor) -> Tensor:
    """E_s grad KL(policy(.|s) || reference(.|s)) over the prefixes that the policy visits, held fixed."""
    return exact.gradient(lambda p: exact.frozen(mdp, policy, exact.divergences(p, mdp.reference)), policy)


def frozen_backward(mdp: TokenMDP, policy: Tensor) -> Tensor:
    return exact.gradient(lambda p: exact.frozen(mdp, policy, exact.divergences(mdp.reference, p)), policy)


def pull(penalty: Penalty, mdp: TokenMDP, policy: Tensor) -> Tensor:
    """Where the penalty of beta 1 pulls when nothing is earned: E[grad penalty], summed over actions, or once for each answer."""
    average = SequenceAverage() if getattr(penalty, "level", "token") == "sequence" else PerBudget(1)
    return -expect(Objective(Return(), NoRatio(), Score(), average, penalty), Situation.of(mdp, 1, policy)).mean


def u(mdp: TokenMDP, policy: Tensor) -> Tensor:
    return exact.logprobs(mdp, policy) - exact.logprobs(mdp, mdp.reference)


def whole(mdp: TokenMDP, policy: Tensor) -> Tensor:
    return mdp.over_answers(u(mdp, policy))


def value(mdp: TokenMDP, policy: Tensor, x: Tensor) -> float:
    return exact.answer_mean(mdp, policy, x).item()


def as_loss(mdp: TokenMDP, policy: Tensor, name: str) -> Tensor:
    """E[grad k(U)] of whole answers, the answers drawn from the policy and held fixed."""
    chance = exact.answer_logprobs(mdp, policy).exp()
    return exact.gradient(lambda p: (chance * ESTIMATORS[name](whole(mdp, p))).sum(1).mean(), policy)


def test_the_four_gradients_are_four_directions(free: TokenMDP, policy: Tensor) -> None:
    found = [f(free, policy) for f in (forward, backward, frozen_forward, frozen_backward)]
    for i in range(4):
        for j in range(i):
            assert compare(found[i], found[j]).cosine < 0.999


@pytest.mark.parametrize("credit", [ReturnToGo(kl=1.0), GroupRelative("leave_one_out", "none", kl=1.0)], ids=["to_go", "rloo"])
def test_k1_in_the_reward_is_exact(credit: ReturnToGo | GroupRelative, free: TokenMDP, policy: Tensor) -> None:
    row = Objective(credit, NoRatio(), Score(), PerBudget(1))
    same(-expect_by_prompt(row, Situation.of(free, 2, policy)).mean, forward(free, policy))


def test_k1_in_the_loss_pulls_nowhere(free: TokenMDP, policy: Tensor) -> None:
    same(pull(K1(1.0), free, policy), torch.zeros_like(policy))
    assert value(free, policy, whole(free, policy)) == pytest.approx(exact.divergence(free, policy, free.reference).item(), abs=1e-12)


def test_k2_of_actions_pulls_along_the_prefix_frozen_kl(free: TokenMDP, policy: Tensor) -> None:
    same(pull(K2(1.0), free, policy), frozen_forward(free, policy))
    assert compare(pull(K2(1.0), free, policy), forward(free, policy)).cosine < 0.99
    exact_kl = exact.divergence(free, policy, free.reference).item()
    assert abs(value(free, policy, free.over_answers(k2(u(free, policy)))) - exact_kl) > 1e-3, "biased in value"


def test_k2_of_answers_pulls_along_the_kl(free: TokenMDP, policy: Tensor) -> None:
    same(pull(K2(1.0, "sequence"), free, policy), forward(free, policy))
    same(as_loss(free, policy, "k2"), forward(free, policy))
    assert abs(value(free, policy, k2(whole(free, policy))) - exact.divergence(free, policy, free.reference).item()) > 1e-3


def test_k3_of_actions_pulls_along_the_prefix_frozen_reverse_kl(free: TokenMDP, policy: Tensor) -> None:
    same(pull(K3(1.0), free, policy), frozen_backward(free, policy))
    assert compare(pull(K3(1.0), free, policy), forward(free, policy)).cosine < 0.99
    exact_kl = exact.divergence(free, policy, free.reference).item()
    assert value(free, policy, free.over_answers(k3(u(free, policy)))) == pytest.approx(exact_kl, abs=1e-12)


def test_k3_of_answers_pulls_along_the_reverse_kl(free: TokenMDP, policy: Tensor) -> None:
    same(pull(K3(1.0, "sequence"), free, policy), backward(free, policy))
    same(as_loss(free, policy, "k3"), backward(free, policy))
    assert value(free, policy, k3(whole(free, policy))) == pytest.approx(exact.divergence(free, policy, free.reference).item(), abs=1e-12)


@pytest.mark.parametrize("kind", [K1, K3])
def test_weighted_estimates_pull_along_the_kl(kind: type[K1] | type[K3], free: TokenMDP, policy: Tensor) -> None:
    same(pull(kind(1.0, "sequence", weighted=True), free, policy), forward(free, policy))
    same(pull(kind(1.0, weighted=True), free, policy), frozen_forward(free, policy))


def test_exact_penalties_pull_prefix_by_prefix(free: TokenMDP, policy: Tensor) -> None:
    same(pull(ExactKL(1.0), free, policy), frozen_forward(free, policy))
    same(pull(OldKL(1.0), free, policy), torch.zeros_like(policy))


def test_weighted_k3_pulls_along_the_kl(free: TokenMDP, policy: Tensor) -> None:
    """w k3 with w = policy / old of the whole answer, differentiated: the bias of k3's gradient is gone, at old and away from it."""
    for old in (policy, policy + free.tilted(0.3, 2)):
        chance = exact.answer_logprobs(free, old).exp()

        def weighted(p: Tensor, old: Tensor = old, chance: Tensor = chance) -> Tensor:
            w = (exact.answer_logprobs(free, p) - exact.answer_logprobs(free, old)).exp()
            return (chance * w * k3(whole(free, p))).sum(1).mean()

        same(exact.gradient(weighted, policy), forward(free, policy))
        assert weighted(policy).item() == pytest.approx(exact.divergence(free, policy, free.reference).item(), abs=1e-12)


def test_off_policy_values_are_biased(free: TokenMDP, policy: Tensor, other: Tensor) -> None:
    exact_kl = exact.divergence(free, policy, free.reference).item()
    for estimator in (k1, k3):
        assert abs(value(free, other, estimator(whole(free, policy))) - exact_kl) > 1e-3


def test_clamped_estimators_stop_pulling_where_the_policy_has_drifted(free: TokenMDP, policy: Tensor) -> None:
    """Why nothing here clamps: beyond the bound the gradient of k3(clamp(u)) is exactly 0."""
    far = torch.tensor([12.0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.grad(k3(far.clamp(-10, 10)).sum(), far)[0] == 0 and torch.autograd.grad(k3(far).sum(), far)[0] > 0.99
