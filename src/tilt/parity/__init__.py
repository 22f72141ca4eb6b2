"""What TRL 0.12.1, its GRPO fork and DeepSpeed-Chat compute exactly, quirk by quirk, beside what is right. Imports torch only."""

from tilt.parity.metrics import MicroBatch, rollout_metrics, update_metrics
from tilt.parity.padded import WindowCredit, WindowLoss, window_credit, window_loss
from tilt.parity.presets import PRESETS, Preset
from tilt.parity.quirks import CORRECTED, MEANING, Quirks
from tilt.parity.window import Window, last_action, missing_stop, narrow, truncate, widen, window_of

__all__ = [
    "CORRECTED", "MEANING", "PRESETS", "MicroBatch", "Preset", "Quirks", "Window", "WindowCredit", "WindowLoss", "last_action", "missing_stop",
    "narrow", "rollout_metrics", "truncate", "update_metrics", "widen", "window_credit", "window_loss", "window_of",
]  # fmt: skip
