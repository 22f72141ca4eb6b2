"""A phase that takes too long: the stacks of all threads are written down, the phase is named, and the process ends."""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time
from pathlib import Path

CODE = 1
GRACE = 10.0  # seconds after which the interpreter's own alarm ends a process whose threads no longer run


class Watchdog:
    """Watches one phase at a time; a phase of more than `seconds` ends the process with exit code 1. 0 watches nothing."""

    def __init__(self, seconds: float, log: Path) -> None:
        self.seconds = seconds
        self._phase, self._until = "", float("inf")
        self._change = threading.Condition()
        self._ended = seconds <= 0
        if not self._ended:
            self._log = log.open("a", encoding="utf-8")
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def phase(self, name: str) -> None:
        """A phase of this name begins, and the one before it has ended."""
        if self._ended:
            return
        with self._change:
            self._phase, self._until = name, time.monotonic() + self.seconds
        faulthandler.dump_traceback_later(self.seconds + GRACE, exit=True, file=self._log)

    def end(self) -> None:
        """Watch no more."""
        if not self._ended:
            faulthandler.cancel_dump_traceback_later()
            with self._change:
                self._ended = True
                self._change.notify()
            self._log.close()

    def _watch(self) -> None:
        with self._change:
            while not self._ended:
                left = self._until - time.monotonic()
                if left <= 0:
                    self._bark()
                self._change.wait(min(left, 1.0))

    def _bark(self) -> None:
        said = f"watchdog   {self._phase} has taken more than {self.seconds:g} s: the process ends here, its stacks are below; resume with --resume\n"
        for place in (self._log, sys.__stderr__):
            if place is not None:
                place.write(said)
                place.flush()
                faulthandler.dump_traceback(place, all_threads=True)
        os.fsync(self._log.fileno())
        os._exit(CODE)
