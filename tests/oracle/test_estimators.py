"""What each estimator is unbiased for, by enumeration of every group: unequal lengths, two prompts of different difficulty, 1e-10."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import product
from math import comb, inf, sqrt

import pytest
import torch
from torch import Tensor

from tilt.objectives import (
    ALGORITHMS,
    GAE,
    Average,
    CappedScore,
    Clip,
    ClippedGeometricRatio,
    Credit,
    Credited,
    GeometricRatio,
    GeometricTokenRatio,
    GroupRelative,
    Importance,
    Layout,
    NoPenalty,
    NoRatio,
    NoValue,
    Objective,
    Outputs,
    PerBudget,
    ProductRatio,
    Ratio,
    Return,
    ReturnToGo,
    Rewards,
    Score,
    SequenceAverage,
    Signals,
    SmoothWeight,
    SoftGate,
    Surrogate,
    TokenAverage,
    TokenRatio,
    TruncatedImportance,
    TwoSided,
)
from tilt.oracle import token_mdp as exact
from tilt.oracle.expectation import Expectation, Situation, ascent, batches, compare, couples, expect, expect_by_prompt, limit
from tilt.oracle.token_mdp import TokenMDP

Arms = Callable[..., tuple[TokenMDP, Tensor]]
RLOO = GroupRelative("leave_one_out", "none")
MEAN = GroupRelative("mean", "none")
SUM = PerBudget(1)
SCORE, NONE = Score(), NoRatio()


def row(credit: Credit, average: Average = SUM, surrogate: Surrogate = SCORE, ratio: Ratio = NONE) -> Objective:
    return Objective(credit, ratio, surrogate, average)


def same(found: Tensor, target: Tensor, atol: float = 1e-10) -> None:
    torch.testing.assert_close(found, target, rtol=0, atol=atol)


def grad_j(mdp: TokenMDP, policy: Tensor, kl: float = 0.0) -> Tensor:
    return exact.gradient(lambda p: exact.expected_reward(mdp, p, kl=kl), policy)


def mean_of(objective: Objective, mdp: TokenMDP, policy: Tensor, samples: int = 2, **others: Tensor) -> Tensor:
    at = Situation.of(mdp, samples, policy, **others)
    return (expect if couples(objective, at) else expect_by_prompt)(objective, at).mean


# --------------------------------------------------------------------------------------------- the policy gradient


@pytest.mark.parametrize("credit", [Return(), ReturnToGo(), ReturnToGo(baseline="critic")], ids=["return", "to_go", "baseline"])
def test_reinforce_is_grad_j(credit: Credit, mdp: TokenMDP, policy: Tensor) -> None:
    """Any baseline of the state leaves the mean alone; the dense rewards are causal."""
    dense = replace(mdp, steps=exact.entropies(mdp.tilted(1, 8))[:, mdp.prefix] * (1 + mdp.token))
    critic = mdp.tilted(2, 4)[..., 0]
    for samples in (1, 2):
        same(mean_of(row(credit), dense, policy, samples, critic=critic), grad_j(dense, policy))


def test_reward_to_go_needs_causal_rewards(mdp: TokenMDP, policy: Tensor) -> None:
    """A dense reward that looks ahead, paid before the token it judges, is lost by reward-to-go and not by the return."""
    ahead = TokenMDP.of(lambda g, a: 0.0, steps=lambda g, a: [float(t == 0 and 1 in a[1:]) for t in range(len(a))])
    same(mean_of(row(Return()), ahead, policy), grad_j(ahead, policy))
    assert compare(mean_of(row(ReturnToGo()), ahead, policy), grad_j(ahead, policy)).cosine < 0.99


def test_the_mean_score_is_zero(mdp: TokenMDP, policy: Tensor) -> None:
    """E[grad log policy] = 0, for every policy."""
    same(mean_of(ALGORITHMS["reinforce"], replace(mdp, rewards=torch.ones_like(mdp.rewards)), policy), torch.zeros_like(policy), 1e-15)


@dataclass(frozen=True)
class ActionBaseline(Credit):
    """The return less the probability of the action: a baseline of the action, not of the state."""

    needs = frozenset({"old"})
    compares = False

    def __call__(self, rewards: Rewards, signals: Signals, layout: Layout) -> Credited:
        return Credited(rewards.total[layout.sequence] - signals.old.exp(), rewards.total[layout.sequence], rewards.scored)


def test_a_baseline_of_the_action_is_biased(mdp: TokenMDP, policy: Tensor) -> None:
    assert compare(mean_of(row(ActionBaseline()), mdp, policy), grad_j(mdp, policy)).error > 0.01


def test_reward_to_go_and_a_critic_lower_the_variance(mdp: TokenMDP, policy: Tensor) -> None:
    dense = TokenMDP.of(lambda g, a: 0.0, steps=lambda g, a: [(token == g) - 0.2 for token in a])
    at = Situation.of(dense, 1, policy)
    noise = [expect(row(credit), at).noise for credit in (Return(), ReturnToGo(), ReturnToGo(baseline="critic"))]
    assert noise[0] > noise[1] > noise[2] > 0


def test_the_discount_without_its_factor_is_the_gradient_of_no_function(mdp: TokenMDP, policy: Tensor) -> None:
    """sum_t grad l_t sum_(k>=t) gamma^(k-t) r_k: the Jacobian is not symmetric; with gamma = 1 it is."""

    one = TokenMDP(3, 3, mdp.rewards[:1], mdp.steps[:1], mdp.reference[:1])

    def asymmetry(gamma: float) -> float:
        def field(p: Tensor) -> Tensor:
            return expect(row(ReturnToGo(gamma=gamma)), Situation.of(one, 1, p.view(1, 7, 3))).mean.flatten()

        at, small = policy[0].flatten(), torch.eye(21, dtype=torch.float64) * 1e-4
        jacobian = torch.stack([(field(at + shift) - field(at - shift)) / 2e-4 for shift in small])
        return ((jacobian - jacobian.T).norm() / jacobian.norm()).item()

    assert asymmetry(1.0) < 1e-7 and asymmetry(0.8) > 0.01


@pytest.mark.parametrize("lam", [0.0, 0.5, 0.95, 1.0])
@pytest.mark.parametrize("kl", [0.0, 0.3])
def test_gae_is_grad_j_where_the_critic_is_exact(lam: float, kl: float, mdp: TokenMDP, policy: Tensor) -> None:
    critic = exact.state_values(mdp, policy, kl=kl)
    same(mean_of(row(GAE(lam=lam, kl=kl, whitened=False)), mdp, policy, 1, critic=critic), grad_j(mdp, policy, kl))


def test_gae_with_a_wrong_critic_is_right_only_for_lam_one(mdp: TokenMDP, policy: Tensor) -> None:
    critic = exact.state_values(mdp, policy) + mdp.tilted(1.5, 7)[..., 0]
    found = [mean_of(row(GAE(lam=lam, whitened=False)), mdp, policy, 1, critic=critic) for lam in (0.0, 0.5, 0.95, 1.0)]
    cosines = [compare(x, grad_j(mdp, policy)).cosine for x in found]
    assert cosines[0] < cosines[1] < cosines[2] < 0.9999999 and cosines[0] < 0.98
    same(found[3], grad_j(mdp, policy))


# ------------------------------------------------------------------------------------------------------- groups


def groups_by_loops(objective: Objective, mdp: TokenMDP, policy: Tensor) -> Tensor:
    """E[-grad loss] over all 15^2 groups of each prompt, the other prompt's group standing still; a padded batch, one call for each group."""
    total = torch.zeros_like(policy)
    for g in range(2):
        for n, m in product(range(15), repeat=2):
            drawn = [(g, n), (g, m), (1 - g, 0), (1 - g, 0)]
            at = policy.clone().requires_grad_()
            said, padded = at.log_softmax(-1), torch.full((4, 3), torch.nan, dtype=torch.float64)
            for i, (prompt, number) in enumerate(drawn):
                for t, token in enumerate(mdp.answers[number]):
                    padded[i, t] = said[prompt, mdp.prefixes.index(mdp.answers[number][:t]), token]
            flat = padded[~padded.isnan()]
            layout = Layout.of([len(mdp.answers[number]) for _, number in drawn], [g, g, 1 - g, 1 - g])
            rewards = Rewards.of(torch.stack([mdp.rewards[prompt, number] for prompt, number in drawn]))
            loss = objective.loss(Outputs.of(flat), objective.prepare(rewards, Signals.of(flat.detach()), layout))
            chance = 1.0
            for number in (n, m):
                for t, token in enumerate(mdp.answers[number]):
                    chance *= said[g, mdp.prefixes.index(mdp.answers[number][:t]), token].exp().item()
            total[g] -= chance * torch.autograd.grad(loss, at)[0][g]
    return total


