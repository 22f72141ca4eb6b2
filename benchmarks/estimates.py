"""What `--dry-run` says of a step against what a step takes, on the workloads of the comparison with TRL: seconds of each phase, and the process's memory.

    python benchmarks/estimates.py W1 W2 W3 W4 --json build/estimates.json

Each estimate and each run is a process of its own. Measured are the medians over the steps after the first, and the greatest resident memory.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent / "versus")]  # the scripts beside this one
import ours  # noqa: E402
from versus_trl import prepared  # noqa: E402

PHASES = ("generate", "reward", "evaluate", "update", "publish", "step")


def child(side: str, folder: Path, steps: int, threads: int, cpu: bool = False) -> dict[str, float]:
    """A process that estimates or runs; what it found."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, __file__, "--side", side, str(folder), "--steps", str(steps), "--threads", str(threads), *["--cpu"] * cpu]
    said = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    lines = [line for line in said.stdout.splitlines() if line.startswith(ours.MARK)]
    if not lines:
        raise SystemExit(f"{side} of {folder.name} failed:\n{said.stderr[-3000:]}")
    return dict(json.loads(lines[-1].removeprefix(ours.MARK)))


def side(which: str, folder: Path, steps: int, threads: int, cpu: bool) -> None:
    """The estimate or the run of a workload in this process."""
    from tilt.config import parse
    from tilt.recipes import estimating, reporting, rl

    if cpu:
        estimating.perf_counter = reporting.perf_counter = time.process_time
    options = {"lr": 1e-5, "loss": "dapo"}
    recipe, settings = ours.described(folder, json.loads((folder / "workload.json").read_text()), options)
    base = {
        "model": str(folder / "model"), "tokenizer": str(folder / "tokenizer"), "steps": steps, "threads": threads, "dtype": "float32",
        "root": str(folder / "runs"), "name": f"run-{os.getpid()}", "quiet": True, "save": False,
    }  # fmt: skip
    config = parse(base | settings, recipe.Config)
    if which == "estimate":
        began = time.perf_counter()
        found, _ = estimating.estimate(config)
        ours.say(
            **{name: phase.seconds for name, phase in found.phases.items()},
            step=found.step,
            peak=found.memory / 2**20,
            probing=time.perf_counter() - began,
        )
        return
    from tilt.runs.journal import read_metrics

    result = rl.run(config)
    rows = [row for row in read_metrics(result.directory.metrics) if "time/step" in row][1:]
    times = {name: statistics.median(row[f"time/{name}"] for row in rows) for name in PHASES}
    ours.say(**times, peak=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


def main() -> None:
    given = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    given.add_argument("workloads", nargs="*", default=["W1", "W2", "W3", "W4"])
    given.add_argument("--steps", type=int, default=4)
    given.add_argument("--threads", type=int, default=1)
    given.add_argument("--cpu", action="store_true", help="count the process's own seconds: for one thread on a machine that is not quiet")
    given.add_argument("--json", type=Path)
    given.add_argument("--side", choices=("estimate", "run"), help=argparse.SUPPRESS)
    chosen = given.parse_args()
    if chosen.side:
        side(chosen.side, Path(chosen.workloads[0]), chosen.steps, chosen.threads, chosen.cpu)
        return
    found: dict[str, Any] = {}
    print(f"{'':10} {'estimated':>10} {'measured':>10} {'ratio':>6}")
    for name in chosen.workloads:
        folder = prepared(name, chosen.steps)
        said, took = (child(which, folder, chosen.steps, chosen.threads, chosen.cpu) for which in ("estimate", "run"))
        found[name] = {"estimated": said, "measured": took}
        print(f"{name}, estimated in {said['probing']:.1f} s")
        for key in (*PHASES, "peak"):
            unit = "MiB" if key == "peak" else "s"
            print(f"  {key:8} {said.get(key, 0.0):10.3f} {took[key]:10.3f} {said.get(key, 0.0) / max(took[key], 1e-9):6.2f}  {unit}")
    if chosen.json:
        chosen.json.parent.mkdir(parents=True, exist_ok=True)
        chosen.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
