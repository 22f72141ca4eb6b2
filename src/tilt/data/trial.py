"""Chat templates are programs by strangers: each is tried out in a process with limits before it sees a row, and no row may take it long."""

from __future__ import annotations

import ctypes
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tilt.errors import UsageError

PROGRAM = Path(__file__).with_name("template_trial.py")
SECONDS = 10.0
"""The longest that one conversation may take."""
MOST_TEXT, MOST_GROWTH = 1_000_000, 100
"""A conversation as text has at most so many characters, or so many for each one it is given."""

PASSED: set[str] = set()
"""Templates that need no trial any more."""


class Endless(Exception):
    """A template that did not come to its end in time."""


def check(template: str) -> None:
    """Refuse a template that takes more than seconds, a gigabyte or a million characters for short conversations."""
    if template in PASSED:
        return
    if len(template) > MOST_TEXT:
        raise UsageError(f"the chat template has {len(template):,} characters; at most {MOST_TEXT:,} are read")
    try:
        found = subprocess.run(
            [sys.executable, "-P", str(PROGRAM)], input=template.encode("utf-8", "replace"), capture_output=True, check=False, timeout=60
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UsageError(f"the chat template cannot be tried out in a process of its own: {error}") from None
    if found.returncode:
        raise UsageError(
            f"the chat template takes more than seconds, a gigabyte or {MOST_TEXT:,} characters for a conversation of two short turns\n"
            "  it loops or multiplies without end: take another template (template: tilt | chatml | plain), or mend this one"
        )
    PASSED.add(template)


@contextmanager
def in_time(seconds: float = SECONDS) -> Iterator[None]:
    """What runs inside is interrupted by `Endless` when it takes longer."""
    ends = _watch.begin(seconds)
    try:
        yield
    finally:
        _watch.end(ends)


class _Watch:
    """A thread that looks now and then whether a conversation is late, and then raises `Endless` in the thread that renders it."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.ends: dict[int, float] = {}
        self.thread: threading.Thread | None = None

    def begin(self, seconds: float) -> float | None:
        """Set this thread's time, and return the one that was set before."""
        here = threading.get_ident()
        with self.lock:
            before = self.ends.get(here)
            self.ends[here] = time.monotonic() + seconds
            if self.thread is None or not self.thread.is_alive():
                self.thread = threading.Thread(target=self._look, name="tilt-templates", daemon=True)
                self.thread.start()
        return before

    def end(self, before: float | None) -> None:
        here = threading.get_ident()
        with self.lock:
            if self.ends.pop(here, None) is None:
                ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(here), None)  # raised, and perhaps not yet seen
            if before is not None:
                self.ends[here] = before

    def _look(self) -> None:
        while True:
            time.sleep(0.25)
            with self.lock:
                for thread in [thread for thread, ends in self.ends.items() if time.monotonic() > ends]:
                    del self.ends[thread]
                    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), ctypes.py_object(Endless))


_watch = _Watch()
