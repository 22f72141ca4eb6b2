"""How fast the real code is here: whole steps of the recipe `rl`, generation and training apart, each against what the machine was measured to do."""

from __future__ import annotations

import json
import random
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch

from tilt.config import parse
from tilt.data.packing import Pack, pack
from tilt.data.rollouts import Prompt, Rollout
from tilt.data.streams import Stream
from tilt.data.tokenizers import SPECIAL, words
from tilt.errors import UsageError
from tilt.models import compat, loading, saving
from tilt.models.work import decode_bytes, pass_flops
from tilt.objectives import Experience, ProcessRelative, Rewards, Signals
from tilt.recipes import opening, rl
from tilt.recipes.finishing import beside
from tilt.recipes.rl_settings import Config
from tilt.recipes.session import Session, session
from tilt.runs import checkpoints, machine
from tilt.runs.journal import read_metrics
from tilt.sampling.sampler import Sampler

PHASES = ("generate", "reward", "evaluate", "update", "publish")


@dataclass(frozen=True)
class Shape:
    """A decoder of the Qwen3 family with random weights, tied embeddings and grouped key heads. As it stands: 1 M parameters."""

    width: int = 128
    layers: int = 4
    heads: int = 4
    kv_heads: int = 2
    inner: int = 384
    vocabulary: int = 1024


@dataclass(frozen=True)
class Lengths:
    """What a step asks for: prompts of so many random tokens, answers of `new` tokens, `samples` to a prompt, `answers` in all."""

    prompt: int = 64
    new: int = 64
    samples: int = 8
    answers: int = 64


@dataclass(frozen=True)
class Speed:
    """A half of the work by itself: tokens a second, seconds, and the share of the machine's peak that it reached."""

    tokens_per_second: float
    seconds: float
    share: float


@dataclass(frozen=True)
class Keeping:
    """What it costs that a run can be resumed and replayed: seconds a step of journal and stored rollouts (every `rollouts_every`-th with its token
    channels), seconds in which a checkpoint stops training and in which it is written meanwhile, and the share of all that in the time of the steps."""

    record: float
    copy: float
    write: float
    share: float


@dataclass(frozen=True)
class Found:
    """Medians over `steps` whole steps and the seconds of their phases, the halves by themselves, memory in bytes, and the machine.

    `prefill` and `training` are shares of the machine's matrix products in the dtype that each computes in (training's is the MFU), `decode` of its
    bandwidth. `training` counts the tokens that went through the model, each prompt once; `peak` is the most that the process (a GPU: its tensors) held in the steps.
    """

    workload: dict[str, Any]
    steps: int
    step: float
    phases: dict[str, float]
    prefill: Speed
    decode: Speed
    training: Speed
    keeping: Keeping
    loaded: int
    peak: int
    machine: machine.Machine


def worth(prompts: list[str], completions: list[str], **columns: object) -> list[float]:
    """A reward that costs nothing and differs within every group: a hash of the answer, in [0, 1)."""
    return [sum(ord(c) * (i + 1) for i, c in enumerate(text)) % 9973 / 9973 for text in completions]


def of_shape(folder: Path, shape: Shape, lengths: Lengths, settings: dict[str, Any]) -> Config:
    """The recipe of a model of this shape, written to the folder."""
    least = len(SPECIAL) + 4
    if shape.vocabulary < least or shape.width % shape.heads or shape.heads % shape.kv_heads:
        raise UsageError(
            f"no model has this shape: {shape}\n  heads must divide width, kv-heads divide heads, and vocabulary be at least {least}"
        )
    lm = loading.tiny(
        "qwen3", vocabulary=shape.vocabulary, width=shape.width, layers=shape.layers, heads=shape.heads, context=lengths.prompt + lengths.new,
        num_key_value_heads=shape.kv_heads, intermediate_size=shape.inner, tie_word_embeddings=True,
    )  # fmt: skip
    saving.save(lm, words([f"w{i}" for i in range(shape.vocabulary - len(SPECIAL) - 3)]), folder / "model")
    return of_model(folder, str(folder / "model"), lengths, settings)


