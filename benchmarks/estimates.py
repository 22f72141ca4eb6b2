"""What `--dry-run` says of a run against what it takes, on the workloads of the comparison with TRL: seconds of each phase, and the process's memory.

    python benchmarks/estimates.py W1 W2 W3 W4 W6-sft W6-dpo W6-rm W6-pretrain --json build/estimates.json

Each estimate and each run is a process of its own. Measured are the medians over the steps after the first, and the greatest resident memory. The lessons
W6 hold out a tenth of their rows, and of them the whole run is compared, too; the reward model and pretraining learn from the same rows.
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
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent / "versus")]  # the scripts beside this one
import ours  # noqa: E402
from versus_trl import prepared  # noqa: E402
from workloads import MARK  # noqa: E402

PHASES = ("generate", "reward", "evaluate", "update", "publish", "step")
LESSON = ("load", "reference", "evaluate", "update", "run")


def child(side: str, folder: Path, steps: int, threads: int, cpu: bool = False) -> dict[str, float]:
    """A process that estimates or runs; what it found."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, __file__, "--side", side, str(folder), "--steps", str(steps), "--threads", str(threads), *["--cpu"] * cpu]
    said = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    lines = [line for line in said.stdout.splitlines() if line.startswith(MARK)]
    if not lines:
        raise SystemExit(f"{side} of {folder.name} failed:\n{said.stderr[-3000:]}")
    return dict(json.loads(lines[-1].removeprefix(MARK)))


def side(which: str, folder: Path, steps: int, threads: int, cpu: bool) -> None:
    """The estimate or the run of a workload in this process."""
    from tilt.config import parse
    from tilt.recipes import estimating, measuring, reporting

    clock = time.process_time if cpu else time.perf_counter
    estimating.perf_counter = measuring.perf_counter = reporting.perf_counter = clock
    recipe, settings = described(folder)
    base = {
        "model": str(folder / "model"), "tokenizer": str(folder / "tokenizer"), "steps": steps, "threads": threads, "dtype": "float32",
        "root": str(folder / "runs"), "name": f"run-{os.getpid()}", "quiet": True, "save": False,
    }  # fmt: skip
    config = parse(base | settings, recipe.Config)
    if recipe is not ours.rl:
        (foretold if which == "estimate" else lesson)(recipe, config, clock)
        return
    if which == "estimate":
        began = time.perf_counter()
        found, _ = estimating.estimate(config)
        seconds = {name: phase.seconds for name, phase in found.phases.items()}
        ours.say(**seconds, step=found.step, peak=found.memory / 2**20, probing=time.perf_counter() - began)
        return
    from tilt.runs.journal import read_metrics

    result = recipe.run(config)
    rows = [row for row in read_metrics(result.directory.metrics) if "time/step" in row][1:]
    times = {name: statistics.median(row[f"time/{name}"] for row in rows) for name in PHASES}
    ours.say(**times, peak=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


def described(folder: Path) -> tuple[ModuleType, dict[str, Any]]:
    """The recipe and settings of a folder: those of the comparison; of a lesson with a tenth held out, and where it has another name its recipe."""
    from tilt.recipes import pretrain, reward_model

    recipe, settings = ours.described(folder, json.loads((folder / "workload.json").read_text()), {"lr": 1e-5, "loss": "dapo"})
    if recipe is ours.rl:
        return recipe, settings
    settings["data"]["held_out"] = 0.1
    if recipe is ours.dpo and (folder / "rm").exists():
        recipe = reward_model
        del settings["beta"]
    elif recipe is ours.sft and (folder / "pretrain").exists():
        recipe, settings = pretrain, settings | {"read_as": "sft"}
    return recipe, settings


def foretold(recipe: ModuleType, config: Any, clock: Callable[[], float]) -> None:
    """What the plan of a lesson foresees."""
    from tilt.recipes import planning

    found: list[Any] = []
    plain = planning.foresee
    planning.foresee = lambda *given: found.append(plain(*given)) or found[-1]  # type: ignore[func-returns-value]
    planning.perf_counter = clock
    began = time.perf_counter()
    recipe.plan(config)
    (seen,) = found
    seconds = {name: phase.seconds for name, phase in seen.phases.items()}
    probing = time.perf_counter() - began - seconds["load"]
    ours.say(**seconds, run=seen.seconds, peak=seen.memory / 2**20, probing=probing)


def lesson(recipe: ModuleType, config: Any, clock: Callable[[], float]) -> None:
    """What the run of a lesson takes: opening it, what the reference says, evaluations, steps after the first."""
    from tilt.recipes.session import Session
    from tilt.runs.journal import Journal

    marks: list[tuple[str, float]] = []
    reference = [0.0]
    watch, record = Session.watch, Journal.step

    def watched(self: Session, phase: str) -> None:
        marks.append((phase, clock()))
        watch(self, phase)

    def recorded(self: Journal, *given: Any, **named: Any) -> None:
        marks.append(("end", clock()))
        record(self, *given, **named)

    Session.watch, Journal.step = watched, recorded  # type: ignore[method-assign]
    if hasattr(recipe, "read_anchors"):
        plain = recipe.read_anchors

        def read(*given: Any) -> Any:
            began = clock()
            found = plain(*given)
            reference[0] += clock() - began
            return found

        recipe.read_anchors = read  # type: ignore[attr-defined]
    began = clock()
    recipe.run(config)
    whole = clock() - began
    spent = [(name, after - at) for (name, at), (_, after) in pairwise(marks)]
    evaluated = [seconds for name, seconds in spent if name == "evaluate"]
    updates = [seconds for name, seconds in spent if name == "update"][1:]
    times = {
        "load": marks[0][1] - began - reference[0],
        "reference": reference[0],
        "evaluate": statistics.median(seconds for seconds in evaluated if seconds > max(evaluated) / 4),
        "update": statistics.median(updates),
    }
    ours.say(**times, run=whole, peak=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


def placed(name: str, steps: int) -> Path:
    """The workload's folder; the rows of W6 serve a reward model and pretraining, too."""
    source = {"W6-rm": "W6-dpo", "W6-pretrain": "W6-sft"}.get(name, name)
    folder = prepared(source, steps)
    for other in ("rm", "pretrain"):
        (folder / other).unlink(missing_ok=True)
    if source != name:
        (folder / name.removeprefix("W6-")).touch()
    return folder


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
        folder = placed(name, chosen.steps)
        said, took = (child(which, folder, chosen.steps, chosen.threads, chosen.cpu) for which in ("estimate", "run"))
        found[name] = {"estimated": said, "measured": took}
        print(f"{name}, estimated in {said['probing']:.1f} s")
        for key in (*(PHASES if "step" in took else LESSON), "peak"):
            unit = "MiB" if key == "peak" else "s"
            print(f"  {key:8} {said.get(key, 0.0):10.3f} {took[key]:10.3f} {said.get(key, 0.0) / max(took[key], 1e-9):6.2f}  {unit}")
    if chosen.json:
        chosen.json.parent.mkdir(parents=True, exist_ok=True)
        chosen.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
