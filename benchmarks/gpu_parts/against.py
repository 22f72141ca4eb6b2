"""Whole steps against TRL on a device: its transformers generation and its continuous batching, each with the largest micro-batches that it can hold, and Tilt."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import versus_trl as versus

shared = versus.shared

WAYS = {"generate": {"paged": False}, "continuous": {"paged": True}}
WAYS_TOLD = {"generate": "transformers generation", "continuous": "continuous batching"}


def compared(name: str, way: str, device: torch.device, steps: int, python: Path, ours: dict[str, Any]) -> dict[str, Any]:
    """One workload with TRL this way. The sides run one after the other, each alone on the device; Tilt's steps are the same for every way, and kept in `ours`."""
    work = versus.KNOWN[name]
    most = versus.longest(work, steps + 6)
    folder = versus.prepared(name, most)
    dtype = "bfloat16" if device.type == "cuda" else "float32"
    base = versus.asked(work, most) | {"threads": torch.get_num_threads(), "seed": 0, "dtype": dtype, "device": device.type}
    best = fitting(folder, python, base | WAYS[way], work, device)
    theirs = alone("trl", python, "theirs.py", folder, base | best, work, steps)
    if name not in ours:
        ours[name] = alone("tilt", Path(sys.executable), "ours.py", folder, base | {"dtype": "auto"}, work, steps)
    return versus.summed(name, best, {"trl": theirs, "tilt": ours[name]}) | {"way": way}


def alone(name: str, python: Path, script: str, folder: Path, options: dict[str, Any], work: Any, steps: int) -> list[dict[str, Any]]:
    """What a side said of its counted steps; of a race, of all."""
    side = versus.Side.start(name, python, script, folder, options)
    try:
        opened = side.answer()
        if isinstance(work, shared.Race):
            return versus.raced({name: side}, {name: opened}, work)[name]
        for _ in range(2):
            side.step()
        return [side.step() for _ in range(steps)]
    finally:
        side.stop()


def fitting(folder: Path, python: Path, options: dict[str, Any], work: Any, device: torch.device) -> dict[str, Any]:
    """On a GPU TRL's micro-batches are the largest that run of those whose logits fill a third of the memory, a half of them, a quarter, …, and its weights
    are in bfloat16 where that is faster; elsewhere it has whole batches."""
    whole = versus.whole(work)
    if device.type != "cuda":
        return {"micro": whole, "paged": options["paged"]}
    micro, fastest = largest(whole, work, device), None
    while fastest is None:
        best = {"micro": micro, "paged": options["paged"]}
        fastest = versus.tried(folder, python, options | best, float("inf"))
        if fastest is None and micro == 1:
            raise SystemExit(f"TRL does not run on {folder.name}: see {folder / 'trl-tune.log'}")
        micro = max(1, micro // 2)
    half = versus.tried(folder, python, options | best | {"weights": "bfloat16"}, fastest)
    return best if half is None or half >= fastest else best | {"weights": "bfloat16"}


def largest(whole: int, work: Any, device: torch.device) -> int:
    """Answers whose logits, held three times in float32, fill a third of the memory; a divisor of the whole."""
    if not isinstance(work, shared.Workload):
        return whole
    room = torch.cuda.get_device_properties(device).total_memory / 3
    micro = whole
    while micro > 1 and micro * work.new * work.shape.vocabulary * 12 > room:
        micro //= 2
    return micro


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Lines of the page on performance."""
    lines = [
        "| workload | TRL with | its micro-batches | TRL, s a step (generation) | Tilt, s a step (generation) | times | peak MiB, TRL | Tilt |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        trl, tilt = row["median"]["trl"], row["median"]["tilt"]
        drawing = [f" ({side['generate']:.2f})" if "generate" in side else "" for side in (trl, tilt)]
        micro = f"{row['tuning']['micro']}{', bfloat16 weights' if 'weights' in row['tuning'] else ''}"
        lines.append(
            f"| {row['workload']} | {WAYS_TOLD[row['way']]} | {micro} | {trl['step']:.3f}{drawing[0]} | {tilt['step']:.3f}{drawing[1]} | "
            f"{row['ratio']:.2f} | {trl['peak']:,.0f} | {tilt['peak']:,.0f} |"
        )
    return lines
