"""Small batches to follow by hand: fixtures F (one prompt, four answers) and P (two pairs) of the specification, in float64."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tilt.objectives import Layout, Outputs, Rewards, Signals


@dataclass(frozen=True)
class Batch:
    """One step's batch as an objective reads it, with the texts of its answers where there are any; `stored` tells what its numbers are not."""

    rewards: Rewards
    signals: Signals
    layout: Layout
    outputs: Outputs
    texts: Sequence[str] = ()
    stored: Sequence[str] = field(default_factory=tuple)


def _flat(rows: Sequence[Sequence[float]]) -> Tensor:
    return torch.tensor([x for row in rows for x in row], dtype=torch.float64)


def fixture_f() -> Batch:
    """R = 1, 0, .5, -1; lengths 3, 2, 4, 1."""
    policy = _flat([[-0.50, -1.20, -0.30], [-2.00, -0.10], [-0.70, -0.70, -1.50, -0.20], [-1.00]])
    old = _flat([[-0.80, -1.00, -0.35], [-1.60, -0.40], [-0.70, -0.90, -1.00, -0.25], [-1.30]])
    reference = _flat([[-0.60, -1.10, -0.50], [-1.80, -0.30], [-0.90, -0.60, -1.20, -0.40], [-1.10]])
    sampler = _flat([[-0.75, -1.10, -0.35], [-1.60, -0.55], [-0.70, -0.90, -1.20, -0.25], [-1.00]])
    old_values = _flat([[0.30, 0.10, 0.60], [0.20, 0.00], [0.50, 0.40, 0.10, 0.20], [-0.10]])
    new_values = _flat([[0.50, 0.00, 0.70], [0.10, 0.30], [0.20, 0.40, 0.40, 0.90], [-0.60]])
    return Batch(
        Rewards.of(torch.tensor([1.0, 0.0, 0.5, -1.0], dtype=torch.float64), actions=10),
        Signals.of(old, sampler=sampler, reference=reference, values=old_values, final=torch.zeros(4, dtype=torch.float64)),
        Layout.of([3, 2, 4, 1], [0, 0, 0, 0]),
        Outputs.of(policy.requires_grad_(), values=new_values.requires_grad_(), sequences=4),
    )


@dataclass(frozen=True)
class PairBatch:
    """Two pairs: summed log-probabilities of the chosen and the rejected answer under policy and reference, and their lengths, [N] each."""

    chosen: Tensor
    rejected: Tensor
    reference_chosen: Tensor
    reference_rejected: Tensor
    chosen_lengths: Tensor
    rejected_lengths: Tensor


def fixture_p() -> PairBatch:
    """(W, L, ref_w, ref_l, n_w, n_l): (-4, -6.5, -4.4, -6, 4, 5) and (-3, -2.5, -2.8, -2.9, 3, 2)."""
    columns = zip((-4.0, -6.5, -4.4, -6.0, 4.0, 5.0), (-3.0, -2.5, -2.8, -2.9, 3.0, 2.0), strict=True)
    return PairBatch(*(torch.tensor(column, dtype=torch.float64) for column in columns))


EXAMPLE_TOKENS = ("今天", "天气", "很好", "适合", "出去", "玩")
EXAMPLE_DISTRIBUTIONS = (
    (0.4, 0.3, 0.2, 0.1), (0.1, 0.5, 0.3, 0.1), (0.2, 0.3, 0.4, 0.1), (0.3, 0.2, 0.4, 0.1), (0.1, 0.2, 0.6, 0.1), (0.2, 0.3, 0.4, 0.1),
)  # fmt: skip
EXAMPLE_CHOICES = (0, 1, 1, 2, 2, 2)
"""The reference's distributions over four tokens at each step of 今天天气很好适合出去玩, and the token that was there (003:144-160)."""
