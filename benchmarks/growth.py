"""How cost grows: against the prompt's length, the group's size, the longest answer and the vocabulary; figures and plots for docs/performance.md.

    python benchmarks/growth.py --threads 2            measure all, write docs/performance/*.svg and docs/performance/growth.json
    python benchmarks/growth.py prompt --repeat 9      one of prompt, group, longest, vocabulary

Times are medians of runs in turns; memory is the peak of a fresh process beyond its parameters, their gradients and Adam's two averages.
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
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import Qwen3Config

from tilt import linear_head
from tilt.data.packing import pack
from tilt.data.rollouts import Prompt, Rollout, Sampling
from tilt.learning.guards import Guards
from tilt.learning.learner import Learner, Passes
from tilt.models import compat
from tilt.models.policy import Policy
from tilt.objectives import ALGORITHMS, NoPenalty, Rewards
from tilt.optim.optimizers import AdamW, Optimizer
from tilt.sampling.sampler import Sampler

sys.path.insert(0, str(Path(__file__).parent / "versus"))
from workloads import SMALL, Shape

PLACE = Path(__file__).parent.parent / "docs" / "performance"
ROW = replace(ALGORITHMS["grpo"], penalty=NoPenalty())
Points = dict[str, list[tuple[float, float]]]


@dataclass
class Bench:
    """A model with a learner and a sampler, and made-up rollouts to train on."""

    shape: Shape
    context: int

    def __post_init__(self) -> None:
        torch.manual_seed(0)
        self.lm = compat.causal_lm_from_config(Qwen3Config(**self.shape.config(self.context), eos_token_id=None)).eval()
        compat.use_attention(self.lm, "tilt")
        self.policy = Policy(self.lm)
        self.optimizer = Optimizer(self.policy, AdamW(1e-6), 10**6)
        loose = Guards(sampler=1e9, probability=1e9)
        self.learner = Learner(self.policy, self.optimizer, settings=Passes(max_gap=1e9), guards=loose)
        self.generator = torch.Generator().manual_seed(0)

    def tokens(self, count: int) -> tuple[int, ...]:
        return tuple(torch.randint(0, self.shape.vocabulary, (count,), generator=self.generator).tolist())

    def prompts(self, count: int, length: int) -> list[Prompt]:
        return [Prompt(self.tokens(length), i) for i in range(count)]

    def rollouts(self, prompts: Sequence[Prompt], lengths: Sequence[int]) -> list[Rollout]:
        """Answers of these lengths, the prompts' in turn: as many to each."""
        each = len(lengths) // len(prompts)
        return [
            Rollout(prompts[i // each], self.tokens(n), (True,) * n, (-7.0,) * n, "stop", Sampling(), 0, (0, 0, i // each, i % each))
            for i, n in enumerate(lengths)
        ]

    def update(self, rollouts: Sequence[Rollout], *, padded: bool = False) -> None:
        """The training half of a step: pack, prepare, forward, backward, optimizer."""
        compat.use_attention(self.lm, "sdpa" if padded else "tilt")
        with linear_head.plain() if padded else nullcontext():
            batch = pack(rollouts)
            signals = self.learner.evaluate(batch, frozenset())
            experience = ROW.prepare(Rewards.of(torch.rand(len(rollouts))), signals, batch.layout)
            self.learner.update(batch, experience, ROW)
        compat.use_attention(self.lm, "tilt")

    def generate(self, prompts: Sequence[Prompt], samples: int, tokens: int) -> None:
        Sampler(self.lm, None, Sampling(max_tokens=tokens), slots=len(prompts) * samples).sample(prompts, samples, step=0)


def medians(runs: Mapping[Any, Callable[[], None]], repeat: int) -> dict[Any, float]:
    """Seconds of each, taken in turns after one warm-up."""
    for run in runs.values():
        run()
    seconds: dict[Any, list[float]] = {name: [] for name in runs}
    for _ in range(repeat):
        for name, run in runs.items():
            began = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - began)
    return {name: statistics.median(found) for name, found in seconds.items()}


def prompt(repeat: int) -> Points:
    """The training half of 64 answers of 64 tokens to 4 prompts, against the prompt's length."""
    bench, sizes = Bench(SMALL, 640), (64, 128, 256, 512)
    runs: dict[Any, Callable[[], None]] = {}
    for size in sizes:
        given = bench.rollouts(bench.prompts(4, size), [64] * 64)
        runs["each prompt once", size] = lambda given=given: bench.update(given)
        runs["padded", size] = lambda given=given: bench.update(given, padded=True)
    return lines(medians(runs, repeat))


def group(repeat: int) -> Points:
    """A whole step, generation and training, of 8 prompts of 256 tokens and 32 new ones, against the answers to each."""
    bench, runs = Bench(SMALL, 320), {}
    asked = bench.prompts(8, 256)
    for size in (1, 2, 4, 8, 16, 32):
        given = bench.rollouts(asked, [32] * 8 * size)

        def step(size: int = size, given: list[Rollout] = given) -> None:
            bench.generate(asked, size, 32)
            bench.update(given)

        runs["seconds", size] = step
    return lines(medians(runs, repeat))


def longest(repeat: int) -> Points:
    """The training half of 64 answers, one of them long and the others of 16 tokens, to 8 prompts of 64, against the long one."""
    bench, runs = Bench(SMALL, 640), {}
    asked = bench.prompts(8, 64)
    for size in (16, 64, 128, 256, 512):
        given = bench.rollouts(asked, [size] + [16] * 63)
        runs["packed", size] = lambda given=given: bench.update(given)
        runs["padded", size] = lambda given=given: bench.update(given, padded=True)
    return lines(medians(runs, repeat))


def vocabulary(repeat: int) -> Points:
    """Peak MiB of an update of 32 answers of 64 tokens at width 256 beyond parameters, gradients and Adam, against the vocabulary."""
    found: Points = {"tiles of logits": [], "plain": []}
    for size in (4_096, 16_384, 65_536, 151_936):
        for name in found:
            if name == "plain" and size > 65_536:
                continue  # several GiB
            done = subprocess.run([sys.executable, __file__, "--peak", f"{size},{name}"], check=True, capture_output=True, text=True)
            found[name].append((size, float(done.stdout.split()[-1])))
    return found


def peak(size: int, name: str) -> None:
    """Print the MiB that one update needs at its peak beyond what a model at rest holds."""
    bench = Bench(Shape(256, 4, 4, 2, 768, size), 192)
    held = sum(p.numel() * 4 for p in bench.policy.parameters()) * 3 / 2**20  # gradient and averages come with the first update
    before = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20
    given = bench.rollouts(bench.prompts(4, 64), [64] * 32)
    with linear_head.plain() if name == "plain" else nullcontext():
        bench.update(given)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 - before - held)


