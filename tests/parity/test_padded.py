"""The padded arithmetic equals loops written from parity.md, in value and gradient, on padding, truncation and missing stop tokens; fixtures T and DS to their digits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tilt.errors import UsageError
from tilt.parity.padded import window_credit, window_loss
from tilt.parity.presets import PRESETS
from tilt.parity.quirks import CORRECTED, Quirks
from tilt.parity.window import Window, last_action, missing_stop, truncate

Grid = list[list[float]]
TRL, DS = PRESETS["ppo_trl_0_12"], PRESETS["ppo_deepspeed_chat"]


def grid(rows: Grid) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


# -------------------------------------------------------------------------------------- loops, written from parity.md


def over(rows: list[list[Tensor]]) -> Tensor:
    every = [x for row in rows for x in row]
    return torch.stack(every).sum() / len(every)


def chunks(count: int, micro: int) -> list[range]:
    size = micro or count
    return [range(i, min(i + size, count)) for i in range(0, count, size)]


def gae(rewards: list[float], values: list[float], lam: float = 0.95) -> list[float]:
    found, ahead = [0.0] * len(rewards), 0.0
    for t in reversed(range(len(rewards))):
        following = values[t + 1] if t + 1 < len(values) else 0.0
        ahead = rewards[t] + following - values[t] + lam * ahead
        found[t] = ahead
    return found


def worse(a: Tensor, b: Tensor) -> Tensor:
    return a if a >= b else b


def held(x: Tensor, low: float, high: float) -> Tensor:
    return x * 0 + min(max(x.item(), low), high) if not low <= x.item() <= high else x


@dataclass
class Answer:
    rewards: Grid
    raw: Grid
    returns: Grid
    advantages: Grid
    policy: Tensor
    value: Tensor


def trl_ppo(case: Any, new: list[list[Tensor]], new_value: list[list[Tensor]], micro: int, whiten_rewards: bool = False) -> Answer:
    """parity.md 1, steps 7-12."""
    width, count = case.width, len(case.old)
    rewards = [[-0.05 * (case.old[i][t] - case.ref[i][t]) if t <= case.last[i] else 0.0 for t in range(width)] for i in range(count)]
    values = [[case.value[i][t] if t <= case.last[i] + 1 else 0.0 for t in range(width)] for i in range(count)]
    for i in range(count):
        rewards[i][case.last[i] + 1 if case.last[i] + 1 < width else case.last[i]] += case.score[i]
    if whiten_rewards:
        seen = [rewards[i][t] for i in range(count) for t in range(width) if t <= case.last[i] + 1]
        mu = sum(seen) / len(seen)
        var = sum((x - mu) ** 2 for x in seen) / (len(seen) - 1)
        rewards = [
            [(rewards[i][t] - mu) / (var + 1e-8) ** 0.5 + mu if t <= case.last[i] + 1 else 0.0 for t in range(width)] for i in range(count)
        ]
    raw = [gae(r, v) for r, v in zip(rewards, values, strict=True)]
    returns = [[a + v for a, v in zip(x, y, strict=True)] for x, y in zip(raw, values, strict=True)]
    seen = [raw[i][t] for i in range(count) for t in range(width) if t <= case.last[i]]
    mu = sum(seen) / len(seen)
    var = sum((x - mu) ** 2 for x in seen) / (len(seen) - 1)
    advantages = [[(raw[i][t] - mu) / (var + 1e-8) ** 0.5 if t <= case.last[i] else 0.0 for t in range(width)] for i in range(count)]
    policy, value = [], []
    for part in chunks(count, micro):
        pg, vf = [], []
        for i in part:
            pg.append([])
            vf.append([])
            for t in range(width):
                if t <= case.last[i]:
                    rho, a = torch.exp(new[i][t] - case.old[i][t]), advantages[i][t]
                    pg[-1].append(worse(-a * rho, -a * held(rho, 0.8, 1.2)))
                if t <= case.last[i] + 1:
                    v, old, target = new_value[i][t], case.value[i][t], returns[i][t]
                    vf[-1].append(0.5 * worse((v - target) ** 2, (held(v, old - 0.2, old + 0.2) - target) ** 2))
        policy.append(over(pg))
        value.append(over(vf))
    return Answer(rewards, raw, returns, advantages, torch.stack(policy).mean(), torch.stack(value).mean())


def deepspeed_ppo(case: Any, new: list[list[Tensor]], new_value: list[list[Tensor]], micro: int) -> Answer:
    """parity.md 5.3, on whole sequences of a prompt of 3 tokens (ids 7) and the window's answer (ids 5, pads 0): arrays are indexed by action."""
    prompt, width, count = 3, case.width, len(case.old)
    total, start = prompt + width, prompt - 1
    rewards, values, raw, policy, value = [], [], [], [], []
    for i in range(count):
        ids = [7] * prompt + [5 if t <= case.last[i] else 0 for t in range(width)]
        mask = [int(x != 0) for x in ids][1:]
        ends = start + sum(mask[start:]) + 1
        old, ref = ([0.0] * start + rows[i] for rows in (case.old, case.ref))
        row = [-0.1 * (old[t] - ref[t]) for t in range(total - 1)]
        row[min(ends, total - 1) - 1] += max(-5.0, min(5.0, case.score[i]))
        worth = [0.0] * start + list(case.value[i])
        for t in range(ends, total - 1):
            row[t] = worth[t] = 0.0
        rewards.append(row[start:])
        values.append(worth[start:])
        raw.append(gae(row[start:], worth[start:]))
    returns = [[a + v for a, v in zip(x, y, strict=True)] for x, y in zip(raw, values, strict=True)]
    for part in chunks(count, micro):
        pg, vf = [], []
        for i in part:
            for t in range(width):
                if t <= case.last[i]:
                    rho, a = torch.exp(new[i][t] - case.old[i][t]), raw[i][t]
                    pg.append(worse(-a * rho, -a * held(rho, 0.8, 1.2)))
                    v, old_value, target = new_value[i][t], case.value[i][t], returns[i][t]
                    vf.append(0.5 * worse((v - target) ** 2, (held(v, old_value - 0.2, old_value + 0.2) - target) ** 2))
        policy.append(torch.stack(pg).mean())
        value.append(torch.stack(vf).mean())
    return Answer(rewards, raw, returns, raw, torch.stack(policy).mean(), torch.stack(value).mean())


