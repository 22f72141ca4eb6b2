"""On a GPU: first that it computes what the CPU computes, then how fast whole steps are against the card's own measured peaks, then against TRL.

    python benchmarks/gpu.py                                    everything
    python benchmarks/gpu.py W1 0.5B --part speed --only grpo   a part: `check`, `speed` or `trl`, some workloads, one algorithm
    python benchmarks/gpu.py 0.5B --part trl --way continuous   TRL with continuous batching alone, `generate` with transformers generation
    python benchmarks/gpu.py --device cpu --tiny                the same code on tiny shapes, where there is no GPU

W1 to W6 are those of the comparison with TRL; the part `speed` has W1 to W4, W4 without its forced stops. 0.5B and 1.7B have the sizes of Qwen2.5-0.5B and
Qwen3-1.7B in one family of decoders (Qwen3), with random weights: prompts of 512 tokens, 512 new ones, 16 answers to a prompt, 256 in all. The checks come
first in every part. A workload of a part, with one algorithm or way, is meant to take less than ten minutes; `--minutes` begins nothing new after so many, and
`--json` keeps each figure as soon as it is there, beside those that the file holds. TRL runs with the Python of build/trl, or that of `--trl`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))
from gpu_parts import against
from gpu_parts.checks import checks, ways

from tilt.models import loading, saving
from tilt.models.policy import Policy, RewardModel
from tilt.recipes import bench
from tilt.recipes.bench import Found, Lengths, Shape

shared = against.shared
ALGORITHMS_RUN = {"grpo": "GRPO, all weights", "ppo": "PPO, four models by LoRA"}
PARTS = ("check", "speed", "trl")
WORKLOADS: dict[str, Any] = shared.WORKLOADS | shared.RACES | shared.LESSONS | shared.LARGE


def sized(work: shared.Workload) -> tuple[Shape, Lengths]:
    """A workload as the benchmark of whole steps reads it."""
    return Shape(**asdict(work.shape)), Lengths(work.prompt, work.new, work.samples, work.answers)


def measured(which: str, shape: Shape, lengths: Lengths, device: torch.device, steps: int) -> Found:
    """Whole steps of the recipe on a workload: GRPO on all weights, or PPO with policy, reference, critic and reward model, the policy by LoRA."""
    with tempfile.TemporaryDirectory(prefix="tilt-gpu-") as name:
        folder = Path(name)
        settings: dict[str, Any] = {"device": device.type}
        config = bench.of_shape(folder, shape, lengths, settings)
        if which == "ppo":
            lm, tokenizer = loading.load(folder / "model")
            saving.save(RewardModel.from_policy(Policy(lm), padding=tokenizer.pad_token_id).model, tokenizer, folder / "reward")
            del lm
            settings |= {"algorithm": "ppo", "lora": {}, "critic": "reward_model", "reward": {"model": str(folder / "reward")}}
            config = bench.of_model(folder, str(folder / "model"), lengths, settings)
        return bench.bench(config, folder, steps=steps, prompt=lengths.prompt)


def table(found: dict[str, dict[str, dict[str, Any]]]) -> list[str]:
    """Lines of the page on performance."""
    lines = [
        "| workload | | parameters | step, s | prefill, tokens/s | decode, tokens/s; share of bandwidth | training, tokens/s; MFU | peak, GiB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, rows in found.items():
        for which, f in rows.items():
            prefill, decode, training = (f[part] for part in ("prefill", "decode", "training"))
            lines.append(
                f"| {name} | {ALGORITHMS_RUN[which]} | {f['workload']['parameters'] / 1e6:,.1f} M | {f['step']:.3f} | {prefill['tokens_per_second']:,.0f} | "
                f"{decode['tokens_per_second']:,.0f}; {decode['share']:.0%} | {training['tokens_per_second']:,.0f}; {training['share']:.0%} | {f['peak'] / 2**30:.2f} |"
            )
    return lines


def heading(device: torch.device) -> str:
    """Where and when, and of which commit."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
    return f"{name}, {date.today().isoformat()}, commit {commit.stdout.strip() or 'unknown'}, torch {torch.__version__}"


def peaks(found: dict[str, dict[str, dict[str, Any]]]) -> str:
    """What the device was measured to do beside the first figures."""
    can = next(iter(next(iter(found.values())).values()))["machine"]
    return f"measured peaks: {can['flops'] / 1e12:.2f} TFLOP/s in {can['dtype']}, {can['bandwidth'] / 1e9:,.0f} GB/s"


