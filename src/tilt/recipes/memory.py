"""Out of memory: what to do, in the order in which it costs least."""

from __future__ import annotations

from typing import Any

import torch

from tilt.runs.machine import peak
from tilt.runs.text import size


def advice(config: Any, phase: str, error: BaseException) -> str:
    """The sizes of a run as they are, and three things to try, the cheapest first."""
    device = torch.device("cuda" if isinstance(error, torch.OutOfMemoryError) and torch.cuda.is_available() else "cpu")
    sampling = getattr(config, "sampling", None)
    sizes = {"micro_tokens": getattr(config, "micro_tokens", None), "batch": getattr(config, "batch", None)}
    sizes |= (
        {"prompts × samples": f"{config.prompts} × {config.samples}"} if hasattr(config, "samples") and hasattr(config, "prompts") else {}
    )
    sizes |= (
        {}
        if sampling is None
        else {"sampling.slots": sampling.slots, "sampling.cache_gib": sampling.cache_gib, "sampling.max_tokens": sampling.max_tokens}
    )
    micro = f"micro_tokens={max(16, (sizes['micro_tokens'] or 32) // 2)}: the same gradients in smaller pieces (halve_micro: true does it by itself)"
    slots = f"sampling.slots={max(1, (sampling.slots if sampling else 2) // 2)}, or sampling.cache_gib: fewer answers side by side, the same tokens"
    drawing = "generate" in phase or "evaluation" in phase
    first = ([slots, micro] if drawing else [micro, slots]) if sampling is not None else [micro, "a smaller batch"]
    lines = [*first, "lora={}: adapters need no optimizer state of the base; or a smaller model, or sampling.dtype=bfloat16"]
    now = ", ".join(f"{name} {value}" for name, value in sizes.items() if value is not None)
    return "\n".join(
        [
            f"out of memory in {phase or 'the run'}, at a peak of {size(peak(device))}: {(str(error) or type(error).__name__).splitlines()[0][:200]}",
            f"  now: {now}",
        ]
        + [f"  {number}. {line}" for number, line in enumerate(lines, 1)]
    )
