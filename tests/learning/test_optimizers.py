"""AdamW with its schedule, its decay groups and its clipping."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from tilt.optim.optimizers import AdamW, Optimizer, clip


@pytest.mark.parametrize(
    ("schedule", "final", "expected"),
    [
        ("constant", 0.0, [0.5, 1.0, 1, 1, 1, 1]),
        ("linear", 0.0, [0.5, 1.0, 1, 0.75, 0.5, 0.25]),
        ("linear", 0.2, [0.5, 1.0, 1, 0.8, 0.6, 0.4]),
    ],
)
def test_the_schedule_by_hand(schedule, final, expected):
    rule = AdamW(1e-2, warmup=2, schedule=schedule, final=final)
    assert [rule.factor(step, 6) for step in range(6)] == pytest.approx(expected)


def test_cosine_starts_at_one_and_ends_at_the_final_share():
    rule = AdamW(1e-2, schedule="cosine", final=0.1)
    assert rule.factor(0, 10) == 1.0 and rule.factor(10, 10) == pytest.approx(0.1) and rule.factor(99, 10) == pytest.approx(0.1)
    assert rule.factor(5, 10) == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi / 2)))


def test_only_matrices_decay_and_frozen_weights_have_no_part():
    module = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))
    module[1].bias.requires_grad_(False)
    optimizer = Optimizer(module, AdamW(0.1, weight_decay=0.5, clip_norm=0.0), 10)
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    for p in optimizer.parameters:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert torch.allclose(module[0].weight, before["0.weight"] * (1 - 0.1 * 0.5))
    assert all(torch.equal(p, before[name]) for name, p in module.named_parameters() if name != "0.weight")
    assert optimizer.steps == 1 and all(p.grad is None for p in module.parameters())


def test_the_first_step_is_the_learning_rate_against_the_sign_of_the_gradient():
    module = nn.Linear(2, 1, bias=False)
    optimizer = Optimizer(module, AdamW(0.01, warmup=2, clip_norm=1.0), 10)
    before = module.weight.detach().clone()
    module.weight.grad = torch.tensor([[30.0, -40.0]])
    assert float(optimizer.step()) == pytest.approx(50.0)  # the norm before clipping
    assert torch.allclose(module.weight - before, torch.tensor([[-0.005, 0.005]]), atol=1e-6)  # half the rate: warm-up


def test_clipping_scales_to_the_limit_and_zero_leaves_alone():
    p = nn.Parameter(torch.zeros(2))
    for limit, expected in ((1.0, [0.6, 0.8]), (10.0, [3.0, 4.0]), (0.0, [3.0, 4.0])):
        p.grad = torch.tensor([3.0, 4.0])
        assert float(clip([p], limit)) == pytest.approx(5.0)
        assert p.grad.tolist() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_changes_nothing(bad):
    module = nn.Linear(2, 1)
    optimizer = Optimizer(module, AdamW(0.1), 10)
    before = module.weight.detach().clone()
    module.weight.grad, module.bias.grad = torch.full((1, 2), bad), torch.ones(1)
    assert not torch.isfinite(optimizer.step())
    assert torch.equal(module.weight, before) and optimizer.steps == 0 and module.weight.grad is None
