"""The 14 metrics of RLHF with padded windows: as TRL 0.12.1 and its GRPO fork compute them, or without quirks over actions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tilt.objectives import Objective, ProductRatio
from tilt.parity.padded import WindowCredit, WindowLoss, change, critic_mask, policy_terms, value_terms, window_loss
from tilt.parity.quirks import CORRECTED, Quirks
from tilt.parity.window import PerSlot, Window
from tilt.shapes import PerSequence, Scalar

ROLLOUT_METRICS = (
    "objective/kl",
    "objective/entropy",
    "objective/non_score_reward",
    "objective/rlhf_reward",
    "objective/scores",
    "val/num_eos_tokens",
)
UPDATE_METRICS = (
    "policy/approxkl_avg", "policy/clipfrac_avg", "loss/policy_avg", "loss/value_avg", "val/clipfrac_avg", "policy/entropy_avg", "val/ratio",
    "val/ratio_var",
)  # fmt: skip


def rollout_metrics(window: Window, credit: WindowCredit, kl: float, stops: PerSequence, quirks: Quirks = CORRECTED) -> dict[str, Scalar]:
    """Metrics of a batch before its update; `stops` is the number of stop tokens of each answer (TRL: of the untruncated text)."""
    drift = torch.where(window.live, window.old - window.reference, 0).sum(1)
    surprise = torch.where(window.live, -window.old, -1.0 if quirks.pads_in_entropy else 0.0).sum(1)
    found = {
        "objective/kl": drift.mean(),
        "objective/entropy": surprise.mean(),
        "objective/scores": window.score.mean(),
        "val/num_eos_tokens": stops.sum(),
    }
    if quirks.normalised_reward:
        return found | {"objective/rlhf_reward": credit.advantages[:, 0].mean()}
    paid = (-kl * drift).mean()
    return found | {"objective/non_score_reward": paid, "objective/rlhf_reward": paid + window.score.mean()}


@dataclass(frozen=True)
class MicroBatch:
    """One micro-batch of an update: its window and credit, and what the models said: log-probabilities, values and exact entropies in every slot."""

    window: Window
    credit: WindowCredit
    new: PerSlot
    new_values: PerSlot
    entropy: PerSlot


@torch.no_grad()
def update_metrics(row: Objective, batches: Sequence[MicroBatch], quirks: Quirks = CORRECTED) -> dict[str, Scalar]:
    """Metrics of an update over all its epochs, mini-batches and micro-batches; with `micro_batch_means` every micro-batch counts the same."""
    each = [_counted(row, batch, quirks) for batch in batches]
    found = {}
    for name in each[0]:
        sums, counts = (torch.stack([pairs[name][i].to(batches[0].new) for pairs in each]) for i in (0, 1))
        found[name] = (sums / counts).mean() if quirks.micro_batch_means else sums.sum() / counts.sum()
    ratios = torch.cat([ratio_of_tokens(batch)[batch.window.live] for batch in batches])
    if quirks.variance_of_means:
        ratios = torch.stack([total / count for total, count in (_ratio(batch, quirks) for batch in batches)])
    found["val/ratio_var"] = ratios.var() if len(ratios) > 1 else torch.zeros_like(ratios[0])
    return found


def ratio_of_tokens(batch: MicroBatch) -> PerSlot:
    """exp(D_t): 1 in the pads."""
    return change(batch.window, batch.new).exp()


def _ratio(batch: MicroBatch, quirks: Quirks) -> tuple[Tensor, Tensor]:
    ratio, live = ratio_of_tokens(batch), batch.window.live
    return (ratio.sum(), _size(ratio)) if quirks.window_means else (torch.where(live, ratio, 0).sum(), live.sum())


def _size(x: Tensor) -> Tensor:
    return x.new_tensor(x.numel())


def _counted(row: Objective, batch: MicroBatch, quirks: Quirks) -> dict[str, tuple[Tensor, Tensor]]:
    """(sum, count) of each metric on a micro-batch."""
    window, live, moved = batch.window, batch.window.live, change(batch.window, batch.new)
    everywhere, actions, sequences = _size(moved), live.sum(), moved.new_tensor(len(moved))
    loss: WindowLoss = window_loss(row, window, batch.credit, batch.new, batch.new_values, quirks)
    plain, clipped = policy_terms(row, window, batch.credit, batch.new)
    cut = (clipped > plain) & live
    per_sequence = isinstance(row.ratio, ProductRatio)
    if quirks.sequence_statistics:
        approxkl = (0.5 * moved.sum(1).square().sum(), sequences)
    else:
        approxkl = (0.5 * moved.square().sum(), everywhere if quirks.window_means else actions)
    weight = sequences if per_sequence else actions
    found = {
        "policy/approxkl_avg": approxkl,
        "policy/clipfrac_avg": (cut[:, 0].sum(), sequences)
        if per_sequence
        else (cut.sum(), everywhere if quirks.window_clipfrac else actions),
        "loss/policy_avg": (loss.policy * weight, weight),
        "loss/value_avg": (torch.zeros_like(loss.value), sequences),
        "val/clipfrac_avg": (torch.zeros_like(loss.value), sequences),
        "policy/entropy_avg": (batch.entropy.sum(), everywhere)
        if quirks.window_means
        else (torch.where(live, batch.entropy, 0).sum(), actions),
        "val/ratio": _ratio(batch, quirks),
    }
    if row.value.needs:
        mask = critic_mask(window, quirks)
        square, near = value_terms(row, window, batch.credit, batch.new_values, mask)
        found["loss/value_avg"] = (loss.value * mask.sum(), mask.sum())
        found["val/clipfrac_avg"] = (((near > square) & mask).sum(), mask.sum())
    return found
