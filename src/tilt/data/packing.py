"""Rollouts end to end in one row, each prompt once; masks end here, at the action axis."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise

import numpy as np
import torch
from torch import Tensor

from tilt.data.rollouts import Rollout
from tilt.kept import Kept
from tilt.segments import Layout


@dataclass(frozen=True)
class Segments:
    """A forest of token runs, two levels deep: a segment sees itself causally and its parent wholly.

    `start`, `length`, `parent` are int64 [N]; `parent` is -1 for a root. A prompt is a root, its answers are its children;
    a text without a shared prompt is a root of its own. The runs tile the row in order.
    """

    start: Tensor
    length: Tensor
    parent: Tensor

    def to(self, device: torch.device | str) -> Segments:
        return Segments(self.start.to(device), self.length.to(device), self.parent.to(device))


@dataclass(frozen=True)
class Pack:
    """Rollouts as one row of tokens [T], with positions that restart, and the actions [A] with the index of the token whose output chose each.

    Worked example: prompt 5 6, sampled 7 8 E → tokens 5 6 7 8 E, positions 0 1 2 3 4, predictors 1 2 3, actions 7 8 E.
    A second answer 9 E to the same prompt adds tokens 9 E at positions 2 3, predictors 1 5, actions 9 E.
    `own` [S] is the segment of each sequence: a child of its prompt's segment, or a root where the prompt is empty.
    `sampler` [A] holds the sampler's log-probabilities (NaN for demonstrations), `kept` the tokens that each action was chosen among.
    """

    tokens: Tensor
    positions: Tensor
    segments: Segments
    predictors: Tensor
    actions: Tensor
    layout: Layout
    own: Tensor
    sampler: Tensor
    kept: Kept

    @property
    def last_tokens(self) -> Tensor:
        """Index of the last token of each sequence, [S]."""
        return self.segments.start[self.own] + self.segments.length[self.own] - 1

    @property
    def costs(self) -> Tensor:
        """Tokens that each sequence adds to a row when its prompt is already there, [S]."""
        return self.segments.length[self.own]

    def take(self, sequences: Tensor) -> Pack:
        """The pack of these sequences alone, in this order, each of their prompts once."""
        own = self.own[sequences]
        above = self.segments.parent[own]
        roots = torch.unique(above[above >= 0])
        kept = torch.cat([roots, own])
        length = self.segments.length[kept]
        start = length.cumsum(0) - length
        tokens = torch.repeat_interleave(self.segments.start[kept] - start, length) + torch.arange(int(length.sum()), device=length.device)
        moved = torch.empty_like(self.tokens)
        moved[tokens] = torch.arange(len(tokens), device=tokens.device)
        parent = torch.full_like(kept, -1)
        parent[len(roots) :] = torch.where(above >= 0, torch.searchsorted(roots, above), -1)
        actions = self.layout.actions_of(sequences)
        return Pack(
            self.tokens[tokens], self.positions[tokens], Segments(start, length, parent), moved[self.predictors[actions]],
            self.actions[actions], self.layout.take(sequences), torch.arange(len(roots), len(kept), device=kept.device), self.sampler[actions],
            self.kept.take(actions),
        )  # fmt: skip

    def split(self, budget: int, sequences: Tensor | None = None) -> list[Tensor]:
        """Cut sequences (all by default) into as few parts of at most `budget` tokens as their order allows, the largest as small as it can be.

        Prompts are counted once a part; answers to one prompt stay side by side. A sequence longer than the budget is a part of its own.
        """
        chosen = torch.arange(self.layout.sequences) if sequences is None else sequences
        if len(chosen) == 0:
            return []
        chosen = chosen[torch.argsort(self.layout.prompt[chosen].cpu(), stable=True)]
        above = self.segments.parent[self.own[chosen]]
        heads = torch.where(above >= 0, self.segments.length[above.clamp(min=0)], 0).tolist()
        costs, owners = self.costs[chosen].tolist(), self.layout.prompt[chosen].tolist()

        def starts(limit: int) -> list[int]:
            found: list[int] = []
            used, group = 0, -1
            for i, (cost, head, owner) in enumerate(zip(costs, heads, owners, strict=True)):
                extra = cost + (head if owner != group else 0)
                if not found or used + extra > limit:
                    found.append(i)
                    used, extra = 0, cost + head
                used, group = used + extra, owner
            return found

        return [chosen[a:b] for a, b in pairwise([*evenly(starts, budget), len(chosen)])]

    def to(self, device: torch.device | str) -> Pack:
        return Pack(
            self.tokens.to(device), self.positions.to(device), self.segments.to(device), self.predictors.to(device),
            self.actions.to(device), self.layout.to(device), self.own.to(device), self.sampler.to(device),
            self.kept.to(device),
        )  # fmt: skip


def evenly(starts: Callable[[int], list[int]], budget: int) -> list[int]:
    """Where the parts begin under the smallest limit that needs no more parts than `budget` does: parts of like size."""
    found = starts(budget)
    low, high = 0, budget
    while len(found) > 1 and high - low > max(1, budget // 64):
        middle = (low + high) // 2
        tried = starts(middle)
        if len(tried) == len(found):
            found, high = tried, middle
        else:
            low = middle
    return found


def pack(rollouts: Sequence[Rollout]) -> Pack:
    """Lay rollouts end to end, each prompt once, sequences in the given order.

    Rollouts with the same prompt id and tokens share the prompt's segment and count as one group in `layout.prompt`.
    """
    groups: dict[tuple[int, tuple[int, ...]], list[int]] = {}
    for i, rollout in enumerate(rollouts):
        groups.setdefault((rollout.prompt.id, rollout.prompt.tokens), []).append(i)

    runs: list[tuple[int, ...]] = []
    parent: list[int] = []
    own, group_of = np.zeros(len(rollouts), dtype=np.int64), np.zeros(len(rollouts), dtype=np.int64)
    for number, ((_, prompt), members) in enumerate(groups.items()):
        root = len(runs) if prompt else -1
        if prompt:
            runs.append(prompt)
            parent.append(-1)
        own[members] = np.arange(len(runs), len(runs) + len(members))
        group_of[members] = number
        runs.extend(rollouts[i].tokens for i in members)
        parent.extend([root] * len(members))

    length, above = np.fromiter(map(len, runs), dtype=np.int64, count=len(runs)), np.array(parent, dtype=np.int64)
    start = length.cumsum() - length
    before = np.where(above >= 0, length[above], 0)  # tokens of the prompt, before the first of a run
    row = torch.from_numpy(np.fromiter(chain.from_iterable(runs), dtype=np.int64, count=int(length.sum())))
    positions = np.arange(len(row)) - np.repeat(start - before, length)

    own_length = length[own]
    flags = np.fromiter(chain.from_iterable(r.sampled for r in rollouts), dtype=bool, count=int(own_length.sum()))
    logprobs = np.fromiter(chain.from_iterable(r.logprobs for r in rollouts), dtype=np.float64, count=len(flags))
    chosen = np.flatnonzero(flags)
    owner = np.repeat(np.arange(len(rollouts)), own_length)[chosen]
    place = chosen - (own_length.cumsum() - own_length)[owner]
    counts = np.bincount(owner, minlength=len(rollouts))
    assert counts.all(), "every sequence needs at least one action"
    picked, head = start[own][owner] + place, above[own][owner]
    assert (head[place == 0] >= 0).all(), "the first token of a text without a prompt has no predictor, so it cannot be an action"
    predictors = np.where(place == 0, start[head] + length[head] - 1, picked - 1)
    return Pack(
        tokens=row,
        positions=torch.from_numpy(positions),
        segments=Segments(torch.from_numpy(start), torch.from_numpy(length), torch.from_numpy(above)),
        predictors=torch.from_numpy(predictors),
        actions=row[torch.from_numpy(picked)],
        layout=Layout.of(torch.from_numpy(counts), torch.from_numpy(group_of)),
        own=torch.from_numpy(own),
        sampler=torch.from_numpy(logprobs[chosen]).to(torch.get_default_dtype()),
        kept=sets_of(rollouts, len(chosen)),
    )


def sets_of(rollouts: Sequence[Rollout], actions: int) -> Kept:
    """The kept sets of the sampled tokens of all rollouts, in order."""
    if all(rollout.kept is None for rollout in rollouts):
        return Kept.whole(actions)
    return Kept.join([Kept.whole(sum(rollout.sampled)) if rollout.kept is None else rollout.kept for rollout in rollouts])
