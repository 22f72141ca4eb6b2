"""Edges that no row of the table reaches with ordinary numbers: settings at their limits, advantage 0, ratios on the bound, unscored entries."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tilt.errors import UsageError
from tilt.objectives import (
    ALGORITHMS,
    K1,
    K2,
    K3,
    CappedScore,
    Clip,
    ClippedGeometricRatio,
    ExactKL,
    GroupRelative,
    Layout,
    MaskedImportance,
    Objective,
    OldKL,
    PerBudget,
    ProcessRelative,
    Proportional,
    ReturnToGo,
    Rewards,
    Signals,
    Teacher,
    TrustRegion,
    TwoSided,
    batch_metrics,
)
from tilt.objectives.credit import Credited, whiten, whitened_rewards


def double(*numbers: float) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


# ------------------------------------------------------------------------------------------------ credit


def test_whitening_of_what_is_equal_is_zero_whatever_the_rest_holds() -> None:
    seen = torch.tensor([True, True, False])
    assert whiten(double(3, 3, 7), seen, 1, 0.0).tolist() == [0, 0, 0] == whiten(double(3, 3, -7), seen, 0, 0.0).tolist()
    assert whiten(double(1, 3, float("nan")), seen, 0, 0.0).tolist() == [-1, 1, 0]
    assert whiten(double(1, 3, float("nan")), seen, 1, 2.0).tolist() == [-0.5, 0.5, 0]


def test_whitened_rewards_of_what_nobody_scored_are_zero() -> None:
    """Mean 2 and deviation sqrt 2 of the first two, the mean added back; the third is 0 whatever it holds."""
    found = whitened_rewards(double(1, 3, float("nan")), torch.tensor([True, True, False]))
    assert found.tolist() == pytest.approx([2 - 0.5**0.5, 2 + 0.5**0.5, 0])


def test_epsilon_of_a_whitened_group_is_that_of_a_deviation() -> None:
    """(x - mean) / sqrt(var + eps^2): .3 beside a deviation of 1."""
    row = replace(ALGORITHMS["dapo"], credit=GroupRelative("mean", "whitened", ddof=0, eps=0.3))
    found = row.prepare(Rewards.of(double(1, 3)), Signals.of(double(0, 0)), Layout.of([1, 1], [0, 0])).advantages
    assert found.tolist() == pytest.approx([-1 / 1.09**0.5, 1 / 1.09**0.5])


@pytest.mark.parametrize(
    ("credit", "wrong"),
    [(ReturnToGo, {"kl": -0.1}), (Teacher, {"discount": 1.1}), (GroupRelative, {"kl": -0.1}), (ProcessRelative, {"eps": -1e-9})],
)
def test_credit_refuses_impossible_numbers(credit: Any, wrong: dict[str, float]) -> None:
    with pytest.raises(UsageError, match=next(iter(wrong))):
        credit(**wrong)


def test_who_compares() -> None:
    assert [ReturnToGo(baseline=b).compares for b in ("none", "critic", "group_mean")] == [False, False, True]
    assert ReturnToGo(baseline="critic").needs == {"values"} and ReturnToGo(kl=0.1).needs == {"old", "reference"}


@dataclass(frozen=True)
class Everything:
    """Credit that adds up whatever it is given, over the whole batch."""

    needs = frozenset({"old"})
    compares = False

    def __call__(self, rewards: Rewards, signals: Signals, layout: Layout) -> Credited:
        sums = [x.sum() for x in (rewards.total, rewards.steps, signals.old, signals.values, signals.final)]
        assert not (rewards.ends & ~rewards.scored[layout.sequence]).any()
        advantages = torch.stack(sums).sum().expand(layout.actions)
        return Credited(advantages, advantages, rewards.scored)


def test_credit_of_your_own_is_given_zeros_in_place_of_what_nobody_scored() -> None:
    junk = float("nan")
    rewards = Rewards.of(double(1, junk), double(0, 2, junk), scored=torch.tensor([True, False]))
    signals = Signals.of(double(4, 8, junk), values=double(16, 32, junk), final=double(64, junk))
    row = replace(ALGORITHMS["ppo"], credit=Everything())
    experience = row.prepare(rewards, signals, Layout.of([2, 1]))
    assert experience.advantages.tolist() == [127, 127, 0] == experience.returns.tolist()


def test_rewards_that_name_no_ends_end_their_steps_where_these_are_paid() -> None:
    layout, row = Layout.of([3, 2], [0, 0]), replace(ALGORITHMS["grpo_process"], credit=ProcessRelative())
    steps, signals = double(0.5, 0, 1, 0, -0.5), Signals.of(torch.zeros(5).double(), reference=torch.zeros(5).double())
    named = Rewards.of(double(0, 0), steps)
    bare = Rewards(named.total, steps=steps, scored=named.scored)
    assert torch.equal(row.prepare(bare, signals, layout).advantages, row.prepare(named, signals, layout).advantages)


# ------------------------------------------------------------------------------------------------ sides of a clip


@pytest.mark.parametrize(
    ("piece", "ratio", "advantage", "side"),
    [
        (Clip(0.25, 0.5), 1.5, 1, ""), (Clip(0.25, 0.5), 1.51, 1, "high"), (Clip(0.25, 0.5), 1.51, 0, ""), (Clip(0.25, 0.5), 1.51, -1, ""),
        (Clip(0.25, 0.5), 0.75, -1, ""), (Clip(0.25, 0.5), 0.74, -1, "low"), (Clip(0.25, 0.5), 0.74, 0, ""), (Clip(0.25, 0.5), 0.74, 1, ""),
        (TwoSided(0.25, 0.5, 2), 1.5, 1, ""), (TwoSided(0.25, 0.5, 2), 1.51, 1, "high"), (TwoSided(0.25, 0.5, 2), 2.5, 0, ""),
        (TwoSided(0.25, 0.5, 2), 2, -1, ""), (TwoSided(0.25, 0.5, 2), 2.01, -1, "high"), (TwoSided(0.25, 0.5, 2), 1.9, -1, ""),
        (TwoSided(0.25, 0.5, 2), 0.75, -1, ""), (TwoSided(0.25, 0.5, 2), 0.74, -1, "low"), (TwoSided(0.25, 0.5, 2), 0.74, 0, ""),
        (TwoSided(0.25, 0.5, 2), 0.74, 1, ""), (CappedScore(1.5), 1.5, 1, ""), (CappedScore(1.5), 1.51, -1, "high"), (CappedScore(1.5), 0.1, 1, ""),
    ],
)  # fmt: skip
def test_what_counts_as_clipped(piece: Any, ratio: float, advantage: float, side: str) -> None:
    """On the bound nothing is cut yet, and at advantage 0 there is nothing to cut."""
    low, high = piece.clipped(double(ratio), double(advantage))
    assert (low.item(), high.item()) == (side == "low", side == "high")


@pytest.mark.parametrize(
    ("change", "advantage", "side"),
    [
        (0.25, 1, ""), (0.26, 1, "high"), (0.26, 0, ""), (0.26, -1, ""), (-0.25, -1, ""), (-0.26, -1, "low"), (-0.26, 0, ""), (-0.26, 1, ""),
    ],
)  # fmt: skip
def test_what_counts_as_clipped_by_the_ratio_itself(change: float, advantage: float, side: str) -> None:
    low, high = ClippedGeometricRatio(0.25).clipped(double(change), double(0), double(advantage))
    assert (low.item(), high.item()) == (side == "low", side == "high")


def test_at_advantage_zero_the_clipped_ratio_goes_with_the_bad_ones() -> None:
    """max(D, clip(D)): only what is too low is held."""
    layout, change = Layout.of([1, 1]), double(0.5, -0.5)
    assert ClippedGeometricRatio(0.25)(change, double(0, 0), layout, double(0, 0)).log().tolist() == pytest.approx([0.5, -0.25])
    assert ClippedGeometricRatio(0.25)(change, double(0, 0), layout, double(1, 1)).log().tolist() == pytest.approx([0.25, -0.5])


def test_sides_of_a_row_are_those_of_its_surrogate_and_of_its_ratio(f: Any) -> None:
    """A row without a ratio has none; GMPO has those of its ratio; a clip over it has both."""
    outputs = f.outputs()

    def sides(row: Objective) -> tuple[list[bool], list[bool]]:
        low, high = row.clip_sides(outputs, row.prepare(f.rewards, f.signals, f.layout))
        return low.tolist(), high.tolist()

    assert not any(map(any, sides(ALGORITHMS["rloo"]))) and not any(map(any, sides(ALGORITHMS["distill"])))
    change = outputs.logprobs - f.signals.old
    gmpo = replace(ALGORITHMS["gmpo"], ratio=ClippedGeometricRatio(0.25))
    advantages = gmpo.prepare(f.rewards, f.signals, f.layout).advantages
    assert sides(gmpo) == (((change < -0.25) & (advantages < 0)).tolist(), ((change > 0.25) & (advantages > 0)).tolist())
    both = replace(gmpo, surrogate=Clip(0.01, 0.01))
    low, high = (torch.tensor(x) for x in sides(both))
    own = [torch.tensor(x) for x in sides(gmpo)]
    assert (low >= own[0]).all() and (high >= own[1]).all() and (low.sum() > own[0].sum() or high.sum() > own[1].sum())


# ------------------------------------------------------------------------------------------------ averages


def test_a_budget_is_at_least_one_action() -> None:
    assert PerBudget(1).length == 1
    with pytest.raises(UsageError, match="length=0"):
        PerBudget(0)


# ------------------------------------------------------------------------------------------------ penalties


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("kind", [K1, K2, K3])
def test_a_penalty_equals_its_loop(kind: Any, level: str, weighted: bool, f: Any) -> None:
    """Value and gradient of beta k(u), u of the action or of its answer, times policy / old of the same."""
    piece, outputs = kind(0.3, level, weighted), f.outputs()
    found = piece(outputs, f.signals, f.layout)
    leaves = [x.detach().clone().requires_grad_() for x in outputs.logprobs.split(f.layout.lengths.tolist())]
    rows = []
    for x, old, reference in zip(leaves, f.old, f.reference, strict=True):
        groups = [range(len(x))] if level == "sequence" else [[t] for t in range(len(x))]
        for group in groups:
            u = sum(x[t] - reference[t] for t in group)
            each = 0.3 * {K1: lambda u: u, K2: lambda u: u**2 / 2, K3: lambda u: torch.exp(-u) + u - 1}[kind](u)
            rows += [each * torch.exp(sum(x[t] - old[t] for t in group)) if weighted else each] * len(group)
    torch.testing.assert_close(found, torch.stack(rows), rtol=0, atol=1e-12)
    slope = torch.linspace(1, 2, 10, dtype=torch.float64)
    (gradient,) = torch.autograd.grad((slope * found).sum(), outputs.logprobs)
    torch.testing.assert_close(gradient, torch.cat(torch.autograd.grad((slope * torch.stack(rows)).sum(), leaves)), rtol=0, atol=1e-12)
    assert piece.needs == ({"reference", "old"} if weighted else {"reference"})


def test_exact_penalties_scale_what_the_forward_pass_measured(f: Any) -> None:
    outputs = replace(f.outputs(), kl=torch.linspace(0, 1, 10, dtype=torch.float64))
    for piece, against in ((ExactKL(0.3), "reference"), (OldKL(0.3), "old")):
        assert torch.equal(piece(outputs, f.signals, f.layout), 0.3 * outputs.kl) and piece.against == against and piece.needs == {against}
    assert not TrustRegion()(outputs, f.signals, f.layout).any()


@pytest.mark.parametrize(
    ("piece", "name"),
    [
        (TrustRegion, "limit"), (TrustRegion, "iterations"), (TrustRegion, "damping"), (TrustRegion, "backtracks"), (TrustRegion, "decay"),
        (ExactKL, "beta"), (OldKL, "beta"),
    ],
)  # fmt: skip
def test_a_penalty_refuses_impossible_numbers(piece: Any, name: str) -> None:
    with pytest.raises(UsageError, match=name):
        piece(**{name: -1})
    with pytest.raises(UsageError, match="decay"):
        TrustRegion(decay=1.0)
    TrustRegion(damping=0)


# ------------------------------------------------------------------------------------------------ corrections and control


def test_factors_on_the_bounds_of_a_mask_are_kept(f: Any) -> None:
    """x = 2 and x = 1/2 are inside [1/2, 2]."""
    experience = ALGORITHMS["dapo"].prepare(f.rewards, f.signals, f.layout)
    gap = torch.tensor([1, -1, 0, 1.01, -1.01] * 2, dtype=torch.float64) * math.log(2)
    signals = replace(f.signals, sampler=torch.zeros_like(gap), old=gap)
    found = MaskedImportance(0.5, 2.0)(f.outputs(), replace(experience, signals=signals))
    assert found.tolist() == [2, 0.5, 1, 0, 0] * 2
    with pytest.raises(UsageError, match="low"):
        MaskedImportance(-0.1)


def test_a_proportional_controller_moves_the_beta_of_a_penalty_to_the_reference() -> None:
    row = replace(ALGORITHMS["grpo"], control=Proportional(target=0.1, horizon=100))
    found = row.control(row, {"objective/kl": 0.11, "sequences": 10})
    assert found == replace(row, penalty=K3(found.penalty.beta)) and found.penalty.beta == pytest.approx(0.04 * 1.01)
    with pytest.raises(UsageError, match="horizon"):
        Proportional(horizon=0)


# ------------------------------------------------------------------------------------------------ rewards and metrics


def test_rewards_say_nothing_of_what_was_not_given() -> None:
    bare = Rewards(double(1))
    assert (
        bare.steps.numel() == bare.scored.numel() == bare.ends.numel() == bare.trained.numel() == 0 and not bare.parts and not bare.weights
    )


def test_no_mean_holds_an_answer_that_nobody_scored(f: Any) -> None:
    rewards = Rewards.of(double(1, float("nan"), 0.5, -1), scored=torch.tensor([True, False, True, True]))
    found = batch_metrics(rewards, f.signals, f.layout, kl=0.05)
    drift = [(f.signals.old - f.signals.reference)[f.layout.sequence == i].sum().item() for i in range(4)]
    expected = sum(r - 0.05 * drift[i] for i, r in ((0, 1), (2, 0.5), (3, -1)))
    assert found["objective/rlhf_reward"][0].item() == pytest.approx(expected) and found["objective/rlhf_reward"][1] == 3
    nobody = Rewards.of(double(1, 2, 3, 4), scored=torch.zeros(4, dtype=torch.bool))
    found = batch_metrics(nobody, f.signals, f.layout, kl=0.05)
    for name in ("objective/scores", "objective/scores_std", "objective/rlhf_reward", "groups/zero_variance"):
        assert found[name] == (0, 0), name


def test_an_exact_kl_that_was_not_measured_everywhere_is_a_mean_over_what_was(f: Any) -> None:
    row = replace(ALGORITHMS["dapo"], penalty=ExactKL(0.1))
    kl = torch.linspace(0, 0.9, 10, dtype=torch.float64)
    kl[3] = torch.nan
    found = row.metrics(replace(f.outputs(), kl=kl), row.prepare(f.rewards, f.signals, f.layout))
    assert found["policy/kl_reference"][0].item() == pytest.approx(4.5 - 0.3) and found["policy/kl_reference"][1] == 9


def test_a_trust_region_takes_one_step_a_batch() -> None:
    row = replace(ALGORITHMS["dapo"], penalty=TrustRegion())
    assert row.check(samples=8, passes=1) == []
    assert "one natural step" in row.check(samples=8, passes=2)[0] and len(row.check(8, 2)) == 1
