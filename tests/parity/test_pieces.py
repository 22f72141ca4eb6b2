"""In a run a preset computes what its padded window computes: advantages, losses, gradients, metrics, whatever the split; and what it cannot it refuses."""

from __future__ import annotations

from dataclasses import fields, replace
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from tilt.errors import UsageError
from tilt.objectives import ALGORITHMS, GAE, Outputs, Rewards, Signals
from tilt.parity.metrics import MicroBatch, rollout_metrics, update_metrics
from tilt.parity.padded import window_credit, window_loss
from tilt.parity.pieces import WindowedCredit, dressed
from tilt.parity.presets import PRESETS
from tilt.parity.quirks import CORRECTED, Quirks
from tilt.parity.window import Window, widen, window_of
from tilt.segments import Layout

WIDTH = 6


def ragged(seed: int, *, shortest: int = 1) -> tuple[Rewards, Signals, Layout, Tensor, Tensor, Tensor]:
    """Ten answers of lengths up to the window to four prompts, with new log-probabilities, values and values after the last action."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.tensor([WIDTH, WIDTH, shortest, *torch.randint(shortest, WIDTH + 1, (7,), generator=generator).tolist()])
    layout = Layout.of(lengths, [0, 0, 0, 1, 1, 2, 2, 3, 3, 3])

    def draw(n: int, scale: float = 1.0) -> Tensor:
        return scale * torch.randn(n, generator=generator, dtype=torch.float64)

    old = -draw(layout.actions).abs() - 0.05
    signals = Signals.of(old, sampler=old, reference=old + draw(layout.actions, 0.4), values=draw(layout.actions), final=draw(10))
    return (
        Rewards.of(draw(10, 4.0), actions=layout.actions),
        signals,
        layout,
        old + draw(layout.actions, 0.4),
        draw(layout.actions),
        draw(10),
    )


def wide_loss(row: Any, window: Window, quirks: Quirks, layout: Layout, new: Tensor, values: Tensor, final: Tensor) -> tuple[Any, Any]:
    credit = window_credit(row.credit, window, quirks)
    return credit, window_loss(row, window, credit, widen(new, layout, WIDTH), widen(values, layout, WIDTH, final), quirks)


def combinations(name: str) -> list[Quirks]:
    """The preset's quirks with each subset of those of the window's slots; what no run can have left out."""
    own, slots = PRESETS[name].quirks, ("stop_is_pad", "score_after_last", "kl_after_last", "critic_after_last")
    found = []
    for on in product((False, True), repeat=len(slots)) if "ppo" in name else [(False,) * 4]:
        chosen = dict(zip(slots, on, strict=True))
        if (chosen["kl_after_last"] and not chosen["stop_is_pad"]) or (
            not chosen["score_after_last"] and (chosen["kl_after_last"] or chosen["critic_after_last"])
        ):
            continue
        found.append(replace(own, **chosen))
    return found


RUNS = [(name, quirks) for name in PRESETS for quirks in combinations(name)]


@pytest.mark.parametrize("name, quirks", RUNS, ids=[f"{n}-{'+'.join(q.on[:4])}" for n, q in RUNS])
def test_the_run_computes_what_the_window_computes(name: str, quirks: Quirks) -> None:
    row = PRESETS[name].row
    rewards, signals, layout, new, values, final = ragged(len(quirks.on), shortest=2 if quirks.stop_is_pad else 1)
    leaves = [x.clone().requires_grad_() for x in (new, values, final)]
    window = window_of(rewards, signals, layout, WIDTH, stop_is_pad=quirks.stop_is_pad)
    credit, expected = wide_loss(row, window, quirks, layout, *leaves)
    expected.total.backward()

    run = dressed(row, WIDTH, quirks)
    mine = [x.clone().requires_grad_() for x in (new, values, final)]
    experience = run.prepare(rewards, signals, layout)
    total, said = torch.zeros((), dtype=torch.float64), dict[str, Tensor]()
    for part in torch.arange(10).split(3):  # the parts of a batch add up
        actions = layout.actions_of(part)
        outputs = Outputs.of(mine[0][actions], values=mine[1][actions], final=mine[2][part])
        total = total + run.loss(outputs, experience.take(part))
        for key, pair in run.metrics(outputs, experience.take(part)).items():
            said[key] = said.get(key, 0) + torch.stack([x.double() for x in pair])
    total.backward()
    live = window.live[layout.sequence, layout.positions]
    kept = credit.advantages[layout.sequence, layout.positions]
    assert (experience.advantages - kept)[live].abs().max() < 1e-12
    assert total.item() == pytest.approx(expected.total.item(), abs=1e-10)
    for key, value in (("loss/policy_avg", expected.policy), ("loss/value_avg", expected.value)):
        if key in said:
            assert (said[key][0] / said[key][1]).item() == pytest.approx(value.item(), abs=1e-10), key
    for a, b in zip(mine, leaves, strict=True):
        slope = torch.zeros_like(b) if b.grad is None else b.grad
        assert ((torch.zeros_like(a) if a.grad is None else a.grad) - slope).abs().max() < 1e-10
    assert leaves[0].grad.abs().max() > 0
    if quirks.critic_after_last and not quirks.stop_is_pad:
        assert mine[2].grad[layout.lengths < WIDTH].abs().max() > 0 and not mine[2].grad[layout.lengths == WIDTH].any()


@pytest.mark.parametrize("name", PRESETS)
def test_without_quirks_it_is_the_row(name: str) -> None:
    row = PRESETS[name].row
    rewards, signals, layout, new, values, final = ragged(5)
    ended = replace(signals, final=torch.zeros(10, dtype=torch.float64))
    found = []
    for run, known in ((row, ended), (dressed(row, WIDTH, CORRECTED), signals)):
        logprobs = new.clone().requires_grad_()
        loss = run.loss(Outputs.of(logprobs, values=values, final=final), run.prepare(rewards, known, layout))
        loss.backward()
        found.append((loss.item(), logprobs.grad))
    assert found[0][0] == pytest.approx(found[1][0], abs=1e-12) and (found[0][1] - found[1][1]).abs().max() < 1e-12


def test_the_presets_without_quirks_are_rows_of_the_table() -> None:
    assert PRESETS["ppo_trl_0_12"].row == ALGORITHMS["ppo"] and PRESETS["rloo_trl_0_12"].row == ALGORITHMS["rloo_clip"]


@pytest.mark.parametrize("name", PRESETS)
def test_metrics_of_the_run_are_those_of_the_window(name: str) -> None:
    preset = PRESETS[name]
    row, quirks = preset.row, preset.quirks
    rewards, signals, layout, new, values, final = ragged(2, shortest=2)
    run = dressed(row, WIDTH, quirks)
    experience, (measure,) = run.prepare(rewards, signals, layout), run.measures
    window = window_of(rewards, signals, layout, WIDTH, stop_is_pad=quirks.stop_is_pad)
    credit = window_credit(row.credit, window, quirks)
    entropy = torch.rand(layout.actions, dtype=torch.float64)
    parts, batches = [], []
    for part in torch.arange(10).split(4):
        actions = layout.actions_of(part)
        outputs = Outputs.of(new[actions], values=values[actions], final=final[part], entropy=entropy[actions])
        parts.append(measure.part(outputs, experience.take(part)))
        wide = (widen(new, layout, WIDTH), widen(values, layout, WIDTH, final), widen(entropy, layout, WIDTH))
        batches.append(MicroBatch(window.take(part), type(credit)(*(x[part] for x in credit)), *(x[part] for x in wide)))
    found, expected = measure.update(parts), update_metrics(row, batches, quirks)
    assert set(found) == {f"parity/{key}" for key in expected} - ({"parity/policy/entropy_avg"} if quirks.window_means else set())
    for key, value in found.items():
        assert value.item() == pytest.approx(expected[key.removeprefix("parity/")].item(), abs=1e-10), key
    batch, padded = (
        measure.batch(rewards, signals, layout),
        rollout_metrics(window, credit, getattr(row.credit, "kl", 0.0), torch.zeros(1), quirks),
    )
    assert set(batch) == {f"parity/{key}" for key in padded} - {"parity/val/num_eos_tokens"}
    for key, value in batch.items():
        assert value.item() == pytest.approx(padded[key.removeprefix("parity/")].item(), abs=1e-12), key


def test_answers_that_could_not_be_scored_are_in_no_number() -> None:
    preset = PRESETS["ppo_trl_0_12"]
    run = dressed(preset.row, WIDTH, preset.quirks)
    rewards, signals, layout, new, values, final = ragged(7)
    scored = torch.ones(10, dtype=torch.bool)
    scored[[1, 4]] = False
    kept = torch.nonzero(scored).flatten()
    actions = layout.actions_of(kept)
    whole = run.prepare(replace(rewards, scored=scored, total=torch.where(scored, rewards.total, torch.nan)), signals, layout)
    small = run.prepare(
        Rewards.of(rewards.total[kept], actions=len(actions)),
        Signals.of(signals.old[actions], reference=signals.reference[actions], values=signals.values[actions], final=signals.final[kept]),
        layout.take(kept),
    )
    for a, b in ((whole.advantages, small.advantages), (whole.returns, small.returns), (whole.weights, small.weights)):
        assert torch.allclose(a[actions], b, atol=1e-12)
    assert not whole.weights[layout.sequence == 4].any()
    a = run.loss(Outputs.of(new, values=values, final=final), whole)
    b = run.loss(Outputs.of(new[actions], values=values[actions], final=final[kept]), small)
    assert a.item() == pytest.approx(b.item(), abs=1e-12)


def test_what_a_run_cannot_have_is_refused() -> None:
    with pytest.raises(UsageError, match="log-probability of a pad"):
        WindowedCredit(GAE(), 4, Quirks(score_after_last=True, kl_after_last=True))
    rewards, signals, layout, *_ = ragged(0)
    with pytest.raises(UsageError, match="does not fit"):
        dressed(ALGORITHMS["ppo"], 3, CORRECTED).prepare(rewards, signals, layout)
    with pytest.raises(UsageError, match="dense rewards"):
        dense = replace(rewards, steps=torch.ones(layout.actions, dtype=torch.float64))
        dressed(ALGORITHMS["ppo"], WIDTH, CORRECTED).prepare(dense, signals, layout)
    with pytest.raises(UsageError, match="token mean"):
        dressed(ALGORITHMS["rloo_clip"], WIDTH, Quirks(stop_is_pad=True))


def test_every_quirk_has_a_meaning() -> None:
    from tilt.parity.quirks import MEANING

    assert set(MEANING) == {f.name for f in fields(Quirks)}
    assert {name for preset in PRESETS.values() for name in preset.quirks.on} == set(MEANING), "each quirk is of some library"
