"""A run from its start, or from where it was left, to its end: directory, lock, journal, checkpoints, signals and watchdog around a recipe's loop."""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tilt.config import dump, plain
from tilt.errors import TiltError, UsageError
from tilt.learning.exhaustion import exhausted
from tilt.recipes import state as states
from tilt.recipes.alerts import Watcher
from tilt.recipes.changes import described
from tilt.recipes.finishing import Result
from tilt.recipes.memory import advice
from tilt.recipes.settings import Run, Training
from tilt.runs import checkpoints, rollout_store
from tilt.runs.directory import RunDirectory, auto_name, create, taken_up
from tilt.runs.files import atomic_write
from tilt.runs.journal import Journal, read_metrics, recorded_until
from tilt.runs.lock import Lock
from tilt.runs.secrets import masked
from tilt.runs.signals import ASKED, heeded
from tilt.runs.text import size
from tilt.runs.watchdog import Watchdog

RESULT = "result.json"


@dataclass(frozen=True)
class Start:
    """How a run begins: new; or `resume`d, from its last whole checkpoint or from that of `step`. A replay ends before step `until`, evaluates nothing, and
    takes `rewards` from the rollouts in that folder."""

    resume: bool = False
    step: int | None = None
    until: int | None = None
    rewards: Path | None = None


NEW = Start()


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
        ending.enter_context(writable(Path(config.root)))
        directory, resumed = _placed(config, recipe, model, label, start)
        ending.callback(Lock(directory.path).release)
        notes = _changed(directory, config, recipe) if resumed else []
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
        for note in notes:
            journal.note(note)
        yield found
        found.writer.wait()


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


def _placed(config: Run, recipe: str, model: str, label: str, start: Start) -> tuple[RunDirectory, bool]:
    """The directory, and whether it was there."""
    if start.resume and config.name is not None and (path := Path(config.root) / config.name).is_dir():
        place = RunDirectory(path)
        if not place.config.is_file():
            raise UsageError(f"{path} is not the directory of a run: it has no config.yaml")
        return place, True
    place = create(config.root, config.name or auto_name(label or recipe, model), config_yaml=written(config, recipe), command=sys.argv)
    return place, False


def _changed(place: RunDirectory, config: Run, recipe: str) -> list[str]:
    """What the configuration changes of the run that is taken up, key by key; what would make it another run is refused."""
    lines = described(place.config, {"recipe": recipe} | plain(recorded(config)[0]))
    if lines:
        number = 1 + len(list(place.path.glob("config.before_*.yaml")))
        shutil.copyfile(place.config, place.path / f"config.before_{number}.yaml")
        atomic_write(place.config, masked(written(config, recipe)))
    return [f"changed    {line}" for line in lines]


def written(config: Run, recipe: str) -> str:
    """config.yaml: the resolved configuration, with which `tilt run` reruns the run."""
    named, held = recorded(config)
    remark = f"# {', '.join(held)}: a Python object in hand; this file alone cannot rerun the run\n" if held else ""
    return f"{remark}recipe: {recipe}\n" + dump(named)


def recorded(run: Run) -> tuple[Run, list[str]]:
    """The configuration with names in place of the Python objects among its rewards (`module:name`), and the keys that held some."""
    held: list[str] = []

    def named(value: Any, key: str) -> Any:
        if isinstance(value, Mapping):
            return {k: named(v, f"{key}.{k}") for k, v in value.items()}
        if isinstance(value, list | tuple):
            return [named(v, f"{key}.{i}") for i, v in enumerate(value)]
        if value is None or isinstance(value, bool | int | float | str | Path):
            return value
        held.append(key)
        kind = value if hasattr(value, "__qualname__") else type(value)
        return f"{kind.__module__}:{kind.__qualname__}"

    changed = {key: named(getattr(run, key), key) for key in ("reward", "measure") if hasattr(run, key)}
    return run.model_copy(update=changed), held


def chosen(directory: RunDirectory, start: Start, note: Callable[[str], None]) -> Path | None:
    """The checkpoint to go on from: the last whole one, or that of the step that was asked for; None where there is none. A torn one is skipped, and said."""
    checkpoints.sweep(directory.checkpoints)
    if start.step is not None:
        steps = checkpoints.saved(directory.checkpoints)
        if start.step not in steps:
            raise UsageError(f"{directory.path} has no checkpoint of step {start.step}: it has {', '.join(map(str, steps)) or 'none'}")
        place = checkpoints.path_of(directory.checkpoints, start.step)
        if wrong := checkpoints.torn(place):
            raise UsageError(f"{place} cannot be resumed: {wrong}")
        return place
    for step, wrong in checkpoints.whole(directory.checkpoints):
        if not wrong:
            return checkpoints.path_of(directory.checkpoints, step)
        note(f"torn       step_{step:06d}: {wrong}; skipped")
    return None


def cut(directory: RunDirectory, step: int, samples: int) -> None:
    """Cut off what was written after so many steps: metrics, rollouts, samples; later checkpoints, whole or torn, are put aside."""
    if directory.metrics.exists():
        os.truncate(directory.metrics, recorded_until(directory.metrics, step))
    for stored in rollout_store.stored(directory.rollouts):
        if stored >= step:
            rollout_store.path_of(directory.rollouts, stored).unlink()
    if directory.samples.exists() and directory.samples.stat().st_size > samples:
        os.truncate(directory.samples, samples)
    (directory.path / RESULT).unlink(missing_ok=True)
    for later in checkpoints.saved(directory.checkpoints):
        if later > step:
            checkpoints.remove(checkpoints.path_of(directory.checkpoints, later))


def best(directory: RunDirectory, steps: Iterable[int], metric: str) -> set[int]:
    """The checkpoint whose weights have the highest `metric`, of those for which it was measured: the record of step k tells of the weights after k steps."""
    values = {
        int(row["step"]): float(row[metric]) for row in read_metrics(directory.metrics) if metric in row and not math.isnan(row[metric])
    }
    known = {step: values[step] for step in steps if step in values}
    return {max(known, key=lambda step: (known[step], step))} if known else set()


def completed(result: Result) -> Result:
    """The result, written to result.json: a run that has one is finished."""
    record = {
        "checkpoint": os.path.relpath(result.checkpoint, result.directory.path), "before": dict(result.before), "after": dict(result.after),
        "answers": [list(answer) for answer in result.answers],
    }  # fmt: skip
    atomic_write(result.directory / RESULT, json.dumps(record, indent=1) + "\n")
    return result


def finished(config: Run, recipe: str, start: Start) -> Result | None:
    """The result of a run that is to be resumed and has finished, with this configuration; else None."""
    if not start.resume or start.step is not None or config.name is None:
        return None
    place = RunDirectory(Path(config.root) / config.name)
    if not (place / RESULT).is_file() or described(place.config, {"recipe": recipe} | plain(recorded(config)[0])):
        return None
    record = json.loads((place / RESULT).read_text(encoding="utf-8"))
    if not config.quiet:
        print(f"finished already: {place.path}")
    answers = tuple((str(a), str(b), str(c)) for a, b, c in record["answers"])
    return Result(place, place / record["checkpoint"], record["before"], record["after"], answers)
