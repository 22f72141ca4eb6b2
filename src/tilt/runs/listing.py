"""The runs in a folder: what each is, how far it came, and whether it still runs."""

from __future__ import annotations

import json
import os
import platform
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tilt.config import read_file
from tilt.errors import DataError, UsageError
from tilt.runs.journal import FINISHED, read_metrics
from tilt.runs.lock import held

REWARDS = ("reward", "objective/scores", "eval/reward", "eval/accuracy", "accuracy")


@dataclass(frozen=True)
class Listed:
    """One run: `status` is running, finished, stopped (by an error or a signal it saw), or dead (its process is gone without a word)."""

    name: str
    status: str
    recipe: str
    model: str
    step: int | None
    reward: float | None
    age_seconds: float


def listed(root: Path) -> list[Listed]:
    """The runs under `root`, the newest first; what is no run is passed over."""
    if not root.is_dir():
        return []
    found = [_one(path) for path in root.iterdir() if not path.name.startswith(".") and (path / "env.json").is_file()]
    return sorted(found, key=lambda run: run.age_seconds)


def _one(path: Path) -> Listed:
    config, environment = _config(path), _environment(path)
    metrics = _metrics(path)
    stages = [record.get("stage") for record in metrics if record.get("stage")]
    reward = next((float(r[key]) for r in reversed(metrics) for key in REWARDS if isinstance(r.get(key), int | float)), None)
    changed = max(file.stat().st_mtime for file in (path / "log.txt", path / "metrics.jsonl", path / "env.json") if file.exists())
    recipe = str(config.get("algorithm") or config.get("recipe") or "?")
    return Listed(
        path.name, status_of(path, environment), f"{recipe} ({stages[-1]})" if stages else recipe, _model(config.get("model")),
        metrics[-1]["step"] if metrics else None, reward, max(0.0, time.time() - changed),
    )  # fmt: skip


def _config(path: Path) -> dict[str, Any]:
    try:
        return read_file(path / "config.yaml").values
    except UsageError:
        return {}


def _metrics(path: Path) -> list[dict[str, Any]]:
    """The steps of a run; none of a damaged file, so that one run does not hide the others."""
    try:
        return read_metrics(path / "metrics.jsonl")
    except DataError:
        return []


def _environment(path: Path) -> dict[str, Any]:
    try:
        found = json.loads((path / "env.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def status_of(path: Path, environment: dict[str, Any]) -> str:
    """From the lock, else from the last line of the log, else from whether the process is alive on this machine."""
    if held(path):
        return "running"
    log = (
        (path / "log.txt").read_text(encoding="utf-8", errors="replace").rstrip().rpartition("\n")[2]
        if (path / "log.txt").is_file()
        else ""
    )
    said = log.partition("  ")[2]
    if said == FINISHED:
        return "finished"
    if said.startswith("stopped: "):
        return "stopped"
    if environment.get("host") != platform.node():
        return "elsewhere"
    return "running" if _alive(environment.get("process")) else "dead"


def _alive(process: Any) -> bool:
    if type(process) is not int or not 0 < process < 2**31:
        return False
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _model(model: Any) -> str:
    """A short name: the folder's, the run's whose checkpoint it is (`runs/sft/checkpoints/step_000090` → `sft`), or the shape of a model from scratch."""
    if isinstance(model, dict):
        return "-".join(str(model[key]) for key in ("kind", "layers", "width") if key in model) or "from scratch"
    parts = str(model).rstrip("/").split("/") if model else ["?"]
    return parts[-3] if len(parts) > 2 and parts[-2] == "checkpoints" else parts[-1]
