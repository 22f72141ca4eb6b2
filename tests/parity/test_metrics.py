"""The 14 metrics of RLHF in both columns of parity.md: fixture T to its digits, and loops over padded windows with several epochs and micro-batches."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from tilt.objectives import ALGORITHMS, Outputs, Rewards, Signals, batch_metrics
from tilt.parity.metrics import ROLLOUT_METRICS, UPDATE_METRICS, MicroBatch, rollout_metrics, update_metrics
from tilt.parity.padded import WindowCredit, window_credit
from tilt.parity.presets import PRESETS
from tilt.parity.quirks import CORRECTED, Quirks
from tilt.segments import Layout

TRL = PRESETS["ppo_trl_0_12"]
KL = 0.05
STOPS = torch.tensor([1.0, 0.0], dtype=torch.float64)


def micro_batch(case: Any, quirks: Quirks, row: Any, part: list[int], credit: WindowCredit, shift: float = 0.0) -> MicroBatch:
    new, values = (x.detach() for x in case.tensors())
    entropy = torch.arange(new.numel(), dtype=torch.float64).view_as(new) / 10
    index = torch.tensor(part)
    return MicroBatch(
        case.window.take(index), WindowCredit(*(x[index] for x in credit)), new[index] + shift, values[index] - shift, entropy[index]
    )


def both(case: Any, quirks: Quirks, name: str = "ppo_trl_0_12") -> dict[str, float]:
    row = PRESETS[name].row
    credit = window_credit(row.credit, case.window, quirks)
    found = rollout_metrics(case.window, credit, KL, STOPS, quirks)
    found |= update_metrics(row, [micro_batch(case, quirks, row, [0, 1], credit)], quirks)
    return {key: value.item() for key, value in found.items()}


def test_there_are_fourteen() -> None:
    assert len({*ROLLOUT_METRICS, *UPDATE_METRICS}) == 14


PARITY = {
    "objective/kl": 0.125, "objective/entropy": 2.375, "objective/non_score_reward": -0.00625, "objective/scores": 0.25,
    "objective/rlhf_reward": 0.24375, "policy/approxkl_avg": 0.033625, "val/ratio": 1.006797292851, "policy/clipfrac_avg": 0.375,
    "loss/policy_avg": 0.009672945486, "loss/value_avg": 0.260608045436, "val/clipfrac_avg": 1 / 9, "val/num_eos_tokens": 1.0,
    "val/ratio_var": 0.0, "policy/entropy_avg": 0.45,
}  # fmt: skip
FIXED = PARITY | {
    "objective/entropy": 3.375, "policy/approxkl_avg": 0.04203125, "val/ratio": 1.008496616064, "loss/policy_avg": 0.009604981678,
    "policy/entropy_avg": (0 + 1 + 2 + 5 + 6 + 7 + 8 + 9) / 80,
}  # fmt: skip


def test_fixture_t_as_trl_has_it(t: Any) -> None:
    found = both(t, TRL.quirks)
    assert set(found) == set(PARITY)
    for name, expected in PARITY.items():
        assert found[name] == pytest.approx(expected, abs=5.1e-13, rel=0), name


def test_fixture_t_corrected(t: Any) -> None:
    found = both(t, CORRECTED)
    for name in FIXED.keys() - {"loss/value_avg", "val/clipfrac_avg", "val/ratio_var"}:
        assert found[name] == pytest.approx(FIXED[name], abs=5.1e-13, rel=0), name


def ragged(case: Any) -> tuple[Layout, Rewards, Signals, Outputs]:
    """The same answers on the action axis."""
    window, (new, values) = case.window, case.tensors()
    layout = Layout.of(window.last + 1, case.prompt)
    old, reference, worth = (x[window.live] for x in (window.old, window.reference, window.values))
    signals = Signals.of(old, reference=reference, values=worth, sampler=old)
    return layout, Rewards.of(window.score), signals, Outputs.of(new[window.live], values=values[window.live])


def test_the_corrected_column_is_what_a_run_reports(t: Any) -> None:
    """Without quirks the padded window and the row on the action axis say the same of every metric."""
    layout, rewards, signals, outputs = ragged(t)
    row = ALGORITHMS["ppo"]
    pairs = batch_metrics(rewards, signals, layout, kl=KL) | row.metrics(outputs, row.prepare(rewards, signals, layout))
    found, padded = {name: (a / b).item() for name, (a, b) in pairs.items()}, both(t, CORRECTED)
    shared = set(padded) & set(found) - {"policy/entropy_avg"}
    assert len(shared) == 11  # the variance of the ratio has another name there, stop tokens are counted by the recipe
    for name in shared:
        assert found[name] == pytest.approx(padded[name], abs=1e-12), name


def test_rloo_statistics_are_of_sequences(t: Any) -> None:
    found = both(t, PRESETS["rloo_trl_0_12"].quirks, "rloo_trl_0_12")
    expected = {"policy/approxkl_avg": 0.045625, "policy/clipfrac_avg": 0.5, "loss/policy_avg": -0.272732560456, "loss/value_avg": 0.0,
                "val/clipfrac_avg": 0.0, "val/ratio": 1.006797292851, "objective/rlhf_reward": 0.24375}  # fmt: skip
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, abs=5.1e-13, rel=0), name


def test_the_fork_reports_normalised_rewards(t: Any) -> None:
    found = both(t, PRESETS["grpo_trl_fork"].quirks, "grpo_trl_fork")
    assert "objective/non_score_reward" not in found and found["objective/rlhf_reward"] == pytest.approx(0, abs=1e-12)
    assert found["val/clipfrac_avg"] == found["loss/value_avg"] == 0 and found["policy/clipfrac_avg"] == pytest.approx(3 / 10)


def test_the_clamped_standard_deviation_is_a_trap_in_float32() -> None:
    """Seven rewards of .3 have a deviation of 3e-8, above the floor, and advantages near 1; the rule max = min gives 0."""
    from tilt.parity.window import Window

    zero = torch.zeros(7, 1, dtype=torch.float32)
    window = Window(zero, zero, zero, torch.zeros(7, dtype=torch.long), torch.full((7,), 0.3), torch.zeros(7, dtype=torch.long))
    row, quirks = PRESETS["grpo_trl_fork"].row, PRESETS["grpo_trl_fork"].quirks
    assert window_credit(row.credit, window, quirks).advantages.abs().max() > 0.9
    assert not window_credit(row.credit, window, CORRECTED).advantages.any()


# ------------------------------------------------------------------------------------- the loop over micro-batches


def over(numbers: list[float]) -> float:
    return sum(numbers) / len(numbers)


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("quirky", [True, False], ids=["parity", "corrected"])
def test_metrics_of_several_epochs_equal_the_loop(name: str, quirky: bool, padded: Any) -> None:
    preset = PRESETS[name]
    quirks = preset.quirks if quirky else CORRECTED
    credit = window_credit(preset.row.credit, padded.window, quirks)
    count, width, product = len(padded.old), padded.width, name.startswith("rloo")
    rng, batches, seen = random.Random(3), [], []
    for epoch in range(2):
        order = list(range(count))
        rng.shuffle(order)
        for start in range(0, count, 3):
            part, shift = order[start : start + 3], 0.01 * epoch
            if all(padded.last[i] < 0 for i in part):
                continue
            batches.append(micro_batch(padded, quirks, preset.row, part, credit, shift))
            seen.append((part, shift))
    found = {key: value.item() for key, value in update_metrics(preset.row, batches, quirks).items()}

    lists: dict[str, list[list[float]]] = {}

    def note(key: str, numbers: list[float]) -> None:
        lists.setdefault(key, []).append(numbers)

    for part, shift in seen:
        moved = {i: [padded.new[i][t] + shift - padded.old[i][t] for t in range(padded.last[i] + 1)] for i in part}
        pads = [0.0] * sum(width - padded.last[i] - 1 for i in part) if quirks.window_means else []
        tokens = [x for i in part for x in moved[i]]
        if product and quirky:
            note("policy/approxkl_avg", [0.5 * sum(moved[i]) ** 2 for i in part])
        else:
            note("policy/approxkl_avg", [0.5 * x * x for x in tokens] + pads)
        note("val/ratio", [2.718281828459045**x for x in tokens] + [1.0 for _ in pads])
        cut = []
        for i in part:
            for x in [sum(moved[i])] if product else moved[i]:
                rho, a = 2.718281828459045**x, credit.advantages[i, 0 if product else moved[i].index(x)].item()
                cut.append(float((rho > 1.2 and a > 0) or (rho < 0.8 and a < 0)))
        note("policy/clipfrac_avg", cut + ([0.0] * len(pads) if quirks.window_clipfrac else []))
        if preset.row.value.needs:
            cut, squares = [], []
            for i in part:
                for t in range(min(padded.last[i] + (2 if quirks.critic_after_last else 1), width)):
                    v, old, target = padded.new_value[i][t] - shift, padded.value[i][t], credit.returns[i, t].item()
                    near = min(max(v, old - 0.2), old + 0.2)
                    cut.append(float((near - target) ** 2 > (v - target) ** 2))
                    squares.append(0.5 * max((v - target) ** 2, (near - target) ** 2))
            note("val/clipfrac_avg", cut)
            note("loss/value_avg", squares)
    for key, parts in lists.items():
        expected = over([over(x) for x in parts]) if quirks.micro_batch_means else over([x for part in parts for x in part])
        assert found[key] == pytest.approx(expected, abs=1e-10), key
    ratios = [over(x) for x in lists["val/ratio"]] if quirks.variance_of_means else [x for part in lists["val/ratio"] for x in part]
    mean = over(ratios)
    assert found["val/ratio_var"] == pytest.approx(sum((x - mean) ** 2 for x in ratios) / (len(ratios) - 1), abs=1e-10)
