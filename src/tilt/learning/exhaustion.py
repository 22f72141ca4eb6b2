"""Out of memory: how it is recognised."""

from __future__ import annotations

import torch

SAID = ("out of memory", "can't allocate memory", "not enough memory", "cannot allocate memory")


def exhausted(error: BaseException) -> bool:
    """Whether an error means that memory ran out, on a GPU or on the CPU."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error).lower() for words in SAID)
