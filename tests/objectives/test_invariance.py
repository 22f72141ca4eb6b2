"""What must not change an update: how the batch is split, in which order it stands, and whatever unscored or unasked entries hold."""

from __future__ import annotations

import random
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tilt.objectives import ALGORITHMS, Experience, Layout, Objective, Outputs, Rewards, Signals

NAN = float("nan")
ROWS = pytest.mark.parametrize("name", ALGORITHMS)


def gradients(row: Objective, outputs: Outputs, experience: Experience) -> tuple[Tensor, Tensor, Tensor]:
    """Loss and its gradients by logprobs and by values (zeros where there are none)."""
    logprobs, values = outputs.logprobs.detach().requires_grad_(), outputs.values.detach().requires_grad_()
    loss = row.loss(replace(outputs, logprobs=logprobs, values=values), experience)
    loss.backward()
    return loss.detach(), logprobs.grad, torch.zeros_like(values) if values.grad is None else values.grad


def part_of(outputs: Outputs, layout: Layout, sequences: Tensor) -> Outputs:
    actions = layout.actions_of(sequences)
    return Outputs.of(outputs.logprobs[actions], values=outputs.values[actions], entropy=outputs.entropy[actions], kl=outputs.kl[actions])


@ROWS
def test_parts_add_up_to_the_batch(name: str, some: Any) -> None:
    row, seed = ALGORITHMS[name], some.layout.actions
    rng = random.Random(seed)
    outputs, experience = some.outputs(), ALGORITHMS[name].prepare(some.rewards, some.signals, some.layout)
    outputs = replace(outputs, entropy=torch.rand(some.layout.actions, dtype=torch.float64))
    whole = gradients(row, outputs, experience)
    order = torch.randperm(some.layout.sequences, generator=torch.Generator().manual_seed(seed))
    cuts = sorted(rng.randint(0, len(order)) for _ in range(2))
    parts = [p for p in (order[: cuts[0]], order[cuts[0] : cuts[1]], order[cuts[1] :]) if len(p)]

    loss, by_policy, by_value = torch.zeros((), dtype=torch.float64), torch.zeros_like(whole[1]), torch.zeros_like(whole[2])
    sums: dict[str, tuple[float, float]] = {}
    for part in parts:
        share, said = experience.take(part), part_of(outputs, some.layout, part)
        found = gradients(row, said, share)
        actions = some.layout.actions_of(part)
        loss += found[0]
        by_policy[actions] += found[1]
        by_value[actions] += found[2]
        for key, (total, weight) in row.metrics(said, share).items():
            assert not total.requires_grad
            before = sums.get(key, (0.0, 0.0))
            sums[key] = (before[0] + total.item(), before[1] + weight.item())
    torch.testing.assert_close(loss, whole[0], rtol=0, atol=1e-12)
    torch.testing.assert_close(by_policy, whole[1], rtol=0, atol=1e-12)
    torch.testing.assert_close(by_value, whole[2], rtol=0, atol=1e-12)
    metrics = row.metrics(outputs, experience)
    assert set(metrics) == set(sums)
    for key, (total, weight) in metrics.items():
        assert sums[key] == pytest.approx((total.item(), weight.item()), abs=1e-12), key
    for key in metrics:
        if key.startswith("loss/"):
            assert sums[key][1] == pytest.approx(1.0, abs=1e-12), "the parts of a batch are the whole batch"


@ROWS
def test_order_of_sequences_does_not_matter(name: str, some: Any) -> None:
    row, layout = ALGORITHMS[name], some.layout
    order = torch.randperm(layout.sequences, generator=torch.Generator().manual_seed(5))
    actions = layout.actions_of(order)
    steps = some.rewards.steps[actions]
    signals = Signals(
        **{f.name: getattr(some.signals, f.name)[actions] for f in fields(Signals) if f.name != "final"}, final=some.signals.final
    )
    shuffled = row.prepare(Rewards.of(some.rewards.total[order], steps), signals, layout.take(order))
    whole = gradients(row, some.outputs(), row.prepare(some.rewards, some.signals, layout))
    found = gradients(row, part_of(some.outputs(), layout, order), shuffled)
    torch.testing.assert_close(found[0], whole[0], rtol=0, atol=1e-12)
    torch.testing.assert_close(found[1], whole[1][actions], rtol=0, atol=1e-12)
    torch.testing.assert_close(found[2], whole[2][actions], rtol=0, atol=1e-12)


