"""Preference rows: the numbers of fixture P, loops from the papers in value and gradient, and parts that add up."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tilt.objectives import PREFERENCES, Centring, ImplicitReward, Logistic, Pairs, Preference, ScoreMargin


def double(*numbers: float) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


def fixture_p() -> Pairs:
    return Pairs.of(
        double(-4, -3),
        double(-6.5, -2.5),
        reference_chosen=double(-4.4, -2.8),
        reference_rejected=double(-6, -2.9),
        weights=double(0.5, 0.5),
    )


SCORES = Pairs.of(double(1.2, -0.3), double(0.4, 0.5))
DPO, RM = PREFERENCES["dpo"], PREFERENCES["reward_model"]


def test_numbers_of_the_reward_model() -> None:
    assert RM.loss(SCORES).item() == pytest.approx(0.771100665948, abs=1e-12)
    assert replace(RM, margin=ScoreMargin(0.2)).each(SCORES).tolist() == pytest.approx([0.437487951, 1.313261688], abs=1e-9)
    assert replace(RM, regulariser=Centring(0.01)).loss(SCORES).item() == pytest.approx(0.784100665948, abs=1e-12)


def test_numbers_of_dpo() -> None:
    assert DPO.each(fixture_p()).tolist() == pytest.approx([0.649159339, 0.723597113], abs=1e-9)
    assert DPO.loss(fixture_p()).item() == pytest.approx((0.649159339 + 0.723597113) / 2, abs=1e-9)
    smoothed = replace(DPO, link=Logistic(0.1))
    assert smoothed.each(fixture_p()).tolist() == pytest.approx([0.658159339, 0.717597113], abs=1e-9)


def test_conservative_minimum() -> None:
    """(1 - a) ls(x) + a ls(-x) is largest at x = log((1 - a) / a)."""
    x = math.log(9)
    link = Logistic(0.1)
    assert link(double(x)).item() == pytest.approx(0.325083, abs=5e-7)
    assert link(double(x)) < link(double(x + 1e-3)) and link(double(x)) < link(double(x - 1e-3))
    half = Logistic(0.5)
    torch.testing.assert_close(half(double(1.3)), half(double(-1.3)))
    torch.testing.assert_close(Logistic(1.0)(double(1.3)), Logistic(0.0)(double(-1.3)))


def test_wrong_pairs_cost_linearly() -> None:
    assert Logistic()(double(-10, -5)).tolist() == pytest.approx([10.0000454, 5.0067], abs=5e-5)


@pytest.mark.parametrize("seed", range(3))
def test_dpo_equals_its_loop(seed: int) -> None:
    """Value, and gradient -beta s(-h) (grad chosen - grad rejected) / N."""
    generator = torch.Generator().manual_seed(seed)
    beta, smoothing = 0.3, 0.1
    w, lost, ref_w, ref_l = (-5 * torch.rand(7, dtype=torch.float64, generator=generator) for _ in range(4))
    w, lost = w.requires_grad_(), lost.requires_grad_()
    row = Preference(ImplicitReward(beta), Logistic(smoothing))
    loss = row.loss(Pairs.of(w, lost, reference_chosen=ref_w, reference_rejected=ref_l))
    loss.backward()
    total, slopes = 0.0, []
    for i in range(7):
        h = beta * ((w[i] - ref_w[i]) - (lost[i] - ref_l[i])).item()
        s = 1 / (1 + math.exp(-h))
        total += (-(1 - smoothing) * math.log(s) - smoothing * math.log(1 - s)) / 7
        slopes.append(beta * (-(1 - smoothing) * (1 - s) + smoothing * s) / 7)
    assert loss.item() == pytest.approx(total, abs=1e-12)
    assert w.grad.tolist() == pytest.approx(slopes, abs=1e-12) and lost.grad.tolist() == pytest.approx([-x for x in slopes], abs=1e-12)


@pytest.mark.parametrize("row", [*PREFERENCES.values(), Preference(ScoreMargin(0.1), Logistic(0.1), Centring(0.05))])
def test_parts_add_up_to_the_batch(row: Preference) -> None:
    generator = torch.Generator().manual_seed(3)
    chosen, rejected, ref_c, ref_r = (-5 * torch.rand(9, dtype=torch.float64, generator=generator) for _ in range(4))
    chosen.requires_grad_()
    pairs = Pairs.of(chosen, rejected, reference_chosen=ref_c, reference_rejected=ref_r)
    whole = torch.autograd.grad(row.loss(pairs), chosen)[0]
    parts = [pairs.take(torch.tensor(part)) for part in ([8, 0, 3], [1], [2, 4, 5, 6, 7])]
    sums = sum(row.loss(part) for part in parts)
    torch.testing.assert_close(sums, row.loss(pairs), rtol=0, atol=1e-12)
    torch.testing.assert_close(torch.autograd.grad(sums, chosen)[0], whole, rtol=0, atol=1e-12)
    for key, (total, weight) in row.metrics(pairs).items():
        assert sum(row.metrics(part)[key][0].item() for part in parts) == pytest.approx(total.item(), abs=1e-12)
        assert sum(row.metrics(part)[key][1].item() for part in parts) == weight == 9


def test_identical_answers_cost_log_two_and_pull_nowhere() -> None:
    score = double(0.7).requires_grad_()
    pairs = Pairs.of(score, score)
    loss = RM.loss(pairs)
    loss.backward()
    assert loss.item() == pytest.approx(math.log(2)) and score.grad.item() == 0
    assert RM.metrics(pairs)["preference/accuracy"][0] == 0.5


def test_the_reward_model_never_reads_a_reference() -> None:
    assert RM.needs == frozenset() and DPO.needs == {"reference"}
    assert RM.loss(SCORES).isfinite() and DPO.loss(SCORES).isnan()


def test_metrics() -> None:
    found = {key: (total / weight).item() for key, (total, weight) in DPO.metrics(fixture_p()).items()}
    assert found["preference/accuracy"] == 0.5
    assert found["preference/margin"] == pytest.approx((0.09 - 0.06) / 2)
    assert found["preference/rewards/chosen"] == pytest.approx(0.01) and found["preference/rewards/rejected"] == pytest.approx(-0.005)