def others(case: Any, i: int) -> list[int]:
    return [j for j in range(len(case.score)) if case.prompt[j] == case.prompt[i]]


def rloo(case: Any, new: list[list[Tensor]], new_value: list[list[Tensor]], micro: int) -> Answer:
    """parity.md 2."""
    count = len(case.old)
    total = [case.score[i] - 0.05 * sum(case.old[i][t] - case.ref[i][t] for t in range(case.last[i] + 1)) for i in range(count)]
    advantages = [total[i] - (sum(total[j] for j in others(case, i)) - total[i]) / (len(others(case, i)) - 1) for i in range(count)]
    losses = []
    for part in chunks(count, micro):
        each = []
        for i in part:
            w = torch.exp(sum((new[i][t] - case.old[i][t] for t in range(case.last[i] + 1)), torch.zeros((), dtype=torch.float64)))
            each.append(worse(-advantages[i] * w, -advantages[i] * held(w, 0.8, 1.2)))
        losses.append(torch.stack(each).mean())
    wide = [[advantages[i] if t <= case.last[i] else 0.0 for t in range(case.width)] for i in range(count)]
    return Answer([], wide, [], wide, torch.stack(losses).mean(), torch.zeros(()))


def grpo_fork(case: Any, new: list[list[Tensor]], new_value: list[list[Tensor]], micro: int) -> Answer:
    """parity.md 3."""
    count, advantages = len(case.old), []
    for i in range(count):
        group = [case.score[j] for j in others(case, i)]
        mean = sum(group) / len(group)
        std = (sum((x - mean) ** 2 for x in group) / (len(group) - 1)) ** 0.5
        advantages.append((case.score[i] - mean) / max(std, 1e-8))
    losses = []
    for part in chunks(count, micro):
        each = []
        for i in part:
            for t in range(case.last[i] + 1):
                rho, a, d = torch.exp(new[i][t] - case.old[i][t]), advantages[i], case.ref[i][t] - new[i][t]
                each.append(worse(-a * rho, -a * held(rho, 0.8, 1.2)) + 0.05 * (torch.exp(d) - d - 1))
        losses.append(torch.stack(each).mean())
    wide = [[advantages[i] if t <= case.last[i] else 0.0 for t in range(case.width)] for i in range(count)]
    return Answer([], wide, [], wide, torch.stack(losses).mean(), torch.zeros(()))


LOOPS: dict[str, Callable[..., Answer]] = {
    "ppo_trl_0_12": trl_ppo, "rloo_trl_0_12": rloo, "grpo_trl_fork": grpo_fork, "ppo_deepspeed_chat": deepspeed_ppo,
}  # fmt: skip


def close(found: Tensor, expected: Tensor | Grid | list[float] | float, within: float = 1e-10) -> None:
    expected = torch.as_tensor(expected, dtype=torch.float64)
    assert torch.isfinite(found).all() and (found - expected).abs().max() <= within, f"{found.tolist()} is not {expected.tolist()}"


def leaves(rows: Grid) -> list[list[Tensor]]:
    return [[torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in row] for row in rows]


def slopes(rows: list[list[Tensor]]) -> Tensor:
    return torch.stack([torch.stack([torch.zeros_like(x) if x.grad is None else x.grad for x in row]) for row in rows])


