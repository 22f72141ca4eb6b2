"""What an update asks of each action: push of every row against finite differences and forms written by hand, its sum against the gradient."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tilt.distributions import entropy, kl, logprobs
from tilt.inspect.fixtures import fixture_f
from tilt.learning.channels import Channels, pushes
from tilt.learning.learner import Passes
from tilt.objectives import ALGORITHMS, K1, K2, K3, NoPenalty, Objective, Outputs, Rewards, Signals
from tilt.segments import Layout, segment_mean, segment_sum, spread

STEP = 1e-6


def known(row: Objective):
    batch = fixture_f()
    signals = replace(batch.signals, entropy=torch.linspace(0.2, 1.4, 10, dtype=torch.float64))
    if "ends" in row.needs or row is ALGORITHMS["grpo_process"]:
        ends = torch.zeros(10, dtype=torch.bool)
        ends[[1, 2, 4, 8, 9]] = True
        rewards = Rewards.of(batch.rewards.total, 0.3 * ends.double(), ends=ends, actions=10)
    else:
        rewards = batch.rewards
    return batch, row.prepare(rewards, signals, batch.layout)


def pushed(row: Objective, logits: Tensor, experience, values: Tensor) -> dict[str, Tensor]:
    said = Outputs.of(
        logits.clone().requires_grad_(),
        values=values.clone().requires_grad_(),
        entropy=torch.ones(10).double(),
        kl=torch.full((10,), 0.3).double(),
        sequences=4,
    )
    row.loss(said, experience).backward()
    return pushes(row, said, experience)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_push_is_the_slope_of_the_loss_in_each_log_probability(name, frozen):
    row = ALGORITHMS[name]
    batch, experience = known(row)
    bend = 0.003 * torch.arange(1.0, 11.0).double().sin()  # away from the kinks on which the fixture puts some ratios and values
    policy, values = batch.outputs.logprobs.detach() + bend, batch.outputs.values.detach() + bend
    found = pushed(row, policy, experience, values)
    with frozen() as again:

        def loss(logprobs: Tensor, worth: Tensor) -> float:
            again()
            return float(
                row.loss(
                    Outputs.of(logprobs, values=worth, entropy=torch.ones(10).double(), kl=torch.full((10,), 0.3).double(), sequences=4),
                    experience,
                )
            )

        loss(policy, values)  # what is held still, is held where the slope is asked for
        for which, start in (("push", policy), ("push_value", values)):
            if which not in found:
                continue
            for t in range(10):
                ends = []
                for sign in (1, -1):
                    moved = start.clone()
                    moved[t] += sign * STEP
                    ends.append(loss(moved, values) if which == "push" else loss(policy, moved))
                assert float(found[which][t]) == pytest.approx(-(ends[0] - ends[1]) / (2 * STEP), rel=1e-6, abs=2e-9)
    assert found["push"].abs().max() > 1e-5, "a row that asks nothing shows nothing"
    assert ("push_value" in found) == bool(row.value.needs)


# --- closed forms, written by hand ----------------------------------------------------------------------------------------------

B, LENGTHS = 4, torch.tensor([3, 2, 4, 1])


def unclipped(ratio: Tensor, advantages: Tensor, low: float, high: float) -> Tensor:
    return ~((advantages > 0) & (ratio > high) | (advantages < 0) & (ratio < low))


@pytest.mark.parametrize(
    "name", ["sft", "reinforce", "rloo", "rloo_clip", "ppo", "grpo", "dapo", "dr_grpo", "reinforce_pp", "gspo", "cispo", "trpo", "grpo_tis"]
)
def test_push_equals_the_closed_form(name):
    row = ALGORITHMS[name]
    batch, experience = known(row)
    layout, signals, adv = batch.layout, experience.signals, experience.advantages
    new, old, ref = batch.outputs.logprobs.detach(), signals.old, signals.reference
    per_token, per_sequence = torch.full((10,), 1 / 10.0), spread(1 / (B * LENGTHS.double()), layout)
    ratio = (new - old).exp()
    whole = spread(segment_sum(new - old, layout).exp(), layout)
    mean = spread(segment_mean(new - old, layout).exp(), layout)
    low, high = getattr(row.surrogate, "low", 0), getattr(row.surrogate, "high", math.inf)
    inside = unclipped(ratio, adv, 1 - low, 1 + high)
    k3 = getattr(row.penalty, "beta", 0.0) * ((ref - new).exp() - 1)
    forms = {
        "sft": lambda: per_token,
        "reinforce": lambda: adv / B,
        "rloo": lambda: adv / B,
        "rloo_clip": lambda: adv / B * whole * unclipped(whole, adv, 1 - low, 1 + high),
        "ppo": lambda: per_token * adv * ratio * inside,
        "grpo": lambda: per_sequence * (adv * ratio * inside + k3),
        "dapo": lambda: per_token * adv * ratio * inside,
        "dr_grpo": lambda: adv / (B * row.average.length) * ratio * inside,
        "reinforce_pp": lambda: per_token * adv * ratio * inside,
        "gspo": lambda: per_sequence * adv * mean * unclipped(mean, adv, 1 - low, 1 + high),
        "cispo": lambda: per_token * adv * ratio.clamp(max=1.28),
        "trpo": lambda: per_token * adv * ratio,
        "grpo_tis": lambda: per_token * (adv * ratio * inside) * (old - signals.sampler).exp().clamp(max=row.corrections[0].cap),
    }
    found = pushed(row, new, experience, batch.outputs.values.detach())["push"]
    assert torch.allclose(found, forms[name](), rtol=0, atol=1e-12), (found, forms[name]())


@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
def test_a_kl_in_the_loss_pushes_by_its_own_form(kind):
    """k1: −β w; k2: −β w (log π − log ref); k3: +β w (ref / π − 1)."""
    beta, plain = 0.3, replace(ALGORITHMS["grpo"], penalty=NoPenalty())
    row = replace(plain, penalty={"k1": K1, "k2": K2, "k3": K3}[kind](beta))
    batch, experience = known(row)
    new, ref, values = batch.outputs.logprobs.detach(), experience.signals.reference, batch.outputs.values.detach()
    added = pushed(row, new, experience, values)["push"] - pushed(plain, new, experience, values)["push"]
    forms = {"k1": torch.full((10,), -beta).double(), "k2": -beta * (new - ref), "k3": beta * ((ref - new).exp() - 1)}
    assert torch.allclose(added, experience.weights * forms[kind], rtol=0, atol=1e-12) and added.abs().max() > 1e-3


def test_a_clipped_token_is_pushed_by_exactly_nothing_in_that_pass():
    row = ALGORITHMS["ppo"]
    batch, experience = known(row)
    found = pushed(row, batch.outputs.logprobs.detach(), experience, batch.outputs.values.detach())["push"]
    low, high = row.clip_sides(batch.outputs, experience)
    assert int((low | high).sum()) >= 2 and (found[low | high] == 0).all() and (found[~(low | high)] != 0).all()


# --- terms of the whole distribution --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("against", ["entropy", "reference", "old"])
def test_push_dist_is_the_pull_on_the_logit_of_the_action_beside_its_log_probability(against):
    """loss(l, H, KL) of logits: the slope in the action's logit, less what passes through its log-probability, is −push_dist."""
    generator = torch.Generator().manual_seed(3)
    logits, other = (torch.randn(6, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    logits.requires_grad_()
    actions = torch.tensor([0, 1, 2, 3, 4, 0])
    distance = {"reference": lambda: kl(logits, other), "old": lambda: kl(other, logits), "entropy": lambda: torch.zeros(6).double()}[
        against
    ]()
    said = Outputs.of(logprobs(logits, actions), entropy=entropy(logits), kl=distance, sequences=2)
    chosen = logprobs(other, actions)

    class Row:
        against = "old"

    Row.against = "none" if against == "entropy" else against
    channels = Channels(Layout.of([2, 4]), torch.float64, watch=True)
    channels.hold(said)
    weights = torch.linspace(0.5, 2, 6, dtype=torch.float64)
    ((weights * said.logprobs).sum() + ((weights * said.entropy) if against == "entropy" else (weights * said.kl)).sum()).backward()
    share = type("Share", (), {"signals": Signals.of(chosen, reference=chosen)})
    found = pushes(Row, said, share)
    slope = logits.grad[torch.arange(6), actions]
    through = -found["push"] * (1 - said.logprobs.detach().exp())
    assert torch.allclose(slope, through - found["push_dist"], atol=1e-12) and found["push_dist"].abs().min() > 1e-6


# --- from the update ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["reinforce", "rloo", "dapo", "grpo", "gspo", "cispo", "dr_grpo", "reinforce_pp"])
def test_scores_weighted_by_push_add_up_to_the_logged_gradient_norm(make, batch, rewards, name):
    learner, row = make(Passes(1, 1, 12)), ALGORITHMS[name]
    experience = row.prepare(rewards, learner.evaluate(batch, row.needs), batch.layout)
    before = copy.deepcopy(learner.policy)
    report = learner.update(batch, experience, row, watch=True)
    total = torch.autograd.grad(before(batch).logprobs, list(before.parameters()), report.channels["push"].nan_to_num())
    norm = math.sqrt(sum(float(g.square().sum()) for g in total))
    assert norm == pytest.approx(report.metrics["grad_norm"], rel=1e-9) and norm > 1e-4


@pytest.mark.parametrize("passes, minibatches", [(3, 1), (1, 3), (2, 2)])
def test_push_adds_up_over_the_optimizer_steps(make, batch, rewards, monkeypatch, passes, minibatches):
    """The sum of what each step asked, and ratio and clip state of the last visit."""
    learner, row = make(Passes(passes, minibatches, 12)), ALGORITHMS["dapo"]
    experience = row.prepare(rewards, learner.evaluate(batch, row.needs | {"old"}), batch.layout)
    each, put = [], Channels.put

    def spy(self, sequences, said, share, objective):
        each.append((self.layout.actions_of(sequences), -said.logprobs.grad.clone()))
        put(self, sequences, said, share, objective)

    monkeypatch.setattr(Channels, "put", spy)
    report = learner.update(batch, experience, row, watch=True)
    total = torch.zeros(batch.layout.actions)
    for actions, pushed in each:
        total[actions] += pushed
    found = report.channels["push"]
    assert torch.allclose(found.nan_to_num(), total, atol=1e-15) and len(each) >= passes * minibatches
    assert report.metrics["policy/clipped"] == int((report.channels["clip"].abs() == 1).sum())


def test_clip_marks_count_what_the_metrics_count(make, batch, rewards):
    learner, row = make(Passes(2, 1, 12)), ALGORITHMS["dapo"]
    row = replace(row, surrogate=replace(row.surrogate, low=1e-3, high=1e-3))
    experience = row.prepare(rewards, learner.evaluate(batch, row.needs | {"old"}), batch.layout)
    report = learner.update(batch, experience, row, watch=True)
    counted = int((experience.weights != 0).sum())
    assert report.metrics["policy/clipped"] > 0
    trained = int(report.channels["clip"].isnan().logical_not().sum())
    assert report.metrics["policy/clipfrac_avg"] * 2 * min(trained, counted) == pytest.approx(report.metrics["policy/clipped"])


@pytest.mark.parametrize("name", ["ppo", "a2c"])
def test_watching_changes_no_bit_of_the_update(make, batch, rewards, name):
    weights = []
    for watch in (False, True):
        learner, row = make(Passes(2, 2, 12), critic=True), ALGORITHMS[name]
        experience = row.prepare(rewards, learner.evaluate(batch, row.needs | {"old"}), batch.layout)
        learner.update(batch, experience, row, watch=watch)
        weights.append([p.detach().clone() for p in learner.optimizer.parameters])
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))
