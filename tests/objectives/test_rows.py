"""Every row of THE TABLE equals an independent loop written from its paper, in value and gradient; the specification's numbers on fixture F."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tilt.objectives import (
    ALGORITHMS,
    GAE,
    CappedScore,
    Clip,
    GroupRelative,
    NoPenalty,
    NoValue,
    PerBudget,
    ReturnToGo,
    SequenceAverage,
    TokenAverage,
    TwoSided,
)

Rows = list[list[Tensor]]
Loop = Callable[[Any, Rows, Rows], Tensor]


# ------------------------------------------------------------------------------- loops, written from the papers


def mates(case: Any, i: int) -> list[int]:
    return [j for j in range(len(case.prompt)) if case.prompt[j] == case.prompt[i]]


def returns(case: Any, kl: float = 0.0) -> list[float]:
    total = []
    for i, reward in enumerate(case.reward):
        for t in range(len(case.old[i])):
            reward += case.steps[i][t] - kl * (case.old[i][t] - case.reference[i][t])
        total.append(reward)
    return total


def paid(case: Any, kl: float) -> list[list[float]]:
    """Reward after each action, the score on the last, KL against the reference taken off each."""
    rows = []
    for i, reward in enumerate(case.reward):
        n = len(case.old[i])
        rows.append([case.steps[i][t] - kl * (case.old[i][t] - case.reference[i][t]) + (reward if t == n - 1 else 0.0) for t in range(n)])
    return rows


def to_go(rows: list[list[float]], gamma: float = 1.0) -> list[list[float]]:
    return [[sum(gamma ** (k - t) * row[k] for k in range(t, len(row))) for t in range(len(row))] for row in rows]


def deviation(numbers: list[float], ddof: int) -> float:
    mean = sum(numbers) / len(numbers)
    return (sum((x - mean) ** 2 for x in numbers) / (len(numbers) - ddof)) ** 0.5


def whitened(rows: list[list[float]], ddof: int, eps: float) -> list[list[float]]:
    every = [x for row in rows for x in row]
    mean, scale = sum(every) / len(every), (deviation(every, ddof) ** 2 + eps) ** 0.5
    return [[(x - mean) / scale for x in row] for row in rows]


def grpo_advantages(case: Any) -> list[float]:
    total = returns(case)
    found = []
    for i in range(len(total)):
        group = [total[j] for j in mates(case, i)]
        found.append((total[i] - sum(group) / len(group)) / deviation(group, 1))
    return found


def centred(case: Any) -> list[float]:
    total = returns(case)
    return [total[i] - sum(total[j] for j in mates(case, i)) / len(mates(case, i)) for i in range(len(total))]


def rloo_advantages(case: Any, kl: float) -> list[float]:
    total = returns(case, kl)
    found = []
    for i in range(len(total)):
        others = [total[j] for j in mates(case, i) if j != i]
        found.append(total[i] - sum(others) / len(others))
    return found


def gae_advantages(case: Any, gamma: float, lam: float, kl: float) -> tuple[list[list[float]], list[list[float]]]:
    """The O(T^2) sum of TD residuals."""
    rewards, advantages, targets = paid(case, kl), [], []
    for row, value in zip(rewards, case.values, strict=True):
        n = len(row)
        delta = [row[t] + gamma * (value[t + 1] if t + 1 < n else 0.0) - value[t] for t in range(n)]
        advantages.append([sum((gamma * lam) ** (k - t) * delta[k] for k in range(t, n)) for t in range(n)])
        targets.append([advantages[-1][t] + value[t] for t in range(n)])
    return advantages, targets


def clip(ratio: Tensor, advantage: float, low: float, high: float) -> Tensor:
    """Zero gradient outside the range on the side that would go further, else ratio * advantage."""
    if advantage > 0 and ratio > 1 + high:
        return ratio * 0 + (1 + high) * advantage
    if advantage < 0 and ratio < 1 - low:
        return ratio * 0 + (1 - low) * advantage
    return ratio * advantage


def token_gains(case: Any, policy: Rows, advantages: list[list[float]], low: float = 0.2, high: float = 0.2) -> Rows:
    return [
        [clip(torch.exp(policy[i][t] - case.old[i][t]), advantages[i][t], low, high) for t in range(len(policy[i]))]
        for i in range(len(policy))
    ]


def repeat(case: Any, per_sequence: list[float]) -> list[list[float]]:
    return [[a] * len(row) for a, row in zip(per_sequence, case.old, strict=True)]


def token_mean(rows: Rows) -> Tensor:
    every = [x for row in rows for x in row]
    return torch.stack(every).sum() / len(every)


def sequence_mean(rows: Rows) -> Tensor:
    return torch.stack([torch.stack(row).sum() / len(row) for row in rows]).sum() / len(rows)


def sequence_sum(rows: Rows) -> Tensor:
    return torch.stack([torch.stack(row).sum() for row in rows]).sum() / len(rows)


def minus(gains: Rows, penalty: Rows) -> Rows:
    return [[g - p for g, p in zip(a, b, strict=True)] for a, b in zip(gains, penalty, strict=True)]


def times(policy: Rows, advantages: list[list[float]]) -> Rows:
    return [[x * a for x, a in zip(row, adv, strict=True)] for row, adv in zip(policy, advantages, strict=True)]


def k3_rows(case: Any, policy: Rows, beta: float) -> Rows:
    return [
        [beta * (torch.exp(r - x) - (r - x) - 1) for x, r in zip(row, refs, strict=True)]
        for row, refs in zip(policy, case.reference, strict=True)
    ]


def sft(case: Any, policy: Rows, values: Rows) -> Tensor:
    return -token_mean(policy)


def raft(case: Any, policy: Rows, values: Rows) -> Tensor:
    total = returns(case)
    kept = [max(mates(case, i), key=lambda j: total[j]) == i for i in range(len(total))]
    return -token_mean([row for row, keep in zip(policy, kept, strict=True) if keep])


def reinforce(case: Any, policy: Rows, values: Rows) -> Tensor:
    return -sequence_sum(times(policy, repeat(case, returns(case))))


def reinforce_rtg(case: Any, policy: Rows, values: Rows) -> Tensor:
    return -sequence_sum(times(policy, to_go(paid(case, 0.0))))


def reinforce_baseline(case: Any, policy: Rows, values: Rows) -> Tensor:
    target = to_go(paid(case, 0.0))
    advantages = [[g - v for g, v in zip(a, b, strict=True)] for a, b in zip(target, case.values, strict=True)]
    critic = [[0.5 * (v - g) ** 2 for v, g in zip(a, b, strict=True)] for a, b in zip(values, target, strict=True)]
    return -sequence_sum(times(policy, advantages)) + 0.5 * sequence_sum(critic)


def rloo(case: Any, policy: Rows, values: Rows) -> Tensor:
    return -sequence_sum(times(policy, repeat(case, rloo_advantages(case, 0.05))))


def rloo_clip(case: Any, policy: Rows, values: Rows) -> Tensor:
    gains = []
    for row, old, advantage in zip(policy, case.old, rloo_advantages(case, 0.05), strict=True):
        gains.append(clip(torch.exp(sum(x - o for x, o in zip(row, old, strict=True))), advantage, 0.2, 0.2))
    return -torch.stack(gains).mean()


def ppo(case: Any, policy: Rows, values: Rows) -> Tensor:
    advantages, target = gae_advantages(case, 1.0, 0.95, 0.05)
    critic = []
    for row, olds, goals in zip(values, case.values, target, strict=True):
        near = [max(o - 0.2, min(o + 0.2, v.item())) for v, o in zip(row, olds, strict=True)]
        clipped = [v if abs(v.item() - o) <= 0.2 else v * 0 + c for v, o, c in zip(row, olds, near, strict=True)]
        critic.append([0.5 * max((v - g) ** 2, (c - g) ** 2) for v, c, g in zip(row, clipped, goals, strict=True)])
    return -token_mean(token_gains(case, policy, whitened(advantages, 1, 1e-8))) + 0.1 * token_mean(critic)


def reinforce_pp(case: Any, policy: Rows, values: Rows) -> Tensor:
    return -token_mean(token_gains(case, policy, whitened(to_go(paid(case, 0.01)), 0, 0.0)))


def reinforce_pp_baseline(case: Any, policy: Rows, values: Rows) -> Tensor:
    gains = token_gains(case, policy, whitened(repeat(case, centred(case)), 0, 0.0))
    k2 = [[0.01 * 0.5 * (x - r) ** 2 for x, r in zip(row, refs, strict=True)] for row, refs in zip(policy, case.reference, strict=True)]
    return -token_mean(minus(gains, k2))


def grpo(case: Any, policy: Rows, values: Rows) -> Tensor:
    gains = token_gains(case, policy, repeat(case, grpo_advantages(case)))
    return -sequence_mean(minus(gains, k3_rows(case, policy, 0.04)))


def grpo_r1(case: Any, policy: Rows, values: Rows) -> Tensor:
    gains = []
    for row, old, reference, advantage in zip(policy, case.old, case.reference, grpo_advantages(case), strict=True):
        whole = sum(row, torch.zeros((), dtype=torch.float64))
        d = sum(reference) - whole
        gains.append(clip(torch.exp(whole - sum(old)), advantage, 0.2, 0.2) - 0.04 * (torch.exp(d) - d - 1))
    return -torch.stack(gains).mean()


def dr_grpo(case: Any, policy: Rows, values: Rows) -> Tensor:
    return -sequence_sum(token_gains(case, policy, repeat(case, centred(case)))) / 3000


def dapo(case: Any, policy: Rows, values: Rows) -> Tensor:
    return -token_mean(token_gains(case, policy, repeat(case, grpo_advantages(case)), 0.2, 0.28))


def lite_ppo(case: Any, policy: Rows, values: Rows) -> Tensor:
    scale = deviation(returns(case), 1)
    return -token_mean(token_gains(case, policy, repeat(case, [a / scale for a in centred(case)])))


def gspo(case: Any, policy: Rows, values: Rows) -> Tensor:
    gains = []
    for row, old, advantage in zip(policy, case.old, grpo_advantages(case), strict=True):
        ratio = torch.exp(sum(x - o for x, o in zip(row, old, strict=True)) / len(row))
        gains.append(clip(ratio, advantage, 3e-4, 4e-4))
    return -torch.stack(gains).mean()


def cispo(case: Any, policy: Rows, values: Rows) -> Tensor:
    gains = []
    for row, old, advantage in zip(policy, case.old, grpo_advantages(case), strict=True):
        gains.append([min(1.28, torch.exp(x - o).item()) * advantage * x for x, o in zip(row, old, strict=True)])
    return -token_mean(gains)


def sapo(case: Any, policy: Rows, values: Rows) -> Tensor:
    gains = []
    for row, old, advantage in zip(policy, case.old, grpo_advantages(case), strict=True):
        tau = 1.0 if advantage > 0 else 1.05
        gains.append([4 / tau / (1 + torch.exp(-tau * (torch.exp(x - o) - 1))) * advantage for x, o in zip(row, old, strict=True)])
    return -sequence_mean(gains)


LOOPS: dict[str, Loop] = {
    "sft": sft, "raft": raft, "reinforce": reinforce, "reinforce_rtg": reinforce_rtg, "reinforce_baseline": reinforce_baseline, "rloo": rloo,
    "rloo_clip": rloo_clip, "ppo": ppo, "reinforce_pp": reinforce_pp, "reinforce_pp_baseline": reinforce_pp_baseline, "grpo": grpo,
    "grpo_r1": grpo_r1, "dr_grpo": dr_grpo, "dapo": dapo, "lite_ppo": lite_ppo, "gspo": gspo, "gspo_token": gspo, "cispo": cispo, "sapo": sapo,
}  # fmt: skip


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
    ratio = row.ratio(outputs.logprobs, flat_old(f), f.layout)[f.layout.last]
    close(ratio.detach(), torch.tensor([1.0512710964, 0.9512294245, 0.9394130628, 1.3498588076], dtype=torch.float64), 5.1e-11)
    row.loss(outputs, row.prepare(f.rewards, f.signals, f.layout)).backward()
    each = torch.tensor([-0.0897693597, 0.0174057162, -0.0257842484, 0.4445979667], dtype=torch.float64)
    close(outputs.logprobs.grad, each[f.layout.sequence], 5.1e-11)


def test_product_ratios_on_fixture_f(f: Any) -> None:
    ratio = ALGORITHMS["rloo_clip"].ratio(f.outputs().logprobs, flat_old(f), f.layout)[f.layout.last]
    close(ratio.detach(), torch.tensor([1.1618342427, 0.9048374180, 0.7788007831, 1.3498588076], dtype=torch.float64), 5.1e-11)


def flat_old(case: Any) -> Tensor:
    return case.signals.old