def of_model(folder: Path, model: str, lengths: Lengths, settings: dict[str, Any]) -> Config:
    """The recipe of a model: GRPO without a penalty, unless the settings say otherwise."""
    if lengths.answers % lengths.samples:
        raise UsageError(f"answers {lengths.answers} is not a multiple of samples {lengths.samples}: groups have one size")
    rows = [{"prompt": f"w{i}"} for i in range(lengths.answers // lengths.samples + 2)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    plain: dict[str, Any] = {} if settings.keys() & {"algorithm", "objective"} else {"objective": {"penalty": {"none": {}}}}
    plain |= {
        "model": model, "algorithm": "grpo", "data": {"source": str(folder / "rows.jsonl"), "held_out": 0.0, "template": "text"},
        "reward": worth, "prompts": lengths.answers // lengths.samples, "samples": lengths.samples,
        "sampling": {"max_tokens": lengths.new, "slots": max(512, lengths.answers)},
    }  # fmt: skip
    return parse(plain | settings, Config)


def random_prompts(lm: Any, length: int, count: int, seed: int = 0) -> list[Prompt]:
    """Prompts of random tokens, the first twentieth of the vocabulary (where special tokens are wont to be) left out."""
    rng, size = random.Random(seed), int(compat.head_of(lm).weight.shape[0])
    return [Prompt(tuple(rng.randrange(size // 20, size) for _ in range(length)), i) for i in range(count)]


@contextmanager
def scratch() -> Iterator[Path]:
    """A folder that is gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="tilt-bench-") as folder:
        yield Path(folder)


def bench(config: Config, folder: Path, *, steps: int, prompt: int = 0) -> Found:
    """Take 1 + `steps` steps of the recipe in this folder, the first to warm up, then each half by itself. With `prompt` the prompts are random and so long."""
    given = {"steps": steps + 1, "root": folder, "name": "bench", "quiet": True, "save": False}
    given |= {"critic_warmup": 0, "stop_rise": None, "eval": config.eval.model_copy(update={"prompts": 1, "samples": 1, "every": 0})}
    config = config.model_copy(update=given)
    with ExitStack() as ending:
        opened = rl.assembled(config, ending)
        if prompt:
            asked = random_prompts(opened.parts.sampler.lm, prompt, config.prompts + 2, config.seed)
            opened.parts.sampler.sampling = replace(opened.parts.sampler.sampling, stop_ids=(), stop_strings=())
            opened = replace(opened, parts=replace(opened.parts, source=Stream(asked, config.seed)))
        phases, kept, memory = whole(config, opened)
        return halves(config, opened, phases, kept, memory)


def whole(config: Config, opened: rl.Opened) -> tuple[dict[str, float], Keeping, tuple[int, int]]:
    """Steps of the loop: median seconds of the whole (`step`) and of each phase; what keeping them costs; bytes held before the first step, and at the peak."""
    device = opened.parts.learner.device
    loaded = machine.resident(device)
    machine.forget_peak(device)
    with session(config, "rl", opened.model, config.steps, rl.IMPORTANT) as run:
        rl.train(config, opened.parts, run)
        peak = max(loaded, machine.peak(device))  # the system counts both in steps of its own
        copying, writing = checkpoint(opened.parts, run)
    rows = [row for row in read_metrics(run.directory.metrics) if "time/step" in row][1:]
    phases = {name: median(row[f"time/{name}"] for row in rows) for name in ("step", *PHASES)}
    every = config.rollouts_every
    plain, shown = (median(times) if times else 0.0 for times in (run.recording[False][1:] or run.recording[False], run.recording[True]))
    record = (plain * (every - 1) + shown) / every if every else plain
    minutes = config.save_minutes or float("inf")
    share = record / (phases["step"] + record) + (copying + writing) / (60 * minutes)
    return phases, Keeping(record, copying, writing, share), (loaded, peak)


def checkpoint(parts: rl.Parts, run: Session) -> tuple[float, float]:
    """Seconds to copy the state of a run, in which it stands still, and to write it, which a thread does meanwhile."""
    learner = parts.learner
    run.state.publish(learner.policy.lm, parts.tokenizer, partial(beside, learner.policy, parts.tokenizer, learner.critic, learner.ema))
    began = perf_counter()
    put = run.taken()
    copied = perf_counter()
    checkpoints.save(run.directory.checkpoints, run.at, put)
    return copied - began, perf_counter() - copied


def halves(config: Config, opened: rl.Opened, phases: dict[str, float], kept: Keeping, memory: tuple[int, int]) -> Found:
    """Generation and training by themselves on the prompts of the first step, beside what the machine can do."""
    parts, repeat, new = opened.parts, config.steps - 1, config.sampling.max_tokens
    device, lm, drawn = parts.learner.device, parts.sampler.lm, parts.source.draw(0, config.prompts)
    prefill, decode, rollouts = generation(parts.sampler, drawn, config, device, repeat)
    training, flops = update(config, parts, rollouts, device, repeat)
    plain = opening.precision(config, device) is nullcontext
    can = machine.measure(device, compat.dtype_of(parts.learner.policy) if plain else torch.bfloat16)
    products = can.flops if str(compat.dtype_of(lm)) == f"torch.{can.dtype}" else machine.measure(device, compat.dtype_of(lm)).flops
    tokens = sum(len(p.tokens) for p in drawn)
    size = (config.prompts, round(tokens / len(drawn)), config.samples)
    forward = pass_flops(lm, pack([Rollout.demonstration(p, p.tokens[:1]) for p in drawn]), backward=False)
    bandwidth = decode_bytes(lm, *size, new, config.sampling.slots) / decode
    step = phases.pop("step")
    count = sum(p.numel() for p in parts.learner.policy.parameters())
    return Found(
        {"model": opened.model, "algorithm": opened.row, "parameters": count, "prompts": size[0], "prompt": size[1], "samples": size[2], "new": new},
        repeat, step, phases | {"rest": step - sum(phases.values())}, Speed(tokens / prefill, prefill, forward / prefill / products),
        Speed(len(rollouts) * (new - 1) / decode, decode, bandwidth / can.bandwidth),
        Speed(len(pack(rollouts).tokens) / training, training, flops / training / can.flops), kept, *memory, can,
    )  # fmt: skip


def generation(
    sampler: Sampler, prompts: Sequence[Prompt], config: Config, device: torch.device, repeat: int
) -> tuple[float, float, list[Rollout]]:
    """Seconds to read the prompts and to decode answers that all take the greatest length, and the answers; medians of `repeat`."""
    before, rollouts = sampler.sampling, list[Rollout]()
    times: dict[int, list[float]] = {1: [], before.max_tokens: []}
    for number in range(repeat):
        for length, found in times.items():
            sampler.sampling = replace(before, max_tokens=length, stop_ids=(), stop_strings=())
            began = perf_counter()
            rollouts = sampler.sample(prompts, config.samples, step=number, stream="bench")
            machine.wait(device)
            found.append(perf_counter() - began)
    sampler.sampling = before
    prefill = median(times[1])
    return prefill, max(1e-9, median(times[before.max_tokens]) - prefill), rollouts


def update(config: Config, parts: rl.Parts, rollouts: list[Rollout], device: torch.device, repeat: int) -> tuple[float, float]:
    """Seconds of an update with random rewards, so that every answer moves the weights: forward, backward and step; and its floating-point operations."""
    learner, objective, batch = parts.learner, parts.objective, pack(rollouts)
    times = []
    for number in range(repeat):
        experience = random_experience(parts, batch, evaluated(config, parts, batch))
        began = perf_counter()
        learner.update(batch, experience, objective, temperature=config.sampling.temperature, step=number)
        machine.wait(device)
        times.append(perf_counter() - began)
    lm = learner.policy.lm
    flops = pass_flops(lm, batch, backward=True) + (pass_flops(lm, batch, backward=True, head=False) if learner.critic is not None else 0)
    return median(times), flops * learner.settings.passes


def evaluated(config: Config, parts: rl.Parts, batch: Pack) -> Signals:
    """What the models say of a batch before its first step, as the loop asks them."""
    learner, objective = parts.learner, parts.objective
    wanted = rl.wanted(objective, config, learner.settings)
    return rl.ended(learner.evaluate(batch, wanted, temperature=config.sampling.temperature), objective)


def random_experience(parts: rl.Parts, batch: Pack, signals: Signals) -> Experience:
    """Random rewards, so that every answer moves the weights; where steps are rewarded, at the last action of each answer."""
    random, steps = torch.rand(batch.layout.sequences, generator=torch.Generator().manual_seed(0)), torch.zeros(len(batch.actions))
    if isinstance(parts.objective.credit, ProcessRelative):
        steps[batch.layout.last] = random
    return parts.objective.prepare(Rewards.of(random, steps, parts={"trial": random}), signals, batch.layout)
