"""Every row of THE TABLE equals an independent loop written from its paper, in value and gradient; the specification's numbers on fixture F."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from row_loops import LOOPS, Rows
from torch import Tensor

from tilt.objectives import (
    ALGORITHMS,
    GAE,
    CappedScore,
    Clip,
    ClippedGeometricRatio,
    GroupRelative,
    MaskedImportance,
    NoPenalty,
    NoValue,
    PerBudget,
    ReturnToGo,
    SequenceAverage,
    Teacher,
    TokenAverage,
    TruncatedImportance,
    TwoSided,
)


def test_every_row_has_a_loop() -> None:
    assert set(LOOPS) == set(ALGORITHMS)


def close(found: Tensor, expected: Tensor, within: float) -> None:
    assert torch.isfinite(found).all()
    assert (found - expected).abs().max() <= within, f"{found.tolist()} is not {expected.tolist()}"


@pytest.mark.parametrize("name", LOOPS)
def test_row_equals_its_loop(name: str, case: Any) -> None:
    row = ALGORITHMS[name]
    outputs = case.outputs()
    loss = row.loss(outputs, row.prepare(case.rewards, case.signals, case.layout))
    loss.backward()

    policy = [[torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in line] for line in case.policy]
    values = [[torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in line] for line in case.new_values]
    expected = LOOPS[name](case, policy, values)
    expected.backward()

    def gradient(rows: Rows) -> Tensor:
        return torch.stack([torch.zeros_like(x) if x.grad is None else x.grad for line in rows for x in line])

    close(loss, expected, 1e-10)
    close(outputs.logprobs.grad, gradient(policy), 1e-10)
    if "values" in row.needs:
        close(outputs.values.grad, gradient(values), 1e-10)
        assert outputs.values.grad.abs().max() > 0
    else:
        assert outputs.values.grad is None


# ------------------------------------------------------------------------------- numbers of the specification


GRPO, PPO, GSPO = ALGORITHMS["grpo"], ALGORITHMS["ppo"], ALGORITHMS["gspo"]
TOKEN = replace(GRPO, average=TokenAverage(), penalty=NoPenalty())
GOLDEN = {
    "sft": (ALGORITHMS["sft"], 0.82),
    "sft, sequence": (replace(ALGORITHMS["sft"], average=SequenceAverage()), 0.872916666667),
    "sft, sum": (replace(ALGORITHMS["sft"], average=PerBudget(1)), 2.05),
    "reinforce": (ALGORITHMS["reinforce"], 0.6375),
    "reinforce_rtg": (ALGORITHMS["reinforce_rtg"], 0.6375),
    "reinforce, group mean": (replace(ALGORITHMS["reinforce_rtg"], credit=ReturnToGo(baseline="group_mean")), 0.38125),
    "rloo": (ALGORITHMS["rloo"], 0.500416666667),
    "rloo, kl 0": (replace(ALGORITHMS["rloo"], credit=GroupRelative("leave_one_out", "none")), 0.508333333333),
    "rloo_clip": (ALGORITHMS["rloo_clip"], 0.105405815340),
    "rloo_clip, kl 0": (replace(ALGORITHMS["rloo_clip"], credit=GroupRelative("leave_one_out", "none")), 0.107680193246),
    "ppo, policy": (replace(PPO, value=NoValue()), 0.094233954009),
    "ppo": (PPO, 0.094233954009 + 0.1 * 0.102342052811),
    "ppo, DeepSpeed-Chat": (replace(PPO, credit=GAE(kl=0.1, clip_reward=5, whitened=False), value=NoValue()), -0.104890722975),
    "ppo, sequence": (replace(PPO, credit=GAE(kl=0.05, whitened=False), average=SequenceAverage(), value=NoValue()), 0.128118453862),
    "reinforce_pp": (ALGORITHMS["reinforce_pp"], 0.089136674652),
    "reinforce_pp_baseline": (ALGORITHMS["reinforce_pp_baseline"], 0.089681184967),
    "grpo": (GRPO, 0.116475290553),
    "grpo, ddof 0": (replace(GRPO, credit=GroupRelative(ddof=0)), 0.134404962869),
    "grpo, beta 0": (replace(GRPO, penalty=NoPenalty()), 0.115899223773),
    "grpo, token": (replace(GRPO, average=TokenAverage()), -0.274024181517),
    "grpo, token, beta 0": (replace(GRPO, average=TokenAverage(), penalty=NoPenalty()), -0.274688986518),
    "grpo_r1": (ALGORITHMS["grpo_r1"], 0.094812279311),
    "dr_grpo, L 4": (replace(ALGORITHMS["dr_grpo"], average=PerBudget(4)), -0.146600235458),
    "dr_grpo, L 1": (replace(ALGORITHMS["dr_grpo"], average=PerBudget(1)), -0.586400941834),
    "dapo": (ALGORITHMS["dapo"], -0.283826460027),
    "gspo": (GSPO, 0.121770008308),
    "gspo, .2": (replace(GSPO, surrogate=Clip(0.2, 0.2)), 0.106964326378),
    "gspo_token": (ALGORITHMS["gspo_token"], 0.121770008308),
    "cispo": (ALGORITHMS["cispo"], 0.125912539515),
    "cispo, cap 1.1": (replace(ALGORITHMS["cispo"], surrogate=CappedScore(1.1)), 0.136936124361),
    "sapo": (ALGORITHMS["sapo"], 0.064146125192),
    "grpo, ratio-weighted k3": (replace(ALGORITHMS["grpo_unbiased_kl"]), 0.116451636307),
    "gmpo": (ALGORITHMS["gmpo"], 0.106964326378),
    "gmpo, .25": (replace(ALGORITHMS["gmpo"], ratio=ClippedGeometricRatio(0.25)), 0.114126856256),
    "dft": (ALGORITHMS["dft"], 0.280963841595),
    "distill": (ALGORITHMS["distill"], -0.018872568587),
    "distill, discount 1": (replace(ALGORITHMS["distill"], credit=Teacher(1.0)), 0.077298718870),
    "decoupled": (ALGORITHMS["decoupled_ppo"], -0.326307450502),
    "tis, 1.1": (replace(TOKEN, corrections=(TruncatedImportance(1.1),)), -0.323861779796),
    "tis, sequence, 1.1": (replace(TOKEN, corrections=(TruncatedImportance(1.1, "sequence"),)), -0.350705265279),
    "masked, .9 to 1.2": (replace(TOKEN, corrections=(MaskedImportance(0.9, 1.2),)), -0.425520555347),
    "two-sided": (replace(GRPO, surrogate=TwoSided(0.2, 0.2, 1.3), penalty=NoPenalty()), 0.098565091303),
}  # fmt: skip


@pytest.mark.parametrize("name", GOLDEN)
def test_number_on_fixture_f(name: str, f: Any) -> None:
    row, expected = GOLDEN[name]
    loss = row.loss(f.outputs(), row.prepare(f.rewards, f.signals, f.layout))
    assert loss.item() == pytest.approx(expected, abs=1e-12, rel=0)


ADVANTAGES = {
    "grpo": (GRPO, [1.0246950766, -0.1463850109, 0.4391550328, -1.3174650985]),
    "grpo, ddof 0": (replace(GRPO, credit=GroupRelative(ddof=0)), [1.1832159566, -0.1690308509, 0.5070925528, -1.5212776585]),
    "grpo, eps 1e-4": (replace(GRPO, credit=GroupRelative(eps=1e-4)), [1.0245750906, -0.1463678701, 0.4391036103, -1.3173108308]),
    "dr_grpo": (ALGORITHMS["dr_grpo"], [0.875, -0.125, 0.375, -1.125]),
    "rloo, kl 0": (replace(GRPO, credit=GroupRelative("leave_one_out", "none")), [7 / 6, -1 / 6, 0.5, -1.5]),
    "rloo": (ALGORITHMS["rloo"], [1.1666666667, -0.17, 0.4866666667, -1.4833333333]),
    "reinforce_pp_baseline": (ALGORITHMS["reinforce_pp_baseline"], [1.0289915109, -0.6859943406, 0.1714985851, -2.4009801920]),
}  # fmt: skip


@pytest.mark.parametrize("name", ADVANTAGES)
def test_advantages_on_fixture_f(name: str, f: Any) -> None:
    row, expected = ADVANTAGES[name]
    advantages = row.prepare(f.rewards, f.signals, f.layout).advantages
    close(advantages, torch.tensor(expected, dtype=torch.float64)[f.layout.sequence], 5.1e-11)


PER_ACTION = {
    "gae": (
        replace(PPO, credit=GAE(kl=0.05, whitened=False)),
        [0.63448125, 0.867875, 0.3925, -0.20525, 0.005, -0.0487428125, 0.06448125, 0.367875, 0.2925, -0.89],
    ),
    "ppo": (
        PPO,
        [0.9946645115, 1.4719343526, 0.4998339828, -0.7225125774, -0.2925696844, -0.4024690437, -0.1709357215, 0.4494780078, 0.2953427138, -2.1227665415],
    ),
    "reinforce_pp": (
        ALGORITHMS["reinforce_pp"],
        [1.0318447165, 1.0284083841, 1.0301265503, -0.6871805751, -0.6837442427, 0.1693252798, 0.1727616123, 0.1676071136, 0.1710434461, -2.4001922849],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PER_ACTION)
def test_advantages_per_action_on_fixture_f(name: str, f: Any) -> None:
    row, expected = PER_ACTION[name]
    close(row.prepare(f.rewards, f.signals, f.layout).advantages, torch.tensor(expected, dtype=torch.float64), 5.1e-11)


def test_gspo_ratios_and_gradient_on_fixture_f(f: Any) -> None:
    row, outputs = replace(GSPO, surrogate=Clip(0.2, 0.2)), f.outputs()
    ratio = row.ratio(outputs.logprobs, flat_old(f), f.layout, torch.zeros_like(flat_old(f)))[f.layout.last]
    close(ratio.detach(), torch.tensor([1.0512710964, 0.9512294245, 0.9394130628, 1.3498588076], dtype=torch.float64), 5.1e-11)
    row.loss(outputs, row.prepare(f.rewards, f.signals, f.layout)).backward()
    each = torch.tensor([-0.0897693597, 0.0174057162, -0.0257842484, 0.4445979667], dtype=torch.float64)
    close(outputs.logprobs.grad, each[f.layout.sequence], 5.1e-11)


def test_product_ratios_on_fixture_f(f: Any) -> None:
    ratio = ALGORITHMS["rloo_clip"].ratio(f.outputs().logprobs, flat_old(f), f.layout, torch.zeros_like(flat_old(f)))[f.layout.last]
    close(ratio.detach(), torch.tensor([1.1618342427, 0.9048374180, 0.7788007831, 1.3498588076], dtype=torch.float64), 5.1e-11)


def flat_old(case: Any) -> Tensor:
    return case.signals.old
