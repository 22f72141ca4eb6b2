"""One program run once, as far from everything as the system allows: no network, nothing writable but a folder in memory, limits, no secrets, no way to stay."""

from __future__ import annotations

import contextlib
import fcntl
import os
import resource
import select
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass

from tilt.isolation import kernel, trees
from tilt.isolation.keeper import keep

NOBODY = 65534
APART = kernel.NEWPID | kernel.NEWNS | kernel.NEWNET | kernel.NEWIPC
WISHED = (APART, kernel.NEWPID | kernel.NEWNET, kernel.NEWNET, kernel.NEWPID)
GIVEN, PROOF = 3, 4  # the descriptors that a program has besides its standard ones


@dataclass(frozen=True)
class Limits:
    """Seconds by the clock and of a processor; bytes of memory, of any file and of what may be printed; processes at a time."""

    seconds: float
    memory: int
    processes: int
    file_size: int
    output: int


@dataclass(frozen=True)
class Room:
    """What the system allows: the namespaces, whether only the program's folder can be written, whether root can give way to nobody."""

    namespaces: int
    read_only: bool
    nobody: bool

    @property
    def offline(self) -> bool:
        return bool(self.namespaces & kernel.NEWNET)


@dataclass(frozen=True)
class Ended:
    """How a program ended: exit code or minus the signal, None where it was ended for taking too long or printing too much; what it printed; what it proved."""

    code: int | None
    output: bytes
    proof: bytes


def room() -> Room:
    """What this process can give to programs, tried out."""
    namespaces = kernel.first_able(*WISHED)
    with tempfile.TemporaryDirectory() as folder:
        read_only = bool(namespaces & kernel.NEWNS) and kernel.tried(
            lambda: kernel.enter(namespaces) and kernel.tried(lambda: kernel.read_only_but(folder, 1))
        )
    nobody = os.getuid() == 0 and kernel.tried(lambda: (not namespaces or kernel.enter(namespaces)) and _as_nobody())
    return Room(namespaces, read_only, nobody)


def run(command: list[str], files: dict[str, bytes], stdin: bytes, limits: Limits, apart: Room, given: bytes = b"") -> Ended:
    """Run a command in a folder that holds `files` and is gone afterwards; `given` is on descriptor 3, what it writes to descriptor 4 is its proof."""
    folder = tempfile.mkdtemp(prefix="tilt-program-")
    inputs = [_holding(stdin), _holding(given)]
    out, printed = os.pipe()
    proof, proved = os.pipe()
    me = os.getpid()
    try:
        pid = os.fork()
        if pid == 0:
            descriptors = [inputs[0], printed, printed, inputs[1], proved]
            work = _program(command, files, folder, limits, apart, descriptors)
            try:
                os.setsid()
                keep(me, work, processes=limits.processes, memory=limits.memory, namespaces=apart.namespaces)
            finally:
                os._exit(1)
        for descriptor in (printed, proved):
            os.close(descriptor)
        return _watched(pid, out, proof, limits)
    finally:
        for descriptor in (*inputs, out, proof):
            os.close(descriptor)
        shutil.rmtree(folder, ignore_errors=True)


def _watched(pid: int, out: int, proof: int, limits: Limits) -> Ended:
    """Read what it prints until it ends, its time is over, or it has printed too much."""
    deadline, output, status = time.monotonic() + limits.seconds, b"", None
    os.set_blocking(out, False)
    os.set_blocking(proof, False)
    watch = [os.pidfd_open(pid)] if hasattr(os, "pidfd_open") else []
    try:
        while status is None and (left := deadline - time.monotonic()) > 0 and len(output) <= limits.output:
            readable, _, _ = select.select([out, *watch], [], [], min(left, 1.0 if watch else 0.02))
            if out in readable:
                output += _read(out)
            if not watch or watch[0] in readable:
                found, code = os.waitpid(pid, os.WNOHANG)
                status = code if found else None
        while status is not None and len(output) <= limits.output and (piece := _read(out)):
            output += piece
    finally:
        for descriptor in watch:
            os.close(descriptor)
        if status is None:
            trees.kill_below(pid)
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
    over = status is None or len(output) > limits.output
    return Ended(None if over else os.waitstatus_to_exitcode(status or 0), output[: limits.output], _read(proof))


def _read(descriptor: int) -> bytes:
    with contextlib.suppress(BlockingIOError):
        return os.read(descriptor, 65536)
    return b""


def _holding(content: bytes) -> int:
    """A descriptor from which a text can be read that lies in no file."""
    with tempfile.TemporaryFile() as file:
        file.write(content)
        file.flush()
        file.seek(0)
        return os.dup(file.fileno())


def _program(
    command: list[str], files: dict[str, bytes], folder: str, limits: Limits, apart: Room, descriptors: list[int]
) -> Callable[[int], None]:
    """What the program's process does before it becomes the program."""

    def become(_: int) -> None:
        if apart.read_only:
            kernel.read_only_but(folder, max(1, limits.file_size >> 20))
        os.chdir(folder)
        for name, content in files.items():
            with open(name, "wb") as file:
                file.write(content)
        if apart.nobody:
            os.chown(".", NOBODY, NOBODY)
            _as_nobody()
        kernel.drop_privileges()
        kernel.die_with_parent()
        most = limits.processes * 16 if apart.nobody else -1  # of all that nobody runs; another user's are limited by the worker
        for kind, amount, spare in (
            (resource.RLIMIT_CORE, 0, 0), (resource.RLIMIT_CPU, int(limits.seconds) + 1, 1), (resource.RLIMIT_AS, limits.memory, 0),
            (resource.RLIMIT_FSIZE, limits.file_size, 0), (resource.RLIMIT_NPROC, most, 0), (resource.RLIMIT_NOFILE, 64, 0),
        ):  # fmt: skip
            kernel.limit(kind, amount, spare=spare)
        high = [fcntl.fcntl(descriptor, fcntl.F_DUPFD, len(descriptors)) for descriptor in descriptors]
        for i, descriptor in enumerate(high):
            os.dup2(descriptor, i)
        os.closerange(len(high), 1 << 20)
        for number in (signal.SIGPIPE, signal.SIGXFSZ):
            signal.signal(number, signal.SIG_DFL)
        surroundings = {"PATH": "/usr/local/bin:/usr/bin:/bin", "LANG": "C.UTF-8", "HOME": folder, "TMPDIR": folder}
        os.execve(command[0], command, surroundings | {"OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0", "PYTHONUTF8": "1"})

    return become


def _as_nobody() -> bool:
    """Give up being root; whether the interpreter can still be reached then."""
    os.setgroups([])
    os.setresgid(NOBODY, NOBODY, NOBODY)
    os.setresuid(NOBODY, NOBODY, NOBODY)
    return os.access(sys.executable, os.X_OK) and os.access(os.__file__, os.R_OK)
