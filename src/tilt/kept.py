"""Kept sets: which tokens an action was chosen among, where truncation or a mask left fewer than the whole vocabulary."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Kept:
    """One set of token ids per action, end to end: set a is ids[offsets[a] : offsets[a + 1]], and an empty one stands for the whole vocabulary.

    Worked example: {4, 7}, the whole vocabulary, {2} → ids 4 7 2 (int32), offsets 0 2 2 3 (int64).
    """

    ids: Tensor
    offsets: Tensor

    @staticmethod
    def of(sets: Sequence[Sequence[int]]) -> Kept:
        """Sets given one by one."""
        flat = torch.tensor([token for one in sets for token in one], dtype=torch.int32)
        return Kept(flat, ends(torch.tensor([len(one) for one in sets], dtype=torch.int64)))

    @staticmethod
    def whole(actions: int) -> Kept:
        """The whole vocabulary for each of so many actions."""
        return Kept(torch.zeros(0, dtype=torch.int32), torch.zeros(actions + 1, dtype=torch.int64))

    @staticmethod
    def among(allowed: Tensor) -> Kept:
        """The sets of a mask [A, V], on the CPU; a row that allows everything is the whole vocabulary."""
        narrow = ~allowed.all(-1)
        rows, ids = torch.nonzero(allowed & narrow[:, None], as_tuple=True)
        return Kept(ids.to("cpu", torch.int32), ends(torch.bincount(rows, minlength=len(allowed)).cpu()))

    @staticmethod
    def join(parts: Sequence[Kept]) -> Kept:
        """The sets of all parts, in order."""
        if not parts:
            return Kept.whole(0)
        return Kept(torch.cat([part.ids for part in parts]), ends(torch.cat([part.sizes for part in parts])))

    @property
    def sizes(self) -> Tensor:
        """Number of ids stored for each action, [A]; 0 where it is the whole vocabulary."""
        return self.offsets.diff()

    @property
    def narrows(self) -> bool:
        """Whether some action had fewer tokens to choose from than the whole vocabulary."""
        return len(self.ids) > 0

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Kept) and torch.equal(self.ids, other.ids) and torch.equal(self.offsets, other.offsets)

    __hash__ = None  # type: ignore[assignment]  # tensors have no hash of their contents

    def take(self, actions: Tensor) -> Kept:
        """The sets of these actions, in the order in which they are named."""
        if not self.narrows:
            return Kept(self.ids, self.offsets.new_zeros(len(actions) + 1))
        sizes = self.sizes[actions]
        begin = sizes.cumsum(0) - sizes
        places = torch.repeat_interleave(self.offsets[actions] - begin, sizes) + torch.arange(int(sizes.sum()), device=sizes.device)
        return Kept(self.ids[places], ends(sizes))

    def part(self, start: int, stop: int) -> Kept:
        """The sets of actions start … stop - 1, with storage of their own."""
        low, high = int(self.offsets[start]), int(self.offsets[stop])
        return Kept(self.ids[low:high].clone(), self.offsets[start : stop + 1] - low)

    def to(self, device: torch.device | str) -> Kept:
        return Kept(self.ids.to(device), self.offsets.to(device))

    def restrict(self, logits: Tensor) -> Tensor:
        """Logits [A, V] with -inf outside each action's set: their softmax is the truncated, renormalised distribution."""
        if not self.narrows:
            return logits
        sizes = self.sizes
        excluded = (sizes > 0)[:, None].expand(logits.shape).clone()
        excluded[torch.repeat_interleave(torch.arange(len(sizes), device=sizes.device), sizes), self.ids.long()] = False
        return logits.masked_fill(excluded, -torch.inf)


def ends(sizes: Tensor) -> Tensor:
    """Offsets of ragged sets of these sizes: 2 0 1 → 0 2 2 3."""
    return torch.nn.functional.pad(sizes.cumsum(0), (1, 0))
