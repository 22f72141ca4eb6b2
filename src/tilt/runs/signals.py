"""Ctrl-C and SIGTERM: once, the step is finished and saved; twice, now."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

WATCHED = (signal.SIGINT, signal.SIGTERM)
SAID = b"\nfinishing the step and saving it; the same again ends at once\n"


class Asked:
    """Whether the process was asked to end, and by which signal."""

    def __init__(self) -> None:
        self.by = ""
        self.depth = 0

    def hear(self, number: int, frame: FrameType | None) -> None:
        if self.by:
            raise KeyboardInterrupt
        self.by = signal.Signals(number).name
        os.write(2, SAID)

    def heed(self) -> None:
        """End here if the process was asked to."""
        if self.by:
            raise KeyboardInterrupt


ASKED = Asked()


@contextmanager
def heeded() -> Iterator[Asked]:
    """Inside, the signals only ask; the outermost of nested uses installs the handlers and puts the old ones back. Elsewhere than in the main thread nothing changes."""
    if ASKED.depth or threading.current_thread() is not threading.main_thread():
        yield ASKED
        return
    ASKED.by, ASKED.depth = "", 1
    before = {number: signal.signal(number, ASKED.hear) for number in WATCHED}
    try:
        yield ASKED
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        ASKED.by, ASKED.depth = "", 0