def test_rloo_is_grad_j_by_loops_over_all_groups(mdp: TokenMDP, policy: Tensor) -> None:
    found = groups_by_loops(row(RLOO), mdp, policy)
    same(found, grad_j(mdp, policy))
    same(found, mean_of(row(RLOO), mdp, policy), 1e-14)


@pytest.mark.parametrize("samples", [2, 3, 4])
def test_rloo_is_grad_j_and_grpo_without_std_its_multiple(samples: int, mdp: TokenMDP, policy: Tensor) -> None:
    same(mean_of(row(RLOO), mdp, policy, samples), grad_j(mdp, policy))
    same(mean_of(row(replace(RLOO, kl=0.4)), mdp, policy, samples), grad_j(mdp, policy, 0.4))
    same(mean_of(row(MEAN), mdp, policy, samples), (1 - 1 / samples) * grad_j(mdp, policy))
    same(mean_of(ALGORITHMS["dr_grpo"], mdp, policy, samples), (1 - 1 / samples) / 3000 * grad_j(mdp, policy))


def test_the_mean_of_the_group_is_a_multiple_of_rloo_sample_by_sample(mdp: TokenMDP, policy: Tensor) -> None:
    at = Situation.of(mdp, 3, policy)
    drawn = torch.randint(15, (60, 6), generator=torch.Generator().manual_seed(0))
    same(ascent(row(MEAN), at, drawn), 2 / 3 * ascent(row(RLOO), at, drawn), 1e-14)


