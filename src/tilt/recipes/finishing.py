"""What every recipe leaves: the trained model as a plain checkpoint, and the numbers of its last evaluation."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from tilt.runs import checkpoints
from tilt.runs.directory import RunDirectory


@dataclass(frozen=True)
class Result:
    """A finished run: its directory, the checkpoint it wrote (the directory itself where none), its measures before and after, and
    (prompt, answer before, answer after) for held-out prompts where answers were sampled."""

    directory: RunDirectory
    checkpoint: Path
    before: Mapping[str, float] = field(default_factory=dict)
    after: Mapping[str, float] = field(default_factory=dict)
    answers: tuple[tuple[str, str, str], ...] = ()


def saved(directory: RunDirectory, step: int, write: Callable[[Path], None], wanted: bool) -> Path:
    """The checkpoint of the last step, or the run's directory where none is wanted."""
    return checkpoints.save(directory.checkpoints, step, write) if wanted else directory.path
