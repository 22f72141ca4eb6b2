"""Checkpoints: a directory per step that is complete or absent."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path

from tilt.errors import UsageError
from tilt.runs.files import flush, vacant


def save(directory: Path, step: int, write: Callable[[Path], None], keep_last: int = 0) -> Path:
    """`directory/step_000120/`, written under a hidden name and renamed; then only the last `keep_last` remain (0 keeps all).

    `write` receives an existing empty directory. A step that is already saved is refused.
    """
    target = Path(directory) / f"step_{step:06d}"
    if target.exists():
        raise UsageError(f"{target} exists already: a checkpoint is never overwritten")
    making = vacant(target)
    making.mkdir(parents=True)
    try:
        write(making)
        for file in making.rglob("*"):
            flush(file)
        making.rename(target)
    except BaseException:
        shutil.rmtree(making, ignore_errors=True)
        raise
    flush(target.parent)
    if keep_last > 0:
        for old in saved(directory)[:-keep_last]:
            _remove(Path(directory) / f"step_{old:06d}")
    return target


def _remove(path: Path) -> None:
    """Rename, then delete: no half-deleted checkpoint ever has a checkpoint's name."""
    aside = vacant(path)
    path.rename(aside)
    shutil.rmtree(aside)


def saved(directory: Path) -> list[int]:
    """The steps that have a complete checkpoint, in order."""
    if not Path(directory).is_dir():
        return []
    found = (re.fullmatch(r"step_(\d{6,})", child.name) for child in Path(directory).iterdir() if child.is_dir())
    return sorted(int(match[1]) for match in found if match)


def latest(directory: Path) -> Path:
    """The last complete checkpoint of a checkpoints folder, or a UsageError where there is none."""
    steps = saved(directory)
    if not steps:
        raise UsageError(f"no checkpoint in {directory}")
    return Path(directory) / f"step_{steps[-1]:06d}"