@pytest.mark.parametrize("samples", [2, 3])
def test_dividing_by_the_length_aims_at_another_objective(samples: int, mdp: TokenMDP, policy: Tensor) -> None:
    """1/n_i: (1 - 1/G) grad E[(R - sg J) / n], prompt by prompt; not J, whatever G."""
    chance = exact.answer_logprobs(mdp, policy).exp()
    own = (chance * mdp.rewards).sum(1, keepdim=True)
    target = exact.gradient(lambda p: exact.answer_mean(mdp, p, (mdp.rewards - own) / mdp.layout.lengths), policy)
    same(mean_of(row(RLOO, SequenceAverage()), mdp, policy, samples), target)
    same(mean_of(row(MEAN, SequenceAverage()), mdp, policy, samples), (1 - 1 / samples) * target)
    assert compare(target, grad_j(mdp, policy)).cosine < 0.99


@pytest.mark.parametrize("credit", [RLOO, MEAN], ids=["rloo", "mean"])
def test_the_token_average_is_a_consistent_ratio(credit: GroupRelative, mdp: TokenMDP) -> None:
    """Ever more groups lead to grad J / E[n], one scale for all prompts; two groups are off, four samples less than two."""
    quarters = mdp.in_parts(4, 3)
    length = exact.answer_mean(mdp, quarters, mdp.layout.lengths.to(torch.float64))
    for samples in (2, 3):
        share = 1 - 1 / samples if credit == MEAN else 1.0
        small = mdp if samples == 2 else TokenMDP(3, 3, mdp.rewards[:1], mdp.steps[:1], mdp.reference[:1])
        at = quarters[: small.prompts]
        n = length if samples == 2 else exact.answer_mean(small, at, mdp.layout.lengths.to(torch.float64))
        same(limit(row(credit, TokenAverage()), Situation.of(small, samples, at)), share * grad_j(small, at) / n)
    one = TokenMDP(3, 3, mdp.rewards[:1], mdp.steps[:1], mdp.reference[:1])
    off = [compare(mean_of(row(credit, TokenAverage()), one, quarters[:1], samples), grad_j(one, quarters[:1])) for samples in (2, 3, 4)]
    assert off[0].cosine < off[1].cosine < off[2].cosine < 1 - 1e-6


