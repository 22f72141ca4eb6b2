"""Keys and values kept between forwards: a prompt's once per group, an answer's in its own slot, and who attends to what while decoding."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Ints = NDArray[np.int64]
CHUNK = 16  # columns by which room grows at least

flash = (
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
)  # gives log Σ exp of the scores beside the result; 0 where a query sees nothing


def rounded(columns: int) -> int:
    """Columns in whole chunks, as they are held where memory is limited."""
    return -(-columns // CHUNK) * CHUNK


class Store:
    """Keys and values of every layer, each [rows, kv_heads, columns, width]; rows and columns grow in chunks. `made` counts how often the tensors were made anew.

    It starts as zeros, because a masked column still meets probability 0, and 0 · NaN is NaN.
    """

    def __init__(self, rows: int, columns: int) -> None:
        self.rows, self.columns, self.made = rows, columns, 0
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}

    def layer(self, number: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """The layer's keys and values, made on first use after the new ones [1, kv_heads, T, width]."""
        if number not in self.layers:
            self.layers[number] = (self._zeros(key), self._zeros(value))
        return self.layers[number]

    def _zeros(self, like: Tensor) -> Tensor:
        return like.new_zeros(self.rows, like.shape[1], self.columns, like.shape[3])

    def reserve(self, rows: int, columns: int) -> None:
        """Make room for so many rows and columns. Rows double; columns grow by an eighth, because what is read at every step should lie close together."""
        if rows <= self.rows and columns <= self.columns:
            return
        self.resize(
            self.rows if rows <= self.rows else max(rows, 2 * self.rows),
            self.columns if columns <= self.columns else max(columns, self.columns + max(CHUNK, self.columns // 8)),
        )

    @property
    def places(self) -> int:
        """Tokens that there is room for."""
        return self.rows * self.columns

    def resize(self, rows: int, columns: int) -> None:
        """Exactly so many rows and columns; what lies beyond is dropped."""
        both = min(rows, self.rows), min(columns, self.columns)
        self.rows, self.columns, self.made = rows, columns, self.made + 1
        for number, pair in self.layers.items():
            made = (self._zeros(pair[0]), self._zeros(pair[1]))
            for new, old in zip(made, pair, strict=True):
                new[: both[0], :, : both[1]] = old[: both[0], :, : both[1]]
            self.layers[number] = made

    def move(self, source: Ints, target: Ints, columns: int) -> None:
        """Copy rows `source` over rows `target`, the first columns only."""
        if not len(source):
            return
        for pair in self.layers.values():
            here, there = (torch.from_numpy(rows).to(pair[0].device) for rows in (source, target))
            for x in pair:
                x[there, :, :columns] = x[here, :, :columns]


class Decode:
    """One new token per row: it sees its group's prompt, read once for the group, and its own answer so far, under one softmax.

    Worked example: rows 0 1 2 of groups 0 1 0 → a padded table of groups [[0, 2], [1, 1]]: the queries of rows 0 and 2 meet prompt 0 in one product.
    """

    def __init__(self, prompts: Store, answers: Store, device: torch.device) -> None:
        self.prompts, self.answers, self.device = prompts, answers, device
        self.longest = 0

    def arrange(self, group: Ints, prompt_lengths: Ints) -> None:
        """Say which group each row belongs to [rows] and how long each group's prompt is [groups]; needed when rows or groups change."""
        rows, groups = len(group), len(prompt_lengths)
        counts = np.bincount(group, minlength=groups)
        self.rows, self.groups, self.most, self.widest = rows, groups, int(counts.max()), int(prompt_lengths.max())
        table, place = tabled(group, groups, self.most)
        self.straight = len(table) == rows and bool((table == np.arange(rows)).all())
        self.table, self.place = torch.from_numpy(table).to(self.device), torch.from_numpy(place).to(self.device)
        self.prompt_length = prompt_lengths[group]
        beyond = self._bias(np.arange(self.widest) >= prompt_lengths[:, None])
        self.beyond = None if beyond is None else beyond[:, None]

    def advance(self, answered: Ints) -> Tensor:
        """Begin a step in which row i feeds the token after its first answered[i] ones; the positions [rows] of the new tokens."""
        self.answered, self.longest = answered, int(answered.max()) + 1
        self.answers.reserve(self.rows, self.longest)
        self.sights: dict[int | None, Sight] = {}
        self.slots: dict[int, Tensor] = {}
        return torch.from_numpy(self.prompt_length + answered).to(self.device)

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
        """Attention of every row's new token to its prompt and its own answer, itself included."""
        kv_heads, width, rows = key.shape[1], query.shape[3], self.rows
        keys, values = self.answers.layer(layer, key, value)
        slots = self._slots(kv_heads)
        keys.view(-1, width).index_copy_(0, slots, key[0].transpose(0, 1).reshape(-1, width))
        values.view(-1, values.shape[3]).index_copy_(0, slots, value[0].transpose(0, 1).reshape(-1, values.shape[3]))
        own = (
            keys[:rows, :, : self.longest].flatten(0, 1),
            values[:rows, :, : self.longest].flatten(0, 1),
        )  # [rows · kv_heads, longest, width]
        group_keys, group_values = (x[: self.groups, :, : self.widest] for x in self.prompts.layer(layer, key, value))
        q = query[0].transpose(0, 1)
        if softcap is None and q.device.type == "cpu":
            return self._in_turn(q, group_keys, group_values, *own, scaling, window, sinks)[None]
        return self._at_once(q * scaling, group_keys.flatten(0, 1), group_values.flatten(0, 1), *own, window, softcap, sinks)[None]

    def _in_turn(
        self,
        q: Tensor,
        keys: Tensor,
        values: Tensor,
        own_keys: Tensor,
        own_values: Tensor,
        scaling: float,
        window: int | None,
        sinks: Tensor | None,
    ) -> Tensor:
        """The prompt first, by the fused kernel, which also gives log Σ exp of the scores; that number is then one more score beside the own answer's.

        softmax(a, b) = (softmax(a) · p, softmax(b) · (1 - p)) where p is the first entry of softmax(log Σ exp a, b).
        """
        rows, heads, width = q.shape
        kv_heads = keys.shape[1]
        sight = self._sight(window)
        asked = self._by_group(q, kv_heads).view(self.groups, kv_heads, -1, width)
        shade = sight.groups if sight.groups is None or sight.groups.dtype == q.dtype else sight.groups.to(q.dtype)
        if shade is not None and shade.shape[2] > 1:
            shade = shade.repeat_interleave(heads // kv_heads, 2)
        seen, mass = flash(asked, keys, values, 0.0, False, attn_mask=shade, scale=scaling)
        seen = self._by_row(seen.reshape(self.groups * kv_heads, -1, seen.shape[3]), heads)
        mass = self._by_row(mass.reshape(self.groups * kv_heads, -1, 1), heads)
        if sight.blind is not None:
            mass = mass.masked_fill(sight.blind, -torch.inf)
        if sinks is not None:
            sink = sinks.to(mass.dtype)[:, None]
            seen = seen * torch.sigmoid(mass - sink).to(seen.dtype)
            mass = torch.logaddexp(mass, sink)
        asked = q.reshape(rows * kv_heads, -1, width)
        own = torch.baddbmm(asked.new_empty(1), asked, own_keys.transpose(1, 2), beta=0, alpha=scaling).view(rows, heads, -1)
        own = own if own.dtype == mass.dtype else own.to(mass.dtype)
        if sight.own is not None:
            own += sight.own
        chosen = torch.cat((own, mass), -1).softmax(-1).to(q.dtype).view(rows * kv_heads, -1, self.longest + 1)
        share = seen.reshape(rows * kv_heads, -1, seen.shape[2]) * chosen[..., -1:]
        return torch.baddbmm(share, chosen[..., :-1], own_values).view(rows, heads, -1)

    def _at_once(
        self,
        q: Tensor,
        keys: Tensor,
        values: Tensor,
        own_keys: Tensor,
        own_values: Tensor,
        window: int | None,
        softcap: float | None,
        sinks: Tensor | None,
    ) -> Tensor:
        """All scores side by side under one softmax, from plain operations: any device, any cap."""
        rows, heads, width = q.shape
        kv_heads = len(own_keys) // rows
        shared = self._by_row(self._by_group(q, kv_heads) @ keys.transpose(1, 2), heads)  # [rows, heads, widest]
        own = (q.reshape(rows * kv_heads, -1, width) @ own_keys.transpose(1, 2)).view(rows, heads, -1)
        scores = cap(torch.cat((shared, own), -1), softcap)
        sight = self._sight(window)
        if sight.rows is not None:
            scores[..., : self.widest] += sight.rows
        if sight.own is not None:
            scores[..., self.widest :] += sight.own
        chosen = weights(scores, sinks).to(q.dtype)
        out = self._by_row(self._by_group(chosen[..., : self.widest], kv_heads) @ values, heads)
        own = chosen[..., self.widest :].reshape(rows * kv_heads, -1, self.longest)
        return torch.baddbmm(out.reshape(rows * kv_heads, -1, out.shape[2]), own, own_values).view(rows, heads, -1)

    def _by_group(self, x: Tensor, kv_heads: int) -> Tensor:
        """[rows, heads, n] → [groups · kv_heads, most · repeat, n]: all that meets one prompt's keys of one head, together."""
        x = x if self.straight else x[self.table]
        return x.reshape(self.groups, self.most, kv_heads, -1, x.shape[2]).transpose(1, 2).reshape(self.groups * kv_heads, -1, x.shape[2])

    def _by_row(self, x: Tensor, heads: int) -> Tensor:
        """The way back: [groups · kv_heads, most · repeat, n] → [rows, heads, n]."""
        x = (
            x.view(self.groups, -1, self.most, heads * self.groups // x.shape[0], x.shape[2])
            .transpose(1, 2)
            .reshape(self.groups * self.most, heads, x.shape[2])
        )
        return x if self.straight else x[self.place]

    def _slots(self, kv_heads: int) -> Tensor:
        """Index of each (row, head)'s new column in the answers' store, flattened to [rows · kv_heads · columns]."""
        if kv_heads not in self.slots:
            head = np.arange(self.rows * kv_heads)
            self.slots[kv_heads] = torch.from_numpy(head * self.answers.columns + np.repeat(self.answered, kv_heads)).to(self.device)
        return self.slots[kv_heads]

    def _sight(self, window: int | None) -> Sight:
        """What the new tokens see at this step through this window, made once for all layers."""
        if window not in self.sights:
            self.sights[window] = self._seen(window)
        return self.sights[window]

    def _seen(self, window: int | None) -> Sight:
        column, answered = np.arange(self.longest), self.answered[:, None]
        hidden = column > answered
        if window is not None:
            hidden |= answered - column >= window
        own = self._bias(hidden)
        far = None if window is None else (self.prompt_length + self.answered)[:, None] - np.arange(self.widest) >= window
        if far is None or not far.any():
            return Sight(self.beyond, None if self.beyond is None else self._of_rows(self.beyond), None, own)
        far |= np.arange(self.widest) >= self.prompt_length[:, None]
        rows, blind = self._bias(far), far.all(1)
        assert rows is not None
        groups = rows[:, 0] if self.straight else rows[self.table, 0]
        return Sight(
            groups.view(self.groups, 1, self.most, self.widest),
            rows,
            torch.from_numpy(blind)[:, None, None].to(self.device) if blind.any() else None,
            own,
        )

    def _of_rows(self, groups: Tensor) -> Tensor:
        """A bias of groups [groups, 1, 1, widest] for each row, [rows, 1, widest]."""
        each = groups[:, 0].expand(-1, self.most, -1).reshape(-1, 1, self.widest)
        return each if self.straight else each[self.place]

    def _bias(self, hidden: NDArray[np.bool_]) -> Tensor | None:
        """[rows, 1, columns]: -inf where hidden, 0 elsewhere; None where nothing is."""
        return torch.from_numpy(np.where(hidden, np.float32(-np.inf), np.float32(0)))[:, None].to(self.device) if hidden.any() else None


class Sight(NamedTuple):
    """Biases of one step, 0 or -inf, None where all is seen: of the prompt by group [groups, 1, 1 or most, widest] and by row [rows, 1, widest];
    rows that see none of their prompt [rows, 1, 1]; of the own answers [rows, 1, longest]."""

    groups: Tensor | None
    rows: Tensor | None
    blind: Tensor | None
    own: Tensor | None


def tabled(group: Ints, groups: int, most: int) -> tuple[Ints, Ints]:
    """Rows by group, each group padded with row 0 to `most` [groups · most]; and where in it each row stands [rows]."""
    counts, rows = np.bincount(group, minlength=groups), np.arange(len(group))
    order = np.argsort(group, kind="stable")
    rank = np.empty(len(group), dtype=np.int64)
    rank[order] = rows - np.repeat(np.cumsum(counts) - counts, counts)
    table, place = np.zeros(groups * most, dtype=np.int64), group * most + rank
    table[place] = rows
    return table, place


def cap(scores: Tensor, softcap: float | None) -> Tensor:
    """softcap · tanh(scores / softcap), or the scores."""
    return scores if softcap is None else softcap * torch.tanh(scores / softcap)


def weights(scores: Tensor, sinks: Tensor | None) -> Tensor:
    """Softmax over the last axis of [..., heads, n], in float32 at least; a sink [heads] takes part and is dropped."""
    scores = scores if scores.dtype == torch.float64 else scores.float()
    if sinks is None:
        return scores.softmax(-1)
    column = sinks.to(scores.dtype).reshape(-1, 1).expand(*scores.shape[:-1], 1)
    return torch.cat((scores, column), -1).softmax(-1)[..., :-1]
