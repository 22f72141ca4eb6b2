"""Loops written from the papers, one for each row of THE TABLE: nested lists, no library call but the arithmetic of tensors."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

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


def a2c(case: Any, policy: Rows, values: Rows) -> Tensor:
    """RL4LMs: mean over actions of -A log pi, plus .5 times the mean squared error to the returns; gamma .99, lam 1, KL .1 in the reward."""
    advantages, target = gae_advantages(case, 0.99, 1.0, 0.1)
    errors = [[(v - g) ** 2 for v, g in zip(a, b, strict=True)] for a, b in zip(values, target, strict=True)]
    return -token_mean(times(policy, advantages)) + 0.5 * token_mean(errors)


def nlpo(case: Any, policy: Rows, values: Rows) -> Tensor:
    """RL4LMs: the clipped ratio with whitened advantages, plus .5 times the mean squared error to the returns; gamma .99, lam .95, KL .1."""
    advantages, target = gae_advantages(case, 0.99, 0.95, 0.1)
    errors = [[(v - g) ** 2 for v, g in zip(a, b, strict=True)] for a, b in zip(values, target, strict=True)]
    return -token_mean(token_gains(case, policy, whitened(advantages, 1, 1e-8))) + 0.5 * token_mean(errors)


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


# --------------------------------------------------------------------------- rows that change one choice of another


def group_scaled(case: Any) -> list[list[float]]:
    return repeat(case, grpo_advantages(case))


def dft(case: Any, policy: Rows, values: Rows) -> Tensor:
    return -token_mean([[math.exp(x.item()) * x for x in row] for row in policy])


def value_rows(case: Any, values: Rows, target: list[list[float]]) -> Rows:
    """.5 max((V - R)^2, (V held within .2 of the old V - R)^2)."""
    found = []
    for row, olds, goals in zip(values, case.values, target, strict=True):
        near = [v if abs(v.item() - o) <= 0.2 else v * 0 + o + math.copysign(0.2, v.item() - o) for v, o in zip(row, olds, strict=True)]
        found.append([0.5 * max((v - g) ** 2, (c - g) ** 2) for v, c, g in zip(row, near, goals, strict=True)])
    return found


def ppo_sequence(case: Any, policy: Rows, values: Rows) -> Tensor:
    advantages, target = gae_advantages(case, 1.0, 0.95, 0.05)
    return -sequence_mean(token_gains(case, policy, advantages)) + 0.1 * sequence_mean(value_rows(case, values, target))


def bounded(ratio: Tensor, advantage: float, delta: float) -> Tensor:
    """The clip of PPO at .2, and for a bad action the ratio stops at delta."""
    if advantage < 0 and ratio > delta:
        return ratio * 0 + delta * advantage
    return clip(ratio, advantage, 0.2, 0.2)


def bounded_gains(case: Any, policy: Rows, advantages: list[list[float]], delta: float) -> Rows:
    return [
        [bounded(torch.exp(x - o), a, delta) for x, o, a in zip(row, olds, adv, strict=True)]
        for row, olds, adv in zip(policy, case.old, advantages, strict=True)
    ]


def ppo_dual_clip(case: Any, policy: Rows, values: Rows) -> Tensor:
    advantages, target = gae_advantages(case, 1.0, 0.95, 0.05)
    gains = bounded_gains(case, policy, whitened(advantages, 1, 1e-8), 3.0)
    return -token_mean(gains) + 0.1 * token_mean(value_rows(case, values, target))


def plain_gains(case: Any, policy: Rows, advantages: list[list[float]]) -> Rows:
    return [
        [torch.exp(x - o) * a for x, o, a in zip(row, olds, adv, strict=True)]
        for row, olds, adv in zip(policy, case.old, advantages, strict=True)
    ]


def ppo_kl(case: Any, policy: Rows, values: Rows) -> Tensor:
    """The penalty is the exact KL(old || policy) of each state, once."""
    advantages, target = gae_advantages(case, 1.0, 0.95, 0.05)
    gains = minus(
        plain_gains(case, policy, whitened(advantages, 1, 1e-8)), [[torch.tensor(k, dtype=torch.float64) for k in row] for row in case.kl]
    )
    return -token_mean(gains) + 0.1 * token_mean(value_rows(case, values, target))


def trpo(case: Any, policy: Rows, values: Rows) -> Tensor:
    advantages, target = gae_advantages(case, 1.0, 0.97, 0.0)
    critic = [[0.5 * (v - g) ** 2 for v, g in zip(row, goals, strict=True)] for row, goals in zip(values, target, strict=True)]
    return -token_mean(plain_gains(case, policy, whitened(advantages, 1, 1e-8))) + 0.5 * token_mean(critic)


def grpo_process(case: Any, policy: Rows, values: Rows) -> Tensor:
    """A step ends where its reward is not 0; rewards of all steps of the group are normalised together."""
    advantages = []
    for i, row in enumerate(case.steps):
        every = [r for j in mates(case, i) for r in case.steps[j] if r != 0]
        flat = len(set(every)) < 2
        normal = [0.0 if r == 0 or flat else (r - sum(every) / len(every)) / deviation(every, 1) for r in row]
        advantages.append([sum(normal[t:]) for t in range(len(row))])
    return -sequence_mean(minus(token_gains(case, policy, advantages), k3_rows(case, policy, 0.04)))


def grpo_unbiased_kl(case: Any, policy: Rows, values: Rows) -> Tensor:
    kl = [
        [torch.exp(x - o) * k for x, o, k in zip(row, olds, ks, strict=True)]
        for row, olds, ks in zip(policy, case.old, k3_rows(case, policy, 0.04), strict=True)
    ]
    return -sequence_mean(minus(token_gains(case, policy, group_scaled(case)), kl))


def grpo_two_sided(case: Any, policy: Rows, values: Rows) -> Tensor:
    return -token_mean(minus(bounded_gains(case, policy, group_scaled(case), 4.0), k3_rows(case, policy, 0.001)))


def weighed(case: Any, policy: Rows, cap: float) -> Tensor:
    gains = token_gains(case, policy, group_scaled(case))
    return -token_mean(
        [
            [min(cap, math.exp(o - s)) * g for g, o, s in zip(row, olds, seen, strict=True)]
            for row, olds, seen in zip(gains, case.old, case.sampler, strict=True)
        ]
    )


def grpo_tis(case: Any, policy: Rows, values: Rows) -> Tensor:
    return weighed(case, policy, 2.0)


def decoupled_ppo(case: Any, policy: Rows, values: Rows) -> Tensor:
    """(old / sampler) min(rho Adv, clip(rho) Adv) with rho = policy / old: the proximal policy is old, the behaviour the sampler."""
    return weighed(case, policy, math.inf)


def high_entropy(case: Any, policy: Rows, values: Rows) -> Tensor:
    every = sorted(h for row in case.entropy for h in row)
    place = 0.8 * (len(every) - 1)
    low = int(place)
    bar = every[low] + (place - low) * (every[min(low + 1, len(every) - 1)] - every[low])
    gains = token_gains(case, policy, group_scaled(case), 0.2, 0.28)
    return -token_mean(
        [[g if h >= bar else g * 0 for g, h in zip(row, hs, strict=True)] for row, hs in zip(gains, case.entropy, strict=True)]
    )


def skywork(case: Any, policy: Rows, values: Rows) -> Tensor:
    """The bonus is a constant here: `case.entropy` is no function of the log-probabilities of the fixture."""
    gains = token_gains(case, policy, group_scaled(case))
    return -token_mean([[g + 0.005 * h for g, h in zip(row, hs, strict=True)] for row, hs in zip(gains, case.entropy, strict=True)])


def luspo(case: Any, policy: Rows, values: Rows) -> Tensor:
    gains = []
    for row, old, advantage in zip(policy, case.old, grpo_advantages(case), strict=True):
        ratio = torch.exp(sum(x - o for x, o in zip(row, old, strict=True)) / len(row))
        gains.append(len(row) * clip(ratio, advantage, 3e-4, 4e-4))
    return -torch.stack(gains).mean()


def gmpo(case: Any, policy: Rows, values: Rows) -> Tensor:
    gains = []
    for row, old, advantage in zip(policy, case.old, grpo_advantages(case), strict=True):
        kept = []
        for x, o in zip(row, old, strict=True):
            d = x - o
            beyond = d.item() > 0.4 if advantage > 0 else d.item() < -0.4
            kept.append(d * 0 + math.copysign(0.4, d.item()) if beyond else d)
        gains.append(torch.exp(sum(kept) / len(kept)) * advantage)
    return -torch.stack(gains).mean()


def vespo(case: Any, policy: Rows, values: Rows) -> Tensor:
    gains = []
    for row, old, advantage in zip(policy, case.old, grpo_advantages(case), strict=True):
        w = math.exp(sum(x.item() - o for x, o in zip(row, old, strict=True)))
        k, lam = (2, 3) if advantage >= 0 else (3, 2)
        gains.append([math.exp(lam + k * math.log(w) - lam * w) * advantage * x for x in row])
    return -token_mean(gains)


def distill(case: Any, policy: Rows, values: Rows) -> Tensor:
    return -token_mean(
        [
            [torch.exp(x - o) * (r - o) for x, o, r in zip(row, olds, refs, strict=True)]
            for row, olds, refs in zip(policy, case.old, case.reference, strict=True)
        ]
    )


LOOPS: dict[str, Loop] = {
    "sft": sft, "raft": raft, "reinforce": reinforce, "reinforce_rtg": reinforce_rtg, "reinforce_baseline": reinforce_baseline, "rloo": rloo,
    "rloo_clip": rloo_clip, "ppo": ppo, "reinforce_pp": reinforce_pp, "reinforce_pp_baseline": reinforce_pp_baseline, "grpo": grpo,
    "grpo_r1": grpo_r1, "dr_grpo": dr_grpo, "dapo": dapo, "lite_ppo": lite_ppo, "gspo": gspo, "gspo_token": gspo, "cispo": cispo, "sapo": sapo,
    "dft": dft, "ppo_sequence": ppo_sequence, "ppo_dual_clip": ppo_dual_clip, "grpo_process": grpo_process, "grpo_unbiased_kl": grpo_unbiased_kl,
    "grpo_two_sided": grpo_two_sided, "grpo_tis": grpo_tis, "decoupled_ppo": decoupled_ppo, "high_entropy": high_entropy, "skywork": skywork,
    "luspo": luspo, "gmpo": gmpo, "vespo": vespo, "distill": distill, "a2c": a2c, "nlpo": nlpo,
    "ppo_kl": ppo_kl, "trpo": trpo,
}  # fmt: skip