# -------------------------------------------------------------------------------------------- standard deviations


def weight(p: float, samples: int, ddof: int = 0) -> float:
    """w_G(p) = E_k sqrt(k (G - k)) / (G p (1 - p)), k ~ Bin(G, p); times sqrt((G - 1) / G) with the sample's divisor."""
    total = sum(comb(samples, k) * p**k * (1 - p) ** (samples - k) * sqrt(k * (samples - k)) for k in range(samples + 1))
    return total / (samples * p * (1 - p)) * (sqrt((samples - 1) / samples) if ddof else 1.0)


W_TABLE = {2: 1, 3: 1.4142135624, 4: 1.68291698, 8: 2.27559602, 16: 2.71574885, 64: 3.01314835, 1024: 3.06982515}


@pytest.mark.parametrize("samples", W_TABLE)
def test_the_weight_of_a_prompt_is_the_printed_one(samples: int, bandit: Arms) -> None:
    """By enumeration of the groups of a coin with p = .1203…, all 1,025 of them for G = 1024."""
    p = 0.12035370128945594
    coin, at = bandit([[p, 1 - p]], [[1.0, 0.0]])
    found = compare(mean_of(row(GroupRelative(ddof=0)), coin, at, samples), grad_j(coin, at))
    assert found.multiple == pytest.approx(W_TABLE[samples], abs=5e-9) and found.residual < 1e-12
    assert weight(p, samples) == pytest.approx(W_TABLE[samples], abs=5e-9)
    assert 1 / sqrt(p * (1 - p)) == pytest.approx(3.07337982, abs=5e-9)


@pytest.mark.parametrize("samples", [2, 3, 4])
@pytest.mark.parametrize("ddof", [0, 1])
def test_grpo_on_binary_rewards_weighs_each_prompt(samples: int, ddof: int, binary: TokenMDP, policy: Tensor) -> None:
    """w_G(p) grad p for each prompt: the right direction, prompts weighed by their difficulty."""
    found, target = mean_of(row(GroupRelative(ddof=ddof)), binary, policy, samples), grad_j(binary, policy)  # type: ignore[arg-type]
    success = (exact.answer_logprobs(binary, policy).exp() * binary.rewards).sum(1).tolist()
    weights = [weight(p, samples, ddof) for p in success]
    assert (max(weights) > 1.05 * min(weights)) == (samples == 4), "one weight for 2 and for 3 samples, whatever p"
    for g in range(2):
        same(found[g], weights[g] * target[g])


def test_grpo_weighs_prompts_at_any_number_of_prompts(bandit: Arms) -> None:
    """Two bandits, four samples, sample std: lengths of the gradients are 1.09785 and 1.46383 of grad J's."""
    arms, at = bandit([[0.5, 0.3, 0.2], [0.9, 0.05, 0.05]], [[1, 0.2, -0.7], [0, 1, 1]])
    found, target = mean_of(row(GroupRelative()), arms, at, 4), grad_j(arms, at)
    assert [(found[g].norm() / target[g].norm()).item() for g in range(2)] == pytest.approx([1.09785, 1.46383], abs=5e-6)