@ROWS
def test_unscored_sequences_do_not_exist(name: str, some: Any) -> None:
    """A batch with answers that could not be scored, holding anything, gives the update of the batch without them."""
    row, plain = ALGORITHMS[name], some.layout
    lengths, prompt = plain.lengths.tolist() + [3, 1], some.prompt + [some.prompt[0], max(some.prompt) + 1]
    layout = Layout.of(lengths, prompt)
    scored = torch.tensor([True] * plain.sequences + [False] * 2)
    outputs = some.outputs()
    without = row.prepare(some.rewards, some.signals, plain)
    whole, expected = gradients(row, outputs, without), row.metrics(outputs, without)
    for junk in (NAN, float("inf"), 700.0):
        extra = torch.full((4,), junk, dtype=torch.float64)

        def more(x: Tensor, extra: Tensor = extra) -> Tensor:
            return torch.cat([x, extra])

        rewards = Rewards.of(torch.cat([some.rewards.total, extra[:2]]), more(some.rewards.steps), scored=scored)
        others = {k: more(getattr(some.signals, k)) for k in ("sampler", "reference", "values", "entropy")}
        experience = row.prepare(rewards, Signals.of(more(some.signals.old), **others), layout)
        assert (experience.weights[plain.actions :] == 0).all() and (experience.advantages[plain.actions :] == 0).all()
        said = Outputs.of(more(outputs.logprobs), entropy=more(outputs.entropy), kl=more(outputs.kl), values=more(outputs.values))
        found = gradients(row, said, experience)
        torch.testing.assert_close(found[0], whole[0], rtol=0, atol=1e-12)
        for now, before in zip(found[1:], whole[1:], strict=True):
            torch.testing.assert_close(now[: plain.actions], before, rtol=0, atol=1e-12)
            assert (now[plain.actions :] == 0).all()
        metrics = row.metrics(said, experience)
        for key, pair in expected.items():
            assert [x.item() for x in metrics[key]] == pytest.approx([x.item() for x in pair], abs=1e-12), key


@ROWS
def test_a_batch_that_nobody_could_score_asks_for_nothing(name: str, f: Any) -> None:
    scored = torch.zeros(4, dtype=torch.bool)
    row = ALGORITHMS[name]
    experience = row.prepare(Rewards.of(torch.full((4,), NAN, dtype=torch.float64), scored=scored), f.signals, f.layout)
    loss, by_policy, by_value = gradients(row, f.outputs(), experience)
    assert loss == 0 and (by_policy == 0).all() and (by_value == 0).all()


@ROWS
def test_signals_outside_needs_are_never_read(name: str, f: Any) -> None:
    """Loss, gradient and advantages are those of the full signals when everything outside `needs` is NaN."""
    row = ALGORITHMS[name]
    blank = {
        k: getattr(f.signals, k) if k in row.needs else torch.full((10,), NAN, dtype=torch.float64)
        for k in ("sampler", "reference", "values", "entropy")
    }
    old = f.signals.old if "old" in row.needs else torch.full((10,), NAN, dtype=torch.float64)
    values = f.outputs().values if "values" in row.needs else None
    outputs = Outputs.of(
        f.outputs().logprobs,
        entropy=f.outputs().entropy if row.bonus.coefficient else None,
        kl=f.outputs().kl if row.against == "old" else None,
        values=values,
    )
    found = gradients(row, outputs, row.prepare(f.rewards, Signals.of(old, **blank), f.layout))
    whole = gradients(row, f.outputs(), row.prepare(f.rewards, f.signals, f.layout))
    for now, before in zip(found, whole, strict=True):
        assert torch.equal(now, before)


@ROWS
@pytest.mark.parametrize("signal", ["old", "reference", "values"])
def test_credit_needs_exactly_what_prepare_reads(name: str, signal: str, f: Any) -> None:
    row = ALGORITHMS[name]
    signals = replace(f.signals, **{signal: torch.full((10,), NAN, dtype=torch.float64)})
    advantages = row.prepare(f.rewards, signals, f.layout).advantages
    assert advantages.isfinite().all().item() == (signal not in row.credit.needs)


