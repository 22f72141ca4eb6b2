"""The generation engine: prompts are read once per group, finished rows leave at once, and waiting ones take their place."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from tilt.data.rollouts import Sampling
from tilt.errors import NumericError, UsageError
from tilt.kept import Kept
from tilt.models import compat
from tilt.models.heads import head_function
from tilt.models.work import cached_bytes
from tilt.sampling.cache import CHUNK, Ints, rounded
from tilt.sampling.drawing import Head, choose, nucleus
from tilt.sampling.forward import PREFILL_TOKENS, Both, Forward, forward_of
from tilt.sampling.randomness import Keys, uniforms
from tilt.sampling.stopping import Stops


@dataclass(frozen=True)
class Request:
    """A prompt and one key of randomness per answer wanted; no answer is longer than `room`."""

    tokens: Ints
    keys: Keys
    room: int


@dataclass(frozen=True)
class Answer:
    """The sampled tokens, the stop token included, their log-probabilities, why they ended, and what each was chosen among where that is kept."""

    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    stop: Literal["stop", "length"]
    kept: Kept | None = None


@dataclass(frozen=True)
class Mask:
    """Answers are drawn inside the top-p sets of another model of the same vocabulary; the tokens that end an answer are always in (NLPO, 2210.01241)."""

    lm: PreTrainedModel
    top_p: float


@torch.inference_mode()
def generate(
    lm: PreTrainedModel,
    requests: Sequence[Request],
    sampling: Sampling,
    stops: Stops,
    slots: int,
    mask: Mask | None = None,
    finished: Callable[[int, list[Answer]], None] | None = None,
    cache: int | None = None,
) -> list[list[Answer]]:
    """Answers to each request, in order, with at most `slots` rows in one forward and `cache` bytes of keys and values (None: as many as it takes).

    What is drawn depends neither on `slots` nor on the company, nor on who waited or began again for want of memory.
    `finished` is told of each request as soon as it and all before it have ended: its number and its answers, without the sets that are kept.
    """
    places = None if cache is None else planned(cache, [lm] if mask is None else [lm, mask.lm], requests)
    queue = Queue(requests, slots)
    with evaluating(lm), nullcontext() if mask is None else evaluating(mask.lm):
        forward, head, allowed = _reader(lm, mask, sampling, min(slots, queue.total), places)
        while not queue.finished:
            queue.yield_room(forward)
            hidden = [forward.decode(queue.newest, queue.answered - 1)] if len(queue.active) else []
            hidden += queue.enter(forward)
            together = torch.cat(hidden)
            chances = torch.from_numpy(uniforms(queue.keys[queue.active], queue.position)).to(together.device)
            drawn = choose(head, together, len(stops.ends), chances, sampling, allowed)
            ended = queue.record(drawn.tokens.cpu().numpy(), drawn.logprobs.double().cpu().numpy(), stops, drawn.kept)
            queue.leave(forward, ended)
            if finished is not None and ended.any():
                for number, answers in queue.complete():
                    finished(number, answers)
    return queue.results()


def planned(cache: int, models: Sequence[PreTrainedModel], requests: Sequence[Request]) -> int:
    """Tokens whose keys and values fit into `cache` bytes; each request must fit when it is alone."""
    each = sum(cached_bytes(lm) for lm in models)
    needed = max((rounded(len(r.tokens)) + rounded(r.room) for r in requests), default=0)
    if needed > cache // each:
        raise UsageError(
            f"sampling: the cache may hold {cache // each} tokens, and one answer with its prompt needs {needed} ({each:,} bytes each).\n"
            f"Set sampling.cache_gib to at least {needed * each / 2**30:.3g}, or shorten sampling.max_tokens."
        )
    return cache // each


def _reader(
    lm: PreTrainedModel, mask: Mask | None, sampling: Sampling, slots: int, places: int | None
) -> tuple[Forward, Head, Head | None]:
    """What reads the texts, and from its hidden states [rows, D]: the scores [rows, V], and which tokens a mask allows [rows, V]."""
    forward, head = forward_of(lm, slots, places), head_function(lm)
    if mask is None:
        return forward, head, None
    masking, width = head_function(mask.lm), compat.head_of(lm).weight.shape[1]

    def allowed(hidden: Tensor) -> Tensor:
        return nucleus(masking(hidden[:, width:]), sampling.temperature, mask.top_p, sampling.stop_ids)

    return Both(forward, forward_of(mask.lm, slots, places)), lambda hidden: head(hidden[:, :width]), allowed


@contextmanager
def evaluating(lm: PreTrainedModel) -> Iterator[None]:
    """Dropout off inside; every module's mode restored after."""
    modes = [(module, module.training) for module in lm.modules()]
    lm.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


