"""Decoding on CUDA as recorded steps: for each size of batch fixed tensors and one recording, replayed for every token without Python or launches in between."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from tilt import linear_head
from tilt.sampling.cache import Ints, Store, cap, tabled, weights
from tilt.sampling.lean import Lean

WARM = 2  # steps of a size that run as they are: the first makes stores and tables that all others read, and one that is asked for a third time is worth a recording
LEAST = 64  # columns of answers at least
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3}
"""Largest difference of a recording's first step from the plain one per dtype, as a share of the largest hidden state; half precision is judged by 0.1."""

_allowed: ContextVar[bool] = ContextVar("graphs", default=True)
refused: dict[str, str] = {}
"""Why nothing is recorded any more on a type of device: its recordings failed, or gave something else."""


def off() -> AbstractContextManager[None]:
    """Inside, decoding runs step by step on every device."""
    return linear_head.without(_allowed)


class Recording(Protocol):
    """A step over fixed tensors that can be done again."""

    def record(self, step: Callable[[], Tensor]) -> Tensor:
        """Keep what the step does; the tensor that each replay fills. It may or may not have been done by then."""
        ...

    def replay(self) -> None:
        """Do it again with what the fixed tensors hold now."""
        ...


class CudaGraph:
    """A recording by torch.cuda.CUDAGraph; those made by one `maker` share their memory, so a result is read before another is replayed."""

    def __init__(self, pool: Any, stream: torch.cuda.Stream) -> None:
        self.graph, self.pool, self.stream = torch.cuda.CUDAGraph(), pool, stream

    @staticmethod
    def maker() -> Callable[[], Recording]:
        pool, stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream()
        return lambda: CudaGraph(pool, stream)

    def record(self, step: Callable[[], Tensor]) -> Tensor:
        outside, collecting = torch.cuda.current_stream(), gc.isenabled()
        self.stream.wait_stream(outside)
        gc.disable()  # what is freed in the midst of a recording may be what no recording may free
        try:
            with torch.cuda.stream(self.stream):
                step()  # libraries make their workspaces on this stream
                self.graph.capture_begin(pool=self.pool, capture_error_mode="thread_local")
                try:
                    out = step()
                finally:
                    self.graph.capture_end()
        finally:
            if collecting:
                gc.enable()
        outside.wait_stream(self.stream)
        return out

    def replay(self) -> None:
        self.graph.replay()


RECORDERS: dict[str, Callable[[], Callable[[], Recording]]] = {"cuda": CudaGraph.maker}
"""What records steps on a type of device."""


def recorder(device: torch.device) -> Callable[[], Recording] | None:
    """What makes recordings here; None where steps are not recorded: other devices, inside `off` or `linear_head.plain`, or after a failure."""
    if device.type not in RECORDERS or device.type in refused or not _allowed.get() or not linear_head.fused():
        return None
    return RECORDERS[device.type]()


def refuse(device: torch.device, why: object) -> None:
    """Record nothing more in this process; said once, where warnings go."""
    lines = str(why).splitlines()
    refused[device.type] = lines[0][:200] if lines else type(why).__name__
    warnings.warn(f"decoding is not recorded on {device.type}: {refused[device.type]}", stacklevel=2)


class Size(NamedTuple):
    """Rows, groups, rows of a group, columns of answers, columns of prompts."""

    rows: int
    groups: int
    most: int
    columns: int
    widest: int