def test_grpo_on_general_rewards_has_a_bias_that_more_prompts_do_not_lift(mdp: TokenMDP) -> None:
    quarters = mdp.in_parts(4, 3)
    for average in (SUM, SequenceAverage()):
        at = Situation.of(mdp, 2, quarters)
        found = expect(row(GroupRelative(), average), at).mean
        assert compare(found, grad_j(mdp, quarters)).cosine < 0.99
        same(limit(row(GroupRelative(), average), at), found)


REINFORCE_PP = {2: 0.46396, 4: 0.20709, 8: 0.09902, 16: 0.04534, 32: 0.02147, 64: 0.01048}


@pytest.mark.parametrize("batch", REINFORCE_PP)
def test_whitening_over_the_batch_is_consistent(batch: int, bandit: Arms) -> None:
    """sigma E[g] = grad J + O(1/B): the printed relative errors on pi = .5 .3 .2, r = 1 .2 -.7."""
    arms, at = bandit([[0.5, 0.3, 0.2]], [[1, 0.2, -0.7]])
    chance = at.exp().flatten()
    sigma = ((chance * arms.rewards[0] ** 2).sum() - (chance * arms.rewards[0]).sum() ** 2).sqrt()
    found = sigma * mean_of(row(ReturnToGo(whitened=True)), arms, at, batch)
    assert compare(found, grad_j(arms, at)).error == pytest.approx(REINFORCE_PP[batch], abs=6e-6)


# ------------------------------------------------------------------------------------------- gates, at policy = old


def every(objective: Objective, at: Situation) -> Tensor:
    return ascent(objective, at, batches(at, ordered=False)[0][::11])


def test_clipped_ppo_starts_at_grad_j(mdp: TokenMDP, policy: Tensor) -> None:
    """With A = A^pi + b(s), at policy = old."""
    for lam in (0.0, 0.95):
        same(mean_of(row(GAE(lam=lam, whitened=False), SUM, Clip(), TokenRatio()), mdp, policy, 1), grad_j(mdp, policy))


def test_ppo_of_the_table_leads_to_grad_j_over_length_and_deviation(mdp: TokenMDP) -> None:
    quarters = mdp.in_parts(4, 3)
    ppo = ALGORITHMS["ppo"]
    at = Situation.of(mdp, 2, quarters, critic=exact.state_values(mdp, quarters, kl=0.05))
    found = compare(limit(ppo, at), grad_j(mdp, quarters, 0.05))
    assert found.residual < 1e-10 and found.multiple > 0
    plain = replace(ppo, credit=replace(ppo.credit, whitened=False))
    length = exact.answer_mean(mdp, quarters, mdp.layout.lengths.to(torch.float64))
    same(limit(plain, at), grad_j(mdp, quarters, 0.05) / length)


GATES = {
    "clip": (Clip(0.2, 0.28), TokenRatio()),
    "two_sided": (TwoSided(), TokenRatio()),
    "capped_score": (CappedScore(1.0), TokenRatio()),
    "soft_gate": (SoftGate(1, 1.05), TokenRatio()),
    "importance": (Importance(), TokenRatio()),
    "product": (Clip(), ProductRatio()),
    "geometric": (Clip(3e-4, 4e-4), GeometricRatio()),
    "geometric_token": (Clip(3e-4, 4e-4), GeometricTokenRatio()),
    "geometric_clipped": (Importance(), ClippedGeometricRatio(0.4)),
    "smooth_weight": (SmoothWeight(2, 3), ProductRatio()),
}


@pytest.mark.parametrize("gate", GATES)
def test_every_gate_has_slope_one_at_old(gate: str, mdp: TokenMDP, policy: Tensor) -> None:
    """The GRPO row with that average; a product of ratios is the score summed over actions, under the sequence average."""
    surrogate, ratio = GATES[gate]
    at = Situation.of(mdp, 2, policy)
    averages: list[Average] = [SequenceAverage()] if "geometric" in gate or gate == "product" else [SUM, TokenAverage(), SequenceAverage()]
    for average in averages:
        plain = row(GroupRelative(), SUM if gate == "product" else average)
        same(every(row(GroupRelative(), average, surrogate, ratio), at), every(plain, at), 1e-13)


