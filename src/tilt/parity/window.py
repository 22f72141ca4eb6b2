"""The padded window: answers side by side in W slots, made from ragged experience or from padded token ids, and back."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tilt.objectives import Layout, Rewards, Signals
from tilt.shapes import PerAction, PerSequence, SequenceIndex, SequenceMask

PerSlot = Float[Tensor, "S W"]
SlotMask = Bool[Tensor, "S W"]
SlotTokens = Int[Tensor, "S W"]


@dataclass(frozen=True)
class Window:
    """S answers in W slots: log-probabilities, the critic's values V(state before slot t), the last action's slot (-1: none), score and prompt.

    Slots beyond hold anything: `last` 1 in a window of 4 → actions in slots 0 1, `after` in slot 2.
    """

    old: PerSlot
    reference: PerSlot
    values: PerSlot
    last: SequenceIndex
    score: PerSequence
    prompt: SequenceIndex

    @property
    def width(self) -> int:
        return self.old.shape[1]

    @cached_property
    def slots(self) -> Tensor:
        """Number of each slot, [1, W]."""
        return torch.arange(self.width, device=self.old.device)[None]

    @cached_property
    def live(self) -> SlotMask:
        """The actions: slots up to the last."""
        return self.slots <= self.last[:, None]

    @cached_property
    def after(self) -> SlotMask:
        """The slot after the last action, where the window has one."""
        return self.slots == self.last[:, None] + 1

    def take(self, sequences: Tensor) -> Window:
        """The window of these sequences alone."""
        return Window(*(x[sequences] for x in (self.old, self.reference, self.values, self.last, self.score, self.prompt)))


def widen(x: PerAction, layout: Layout, width: int, after: PerSequence | None = None) -> PerSlot:
    """Entries of each sequence in the first slots of its row, `after` in the slot behind them where there is one, zeros beyond.

    1 2 | 5 in three slots, after 8 9 → 1 2 8 | 5 9 0.
    """
    wide = x.new_zeros(layout.sequences, width)
    wide = wide.index_put((layout.sequence, layout.positions), x)
    short = layout.lengths < width
    return wide if after is None else wide.index_put((torch.nonzero(short).flatten(), layout.lengths[short]), after[short].to(x))


def narrow(wide: PerSlot, layout: Layout) -> PerAction:
    """The slots that hold actions, in order: what `widen` spread."""
    return wide[layout.sequence, layout.positions]


def window_of(rewards: Rewards, signals: Signals, layout: Layout, width: int, *, stop_is_pad: bool = False) -> Window:
    """The window that padded code would hold of these answers: V(state after the last action), `signals.final`, stands in the slot after it.

    An answer that does not fill the window ended with its stop token. With `stop_is_pad` that token is not an action: `last` is the slot before it.
    """
    short = layout.lengths < width
    last = layout.lengths - 1 - (short.to(torch.long) if stop_is_pad else 0)
    old, reference = widen(signals.old, layout, width), widen(signals.reference, layout, width)
    return Window(old, reference, widen(signals.values, layout, width, signals.final), last, rewards.total, layout.prompt)


def truncate(ids: SlotTokens, stop: int, pad: int) -> SlotTokens:
    """Everything after the first stop token becomes padding: 7 E 8 E → 7 E P P."""
    behind = (ids == stop).long().cumsum(1) - (ids == stop).long() > 0
    return torch.where(behind, pad, ids)


def last_action(ids: SlotTokens, pad: int) -> SequenceIndex:
    """The slot before the first pad; the last slot where there is none, -1 where the first token is a pad."""
    padded = ids == pad
    return torch.where(padded.any(1), padded.long().argmax(1), ids.shape[1]) - 1


def missing_stop(ids: SlotTokens, stop: int) -> SequenceMask:
    """Answers without a stop token. Where pad and stop are one id, every padded answer counts as stopped."""
    return ~(ids == stop).any(1)