def lines(found: dict[Any, float]) -> Points:
    made: Points = {}
    for (name, size), seconds in found.items():
        made.setdefault(name, []).append((size, seconds))
    return made


KINDS: dict[str, tuple[Callable[[int], Points], str]] = {
    "prompt": (prompt, "tokens of the prompt"),
    "group": (group, "answers to each prompt"),
    "longest": (longest, "tokens of the longest answer"),
    "vocabulary": (vocabulary, "tokens in the vocabulary"),
}


def draw(points: Points, x: str, y: str, path: Path) -> None:
    """Curves from the origin."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(4.2, 2.8), layout="constrained")
    for name, pairs in points.items():
        axes.plot(*zip(*pairs, strict=True), marker="o", markersize=3, label=name)
    axes.set(xlabel=x, ylabel=y, xlim=(0, None), ylim=(0, None))
    axes.legend(frameon=False)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def main() -> None:
    """Measure, draw and tell."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", default=list(KINDS))
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    if given.peak:
        size, name = given.peak.split(",")
        peak(int(size), name)
        return
    PLACE.mkdir(parents=True, exist_ok=True)
    kept = PLACE / "growth.json"
    rows = json.loads(kept.read_text(encoding="utf-8")) if kept.exists() else {}
    for what in given.what:
        measure, axis = KINDS[what]
        points = measure(given.repeat)
        rows[what] = points
        kept.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
        draw(points, axis, "MiB" if what == "vocabulary" else "seconds", PLACE / f"{what}.svg")
        for name, pairs in points.items():
            first, last = pairs[0], pairs[-1]
            told = ", ".join(f"{x:g}: {y:.3g}" for x, y in pairs)
            print(f"{what}, {name}: {told}; × {last[1] / first[1]:.2f} for × {last[0] / first[0]:g}", flush=True)


if __name__ == "__main__":
    main()