def test_every_preset_has_a_loop() -> None:
    assert set(LOOPS) == set(PRESETS)


@pytest.mark.parametrize("micro", [0, 3])
@pytest.mark.parametrize("name", LOOPS)
def test_preset_equals_its_loop(name: str, padded: Any, micro: int) -> None:
    preset, case = PRESETS[name], padded
    new, new_value = leaves(case.new), leaves(case.new_value)
    expected = LOOPS[name](case, new, new_value, micro)
    (expected.policy + preset.row.value.coefficient * expected.value).backward()

    logprobs, values = grid(case.new).requires_grad_(), grid(case.new_value).requires_grad_()
    credit = window_credit(preset.row.credit, case.window, preset.quirks)
    loss = window_loss(preset.row, case.window, credit, logprobs, values, preset.quirks, micro=micro)
    loss.total.backward()

    close(loss.policy.detach(), expected.policy.detach())
    close(loss.total.detach(), (expected.policy + preset.row.value.coefficient * expected.value).detach())
    close(logprobs.grad, slopes(new))
    live = case.window.live
    if preset.row.value.needs:
        close(credit.rewards, expected.rewards)
        close(credit.raw, expected.raw)
        close(credit.returns, expected.returns)
        close(loss.value.detach(), expected.value.detach())
        close(values.grad, slopes(new_value))
        assert values.grad.abs().max() > 0
    close(torch.where(live, credit.advantages, 0), torch.where(live, grid(expected.advantages), 0))
    assert logprobs.grad[live].abs().max() > 0 and not logprobs.grad[~live].any()


def test_whitened_rewards_equal_the_loop(padded: Any) -> None:
    expected = trl_ppo(padded, leaves(padded.new), leaves(padded.new_value), 0, whiten_rewards=True)
    found = window_credit(replace(TRL.row.credit, whiten_rewards=True), padded.window, TRL.quirks)
    close(found.rewards, expected.rewards)
    close(found.advantages, expected.advantages)


@pytest.mark.parametrize("name", LOOPS)
def test_what_lies_behind_an_answer_is_inert(name: str, padded: Any) -> None:
    """NaN beyond the last slot that a quirk keeps reaches no number and no gradient."""
    preset, case = PRESETS[name], padded
    window, beyond = case.window, ~(case.window.live | case.window.after)
    assert beyond.any()

    def spoilt(x: Tensor) -> Tensor:
        return torch.where(beyond, torch.nan, x)

    found = []
    for change in (lambda x: x, spoilt):
        logprobs, values = change(grid(case.new)).requires_grad_(), change(grid(case.new_value)).requires_grad_()
        made = replace(window, old=change(window.old), reference=change(window.reference), values=change(window.values))
        loss = window_loss(preset.row, made, window_credit(preset.row.credit, made, preset.quirks), logprobs, values, preset.quirks)
        loss.total.backward()
        found.append((loss.total.detach(), logprobs.grad, torch.zeros(1) if values.grad is None else values.grad))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


# ------------------------------------------------------------------------------------------- printed digits


EIGHT = 5.1e-9


def digits(case: Any, name: str, quirks: Quirks, **more: object) -> tuple:
    row = PRESETS[name].row
    credit = window_credit(replace(row.credit, **more), case.window, quirks)
    return credit, window_loss(row, case.window, credit, grid(case.new), grid(case.new_value), quirks)


def test_fixture_t_parity(t: Any) -> None:
    credit, loss = digits(t, "ppo_trl_0_12", TRL.quirks)
    close(credit.rewards, [[0.01, -0.005, -0.0075, 1, 0], [-0.01, 0.005, -0.01, 0.015, -0.51]], 1e-12)
    close(credit.raw, [[0.59838125, 0.829875, 0.3525, 0.8, 0], [-0.57072569, -0.37971125, -0.931275, -0.8645, -0.61]], EIGHT)
    close(credit.returns, [[0.89838125, 0.929875, 0.9525, 1, 0], [-0.37072569, -0.37971125, -0.431275, -0.4645, -0.51]], EIGHT)
    close(
        credit.advantages,
        [[1.15528395, 1.49155526, 0.79811315, 0, 0], [-0.5429784, -0.26550795, -1.06671776, -0.96971939, -0.60002886]],
        EIGHT,
    )
    close(loss.policy, 0.009672945486, 5.1e-13)
    close(loss.value, 0.260608045436, 5.1e-13)
    close(loss.total, 0.035733750029, 5.1e-13)
    whitened, _ = digits(t, "ppo_trl_0_12", TRL.quirks, whiten_rewards=True)
    close(
        whitened.rewards,
        [[-0.05827437, -0.09646189, -0.10282648, 2.46210207, 0], [-0.10919107, -0.07100354, -0.10919107, -0.0455452, -1.38210846]],
        EIGHT,
    )


