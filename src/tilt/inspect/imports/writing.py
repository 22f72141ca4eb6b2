"""Imported answers and curves on disk, in the format of a run."""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tilt.errors import DataError
from tilt.inspect.tables import LISTS, SCHEMA_VERSION

Answer = dict[str, Any]
AT_ONCE = 512
TEXTS = ("prompt", "completion", "finish_reason", "dropped_reason", "split", "role", "checker")
NUMBERS = ("reward", "advantage", "group_mean", "group_std")


@dataclass
class Log:
    """What a source gives: answers one by one, each with its `step`, and rows of metrics; `said` counts what was left out and why, `notes` says the rest."""

    answers: Iterator[Answer] = field(default_factory=lambda: iter(()))
    metrics: Iterator[Mapping[str, Any]] = field(default_factory=lambda: iter(()))
    said: Counter[str] = field(default_factory=Counter)
    notes: list[str] = field(default_factory=list)


def whole(value: Any) -> int | None:
    """A step or count as a number, None for what is none: 3, 3.0 and "3" → 3."""
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return int(number) if math.isfinite(number) and number == int(number) and 0 <= number < 10**12 else None


def real(value: Any) -> float | None:
    """A number, None for what is none; text counts where it spells one."""
    if value is None or isinstance(value, bool):
        return None if value is None else float(value)
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return None


def write(log: Log, place: Path, kind: str, source: Path) -> None:
    """All answers, a file a step, and all metrics. Steps come in order or not: what belongs together is joined at the end."""
    place.mkdir(parents=True)
    parts = place / ".parts"
    (place / "rollouts").mkdir()
    parts.mkdir()
    waiting: dict[int, list[Answer]] = {}
    pieces: dict[int, int] = {}
    means: dict[int, dict[str, float]] = {}
    count = 0
    try:
        for answer in log.answers:
            waiting.setdefault(answer["step"], []).append(answer)
            count += 1
            if sum(map(len, waiting.values())) >= 16 * AT_ONCE:
                _spill(waiting, pieces, parts)
        _spill(waiting, pieces, parts)
        for step, number in sorted(pieces.items()):
            files = [parts / f"{step}-{i}.parquet" for i in range(number)]
            table = pa.concat_tables([pq.read_table(file) for file in files], promote_options="permissive")
            _step(table, step, place / "rollouts" / f"step_{step:06d}.parquet", means)
        rows = seamless(log) or [{"step": step, **means[step]} for step in sorted(means) if means[step]]
        (place / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    finally:
        for file in parts.iterdir():
            file.unlink()
        parts.rmdir()
    if not count and not rows:
        why = "; ".join(f"{n} {what}" for what, n in log.said.items()) or "it is empty"
        raise DataError(f"{source} holds no answers and no metrics: {why}")
    told = {
        "format": kind, "source": str(source), "answers": count, "steps": len(pieces), "metric_rows": len(rows), "left_out": dict(log.said), "notes": log.notes,
    }  # fmt: skip
    (place / "imported.json").write_text(json.dumps(told, indent=1, ensure_ascii=False), encoding="utf-8")


def _spill(waiting: dict[int, list[Answer]], pieces: dict[int, int], parts: Path) -> None:
    """Answers that wait to disk, so that a log of any size fits."""
    for step, answers in waiting.items():
        number = pieces.get(step, 0)
        pq.write_table(_table(answers), parts / f"{step}-{number}.parquet", compression="zstd")
        pieces[step] = number + 1
    waiting.clear()


def _table(answers: list[Answer]) -> pa.Table:
    names = list(dict.fromkeys(name for answer in answers for name in answer))
    columns: dict[str, pa.Array] = {}
    for name in names:
        values = [answer.get(name) for answer in answers]
        if name in TEXTS:
            columns[name] = pa.array([None if v is None else clean(str(v)) for v in values], pa.string())
        elif name in NUMBERS:
            columns[name] = pa.array([real(v) for v in values], pa.float64())
        elif name == "rewards":
            keys = list(dict.fromkeys(key for each in values if each for key in each))
            if keys:
                columns[name] = pa.array(
                    [{key: real((each or {}).get(key)) for key in keys} for each in values],
                    pa.struct([(key, pa.float64()) for key in keys]),
                )
        elif name in LISTS or name in ("ids", "mask", "text_offsets"):
            kind = {"ids": pa.uint32(), "mask": pa.uint8(), "text_offsets": pa.int32(), "clip": pa.int8()}.get(name, pa.float32())
            columns[name] = pa.array(values, pa.list_(kind))
        elif name in ("step", "group_id", "length", "rollout_id"):
            columns[name] = pa.array([whole(v) for v in values], pa.int64())
        elif name == "truncated":
            columns[name] = pa.array([None if v is None else bool(v) for v in values], pa.bool_())
    return pa.table(columns)


def clean(text: str) -> str:
    """Text as UTF-8 can hold it: a lone surrogate becomes `?`."""
    return text.encode("utf-8", "replace").decode("utf-8")


def _step(table: pa.Table, step: int, file: Path, means: dict[int, dict[str, float]]) -> None:
    """One step with what follows exactly from it: numbers of groups by equal prompt, and the group's mean and deviation of rewards."""
    if "group_id" not in table.column_names:
        known: dict[str, int] = {}
        table = table.append_column(
            "group_id", pa.array([known.setdefault(p or "", len(known)) for p in table["prompt"].to_pylist()], pa.int64())
        )
    if "reward" in table.column_names and "group_mean" not in table.column_names:
        groups, rewards = table["group_id"].to_pylist(), table["reward"].to_pylist()
        members: dict[Any, list[float]] = {}
        for group, reward in zip(groups, rewards, strict=True):
            members.setdefault(group, []).extend([] if reward is None or reward != reward else [reward])
        if any(len(values) > 1 for values in members.values()):
            for name, of in (("group_mean", np.mean), ("group_std", np.std)):
                table = table.append_column(name, pa.array([float(of(members[g])) if members[g] else None for g in groups], pa.float64()))
    temporary = file.with_suffix(".part")
    means[step] = _means(table)
    pq.write_table(table.replace_schema_metadata({"schema_version": str(SCHEMA_VERSION), "step": str(step)}), temporary, compression="zstd")
    os.replace(temporary, file)


def _means(table: pa.Table) -> dict[str, float]:
    """Of a log that brings no curves: the step's mean reward with its deviation, and mean length in tokens."""
    found = {}
    for name, column in (("reward", "reward"), ("length/mean", "length")):
        values = np.array(
            [v for v in (table[column].to_pylist() if column in table.column_names else []) if v is not None and math.isfinite(v)],
            np.float64,
        )
        if len(values):
            found[name] = float(values.mean())
            if name == "reward":
                found["objective/scores_std"] = float(values.std())
    return found


def seamless(log: Log) -> list[dict[str, Any]]:
    """Metrics in order of steps: where a step comes again (a run that was restarted) the later row stands, and the seam is told."""
    found: dict[int, dict[str, Any]] = {}
    last = -1
    for row in log.metrics:
        step = whole(row.get("step"))
        if step is None:
            log.said["metric rows without a step"] += 1
            continue
        if step <= last:
            log.notes.append(f"the steps go back from {last} to {step}: a restart; the later rows stand")
        if step in found:
            log.said["metric rows that a later one replaced"] += 1
        found[step] = {"step": step, **{str(k): v for k, v in row.items() if k != "step" and v is not None}}
        last = step
    return [found[step] for step in sorted(found)]
