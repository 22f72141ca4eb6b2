"""A process and all that it started, found under /proc and ended; a child that left its session or its parent is found through the subreaper above it."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterable
from pathlib import Path

PAGE = os.sysconf("SC_PAGE_SIZE")


def below(root: int) -> list[int]:
    """Every living or unreaped descendant of a process, nearest first; none where /proc is not this process's own."""
    found, queue = [], [root] if readable() else []
    for parent in queue:
        more = children(parent)
        queue += more
        found += more
    return found


def readable() -> bool:
    """Whether /proc numbers processes as this process does, so that a number read there may be signalled."""
    try:
        return os.readlink("/proc/self") == str(os.getpid())
    except OSError:
        return False


def children(parent: int) -> list[int]:
    found: list[int] = []
    with contextlib.suppress(OSError):
        tasks = os.listdir(f"/proc/{parent}/task")
        if not Path(f"/proc/{parent}/task/{parent}/children").exists():
            return [int(pid) for pid in os.listdir("/proc") if pid.isdigit() and status(int(pid))[1] == parent]
        for task in tasks:
            with contextlib.suppress(OSError):
                found += map(int, Path(f"/proc/{parent}/task/{task}/children").read_text().split())
    return found


def status(pid: int) -> tuple[str, int]:
    """State letter (Z: dead and not reaped) and parent of a process; X and 0 where there is none."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return fields[0], int(fields[1])
    except (OSError, IndexError, ValueError):
        return "X", 0


def living(pids: Iterable[int]) -> list[int]:
    """Those that run, sleep or are stopped."""
    return [pid for pid in pids if status(pid)[0] not in "ZX"]


def send(pids: Iterable[int], number: int) -> None:
    for pid in pids:
        with contextlib.suppress(OSError):
            os.kill(pid, number)


def kill_below(root: int, seconds: float = 10.0) -> bool:
    """SIGKILL to every descendant, children first, then round after round; all are stopped before a round, so that none forks away. Whether none is left."""
    send(children(root) if readable() else (), signal.SIGKILL)
    deadline = time.monotonic() + seconds
    while left := living(below(root)):
        if time.monotonic() > deadline:
            return False
        seen: set[int] = set()
        while (new := set(left) - seen) and time.monotonic() < deadline:
            send(new, signal.SIGSTOP)
            seen |= new
            left = below(root)
        send(seen, signal.SIGKILL)
        time.sleep(0.002)
    return True


def marked(mark: str) -> list[int]:
    """Processes that were started with this text in their environment."""
    found, wanted = [], mark.encode()
    with contextlib.suppress(OSError):
        for pid in filter(str.isdigit, os.listdir("/proc") if readable() else ()):
            with contextlib.suppress(OSError):
                if wanted in Path(f"/proc/{pid}/environ").read_bytes():
                    found.append(int(pid))
    return [pid for pid in found if pid != os.getpid()]


def memory(pids: Iterable[int], enough: int) -> int:
    """Bytes of memory that processes hold; pages that they share are counted once, where more than `enough` makes it worth the look."""
    resident = dict.fromkeys(pids, 0)
    for pid in resident:
        with contextlib.suppress(OSError, IndexError, ValueError):
            resident[pid] = int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * PAGE
    if sum(resident.values()) > enough:
        for pid in resident:
            with contextlib.suppress(OSError, IndexError, ValueError):
                rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
                resident[pid] = int(rollup.partition("\nPss:")[2].split()[0]) * 1024
    return sum(resident.values())
