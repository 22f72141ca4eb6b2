"""Continuous batching, watched from a forward that only keeps books: each prompt read once, rows and groups gone as soon as they end."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch

from tilt.sampling.cache import Ints
from tilt.sampling.engine import PREFILL_TOKENS, Queue, Request, batches, moved, moves
from tilt.sampling.stopping import Stops


class Books:
    """A forward whose rows and groups are lists of names; the hidden state after a prompt is the prompt's first token."""

    def __init__(self) -> None:
        self.read: list[int] = []
        self.groups: list[int] = []
        self.rows = np.zeros(0, dtype=np.int64)

    def prefill(self, prompts: Sequence[Ints], first: int) -> torch.Tensor:
        assert first == len(self.groups)
        names = [int(p[0]) for p in prompts]
        self.read += names
        self.groups += names
        return torch.tensor(names)[:, None]

    def arrange(self, group: Ints) -> None:
        self.rows = group

    def decode(self, tokens: Ints, answered: Ints) -> torch.Tensor:
        return torch.zeros(len(tokens), 1)

    def move_rows(self, source: Ints, target: Ints) -> None:
        pass

    def fits(self, rows: int, longest: int, groups: int, widest: int) -> bool:
        return True

    def move_groups(self, source: Ints, target: Ints, kept: int) -> None:
        for here, there in zip(source.tolist(), target.tolist(), strict=True):
            self.groups[there] = self.groups[here]
        self.groups = self.groups[:kept]


@pytest.mark.parametrize("slots", [1, 4, 16, 1000])
def test_each_prompt_is_read_once_and_kept_while_an_answer_needs_it(slots: int) -> None:
    rng = np.random.default_rng(0)
    counts = [3, 1, 8, 2, 8, 1, 5, 4, 8, 8]
    requests = [Request(np.array([100 + i, 0]), np.zeros(n, dtype=np.uint64), 12) for i, n in enumerate(counts)]
    queue, forward, stops = Queue(requests, slots), Books(), Stops(50, (7,), (), lambda tokens: "")
    steps = 0
    while not queue.finished:
        entered = queue.enter(forward)
        fresh = entered[0][:, 0].tolist() if entered else []
        names = [100 + int(i) for i in queue.request[queue.active]]
        assert fresh == names[len(names) - len(fresh) :]
        assert [forward.groups[g] for g in forward.rows] == names
        assert len(names) <= slots and (len(names) > slots - max(1, slots // 16) or queue.next == queue.total)
        tokens = rng.choice([7, 8, 9], size=len(names), p=[0.3, 0.4, 0.3])
        queue.leave(forward, queue.record(tokens, np.full(len(names), -1.0), stops))
        assert sorted(forward.groups) == [100 + i for i in np.flatnonzero((queue.group >= 0) & (queue.unfinished > 0))]
        steps += 1
    assert sorted(forward.read) == [100 + i for i in range(len(counts))]
    assert forward.groups == [] and not queue.unfinished.any()
    found = queue.results()
    assert [len(answers) for answers in found] == counts
    assert all(
        (a.stop == "stop") == (a.tokens[-1] == 7) and 7 not in a.tokens[:-1] and len(a.tokens) <= 12 for answers in found for a in answers
    )
    assert steps <= 12 if slots == 1000 else steps >= sum(len(a.tokens) for answers in found for a in answers) / slots


def test_the_last_places_fill_the_holes() -> None:
    gone = np.array([False, True, False, True, False, True])
    source, target = moves(gone)
    assert (source.tolist(), target.tolist()) == ([4], [1])
    assert moved(np.array([10, 11, 12, 13, 14, 15]), source, target, gone).tolist() == [10, 14, 12]


def test_prefills_are_bounded_by_their_padded_size() -> None:
    lengths = [10, 4000, 10, 10, 9000, 1, 1, *[1000] * 9]
    parts = [part.tolist() for part in batches(np.arange(len(lengths)), lengths)]
    assert [i for part in parts for i in part] == list(range(len(lengths)))
    for part in parts:
        assert len(part) == 1 or len(part) * max(lengths[i] for i in part) <= PREFILL_TOKENS
    assert len(parts) < len(lengths) - 4
