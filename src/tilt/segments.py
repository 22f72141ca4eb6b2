"""Ragged sums, means and discounted sums over the action axis; no padding anywhere."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


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

    def to(self, device: torch.device | str) -> Layout:
        return Layout(self.sequence.to(device), self.prompt.to(device))
