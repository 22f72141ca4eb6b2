"""Logs of other trainers as run directories: what is there is mapped, what is missing stays missing, nothing is invented."""

from __future__ import annotations

import tempfile
from pathlib import Path

from tilt.errors import DataError, UsageError
from tilt.inspect.imports import sources
from tilt.inspect.imports.writing import write

PICKLES = {".pt", ".pth", ".pkl", ".pickle", ".bin", ".ckpt"}


def detected(path: Path) -> str | None:
    """The kind of log at a path, None where it is a run of tilt's own, or nothing that is known."""
    if any((path / name).exists() for name in ("config.yaml", "env.json", "imported.json")):
        return None
    return next((name for name, source in sources.SOURCES.items() if source.detects(path)), None)


def imported(path: Path, out: Path | None = None, format: str | None = None) -> Path:
    """Write the log at `path` as a run directory and return it: `out`, which must not exist, or a temporary folder."""
    if not path.exists():
        raise DataError(f"nothing at {path}")
    if path.suffix in PICKLES or (
        path.is_dir() and (held := [p.name for p in path.iterdir() if p.suffix in PICKLES]) and detected(path) is None and held
    ):
        raise DataError(
            f"{path} holds pickled files, and reading one runs what is in it: export JSON lines or parquet instead (slime: one JSON object a sample)"
        )
    if format is not None and format not in sources.SOURCES:
        raise UsageError(f"no format {format!r}: one of {', '.join(sources.SOURCES)}")
    kind = format or detected(path)
    if kind is None:
        raise DataError(f"{path} is no log that is known: one of {', '.join(sources.SOURCES)}, or name it: --format")
    if out is not None and out.exists():
        raise UsageError(f"{out} exists: name another folder")
    place = out if out is not None else Path(tempfile.mkdtemp(prefix="tilt-import-")) / (path.stem or "import")
    write(sources.SOURCES[kind].read(path), place, kind, path)
    return place
