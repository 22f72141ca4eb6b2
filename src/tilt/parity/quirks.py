"""What other libraries compute differently from the rows on the action axis: each quirk has a name and a switch, and is off by default."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from types import MappingProxyType

from tilt.errors import UsageError


@dataclass(frozen=True, repr=False)
class Quirks:
    """Switches from the corrected mode (all off) to what a padded implementation does; `MEANING` says what each does."""

    stop_is_pad: bool = False
    score_after_last: bool = False
    kl_after_last: bool = False
    critic_after_last: bool = False
    micro_batch_means: bool = False
    clamped_std: bool = False
    pads_in_entropy: bool = False
    window_means: bool = False
    window_clipfrac: bool = False
    sequence_statistics: bool = False
    variance_of_means: bool = False
    normalised_reward: bool = False

    def __post_init__(self) -> None:
        for name in ("kl_after_last", "critic_after_last"):
            if getattr(self, name) and not self.score_after_last:
                raise UsageError(f"Quirks: {name} speaks of the slot that score_after_last keeps: switch that on too, or this off")

    def __repr__(self) -> str:
        return f"Quirks({', '.join(f'{name}=True' for name in self.on)})"

    @property
    def on(self) -> tuple[str, ...]:
        """Names of the quirks that are switched on."""
        return tuple(f.name for f in fields(self) if getattr(self, f.name))


CORRECTED = Quirks()

MEANING: Mapping[str, tuple[str, str]] = MappingProxyType({
    # name: (what the padded code does, what the corrected mode does)
    "stop_is_pad": ("pad and stop token are one id, so the stop token counts as padding: it is no action and is never trained",
                    "the stop token is an action"),
    "score_after_last": ("the score is paid one slot after the last action, whose value V(state after it) is kept; on the last action where the window is full",
                         "the score is paid on the last action, after which the value is 0"),
    "kl_after_last": ("the KL term of the slot after the last action is kept in its reward", "only actions have a KL term"),
    "critic_after_last": ("the critic is trained on the slot after the last action too", "the critic is trained on the states before actions"),
    "micro_batch_means": ("losses and statistics are means over a micro-batch, averaged with equal weight, whatever number of actions each has; in a run the statistics alone",
                          "every action of the batch weighs the same, however it is split"),
    "clamped_std": ("group advantages are (R - mean) / max(std, 1e-8): in float32, equal rewards can give advantages near 1",
                    "a group whose rewards are all equal has advantage exactly 0, decided by max = min"),
    "pads_in_entropy": ("objective/entropy sums -old over the window, in which every pad holds the mark 1.0: each pad adds -1",
                        "objective/entropy sums -old over actions"),
    "window_means": ("policy/approxkl_avg, val/ratio and policy/entropy_avg are means over all positions of the window; pads have log-ratio 0",
                     "means over actions"),
    "window_clipfrac": ("policy/clipfrac_avg is a mean over all positions of the window", "the share of actions that are clipped"),
    "sequence_statistics": ("policy/approxkl_avg is .5 mean (sum_t D_t)^2 over sequences", ".5 mean D_t^2 over actions"),
    "variance_of_means": ("val/ratio_var is the unbiased variance of the micro-batches' mean ratios", "the variance of the ratio over actions"),
    "normalised_reward": ("objective/rlhf_reward is the mean of the normalised advantages, about 0, and objective/non_score_reward is not there",
                          "objective/rlhf_reward is the mean score plus the mean KL term in the reward"),
})  # fmt: skip
