"""What an update says of each action: log-probabilities, ratio, what the clip did, and how hard the loss pushed."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from tilt.objectives import Experience, Layout, Objective, Outputs, TokenRatio


class Channels:
    """Per-action values of the micro-batches that held each action: `first` of its first visit, the others of its last, kept where they are wanted."""

    def __init__(self, layout: Layout, dtype: torch.dtype, watch: bool) -> None:
        self.layout, self.watch = layout, watch
        names = ("first", "new", "entropy", "ratio", "clip", "push") if watch else ("first",)
        self.values = {name: torch.full((layout.actions,), float("nan"), dtype=dtype) for name in names}

    @torch.no_grad()
    def put(self, sequences: Tensor, said: Outputs, share: Experience, objective: Objective, scale: float) -> None:
        actions, new = self.layout.actions_of(sequences), said.logprobs.detach()
        seen = self.values["first"][actions]
        self.values["first"][actions] = torch.where(seen.isnan(), new.to(seen), seen)
        if not self.watch:
            return
        kind = objective.ratio if "old" in objective.ratio.needs else TokenRatio()
        ratio = kind(new, share.signals.old, share.layout, share.advantages).detach()
        grad = said.logprobs.grad
        found = {
            "new": new, "entropy": said.entropy.detach(), "ratio": ratio, "clip": clip_marks(objective, said, share),
            "push": torch.zeros_like(new) if grad is None else -grad / scale,
        }  # fmt: skip
        for name, value in found.items():
            self.values[name][actions] = value.to(self.values[name])


def clip_marks(objective: Objective, said: Outputs, share: Experience) -> Tensor:
    """+1 where a ratio is cut for being too high, -1 too low, 2 where it would be for another sign of the advantage, else 0."""
    low, high = objective.clip_sides(said, share)
    outside = torch.zeros_like(low)
    for sign in (1.0, -1.0):
        outside = outside | torch.stack(objective.clip_sides(said, replace(share, advantages=torch.full_like(share.advantages, sign)))).any(
            0
        )
    return high.to(said.logprobs) - low.to(said.logprobs) + 2 * (outside & ~low & ~high).to(said.logprobs)