class Queue:
    """All answers wanted, numbered prompt by prompt: `active` [rows] are being written, `again` and those from `next` on wait, the others are done.

    Columns over answers are arrays; Python touches one answer only when it ends. `groups` are the prompts in the cache, by request number.
    """

    def __init__(self, requests: Sequence[Request], slots: int) -> None:
        counts = np.array([len(r.keys) for r in requests], dtype=np.int64)
        self.requests, self.slots, self.total = requests, slots, int(counts.sum())
        self.request = np.repeat(np.arange(len(requests)), counts)
        self.keys = np.concatenate([r.keys for r in requests]) if requests else np.zeros(0, dtype=np.uint64)
        self.room = np.repeat(np.array([r.room for r in requests], dtype=np.int64), counts)
        self.prompt_length = np.repeat(np.array([len(r.tokens) for r in requests], dtype=np.int64), counts)
        self.length = np.zeros(self.total, dtype=np.int64)
        self.tokens = np.zeros((self.total, 64), dtype=np.int64)
        self.logprobs = np.zeros((self.total, 64))
        self.done: list[Answer | None] = [None] * self.total
        self.sets: list[tuple[Ints, Kept]] = []  # of each step where sets are kept: the answers that got a token, and its set for each
        self.unfinished, self.counts = counts.copy(), counts
        self.again = np.zeros(0, dtype=np.int64)  # answers that lost their place, to be begun again
        self.next, self.active, self.groups = 0, np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64)
        self.group = np.full(len(requests), -1, dtype=np.int64)  # each request's place among the groups
        self.told = 0  # requests that `complete` has given out
        self.opening: Tensor | None = None  # hidden state after each group's prompt, [groups, D]

    @property
    def finished(self) -> bool:
        return not self.waiting and not len(self.active)

    @property
    def waiting(self) -> int:
        """Answers without a row."""
        return self.total - self.next + len(self.again)

    @property
    def answered(self) -> Ints:
        """Tokens sampled so far by each active row."""
        return self.length[self.active]

    @property
    def newest(self) -> Ints:
        """Each active row's last sampled token."""
        return self.tokens[self.active, self.answered - 1]

    @property
    def position(self) -> Ints:
        """Position in the text, prompt included, of the token that each active row samples next: it numbers the row's uniforms."""
        return self.prompt_length[self.active] + self.answered

    def enter(self, forward: Forward) -> list[Tensor]:
        """Fill the free slots from the queue once enough are free to be worth a prefill; the hidden states [entering, D] their first tokens come from."""
        free, waiting = self.slots - len(self.active), self.waiting
        if free < min(waiting, max(1, self.slots // 16)) or not waiting:
            return []
        new, fresh = self._admitted(forward, min(free, waiting))
        if not len(new):
            return []
        self.next += max(0, len(new) - len(self.again))
        self.again = self.again[len(new) :]
        self.active = np.concatenate((self.active, new))
        for part in batches(fresh, [len(self.requests[i].tokens) for i in fresh]):
            hidden = forward.prefill([self.requests[i].tokens for i in part], len(self.groups))
            self.opening = hidden if self.opening is None else torch.cat((self.opening[: len(self.groups)], hidden))
            self.group[part] = np.arange(len(self.groups), len(self.groups) + len(part))
            self.groups = np.concatenate((self.groups, part))
        forward.arrange(self.group[self.request[self.active]])
        assert self.opening is not None
        return [self.opening[torch.from_numpy(self.group[self.request[new]]).to(self.opening.device)]]

    def _admitted(self, forward: Forward, count: int) -> tuple[Ints, Ints]:
        """The first `count` waiting answers, or half of that, or a quarter, …, as there is room for; and which requests among theirs are not in the cache."""
        while count:
            new = np.concatenate((self.again, np.arange(self.next, min(self.total, self.next + count))))[:count]
            fresh = np.unique(self.request[new])
            fresh = fresh[self.group[fresh] < 0]
            longest = int(self.answered.max()) + CHUNK if len(self.active) else 1
            widest = max(len(self.requests[i].tokens) for i in [*self.groups.tolist(), *fresh.tolist()])
            if forward.fits(len(self.active) + count, longest, len(self.groups) + len(fresh), widest):
                return new, fresh
            count //= 2
            if not count and not len(self.active) and len(self.groups):
                self._drop(forward, np.ones(len(self.groups), dtype=bool))
                count = 1
        return np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64)

    def yield_room(self, forward: Forward) -> None:
        """Where the next token of every row does not fit: prompts that no row answers go, then the rows with the fewest tokens, to be begun again later.

        Their randomness is counted, so they will draw what they drew. The row with the most tokens stays, and so all end.
        """
        while len(self.active):
            widest = max(len(self.requests[i].tokens) for i in self.groups.tolist())
            if forward.fits(len(self.active), int(self.answered.max()), len(self.groups), widest):
                return
            idle = ~np.isin(self.groups, self.request[self.active])
            if idle.any():
                self._drop(forward, idle)
                continue
            assert len(self.active) > 1, "an answer that is alone fits: `planned` has seen to it"
            lost = np.zeros(len(self.active), dtype=bool)
            lost[np.lexsort((-self.active, self.answered))[: max(1, len(self.active) // 8)]] = True
            self._begin_again(self.active[lost])
            self._vacate(forward, lost)
            forward.arrange(self.group[self.request[self.active]])

    def _begin_again(self, answers: Ints) -> None:
        """These answers have no tokens any more and wait before all others."""
        self.length[answers] = 0
        self.again = np.sort(np.concatenate((self.again, answers)))
        kept = [(owners, sets, ~np.isin(owners, answers)) for owners, sets in self.sets]
        self.sets = [(owners[stay], sets.take(torch.from_numpy(np.flatnonzero(stay)))) for owners, sets, stay in kept]

    def record(self, tokens: Ints, logprobs: NDArray[np.float64], stops: Stops, kept: Kept | None = None) -> NDArray[np.bool_]:
        """Append one token to each active row; which rows have ended. Those that ended are answers now."""
        if not np.isfinite(logprobs).all():
            raise NumericError(
                "The policy's scores are not finite (NaN or infinity) while sampling.\nIts weights have diverged: go back to an earlier checkpoint, or lower the learning rate."
            )
        active = self.active
        if self.length[active].max() == self.tokens.shape[1]:
            self.tokens = np.concatenate((self.tokens, np.zeros_like(self.tokens)), axis=1)
            self.logprobs = np.concatenate((self.logprobs, np.zeros_like(self.logprobs)), axis=1)
        self.tokens[active, self.length[active]] = tokens
        self.logprobs[active, self.length[active]] = logprobs
        self.length[active] += 1
        if kept is not None:
            self.sets.append((active, kept))
        stopped = stops.ended(tokens, lambda row: self.tokens[active[row], : self.length[active[row]]].tolist())
        ended = stopped | (self.length[active] >= self.room[active])
        for row in np.flatnonzero(ended):
            i = active[row]
            n = self.length[i]
            self.done[i] = Answer(
                tuple(self.tokens[i, :n].tolist()), tuple(self.logprobs[i, :n].tolist()), "stop" if stopped[row] else "length"
            )
        return ended

    def leave(self, forward: Forward, ended: NDArray[np.bool_]) -> None:
        """Take ended rows out, and groups nobody needs; the last ones move into the holes."""
        if not ended.any():
            return
        np.subtract.at(self.unfinished, self.request[self.active[ended]], 1)
        self._vacate(forward, ended)
        self._drop(forward, self.unfinished[self.groups] == 0)

    def _vacate(self, forward: Forward, gone: NDArray[np.bool_]) -> None:
        """Take these rows out."""
        source, target = moves(gone)
        forward.move_rows(source, target)
        self.active = moved(self.active, source, target, gone)

    def _drop(self, forward: Forward, gone: NDArray[np.bool_]) -> None:
        """Take these groups out, and tell the forward where the rows and groups are now."""
        source, target = moves(gone)
        forward.move_groups(source, target, len(self.groups) - int(gone.sum()))
        assert self.opening is not None
        self.opening[torch.from_numpy(target)] = self.opening[torch.from_numpy(source)]
        self.group[self.groups[gone]] = -1
        self.groups = moved(self.groups, source, target, gone)
        self.group[self.groups] = np.arange(len(self.groups))
        if len(self.active):
            forward.arrange(self.group[self.request[self.active]])

    def complete(self) -> Iterator[tuple[int, list[Answer]]]:
        """Requests that have ended and all before them, each once, in order."""
        while self.told < len(self.requests) and self.unfinished[self.told] == 0:
            end = int(self.counts[: self.told + 1].sum())
            self.told += 1
            yield self.told - 1, [a for a in self.done[end - int(self.counts[self.told - 1]) : end] if a is not None]

    def results(self) -> list[list[Answer]]:
        """The answers by request."""
        done = [answer for answer in self.done if answer is not None]
        assert len(done) == self.total
        if self.sets:
            done = [replace(answer, kept=kept) for answer, kept in zip(done, self._sets_by_answer(), strict=True)]
        ends = np.cumsum(self.counts)
        return [done[end - count : end] for end, count in zip(ends, self.counts, strict=True)]

    def _sets_by_answer(self) -> list[Kept]:
        """From one list of sets per step to one per answer, in the order of its tokens."""
        owner = np.concatenate([answers for answers, _ in self.sets])
        order = torch.from_numpy(np.argsort(owner, kind="stable"))
        together = Kept.join([kept for _, kept in self.sets]).take(order)
        ends = np.cumsum(self.length)
        return [together.part(int(end - n), int(end)) for end, n in zip(ends, self.length, strict=True)]


def moves(gone: NDArray[np.bool_]) -> tuple[Ints, Ints]:
    """Which of the last places move into which holes: gone at 1 of 4 → place 3 into place 1."""
    kept = len(gone) - int(gone.sum())
    return np.flatnonzero(~gone[kept:]) + kept, np.flatnonzero(gone[:kept])


def moved(column: Ints, source: Ints, target: Ints, gone: NDArray[np.bool_]) -> Ints:
    """The column after those moves."""
    column = column.copy()
    column[target] = column[source]
    return column[: len(gone) - int(gone.sum())]


def batches(items: Ints, lengths: Sequence[int]) -> Iterator[Ints]:
    """Runs of prompts whose padded size, count × longest, stays within PREFILL_TOKENS; never an empty run."""
    start, longest = 0, 0
    for i, length in enumerate(lengths):
        if i > start and (i - start + 1) * max(longest, length) > PREFILL_TOKENS:
            yield items[start:i]
            start, longest = i, 0
        longest = max(longest, length)
    if len(items):
        yield items[start:]
