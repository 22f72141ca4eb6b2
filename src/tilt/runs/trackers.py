"""Metrics of a run to other people's pages: TensorBoard, Trackio, W&B, MLflow. The run directory stays the truth; a tracker that fails is a line of the log."""

from __future__ import annotations

import importlib
import importlib.util
import math
import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol

from tilt.errors import UsageError
from tilt.runs.secrets import masked

Name = Literal["tensorboard", "trackio", "wandb", "mlflow"]
NEEDS: Mapping[Name, tuple[str, str]] = {
    "tensorboard": ("tensorboard", "torch.utils.tensorboard"), "trackio": ("trackio", "trackio"), "wandb": ("wandb", "wandb"), "mlflow": ("mlflow", "mlflow"),
}  # fmt: skip
"""What pip installs, and what is imported."""
WAITING = 10_000
PROJECT = "tilt"
PATIENCE = 10.0
"""Seconds that the end of a run waits for a tracker to take what is left."""


class Tracker(Protocol):
    """Takes rows of numbers by step."""

    def log(self, step: int, row: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class TensorBoard:
    """Event files in the run's folder `tensorboard/`."""

    def __init__(self, place: Path, config: Mapping[str, Any]) -> None:
        self.writer = importlib.import_module("torch.utils.tensorboard").SummaryWriter(str(place / "tensorboard"))
        self.writer.add_text("config", "\n".join(f"    {key}: {value}" for key, value in config.items()), 0)

    def log(self, step: int, row: Mapping[str, float]) -> None:
        for name, value in row.items():
            self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        self.writer.close()


class Modules:
    """Trackio and W&B: a run named as the directory, taken up again where it is."""

    def __init__(self, module: str, place: Path, config: Mapping[str, Any]) -> None:
        self.module = importlib.import_module(module)
        more = {"id": place.name, "dir": str(place)} if module == "wandb" else {}
        self.module.init(project=PROJECT, name=place.name, config=dict(config), resume="allow", **more)

    def log(self, step: int, row: Mapping[str, float]) -> None:
        self.module.log(dict(row), step=step)

    def close(self) -> None:
        self.module.finish()


class Mlflow:
    """An MLflow run, under the tracking address of its environment, taken up by the id kept in the run's folder."""

    def __init__(self, place: Path, config: Mapping[str, Any]) -> None:
        self.module = importlib.import_module("mlflow")
        self.module.set_experiment(PROJECT)
        kept = place / "mlflow_run"
        run = self.module.start_run(run_id=kept.read_text().strip() if kept.exists() else None, run_name=place.name)
        if not kept.exists():
            kept.write_text(run.info.run_id)
            self.module.log_params({key: str(value)[:500] for key, value in config.items()})

    def log(self, step: int, row: Mapping[str, float]) -> None:
        self.module.log_metrics({name.replace(":", "_"): value for name, value in row.items()}, step=step)

    def close(self) -> None:
        self.module.end_run()


MAKERS: Mapping[Name, Callable[[Path, Mapping[str, Any]], Tracker]] = {
    "tensorboard": TensorBoard, "trackio": lambda place, config: Modules("trackio", place, config), "wandb": lambda place, config: Modules("wandb", place, config), "mlflow": Mlflow,
}  # fmt: skip


def check(names: Sequence[Name]) -> None:
    """Refuse trackers that are not installed, before anything is done."""
    for name in names:
        package, _ = NEEDS[name]
        if importlib.util.find_spec(package) is None:
            raise UsageError(f"track: {name} is not installed\n  pip install {package}, or leave it out")


def flat(config: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """Settings by dotted names, secrets masked: {a: {b: 1}} → {a.b: 1}."""
    found: dict[str, Any] = {}
    for key, value in config.items():
        name = f"{above}{key}"
        if isinstance(value, Mapping):
            found |= flat(value, f"{name}.")
        else:
            found[name] = value if isinstance(value, (int, float, bool)) or value is None else masked(str(value))
    return found


class Trackers:
    """All trackers of a run behind one queue and one thread: a step is never held up, rows that find the queue full are counted and left out."""

    def __init__(self, names: Sequence[Name], place: Path, config: Mapping[str, Any], note: Callable[[str], None]) -> None:
        check(names)
        self.note, self.dropped, self.failed = note, 0, set[str]()
        self.queue: queue.Queue[tuple[int, dict[str, float]] | None] = queue.Queue(WAITING)
        self.names, self.place, self.config = names, place, flat(config)
        self.said: list[str] = []
        self.thread = threading.Thread(target=self._work, name="trackers", daemon=True)
        if names:
            self.thread.start()

    def log(self, step: int, row: Mapping[str, Any]) -> None:
        """Hand a row over; what is not finite is left out."""
        self._tell()
        if not self.thread.is_alive():
            return
        numbers = {str(name): float(value) for name, value in row.items() if isinstance(value, (int, float)) and math.isfinite(value)}
        try:
            self.queue.put_nowait((step, numbers))
        except queue.Full:
            self.dropped += 1

    def close(self) -> None:
        """Wait a while for what is left, and say what was not taken."""
        if self.thread.is_alive():
            try:
                self.queue.put(None, timeout=PATIENCE)
            except queue.Full:
                self.dropped += 1
            self.thread.join(PATIENCE)
            if self.thread.is_alive():
                self.note(f"track      {', '.join(self.names)}: not all was taken within {PATIENCE:g} s")
        if self.dropped:
            self.note(f"track      {self.dropped} rows were left out: the trackers are too slow")
        self._tell()

    def _tell(self) -> None:
        while self.said:
            self.note(self.said.pop(0))

    def _work(self) -> None:
        opened: dict[Name, Tracker] = {}
        for wanted in self.names:
            self._guarded(wanted, partial(self._open, opened, wanted))
        while (item := self.queue.get()) is not None:
            for name, tracker in opened.items():
                if name not in self.failed:
                    self._guarded(name, partial(tracker.log, *item))
        for name, tracker in opened.items():
            self._guarded(name, tracker.close)

    def _open(self, opened: dict[Name, Tracker], name: Name) -> None:
        opened[name] = MAKERS[name](self.place, self.config)

    def _guarded(self, name: str, act: Callable[[], Any]) -> None:
        """Do it; a tracker that fails is told of once, and the run goes on without it."""
        try:
            act()
        except BaseException as error:  # trackers end programs, too
            if name not in self.failed:
                self.failed.add(name)
                self.said.append(f"track      {name} failed and is left out: {type(error).__name__}: {masked(str(error))[:200]}")
