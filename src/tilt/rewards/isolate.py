"""Reward code in a process of its own: limited in memory, time and processes, without the parent's secrets, killed with all that it started and started again
when it hangs or dies.

This keeps a run alive beside faulty or careless code. It is not a sandbox: the worker may read files and open connections as this user.
"""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import select
import signal
import subprocess
import sys
import threading
import time
import uuid
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from tilt.errors import UsageError
from tilt.isolation import keeper, trees, worker
from tilt.rewards.text import inert

KEPT = ("PATH", "LANG", "LC_ALL", "TMPDIR", "PYTHONPATH", "VIRTUAL_ENV", "HF_HUB_OFFLINE", "TILT_DATA")
LARGEST, EACH = 1 << 16, 1 << 12  # bytes of an answer, and more for each thing asked about
TAIL = 2000  # bytes kept of what a worker writes
GIB = 1 << 30


class Died(Exception):
    """The worker hung, crashed or spoke nonsense; the message says which."""


class Raised(Exception):
    """The function itself raised; the message says what and where."""


@dataclass
class Isolated:
    """One function in a worker process that lives from batch to batch.

    `memory` in GiB, of address space for each process and of memory for all together; `cpu` in seconds for each process, 0 for no limit; `processes` at a time;
    `file_size` in GiB. `namespaces` off leaves out what keeps its processes apart where the system allows it. A `trusted` file may report of itself in `told`.
    """

    path: Path
    name: str
    seconds: float = 60.0
    memory: float = 4.0
    cpu: int = 0
    processes: int = 256
    file_size: float = 1.0
    namespaces: bool = True
    trusted: bool = False
    restarts: int = field(init=False, default=0)
    told: Mapping[str, Any] = field(init=False, default_factory=dict)
    _process: subprocess.Popen[bytes] | None = field(init=False, default=None)
    _said: bytes = field(init=False, default=b"")
    _number: int = field(init=False, default=0)
    _stopped: bool = field(init=False, default=False)
    _undo: Callable[[], object] = field(init=False, default_factory=lambda: _nothing)
    _busy: threading.RLock = field(init=False, default_factory=threading.RLock)

    def __call__(self, arguments: Mapping[str, Any], seconds: float | None = None) -> Any:
        """The function's answer, as JSON tells it, within `seconds`. Raises Died after killing a worker that hangs or ends; the next call starts a new one."""
        try:
            request = pickle.dumps(dict(arguments))
        except Exception as error:
            raise UsageError(
                f"the columns cannot be sent to the worker of {self.label}: {error}.\nName the columns it needs, or drop `isolate`."
            ) from None
        with self._busy:
            if self._stopped:
                raise Died("its worker was ended with the run")
            if self._process is None or self._process.poll() is not None:
                self._again()
            self._number += 1
            head, most = (
                worker.HEAD.pack(len(request), self._number),
                max((len(v) for v in arguments.values() if isinstance(v, list)), default=0),
            )
            answer = self._exchange(head + request, seconds or self.seconds, LARGEST + EACH * most)
        if "error" in answer:
            raise Raised(f"raised {inert(str(answer['error']), 300)[1:-1]} ({inert(str(answer.get('where', '')))[1:-1]})")
        return answer["value"]

    @property
    def label(self) -> str:
        return f"{self.path.name}:{self.name}"

    def start(self) -> None:
        """Start a worker and wait until it has loaded the file."""
        self._stopped = False
        with self._busy:
            ready = self._begin()
        if "error" in ready:
            raise UsageError(
                f"the reward file {self.path} cannot be loaded in a worker with {self.memory:g} GiB: {inert(str(ready['error']), 300)}"
            )
        self.told = ready["value"] if isinstance(ready["value"], dict) else {}

    def stop(self) -> None:
        """End the worker and everything that it started; a call that waits for it ends with Died, and no other starts it again."""
        self._stopped = True
        self._undo()
        self._discard()

    def _begin(self) -> dict[str, Any]:
        """A new process, and what it says when it has loaded the file or failed to."""
        self._discard()
        self._said, self._number, mark = b"", 0, uuid.uuid4().hex
        self._process = subprocess.Popen(
            [sys.executable, "-P", worker.__file__, json.dumps(self._settings())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={k: os.environ[k] for k in KEPT if k in os.environ} | {"OMP_NUM_THREADS": "1", "TILT_WORKER": mark},
            start_new_session=True,
        )
        for stream in (self._process.stdin, self._process.stderr):
            os.set_blocking(stream.fileno(), False)  # type: ignore[union-attr]
        self._undo = weakref.finalize(self, _kill, self._process, f"TILT_WORKER={mark}", os.getpid())
        try:
            ready = self._exchange(b"", max(self.seconds, 60.0), LARGEST)
        except Died as error:
            return {"error": str(error)}
        if "error" in ready:
            self._discard()
        return ready

    def _discard(self) -> None:
        """Kill what there is of the worker, and close its pipes when no call reads them."""
        self._undo()
        with self._busy:
            if self._process is not None:
                for stream in (self._process.stdin, self._process.stdout, self._process.stderr):
                    with contextlib.suppress(OSError):
                        stream.close()  # type: ignore[union-attr]
            self._process, self._undo = None, _nothing

    def _settings(self) -> dict[str, Any]:
        """What the worker is told. A user's number of processes is limited where the kernel counts it, from what there are now."""
        mine = sum(_tasks(pid) for pid in os.listdir("/proc") if pid.isdigit()) if os.getuid() and os.path.isdir("/proc") else -1
        return {
            "path": str(self.path), "name": self.name, "run": os.getpid(), "memory": int(self.memory * GIB), "cpu": self.cpu,
            "processes": self.processes, "users_processes": mine + 4 * self.processes if mine >= 0 else -1,
            "file_size": int(self.file_size * GIB), "namespaces": self.namespaces, "trusted": self.trusted,
        }  # fmt: skip

    def _again(self) -> None:
        """Start anew in the middle of a run, where a file that no longer loads is the reward's failure and not the user's mistake."""
        try:
            self.start()
        except UsageError as error:
            raise Died(f"cannot be started again: {error}") from None

    def _exchange(self, request: bytes, seconds: float, largest: int) -> dict[str, Any]:
        """Write the request and read one answer, both before the clock runs out; of all that the worker prints meanwhile the end is kept."""
        process = self._process
        assert process is not None and process.stdin is not None and process.stdout is not None and process.stderr is not None
        deadline = time.monotonic() + seconds
        try:
            source, sink, log = process.stdout.fileno(), process.stdin.fileno(), process.stderr.fileno()
            rest, got, size, logging = memoryview(request), bytearray(), -1, [log]
            while size < 0 or len(got) < size + worker.HEAD.size:
                left = deadline - time.monotonic()
                if left <= 0:
                    self._fail(f"did not answer within {seconds:g} s")
                readable, writable, _ = select.select([source, *logging], [sink] if rest else [], [], min(left, 0.5))
                if log in readable and not self._listen(log):
                    logging = []
                if writable:
                    rest = rest[os.write(sink, rest[:65536]) :]
                if source in readable:
                    piece = os.read(source, 65536)
                    if not piece:
                        self._fail(self._end())
                    got += piece
                elif process.poll() is not None:
                    self._fail(self._end())
                if size < 0 and len(got) >= worker.HEAD.size:
                    size, number = worker.HEAD.unpack(got[: worker.HEAD.size])
                    if size > largest or number != self._number:
                        self._fail("answered nonsense")
            answer = json.loads(bytes(got[worker.HEAD.size :]))
        except BrokenPipeError:
            self._fail(self._end())
        except (ValueError, RecursionError):
            self._fail("answered nonsense")
        if not isinstance(answer, dict) or not answer.keys() & {"value", "error"}:
            self._fail("answered nonsense")
        return answer

    def _listen(self, log: int) -> bool:
        """Read what was printed, keep its end; whether there can be more."""
        with contextlib.suppress(BlockingIOError):
            piece = os.read(log, 65536)
            self._said = (self._said + piece)[-TAIL:]
            return bool(piece)
        return True

    def _end(self) -> str:
        """How the worker ended: its exit code or signal, or the limit that it broke."""
        assert self._process is not None
        try:
            code = self._process.wait(1.0)
        except subprocess.TimeoutExpired:
            return "closed its answers"
        if code == -keeper.CROWD:
            return f"had more than {self.processes} processes"
        if code == -keeper.GREED:
            return f"and what it started took more than {self.memory:g} GiB of memory"
        how = f"ended with exit code {code} before it answered" if code >= 0 else f"was ended by {signal.Signals(-code).name}"
        return how + (f" (after {self.cpu} s of processor time?)" if code == -signal.SIGXCPU else "")

    def _fail(self, how: str) -> NoReturn:
        assert self._process is not None and self._process.stderr is not None
        log, reads = self._process.stderr.fileno(), 0
        while reads < 64 and select.select([log], [], [], 0)[0] and self._listen(log):
            reads += 1
        lines = self._said.decode("utf-8", "replace").strip().splitlines()
        self._discard()
        self.restarts += 1
        how = "was ended with the run" if self._stopped else how
        raise Died(f"its worker {how}" + (f"; it last wrote {inert(lines[-1])}" if lines else ""))


def _nothing() -> None:
    """What there is to undo where there is no worker."""


def _tasks(pid: str) -> int:
    """How many tasks, which the kernel counts as processes, a process of this user has."""
    try:
        return len(os.listdir(f"/proc/{pid}/task")) if os.stat(f"/proc/{pid}").st_uid == os.getuid() else 0
    except OSError:
        return 0


def _kill(process: subprocess.Popen[bytes], mark: str, owner: int) -> None:
    """SIGKILL to all that stands below the keeper, then to the keeper, which is reaped, then to whatever carries the worker's mark; nothing in a copy of the run."""
    if os.getpid() != owner:
        return
    if process.poll() is None:
        trees.kill_below(process.pid)
        with contextlib.suppress(OSError):
            os.killpg(process.pid, signal.SIGKILL)
    process.kill()
    process.wait()
    if process.returncode == -signal.SIGKILL:
        trees.send(trees.marked(mark), signal.SIGKILL)
