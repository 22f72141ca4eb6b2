"""One writer a run; what is asked of signals and of a phase that hangs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tilt.errors import UsageError
from tilt.runs.lock import Lock, held
from tilt.runs.signals import ASKED, heeded


def test_a_second_writer_is_refused_and_told_of_the_first(tmp_path: Path) -> None:
    lock = Lock(tmp_path)
    assert held(tmp_path)
    with pytest.raises(UsageError, match=rf"is being written by process {os.getpid()} on "):
        Lock(tmp_path)
    lock.release()
    assert not held(tmp_path)
    Lock(tmp_path).release()


def test_the_lock_of_a_process_that_was_killed_is_open(tmp_path: Path) -> None:
    code = f"import time; from pathlib import Path; from tilt.runs.lock import Lock; lock = Lock(Path({str(tmp_path)!r})); print('held', flush=True); time.sleep(60)"
    other = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert other.stdout is not None and other.stdout.readline() == "held\n"
    assert held(tmp_path)
    other.kill()
    other.wait()
    other.stdout.close()
    assert not held(tmp_path)
    Lock(tmp_path).release()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_asks_once_and_ends_the_second_time(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with heeded() as asked, heeded():
        os.kill(os.getpid(), number)
        assert asked.by == number.name
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), number)
            time.sleep(1)
        with pytest.raises(KeyboardInterrupt):
            asked.heed()
    assert signal.getsignal(number) is before and not ASKED.by


def test_a_phase_that_hangs_ends_the_process_with_its_name_and_stacks(tmp_path: Path) -> None:
    code = (
        "import time; from pathlib import Path; from tilt.runs.watchdog import Watchdog\n"
        f"dog = Watchdog(0.3, Path({str(tmp_path / 'log.txt')!r}))\n"
        "dog.phase('`reward` of step 7')\n"
        "def hangs():\n    time.sleep(60)\nhangs()"
    )
    began = time.monotonic()
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=50, check=False)
    assert found.returncode == 1 and time.monotonic() - began < 40
    for text in (found.stderr, (tmp_path / "log.txt").read_text()):
        assert "`reward` of step 7 has taken more than 0.3 s" in text and "in hangs" in text


def test_phases_that_end_in_time_are_left_alone(tmp_path: Path) -> None:
    code = (
        "import time; from pathlib import Path; from tilt.runs.watchdog import Watchdog\n"
        f"dog = Watchdog(1.5, Path({str(tmp_path / 'log.txt')!r}))\n"
        "for i in range(8):\n    dog.phase(f'{i}')\n    time.sleep(0.3)\ndog.end()\ntime.sleep(2.5)"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=50, check=False).returncode == 0
