"""A pack as a right-padded batch, for architectures that cannot run packed rows."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tilt.data.packing import Pack


@dataclass(frozen=True)
class Padded:
    """One row per sequence, its prompt included: tokens and mask [S, L], and where each token of the pack lies in the flattened batch, `place` [T].

    Worked example: prompt 5 6 with answers 7 8 E and 9 E → rows 5 6 7 8 E and 5 6 9 E ·, place 0 1 2 3 4 7 8.
    A shared prompt is read from its first answer's row: causal models compute the same in each.
    """

    tokens: Tensor
    mask: Tensor
    place: Tensor

    @staticmethod
    def of(pack: Pack) -> Padded:
        """Unfold a pack into a batch."""
        start, length, parent = (x.tolist() for x in (pack.segments.start, pack.segments.length, pack.segments.parent))
        shared = set(parent)
        leaves = [i for i in range(len(start)) if i not in shared]
        above = {i: (start[parent[i]], length[parent[i]]) if parent[i] >= 0 else (0, 0) for i in leaves}
        width = max(above[i][1] + length[i] for i in leaves)
        source = torch.zeros(len(leaves), width, dtype=torch.long)
        mask = torch.zeros(len(leaves), width, dtype=torch.long)
        place = torch.zeros(len(pack.tokens), dtype=torch.long)
        for row, i in reversed(list(enumerate(leaves))):
            first, before = above[i]
            whole = torch.cat([torch.arange(first, first + before), torch.arange(start[i], start[i] + length[i])])
            source[row, : len(whole)] = whole
            mask[row, : len(whole)] = 1
            place[whole] = row * width + torch.arange(len(whole))
        device = pack.tokens.device
        return Padded(pack.tokens[source.to(device)], mask.to(device), place.to(device))
