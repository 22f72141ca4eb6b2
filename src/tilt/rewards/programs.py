"""Answers that are programs, scored by the tests that they pass: the tests are read here, the programs run in workers, each run in a sandbox of its own.

The sandbox is against accidents and careless output of a model: programs that loop, fork, fill memory or disk, call the network, delete files, print without
end, or exit before the test. It is not against an adversary: a program may read the files of this user (on Linux without namespaces also write them and use
the network, which the run's first lines then say), use faults of the kernel, or meddle with the interpreter in which an assertion is checked.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tilt.errors import DataError, UsageError
from tilt.isolation import answers
from tilt.rewards.crew import Crew
from tilt.rewards.isolate import GIB, Isolated
from tilt.rewards.rules import column
from tilt.rewards.text import inert

MIB = 1 << 20
SPARE = 30.0  # seconds that a call may take beyond its programs


@dataclass(frozen=True)
class Code:
    """The share of its tests that the program in an answer passes, or with `every` 1 for all of them and else 0.

    The column `tests` holds for each prompt a list of {input, output} pairs and of assertions (Python text that may use what the program defines), or JSON text
    of such a list; one text is one assertion. Each test runs the program anew: at most `seconds`, `memory` MiB, `processes`, files of `disk` MiB, `output` KiB
    printed. `program`: the answer's last fenced block, or all of it where it has none (auto), the block only (fenced), all of it (whole).
    """

    tests: str = "tests"
    every: bool = False
    program: Literal["auto", "fenced", "whole"] = "auto"
    seconds: float = 5.0
    memory: int = 512
    processes: int = 16
    disk: int = 16
    output: int = 64
    workers: int = 1
    overlap: bool = False

    def __post_init__(self) -> None:
        low = [name for name in ("seconds", "memory", "processes", "disk", "output", "workers") if not getattr(self, name) > 0]
        if low:
            raise UsageError(f"`reward.code.{low[0]}` is {getattr(self, low[0])}: expected a number above 0")
        if self.memory < 32:
            raise UsageError(f"`reward.code.memory` is {self.memory} MiB, in which Python does not start: give at least 32")

    @property
    def limits(self) -> dict[str, float]:
        return {
            "seconds": self.seconds, "memory": self.memory * MIB, "processes": self.processes, "file_size": self.disk * MIB, "output": self.output << 10,
        }  # fmt: skip


@dataclass
class Programs:
    """Programs run by workers; a call has the time that its programs may take in all."""

    settings: Code
    crew: Crew

    @classmethod
    def start(cls, settings: Code) -> Programs:
        """With its workers started; what they found that the system allows is in `crew.told`."""
        memory = 1.0 + settings.memory * MIB / GIB
        worker = Isolated(Path(answers.__file__), "score", memory=memory, processes=settings.processes + 64, trusted=True)
        made = cls(settings, Crew(worker, settings.workers))
        made.crew.start()
        return made

    def __call__(self, arguments: Mapping[str, Sequence[Any]]) -> Any:
        completions = arguments["completions"]
        given = column({k: v for k, v in arguments.items() if k not in ("prompts", "completions")}, self.settings.tests, self.settings)
        tests = [read_tests(value, i, self.settings.tests) for i, value in enumerate(given)]
        runs = sum(len(own or ()) for own in tests)
        request = {
            "completions": list(completions), "tests": tests, "limits": self.settings.limits, "program": self.settings.program, "every": self.settings.every,
        }  # fmt: skip
        return self.crew(request, SPARE + runs * (self.settings.seconds + 1.0))

    @property
    def note(self) -> str:
        """What the programs are kept from here, for the run's first lines."""
        offline, read_only = (self.crew.told.get(name, False) for name in ("offline", "read_only"))
        if offline and read_only:
            return "programs in answers run apart: no network, and nothing that they can write but a folder in memory"
        lacking = [what for what, there in (("reach the network", offline), ("write this user's files", read_only)) if not there]
        return f"programs in answers can {' and '.join(lacking)}: this system allows no namespaces that would prevent it"

    @property
    def restarts(self) -> int:
        return self.crew.restarts

    def stop(self) -> None:
        self.crew.stop()


def read_tests(value: Any, number: int, name: str) -> list[Any] | None:
    """Tests as [input, output] or the text of an assertion: `[{"input": "1", "output": "2"}]` → [["1", "2"]]; None where there are none."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        with contextlib.suppress(ValueError, RecursionError):  # an assertion may begin with a bracket
            value = json.loads(value)
    if value is None:
        return None
    if isinstance(value, Mapping) and isinstance(value.get("inputs"), list) and isinstance(value.get("outputs"), list):
        pairs = zip(value["inputs"], value["outputs"], strict=False)
        same = len(value["inputs"]) == len(value["outputs"])
        value = [{"input": given, "output": expected} for given, expected in pairs] if same else 0
    found = value if isinstance(value, list | tuple) else [value]
    tests = [_test(each) for each in found]
    if not tests or None in tests:
        raise DataError(
            f"the column '{name}' holds no tests for sample {number}: {inert(str(value))}\n"
            'Give a list of {"input": …, "output": …} pairs of texts and of assertions ("assert add(1, 2) == 3").'
        )
    return tests


def _test(value: Any) -> Any:
    if isinstance(value, str):
        return value if value.strip() else None
    if isinstance(value, Mapping) and value.keys() == {"input", "output"}:
        pair = [value["input"], value["output"]]
        return pair if all(isinstance(text, str) for text in pair) else None
    return None