class Fixed:
    """`Decode` over tensors that stay where they are: what a step reads of rows and groups is copied into them before it. Rows beyond those there are feed token 0 to an empty slot.

    Worked example: rows 0 1 2 of groups 0 1 0 in a size of 4 rows and 2 groups of 2 → table 0 2 1 0, place 0 2 1 0.
    """

    def __init__(self, size: Size, prompts: Store, answers: Store, device: torch.device) -> None:
        self.size, self.prompts, self.answers = size, prompts, answers
        rows = size.rows
        self.tokens, self.answered, self.prompt_length, self.place = (torch.zeros(rows, dtype=torch.int64, device=device) for _ in range(4))
        self.table = torch.zeros(size.groups * size.most, dtype=torch.int64, device=device)
        self.column, self.above = torch.arange(size.columns, device=device), torch.arange(size.widest, device=device)
        self.hidden: dict[int | None, Tensor] = {}
        self.slots: dict[int, Tensor] = {}

    def arrange(self, group: Ints, lengths: Ints) -> None:
        """Say which group each row belongs to [rows] and how long each group's prompt is [groups]."""
        table, place = tabled(group, self.size.groups, self.size.most)
        for tensor, found in ((self.table, table), (self.place, place), (self.prompt_length, lengths[group])):
            tensor.copy_(filled(found, len(tensor)))

    def feed(self, tokens: Ints, answered: Ints) -> None:
        """Say which token each row feeds, and how many it has fed."""
        self.tokens.copy_(filled(tokens, self.size.rows))
        self.answered.copy_(filled(answered, self.size.rows))

    def begin(self) -> Tensor:
        """Positions of the new tokens, [rows]; what layers share is made anew."""
        self.hidden.clear()
        self.slots.clear()
        return self.prompt_length + self.answered

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
        """Attention of every row's new token to its prompt and its own answer, itself included, under one softmax."""
        rows, kv_heads, width = self.size.rows, key.shape[1], query.shape[3]
        keys, values = self.answers.layer(layer, key, value)
        for store, new in ((keys, key), (values, value)):
            store.view(-1, store.shape[3]).index_copy_(0, self._slots(kv_heads), new[0].transpose(0, 1).reshape(-1, store.shape[3]))
        own_keys, own_values = (x[:rows, :, : self.size.columns].flatten(0, 1) for x in (keys, values))
        group_keys, group_values = (
            x[: self.size.groups, :, : self.size.widest].flatten(0, 1) for x in self.prompts.layer(layer, key, value)
        )
        q = query[0].transpose(0, 1) * scaling
        shared = self._by_row(self._by_group(q, kv_heads) @ group_keys.transpose(1, 2), kv_heads)
        own = (q.reshape(rows * kv_heads, -1, width) @ own_keys.transpose(1, 2)).view(rows, q.shape[1], -1)
        scores = cap(torch.cat((shared, own), -1), softcap).masked_fill(self._hidden(window), -torch.inf)
        chosen = weights(scores, sinks).to(q.dtype)
        seen = self._by_row(self._by_group(chosen[..., : self.size.widest], kv_heads) @ group_values, kv_heads)
        chosen = chosen[..., self.size.widest :].reshape(rows * kv_heads, -1, self.size.columns)
        return torch.baddbmm(seen.reshape(rows * kv_heads, -1, seen.shape[2]), chosen, own_values).view(1, rows, q.shape[1], -1)

    def _by_group(self, x: Tensor, kv_heads: int) -> Tensor:
        """[rows, heads, n] → [groups · kv_heads, most · repeat, n]: all that meets one prompt's keys of one head, together."""
        groups, most = self.size.groups, self.size.most
        return x[self.table].view(groups, most, kv_heads, -1, x.shape[2]).transpose(1, 2).reshape(groups * kv_heads, -1, x.shape[2])

    def _by_row(self, x: Tensor, kv_heads: int) -> Tensor:
        """The way back: [groups · kv_heads, most · repeat, n] → [rows, heads, n]."""
        groups, most = self.size.groups, self.size.most
        return x.view(groups, kv_heads, most, -1, x.shape[2]).transpose(1, 2).reshape(groups * most, -1, x.shape[2])[self.place]

    def _slots(self, kv_heads: int) -> Tensor:
        """Index of each (row, head)'s new column in the answers' store, flattened to [rows · kv_heads · columns]."""
        if kv_heads not in self.slots:
            first = torch.arange(self.size.rows * kv_heads, device=self.answered.device).view(-1, kv_heads) * self.answers.columns
            self.slots[kv_heads] = (first + self.answered[:, None]).flatten()
        return self.slots[kv_heads]

    def _hidden(self, window: int | None) -> Tensor:
        """What each row does not see of its prompt and its answer, [rows, 1, widest + columns]."""
        if window not in self.hidden:
            length, answered = self.prompt_length[:, None], self.answered[:, None]
            above, own = self.above >= length, self.column > answered
            if window is not None:
                above, own = above | (length + answered - self.above >= window), own | (answered - self.column >= window)
            self.hidden[window] = torch.cat((above.expand(self.size.rows, -1), own), 1)[:, None]
        return self.hidden[window]


