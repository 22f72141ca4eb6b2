"""Train every row of THE TABLE on the echo task over three seeds and keep its curve: `python docs/measure_toys.py [NAME …]` writes docs/data/toys.json.

Minutes on two cores. Each curve is the mean reward of the training answers by step (chance is 1 in 6, the best is 1); rows that imitate are
measured by answers sampled to held-out prompts, on an alphabet of 26 letters, and `distill` learns from a teacher that `dapo` has trained.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from string import ascii_lowercase
from time import perf_counter
from typing import Any

from tilt.data.tokenizers import characters
from tilt.objectives import ALGORITHMS, Imitate, ProcessRelative, Teacher
from tilt.recipes import rl, sft
from tilt.tasks.echo import Echo

OUT = Path(__file__).parent / "data" / "toys.json"
SEEDS = (0, 1, 2)
SIX = Echo()
CRITIC = {"critic_lr": 1e-2}
SETTINGS: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("ppo", "ppo_sequence", "ppo_dual_clip"), CRITIC | {"passes": 2}),
    **dict.fromkeys(("a2c", "reinforce_baseline"), CRITIC),
    "ppo_kl": CRITIC | {"passes": 3, "optimizer": {"lr": 3e-3, "schedule": "linear"}},
    "trpo": CRITIC | {"objective": {"penalty": {"limit": 0.04, "damping": 0.01, "iterations": 4}}},
    "nlpo": CRITIC | {"mask": {"refresh": 10}},
    **{name: {"minibatches": 2} for name in ("gspo", "luspo")},
    "high_entropy": {"steps": 160},
}


def base(folder: Path, seed: int, task: Echo = SIX) -> dict[str, Any]:
    """A tiny model from scratch on the echo task."""
    words, rows = folder / f"words{len(task.letters)}", folder / f"rows{len(task.letters)}.jsonl"
    if not words.exists():
        characters(task.letters).save_pretrained(words)
        rows.write_text("".join(json.dumps(row) + "\n" for row in task.rows()))
    return {
        "model": {"width": 32, "layers": 2, "heads": 2, "context": 8, "tokenizer": str(words)}, "threads": 1, "quiet": True, "root": folder / "runs",
        "data": {"source": str(rows), "template": "text", "held_out": 0.1}, "seed": seed, "reward": task.reward, "sampling": {"max_tokens": 1},
        "eval": {"samples": 8},
    }  # fmt: skip


def practice(folder: Path, name: str, seed: int, **settings: Any) -> tuple[rl.Result, list[float]]:
    """One run of a row that learns from rewards, and its curve."""
    given = {
        "algorithm": name,
        "steps": 80,
        "prompts": 24,
        "samples": 8,
        "optimizer": {"lr": 5e-3, "warmup": 3, "schedule": "linear"},
        "rollouts_every": 0,
    }
    result = rl.run(rl.Config.model_validate(base(folder, seed) | given | {"save": False} | SETTINGS.get(name, {}) | settings))
    return result, _curve(result.directory.metrics, "reward")


def imitate(folder: Path, name: str, seed: int) -> list[float]:
    """One run of a row that imitates, on more letters, so that held-out prompts can be answered: what sampled answers to those earn. `dft` goes on from `sft`."""
    given = base(folder, seed, Echo(ascii_lowercase)) | {
        "steps": 160,
        "batch": 64,
        "optimizer": {"lr": 5e-3, "warmup": 3, "schedule": "linear"},
    }
    given |= {"eval": {"samples": 8, "every": 4}}
    if name != "sft":
        given |= {"model": str(sft.run(sft.Config.model_validate(given)).checkpoint)}
    return _curve(sft.run(sft.Config.model_validate(given | {"algorithm": name, "save": False})).directory.metrics, "eval/reward")


def curve(folder: Path, name: str, seed: int) -> list[float]:
    row = ALGORITHMS[name]
    if row.credit == Imitate():
        return imitate(folder, name, seed)
    if isinstance(row.credit, Teacher):
        teacher, _ = practice(folder, "dapo", seed + 100, save=True)
        return practice(folder, name, seed, reference=str(teacher.checkpoint))[1]
    return practice(folder, name, seed)[1]


def _curve(metrics: Path, key: str) -> list[float]:
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    return [round(line[key], 3) for line in lines if key in line]


def main(names: Sequence[str]) -> None:
    found = json.loads(OUT.read_text()) if OUT.exists() else {}
    wanted = names or [name for name, row in ALGORITHMS.items() if not isinstance(row.credit, ProcessRelative)]
    for name in wanted:
        began = perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            found[name] = [curve(Path(folder), name, seed) for seed in SEEDS]
        print(
            f"{name:24} "
            + "  ".join(f"{sum(c[-8:]) / len(c[-8:]):.3f}" for c in found[name])
            + f"   {(perf_counter() - began) / 3:.1f} s a run"
        )
        OUT.parent.mkdir(exist_ok=True)
        OUT.write_text(
            json.dumps({name: found[name] for name in ALGORITHMS if name in found}, separators=(",", ":")).replace('],"', '],\n"') + "\n"
        )


if __name__ == "__main__":
    main(sys.argv[1:])
