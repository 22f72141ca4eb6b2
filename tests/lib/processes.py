"""What /proc says of processes that a test started, directly or not."""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path


def carrying(mark: str) -> dict[int, str]:
    """Processes whose command line or environment holds this text, zombies of theirs aside, with their states."""
    found = {}
    for name in filter(str.isdigit, os.listdir("/proc")):
        folder = Path("/proc") / name
        with contextlib.suppress(OSError):
            texts = (folder / "cmdline").read_bytes() + (folder / "environ").read_bytes()
            if mark.encode() in texts and int(name) != os.getpid():
                found[int(name)] = state(int(name))
    return found


def state(pid: int) -> str:
    """R, S, T, Z …; nothing where there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""


def zombies() -> list[int]:
    """Children of this process that ended and that nobody has reaped."""
    found = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError, IndexError):
            fields = Path(f"/proc/{name}/stat").read_text().rpartition(")")[2].split()
            if fields[0] == "Z" and int(fields[1]) == os.getpid():
                found.append(int(name))
    return found


def gone(mark: str, seconds: float = 5.0) -> None:
    """Wait until no process carries the mark."""
    deadline = time.monotonic() + seconds
    while left := carrying(mark):
        assert time.monotonic() < deadline, f"still there: {left}"
        time.sleep(0.02)
