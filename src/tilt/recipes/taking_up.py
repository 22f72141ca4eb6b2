"""The directory of a run that begins or is taken up: its configuration, the checkpoint to go on from, what is cut off, and the result that ends it."""

from __future__ import annotations

import json
import math
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tilt.config import dump, plain
from tilt.errors import UsageError
from tilt.recipes.changes import described
from tilt.recipes.finishing import Result
from tilt.recipes.settings import Run
from tilt.runs import checkpoints, rollout_store
from tilt.runs.directory import RunDirectory, auto_name, create
from tilt.runs.files import atomic_write
from tilt.runs.journal import read_metrics, recorded_until
from tilt.runs.secrets import masked

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


def placed(config: Run, recipe: str, model: str, label: str, start: Start) -> tuple[RunDirectory, bool]:
    """The directory, and whether it was there."""
    if start.resume and config.name is not None and (path := Path(config.root) / config.name).is_dir():
        place = RunDirectory(path)
        if not place.config.is_file():
            raise UsageError(f"{path} is not the directory of a run: it has no config.yaml")
        return place, True
    place = create(config.root, config.name or auto_name(label or recipe, model), config_yaml=written(config, recipe), command=sys.argv)
    return place, False


def changed(place: RunDirectory, config: Run, recipe: str) -> list[str]:
    """What the configuration changes of the run that is taken up, key by key; what would make it another run is refused."""
    lines = described(place.config, settings_of(config, recipe))
    if lines:
        number = 1 + len(list(place.path.glob("config.before_*.yaml")))
        shutil.copyfile(place.config, place.path / f"config.before_{number}.yaml")
        atomic_write(place.config, masked(written(config, recipe)))
    return [f"changed    {line}" for line in lines]


def settings_of(config: Run, recipe: str) -> dict[str, Any]:
    """The resolved configuration as plain values, with the recipe's name, as config.yaml has them."""
    return {"recipe": recipe, **plain(recorded(config)[0])}


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
    """Cut off what was written after so many steps: metrics, rollouts, samples; later checkpoints, whole or torn, are deleted."""
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
    if not (place / RESULT).is_file() or described(place.config, settings_of(config, recipe)):
        return None
    record = json.loads((place / RESULT).read_text(encoding="utf-8"))
    if not config.quiet:
        print(f"finished already: {place.path}")
    answers = tuple((str(a), str(b), str(c)) for a, b, c in record["answers"])
    return Result(place, place / record["checkpoint"], record["before"], record["after"], answers)