def test_gspo_at_old_is_grpo_with_the_sequence_average(mdp: TokenMDP, policy: Tensor) -> None:
    at = Situation.of(mdp, 2, policy)
    same(every(ALGORITHMS["gspo"], at), every(replace(ALGORITHMS["grpo"], penalty=NoPenalty()), at), 1e-14)


# --------------------------------------------------------------------------------------------------- off-policy


@pytest.mark.parametrize("samples", [2, 3])
def test_the_unclipped_product_ratio_is_unbiased_anywhere(samples: int, mdp: TokenMDP, policy: Tensor, other: Tensor) -> None:
    """Samples from `other`, gradient of J at `policy`; the leave-one-out baseline included, and a clip that nothing reaches."""
    assert compare(grad_j(mdp, other), grad_j(mdp, policy)).error > 0.1
    for surrogate in (Importance(), Clip(1.0, inf)):
        found = mean_of(row(RLOO, SequenceAverage(), surrogate, ProductRatio()), mdp, policy, samples, old=other)
        same(found, grad_j(mdp, policy))
    found = mean_of(row(RLOO, SequenceAverage(), Clip(), ProductRatio()), mdp, policy, samples, old=other)
    assert compare(found, grad_j(mdp, policy)).error > 0.01, "clipping is biased by design"


def test_token_ratios_are_right_to_first_order_only(mdp: TokenMDP, policy: Tensor) -> None:
    """At a distance e from old the error is of order e: halving e halves it."""
    errors = []
    for distance in (0.02, 0.01):
        old = policy + mdp.tilted(distance, 2)
        found = mean_of(row(RLOO, SUM, Importance(), TokenRatio()), mdp, policy, old=old)
        errors.append(compare(found, grad_j(mdp, policy)).error)
    assert errors[1] > 1e-4 and errors[0] / errors[1] == pytest.approx(2, abs=0.1)


def test_the_geometric_ratio_is_no_importance_weight(mdp: TokenMDP, policy: Tensor, other: Tensor) -> None:
    """E_old[w] = 1, E_old[s] is not; given the length, E[s | n] <= E[w | n]^(1/n)."""
    n = mdp.layout.lengths
    chance, log_w = (exact.answer_logprobs(mdp, other).exp(), exact.answer_logprobs(mdp, policy) - exact.answer_logprobs(mdp, other))
    w, s = log_w.exp(), (log_w / n).exp()
    same((chance * w).sum(1), torch.ones(2, dtype=torch.float64))
    assert ((chance * s).sum(1) - 1).abs().min() > 1e-3
    for g, length in product(range(2), (1, 2, 3)):
        own = chance[g] * (n == length)
        mean_s, mean_w = (own * s[g]).sum() / own.sum(), (own * w[g]).sum() / own.sum()
        assert mean_s <= mean_w ** (1 / length) + 1e-12
        assert length > 1 or mean_s == pytest.approx(mean_w)


@pytest.mark.parametrize("surrogate", [Clip(3e-4, 4e-4), Clip(0.2, 0.2), Importance()], ids=["tight", "wide", "off"])
def test_gspo_token_is_gspo(surrogate: Surrogate, mdp: TokenMDP, policy: Tensor, other: Tensor) -> None:
    """Batch by batch, on and off policy, clipping or not."""
    for at in (Situation.of(mdp, 2, policy), Situation.of(mdp, 2, policy, old=other)):
        one = every(row(GroupRelative(), SequenceAverage(), surrogate, GeometricRatio()), at)
        same(one, every(row(GroupRelative(), SequenceAverage(), surrogate, GeometricTokenRatio()), at), 1e-13)


