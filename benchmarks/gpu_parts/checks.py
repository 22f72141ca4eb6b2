"""What must agree on a device before anything is timed there: log-probabilities, gradients, an update and sampled tokens, each against the plain way or the CPU."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tilt import linear_head
from tilt.data.packing import Pack, pack
from tilt.data.rollouts import Rollout, Sampling
from tilt.learning.guards import Guards
from tilt.learning.learner import Learner
from tilt.models import compat, flex, loading
from tilt.models.policy import Policy
from tilt.objectives import ALGORITHMS, Experience, NoPenalty, Rewards
from tilt.optim.optimizers import AdamW, Optimizer
from tilt.recipes import bench
from tilt.recipes.bench import Lengths, Shape
from tilt.sampling import graphs
from tilt.sampling.sampler import Sampler

ROUNDING, GRADIENT, UPDATE, HALF, TEXTS = 1e-4, 1e-4, 2e-2, 5e-3, 0.1
"""Tolerances: log-probabilities in float32; gradients and Adam's first step as shares of their norms (it divides by gradients near 0); mean |probability| in
bfloat16; the share of answers that a last bit sends another way."""


@dataclass(frozen=True)
class Check:
    """Something that must agree, by how much it does not, and how much is tolerated."""

    name: str
    found: float
    tolerance: float

    @property
    def right(self) -> bool:
        return self.found <= self.tolerance


def checks(device: torch.device, shape: Shape, lengths: Lengths) -> Iterator[Check]:
    """Packed and padded rows, this device and the CPU, sampler and learner, one update, and bfloat16: all on one model and its own answers."""
    cpu, here = (policy(shape, lengths, where) for where in (torch.device("cpu"), device))
    prompts = bench.random_prompts(cpu.lm, lengths.prompt, lengths.answers // lengths.samples)
    sampler = Sampler(here.lm, None, Sampling(max_tokens=lengths.new))
    rollouts = sampler.sample(prompts, lengths.samples, step=0)
    with graphs.off():
        stepwise = sampler.sample(prompts, lengths.samples, step=0)
    rollouts = [r if i % 3 else shorter(r, 1 + i % len(r.tokens)) for i, r in enumerate(rollouts)]  # of unequal lengths
    batch = pack(rollouts)
    packed, gradient = scores(here, batch)
    with flex.off():
        bunches, bunches_gradient = scores(here, batch)
    padded, padded_gradient = plainly(here, batch)
    on_cpu, cpu_gradient = scores(cpu, batch)
    yield Check("log-probabilities, packed rows and plain padded ones", _largest(packed, padded), ROUNDING)
    yield Check("gradients, packed rows and plain padded ones", _distance(gradient, padded_gradient), GRADIENT)
    yield Check("log-probabilities, one kernel and padded bunches", _largest(packed, bunches), ROUNDING)
    yield Check("gradients, one kernel and padded bunches", _distance(gradient, bunches_gradient), GRADIENT)
    yield Check("log-probabilities, this device and the CPU", _largest(packed, on_cpu), ROUNDING)
    yield Check("gradients, this device and the CPU", _distance(gradient, cpu_gradient), GRADIENT)
    yield Check("log-probabilities, sampler and learner", _largest(batch.sampler, packed), ROUNDING)
    differing = sum(a.tokens != b.tokens[: len(a.tokens)] for a, b in zip(rollouts, stepwise, strict=True)) / len(rollouts)
    yield Check("share of answers, recorded decoding and plain steps", differing, TEXTS)
    half = Sampler(here.lm, None, Sampling(max_tokens=lengths.new), dtype=torch.bfloat16)
    drawn = pack(half.sample(prompts, lengths.samples, step=1))
    with torch.no_grad():
        exact = here(drawn.to(device)).logprobs.cpu()
        with torch.autocast(device.type, torch.bfloat16):
            rough = here(drawn.to(device)).logprobs.float().cpu()
            compat.use_attention(here.lm, "sdpa")
            rough_padded = here(drawn.to(device)).logprobs.float().cpu()
            compat.use_attention(here.lm, "tilt")
    yield Check("mean |probability|, bfloat16 learner and float32", _gap(rough, exact), HALF)
    yield Check("mean |probability|, bfloat16 packed rows and padded ones", _gap(rough, rough_padded), HALF)
    yield Check("mean |probability|, bfloat16 sampler and float32 learner", _gap(drawn.sampler, exact), HALF)
    yield Check("one update, this device and the CPU", _distance(moved(here, batch), moved(cpu, batch)), UPDATE)


def ways(device: torch.device, shape: Shape, lengths: Lengths) -> list[str]:
    """Which ways the device took, after the checks: attention and decoding."""
    lm = policy(shape, lengths, torch.device("cpu")).lm
    told = (
        [flex.told(lm, device, dtype) for dtype in (torch.float32, torch.bfloat16)]
        if flex.allowed(device)
        else ["attention  padded bunches"]
    )
    recorded = "recorded" if graphs.recorder(device) is not None else f"step by step {graphs.refused.get(device.type, '')}".strip()
    return [*dict.fromkeys(told), f"decoding   {recorded}"]


def policy(shape: Shape, lengths: Lengths, device: torch.device) -> Policy:
    lm = loading.tiny(
        "qwen3", vocabulary=shape.vocabulary, width=shape.width, layers=shape.layers, heads=shape.heads, context=lengths.prompt + lengths.new,
        num_key_value_heads=shape.kv_heads, intermediate_size=shape.inner, tie_word_embeddings=True,
    )  # fmt: skip
    return Policy(lm.to(device).requires_grad_(True))


def shorter(rollout: Rollout, tokens: int) -> Rollout:
    return replace(rollout, tokens=rollout.tokens[:tokens], sampled=rollout.sampled[:tokens], logprobs=rollout.logprobs[:tokens])


def scores(policy: Policy, batch: Pack) -> tuple[Tensor, Tensor]:
    """Log-probabilities [A], and the gradient of their weighted sum over all weights."""
    device = compat.device_of(policy)
    logprobs = policy(batch.to(device)).logprobs
    weights = torch.linspace(-1, 1, len(batch.actions), device=device)
    (weights * logprobs).sum().backward()
    gradient = torch.cat([p.grad.flatten().cpu() for p in policy.parameters() if p.grad is not None])
    policy.zero_grad(set_to_none=True)
    return logprobs.detach().cpu(), gradient


def plainly(policy: Policy, batch: Pack) -> tuple[Tensor, Tensor]:
    """The same from padded rows and plain operations."""
    compat.use_attention(policy.lm, "sdpa")
    try:
        with linear_head.plain():
            return scores(policy, batch)
    finally:
        compat.use_attention(policy.lm, "tilt")


def moved(policy: Policy, batch: Pack) -> Tensor:
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
