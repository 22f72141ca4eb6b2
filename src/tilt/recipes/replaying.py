"""Steps of a finished run done again from the nearest earlier checkpoint, with the rewards that were stored, and compared bit by bit."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from importlib import import_module
from pathlib import Path
from typing import Any

from tilt.config import parse, read_file
from tilt.data.rollouts import Rollout
from tilt.errors import DataError, UsageError
from tilt.recipes.scoring import Scoring
from tilt.recipes.session import Reached
from tilt.recipes.taking_up import Start
from tilt.rewards.functions import Scored
from tilt.rewards.process import ProcessReward
from tilt.rewards.text import Text
from tilt.runs import checkpoints, rollout_store
from tilt.runs.comparison import differing, rollouts_differ
from tilt.runs.directory import RunDirectory
from tilt.runs.journal import read_metrics

Call = Callable[[Sequence[Rollout], Sequence[Text]], Scored]


@dataclass(frozen=True)
class Replayed:
    """What came of a replay: the run, the steps that were done again, the checkpoint they began from (0: the start), and every difference, in words."""

    run: Path
    steps: tuple[int, ...]
    begun: int
    differences: tuple[str, ...]


def replay(run: Path, first: int = 0, last: int | None = None) -> Replayed:
    """Do the steps `first` … `last` (by default all) of a run again, in a folder that is gone afterwards; the run itself is only read."""
    place = RunDirectory(Path(run))
    if not place.config.is_file():
        raise UsageError(f"{run} is not the directory of a run: it has no config.yaml")
    values = dict(read_file(place.config).values)
    module = import_module(f"tilt.recipes.{values.pop('recipe')}")
    rows = {int(row["step"]): row for row in read_metrics(place.metrics) if "loss" in row or "time/step" in row}
    wanted = [step for step in rows if step >= first and (last is None or step <= last)]
    if not wanted:
        raise UsageError(
            f"{run}: no step from {first}{'' if last is None else f' to {last}'} is recorded; it has steps {_span(list(rows))}"
        )
    saved = [step for step in checkpoints.saved(place.checkpoints) if step <= wanted[0]]
    whole = [step for step in saved if not checkpoints.torn(checkpoints.path_of(place.checkpoints, step))]
    begun = whole[-1] if whole else 0
    with tempfile.TemporaryDirectory(prefix="tilt-replay-") as folder:
        config = parse(values | {"name": place.name, "root": folder, "quiet": True, "save": False}, module.Config)
        scratch = RunDirectory(Path(folder) / place.name)
        if begun:
            scratch.checkpoints.mkdir(parents=True)
            checkpoints.path_of(scratch.checkpoints, begun).symlink_to(checkpoints.path_of(place.checkpoints, begun).resolve())
            for file in ("config.yaml", "env.json"):
                (scratch / file).write_bytes((place / file).read_bytes())
        with contextlib.suppress(Reached):
            module.run(config, Start(resume=begun > 0, step=begun or None, until=wanted[-1] + 1, rewards=place.rollouts))
        return Replayed(place.path, tuple(wanted), begun, tuple(_compared(place, scratch, rows, wanted)))


def _compared(place: RunDirectory, scratch: RunDirectory, rows: dict[int, dict[str, Any]], wanted: Sequence[int]) -> Iterator[str]:
    """A line for everything in these steps that is not the same bits."""
    again = {int(row["step"]): row for row in read_metrics(scratch.metrics)}
    stored, both = set(rollout_store.stored(place.rollouts)), set(rollout_store.stored(scratch.rollouts))
    for step in wanted:
        old, new = (
            {k: v for k, v in row.items() if not k.startswith("eval/") and not k.endswith("_failed")}
            for row in (rows[step], again.get(step, {}))
        )
        if names := differing(old, new):
            yield f"step {step}: {', '.join(f'{name} {old.get(name)!r}, again {new.get(name)!r}' for name in names[:4])}"
        if step in stored & both:
            try:
                yield from rollouts_differ(place.rollouts, scratch.rollouts, step)
            except OSError as error:
                yield f"rollouts, step {step}: {str(error).splitlines()[0]}"


def _span(steps: Sequence[int]) -> str:
    return f"{steps[0]} to {steps[-1]}" if steps else "none"


@dataclass
class Store:
    """The parts of the reward as a run stored them, by step and by the rollout's seed."""

    folder: Path
    steps: dict[int, dict[tuple[int, ...], dict[str, float | None]]] = field(default_factory=dict)

    def of(self, rollout: Rollout, name: str) -> tuple[bool, float | None]:
        """Whether this part of this rollout is stored, and the score (None where it could not be scored)."""
        step = int(rollout.seed[1])
        if step not in self.steps:
            path = rollout_store.path_of(self.folder, step)
            try:
                rows = rollout_store.read(path) if path.exists() else []
            except DataError:
                rows = []
            self.steps[step] = {tuple(row["seed"]): row.get("rewards") or {} for row in rows}
        found = self.steps[step].get(tuple(rollout.seed), {})
        value = found.get(name)
        return name in found, None if value is None or value != value else value

    def scoring(self, plain: Scoring) -> Scoring:
        """The scoring with every part taken from the store, where it is there; what judges steps, and what is not stored, is asked again."""

        parts = [
            part if isinstance(part.call, ProcessReward) else replace(part, call=Taken(self, part.name, part.call))
            for part in plain.score.parts
        ]
        return replace(plain, score=replace(plain.score, parts=parts))


@dataclass(frozen=True)
class Taken:
    """A part of the reward that is read from the store, where all of it is there; `plain` is the part itself."""

    store: Store
    name: str
    plain: Call

    def __call__(self, rollouts: Sequence[Rollout], texts: Sequence[Text]) -> Scored:
        found = [self.store.of(rollout, self.name) for rollout in rollouts]
        return Scored([value for _, value in found], 0, "") if all(there for there, _ in found) else self.plain(rollouts, texts)
