"""Whole GRPO steps against TRL 1.16.0: the same weights, prompts, lengths, batch and optimizer, steps in turns in one run, medians and their ratio.

    python benchmarks/versus_trl.py W1 W2 --repeat 5

TRL lives in an environment of its own, build/trl (made here at the first run, with this environment's torch and transformers), never in the project's.
Each side is a process that waits for its turn, so at any time one of them computes; a turn is a step that is not counted and a few that are. TRL is timed from the beginning of a step to the
end of the optimizer's; Tilt from one step's record to the next. Before the timing TRL's ways are tried (`--tune`: micro-batches, dtype, continuous
batching), and it goes on with its fastest. W1 to W4 are shapes with random weights, W5 is a race to 0.9 on two-digit sums, W6 SFT and DPO on real text.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import threading
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent / "versus"))
import workloads as shared

ROOT = Path(__file__).parent.parent
PLACE = ROOT / "build" / "trl"
SCRIPTS = Path(__file__).parent / "versus"
VERSION = "1.16.0"
KEPT = ROOT / "docs" / "performance" / "versus.json"
KNOWN: dict[str, Any] = shared.WORKLOADS | shared.LARGE | shared.LESSONS | shared.RACES | shared.TINY | {"check": shared.CHECK}


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


def prepared(name: str, steps: int) -> Path:
    """A folder with the workload's model, tokenizer and prompts, as both sides read them."""
    folder = ROOT / "build" / "versus" / name
    folder.mkdir(parents=True, exist_ok=True)
    work = KNOWN[name]
    (folder / "workload.json").write_text(json.dumps(work.record()), encoding="utf-8")
    if isinstance(work, shared.Workload):
        rows = [{"prompt": text} for text in shared.prompts(work, work.prompts * (steps + 2))]
        word_tokenizer(work.shape.vocabulary).save_pretrained(folder / "tokenizer")
        random_model(work.shape, work.prompt + work.new, work.shape.vocabulary - 2, folder)
    elif isinstance(work, shared.Lesson):
        rows = instructions(work.kind)
        from tilt.data.tokenizers import train_bpe

        tokenizer = train_bpe((text for row in rows for text in row.values()), work.shape.vocabulary)
        tokenizer.save_pretrained(folder / "tokenizer")
        random_model(work.shape, work.context, tokenizer.eos_token_id, folder)
    else:
        rows = sums(folder, learned=work.learned)
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder


def word_tokenizer(size: int) -> Any:
    """One token a word."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    plain = Tokenizer(models.WordLevel({word: i for i, word in enumerate(shared.words(size))}, unk_token="w0"))
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=plain, eos_token=shared.END, pad_token=shared.PAD)


def random_model(shape: shared.Shape, context: int, end: int, folder: Path) -> None:
    """Random weights of this shape, in the folder."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    config = Qwen3Config(**shape.config(context), eos_token_id=end, pad_token_id=None, bos_token_id=None)
    Qwen3ForCausalLM(config).save_pretrained(folder / "model")


def instructions(kind: str) -> list[dict[str, str]]:
    """The 1,100 pairs of rasbt-instruct: prompts with the chosen answer, or with both."""
    if "TILT_DATA" not in os.environ:
        raise SystemExit("W6 reads rasbt-instruct: set TILT_DATA to the folder that holds it")
    rows = json.loads(
        (Path(os.environ["TILT_DATA"]) / "rasbt-instruct" / "instruction-data-with-preference.json").read_text(encoding="utf-8")
    )
    wanted = {"sft": {"completion": "chosen"}, "dpo": {"chosen": "chosen", "rejected": "rejected"}}[kind]
    return [{"prompt": shared.question(row)} | {name: row[column] for name, column in wanted.items()} for row in rows]


def sums(folder: Path, *, learned: bool) -> list[dict[str, str]]:
    """Two-digit sums to train on; a model that the quickstart's SFT has brought to 45 %, or a small random one, is put into the folder once."""
    import shutil

    from tilt.config.schema import parse
    from tilt.data.tokenizers import characters
    from tilt.recipes import quickstart, sft
    from tilt.tasks import arithmetic

    task = arithmetic.Addition()
    tokenizer = characters(arithmetic.ALPHABET)
    if not learned:
        tokenizer.save_pretrained(folder / "tokenizer")
        random_model(shared.Shape(32, 2, 4, 2, 48, len(tokenizer)), 32, tokenizer.eos_token_id, folder)
    elif not (folder / "model").exists():
        tokenizer.save_pretrained(folder / "tokenizer")
        for name, held in (("train", False), ("held_out", True)):
            (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in task.rows(held_out=held)), encoding="utf-8")
        model = {"width": 128, "layers": 4, "heads": 4, "context": 32, "tokenizer": str(folder / "tokenizer")}
        settings = {
            "model": model,
            "data": {"source": str(folder / "train.jsonl"), "eval": str(folder / "held_out.jsonl"), "template": "text"},
            "reward": {"exact": {"answer": "answer"}},
        }
        place = folder / "sft"
        shutil.rmtree(place, ignore_errors=True)
        found = sft.run(parse(settings | quickstart.ADDITION_SFT | {"root": str(folder), "name": "sft", "quiet": True}, sft.Config))
        shutil.copytree(found.checkpoint, folder / "model")
    import random

    rows = [{"prompt": row["prompt"], "answer": row["answer"]} for row in task.rows(held_out=False)]
    random.Random(0).shuffle(rows)
    return rows


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
            if line.startswith(shared.MARK):
                return json.loads(line.removeprefix(shared.MARK))
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


