"""Reward code in a process of its own: limited in memory and time, without the parent's secrets, killed and restarted when it hangs or dies.

This keeps a run alive beside faulty or careless code. It is not a sandbox: the worker may read files and open connections as this user.
"""

from __future__ import annotations

import json
import os
import pickle
import select
import signal
import struct
import subprocess
import sys
import tempfile
import time
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from tilt.errors import UsageError
from tilt.rewards.text import inert

WORKER = Path(__file__).with_name("worker.py")
KEPT = ("PATH", "LANG", "LC_ALL", "TMPDIR", "PYTHONPATH", "VIRTUAL_ENV", "HF_HUB_OFFLINE", "TILT_DATA")
LARGEST = 64 << 20  # bytes of an answer


class Died(Exception):
    """The worker hung, crashed or spoke nonsense; the message says which."""


class Raised(Exception):
    """The function itself raised; the message says what and where."""


@dataclass
class Isolated:
    """One function in a worker process that lives from batch to batch. Memory in GiB of address space, cpu in seconds per life of the worker."""

    path: Path
    name: str
    seconds: float = 60.0
    memory: float = 4.0
    cpu: int = 0
    restarts: int = 0
    _process: subprocess.Popen[bytes] | None = None
    _log: IO[bytes] | None = None
    _undo: Callable[[], object] = field(default=lambda: None)

    def __call__(self, arguments: Mapping[str, Any]) -> Any:
        """The function's answer, as JSON tells it. Raises Died after killing a worker that hangs or ends; the next call starts a new one."""
        try:
            request = pickle.dumps(dict(arguments))
        except Exception as error:
            raise UsageError(
                f"the columns cannot be sent to the worker of {self.label}: {error}.\nName the columns it needs, or drop `isolate`."
            ) from None
        if self._process is None or self._process.poll() is not None:
            self.start()
        assert self._process is not None
        self._log.seek(0)  # type: ignore[union-attr]
        self._log.truncate(0)  # type: ignore[union-attr]
        answer = self._exchange(struct.pack("!Q", len(request)) + request, self.seconds)
        if not isinstance(answer, dict) or not answer.keys() & {"value", "error"}:
            self._fail("answered nonsense")
        if "error" in answer:
            raise Raised(f"raised {inert(str(answer['error']), 300)[1:-1]} ({inert(str(answer.get('where', '')))[1:-1]})")
        return answer["value"]

    @property
    def label(self) -> str:
        return f"{self.path.name}:{self.name}"

    def start(self) -> None:
        """Start a worker and wait until it has loaded the file."""
        self.stop()
        self._log = tempfile.TemporaryFile()  # noqa: SIM115
        command = [sys.executable, "-P", str(WORKER), str(self.path), self.name, str(int(self.memory * 2**30)), str(self.cpu)]
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env={k: os.environ[k] for k in KEPT if k in os.environ} | {"OMP_NUM_THREADS": "1"},
            start_new_session=True,
        )
        os.set_blocking(self._process.stdin.fileno(), False)  # type: ignore[union-attr]
        self._undo = weakref.finalize(self, _kill, self._process)
        ready = self._exchange(b"", max(self.seconds, 60.0))
        if not isinstance(ready, dict) or "value" not in ready:
            why = ready.get("error", "nonsense") if isinstance(ready, dict) else "nonsense"
            self.stop()
            raise UsageError(f"the reward file {self.path} cannot be loaded in a worker with {self.memory:g} GiB: {inert(str(why), 300)}")

    def stop(self) -> None:
        """End the worker and everything in its process group."""
        self._undo()
        self._undo = lambda: None
        if self._log is not None:
            self._log.close()
        self._process = self._log = None

    def _exchange(self, request: bytes, seconds: float) -> Any:
        """Write the request and read one answer, both before the clock runs out."""
        assert self._process is not None and self._process.stdin is not None and self._process.stdout is not None
        deadline = time.monotonic() + seconds
        source, sink = self._process.stdout.fileno(), self._process.stdin.fileno()
        rest, got, size = memoryview(request), bytearray(), -1
        while size < 0 or len(got) < size + 8:
            left = deadline - time.monotonic()
            if left <= 0:
                self._fail(f"did not answer within {seconds:g} s")
            readable, writable, _ = select.select([source], [sink] if rest else [], [], min(left, 1.0))
            try:
                if writable:
                    rest = rest[os.write(sink, rest[:65536]) :]
                if readable:
                    piece = os.read(source, 65536)
                    if not piece:
                        self._fail(self._end())
                    got += piece
            except BrokenPipeError:
                self._fail(self._end())
            if not readable and self._process.poll() is not None:
                self._fail(self._end())
            if size < 0 and len(got) >= 8:
                size = struct.unpack("!Q", got[:8])[0]
                if size > LARGEST:
                    self._fail("answered nonsense")
        try:
            return json.loads(bytes(got[8 : size + 8]))
        except ValueError:
            self._fail("answered nonsense")

    def _end(self) -> str:
        """How the worker ended: its exit code or signal, and the last line that it wrote."""
        assert self._process is not None
        try:
            code = self._process.wait(1.0)
        except subprocess.TimeoutExpired:
            return "closed its answers"
        how = f"ended with exit code {code} before it answered" if code >= 0 else f"was ended by {signal.Signals(-code).name}"
        return how + (f" (after {self.cpu} s of processor time?)" if code == -signal.SIGXCPU else "")

    def _fail(self, how: str) -> Any:
        said = self._tail()
        self.stop()
        self.restarts += 1
        raise Died(f"its worker {how}" + (f"; it last wrote {inert(said)}" if said else ""))

    def _tail(self) -> str:
        assert self._log is not None
        end = self._log.seek(0, os.SEEK_END)
        self._log.seek(max(0, end - 2000))
        lines = self._log.read().decode("utf-8", "replace").strip().splitlines()
        return lines[-1] if lines else ""


def _kill(process: subprocess.Popen[bytes]) -> None:
    """SIGKILL to the worker's whole process group, then reap it."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        process.kill()
    process.wait()
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            stream.close()
