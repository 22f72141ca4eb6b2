"""A run from its start, or from where it was left, to its end: directory, lock, journal, checkpoints, signals and watchdog around a recipe's loop."""

from __future__ import annotations

import errno
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tilt.errors import TiltError, UsageError
from tilt.inspect.book import Book
from tilt.inspect.report import write_report
from tilt.learning.exhaustion import exhausted
from tilt.recipes import state as states
from tilt.recipes.alerts import Watcher
from tilt.recipes.finishing import Result
from tilt.recipes.memory import advice
from tilt.recipes.settings import Run, Training
from tilt.recipes.taking_up import NEW, RESULT, Start, best, changed, chosen, completed, cut, placed
from tilt.runs import checkpoints
from tilt.runs.directory import RunDirectory, taken_up
from tilt.runs.journal import Journal, read_metrics
from tilt.runs.lock import Lock
from tilt.runs.signals import ASKED, heeded
from tilt.runs.text import size
from tilt.runs.trackers import Trackers, check
from tilt.runs.watchdog import Watchdog


@dataclass
class Session:
    """What a recipe's loop has around it. `state` is filled by the recipe before `steps` begins; `recording` holds the seconds that each step's record took,
    without (False) and with token channels."""

    config: Run
    directory: RunDirectory
    journal: Journal
    total: int
    start: Start = NEW
    state: states.State = field(default_factory=states.State)
    writer: checkpoints.Writer = field(default_factory=checkpoints.Writer)
    watchdog: Watchdog | None = None
    watcher: Watcher | None = None
    at: int = 0
    phase: str = ""
    recording: dict[bool, list[float]] = field(default_factory=lambda: {False: [], True: []})
    changed: bool = False
    _saved: float = field(default_factory=time.monotonic)

    @property
    def memory(self) -> dict[str, Any]:
        """Plain values that the loop carries from step to step."""
        return self.state.memory

    @property
    def replays(self) -> bool:
        """Whether steps are done again to be compared, not to be kept."""
        return self.start.until is not None

    def steps(self, total: int) -> Iterator[int]:
        """The steps that are left of 0, 1, …, total - 1. Between two of them the run is saved where it is time, and ends where it was asked to."""
        self.at = self._begin()
        end = total if self.start.until is None else min(total, self.start.until)
        for step in range(self.at, 0 if self.memory.get("ended") else end):
            self.watch("step")
            yield step
            self.at = step + 1
            if ASKED.by:
                self._interrupted(ASKED.by)
            if self.at < self.total and self._due():
                self.save()
        if self.replays:
            raise Reached

    def end(self, taken: int) -> None:
        """The loop ends after so many steps, before its last; if the run is resumed from there, it ends there again."""
        self.at = self.memory["ended"] = taken

    def alert(self, step: int, metrics: Mapping[str, float]) -> None:
        """Say what is unhealthy in this step, and end the run with a checkpoint where that is asked for."""
        if self.watcher is None:
            return
        for name, text in self.watcher.see(metrics).items():
            self.journal.note(f"alert      {name}, step {step}: {text}")
            if name in self.watcher.limits.stop:
                self.at = step + 1
                if self.config.saves is not None:
                    self.save()
                    self.writer.wait()
                raise TiltError(
                    f"stopped after step {step} by the alert `{name}`: {text}\n  the run can be resumed: --resume, with other settings"
                )

    def watch(self, phase: str) -> None:
        """A phase of this name begins."""
        self.phase = f"`{phase}` of step {self.at}"
        if self.watchdog is not None:
            self.watchdog.phase(self.phase)

    def _begin(self) -> int:
        """The first step: 0, or that of the checkpoint, whose state is taken up; what was written after it is cut off."""
        self._room()
        if self.watcher is not None:
            self.state.add(alerts=states.attributes(self.watcher, "norms", "begun", "standing"))
        if not self.start.resume:
            return 0
        place = chosen(self.directory, self.start, self.journal.note)
        step = 0
        if place is not None:
            self.state.take_up(place)
            step = int(self.memory.pop("taken"))
            if self.changed:
                self.memory.pop("ended", None)
        cut(self.directory, step, self.memory.pop("samples", 0))
        self.journal.note(
            f"resumed    from {place.name}" if place is not None else "resumed    from the start: there is no whole checkpoint yet"
        )
        return step

    def _room(self) -> None:
        """Say what a checkpoint takes, and refuse to begin where the disk cannot hold two."""
        if self.state.published is None or self.config.saves is None:
            return
        model = self.state.published[0]
        trained = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
        held = sum(t.numel() * t.element_size() for part in self.state.parts.values() for t in part.tensors().values())
        each = sum(p.numel() * p.element_size() for p in model.parameters()) + 2 * trained + held
        free, more = shutil.disk_usage(self.directory.path).free, max(1, 2 - len(checkpoints.saved(self.directory.checkpoints)))
        if free < more * each:
            raise UsageError(
                f"{self.directory.path}: the disk has {size(free)} free, and {'two checkpoints need' if more == 2 else 'another checkpoint needs'} {size(more * each)}\n"
                "  free some space, choose another root, or set save to false"
            )
        self.journal.note(f"saving     {self.config.saves.saving}; a checkpoint takes at most {size(each)}, the disk has {size(free)}")

    def _due(self) -> bool:
        given = self.config.saves
        if given is None:
            return False
        minutes = given.save_minutes and time.monotonic() - self._saved >= 60 * given.save_minutes
        return bool(minutes or (given.save_every and self.at % given.save_every == 0))

    def save(self) -> None:
        """A checkpoint of the run as it is: copied at once, written while training goes on."""
        if self.at in checkpoints.saved(self.directory.checkpoints):
            return
        self.watch("save")
        self.writer.wait()
        put, step = self.taken(), self.at
        self.journal.sync()
        self.writer.begin(lambda: self._write(put, step))
        self._saved = time.monotonic()

    def taken(self, prepare: Callable[[], None] = lambda: None) -> Callable[[Path], None]:
        """A copy of the run's state, as a function that writes it."""
        samples = self.directory.samples.stat().st_size if self.directory.samples.exists() else 0
        self.state.memory |= {"taken": self.at, "samples": samples}
        return self.state.taken(prepare)

    def _write(self, put: Callable[[Path], None], step: int) -> Path:
        try:
            place = checkpoints.save(self.directory.checkpoints, step, put)
        except OSError as error:
            raise TiltError(
                f"the checkpoint of step {step} could not be written: {error}\n  what was saved before is whole: mend the disk, then --resume"
            ) from error
        self._forget(step)
        return place

    def _forget(self, newest: int) -> None:
        """Delete all but the last `keep_last` checkpoints and the best by `keep_best`."""
        steps, given = checkpoints.saved(self.directory.checkpoints), self.config.saves
        if given is None or not given.keep_last:
            return
        kept = {newest, *steps[-given.keep_last :]}
        if given.keep_best is not None:
            kept |= best(self.directory, steps, given.keep_best)
        for step in steps:
            if step not in kept:
                checkpoints.remove(checkpoints.path_of(self.directory.checkpoints, step))

    def _interrupted(self, by: str) -> None:
        """Save and end: the process was asked to."""
        if self.config.saves:
            self.save()
            self.writer.wait()
        self.journal.note(f"stopped    by {by} after step {self.at - 1}" + (": saved, --resume goes on" if self.config.saves else ""))
        raise KeyboardInterrupt

    def finish(
        self, before: Mapping[str, float], after: Mapping[str, float], answers: Iterable[tuple[str, str, str]] = (), *,
        at: int, prepare: Callable[[], None] = lambda: None,
    ) -> Result:  # fmt: skip
        """The last checkpoint, of step `at`, and the run's result on disk. `prepare` may change the published model once the state is copied."""
        self.at = at
        self.writer.wait()
        self.watch("save")
        sought = None if self.config.saves is None else self.config.saves.keep_best
        if sought is not None and not any(sought in row for row in read_metrics(self.directory.metrics)):
            self.journal.note(f"keep_best  no step recorded `{sought}`, so no checkpoint was the best by it")
        place = self.directory.path
        if self.config.saves:
            place = checkpoints.path_of(self.directory.checkpoints, at)
            if place.exists():
                checkpoints.remove(place)
            put = self.taken(prepare)
            self.journal.sync()
            self._write(put, at)
        else:
            prepare()
        return completed(Result(self.directory, place, dict(before), dict(after), tuple(answers)))


