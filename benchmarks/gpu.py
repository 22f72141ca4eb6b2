"""On a GPU: first that it computes what the CPU computes, then how fast whole steps are, against the card's own measured peaks.

    python benchmarks/gpu.py                                 every workload, GRPO on all weights and PPO with four models by LoRA
    python benchmarks/gpu.py W1 0.5B --only grpo --json build/gpu.json
    python benchmarks/gpu.py --device cpu --tiny             the same code on tiny shapes, where there is no GPU

W1 to W4 are those of the comparison with TRL, W4 without its forced stops. 0.5B and 1.7B have the sizes of Qwen2.5-0.5B and Qwen3-1.7B in one family of
decoders (Qwen3), with random weights: prompts of 512 tokens, 512 new ones, 16 answers to a prompt, 256 in all.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tilt.data.packing import Pack, pack
from tilt.data.rollouts import Rollout, Sampling
from tilt.learning.guards import Guards
from tilt.learning.learner import Learner
from tilt.models import compat, loading, saving
from tilt.models.policy import Policy, RewardModel
from tilt.objectives import ALGORITHMS, Experience, NoPenalty, Rewards
from tilt.optim.optimizers import AdamW, Optimizer
from tilt.recipes import bench
from tilt.recipes.bench import Found, Lengths, Shape
from tilt.sampling.sampler import Sampler

VOCABULARY = 151_936
WORKLOADS = {
    "W1": (Shape(), Lengths(64, 64, 8, 64)),
    "W2": (Shape(), Lengths(512, 128, 16, 64)),
    "W3": (Shape(256, 4, 4, 2, 768, VOCABULARY), Lengths(128, 64, 8, 32)),
    "W4": (Shape(512, 8, 8, 4, 1536, 4096), Lengths(256, 128, 8, 64)),
    "0.5B": (Shape(896, 24, 14, 2, 4864, VOCABULARY), Lengths(512, 512, 16, 256)),
    "1.7B": (Shape(2048, 28, 16, 8, 6144, VOCABULARY), Lengths(512, 512, 16, 256)),
}
TINY = {"tiny": (Shape(32, 2, 4, 2, 48, 64), Lengths(6, 5, 2, 4))}
ALGORITHMS_RUN = {"grpo": "GRPO, all weights", "ppo": "PPO, four models by LoRA"}
ROUNDING, GRADIENT, UPDATE, HALF = 1e-4, 1e-4, 2e-2, 5e-3
"""Tolerances: log-probabilities in float32; gradients and Adam's first step as shares of their norms (it divides by gradients near 0); mean |probability| in bfloat16."""


@dataclass(frozen=True)
class Check:
    """Something that must agree, by how much it does not, and how much is tolerated."""

    name: str
    found: float
    tolerance: float

    @property
    def right(self) -> bool:
        return self.found <= self.tolerance


# --- correctness ---------------------------------------------------------------------------------------------------------