def step(body: Lean, plan: Fixed) -> Tensor:
    """One step of every row: hidden states [rows, D] from what the plan's tensors hold, which is all it depends on besides the weights and the stores."""
    return body(plan.tokens, plan.begin(), plan.size.widest + plan.size.columns, plan)


@dataclass
class Course:
    """A size's plan, how often it was used, which arrangement it holds, and its recording with the tensor that this fills and all tables that it reads."""

    plan: Fixed
    uses: int = 0
    arranged: int = -1
    recording: Recording | None = None
    out: Tensor | None = None
    tables: tuple[Tensor, ...] = ()


class Graphs:
    """Decoding steps by size. A size's first steps run as they are, by the operations that are recorded: when it is recorded changes no bit."""

    def __init__(self, body: Lean, prompts: Store, answers: Store, device: torch.device, make: Callable[[], Recording]) -> None:
        self.body, self.prompts, self.answers, self.device, self.make = body, prompts, answers, device, make
        self.courses: dict[Size, Course] = {}
        self.arranged, self.made = 0, (0, 0)
        self.last: Recording | None = None
        self.fresh = False  # whether the last step was the first of a recording

    def arrange(self, group: Ints, lengths: Ints) -> None:
        self.group, self.lengths = group, lengths.copy()
        self.arranged += 1

    def decode(self, tokens: Ints, answered: Ints) -> Tensor:
        """Hidden states [rows, D] after each row's new token, to be read before the next step."""
        size = self._size(int(answered.max()) + 1)
        course = self.courses.setdefault(size, Course(Fixed(size, self.prompts, self.answers, self.device)))
        if course.arranged != self.arranged:
            course.plan.arrange(self.group, self.lengths)
            course.arranged = self.arranged
        course.plan.feed(tokens, answered)
        course.uses += 1
        self.fresh = course.recording is None and course.uses > WARM
        if self.fresh:
            course.recording = self.make()
            course.out = course.recording.record(lambda: step(self.body, course.plan))
            course.tables = tuple(self.body.angles.tables.values())
        if course.recording is None or course.out is None:
            return step(self.body, course.plan)[: len(tokens)]
        course.recording.replay()
        self.last = course.recording
        return course.out[: len(tokens)]

    def again(self) -> None:
        """The last step, of a recording, once more: keys and values are its own then, whoever wrote over them."""
        assert self.last is not None
        self.last.replay()

    def _size(self, longest: int) -> Size:
        """The size for what is arranged, with room in the stores; when their tensors are made anew, no course can go on."""
        columns = rounded_up(max(LEAST, longest))
        self.answers.reserve(len(self.group), columns)
        made = (self.prompts.made, self.answers.made)
        if made != self.made:
            self.courses.clear()
            self.made = made
        rows, groups = min(self.answers.rows, power(len(self.group))), min(self.prompts.rows, power(len(self.lengths)))
        return Size(rows, groups, power(int(np.bincount(self.group).max())), columns, self.prompts.columns)


def filled(found: Ints, count: int) -> Tensor:
    """The numbers and then zeros, `count` in all."""
    whole = np.zeros(count, dtype=np.int64)
    whole[: len(found)] = found
    return torch.from_numpy(whole)


def power(count: int) -> int:
    """The least power of two that is not smaller."""
    return 1 << (count - 1).bit_length()


def rounded_up(count: int) -> int:
    """The least of 2^n and 3 · 2^n that is not smaller: 65 → 96, 97 → 128."""
    return next(x for x in (power(count) * 3 // 4, power(count)) if x >= count)


def distance(found: Tensor, plain: Tensor) -> float:
    """The largest difference as a share of the largest entry."""
    far = float((found.double() - plain.double()).abs().max() / plain.double().abs().max())
    return far if far == far else float("inf")
