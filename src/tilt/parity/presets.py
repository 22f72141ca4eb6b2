"""The presets: a row, the quirks of the library it is named after, and that library's defaults."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from tilt.objectives import (
    GAE,
    K3,
    Clip,
    GroupRelative,
    NoPenalty,
    Objective,
    ProductRatio,
    SequenceAverage,
    TokenAverage,
    TokenRatio,
    ValueLoss,
)
from tilt.parity.quirks import Quirks


@dataclass(frozen=True)
class Preset:
    """A row of the table as one library computes it: its quirks on top of the row, and its defaults as settings of `tilt rl`."""

    row: Objective
    quirks: Quirks
    settings: Mapping[str, Any]
    source: str


TRL = Quirks(
    score_after_last=True, critic_after_last=True, micro_batch_means=True, pads_in_entropy=True, window_means=True, variance_of_means=True
)  # fmt: skip

# fmt: off
PRESETS: Mapping[str, Preset] = MappingProxyType({
    "ppo_trl_0_12": Preset(
        Objective(GAE(1.0, 0.95, 0.05), TokenRatio(), Clip(0.2, 0.2), TokenAverage(), NoPenalty(), ValueLoss(0.1, 0.2)),
        TRL, {"passes": 4, "samples": 1}, "TRL 0.12.1, PPOTrainer"),
    "rloo_trl_0_12": Preset(
        Objective(GroupRelative("leave_one_out", "none", kl=0.05), ProductRatio(), Clip(0.2, 0.2), SequenceAverage()),
        Quirks(micro_batch_means=True, pads_in_entropy=True, window_means=True, sequence_statistics=True, variance_of_means=True),
        {"passes": 4, "samples": 2}, "TRL 0.12.1, RLOOTrainer"),
    "grpo_trl_fork": Preset(
        Objective(GroupRelative("mean", "group_std"), TokenRatio(), Clip(0.2, 0.2), TokenAverage(), K3(0.05)),
        Quirks(micro_batch_means=True, clamped_std=True, pads_in_entropy=True, window_means=True, window_clipfrac=True, variance_of_means=True,
               normalised_reward=True),
        {"passes": 4, "samples": 4}, "saisurbehera/trl, branch grpo at 15614a0"),
    "ppo_deepspeed_chat": Preset(
        Objective(GAE(1.0, 0.95, 0.1, 5.0, False), TokenRatio(), Clip(0.2, 0.2), TokenAverage(), NoPenalty(), ValueLoss(1.0, 0.2)),
        Quirks(stop_is_pad=True, score_after_last=True, kl_after_last=True, micro_batch_means=True),
        {"passes": 1, "samples": 1}, "DeepSpeedExamples 83757d9, step 3"),
})
# fmt: on
