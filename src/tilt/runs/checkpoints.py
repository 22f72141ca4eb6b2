"""Checkpoints: a directory per step that is complete or absent, with a manifest by which a torn copy is known."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

from tilt.errors import UsageError
from tilt.runs.files import flush, vacant

MANIFEST = "manifest.json"
SCHEMA_VERSION = 1
Write = Callable[[Path], None]


def save(directory: Path, step: int, write: Write) -> Path:
    """`directory/step_000120/`, written under a hidden name, its manifest last, and renamed.

    `write` receives an existing empty directory. A step that is already saved is refused.
    """
    target = path_of(directory, step)
    if target.exists():
        raise UsageError(f"{target} exists already: a checkpoint is never overwritten")
    making = vacant(target)
    making.mkdir(parents=True)
    try:
        write(making)
        listed = {str(file.relative_to(making)): measured(file) for file in sorted(making.rglob("*")) if file.is_file()}
        record = {"schema_version": SCHEMA_VERSION, "step": step, "files": listed}
        (making / MANIFEST).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        for file in making.rglob("*"):
            flush(file)
        making.rename(target)
    except BaseException:
        shutil.rmtree(making, ignore_errors=True)
        raise
    flush(target.parent)
    return target


def measured(file: Path) -> dict[str, int | str]:
    """Size in bytes and SHA-256 of a file."""
    with file.open("rb") as content:
        return {"size": file.stat().st_size, "sha256": hashlib.file_digest(content, "sha256").hexdigest()}


def torn(path: Path) -> str:
    """What is wrong with a checkpoint, in words; empty where every file of its manifest is there, to the byte."""
    try:
        record = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        version, files = (
            int(record["schema_version"]),
            {str(name): (int(f["size"]), str(f["sha256"])) for name, f in record["files"].items()},
        )
    except FileNotFoundError:
        return f"it has no {MANIFEST}: it was written by an older Tilt, or is a copy of a part"
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return f"its {MANIFEST} cannot be read"
    if version > SCHEMA_VERSION:
        return f"it has schema version {version}, and this tilt reads up to {SCHEMA_VERSION}: upgrade it"
    for name, (size, digest) in files.items():
        file = path / name
        if not file.resolve().is_relative_to(path.resolve()):
            return f"its {MANIFEST} names {name}, which lies outside of it"
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size:,} of {size:,} bytes"
        if measured(file)["sha256"] != digest:
            return f"{name} is not what was written (its SHA-256 differs)"
    return ""


def path_of(directory: Path, step: int) -> Path:
    return Path(directory) / f"step_{step:06d}"


def remove(path: Path) -> None:
    """Rename, then delete: no half-deleted checkpoint ever has a checkpoint's name."""
    aside = vacant(path)
    path.rename(aside)
    shutil.rmtree(aside)


def saved(directory: Path) -> list[int]:
    """The steps that have a checkpoint, in order."""
    if not Path(directory).is_dir():
        return []
    found = (re.fullmatch(r"step_(\d{6,})", child.name) for child in Path(directory).iterdir() if child.is_dir())
    return sorted(int(match[1]) for match in found if match)


def latest(directory: Path) -> Path:
    """The last complete checkpoint of a checkpoints folder, or a UsageError where there is none."""
    steps = saved(directory)
    if not steps:
        raise UsageError(f"no checkpoint in {directory}")
    return path_of(directory, steps[-1])


def sweep(directory: Path) -> None:
    """Delete what writing and deleting left behind when they were cut short."""
    for child in Path(directory).glob(".step_*.tmp"):
        shutil.rmtree(child, ignore_errors=True)


class Writer:
    """Writes checkpoints in a thread, one after the other, while training goes on. What fails there is raised by the next `wait`."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def begin(self, work: Callable[[], object]) -> None:
        """Do this work in the thread, after what was begun before."""
        self.wait()

        def do() -> None:
            try:
                work()
            except BaseException as error:
                self._error = error

        self._thread = threading.Thread(target=do, name="checkpoint")
        self._thread.start()

    def quietly(self) -> None:
        """Until nothing is being written, whatever went wrong: something worse has."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def wait(self) -> None:
        """Until nothing is being written; raises what went wrong."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error


def whole(directory: Path) -> Iterator[tuple[int, str]]:
    """Every step that has a checkpoint, the last first, with what is wrong with it (empty where nothing is)."""
    for step in reversed(saved(directory)):
        yield step, torn(path_of(directory, step))
