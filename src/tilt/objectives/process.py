"""Process reward models: the loss on a label for every step, and where an answer first goes wrong (2305.20050)."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import logsigmoid

from tilt.segments import Layout
from tilt.shapes import Scalar

PerStep = Float[Tensor, "J"]
StepMask = Bool[Tensor, "J"]
StepNumber = Int[Tensor, "S"]


def step_loss(scores: PerStep, labels: PerStep, weights: PerStep) -> Scalar:
    """sum_j w_j [-y_j log sigmoid(s_j) - (1 - y_j) log sigmoid(-s_j)]: binary cross-entropy, y_j the chance that step j is right."""
    return (weights * -(labels * logsigmoid(scores) + (1 - labels) * logsigmoid(-scores))).sum()


def first_wrong(right: StepMask, layout: Layout) -> StepNumber:
    """Number of the first step of each sequence that is not right, or its number of steps where all are; `layout` is that of steps [J].

    Steps 1 0 1 | 1 1 → 1 2.
    """
    places = torch.where(right, layout.lengths[layout.sequence], layout.positions)
    return layout.lengths.scatter_reduce(0, layout.sequence, places, "amin")