class Reached(Exception):
    """A replay has come to the step that it was to come to."""


@contextmanager
def session(
    config: Run, recipe: str, model: str, total: int, important: tuple[str, ...], *, label: str = "", start: Start = NEW
) -> Iterator[Session]:
    """The run's directory, new or taken up, locked, with its journal. A new run's name starts with `label`, else with the recipe."""
    with ExitStack() as ending:
        check(config.track)
        ending.enter_context(writable(Path(config.root)))
        directory, resumed = placed(config, recipe, model, label, start)
        ending.callback(reported, directory, start)
        ending.callback(Lock(directory.path).release)
        notes = changed(directory, config, recipe) if resumed else []
        if resumed:
            taken_up(directory, sys.argv)
        journal = Journal(directory, total=total, important=important, log_every=config.log_every, quiet=config.quiet)
        watchdog = Watchdog(60 * config.watchdog, directory.log)
        ending.callback(watchdog.end)
        found = Session(config, directory, journal, total, start, watchdog=watchdog, changed=bool(notes))
        ending.callback(found.writer.quietly)
        if isinstance(config, Training):
            found.watcher = Watcher(config.alerts)
        for each in (roomy(found), journal, heeded()):
            ending.enter_context(each)
        if config.track and start.rewards is None:
            journal.trackers = Trackers(config.track, directory.path, config.model_dump(mode="json", fallback=str), journal.note)
            ending.callback(journal.trackers.close)
        for note in notes:
            journal.note(note)
        yield found
        found.writer.wait()


def reported(directory: RunDirectory, start: Start) -> None:
    """The report of a run that has come to its end; what goes wrong with it is a line of the log and no more."""
    if not (directory.path / RESULT).exists() or start.rewards is not None:
        return
    try:
        write_report(Book(directory.path), directory.path / "report.html")
    except Exception as error:
        with suppress(OSError), directory.log.open("a", encoding="utf-8") as log:
            log.write(f"report     could not be written: {type(error).__name__}: {error}\n")


DISK = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the quota is used up",
    errno.EROFS: "the disk can only be read",
    errno.EIO: "the disk fails",
}


@contextmanager
def writable(place: Path) -> Iterator[None]:
    """A disk that takes nothing more ends the run with a sentence; what was saved before is whole."""
    try:
        yield
    except OSError as error:
        if error.errno not in DISK:
            raise
        raise TiltError(
            f"{place} cannot be written: {DISK[error.errno]} ({error})\n  what was saved is whole: mend the disk, then --resume"
        ) from error


@contextmanager
def roomy(run: Session) -> Iterator[None]:
    """Where memory runs out, the run ends with its sizes and what to try."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not exhausted(error):
            raise
        raise TiltError(advice(run.config, run.phase, error)) from error


def stage_start(place: Path) -> Start:
    """How a stage of a pipeline begins: new, or taken up where it was left."""
    ASKED.heed()
    return Start(resume=True) if place.is_dir() else NEW
