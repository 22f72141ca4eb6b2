"""Tilt's side: a recipe on a workload, one step for each line on standard input; answers on standard output are lines of JSON behind a mark."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
import workloads as shared
from workloads import say

from tilt.config.schema import parse
from tilt.recipes import dpo, rl, sft
from tilt.runs.journal import Journal
from tilt.sampling import engine

HERE = Path(__file__).parent / "workloads.py"


def in_turn() -> None:
    """Every step of a run waits for its turn after the one before has been recorded, and says how long it took, its record included.

    The first is not timed: it begins with the opening of everything.
    """
    plain, began = Journal.step, [time.perf_counter()]

    def step(self: Journal, number: int, metrics: Mapping[str, Any], stage: str = "", *, total: int | None = None) -> None:
        plain(self, number, metrics, stage, total=total)
        phases = {k.removeprefix("time/"): v for k, v in metrics.items() if k.startswith("time/") and k not in ("time/step", "time/reward")}
        right = {"reward": float(metrics["reward"])} if "reward" in metrics else {}
        if number == 0:
            say(ready=True, **right)
        else:
            here = shared.waited()
            say(step=time.perf_counter() - began[0], peak=here, **phases, **right)
        if not sys.stdin.readline():
            os._exit(0)
        began[0] = time.perf_counter()

    Journal.step = step  # type: ignore[method-assign]


def force(lengths: list[int], end: int, new: int) -> None:
    """Answers end at their token number lengths[i], and no earlier."""
    wanted, plain = np.array(lengths), engine.Queue.record

    def record(self: engine.Queue, tokens: Any, logprobs: Any, stops: Any, kept: Any = None) -> Any:
        position = self.length[self.active] + 1
        own = np.resize(wanted, self.total)[self.active]
        tokens = np.where((position == own) & (own < new), end, np.where(tokens == end, 0, tokens))
        return plain(self, tokens, logprobs, stops, kept)

    engine.Queue.record = record  # type: ignore[method-assign]


def main() -> None:
    folder, options = Path(sys.argv[1]), json.loads(sys.argv[2])
    record = json.loads((folder / "workload.json").read_text())
    recipe, settings = described(folder, record, options)
    base = {
        "model": str(folder / "model"), "tokenizer": str(folder / "tokenizer"), "steps": options["steps"], "threads": options["threads"],
        "dtype": options["dtype"], "device": options.get("device", "cpu"), "seed": options["seed"], "root": str(folder / "runs"),
        "name": f"run-{os.getpid()}", "quiet": True, "save": False,
    }  # fmt: skip
    in_turn()
    recipe.run(parse(base | settings | options.get("more", {}), recipe.Config))
    say(done=True)


def described(folder: Path, record: dict[str, Any], options: dict[str, Any]) -> tuple[ModuleType, dict[str, Any]]:
    """The recipe of a workload and its settings: the algorithm, batch and optimizer of the other side."""
    data = {"source": str(folder / "prompts.jsonl"), "held_out": 0.0, "template": "text"}
    average = "token" if options["loss"] == "dapo" else "sequence"
    group = {"algorithm": "grpo", "objective": {"penalty": {"none": {}}, "average": average}, "eval": {"every": 0, "prompts": 2}}
    optimizer = {"lr": options["lr"]}
    work = shared.recorded(record)
    if isinstance(work, shared.Lesson):
        rows = {"data": data, "batch": work.batch, "optimizer": optimizer}
        return (sft, rows) if work.kind == "sft" else (dpo, rows | {"beta": 0.1})
    if isinstance(work, shared.Race):
        return rl, group | {
            "data": data, "reward": f"{HERE}:right", "prompts": work.prompts, "samples": work.samples, "sampling": {"max_tokens": work.new},
            "optimizer": optimizer | {"warmup": work.warmup, "schedule": "linear"},
        }  # fmt: skip
    force(work.lengths(), work.shape.vocabulary - 2, work.new)
    unguarded = {"guards": {"sampler": 1e9, "probability": 1.0}, "max_mismatch": 1.0}  # a forced end has no log-probability
    return rl, group | unguarded | {
        "data": data | {"max_prompt_tokens": work.prompt, "max_tokens": work.new}, "reward": f"{HERE}:worths", "prompts": work.prompts,
        "samples": work.samples, "sampling": {"max_tokens": work.new, "slots": work.answers}, "optimizer": optimizer,
    }  # fmt: skip


if __name__ == "__main__":
    main()
