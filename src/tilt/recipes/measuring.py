"""What training on given rows would take, from short trials of the verbs that the run uses: seconds and bytes of each phase, scaled to the whole run."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from time import perf_counter
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

from tilt.data.streams import Stream
from tilt.recipes.settings import Training
from tilt.runs import machine
from tilt.runs.text import duration

BUDGET = 3.0  # seconds that a step may be tried for; what takes less is tried whole
SEEN = 1000  # steps whose batches are looked at for their sizes

Item = TypeVar("Item")


@dataclass(frozen=True)
class Phase:
    """Seconds of a phase, once, and the bytes that it needs at its peak beside what stays from phase to phase."""

    seconds: float
    memory: float = 0.0

    def scaled(self, to: Reading[Item], of: Reading[Item], cut: int) -> Phase:
        """The phase of a reading from that of another which does the same."""
        whole, other = (sum(map(reading.cost, reading.rows)) for reading in (to, of))
        return Phase(self.seconds * whole / other, self.memory * filled(whole, cut) / filled(other, cut))


@dataclass(frozen=True)
class Reading(Generic[Item]):
    """Rows that a run reads so many `times` without learning from them; `work` reads some. `cost` is a row's tokens.

    `together`: much of the work is the same for one row and for many, as where answers are drawn side by side. `like` names a reading before it that does
    the same, so that only one is tried.
    """

    rows: Sequence[Item]
    work: Callable[[Sequence[Item]], object]
    times: int
    cost: Callable[[Item], int]
    together: bool = False
    like: str = ""


@dataclass(frozen=True)
class Given(Generic[Item]):
    """A run that learns from given rows, opened in `load` seconds: `update` makes ready a step on some of them, which happens when what it returns is called."""

    module: nn.Module
    device: torch.device
    rows: Sequence[Item]
    cost: Callable[[Item], int]
    update: Callable[[Sequence[Item]], Callable[[], object]]
    readings: Mapping[str, Reading[Item]]
    load: float


@dataclass(frozen=True)
class Foreseen:
    """`phases` of a run, seconds of each for one time, with its `times`; `held` bytes stay from phase to phase. `tokens` of a step in the mean, `activations`
    bytes kept for each token of a forward pass of `largest`."""

    phases: Mapping[str, Phase]
    times: Mapping[str, int]
    held: float
    tokens: float
    largest: int
    activations: float

    @property
    def seconds(self) -> float:
        """Of the whole run."""
        return sum(phase.seconds * self.times[name] for name, phase in self.phases.items())

    @property
    def memory(self) -> float:
        """Bytes of the process (a GPU: of its tensors) at the peak."""
        return self.held + max(phase.memory for phase in self.phases.values())


def foresee(config: Training, given: Given[Item], steps: int, batch: int) -> Foreseen:
    """Try an optimizer step on the smallest row, on an eighth of a batch and on as much of the largest batch as the budget allows; and a part of each reading.

    The models in memory are moved by it, and nothing is written.
    """
    numbers, cut = Stream(range(len(given.rows)), config.seed), config.micro_tokens
    costs = [given.cost(row) for row in given.rows]
    sizes = [sum(costs[i] for i in numbers.draw(step, batch)) for step in range(min(steps, SEEN))]
    drawn = numbers.draw(sizes.index(max(sizes)), batch)
    smallest = min(drawn, key=costs.__getitem__)

    def update(chosen: Sequence[int]) -> Callable[[], object]:
        return given.update([given.rows[i] for i in chosen])

    update([smallest])()  # makes the optimizer's state
    beside = timed(given.device, update([smallest])).seconds
    few = drawn[: max(1, len(drawn) // 8)]
    with saved(given.module) as kept:
        first = timed(given.device, update(few)).seconds
    share = sum(costs[i] for i in few)
    ahead = beside + max(0.0, first - beside) * max(sizes) / share
    chosen = drawn[: len(drawn) if ahead <= BUDGET else max(len(few), int(len(drawn) * BUDGET / ahead))]
    tried, work = sum(costs[i] for i in chosen), update(chosen)
    machine.trim()  # what the trials before have left
    held = machine.resident(given.device)
    found = timed(given.device, work)
    seconds = found.seconds
    if seconds < BUDGET / 3:  # again, with the memory that it asked for
        seconds = timed(given.device, update(chosen)).seconds
    activations, mean = sum(kept.values()) / min(share, cut), sum(sizes) / len(sizes)
    slope = max(0.0, seconds - beside) / max(1, tried - costs[smallest])
    more = activations * (min(max(sizes), cut) - min(tried, cut))
    phases = {"load": Phase(given.load)}
    able = BUDGET / max(slope / 3, 1e-9)  # a token that is read is a third of one that is trained on
    for name, reading in given.readings.items():
        near = given.readings.get(reading.like)
        phases[name] = read(given.device, reading, cut, able) if near is None else phases[reading.like].scaled(reading, near, cut)
    phases |= {"update": Phase(seconds + slope * (mean - tried), found.memory + more)}
    times = {"load": 1} | {name: reading.times for name, reading in given.readings.items()} | {"update": steps}
    return Foreseen(phases, times, held, mean, min(max(sizes), cut), activations)


def read(device: torch.device, reading: Reading[Item], cut: int, able: float) -> Phase:
    """What a reading takes, from a forward pass of as many rows as fill one, or as have about `able` tokens, and one of a quarter."""
    ends = list(accumulate(map(reading.cost, reading.rows)))
    most = min(able, filled(ends[-1], cut))
    few, more = (max(1, bisect_right(ends, share * most)) for share in (0.25, 1))
    less, tokens, total = ends[few - 1], ends[more - 1], ends[-1]
    machine.trim()
    base = machine.resident(device)
    short = timed(device, lambda: reading.work(reading.rows[:few]))
    first = machine.peak(device) - base
    long = timed(device, lambda: reading.work(reading.rows[:more]))
    second = machine.peak(device) - base
    growth, slope = second / tokens, long.seconds / tokens
    if tokens > less:
        growth = max(0.0, second - first) / (tokens - less)
        slope = max(0.0, long.seconds - short.seconds) / (tokens - less) if reading.together else slope
    return Phase(long.seconds + slope * (total - tokens), max(0.0, second + growth * (filled(total, cut) - min(tokens, cut))))


def filled(tokens: float, cut: int) -> float:
    """Tokens of one of the forward passes, of like size and at most `cut` each, in which so many are read: 50 with a cut of 20 → 16.7."""
    return tokens / -(-tokens // cut)


def timed(device: torch.device, work: Callable[[], object]) -> Phase:
    """Seconds of some work, and the bytes at its peak above those before it."""
    before = machine.resident(device)
    machine.forget_peak(device)
    began = perf_counter()
    work()
    machine.wait(device)
    return Phase(perf_counter() - began, max(0, machine.peak(device) - before))


@contextmanager
def saved(*modules: nn.Module | None) -> Iterator[dict[int, int]]:
    """Inside, the storages that are kept for a backward pass are noted, parameters left out: address → bytes."""
    own = {p.untyped_storage().data_ptr() for module in modules if module is not None for p in module.parameters()}
    found: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()  # the tensor itself would keep its graph, and the graph it

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        yield found


# --- what is said of it --------------------------------------------------------------------------------------------------


def parameters(module: nn.Module) -> tuple[int, int]:
    """Bytes of all parameters, and of those that are trained."""
    sizes = [(p.numel() * p.element_size(), p.requires_grad) for p in module.parameters()]
    return sum(size for size, _ in sizes), sum(size for size, trained in sizes if trained)


def size(count: float) -> str:
    """Bytes in MiB or GiB."""
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{max(count / 2**20, 0.1):.1f} MiB"


def said(module: nn.Module, found: Foreseen, held: Mapping[str, int]) -> list[str]:
    """Lines for the plan: bytes by what they are for, seconds of the whole and of each phase. Adam keeps two numbers for each trained one."""
    every, trained = parameters(module)
    parts = {
        "weights": every, **held, "Adam": 2 * trained, "gradients": trained, f"activations of {found.largest:,} tokens": found.activations * found.largest,
    }  # fmt: skip
    rest, most = found.memory - sum(parts.values()), max(phase.memory for phase in found.phases.values())
    counted = ", ".join(f"{name} {size(count)}" for name, count in parts.items() if count)
    once = ", ".join(
        f"{name} {found.times[name]} × {phase.seconds:.2f} s" if found.times[name] > 1 else f"{name} {phase.seconds:.2f} s"
        for name, phase in found.phases.items()
    )
    phases = ", ".join(f"{name} {phase.seconds:.2f} s + {size(phase.memory)}" for name, phase in found.phases.items())
    return [
        f"memory     about {size(found.memory)} at the peak, {size(most)} of it for the largest phase: {counted}, Python, its libraries and all else {size(max(0, rest))}",
        f"time       about {duration(found.seconds)}: {once}; {found.tokens / max(found.phases['update'].seconds, 1e-9):,.0f} tokens a second; checkpoints come on top",
        f"phases     {phases}; tried here on parts of a step and scaled",
    ]
