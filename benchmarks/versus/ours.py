"""Tilt's side: the recipe `rl` on a workload, one step for each line on standard input; answers on standard output are lines of JSON behind a mark."""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
import workloads as shared

from tilt.config.schema import parse
from tilt.recipes import rl
from tilt.sampling import engine

MARK = "@@"


def say(**found: Any) -> None:
    print(MARK + json.dumps(found), flush=True)


class Steps:
    """The source of prompts; each step waits for its turn here, and how long the last one took is said here."""

    def __init__(self, source: Any) -> None:
        self.source, self.began, self.last = source, 0.0, {}

    def draw(self, step: int, count: int) -> Any:
        self.end()
        if not sys.stdin.readline():
            os._exit(0)
        self.began = time.perf_counter()
        return self.source.draw(step, count)

    def end(self) -> None:
        if self.began:
            say(step=time.perf_counter() - self.began, peak=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, **self.last)

    def spare(self, step: int, count: int) -> Any:
        return self.source.spare(step, count)


def force(lengths: list[int], end: int, new: int, vocabulary: int) -> None:
    """Answers end at their token number lengths[i], and no earlier."""
    wanted, plain = np.array(lengths), engine.Queue.record

    def record(self: engine.Queue, tokens: Any, logprobs: Any, stops: Any, kept: Any = None) -> Any:
        position = self.length[self.active] + 1
        own = np.resize(wanted, self.total)[self.active]
        tokens = np.where((position == own) & (own < new), end, np.where(tokens == end, 0, tokens))
        return plain(self, tokens, logprobs, stops, kept)

    engine.Queue.record = record


def main() -> None:
    folder, options = Path(sys.argv[1]), json.loads(sys.argv[2])
    record = json.loads((folder / "workload.json").read_text())
    work = shared.Workload(**{**record, "shape": shared.Shape(**record["shape"])})
    force(work.lengths(), work.shape.vocabulary - 2, work.new, work.shape.vocabulary)
    config = parse(settings(folder, work, options), rl.Config)
    from contextlib import ExitStack

    from tilt.recipes import opening
    from tilt.recipes.rl import IMPORTANT, assembled, train

    with ExitStack() as ending:
        opened = assembled(config, ending)
        steps = Steps(opened.parts.source)
        directory, journal = opening.directory(config, "rl", opened.model, config.steps, IMPORTANT)
        plain = journal.step

        def told(step: int, metrics: Any, stage: str = "", **named: Any) -> None:
            steps.last = {k.removeprefix("time/"): v for k, v in metrics.items() if k.startswith("time/") and k != "time/step"} | {
                "reward": metrics.get("reward")
            }
            plain(step, metrics, stage, **named)

        journal.step = told
        say(ready=True)
        with journal:
            train(config, replace(opened.parts, source=steps), directory, journal)
    say(done=True)


def settings(folder: Path, work: shared.Workload, options: dict[str, Any]) -> dict[str, Any]:
    """The recipe's settings: GRPO without a penalty, mean over the batch's tokens, the optimizer of the other side."""
    return {
        "model": str(folder / "model"), "tokenizer": str(folder / "tokenizer"), "algorithm": "grpo",
        "objective": {"penalty": {"none": {}}, "average": "token" if options["loss"] == "dapo" else "sequence"},
        "data": {"source": str(folder / "prompts.jsonl"), "held_out": 0.0, "max_prompt_tokens": work.prompt, "max_tokens": work.new},
        "reward": f"{Path(__file__).parent / 'workloads.py'}:worths", "steps": options["steps"], "prompts": work.prompts, "samples": work.samples,
        "sampling": {"max_tokens": work.new, "slots": work.answers}, "optimizer": {"lr": options["lr"]}, "threads": options["threads"], "dtype": options["dtype"],
        "eval": {"every": 0, "prompts": 2}, "root": str(folder / "runs"), "name": f"run-{os.getpid()}", "quiet": True, "save": False, "guards": {"sampler": 1e9, "probability": 1.0}, "max_mismatch": 1.0,  # a forced end has no log-probability

        **options.get("more", {}),
    }  # fmt: skip


if __name__ == "__main__":
    main()
