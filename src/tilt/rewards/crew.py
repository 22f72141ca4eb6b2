"""Several workers for one function: each call goes to one that is free."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from queue import SimpleQueue
from typing import Any

from tilt.rewards.isolate import Isolated


@dataclass
class Crew:
    """`count` workers like the first. What a function answers must not depend on what it was asked before: no call knows which worker it goes to."""

    first: Isolated
    count: int
    members: list[Isolated] = field(init=False)
    _free: SimpleQueue[Isolated] = field(default_factory=SimpleQueue)

    def __post_init__(self) -> None:
        self.members = [self.first, *(replace(self.first) for _ in range(self.count - 1))]
        for member in self.members:
            self._free.put(member)

    def __call__(self, arguments: Mapping[str, Any], seconds: float | None = None) -> Any:
        member = self._free.get()
        try:
            return member(arguments, seconds)
        finally:
            self._free.put(member)

    @property
    def label(self) -> str:
        return self.first.label

    @property
    def told(self) -> Mapping[str, Any]:
        return self.first.told

    @property
    def restarts(self) -> int:
        return sum(member.restarts for member in self.members)

    def start(self) -> None:
        """Start the first, so that a file that does not load is told of once, then the others side by side."""
        self.first.start()
        if rest := self.members[1:]:
            with ThreadPoolExecutor(len(rest)) as pool:
                list(pool.map(Isolated.start, rest))

    def stop(self) -> None:
        for member in self.members:
            member.stop()
