"""Tests of a changed source file, each in a process forked from one that has loaded the heavy libraries and nothing of tilt."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import json
import os
import resource
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
MEMORY = 16 * 2**30
"""Bytes of address space that a child may use: a mutant that multiplies sizes ends with an error instead of taking the machine along."""


@dataclass(frozen=True)
class Job:
    """Tests to run (files or ids, in this order) with `module` made from `source`; `seconds` until it counts as hanging."""

    name: str
    module: str | None
    source: str
    tests: tuple[str, ...]
    seconds: float = 300.0
    everything: bool = False


@dataclass(frozen=True)
class Outcome:
    """How the tests went: "passed", "failed" (by the test `by`), "hung", or "broken" (not even imported)."""

    job: Job
    verdict: str
    by: str
    seconds: float


def prepare() -> None:
    """Load what every child needs; nothing is computed here, so that no thread is lost in a fork."""
    os.environ |= {
        "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "TOKENIZERS_PARALLELISM": "false", "TILT_SHAPES": "0",
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
    }  # fmt: skip
    os.chdir(ROOT)
    sys.path.insert(0, str(ROOT / "src"))
    import hypothesis
    import jaxtyping  # noqa: F401
    import numpy  # noqa: F401
    import pytest  # noqa: F401
    import torch
    import transformers  # noqa: F401

    torch.set_num_threads(1)
    quick = (hypothesis.Phase.explicit, hypothesis.Phase.generate)
    hypothesis.settings.register_profile("mutants", phases=quick, derandomize=True, database=None, deadline=None)
    hypothesis.settings.load_profile("mutants")
    assert not any(name.split(".")[0] == "tilt" for name in sys.modules), "tilt must be imported in the children only"


def run(jobs: Iterable[Job], workers: int, tell: Callable[[Outcome], None]) -> list[Outcome]:
    """The outcomes of all jobs, `workers` at a time; `tell` is called with each as it comes."""
    waiting, running, found = iter(jobs), {}, []
    with tempfile.TemporaryDirectory() as folder:
        while True:
            while len(running) < workers and (job := next(waiting, None)) is not None:
                said = Path(folder) / f"{len(found)}-{len(running)}-{time.monotonic_ns()}"
                running[_start(job, said)] = (job, said, time.monotonic())
            if not running:
                return found
            for outcome in _finished(running):
                found.append(outcome)
                tell(outcome)
            time.sleep(0.02)


def _start(job: Job, said: Path) -> int:
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        os.setsid()
        code = 70
        try:
            code = _tested(job, said)
        finally:
            os._exit(code)
    return child


def _finished(running: dict[int, tuple[Job, Path, float]]) -> Iterator[Outcome]:
    for child, (job, said, begun) in list(running.items()):
        seconds = time.monotonic() - begun
        done, status = os.waitpid(child, os.WNOHANG)
        if not done and seconds > job.seconds:
            os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)
            status = None
        elif not done:
            continue
        del running[child]
        record = said.with_suffix(".json")
        failed = json.loads(record.read_text()) if record.exists() else []
        code = None if status is None else os.waitstatus_to_exitcode(status)
        verdict = "hung" if code is None else "passed" if code == 0 else "failed" if failed else "broken"
        yield Outcome(job, verdict, " ".join(failed), seconds)


def _tested(job: Job, said: Path) -> int:
    """In the child: pytest's exit code, its output in `said`, the ids of the tests that failed in `said`.json."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    output = os.open(said, os.O_WRONLY | os.O_CREAT)
    os.dup2(output, 1)
    os.dup2(output, 2)
    if job.module is not None:
        sys.meta_path.insert(0, Changed(job.module, job.source))
    import pytest
    import pytest_timeout

    watch = Watch(said.with_suffix(".json"))
    arguments = ["-q", "--tb=short", "-p", "no:cacheprovider", "-o", "timeout=60", *([] if job.everything else ["-x"])]
    return int(pytest.main([*arguments, *job.tests], plugins=[watch, pytest_timeout]))


class Watch:
    """Runs one item of every test before the second of any, and keeps the ids of those that fail."""

    def __init__(self, record: Path) -> None:
        self.record = record
        self.failed: list[str] = []

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        count: dict[str, int] = {}
        turn = {}
        for item in items:
            name = item.nodeid.split("[")[0]
            turn[item] = count[name] = count.get(name, 0) + 1
        items.sort(key=lambda item: turn[item])

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed:
            self.failed.append(report.nodeid)
            self.record.write_text(json.dumps(self.failed))


class Changed(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Imports one module from a source text instead of its file."""

    def __init__(self, module: str, source: str) -> None:
        self.module, self.source = module, source

    def find_spec(self, name: str, path: Any, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if name != self.module:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        assert spec is not None
        spec.loader = self
        return spec

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        assert module.__file__ is not None
        exec(compile(self.source, module.__file__, "exec"), vars(module))
