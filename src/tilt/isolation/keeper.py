"""A keeper stands between a run and a worker: it sees the run die, the worker die, too many processes, too much memory, and leaves nothing alive behind it.

The worker's signals to its parent reach the keeper, not the run. Where the system allows it, the worker and all that it starts live in a process namespace of
their own, which ends as a whole; elsewhere they are found as the descendants of the keeper, which inherits orphans.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import struct
import sys
from collections.abc import Callable
from typing import NoReturn

from tilt.isolation import kernel, trees

LOOK = 250  # milliseconds between looks at the tree
DEAF = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
CROWD, GREED = signal.SIGUSR1, signal.SIGUSR2
"""How a keeper ends that ended its worker: too many processes, too much memory."""


def keep(run: int, work: Callable[[int], None], *, processes: int, memory: int, namespaces: int) -> NoReturn:
    """Fork a worker that calls `work(namespaces)` in new namespaces (0: none), watch it, end as it ended.

    `run` is the process that all this is for, `memory` bytes for the worker and all that it starts. A worker that exits with a code gives the keeper that code;
    one that a signal ended, that signal.
    """
    me = os.getpid()
    for number in DEAF:
        signal.signal(number, signal.SIG_IGN)
    kernel.control(kernel.PR_SET_CHILD_SUBREAPER, 1)
    outer = namespaces & ~(kernel.NEWNS if namespaces & kernel.NEWPID else 0)  # the keeper goes on reading the /proc that shows all of them
    entered = namespaces if outer and kernel.enter(outer) else 0
    apart = bool(entered & kernel.NEWPID)
    told, tell = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(told)
        kernel.die_with_parent()
        if apart:
            _first(work, entered, tell)
        os.close(tell)
        _work(work, entered)
    os.close(tell)
    _silence()
    ended = _watch(run, me, child, processes, memory)
    trees.kill_below(me)
    if apart and (status := os.read(told, 4)):
        ended = struct.unpack("i", status)[0]
    _end(ended)


def _first(work: Callable[[int], None], entered: int, tell: int) -> NoReturn:
    """The first process of the namespace: no signal from within ends it; it reaps whatever dies, and ends, and all with it, when the worker has ended."""
    if entered & kernel.NEWNS and kernel.enter(kernel.NEWNS):
        kernel.mount_processes()
    worker = os.fork()
    if worker == 0:
        os.close(tell)
        _work(work, entered)
    _silence()
    while True:
        pid, status = os.waitpid(-1, 0)
        if pid == worker:
            os.write(tell, struct.pack("i", status))
            os._exit(0)


def _work(work: Callable[[int], None], entered: int) -> NoReturn:
    for number in DEAF:
        signal.signal(number, signal.SIG_DFL)
    kernel.die_with_parent()
    if sys.platform == "linux":
        os.setsid()
    code = 1
    try:
        work(entered)
        code = 0
    finally:
        with contextlib.suppress(BaseException):
            sys.stderr.flush()
        os._exit(code)


def _silence() -> None:
    """Let go of the run's pipes, so that their ends mean what they say."""
    nothing = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(nothing, descriptor)


def _watch(run: int, me: int, child: int, processes: int, memory: int) -> int:
    """The status with which the worker ended, or which stands for what it did too much of."""
    poller, open_ends = select.poll(), []
    for pid in (run, child):
        with contextlib.suppress(OSError, AttributeError):
            open_ends.append(os.pidfd_open(pid))
            poller.register(open_ends[-1], select.POLLIN)
    while True:
        poller.poll(LOOK if len(open_ends) == 2 else LOOK // 5)
        if os.getppid() != run:
            trees.kill_below(me)
            os._exit(0)
        with contextlib.suppress(ChildProcessError):
            while (found := os.waitpid(-1, os.WNOHANG))[0]:
                if found[0] == child:
                    return found[1]
        tree = trees.below(child)
        if len(tree) > processes + 1:
            return CROWD
        if trees.memory([child, *tree], memory) > memory:
            return GREED


def _end(status: int) -> NoReturn:
    number = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
    if number:
        with contextlib.suppress(OSError, ValueError):
            signal.signal(number, signal.SIG_DFL)
        kernel.limit(kernel.resource.RLIMIT_CORE, 0)
        os.kill(os.getpid(), number)
    os._exit(os.WEXITSTATUS(status) if os.WIFEXITED(status) else 1)