def checks(device: torch.device, shape: Shape, lengths: Lengths) -> Iterator[Check]:
    """Packed and padded rows, this device and the CPU, sampler and learner, one update, and bfloat16: all on one model and its own answers."""
    cpu, here = (_policy(shape, lengths, where) for where in (torch.device("cpu"), device))
    prompts = bench.random_prompts(cpu.lm, lengths.prompt, lengths.answers // lengths.samples)
    sampler = Sampler(here.lm, None, Sampling(max_tokens=lengths.new))
    rollouts = sampler.sample(prompts, lengths.samples, step=0)
    rollouts = [r if i % 3 else _shorter(r, 1 + i % len(r.tokens)) for i, r in enumerate(rollouts)]  # of unequal lengths
    batch = pack(rollouts)
    packed, gradient = _scores(here, batch)
    compat.use_attention(here.lm, "sdpa")
    padded, padded_gradient = _scores(here, batch)
    compat.use_attention(here.lm, "tilt")
    plain, plain_gradient = _scores(cpu, batch)
    yield Check("log-probabilities, packed rows and padded ones", _largest(packed, padded), ROUNDING)
    yield Check("gradients, packed rows and padded ones", _distance(gradient, padded_gradient), GRADIENT)
    yield Check("log-probabilities, this device and the CPU", _largest(packed, plain), ROUNDING)
    yield Check("gradients, this device and the CPU", _distance(gradient, plain_gradient), GRADIENT)
    yield Check("log-probabilities, sampler and learner", _largest(batch.sampler, packed), ROUNDING)
    half = Sampler(here.lm, None, Sampling(max_tokens=lengths.new), dtype=torch.bfloat16)
    drawn = pack(half.sample(prompts, lengths.samples, step=1))
    with torch.no_grad():
        exact = here(drawn.to(device)).logprobs.cpu()
        with torch.autocast(device.type, torch.bfloat16):
            rough = here(drawn.to(device)).logprobs.float().cpu()
    yield Check("mean |probability|, bfloat16 learner and float32", _gap(rough, exact), HALF)
    yield Check("mean |probability|, bfloat16 sampler and float32 learner", _gap(drawn.sampler, exact), HALF)
    yield Check("one update, this device and the CPU", _distance(_moved(here, batch), _moved(cpu, batch)), UPDATE)


def _policy(shape: Shape, lengths: Lengths, device: torch.device) -> Policy:
    lm = loading.tiny(
        "qwen3", vocabulary=shape.vocabulary, width=shape.width, layers=shape.layers, heads=shape.heads, context=lengths.prompt + lengths.new,
        num_key_value_heads=shape.kv_heads, intermediate_size=shape.inner, tie_word_embeddings=True,
    )  # fmt: skip
    return Policy(lm.to(device).requires_grad_(True))


def _shorter(rollout: Rollout, tokens: int) -> Rollout:
    return replace(rollout, tokens=rollout.tokens[:tokens], sampled=rollout.sampled[:tokens], logprobs=rollout.logprobs[:tokens])


def _scores(policy: Policy, batch: Pack) -> tuple[Tensor, Tensor]:
    """Log-probabilities [A], and the gradient of their weighted sum over all weights."""
    device = compat.device_of(policy)
    logprobs = policy(batch.to(device)).logprobs
    weights = torch.linspace(-1, 1, len(batch.actions), device=device)
    (weights * logprobs).sum().backward()
    gradient = torch.cat([p.grad.flatten().cpu() for p in policy.parameters() if p.grad is not None])
    policy.zero_grad(set_to_none=True)
    return logprobs.detach().cpu(), gradient


def _moved(policy: Policy, batch: Pack) -> Tensor:
    """What one optimizer step of GRPO without a penalty adds to the weights; rewards differ in every group."""
    objective = replace(ALGORITHMS["grpo"], penalty=NoPenalty())
    learner = Learner(policy, Optimizer(policy, AdamW(1e-3), 1), guards=Guards(sampler=1e-2))
    rewards = Rewards.of(torch.arange(batch.layout.sequences).remainder(3).float(), actions=len(batch.actions))
    experience: Experience = objective.prepare(rewards, learner.evaluate(batch, frozenset()), batch.layout)
    before = [p.detach().clone() for p in policy.parameters()]
    learner.update(batch, experience, objective)
    return torch.cat([(p.detach() - b).flatten().cpu() for p, b in zip(policy.parameters(), before, strict=True)])


def _largest(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max())


def _gap(one: Tensor, other: Tensor) -> float:
    return float((one.exp() - other.exp()).abs().mean())


def _distance(one: Tensor, other: Tensor) -> float:
    """Norm of the difference as a share of the other's norm."""
    return float((one - other).norm() / other.norm())


# --- speed ---------------------------------------------------------------------------------------------------------------


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


def table(found: dict[str, dict[str, Found]]) -> list[str]:
    """Lines of the page on performance."""
    lines = [
        "| workload | | parameters | step, s | prefill, tokens/s | decode, tokens/s; share of bandwidth | training, tokens/s; MFU | peak, GiB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, rows in found.items():
        for which, f in rows.items():
            lines.append(
                f"| {name} | {ALGORITHMS_RUN[which]} | {f.workload['parameters'] / 1e6:,.1f} M | {f.step:.3f} | {f.prefill.tokens_per_second:,.0f} | "
                f"{f.decode.tokens_per_second:,.0f}; {f.decode.share:.0%} | {f.training.tokens_per_second:,.0f}; {f.training.share:.0%} | {f.peak / 2**30:.2f} |"
            )
    return lines


def heading(found: dict[str, dict[str, Found]]) -> str:
    """Where and when, and of which commit."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    can = next(iter(next(iter(found.values())).values())).machine
    return (
        f"{can.device}, {date.today().isoformat()}, commit {commit.stdout.strip() or 'unknown'}, torch {torch.__version__}: measured peaks "
        f"{can.flops / 1e12:.2f} TFLOP/s in {can.dtype}, {can.bandwidth / 1e9:,.0f} GB/s"
    )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workloads", nargs="*", help=f"of {', '.join(WORKLOADS)}; all by default")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--tiny", action="store_true", help="tiny shapes in place of the workloads")
    parser.add_argument("--only", choices=tuple(ALGORITHMS_RUN))
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args(arguments)
    known = TINY if given.tiny else WORKLOADS
    if unknown := set(given.workloads) - known.keys():
        parser.error(f"no workload {', '.join(sorted(unknown))}: there are {', '.join(known)}")
    if given.device == "cuda" and not torch.cuda.is_available():
        print("not yet measured: no GPU is visible to torch. `--device cpu --tiny` runs the same code on tiny shapes")
        return 0
    device, said = torch.device(given.device), []
    for check in checks(device, *(TINY["tiny"] if given.tiny else WORKLOADS["W1"])):
        said.append(check)
        print(f"{'agrees ' if check.right else 'DIFFERS'}  {check.name}: {check.found:.1e}, tolerated {check.tolerance:.0e}", flush=True)
    if not all(check.right for check in said):
        print("what differs is computed wrongly here: nothing is timed", file=sys.stderr)
        return 1
    found: dict[str, dict[str, Found]] = {}
    for name in given.workloads or known:
        for which in [given.only] if given.only else ALGORITHMS_RUN:
            found.setdefault(name, {})[which] = measured(which, *known[name], device, given.steps)
    print("\n" + heading(found) + "\n\n" + "\n".join(table(found)))
    if given.json:
        record = {"checks": [asdict(c) for c in said], "found": {n: {w: asdict(f) for w, f in rows.items()} for n, rows in found.items()}}
        given.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
