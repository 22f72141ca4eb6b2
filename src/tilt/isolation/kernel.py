"""What Linux offers to hold a process: death signals, subreapers, namespaces, limits. Elsewhere these calls say that they cannot."""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import signal
import sys
from collections.abc import Callable

NEWNS, NEWIPC, NEWUSER, NEWPID, NEWNET = 0x00020000, 0x08000000, 0x10000000, 0x20000000, 0x40000000
PR_SET_PDEATHSIG, PR_SET_SECUREBITS, PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS = 1, 28, 36, 38
MS_REC, MS_PRIVATE, MS_SLAVE, MS_SAFE = 1 << 14, 1 << 18, 1 << 19, 0b1110
NO_ROOT = 0b101111  # uid 0 gains no capability by exec, nor by changing uids; both locked
SYS_CAPSET = {"x86_64": 126, "aarch64": 91}
SYS_MOUNT_SETATTR = 442

LIBC = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None


def control(option: int, value: int) -> bool:
    """prctl(option, value); whether it was done."""
    return LIBC is not None and LIBC.prctl(option, ctypes.c_ulong(value), 0, 0, 0) == 0


def die_with_parent() -> None:
    """SIGKILL to this process when the thread that made it ends."""
    control(PR_SET_PDEATHSIG, signal.SIGKILL)


def enter(flags: int) -> bool:
    """New namespaces for this process and its children (NEWPID: for its children only), as they are or through a user namespace in which this user is itself."""
    if LIBC is None:
        return False
    user, group = os.getuid(), os.getgid()
    if LIBC.unshare(flags) == 0:
        return True
    if LIBC.unshare(flags | NEWUSER) != 0:
        return False
    try:
        for name, text in (("setgroups", "deny"), ("uid_map", f"{user} {user} 1"), ("gid_map", f"{group} {group} 1")):
            with open(f"/proc/self/{name}", "w") as file:
                file.write(text)
    except OSError:
        return False
    return True


def tried(work: Callable[[], bool]) -> bool:
    """Whether `work` succeeds in a copy of this process that then ends."""
    child = os.fork()
    if child == 0:
        done = False
        with contextlib.suppress(BaseException):
            done = work()
        os._exit(0 if done else 1)
    return os.waitpid(child, 0)[1] == 0


def able(flags: int) -> bool:
    """Whether this process may have such namespaces, and children in them."""
    return LIBC is not None and tried(lambda: enter(flags) and tried(lambda: True))


def first_able(*wished: int) -> int:
    """The first of these sets of namespaces that this process may have, 0 where it may have none."""
    return next((flags for flags in wished if able(flags)), 0)


def mount_processes() -> bool:
    """In a mount namespace of its own: /proc shows the process namespace that this process is in."""
    if LIBC is None or LIBC.mount(b"none", b"/", None, MS_REC | MS_SLAVE, None) != 0:
        return False
    return bool(LIBC.mount(b"proc", b"/proc", b"proc", MS_SAFE, None) == 0)


def limit(kind: int, amount: int, *, spare: int = 0) -> None:
    """Lower a limit of this process for good, 0 for none of it below 0 for no limit; a limit that the system refuses is left to the parent's clock."""
    if amount >= 0:
        with contextlib.suppress(ValueError, OSError):
            hard = resource.getrlimit(kind)[1]
            most = amount + spare if hard == resource.RLIM_INFINITY else min(amount + spare, hard)
            resource.setrlimit(kind, (min(amount, most), most))


class _Header(ctypes.Structure):
    _fields_ = [("version", ctypes.c_uint32), ("pid", ctypes.c_int)]


class _Attributes(ctypes.Structure):
    _fields_ = [("set", ctypes.c_uint64), ("clear", ctypes.c_uint64), ("propagation", ctypes.c_uint64), ("user", ctypes.c_uint64)]


def drop_privileges() -> None:
    """No capability for this process from now on, none to be gained by exec, whoever it runs as."""
    control(PR_SET_SECUREBITS, NO_ROOT)
    number = SYS_CAPSET.get(os.uname().machine)
    if LIBC is not None and number:
        LIBC.syscall(number, ctypes.byref(_Header(0x20080522, 0)), (ctypes.c_uint32 * 6)())
    control(PR_SET_NO_NEW_PRIVS, 1)


def read_only_but(folder: str, megabytes: int) -> bool:
    """In a mount namespace of its own: nothing can be written but `folder`, which becomes an empty file system in memory of so many MiB."""
    if LIBC is None or LIBC.mount(b"none", b"/", None, MS_REC | MS_PRIVATE, None) != 0:
        return False
    read_only = _Attributes(1, 0, 0, 0)
    if LIBC.syscall(SYS_MOUNT_SETATTR, -100, b"/", 0x8000, ctypes.byref(read_only), ctypes.sizeof(read_only)) != 0:
        return False
    return bool(LIBC.mount(b"tmpfs", os.fsencode(folder), b"tmpfs", 6, f"size={megabytes}m,nr_inodes=1k,mode=0700".encode()) == 0)
