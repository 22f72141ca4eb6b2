"""Run directories with files of their own mutated or of another version: metrics.jsonl, env.json, config.yaml, log.txt, stored rollouts; and saved agents."""

from __future__ import annotations

import io
import json
import shutil
import tempfile
from contextlib import redirect_stdout
from functools import cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from fuzz_data import tokenizers
from hostile import Target, bounded, changed, mutated, put, values
from hypothesis import strategies as st

from tilt.cli.show import show_runs
from tilt.cli.trace import show_trace
from tilt.data.rollouts import Prompt, Rollout, Sampling
from tilt.objectives import Rewards
from tilt.runs import rollout_store
from tilt.runs.directory import create
from tilt.runs.journal import Journal, read_metrics

FILES = ("metrics.jsonl", "env.json", "config.yaml", "log.txt", "rollouts/step_000001.parquet")
ROW = [
    "ids",
    "mask",
    "reward",
    "group_id",
    "completion",
    "old_logprobs",
    "new_logprobs",
    "value",
    "entropy",
    "reference_logprobs",
    "sampler_logprobs",
    "kept",
]


@cache
def good() -> Path:
    """A run of two steps with stored rollouts."""
    root = Path(tempfile.mkdtemp(prefix="tilt-fuzz-"))
    run = create(root, "run", config_yaml="recipe: rl\nalgorithm: grpo\nmodel: {kind: qwen3, width: 16}\n", command="tilt rl")
    with Journal(run, total=2, important=["reward"], quiet=True) as journal:
        for step in (1, 2):
            journal.step(step, {"reward": 0.5, "loss": float("nan")}, stage="rl")
    made = [
        Rollout(Prompt((5, 6), i // 2, {}), (7, 8, 9), (True, True, True), (-1.0, -2.0, -0.5), "stop", Sampling(), 0, (0, 0, 0, i))
        for i in range(4)
    ]
    channels = {
        name: torch.full((12,), -1.0) for name in ("old_logprobs", "new_logprobs", "sampler_logprobs", "reference_logprobs", "entropy")
    }
    table = rollout_store.RolloutTable(
        made, [("a", "b c")] * 4, Rewards.of(torch.tensor([1.0, 0.0, 1.0, 0.0])), tokenizers()[0], {}, channels
    )
    rollout_store.write(run.rollouts, 1, table)
    return run.path


def folder_of_a_run(example: tuple[str, bytes], folder: Path) -> None:
    name, content = example
    run = folder / "runs" / "run"
    shutil.copytree(good(), run)
    put(run / name, content)
    with redirect_stdout(io.StringIO()):
        with bounded():
            show_runs(str(folder / "runs"), False)
        with bounded():
            show_runs(str(folder / "runs"), True)
        with bounded():
            read_metrics(run / "metrics.jsonl")
        with bounded():
            show_trace(["grpo"], str(run), None, 0, False)


def rows(example: tuple[Any, str, list[str]], folder: Path) -> None:
    changes, version, gone = example
    stored = pq.read_table(good() / "rollouts/step_000001.parquet")
    kept = [row if isinstance(row, dict) else {} for row in changes] if isinstance(changes, list) else []
    try:
        table = pa.Table.from_pylist([{k: v for k, v in row.items() if k not in gone} for row in kept])
        table = table.replace_schema_metadata({"schema_version": version})
    except (pa.ArrowException, TypeError, ValueError, OverflowError):  # values of which no column can be made
        return
    run = folder / "runs" / "run"
    shutil.copytree(good(), run)
    try:
        pq.write_table(table if kept else stored, run / "rollouts/step_000001.parquet")
    except (pa.ArrowException, ValueError):
        return
    with bounded(), redirect_stdout(io.StringIO()):
        show_trace(["grpo"], str(run), None, 0, True)


def _seeds(name: str) -> list[bytes]:
    return [(good() / name).read_bytes()]


@st.composite
def one_file(draw: st.DrawFn) -> tuple[str, bytes]:
    name = draw(st.sampled_from(FILES))
    data = _seeds(name)
    if name in ("env.json", "metrics.jsonl") and draw(st.booleans()):
        lines = [json.loads(line) for line in data[0].splitlines()] if name == "metrics.jsonl" else [json.loads(data[0])]
        lines[0] = draw(changed(lines[0], values(["step", "stage", "reward", "process", "host"])))
        return name, "".join(json.dumps(line) + "\n" for line in lines).encode()
    return name, draw(mutated(data))


TARGETS = (
    Target("runs: a file of a run's folder", one_file(), folder_of_a_run, 40),
    Target(
        "runs: rows of stored rollouts",
        st.tuples(
            changed(pq.read_table(good() / "rollouts/step_000001.parquet").to_pylist(), values(ROW)), st.sampled_from(["1", "0", "2", "x", "", "9" * 5000, "-1"]),
            st.lists(st.sampled_from(ROW), max_size=1),
        ),
        rows, 40,
    ),
)  # fmt: skip
