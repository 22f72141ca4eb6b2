"""What TRL 0.12.1, its GRPO fork and DeepSpeed-Chat compute exactly, quirk by quirk, beside what is right. Imports torch only."""

from tilt.parity.described import described
from tilt.parity.metrics import MicroBatch, rollout_metrics, update_metrics
from tilt.parity.padded import WindowCredit, WindowLoss, window_credit, window_loss
from tilt.parity.pairs import DEEPSPEED_PAIRS, PairQuirks, PairSpan, dpo_loss, end_scores, label_mask, span_loss, span_of, summed_logprobs
from tilt.parity.pieces import PolicyMask, WindowedAverage, WindowedCredit, WindowedMetrics, dressed, undressed
from tilt.parity.presets import PAIR_PRESETS, PRESETS, PairPreset, Preset
from tilt.parity.quirks import CORRECTED, MEANING, Quirks
from tilt.parity.window import Window, last_action, missing_stop, narrow, truncate, widen, window_of

__all__ = [
    "CORRECTED", "DEEPSPEED_PAIRS", "MEANING", "PAIR_PRESETS", "PRESETS", "MicroBatch", "PairPreset", "PairQuirks", "PairSpan", "PolicyMask", "Preset", "Quirks", "Window", "WindowCredit",
    "WindowLoss", "WindowedAverage", "WindowedCredit", "WindowedMetrics", "described", "dpo_loss", "dressed", "end_scores", "label_mask", "last_action", "missing_stop", "narrow", "rollout_metrics", "span_loss", "span_of",
    "summed_logprobs", "truncate", "undressed", "update_metrics", "widen", "window_credit", "window_loss", "window_of",
]  # fmt: skip
