"""Where algorithms go: five arms, beta .5, exact expected gradients followed to the end, and the printed digits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from tilt.objectives import (
    ALGORITHMS,
    GAE,
    K2,
    K3,
    PREFERENCES,
    Answers,
    GroupRelative,
    ImplicitReward,
    NoPenalty,
    NoRatio,
    Objective,
    Pairs,
    Penalty,
    PerBudget,
    ReturnToGo,
    Score,
)
from tilt.objectives.credit import Credit
from tilt.oracle import token_mdp as exact
from tilt.oracle.expectation import Situation, expect_by_prompt, fixed_point
from tilt.oracle.token_mdp import TokenMDP

REWARD = [1, 0.5, 0, -0.5, 0.2]
REFERENCE = [0.1, 0.3, 0.2, 0.25, 0.15]
BOLTZMANN = [0.35693617, 0.39392844, 0.09661212, 0.04442701, 0.10809626]
MEAN = GroupRelative("mean", "none")
K3_ENDS = {
    2: [0.2585651, 0.33831414, 0.14422212, 0.132503, 0.12639564],
    4: [0.38642222, 0.29738766, 0.11371491, 0.09964986, 0.10282535],
    8: [0.44572898, 0.27288813, 0.10129908, 0.08773926, 0.09234454],
}
K3_LIMIT = [0.49790235, 0.24982458, 0.09087429, 0.07810443, 0.08329434]
DISTANCE = {2: 0.098, 4: 0.097, 8: 0.121}


@pytest.fixture(scope="module")
def arms(bandit: Callable[..., tuple[TokenMDP, Tensor]]) -> TokenMDP:
    return bandit([REFERENCE], [REWARD], REFERENCE)[0]


def end(credit: Credit, penalty: Penalty, arms: TokenMDP, samples: int, start: Tensor | None = None) -> Tensor:
    row = Objective(credit, NoRatio(), Score(), PerBudget(1), penalty)
    return fixed_point(row, arms, samples, arms.reference if start is None else start).exp().flatten()


def same(found: Tensor, printed: list[float] | Tensor, atol: float = 6e-9) -> None:
    torch.testing.assert_close(found, torch.as_tensor(printed, dtype=torch.float64), rtol=0, atol=atol)


def hyperbolic(share: float) -> Tensor:
    """pi(a) = b ref(a) / (nu - r(a)), b = .5 / (1 - 1/G), nu > max r such that it adds up to 1: by bisection."""
    low, high = 1 + 1e-12, 50.0
    for _ in range(200):
        nu = (low + high) / 2
        total = sum(0.5 / share * ref / (nu - r) for ref, r in zip(REFERENCE, REWARD))
        low, high = (nu, high) if total > 1 else (low, nu)
    return torch.tensor([0.5 / share * ref / (nu - r) for ref, r in zip(REFERENCE, REWARD)], dtype=torch.float64)


@pytest.mark.parametrize("name", ["reinforce", "ppo", "rloo2", "rloo4"])
def test_kl_in_the_reward_leads_to_boltzmann(name: str, arms: TokenMDP) -> None:
    credit: Credit = {"reinforce": ReturnToGo(kl=0.5), "ppo": GAE(kl=0.5, whitened=False)}.get(name) or GroupRelative(
        "leave_one_out", "none", kl=0.5
    )
    found = end(credit, NoPenalty(), arms, int(name[-1]) if name[-1].isdigit() else 1, arms.tilted(1, 3))
    same(found, BOLTZMANN)
    same(found, exact.optimum(arms, 0.5).policy.exp().flatten(), 2e-13)


@pytest.mark.parametrize("samples", K3_ENDS)
def test_grpo_with_k3_goes_to_its_own_end(samples: int, arms: TokenMDP) -> None:
    """Not to Boltzmann: b' reference / (nu - r)."""
    found = end(MEAN, K3(0.5), arms, samples)
    same(found, K3_ENDS[samples])
    same(found, hyperbolic(1 - 1 / samples), 1e-12)
    assert (found - torch.tensor(BOLTZMANN)).abs().max().item() == pytest.approx(DISTANCE[samples], abs=6e-4)


