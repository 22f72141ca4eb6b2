"""Two runs, bit by bit: metrics without clocks, stored rollouts, checkpoints."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from tilt.runs import rollout_store
from tilt.runs.checkpoints import MANIFEST, path_of, saved
from tilt.runs.directory import RunDirectory
from tilt.runs.journal import read_metrics

CLOCKS = ("time", "tokens_per_second", "eps")
"""Metrics of the clock, which no two runs share; beside them those that end in `_seconds` and those under `time/`."""


def unclocked(row: Mapping[str, Any]) -> dict[str, Any]:
    """A record of metrics without those of the clock."""
    return {name: v for name, v in row.items() if name not in CLOCKS and not name.startswith("time/") and not name.endswith("_seconds")}


def differing(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """Names of the values that are not the same bits; NaN is NaN."""
    a, b = unclocked(one), unclocked(other)
    return [name for name in dict.fromkeys([*a, *b]) if name not in a or name not in b or not _same(a[name], b[name])]


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, float) and isinstance(b, float) and math.isnan(a) and math.isnan(b):
        return True
    return (type(a) is type(b) and repr(a) == repr(b)) or (isinstance(a, int | float) and isinstance(b, int | float) and a == b and a != 0)


def metrics_differ(one: RunDirectory, other: RunDirectory) -> Iterator[str]:
    """A line for every step whose metrics differ, and for every one that only one of the runs has or has twice."""
    a, b = read_metrics(one.metrics), read_metrics(other.metrics)
    if [row["step"] for row in a] != [row["step"] for row in b]:
        yield f"metrics.jsonl: steps {_spans(a)} against {_spans(b)}"
        return
    for x, y in zip(a, b, strict=True):
        if names := differing(x, y):
            yield f"metrics.jsonl, step {x['step']}: {', '.join(f'{n} {x.get(n)!r} against {y.get(n)!r}' for n in names[:4])}"


def _spans(rows: list[dict[str, Any]]) -> str:
    steps = [int(row["step"]) for row in rows]
    return f"{steps[:2]}…{steps[-2:]} ({len(steps)})" if len(steps) > 6 else str(steps)


def rollouts_differ(one: Path, other: Path, step: int, *, skip: tuple[str, ...] = ("run",)) -> Iterator[str]:
    """A line for every column of a stored step that is not the same bits, with the first rollout in which it differs."""
    a, b = (pq.read_table(rollout_store.path_of(place, step)) for place in (one, other))
    if a.column_names != b.column_names or a.num_rows != b.num_rows:
        yield f"rollouts, step {step}: {a.num_rows} rows of {len(a.column_names)} columns against {b.num_rows} of {len(b.column_names)}"
        return
    for name in a.column_names:
        if name not in skip and not _identical(a[name], b[name]):
            rows = [i for i in range(a.num_rows) if repr(a[name][i].as_py()) != repr(b[name][i].as_py())]
            yield f"rollouts, step {step}: {name} differs{f' first in rollout {rows[0]}' if rows else ''}"


def _identical(a: pa.ChunkedArray, b: pa.ChunkedArray) -> bool:
    return bool(a.type == b.type and repr(a.to_pylist()) == repr(b.to_pylist()))


def checkpoints_differ(one: RunDirectory, other: RunDirectory) -> Iterator[str]:
    """A line for every file of the last checkpoints that is not the same bits."""
    a, b = saved(one.checkpoints), saved(other.checkpoints)
    if a[-1:] != b[-1:]:
        yield f"checkpoints: the last is {a[-1:]} against {b[-1:]}"
        return
    if not a:
        return
    files, others = (_manifest(path_of(run.checkpoints, a[-1])) for run in (one, other))
    for name in dict.fromkeys([*files, *others]):
        if files.get(name) != others.get(name):
            yield f"checkpoint step_{a[-1]:06d}: {name} differs"


def _manifest(place: Path) -> dict[str, str]:
    record = json.loads((place / MANIFEST).read_text(encoding="utf-8"))
    return {name: str(file["sha256"]) for name, file in record["files"].items()}


def differences(one: Path, other: Path) -> list[str]:
    """Everything in which two finished runs differ beside their clocks; none where they are the same, bit for bit."""
    a, b = RunDirectory(Path(one)), RunDirectory(Path(other))
    found = [*metrics_differ(a, b), *checkpoints_differ(a, b)]
    steps = [rollout_store.stored(place.rollouts) for place in (a, b)]
    if steps[0] != steps[1]:
        found.append(f"rollouts: steps {steps[0]} against {steps[1]}")
    else:
        found += [line for step in steps[0] for line in rollouts_differ(a.rollouts, b.rollouts, step)]
    return found
