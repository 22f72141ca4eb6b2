"""What this machine can do and what this process holds, both measured: matrix products, memory bandwidth, resident memory and its peak."""

from __future__ import annotations

import ctypes
import gc
import resource
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

import torch

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass(frozen=True)
class Machine:
    """Floating-point operations a second of a large matrix product in `dtype`, and bytes a second of a large read or copy, on `device` with `threads`."""

    device: str
    threads: int
    dtype: str
    flops: float
    bandwidth: float


CPU = torch.device("cpu")


def keep_freed_memory() -> None:
    """Let glibc keep freed blocks of up to 64 MiB for the next step instead of giving them back to the system and taking them, page by page, again."""
    try:
        adjust = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):  # another C library
        return
    for parameter, value in ((-3, 2**26), (-1, 2**31 - 1)):  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD
        adjust(parameter, value)


def measure(device: torch.device, dtype: torch.dtype, *, seconds: float = 0.5) -> Machine:
    """The machine's peaks, each the best of what was tried for so long: square products of a few sizes; a sum (one read) and a copy (a read and a write)."""
    large = device.type == "cuda"
    flops = max(_product(n, device, dtype, seconds / 3) for n in ((4096, 8192, 16384) if large else (512, 1024, 2048)))
    bandwidth = max(_stream(2**31 if large else 2**28, device, seconds))
    name = torch.cuda.get_device_name(device) if large else str(device)
    return Machine(name, torch.get_num_threads(), str(dtype).removeprefix("torch."), flops, bandwidth)


def _product(n: int, device: torch.device, dtype: torch.dtype, seconds: float) -> float:
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    return 2 * n**3 / _best(lambda: torch.mm(a, b), device, seconds)


def _stream(size: int, device: torch.device, seconds: float) -> tuple[float, float]:
    """Bytes a second of summing and of copying a block far larger than any cache."""
    source, target = (torch.ones(size // 4, device=device) for _ in range(2))
    read = size / _best(source.sum, device, seconds / 2)
    return read, 2 * size / _best(lambda: target.copy_(source), device, seconds / 2)


def _best(work: Callable[[], object], device: torch.device, seconds: float) -> float:
    """Seconds of the fastest run, of at least two after one to warm up."""
    work()
    wait(device)
    times: list[float] = []
    while len(times) < 2 or sum(times) < seconds:
        began = perf_counter()
        work()
        wait(device)
        times.append(perf_counter() - began)
    return min(times)


def wait(device: torch.device) -> None:
    """Until the device has done what it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def resident(device: torch.device = CPU) -> int:
    """Bytes held now: of a GPU by torch's tensors, of a CPU by the process."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return _status("VmRSS") if STATUS.exists() else peak()


def peak(device: torch.device = CPU) -> int:
    """The most bytes held since the process began, or since `forget_peak` where the system can forget."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return _status("VmHWM") if STATUS.exists() else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def forget_peak(device: torch.device = CPU) -> None:
    """Let the peak begin anew; on a CPU only Linux can, elsewhere it stays that of the whole process."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif CLEAR.exists():
        CLEAR.write_text("5")


def trim() -> None:
    """Give back to the system what the process holds and does not use, where its C library can."""
    gc.collect()
    release = getattr(ctypes.CDLL(None), "malloc_trim", None) if STATUS.exists() else None
    if release is not None:
        release(0)


def _status(name: str) -> int:
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(name + ":"))
    return int(line.split()[1]) * 1024