def test_the_limit_of_many_samples_is_no_nearer_to_boltzmann() -> None:
    same(hyperbolic(1.0), K3_LIMIT)
    assert (hyperbolic(1.0) - torch.tensor(BOLTZMANN)).abs().max().item() == pytest.approx(0.144, abs=6e-4)


def test_grpo_with_std_and_k3(arms: TokenMDP) -> None:
    found = end(GroupRelative(), K3(0.5), arms, 4)
    same(found, [0.684212, 0.129115, 0.063766, 0.07075, 0.052156], 6e-7)
    assert (found - torch.tensor(BOLTZMANN)).abs().max().item() == pytest.approx(0.327, abs=6e-4)


@pytest.mark.parametrize("samples", [2, 4])
def test_grpo_with_k2_is_boltzmann_at_a_scaled_reward(samples: int, arms: TokenMDP) -> None:
    """reference e^((1 - 1/G) r / beta) / Z."""
    found = end(MEAN, K2(0.5), arms, samples)
    same(found, exact.optimum(replace(arms, rewards=(1 - 1 / samples) * arms.rewards), 0.5).policy.exp().flatten(), 2e-13)


def test_rloo_leads_a_policy_of_many_tokens_to_the_tilted_reference(small: tuple[TokenMDP, Tensor, Tensor, Tensor]) -> None:
    """Two prompts, answers of 1 to 3 tokens; on the way the gap beta KL(policy || policy*) is never negative and falls."""
    mdp, row = small[0], replace(ALGORITHMS["rloo"], credit=GroupRelative("leave_one_out", "none", kl=0.7))
    best, at, gaps = exact.optimum(mdp, 0.7), mdp.tilted(1, 3), []
    for _ in range(5):
        gap = best.value.mean() - exact.expected_reward(mdp, at, kl=0.7)
        torch.testing.assert_close(gap, 0.7 * exact.divergence(mdp, at, best.policy), rtol=0, atol=1e-12)
        gaps.append(gap.item())
        at = at + expect_by_prompt(row, Situation.of(mdp, 2, at)).mean
    assert all(a > b > 0 for a, b in pairwise(gaps))
    torch.testing.assert_close(fixed_point(row, mdp, 2, at, step=1.3, tolerance=1e-11).exp(), best.policy.exp(), rtol=0, atol=1e-9)


# --------------------------------------------------------------------------------------- direct preference optimisation


def dpo_gradient(logits: Tensor, sign: float = 1.0) -> Tensor:
    """Population gradient of the `dpo` row on Bradley-Terry data over all ordered pairs of arms; sign -1 prefers the worse one."""
    row = replace(PREFERENCES["dpo"], margin=ImplicitReward(0.5))
    r, ref = torch.tensor(REWARD, dtype=torch.float64), torch.tensor(REFERENCE, dtype=torch.float64).log()
    first, second = [x.flatten() for x in torch.meshgrid(torch.arange(5), torch.arange(5), indexing="ij")]
    chance = torch.sigmoid(sign * (r[first] - r[second])) / 25
    at = logits.clone().requires_grad_()
    said = at.log_softmax(-1)
    pairs = Pairs.of(
        Answers.of(said[first], reference=ref[first], weights=chance), Answers.of(said[second], reference=ref[second], weights=chance)
    )
    return torch.autograd.grad(row.loss(pairs), at)[0]


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_dpo_leads_to_boltzmann_and_the_wrong_sign_to_its_mirror(sign: float) -> None:
    """Stationary at reference e^(r / beta) / Z; with sigmoid(r2 - r1) at reference e^(-r / beta) / Z."""
    r, ref = torch.tensor(REWARD, dtype=torch.float64), torch.tensor(REFERENCE, dtype=torch.float64).log()
    target = (ref + sign * r / 0.5).softmax(-1)
    assert dpo_gradient(target.log(), sign).abs().max() < 1e-16
    at = ref.clone()
    for _ in range(150):
        at = at - 40 * dpo_gradient(at, sign)
    same(at.softmax(-1), target, 2e-13)
    if sign == 1:
        same(at.softmax(-1), BOLTZMANN)
