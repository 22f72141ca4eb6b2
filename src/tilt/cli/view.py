"""`tilt view`: the page of runs, live, on this machine; with `--text` the same on a terminal."""

from __future__ import annotations

import contextlib
import json
import sys
import webbrowser
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tilt.errors import DataError, UsageError
from tilt.inspect.book import Book, books
from tilt.inspect.server import Site, serve

FORMAT = "tilt comparison 1"


def opened(paths: Sequence[str], growing: list[Path] | None = None) -> tuple[list[Book], list[dict[str, Any]]]:
    """Runs and comparisons at these paths; a log of another trainer is read into a run's format first. Folders that may come to hold more runs join `growing`."""
    found: list[Book] = []
    comparisons: list[dict[str, Any]] = []
    for text in paths:
        path = Path(text)
        if not path.exists():
            raise DataError(
                f"nothing at {text}: name a run directory, a folder that holds runs, a comparison (tilt compare --out), or another trainer's log"
            )
        if path.suffix == ".json" and (comparison := comparison_at(path)) is not None:
            comparisons.append(comparison)
            continue
        from tilt.inspect.imports import detected, imported

        own = path.is_dir() and detected(path) is None
        if own and growing is not None:
            growing.append(path)
        found += books(path) if own else [Book(imported(path), path.name)]
    return found, comparisons


def comparison_at(path: Path) -> dict[str, Any] | None:
    """The comparison in a file; None where it holds something else."""
    try:
        found = json.loads(path.read_text(encoding="utf-8", errors="replace"))
    except (OSError, ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) and found.get("format") == FORMAT else None


def view(paths: Sequence[str], *, host: str, port: int | None, browser: bool) -> None:
    """Serve until interrupted."""
    growing: list[Path] = []
    runs, comparisons = opened(paths, growing)
    server = serve(Site(runs, comparisons, lambda: since(growing)), host=host, port=port)
    print(
        f"{server.url}   ({len(runs)} run{'s' * (len(runs) != 1)}{f', {len(comparisons)} comparisons' if comparisons else ''}; Ctrl-C ends)",
        flush=True,
    )
    if browser and sys.stdout.isatty():
        webbrowser.open(server.url)
    try:
        server.serve_forever(poll_interval=0.2)
    except KeyboardInterrupt:
        print()
    finally:
        server.server_close()


def since(places: Sequence[Path]) -> list[Book]:
    """The runs that these folders hold now; none where a folder is gone."""
    found = []
    for place in places:
        with contextlib.suppress(DataError, OSError):
            found += books(place)
    return found


def only(paths: Sequence[str]) -> Book:
    """The one run at a path, for commands that show one."""
    runs, _ = opened(paths)
    if len(runs) != 1:
        names = ", ".join(str(book.path) for book in runs[:8])
        raise UsageError(f"name one run; there are {len(runs)}: {names}")
    return runs[0]
