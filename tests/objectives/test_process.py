"""Process reward models: the loss on steps, and the first step that is wrong."""

from __future__ import annotations

import math

import pytest
import torch

from tilt.objectives.process import first_wrong, step_loss
from tilt.segments import Layout


def test_the_loss_is_binary_cross_entropy() -> None:
    scores = torch.tensor([0.3, -1.2, 2.5, 0.0, -0.7], dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([1.0, 0.0, 0.0, 0.25, 1.0], dtype=torch.float64)
    weights = torch.tensor([0.2, 0.1, 0.3, 0.15, 0.25], dtype=torch.float64)
    loss = step_loss(scores, labels, weights)
    loss.backward()
    value, slopes = 0.0, []
    for s, y, w in zip(scores.tolist(), labels.tolist(), weights.tolist(), strict=True):
        p = 1 / (1 + math.exp(-s))
        value -= w * (y * math.log(p) + (1 - y) * math.log(1 - p))
        slopes.append(w * (p - y))
    assert loss.item() == pytest.approx(value, abs=1e-12)
    assert scores.grad is not None and scores.grad.tolist() == pytest.approx(slopes, abs=1e-12)


def test_far_scores_stay_finite() -> None:
    loss = step_loss(torch.tensor([200.0, -200.0]), torch.tensor([0.0, 1.0]), torch.tensor([0.5, 0.5]))
    assert loss.item() == 200.0


def test_the_first_wrong_step() -> None:
    layout = Layout.of([3, 2, 1, 1, 4])
    right = torch.tensor([1, 0, 1, 1, 1, 0, 1, 1, 1, 1, 0], dtype=torch.bool)
    assert first_wrong(right, layout).tolist() == [1, 2, 0, 1, 3]
