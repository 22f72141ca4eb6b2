"""Expectations against plain loops that know nothing of the oracle: every batch by itself, one call of the library for each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import product

import pytest
import torch
from torch import Tensor

from tilt.errors import NumericError, UsageError
from tilt.objectives import (
    ALGORITHMS,
    K3,
    Credited,
    EntropyBonus,
    ExactKL,
    GroupRelative,
    Layout,
    NoRatio,
    Objective,
    OldKL,
    Outputs,
    PerBudget,
    Rewards,
    Score,
    Signals,
)
from tilt.objectives.credit import Credit
from tilt.oracle import token_mdp as exact
from tilt.oracle.expectation import (
    Situation,
    ascent,
    batches,
    couples,
    effective_samples,
    expect,
    expect_by_prompt,
    fixed_point,
    groups,
    limit,
)
from tilt.oracle.token_mdp import TokenMDP


def entropy(policy: Tensor, which: tuple[Tensor, ...]) -> Tensor:
    said = policy[which[:2]]
    return -(said.softmax(-1) * said.log_softmax(-1)).sum(-1)


def kl(p: Tensor, q: Tensor, which: tuple[Tensor, ...]) -> Tensor:
    one, two = p[which[:2]], q[which[:2]]
    return (one.softmax(-1) * (one.log_softmax(-1) - two.log_softmax(-1))).sum(-1)


def by_loops(row: Objective, mdp: TokenMDP, policy: Tensor, old: Tensor, samples: int) -> tuple[Tensor, float]:
    """Mean and variance of -grad loss: a loop over all batches, a padded forward pass, autograd down to the logits."""
    mean, square = torch.zeros_like(policy), 0.0
    chance = [[exact.answer_logprobs(mdp, old)[g, n].exp().item() for n in range(mdp.answers_count)] for g in range(mdp.prompts)]
    owner = [g for g in range(mdp.prompts) for _ in range(samples)]
    for drawn in product(range(mdp.answers_count), repeat=mdp.prompts * samples):
        answers, weight = [mdp.answers[n] for n in drawn], 1.0
        for g, n in zip(owner, drawn):
            weight *= chance[g][n]
        spots = [(g, mdp.prefixes.index(a[:t]), a[t]) for g, a in zip(owner, answers) for t in range(len(a))]
        which = tuple(torch.tensor(column) for column in zip(*spots))

        def said(logits: Tensor, which: tuple[Tensor, ...] = which) -> Tensor:
            return logits.log_softmax(-1)[which]

        layout = Layout.of([len(a) for a in answers], owner)
        total = torch.tensor([mdp.rewards[g, n].item() for g, n in zip(owner, drawn)], dtype=torch.float64)
        values = torch.tensor([0.3 * len(a[:t]) - 0.1 for a in answers for t in range(len(a))], dtype=torch.float64)
        at = policy.clone().requires_grad_()
        signals = Signals.of(said(old), sampler=said(old), reference=said(mdp.reference), values=values, entropy=entropy(old, which))
        compared = kl(at, mdp.reference, which) if row.against == "reference" else kl(old, at, which)
        loss = row.loss(
            Outputs.of(said(at), entropy=entropy(at, which), kl=compared, values=values), row.prepare(Rewards.of(total), signals, layout)
        )
        found = -torch.autograd.grad(loss, at)[0]
        mean += weight * found
        square += weight * found.square().sum().item()
    return mean, square - mean.square().sum().item()


ROWS = {
    **{name: ALGORITHMS[name] for name in ("ppo", "dapo", "reinforce_pp", "grpo", "high_entropy")},
    "exact_kl_and_entropy": replace(ALGORITHMS["dapo"], penalty=ExactKL(0.3), bonus=EntropyBonus(0.2)),
    "old_kl": replace(ALGORITHMS["grpo"], penalty=OldKL(0.5)),
}


@pytest.mark.parametrize("name", ROWS)
def test_expectations_equal_plain_loops(name: str, small: tuple[TokenMDP, Tensor, Tensor, Tensor]) -> None:
    """All 4^4 batches; every token average, whitening and ratio away from 1 included."""
    mdp, policy, old, critic = small
    mean, variance = by_loops(ROWS[name], mdp, policy, old, 2)
    found = expect(ROWS[name], Situation.of(mdp, 2, policy, old=old, critic=critic))
    torch.testing.assert_close(found.mean, mean, rtol=0, atol=1e-12)
    assert found.variance == pytest.approx(variance, abs=1e-12)
    assert found.noise == pytest.approx(4 * variance / mean.square().sum().item())


def test_orders_of_a_group_are_counted() -> None:
    drawn, orders = groups(3, 4, ordered=False)
    assert len(drawn) == 15 and orders.sum() == 81 and orders[drawn.tolist().index([0, 0, 1, 2])] == 12
    assert groups(3, 4, ordered=True)[0].shape == (81, 4)


def test_chances_of_all_batches_add_up_to_one(mdp: TokenMDP, policy: Tensor) -> None:
    for ordered, count in ((True, 15**4), (False, 120**2)):
        drawn, chance = batches(Situation.of(mdp, 2, policy), ordered=ordered)
        assert drawn.shape == (count, 4) and chance.sum().item() == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("name", ["rloo", "grpo", "ppo", "reinforce_pp_baseline"])
def test_the_order_within_a_group_does_not_matter(name: str, mdp: TokenMDP, policy: Tensor, other: Tensor) -> None:
    at = Situation.of(mdp, 2, policy, old=other)
    one, two = expect(ALGORITHMS[name], at), expect(ALGORITHMS[name], at, ordered=True)
    torch.testing.assert_close(one.mean, two.mean, rtol=0, atol=1e-13)
    assert one.variance == pytest.approx(two.variance, abs=1e-12)


COUPLED = {"sft": True, "raft": True, "reinforce": False, "rloo": False, "rloo_clip": False, "ppo": True, "reinforce_pp": True, "grpo": False,
           "grpo_r1": False, "dr_grpo": False, "dapo": True, "lite_ppo": True, "gspo": False, "sapo": False}  # fmt: skip


@pytest.mark.parametrize("name", COUPLED)
def test_a_row_without_coupling_factorises_by_prompt(name: str, mdp: TokenMDP, policy: Tensor) -> None:
    row, at = ALGORITHMS[name], Situation.of(mdp, 2, policy)
    assert couples(row, at) == COUPLED[name]
    if not COUPLED[name]:
        whole, parts = expect(row, at), expect_by_prompt(row, at)
        torch.testing.assert_close(whole.mean, parts.mean, rtol=0, atol=1e-13)
        assert whole.variance == pytest.approx(parts.variance, abs=1e-12)


@dataclass(frozen=True)
class Looking(Credit):
    """Looks at a number of the batch, which cannot be done for many batches at once."""

    needs = frozenset[str]()
    compares = False

    def __call__(self, rewards: Rewards, signals: Signals, layout: Layout) -> Credited:
        adv = rewards.total[layout.sequence] * (2.0 if rewards.total.max().item() > 1 else 1.0)
        return Credited(adv, adv, rewards.scored)


def test_a_row_that_looks_at_numbers_is_evaluated_batch_by_batch(small: tuple[TokenMDP, Tensor, Tensor, Tensor]) -> None:
    mdp, policy, _, _ = small
    row, at = Objective(Looking(), NoRatio(), Score(), PerBudget(1)), Situation.of(mdp, 2, policy)
    drawn = batches(at, ordered=False)[0][::7]
    plain = replace(row, credit=ALGORITHMS["reinforce"].credit)
    scale = torch.where(mdp.rewards[at.prompt, drawn].max(1).values > 1, 2.0, 1.0)
    torch.testing.assert_close(ascent(row, at, drawn), ascent(plain, at, drawn) * scale.view(-1, 1, 1), rtol=0, atol=1e-14)


@pytest.mark.parametrize("name", ["dapo", "reinforce_pp", "grpo"])
def test_the_limit_is_one_batch_of_every_group(name: str, small: tuple[TokenMDP, Tensor, Tensor, Tensor]) -> None:
    """Quarters over three tokens: every answer comes in 64ths, every pair in 4096ths, so 4096 pairs of each prompt are the batch."""
    mdp, row = small[0], ALGORITHMS[name]
    quarters = mdp.in_parts(4, 3)
    chance = exact.answer_logprobs(mdp, quarters).exp()
    pairs = [
        (g, n, m) for g in range(2) for n in range(4) for m in range(4) for _ in range(round(4096 * (chance[g, n] * chance[g, m]).item()))
    ]
    assert len(pairs) == 8192
    drawn = [(g, mdp.answers[n], mdp.rewards[g, n]) for g, n, m in pairs for n in (n, m)]
    spots = [(g, mdp.prefixes.index(a[:t]), a[t]) for g, a, _ in drawn for t in range(len(a))]
    which = tuple(torch.tensor(column) for column in zip(*spots))
    at = quarters.clone().requires_grad_()
    said, anchor = at.log_softmax(-1)[which], mdp.reference.log_softmax(-1)[which]
    layout = Layout.of([len(a) for _, a, _ in drawn], [i // 2 for i in range(16384)])
    experience = row.prepare(Rewards.of(torch.stack([r for _, _, r in drawn])), Signals.of(said.detach(), reference=anchor), layout)
    found = -torch.autograd.grad(row.loss(Outputs.of(said), experience), at)[0]
    torch.testing.assert_close(limit(row, Situation.of(mdp, 2, quarters)), found, rtol=0, atol=1e-13)


def test_the_limit_needs_fractions(mdp: TokenMDP, policy: Tensor) -> None:
    with pytest.raises(UsageError, match="in_parts"):
        limit(ALGORITHMS["grpo"], Situation.of(mdp, 2, policy))


def test_effective_samples(mdp: TokenMDP, policy: Tensor, other: Tensor) -> None:
    assert effective_samples(Situation.of(mdp, 2, policy)) == pytest.approx(100)
    found = effective_samples(Situation.of(mdp, 2, policy, old=other))
    chance, weight = 0.0, [0.0, 0.0]
    p, q = exact.answer_logprobs(mdp, policy).exp(), exact.answer_logprobs(mdp, other).exp()
    for g in range(2):
        for n in range(15):
            chance += q[g, n].item() / 2
            weight[g] += (p[g, n] ** 2 / q[g, n]).item()
    assert chance == pytest.approx(1) and found == pytest.approx(50 / weight[0] + 50 / weight[1]) and found < 99


def test_a_step_that_is_too_long_is_said(bandit: Callable[..., tuple[TokenMDP, Tensor]]) -> None:
    arms, at = bandit([[0.5, 0.3, 0.2]], [[1.0, 0.2, -0.7]])
    row = Objective(GroupRelative("mean", "none"), NoRatio(), Score(), PerBudget(1), K3(0.5))
    with pytest.raises(NumericError, match="no fixed point after 30 steps of 9"):
        fixed_point(row, arms, 2, at, step=9, steps=30)
