"""Ragged sums, means and discounted sums over the action axis; no padding anywhere."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Bool, Shaped
from torch import Tensor

from tilt.shapes import PerAction, PerPrompt, PerSequence, SequenceMask

EachSequence = Shaped[Tensor, "S"]
EachAction = Shaped[Tensor, "A"]
PromptMask = Bool[Tensor, "G"]


@dataclass(frozen=True)
class Layout:
    """Which sequence an action is in (`sequence`, [A]) and which prompt a sequence answers (`prompt`, [S]).

    Actions of a sequence are contiguous and in order, every sequence has at least one, and both indices count from 0:
    two sequences of 2 and 1 actions that answer one prompt → sequence 0 0 1, prompt 0 0.
    """

    sequence: Tensor
    prompt: Tensor

    @staticmethod
    def of(lengths: Sequence[int] | Tensor, prompt: Sequence[int] | Tensor | None = None) -> Layout:
        """The layout of sequences with these numbers of actions; without `prompt` each answers a prompt of its own."""
        counts = torch.as_tensor(lengths, dtype=torch.long)
        owners = torch.arange(len(counts)) if prompt is None else torch.as_tensor(prompt, dtype=torch.long)
        return Layout(torch.repeat_interleave(torch.arange(len(counts)), counts), owners)

    @cached_property
    def lengths(self) -> Tensor:
        """Number of actions of each sequence, [S]."""
        return torch.bincount(self.sequence, minlength=len(self.prompt))

    @cached_property
    def ends(self) -> Tensor:
        """One past the last action of each sequence, [S]."""
        return self.lengths.cumsum(0)

    @property
    def starts(self) -> Tensor:
        """The first action of each sequence, [S]."""
        return self.ends - self.lengths

    @property
    def last(self) -> Tensor:
        """The last action of each sequence, [S]."""
        return self.ends - 1

    @property
    def sequences(self) -> int:
        return len(self.prompt)

    @property
    def actions(self) -> int:
        return len(self.sequence)

    @cached_property
    def prompts(self) -> int:
        return int(self.prompt.max()) + 1 if len(self.prompt) else 0

    def actions_of(self, sequences: Tensor) -> Tensor:
        """Indices of the actions of these sequences, in the order in which the sequences are named."""
        counts = self.lengths[sequences]
        offsets = torch.repeat_interleave(self.starts[sequences] - (counts.cumsum(0) - counts), counts)
        return torch.arange(int(counts.sum()), device=counts.device) + offsets

    def take(self, sequences: Tensor) -> Layout:
        """The layout of these sequences alone; prompts are renumbered in order of appearance of their old numbers."""
        counts = self.lengths[sequences]
        index = torch.repeat_interleave(torch.arange(len(sequences), device=counts.device), counts)
        return Layout(index, torch.unique(self.prompt[sequences], return_inverse=True)[1])

    @cached_property
    def positions(self) -> Tensor:
        """Number of actions of its sequence before each action, [A]: sequence 0 0 1 → positions 0 1 0."""
        return torch.arange(self.actions, device=self.sequence.device) - self.starts[self.sequence]

    def to(self, device: torch.device | str) -> Layout:
        return Layout(self.sequence.to(device), self.prompt.to(device))


def segment_sum(x: PerAction, layout: Layout) -> PerSequence:
    """Sum of x over the actions of each sequence: 1 2 | 5 → 3 5. Differentiable any number of times."""
    return x.new_zeros(layout.sequences).index_add(0, layout.sequence, x)


def segment_mean(x: PerAction, layout: Layout) -> PerSequence:
    """Mean of x over the actions of each sequence: 1 2 | 5 → 1.5 5."""
    return segment_sum(x, layout) / layout.lengths


def spread(x: EachSequence, layout: Layout) -> EachAction:
    """Every action of a sequence receives the sequence's entry: 7 9 over lengths 2, 1 → 7 7 9."""
    return x[layout.sequence]


def discounted_sums(x: PerAction, layout: Layout, factor: float) -> PerAction:
    """y_t = x_t + factor * y_(t+1) inside each sequence: 1 2 | 5 with factor .5 → 2 2 | 5.

    By doubling in ceil(log2(longest length)) steps: after step j every y_t holds the first 2^j terms of its sum.
    """
    if layout.actions == 0:
        return x
    longest = int(layout.lengths.max())
    slots = layout.sequence * longest + layout.positions
    dense = x.new_zeros(layout.sequences * longest).index_add(0, slots, x).view(layout.sequences, longest)
    reach = 1
    while reach < longest:
        ahead = torch.nn.functional.pad(dense[:, reach:], (0, reach))
        dense = dense + factor**reach * ahead
        reach *= 2
    return dense.reshape(-1)[slots]


def group_count(layout: Layout, scored: SequenceMask) -> PerPrompt:
    """Number of scored sequences of each prompt, [G]."""
    return group_sum(torch.ones(layout.sequences, device=scored.device), layout, scored)


def group_sum(x: PerSequence, layout: Layout, scored: SequenceMask) -> PerPrompt:
    """Sum over the scored sequences of each prompt; 0 where none is scored. An unscored entry may be NaN."""
    return x.new_zeros(layout.prompts).index_add(0, layout.prompt, torch.where(scored, x, 0))


def group_mean(x: PerSequence, layout: Layout, scored: SequenceMask) -> PerPrompt:
    """Mean over the scored sequences of each prompt; 0 where none is scored."""
    return group_sum(x, layout, scored) / group_count(layout, scored).clamp(min=1).to(x.dtype)


def group_std(x: PerSequence, layout: Layout, scored: SequenceMask, ddof: int) -> PerPrompt:
    """Standard deviation over the scored sequences of each prompt, divisor n - ddof; 0 where n <= ddof."""
    away = x - group_mean(x, layout, scored)[layout.prompt]
    divisor = (group_count(layout, scored) - ddof).clamp(min=1).to(x.dtype)
    return (group_sum(away * away, layout, scored) / divisor).sqrt()


def group_max(x: PerSequence, layout: Layout, scored: SequenceMask) -> PerPrompt:
    """Largest entry among the scored sequences of each prompt; -inf where none is scored."""
    return x.new_full((layout.prompts,), -torch.inf).scatter_reduce(0, layout.prompt, torch.where(scored, x, -torch.inf), "amax")


def group_min(x: PerSequence, layout: Layout, scored: SequenceMask) -> PerPrompt:
    """Smallest entry among the scored sequences of each prompt; inf where none is scored."""
    return -group_max(-x, layout, scored)


def group_flat(x: PerSequence, layout: Layout, scored: SequenceMask) -> PromptMask:
    """Prompts whose scored sequences all have one value (or of which none is scored): max <= min, never a small std."""
    return group_max(x, layout, scored) <= group_min(x, layout, scored)