def test_decoupled_ppo_is_ppo_where_proximal_is_behaviour(mdp: TokenMDP, policy: Tensor, other: Tensor) -> None:
    """old = sampler: the factor old / sampler is 1, batch by batch."""
    decoupled = ALGORITHMS["decoupled_ppo"]
    plain = replace(decoupled, corrections=())
    at = Situation.of(mdp, 2, policy, old=other)
    same(every(decoupled, at), every(plain, at), 1e-15)
    stale = Situation.of(mdp, 2, policy, old=other, sampler=other + mdp.tilted(0.3, 8))
    assert (every(decoupled, stale) - every(plain, stale)).abs().max() > 1e-3


def test_decoupled_without_a_clip_weighs_by_policy_over_behaviour(mdp: TokenMDP, policy: Tensor, other: Tensor) -> None:
    """(old / sampler) (policy / old) Adv = (policy / sampler) Adv, whatever the proximal policy."""
    free = Objective(GroupRelative(), TokenRatio(), Importance(), TokenAverage(), corrections=(TruncatedImportance(inf),))
    sampler = other + mdp.tilted(0.3, 8)
    found = every(free, Situation.of(mdp, 2, policy, old=other, sampler=sampler))
    same(found, every(replace(free, corrections=()), Situation.of(mdp, 2, policy, old=sampler)), 1e-13)


def test_the_uncapped_weight_of_sequences_corrects_for_another_sampler(mdp: TokenMDP, policy: Tensor, other: Tensor) -> None:
    """Answers of `other`, one step at policy = old: of the sequence exact, of the token biased, capped biased."""
    at = Situation.of(mdp, 2, policy, sampler=other)
    for correction, exactly in ((TruncatedImportance(inf, "sequence"), True), (TruncatedImportance(inf), False), (TruncatedImportance(1.0, "sequence"), False)):  # fmt: skip
        corrected = replace(row(Return()), corrections=(correction,))
        assert (compare(expect(corrected, at).mean, grad_j(mdp, policy)).error < 1e-10) == exactly


def test_clipping_is_pessimistic(mdp: TokenMDP, policy: Tensor, other: Tensor) -> None:
    ratio = (exact.logprobs(mdp, policy) - exact.logprobs(mdp, other)).exp().flatten()
    for advantage in (1.0, -0.5):
        adv = torch.full_like(ratio, advantage)
        assert (Clip()(ratio, ratio.log(), adv) <= Importance()(ratio, ratio.log(), adv)).all()


# --------------------------------------------------------------------------------------------------- mutants


@dataclass(frozen=True)
class FirstOnly(Average):
    """A mask is dropped: unequal lengths are padded to the longest, and every pad counts in the denominator."""

    def __call__(self, layout: Layout, counted: Tensor) -> Tensor:
        return torch.full((layout.actions,), 1.0, dtype=torch.float64) / (layout.sequences * layout.lengths.max())


@dataclass(frozen=True)
class Flipped(Surrogate):
    def __call__(self, ratio: Tensor, logprobs: Tensor, advantages: Tensor) -> Tensor:
        return -logprobs * advantages


MUTANTS = {
    "baseline includes self": row(MEAN),
    "sign": row(Return(), surrogate=Flipped()),
    "pads in the denominator": row(RLOO, FirstOnly()),
    "divided by the length": row(RLOO, SequenceAverage()),
    "divided by the batch's tokens": row(RLOO, TokenAverage()),
    "standard deviation": row(GroupRelative("leave_one_out", "group_std")),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_mutants_are_not_grad_j(mutant: str, mdp: TokenMDP, policy: Tensor) -> None:
    found: Expectation = expect(MUTANTS[mutant], Situation.of(mdp, 2, policy))
    assert compare(found.mean, grad_j(mdp, policy)).error > 0.01


def test_the_value_term_is_not_in_the_policys_gradient(mdp: TokenMDP, policy: Tensor) -> None:
    ppo, at = ALGORITHMS["ppo"], Situation.of(mdp, 2, policy)
    same(every(ppo, at), every(replace(ppo, value=NoValue()), at), 0)
