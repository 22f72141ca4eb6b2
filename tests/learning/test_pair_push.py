"""What a preference step asks of each action, or of each score: closed forms by hand, finite differences, and the gradient of the update itself."""

from __future__ import annotations

import copy
import math
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch

from tilt.data.rollouts import Prompt, Rollout
from tilt.learning.judged import Judged, with_mismatched
from tilt.learning.pairs import EndScores, Likelihoods, SpanScores, _mismatched, asked, held_against, read_anchors, update_pairs
from tilt.models.policy import Policy, RewardModel
from tilt.objectives import PREFERENCES
from tilt.optim.optimizers import AdamW, Optimizer
from tilt.segments import spread

STEP = 1e-6


@pytest.fixture
def examples():
    generator = torch.Generator().manual_seed(5)

    def draw(n: int) -> tuple[int, ...]:
        return tuple(torch.randint(0, 20, (n,), generator=generator).tolist())

    prompts = [Prompt(draw(2 + i), i) for i in range(3)]
    pairs = [
        Judged(tuple(Rollout.demonstration(p, draw(n)) for n in sizes)) for p, sizes in zip(prompts, ((3, 2), (1, 4), (5, 5)), strict=True)
    ]
    return with_mismatched(pairs)


@pytest.fixture
def anchor(lm):
    other = copy.deepcopy(lm)
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(0.9)
    return Policy(other).requires_grad_(False)


def reader_of(row, lm):
    if row.margin.reads == "likelihood":
        return Likelihoods(Policy(lm), row.needs)
    model = RewardModel.from_policy(Policy(lm), padding=19, seed=3)
    return SpanScores(model.double(), 19) if "span" in row.needs else EndScores(model.double())


def anchors_of(row, anchor, examples):
    return read_anchors(Likelihoods(anchor, row.needs & {"heads"}), examples, 1000) if "reference" in row.needs else None


ROWS = list(PREFERENCES)


@pytest.mark.parametrize("name", ROWS)
def test_push_is_the_slope_of_the_loss_in_everything_the_model_says(name, lm, anchor, examples, frozen):
    row = PREFERENCES[name]
    reader, anchors = reader_of(row, lm), anchors_of(row, anchor, examples)
    (one,) = asked(reader, row, examples, anchors, micro_tokens=1000)
    parts = asked(reader, row, examples, anchors, micro_tokens=12)
    if name != "rm_deepspeed_chat":  # of which something is read at every token, and prompts lie elsewhere
        assert torch.allclose(torch.cat([part.push for part in parts]), one.push, atol=1e-9) and len(parts) > 1

    others = _mismatched(reader, row, examples, anchors, 1000, nullcontext)

    def loss(said) -> float:
        (view,) = reader.views(one.laid, said)
        return float(row.loss(replace(held_against(view, anchors), mismatched=others)))

    with frozen() as again:
        again()
        loss(one.said)  # what is held still, is held where the slope is asked for
        for place in range(0, len(one.said), max(1, len(one.said) // 12)):
            ends = []
            for sign in (1, -1):
                moved = one.said.clone()
                moved[place] += sign * STEP
                again()
                ends.append(loss(moved))
            assert float(one.push[place]) == pytest.approx(-(ends[0] - ends[1]) / (2 * STEP), rel=1e-6, abs=2e-9), place
    assert one.push.abs().max() > 1e-4


@pytest.mark.parametrize("name", ["dpo", "cdpo", "ipo", "hinge", "simpo"])
def test_push_of_a_pair_equals_the_closed_form(name, lm, anchor, examples):
    row = PREFERENCES[name]
    anchors = anchors_of(row, anchor, examples)
    (one,) = asked(Likelihoods(Policy(lm), row.needs), row, examples, anchors, micro_tokens=1000)
    sums = torch.stack([part.sum() for part in one.said.split(one.laid.pack.layout.lengths.tolist())])
    lengths = one.laid.pack.layout.lengths.double()
    if anchors is not None:
        ref = torch.stack([anchors.pairs.chosen.scores, anchors.pairs.rejected.scores], 1).flatten()
        sums = sums - ref
    gap = sums[0::2] - sums[1::2]
    beta = getattr(row.link, "beta", None) or getattr(row.margin, "beta", None)
    count, each = 3, torch.ones(6).double()
    if name == "dpo":
        pull = beta * torch.sigmoid(-beta * gap) / count
    elif name == "cdpo":
        eps = row.link.smoothing
        pull = beta * ((1 - eps) * torch.sigmoid(-beta * gap) - eps * torch.sigmoid(beta * gap)) / count
    elif name == "ipo":
        pull = -2 * (gap - 1 / (2 * beta)) / count
    elif name == "hinge":
        pull = beta * (beta * gap < 1) / count
    else:
        means = sums / lengths
        gap = means[0::2] - means[1::2]
        pull = beta * torch.sigmoid(-(beta * gap - row.margin.offset)) / count
        each = 1 / lengths
    truth = torch.stack([pull, -pull], 1).flatten() * each
    assert torch.allclose(one.push, spread(truth, one.laid.pack.layout), atol=1e-12), (one.push, truth)


@pytest.mark.parametrize("name", ["dpo", "ipo", "kto", "orpo", "reward_model", "aot"])
def test_scores_weighted_by_push_add_up_to_the_logged_gradient_norm(name, lm, anchor, examples):
    row = PREFERENCES[name]
    reader, anchors = reader_of(row, copy.deepcopy(lm)), anchors_of(row, anchor, examples)
    model = reader.policy if isinstance(reader, Likelihoods) else reader.model
    twin = reader_of(row, copy.deepcopy(lm))
    before = copy.deepcopy(model)
    found = asked(reader, row, examples, anchors, micro_tokens=1000)
    assert all(p.grad is None for p in model.parameters())
    report, _ = update_pairs(reader, Optimizer(model, AdamW(1e-3, clip_norm=0.0), 3), row, examples, anchors, micro_tokens=1000)
    twin = replace(twin, **({"policy": before} if isinstance(twin, Likelihoods) else {"model": before}))
    said = twin.look(found[0].laid)
    total = torch.autograd.grad(said, [p for p in before.parameters() if p.requires_grad], found[0].push, allow_unused=True)
    norm = math.sqrt(sum(float(g.square().sum()) for g in total if g is not None))
    assert norm == pytest.approx(report["grad_norm"], rel=1e-8) and norm > 1e-5