def measured(name: str, given: argparse.Namespace) -> dict[str, Any]:
    """One workload: both sides warm up, then take turns."""
    work = KNOWN[name]
    most = longest(work, given.repeat * (given.each + 1) + given.warm + 3)
    folder, python = prepared(name, most), installed()
    base = asked(work, most) | {"threads": given.threads, "seed": given.seed, "dtype": given.dtype}
    best = tuned(folder, python, whole(work), base, given.tune, paged=not isinstance(work, shared.Lesson))
    sides = {
        "trl": Side.start("trl", python, "theirs.py", folder, base | best),
        "tilt": Side.start("tilt", sys.executable, "ours.py", folder, base),
    }
    try:
        opened = {side: process.answer() for side, process in sides.items()}
        found = raced(sides, opened, work) if isinstance(work, shared.Race) else taken(sides, given)
    finally:
        for process in sides.values():
            process.stop()
    return summed(name, best, found)


def whole(work: shared.Workload | shared.Lesson | shared.Race) -> int:
    """Answers or rows of a step."""
    if isinstance(work, shared.Workload):
        return work.answers
    return work.batch if isinstance(work, shared.Lesson) else work.prompts * work.samples


def longest(work: shared.Workload | shared.Lesson | shared.Race, steps: int) -> int:
    """The most steps that a side may be asked for."""
    return work.steps if isinstance(work, shared.Race) else steps


def asked(work: shared.Workload | shared.Lesson | shared.Race, steps: int) -> dict[str, Any]:
    """What both sides do alike on a workload."""
    return {"lr": work.lr if isinstance(work, shared.Race) else 1e-5, "loss": "dapo", "steps": steps}


