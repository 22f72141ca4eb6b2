"""Prompts on their way into the cache: several whole ones in one forward, or a long one in parts."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from tilt.models.attention import attended
from tilt.sampling.cache import Ints, Store


class Prefill:
    """Whole prompts end to end in one row: each token sees its own prompt up to itself; keys and values go to the store's rows from `first` on."""

    def __init__(self, store: Store, first: int, lengths: Ints, device: torch.device) -> None:
        widest = int(lengths.max())
        starts = np.cumsum(lengths) - lengths
        column = np.arange(widest)
        inside = column < lengths[:, None]
        self.store, self.first, self.prompts, self.widest = store, first, len(lengths), widest
        self.positions = torch.from_numpy(np.broadcast_to(column, inside.shape)[inside]).to(device)
        self.last = torch.from_numpy(starts + lengths - 1).to(device)
        self.pad = torch.from_numpy(np.where(inside, starts[:, None] + column, 0)).to(device)  # [prompts, widest] → index in the row
        self.real = torch.from_numpy(np.flatnonzero(inside)).to(device)
        self.masks: dict[int, Tensor] = {}

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        layer: int,
        scaling: float,
        window: int | None,
        softcap: float | None,
        sinks: Tensor | None,
    ) -> Tensor:
        """Causal attention of each prompt to itself, right-padded to the longest."""
        q, k, v = (x[0][:, self.pad].transpose(0, 1) for x in (query, key, value))  # [prompts, heads, widest, width]
        rows = slice(self.first, self.first + self.prompts)
        keys, values = self.store.layer(layer, key, value)
        keys[rows, :, : self.widest], values[rows, :, : self.widest] = k, v
        plain = window is None or window >= self.widest
        out = attended(q, k, v, None if plain and softcap is None and sinks is None else self._visible(window), scaling, softcap, sinks)
        return out.transpose(1, 2).flatten(0, 1)[self.real][None]

    def _visible(self, window: int | None) -> Tensor:
        """[widest, widest], made once per window."""
        width = window or self.widest
        if width not in self.masks:
            self.masks[width] = visible(self.widest, self.widest, width, self.pad.device)
        return self.masks[width]


class Continue:
    """Tokens `start` … `stop` - 1 of one prompt, in a forward of their own: each sees the cached part before it and itself."""

    def __init__(self, store: Store, row: int, start: int, stop: int, device: torch.device) -> None:
        self.store, self.row, self.start, self.stop = store, row, start, stop
        self.positions = torch.arange(start, stop, device=device)
        self.masks: dict[int, Tensor] = {}

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        layer: int,
        scaling: float,
        window: int | None,
        softcap: float | None,
        sinks: Tensor | None,
    ) -> Tensor:
        """Attention of the part to the prompt so far."""
        keys, values = self.store.layer(layer, key, value)
        row = slice(self.row, self.row + 1)
        keys[row, :, self.start : self.stop], values[row, :, self.start : self.stop] = key, value
        width = window or self.stop
        if width not in self.masks:
            self.masks[width] = visible(self.stop - self.start, self.stop, width, self.positions.device)
        return attended(
            query, keys[row, :, : self.stop], values[row, :, : self.stop], self.masks[width], scaling, softcap, sinks
        ).transpose(1, 2)


def visible(queries: int, keys: int, window: int, device: torch.device) -> Tensor:
    """[queries, keys], the queries being the last of the keys' positions; true where query i sees key j: j ≤ i, and i - j < window."""
    ones = torch.ones(queries, keys, dtype=torch.bool, device=device)
    return ones.tril(keys - queries) & ~ones.tril(keys - queries - window)
