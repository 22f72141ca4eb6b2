"""What an update says of each action: log-probabilities, ratio, what the clip did, and how hard the loss pushed."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from tilt.objectives import Experience, Layout, Objective, Outputs, TokenRatio

SHOWN = ("new", "entropy", "ratio", "clip", "push", "push_dist", "push_value")
SUMS = ("push", "push_dist", "push_value")
READ = ("logprobs", "entropy", "kl", "values")


class Channels:
    """Per-action values of the micro-batches that held each action, NaN where an action was in none; all but `first` and `clip` only where they are wanted.

    `first` is of the first visit; `new`, `entropy`, `ratio` and `clip` of the last; a push is the sum over the optimizer steps, each before its
    gradient's norm is clipped.
    """

    def __init__(self, layout: Layout, dtype: torch.dtype, watch: bool) -> None:
        self.layout, self.watch = layout, watch
        self.values = {
            name: torch.full((layout.actions,), float("nan"), dtype=dtype) for name in ("first", "clip", *(SHOWN if watch else ()))
        }

    def copy(self) -> Channels:
        """One that goes on from here by itself."""
        other = Channels.__new__(Channels)
        other.layout, other.watch, other.values = self.layout, self.watch, {name: value.clone() for name, value in self.values.items()}
        return other

    def hold(self, said: Outputs) -> None:
        """Keep the gradients of what the models said, where they are wanted: to be called before the backward pass."""
        for name in READ if self.watch else ():
            if (value := getattr(said, name)).requires_grad:
                value.retain_grad()

    @torch.no_grad()
    def put(self, sequences: Tensor, said: Outputs, share: Experience, objective: Objective) -> None:
        """What the models said of these sequences, after the backward pass."""
        actions, new = self.layout.actions_of(sequences), said.logprobs.detach()
        seen = self.values["first"][actions]
        self.values["first"][actions] = torch.where(seen.isnan(), new.to(seen), seen)
        self.values["clip"][actions] = clip_marks(objective, said, share).to(self.values["clip"])
        if not self.watch:
            return
        kind = objective.ratio if "old" in objective.ratio.needs else TokenRatio()
        found = {
            "new": new, "entropy": said.entropy.detach(), "ratio": kind(new, share.signals.old, share.layout, share.advantages).detach(),
            **pushes(objective, said, share),
        }  # fmt: skip
        for name, value in found.items():
            kept = self.values[name][actions]
            self.values[name][actions] = value.to(kept) + (kept.nan_to_num() if name in SUMS else 0)


def pushes(objective: Objective, said: Outputs, share: Experience) -> dict[str, Tensor]:
    """What the loss of an optimizer step asks of each action, [A], from the gradients that the backward pass left on what the models said.

    push = −∂loss/∂log π(action). Terms that read the whole distribution (an entropy bonus, an exact KL) do not pass through it: their pull on the
    action's own logit is `push_dist`; `push_value` = −∂loss/∂V. Those without gradient are left out, but for push, which is 0 there.
    """
    found = {"push": torch.zeros_like(said.logprobs) if said.logprobs.grad is None else -said.logprobs.grad}
    if said.values.requires_grad and said.values.grad is not None:
        found["push_value"] = -said.values.grad
    logprobs, entropy, p = said.logprobs.detach(), said.entropy.detach(), said.logprobs.detach().exp()
    whole = []
    if said.entropy.requires_grad and said.entropy.grad is not None:
        whole.append(said.entropy.grad * p * (logprobs + entropy))
    if said.kl.requires_grad and said.kl.grad is not None:
        apart = p - share.signals.old.exp() if objective.against == "old" else p * (logprobs - share.signals.reference - said.kl.detach())
        whole.append(-said.kl.grad * apart)
    return found | ({"push_dist": torch.stack(whole).sum(0)} if whole else {})


def clip_marks(objective: Objective, said: Outputs, share: Experience) -> Tensor:
    """+1 where a ratio is cut for being too high, -1 too low, 2 where it would be for another sign of the advantage, else 0."""
    low, high = objective.clip_sides(said, share)
    outside = torch.zeros_like(low)
    for sign in (1.0, -1.0):
        outside = outside | torch.stack(objective.clip_sides(said, replace(share, advantages=torch.full_like(share.advantages, sign)))).any(
            0
        )
    return high.to(said.logprobs) - low.to(said.logprobs) + 2 * (outside & ~low & ~high).to(said.logprobs)
