"""How much of training's time its rewards take, by the clock, and what can be done about it."""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from tilt.rewards.programs import Code
from tilt.rewards.spec import Function, Given, Judge, Model, Process, RewardSpec, is_function

SHARE, STEPS, LEAST = 0.3, 5, 0.2  # of the time; over so many calls; seconds a call


@dataclass(frozen=True)
class Slow:
    """A part that takes more than SHARE of the time: seconds a batch, and the share."""

    part: str
    seconds: float
    share: float

    def __str__(self) -> str:
        return f"{self.part} takes {self.seconds:.2g} s a batch, {self.share:.0%} of the time of training."


@dataclass
class Pace:
    """Told the seconds of each part at every batch of training, it names each slow part once, STEPS batches after the first, unless a batch takes less than LEAST."""

    clock: Callable[[], float] = time.monotonic
    _seen: deque[tuple[float, Mapping[str, float]]] = field(default_factory=lambda: deque(maxlen=STEPS + 1))
    _named: set[str] = field(default_factory=set)

    def step(self, seconds: Mapping[str, float]) -> Slow | None:
        """The slowest part that is to be named now; the time is that between the ends of batches, so all that a step does is in it."""
        self._seen.append((self.clock(), dict(seconds)))
        if len(self._seen) <= STEPS:
            return None
        (began, _), *rest = self._seen
        total = Counter[str]()
        for _, each in rest:
            total.update(each)  # type: ignore[arg-type]
        passed = rest[-1][0] - began
        for name, taken in total.most_common():
            if name not in self._named and taken > SHARE * passed and taken > LEAST * STEPS:
                self._named.add(name)
                return Slow(name, taken / STEPS, taken / passed)
        return None


def advice(spec: RewardSpec) -> str:
    """What makes a slow part faster, by what it is and what is set already."""
    source = spec.source
    if isinstance(source, Given):
        return "Give it as file.py:func with `isolate: true`, and `overlap: true` or `workers` will let it judge beside generation or in several processes."
    if isinstance(source, Process) and is_function(source.path):
        return "It judges steps in this process; make the function itself faster."
    if isinstance(source, Model | Judge | Process):
        return "A smaller model, or shorter answers, would take less."
    if isinstance(source, Function) and not source.isolate:
        return "With `isolate: true`, `overlap: true` lets it judge while answers are generated, and `workers: 2` asks two processes for the answers to different prompts."
    if isinstance(source, Function | Code):
        more = f"`workers: {2 * (source.workers or 1)}` would ask more processes"
        return f"{more}." if source.overlap else f"`overlap: true` would let it begin while answers are generated; {more}."
    return "A rule runs in this process: make its pattern cheaper, or its answers shorter."
