"""One writer a run: the lock that a process holds on a run's directory, and that the system opens when the process ends, however it ends."""

from __future__ import annotations

import fcntl
import os
import platform
from pathlib import Path
from typing import IO

from tilt.errors import UsageError

NAME = ".lock"


class Lock:
    """Held on `directory/.lock` from its making to `release`; a directory that another process holds is refused, with that process named.

    The file stays and says who held it last; on network file systems without locks nothing is held.
    """

    def __init__(self, directory: Path) -> None:
        self._file: IO[str] = (directory / NAME).open("a+", encoding="utf-8")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.seek(0)
            holder = self._file.read(200).strip() or "another process"
            self._file.close()
            raise UsageError(
                f"{directory} is being written by {holder}: two processes would destroy the run\n  wait for it to end, or stop it; then resume"
            ) from None
        except OSError:
            return
        self._file.truncate(0)
        self._file.write(f"process {os.getpid()} on {platform.node()}")
        self._file.flush()

    def release(self) -> None:
        """Let others in; twice does no harm."""
        self._file.close()


def held(directory: Path) -> bool:
    """Whether some process holds the lock of a run's directory."""
    try:
        with (directory / NAME).open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False