@ROWS
@pytest.mark.parametrize("signal", ["old", "reference", "values"])
def test_needs_are_loud_when_missing(name: str, signal: str, f: Any) -> None:
    row = ALGORITHMS[name]
    signals = replace(f.signals, **{signal: torch.full((10,), NAN, dtype=torch.float64)})
    loss = row.loss(f.outputs(), row.prepare(f.rewards, signals, f.layout))
    assert loss.isfinite().item() == (signal not in row.needs)


@ROWS
def test_with_one_step_the_ratio_is_exactly_one(name: str, f: Any) -> None:
    """old = the detached logprobs: nothing is clipped, and the gradient is that of sum w Adv logprobs at policy = old."""
    row, outputs = ALGORITHMS[name], f.outputs()
    if "old" in row.credit.needs:
        signals = f.signals
    else:
        signals = replace(f.signals, old=torch.full((10,), NAN, dtype=torch.float64))
    experience = row.prepare(f.rewards, signals, f.layout)
    experience = replace(experience, signals=replace(experience.signals, old=outputs.logprobs.detach()))
    assert (row.ratio(outputs.logprobs, experience.signals.old, f.layout, experience.advantages) == 1).all()
    metrics = {k: (a / b).item() for k, (a, b) in row.metrics(outputs, experience).items()}
    assert (
        metrics.get("policy/approxkl_avg", 0.0) == 0 and metrics.get("policy/clipfrac_avg", 0.0) == 0 and metrics.get("val/ratio", 1.0) == 1
    )


def test_zero_variance_is_decided_by_max_and_min() -> None:
    """In float32 seven rewards of .3 have a standard deviation of 3.2e-8, and (R - mean) / std is not 0."""
    rewards, layout = torch.full((7,), 0.3, dtype=torch.float32), Layout.of([2] * 7, [0] * 7)
    for name in ("grpo", "dr_grpo", "dapo", "gspo", "cispo", "lite_ppo", "reinforce_pp_baseline"):
        experience = ALGORITHMS[name].prepare(Rewards.of(rewards), Signals.of(torch.zeros(14)), layout)
        assert (experience.advantages == 0).all(), name
        assert (experience.weights > 0).all(), "a group without variance still stands in the denominators"


def test_zero_variance_with_kl_in_the_reward() -> None:
    row, old = ALGORITHMS["rloo"], torch.zeros(3, dtype=torch.float64)
    layout, reward = Layout.of([1, 1, 1], [0, 0, 0]), torch.full((3,), 0.1, dtype=torch.float64)
    assert (row.prepare(Rewards.of(reward), Signals.of(old, reference=old), layout).advantages == 0).all()
    drifted = row.prepare(Rewards.of(reward), Signals.of(old, reference=torch.tensor([-1.0, 0, 0], dtype=torch.float64)), layout)
    assert drifted.advantages.tolist() == pytest.approx([-0.05, 0.025, 0.025])


def test_unscored_answer_leaves_the_baseline() -> None:
    """Rewards 1, none, 0: the group is 1, 0; a group with one scored answer has advantage 0."""
    reward, layout = torch.tensor([1.0, NAN, 0.0, 5.0, NAN]), Layout.of([1, 2, 1, 1, 1], [0, 0, 0, 1, 1])
    experience = ALGORITHMS["dr_grpo"].prepare(Rewards.of(reward, scored=~reward.isnan()), Signals.of(torch.zeros(6)), layout)
    assert experience.advantages.tolist() == [0.5, 0, 0, -0.5, 0, 0]
    assert experience.weights.tolist() == pytest.approx([1 / 9000, 0, 0, 1 / 9000, 1 / 9000, 0])


@ROWS
def test_float32_stays_float32_and_nothing_reaches_the_advantages(name: str, f: Any) -> None:
    row = ALGORITHMS[name]
    signals = Signals(**{k.name: getattr(f.signals, k.name).float().requires_grad_() for k in fields(Signals)})
    experience = row.prepare(f.rewards, signals, f.layout)
    for x in (experience.advantages, experience.returns, experience.weights):
        assert x.dtype == torch.float32 and not x.requires_grad
    assert row.loss(Outputs.of(f.outputs().logprobs.float(), values=f.outputs().values.float()), experience).dtype == torch.float32