def test_fixture_t_corrected(t: Any) -> None:
    credit, loss = digits(t, "ppo_trl_0_12", CORRECTED)
    close(credit.rewards, [[0.01, -0.005, 0.9925, 0, 0], [-0.01, 0.005, -0.01, 0.015, -0.51]], 1e-12)
    close(credit.raw, [[0.63448125, 0.867875, 0.3925, 0, 0], [-0.57072569, -0.37971125, -0.931275, -0.8645, -0.61]], EIGHT)
    close(
        credit.advantages,
        [[1.15570379, 1.48579472, 0.81346747, 0, 0], [-0.5488315, -0.27867802, -1.05875972, -0.96431922, -0.60437752]],
        EIGHT,
    )
    close(loss.policy, 0.009604981678, 5.1e-13)


def test_fixture_t_rloo(t: Any) -> None:
    credit, loss = digits(t, "rloo_trl_0_12", PRESETS["rloo_trl_0_12"].quirks)
    close(credit.rewards.sum(1), [0.9975, -0.51], 1e-12)
    close(credit.advantages[:, 0], [1.5075, -1.5075], 1e-12)
    close(loss.total, -0.272732560456, 5.1e-13)


def test_fixture_ds(ds: Any) -> None:
    credit, loss = digits(ds, "ppo_deepspeed_chat", DS.quirks)
    close(credit.rewards, [[0.02, -0.01, -0.015, 0.98, 0], [-0.02, 0.01, -0.02, 0.03, -5.02]], 1e-12)
    close(credit.raw, [[0.579715, 0.7997, 0.326, 0.78, 0], [-4.24556325, -4.237435, -4.9973, -5.134, -5.12]], EIGHT)
    close(credit.returns - credit.raw, [[0.3, 0.1, 0.6, 0.2, 0], [0.2, 0, 0.5, 0.4, 0.1]], 1e-12)
    close(credit.returns, [[0.879715, 0.8997, 0.926, 0.98, 0], [-4.04556325, -4.237435, -4.4973, -4.734, -5.02]], EIGHT)
    close(loss.policy, 2.848407494503, 5.1e-13)
    close(loss.value, 7.345448368763, 5.1e-13)


def test_fixture_ds_corrected(ds: Any, ds_corrected: Any) -> None:
    """The stop token is an action: the advantages are the same, and it is trained."""
    credit, loss = digits(ds_corrected, "ppo_deepspeed_chat", CORRECTED)
    strict, _ = digits(ds, "ppo_deepspeed_chat", DS.quirks)
    close(credit.raw, strict.raw)
    close(loss.policy, 2.427917772891, 5.1e-13)
    close(loss.value, 6.572309661122, 5.1e-13)


# ------------------------------------------------------------------------------------------- token ids


def test_placement_of_the_deepspeed_score() -> None:
    """P=3, S=8: n=2 → score at action 4; n=4 → 6; n=5 (full) → 6, counted from the first action of the prompt."""
    start = 2
    for n, action in ((2, 4), (4, 6), (5, 6)):
        ids = torch.tensor([[5] * n + [0] * (5 - n)])
        zero = torch.zeros(1, 5, dtype=torch.float64)
        window = Window(zero, zero, zero, last_action(ids, 0), torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.long))
        rewards = window_credit(DS.row.credit, window, DS.quirks).rewards
        assert rewards[0].nonzero().flatten().tolist() == [action - start]


def test_truncation_last_action_and_missing_stop() -> None:
    ids = torch.tensor([[7, 9, 8, 9, 6], [7, 7, 7, 7, 7], [9, 9, 7, 7, 7], [7, 7, 7, 7, 9]])
    cut = truncate(ids, stop=9, pad=0)
    assert cut.tolist() == [[7, 9, 0, 0, 0], [7, 7, 7, 7, 7], [9, 0, 0, 0, 0], [7, 7, 7, 7, 9]]
    assert last_action(cut, 0).tolist() == [1, 4, 0, 4]
    assert missing_stop(cut, 9).tolist() == [False, True, False, False]
    same = truncate(ids, stop=9, pad=9)  # pad = eos: the stop token leaves the actions, and an answer of it alone has none
    assert same.tolist() == [[7, 9, 9, 9, 9], [7, 7, 7, 7, 7], [9, 9, 9, 9, 9], [7, 7, 7, 7, 9]]
    assert last_action(same, 9).tolist() == [0, 4, -1, 3]
    assert missing_stop(same, 9).tolist() == [False, True, False, False]


@pytest.mark.parametrize("quirk", ["kl_after_last", "critic_after_last"])
def test_a_quirk_of_a_slot_that_is_not_there_is_refused(quirk: str) -> None:
    with pytest.raises(UsageError, match=quirk):
        Quirks(**{quirk: True})
