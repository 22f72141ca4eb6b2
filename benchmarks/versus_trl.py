"""Whole GRPO steps against TRL 1.16.0: the same weights, prompts, lengths, batch and optimizer, steps in turns in one run, medians and their ratio.

    python benchmarks/versus_trl.py W1 W2 --repeat 5 --json build/versus.json

TRL lives in an environment of its own, build/trl (made here at the first run, with this environment's torch and transformers), never in the project's.
Each side is a process that waits for its turn before each step, so at any time one of them computes. TRL is timed from the beginning of a step to the
end of the optimizer's; Tilt from drawing the prompts to after the step's record is written. Before the timing both are tried with each of TRL's ways
(`--tune`: micro-batches, dtype, continuous batching) and TRL goes on with its fastest.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent / "versus"))
import workloads as shared

ROOT = Path(__file__).parent.parent
PLACE = ROOT / "build" / "trl"
SCRIPTS = Path(__file__).parent / "versus"
VERSION = "1.16.0"


def installed() -> Path:
    """The Python of build/trl, set up where it is not there yet."""
    python = PLACE / "bin" / "python"
    if not (PLACE / ".ready").exists():
        import torch
        import transformers

        subprocess.run([sys.executable, "-m", "venv", str(PLACE)], check=True)
        pins = [f"torch=={torch.__version__.partition('+')[0]}", f"transformers=={transformers.__version__}", f"trl=={VERSION}"]
        subprocess.run([python, "-m", "pip", "install", "-q", *pins], check=True)
        (PLACE / ".ready").touch()
    return python


def prepared(name: str, work: shared.Workload, steps: int) -> Path:
    """A folder with the workload's model, tokenizer and prompts, as both sides read them."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

    folder = ROOT / "build" / "versus" / name
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = {word: i for i, word in enumerate(shared.words(work.shape.vocabulary))}
    plain = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=plain, eos_token=shared.END, pad_token=shared.PAD).save_pretrained(folder / "tokenizer")
    torch.manual_seed(0)
    end = work.shape.vocabulary - 2
    config = Qwen3Config(**work.shape.config(work.prompt + work.new), eos_token_id=end, pad_token_id=end + 1, bos_token_id=None)
    Qwen3ForCausalLM(config).save_pretrained(folder / "model")
    rows = shared.prompts(work, work.prompts * (steps + 2))
    (folder / "prompts.jsonl").write_text("\n".join(json.dumps({"prompt": text}) for text in rows) + "\n", encoding="utf-8")
    (folder / "workload.json").write_text(json.dumps(work.record()), encoding="utf-8")
    return folder


@dataclass
class Side:
    """A process that takes a step when told to."""

    name: str
    process: subprocess.Popen[str]

    @staticmethod
    def start(name: str, python: Path | str, script: str, folder: Path, options: dict[str, Any]) -> Side:
        threads = {key: str(options["threads"]) for key in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
        quiet = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "TRANSFORMERS_VERBOSITY": "error"}
        log = (folder / f"{name}.log").open("w", encoding="utf-8")
        return Side(
            name,
            subprocess.Popen(
                [python, str(SCRIPTS / script), str(folder), json.dumps(options)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log,
                text=True, env={**os.environ, **threads, **quiet},
            ),
        )  # fmt: skip

    def answer(self) -> dict[str, Any]:
        """The next line that it has to say."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("@@"):
                return json.loads(line[2:])
        raise SystemExit(f"{self.name} ended with {self.process.wait()}: see {ROOT / 'build' / 'versus'}")

    def go(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("go\n")
        self.process.stdin.flush()

    def step(self) -> dict[str, Any]:
        self.go()
        return self.answer()

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()


def measured(name: str, work: shared.Workload, given: argparse.Namespace) -> dict[str, Any]:
    """One workload: both sides warm up with two steps, then take turns."""
    folder, python = prepared(name, work, given.repeat + 3), installed()
    base = {"threads": given.threads, "lr": 1e-5, "loss": "dapo", "steps": given.repeat + 3}
    best = tuned(folder, python, work, base, given.tune)
    sides = {
        "trl": Side.start("trl", python, "theirs.py", folder, base | best),
        "tilt": Side.start("tilt", sys.executable, "ours.py", folder, base | {"dtype": given.dtype}),
    }
    try:
        found: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
        for side in sides.values():
            assert side.answer()["ready"]
            for _ in range(given.warm):
                side.step()
        for _ in range(given.repeat):
            for side_name, side in sides.items():
                found[side_name].append(side.step())
    finally:
        for side in sides.values():
            side.stop()
    middle = {s: {k: statistics.median(r[k] for r in rows) for k in rows[0] if isinstance(rows[0][k], float)} for s, rows in found.items()}
    return {
        "workload": name, "tuning": best, "median": middle, "seconds": {s: [r["step"] for r in rows] for s, rows in found.items()},
        "ratio": middle["trl"]["step"] / middle["tilt"]["step"], "memory": middle["trl"]["peak"] / middle["tilt"]["peak"],
    }  # fmt: skip


def tuned(folder: Path, python: Path, work: shared.Workload, base: dict[str, Any], tune: bool) -> dict[str, Any]:
    """TRL's settings: its fastest of a few, by the third step of each, or the whole batch in float32."""
    plain = {"micro": work.answers, "dtype": "float32", "paged": False}
    if not tune:
        return plain
    times: list[tuple[float, dict[str, Any]]] = []
    for change in (
        {},
        {"micro": work.answers // 4},
        {"dtype": "bfloat16"},
        {"dtype": "bfloat16", "micro": work.answers // 4},
        {"paged": True},
    ):
        side = Side.start("trl-tune", python, "theirs.py", folder, base | plain | change)
        try:
            side.answer()
            seconds = [side.step()["step"] for _ in range(3)]
        except SystemExit:
            print(f"  TRL with {change or 'whole batches'}: does not run", flush=True)
            continue
        finally:
            side.stop()
        print(f"  TRL with {change or 'whole batches'}: {min(seconds):.2f} s a step", flush=True)
        times.append((min(seconds), plain | change))
    return min(times, key=lambda pair: pair[0])[1]


def main() -> None:
    """Print a line for each workload, and the phases of both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workloads", nargs="*", default=list(shared.WORKLOADS))
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--warm", type=int, default=2)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--dtype", default="auto", help="of Tilt's computation")
    parser.add_argument("--tune", action=argparse.BooleanOptionalAction, default=True, help="try TRL's ways first")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    rows = []
    for name in given.workloads:
        row = measured(name, shared.WORKLOADS[name], given)
        rows.append(row)
        print(line(row), flush=True)
        if given.json is not None:
            given.json.write_text(json.dumps(rows, indent=1), encoding="utf-8")


def line(row: dict[str, Any]) -> str:
    trl, tilt = row["median"]["trl"], row["median"]["tilt"]
    told: Callable[[float], str] = lambda x: f"{x:.2f}"
    split = ", ".join(f"{k} {told(v)}" for k, v in tilt.items() if k not in ("step", "peak", "reward"))
    return (
        f"{row['workload']}: TRL {told(trl['step'])} s (generation {told(trl['generate'])}), Tilt {told(tilt['step'])} s ({split}), "
        f"{row['ratio']:.2f} times; peak {trl['peak']:.0f} against {tilt['peak']:.0f} MiB, {row['memory']:.2f} times"
    )


if __name__ == "__main__":
    main()