def planned(given: argparse.Namespace, known: dict[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Part, workload, and algorithm or TRL's way, of all that is asked for."""
    names = given.workloads or list(known)
    for part in given.part or PARTS:
        for name in names:
            work = known[name]
            if part == "speed" and isinstance(work, shared.Workload):
                yield from ((part, name, which) for which in ([given.only] if given.only else ALGORITHMS_RUN))
            if part == "trl":
                every = list(against.WAYS) if not isinstance(work, shared.Lesson) else ["generate"]
                yield from ((part, name, way) for way in every if given.way in (None, way))


def agrees(device: torch.device, shape: Shape, lengths: Lengths, record: dict[str, Any]) -> bool:
    """Print every check and which ways the device took; whether all agree."""
    said = []
    for check in checks(device, shape, lengths):
        said.append(check)
        print(f"{'agrees ' if check.right else 'DIFFERS'}  {check.name}: {check.found:.1e}, tolerated {check.tolerance:.0e}", flush=True)
    record["checks"], record["ways"] = [asdict(c) for c in said], ways(device, shape, lengths)
    print("\n".join(record["ways"]), flush=True)
    return all(check.right for check in said)


def trl(given: argparse.Namespace) -> Path | None:
    """The Python that has TRL; None where there is none and none can be made."""
    if given.trl is not None:
        return Path(given.trl)
    try:
        return against.versus.installed()
    except (subprocess.CalledProcessError, OSError) as error:
        print(
            f"not compared: TRL cannot be installed into {against.versus.PLACE} here ({error}); name a Python that has it by --trl",
            flush=True,
        )
        return None


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workloads", nargs="*", help=f"of {', '.join(WORKLOADS)}; all by default")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--tiny", action="store_true", help="tiny shapes in place of the workloads")
    parser.add_argument("--part", action="append", choices=PARTS, help="may be given again; all by default")
    parser.add_argument("--only", choices=tuple(ALGORITHMS_RUN), help="of the part speed")
    parser.add_argument("--way", choices=tuple(against.WAYS), help="of the part trl")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin nothing new after so many")
    parser.add_argument("--trl", help="a Python that has TRL 1.16.0")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args(arguments)
    known = shared.TINY if given.tiny else WORKLOADS
    if unknown := set(given.workloads) - known.keys():
        parser.error(f"no workload {', '.join(sorted(unknown))}: there are {', '.join(known)}")
    if given.device == "cuda" and not torch.cuda.is_available():
        print("not yet measured: no GPU is visible to torch. `--device cpu --tiny` runs the same code on tiny shapes")
        return 0
    until, device = time.monotonic() + 60 * given.minutes, torch.device(given.device)
    record: dict[str, Any] = json.loads(given.json.read_text(encoding="utf-8")) if given.json and given.json.exists() else {}
    record["heading"] = heading(device)
    if not agrees(device, *sized(known["tiny" if given.tiny else "W1"]), record):
        print("what differs is computed wrongly here: nothing is timed", file=sys.stderr)
        return 1
    write(given.json, record)
    measure_all(given, known, device, until, record)
    print("\n" + record["heading"])
    if record.get("found"):
        print(peaks(record["found"]) + "\n\n" + "\n".join(table(record["found"])))
    if record.get("trl"):
        print("\n" + "\n".join(against.table([row for rows in record["trl"].values() for row in rows.values()])))
    return 0


def measure_all(given: argparse.Namespace, known: dict[str, Any], device: torch.device, until: float, record: dict[str, Any]) -> None:
    """Everything that is asked for and for which there is time; the record is written after each figure."""
    python: Path | None = None
    ours: dict[str, Any] = {}
    for part, name, how in planned(given, known):
        if time.monotonic() > until:
            print(f"left out, the time is up: {part} {name} {how}", flush=True)
            continue
        if part == "speed":
            kept, row = "found", asdict(measured(how, *sized(known[name]), device, given.steps))
        else:
            python = python or trl(given)
            if python is None:
                return
            kept, row = "trl", against.compared(name, how, device, given.steps, python, ours)
        record.setdefault(kept, {}).setdefault(name, {})[how] = row
        print(f"{part} {name} {how}: {row['step']:.3f} s a step" if part == "speed" else against.versus.line(row), flush=True)
        write(given.json, record)


def write(path: Path | None, record: dict[str, Any]) -> None:
    if path is not None:
        path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