def summed(name: str, tuning: dict[str, Any], found: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Medians of what each side said of its steps, and how many times TRL's Tilt's are; of a race the seconds to its end."""
    middle = {s: {k: statistics.median(r[k] for r in rows) for k in rows[0] if isinstance(rows[0][k], float)} for s, rows in found.items()}
    seconds = {s: [r["step"] for r in rows] for s, rows in found.items()}
    told = {
        "workload": name,
        "tuning": tuning,
        "median": middle,
        "seconds": seconds,
        "memory": middle["trl"]["peak"] / middle["tilt"]["peak"],
    }
    if not isinstance(KNOWN[name], shared.Race):
        return told | {"ratio": middle["trl"]["step"] / middle["tilt"]["step"]}
    wall = {s: sum(times[1:]) + statistics.median(times) for s, times in seconds.items()}  # the first step counts as a middling one
    return told | {"wall": wall, "steps": {s: len(times) for s, times in seconds.items()}, "ratio": wall["trl"] / wall["tilt"]}


def taken(sides: dict[str, Side], given: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    """Steps in turns of a few, after those that warm up; the first of a turn finds caches cold and cores asleep, and is not counted, on either side."""
    for side in sides.values():
        for _ in range(given.warm):
            side.step()
    found: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
    for _ in range(given.repeat):
        for name, side in sides.items():
            side.step()
            found[name] += [side.step() for _ in range(given.each)]
    return found


def raced(sides: dict[str, Side], opened: dict[str, dict[str, Any]], race: shared.Race) -> dict[str, list[dict[str, Any]]]:
    """Steps in turns until each side's last few steps were right often enough. Tilt has taken its first step when it is ready."""
    found: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
    heard = {name: [told["reward"]] if "reward" in told else [] for name, told in opened.items()}
    running = list(sides)
    while running:
        for name in list(running):
            found[name].append(sides[name].step())
            if "step" not in found[name][-1]:
                raise SystemExit(
                    f"{name} did not reach {race.target} in {race.steps} steps: its last {race.window} had {heard[name][-race.window :]}"
                )
            heard[name].append(found[name][-1]["reward"])
            last = heard[name][-race.window :]
            if len(last) == race.window and statistics.mean(last) >= race.target:
                running.remove(name)
    if "tilt" in found:
        found["tilt"].insert(0, found["tilt"][0])
    return found


def tuned(folder: Path, python: Path, whole: int, base: dict[str, Any], tune: bool, *, paged: bool) -> dict[str, Any]:
    """TRL's settings: one after the other kept where it is faster, by the best of three steps, or the whole batch in float32."""
    best: dict[str, Any] = {"micro": whole, "dtype": "float32", "paged": False}
    if not tune:
        return best
    fastest = float("inf")
    ways: list[dict[str, Any]] = [{}, {"dtype": "bfloat16"}, {"micro": whole // 2}, {"micro": whole // 4}, {"micro": whole // 8}]
    for change in ways + ([{"paged": True}] if paged else []):
        seconds = tried(folder, python, base | best | change, fastest)
        print(
            f"  TRL with {change or 'whole batches'}: "
            + (f"{seconds:.2f} s a step" if seconds else "does not run, or takes three times as long"),
            flush=True,
        )
        if seconds and seconds < fastest:
            fastest, best = seconds, best | change
    return best


def tried(folder: Path, python: Path, options: dict[str, Any], fastest: float) -> float | None:
    """The best of TRL's three steps this way; None where it does not run, or where a step takes three times the fastest of another way."""
    side = Side.start("trl-tune", python, "theirs.py", folder, options)
    try:
        side.answer()
        return min(timely(side, 3 * fastest) for _ in range(3))
    except SystemExit:
        return None
    finally:
        side.stop()


def timely(side: Side, most: float) -> float:
    """Seconds of a step; the process is killed where they are more than `most`."""
    late = threading.Timer(min(most, threading.TIMEOUT_MAX), side.process.kill)
    late.start()
    try:
        return float(side.step()["step"])
    finally:
        late.cancel()


def agreed(given: argparse.Namespace) -> None:
    """Print how far both sides are apart on one step of TRL's, for two losses and two sizes of its micro-batches."""
    import same

    folder, python = prepared("check", 3), installed()
    work = shared.CHECK
    for loss in ("grpo", "dapo"):
        for micro in (work.answers, work.answers // 2):
            path = folder / f"{loss}-{micro}.pt"
            path.unlink(missing_ok=True)
            options = {
                "threads": given.threads,
                "lr": 1e-5,
                "loss": loss,
                "steps": 2,
                "seed": given.seed,
                "dtype": "float32",
                "micro": micro,
                "paged": False,
            }
            side = Side.start("trl", python, "theirs.py", folder, options | {"dump": str(path)})
            try:
                side.answer()
                side.step()
            finally:
                side.stop()
            print(same.told(f"loss_type={loss}, micro-batches of {micro}", same.compared(folder, same.read(path), loss)), flush=True)


def main() -> None:
    """Print a line for each workload, and the phases of both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workloads", nargs="*", default=[*shared.WORKLOADS, *shared.RACES, *shared.LESSONS])
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--each", type=int, default=3, help="counted steps of a turn")
    parser.add_argument("--warm", type=int, default=2)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", default="auto", help="of Tilt's computation")
    parser.add_argument("--tune", action=argparse.BooleanOptionalAction, default=True, help="try TRL's ways first")
    parser.add_argument("--json", type=Path, default=KEPT, help="where each workload's figures are kept")
    parser.add_argument("--check", action="store_true", help="compare advantages, loss and gradient of one step instead of timing")
    given = parser.parse_args()
    if given.check:
        agreed(given)
        return
    rows = json.loads(given.json.read_text(encoding="utf-8")) if given.json.exists() else {}
    for name in given.workloads:
        rows[name] = measured(name, given) | {"machine": machine(given.threads), "date": date.today().isoformat(), "commit": commit()}
        print(line(rows[name]), flush=True)
        given.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


def machine(threads: int) -> str:
    """Processor and threads."""
    found = [
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        if line.startswith("model name")
    ]
    return f"{found[0] if found else 'unknown processor'}, {threads} threads"


def commit() -> str:
    return subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()


def line(row: dict[str, Any]) -> str:
    trl, tilt = row["median"]["trl"], row["median"]["tilt"]
    split = ", ".join(f"{k} {v:.2f}" for k, v in tilt.items() if k not in ("step", "peak", "reward") and v >= 0.005)
    begun = f" (generation {trl['generate']:.2f})" if "generate" in trl else ""
    told = f"{row['workload']}: TRL {trl['step']:.2f} s{begun}, Tilt {tilt['step']:.2f} s ({split or 'update'}), {row['ratio']:.2f} times"
    if "wall" in row:
        told += "; to the target TRL {:.1f} s in {} steps, Tilt {:.1f} s in {}".format(
            *(row[k][s] for s in ("trl", "tilt") for k in ("wall", "steps"))
        )
    return f"{told}; peak {trl['peak']:.0f} against {tilt['peak']:.0f} MiB, {row['memory']:.2f} times"


if __name__ == "__main__":
    main()
