"""What a step would take, from short trials of the verbs that a run uses: seconds and bytes of each phase, by what was measured and scaled to the whole step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from time import perf_counter

import torch
from torch import Tensor

from tilt.data.packing import Pack, pack
from tilt.data.rollouts import Prompt, Rollout
from tilt.models import compat
from tilt.models.policy import Policy
from tilt.models.work import cached_bytes
from tilt.objectives import Signals
from tilt.recipes import rl
from tilt.recipes.bench import evaluated, random_experience, worth
from tilt.recipes.measuring import BUDGET, Phase, parameters, saved, size, timed
from tilt.recipes.planning import ABSENT
from tilt.recipes.rl_settings import Config
from tilt.recipes.settings import Guards
from tilt.runs import machine
from tilt.runs.text import duration
from tilt.sampling.probe import halving

DRAWING = 6.0  # seconds that answers may be drawn for: how long they get is known from so many alone
WORTH = 1.15  # gain of bfloat16 in sampling from which on it is mentioned
SHORT = 6  # decoding steps of a short trial


@dataclass(frozen=True)
class Estimate:
    """A step's phases, and `load` before the first; `held` bytes stay from step to step. `tokens` go through the model in a step, each prompt once.

    `length` is the mean length of the answers that the model gives now, `longest` the seconds of a step in which every answer is as long as it may be.
    """

    phases: dict[str, Phase]
    held: float
    tokens: float
    length: float
    longest: float
    activations: float

    @property
    def step(self) -> float:
        """Seconds of a step."""
        return sum(phase.seconds for name, phase in self.phases.items() if name != "load")

    @property
    def memory(self) -> float:
        """Bytes of the process (a GPU: of its tensors) at the peak."""
        return self.held + max(phase.memory for phase in self.phases.values())


def estimate(config: Config) -> tuple[Estimate, rl.Opened]:
    """Open what a run opens and try its verbs; the models in memory are moved by it, and nothing is written. Without a reward a free one stands in."""
    free = {} if config.reward is not None else {"reward": worth, "critic": "policy" if config.critic == "reward_model" else config.critic}
    loose = Guards(sampler=1e9, old=1e9, reference=1e9, probability=1e9, clipped=1.0)  # what is tried here is put together, not sampled
    config = config.model_copy(update={"guards": loose, "max_mismatch": 1e9, **free})
    with ExitStack() as ending:
        began = perf_counter()
        opened = rl.assembled(config, ending)
        load = perf_counter() - began
        drawn, generate = generation(config, opened)
        mixed = config.keep.draws if config.keep.mixed else 1
        asked = opened.parts.source.draw(0, config.prompts)
        whole = pack(filled(asked, config.samples, drawn))
        reward = _timed(opened, lambda: opened.parts.scoring.judge(drawn, training=False))
        share = config.prompts * config.samples / len(drawn)
        held, evaluate, update, activations = training(config, opened, asked, drawn, whole)
        publish = _timed(opened, lambda: opened.parts.sampler.load(opened.parts.learner.policy))
        phases = {
            "load": Phase(load), "generate": Phase(generate(False) * mixed, generate.memory), "reward": Phase(reward.seconds * share * mixed, reward.memory),
            "evaluate": evaluate, "update": update, "publish": publish,
        }  # fmt: skip
    length = sum(len(r.tokens) for r in drawn) / len(drawn)
    answered = config.prompts * config.samples
    full = len(whole.tokens) + answered * (config.sampling.max_tokens - length)
    trained = (evaluate.seconds + update.seconds) * full / len(whole.tokens)
    longest = generate(True) * mixed + phases["reward"].seconds + trained + publish.seconds
    return Estimate(phases, held, len(whole.tokens), length, longest, activations), opened


@dataclass(frozen=True)
class Decoding:
    """Seconds to generate a step's answers: called with whether every one is as long as may be, else as `lengths` says; a decoding step of r rows whose
    answers have t tokens takes `step` + r · (`row` + `growth` · (t - `middle`)). `known` are the seconds of the whole where it was tried."""

    known: float
    prefill: float
    step: float
    row: float
    growth: float
    middle: float
    lengths: Tensor
    answers: int
    slots: int
    longest: int
    memory: float

    def __call__(self, longest: bool) -> float:
        if not longest and self.known:
            return self.known
        lengths = torch.full((1,), float(self.longest)) if longest else self.lengths
        rows = min(self.answers, self.slots)
        return self.prefill + self.answers / rows * self.decoding(lengths, rows)

    def grown(self, drawn: Sequence[Rollout], seconds: float) -> Decoding:
        """The same with the lengths of answers that were drawn to their ends, and the growth that explains the seconds of decoding them."""
        lengths = torch.tensor([float(len(r.tokens)) for r in drawn])
        slope = sum(float((lengths > t).sum()) * (t - self.middle) for t in range(1, int(lengths.max())))
        return replace(self, lengths=lengths, growth=max(0.0, seconds - self.decoding(lengths, len(drawn))) / max(slope, 1.0))

    def decoding(self, lengths: Tensor, rows: int) -> float:
        """The steps after the first token of so many rows whose lengths are distributed like these."""
        total = 0.0
        for t in range(1, int(lengths.max())):
            active = float((lengths > t).double().mean())
            some = active > 0 if rows == len(lengths) else 1 - (1 - active) ** rows
            total += self.step * some + rows * active * (self.row + self.growth * (t - self.middle))
        return total


def generation(config: Config, opened: rl.Opened) -> tuple[list[Rollout], Decoding]:
    """Answers of the model as it is, drawn to their ends for as many prompts as the budget allows, and what a step's take.

    Tried are all prompts for one token and for a few, then one for both and to the end: overhead, cost of a row, and its growth with the answer; then as
    many to the end as the budget allows.
    """
    sampler, plain = opened.parts.sampler, opened.parts.sampler.sampling
    if config.mask is not None:
        sampler.mask(config.mask.top_p)
    prompts, answers, new = opened.parts.source.draw(0, config.prompts), config.prompts * config.samples, plain.max_tokens
    rows = min(answers, sampler.slots)
    few = prompts[: max(1, rows // config.samples)]
    rows = len(few) * config.samples

    def draw(asked: Sequence[Prompt], tokens: int, free: bool = False) -> tuple[float, float, list[Rollout]]:
        found: list[Rollout] = []
        short = replace(plain, max_tokens=min(tokens, new))
        sampler.sampling = short if free else replace(short, stop_ids=(), stop_strings=())
        phase = _timed(opened, lambda: found.extend(sampler.sample(asked, config.samples, step=0, stream="trial")))
        sampler.sampling = plain
        return phase.seconds, phase.memory, found

    draw(few, 2)  # the first pass of a size asks the system for memory, later ones have it
    (first, space, _), (short, _, _) = draw(few, 1), draw(few, 1 + SHORT)
    (base, _, _), (brief, _, _), (seconds, more, drawn) = draw(few[:1], 1), draw(few[:1], 1 + SHORT), draw(few[:1], new, free=True)
    steps = max(1, min(SHORT, new - 1))
    each, smaller = (max(1e-9, after - before) / steps for before, after in ((first, short), (base, brief)))
    row = max(0.0, each - smaller) / (rows - config.samples) if len(few) > 1 else each / rows
    flat = Decoding(
        0.0,
        first * len(prompts) / len(few),
        max(0.0, each - row * rows),
        row,
        0.0,
        (steps + 1) / 2,
        torch.ones(1),
        answers,
        rows,
        new,
        space,
    )
    found, count = flat.grown(drawn, seconds - base), 1
    if (able := min(len(few), int(DRAWING * len(prompts) / max(found(False), 1e-9)))) > 1:
        seconds, more, drawn = draw(few[:able], new, free=True)
        found, count = flat.grown(drawn, seconds - first * able / len(few)), able
    return drawn, replace(found, known=seconds if count == len(prompts) else 0.0, memory=max(space, more))


def filled(prompts: Sequence[Prompt], samples: int, drawn: Sequence[Rollout]) -> list[Rollout]:
    """Answers to these prompts with the tokens of those that were drawn, over and over."""
    return [replace(drawn[i % len(drawn)], prompt=prompts[i // samples]) for i in range(len(prompts) * samples)]


def training(
    config: Config, opened: rl.Opened, asked: Sequence[Prompt], drawn: Sequence[Rollout], whole: Pack
) -> tuple[float, Phase, Phase, float]:
    """Bytes held from step to step, the phases evaluate and update, and bytes a token kept for the backward pass.

    A first update of one short group makes the optimizer's state, a second tells what an update takes beside its tokens; then so many groups as
    fill a chunk of the vocabulary head and the budget.
    """
    learner = opened.parts.learner
    tiny = pack([replace(r, tokens=r.tokens[:1], sampled=r.sampled[:1], logprobs=r.logprobs[:1], kept=None if r.kept is None else r.kept.part(0, 1))
                 for r in filled(asked[:1], config.samples, drawn)])  # fmt: skip
    _update(config, opened, tiny)
    beside = _update(config, opened, tiny)[1].seconds
    groups = min(len(asked), -(-learner.policy.chunk * len(asked) // max(1, len(whole.actions))))
    batch = pack(filled(asked[:groups], config.samples, drawn))
    activations, forward = kept(config, opened, batch)
    able = int(groups * BUDGET / max(3 * forward, 1e-9))
    if able > groups:
        groups = min(len(asked), able)
        batch = pack(filled(asked[:groups], config.samples, drawn))
    machine.trim()  # what the trials before have left
    held = machine.resident(learner.device)
    evaluate, update = _update(config, opened, batch)
    if update.seconds < BUDGET:  # again, with the memory that it asked for
        again = _update(config, opened, batch)
        evaluate, update = replace(evaluate, seconds=again[0].seconds), replace(update, seconds=again[1].seconds)
    tokens = len(batch.tokens)
    slope = max(0.0, update.seconds - beside) / max(1, tokens - len(tiny.tokens))
    cut = config.micro_tokens
    more = activations * (min(len(whole.tokens), cut) - min(tokens, cut))
    seconds = update.seconds + slope * (len(whole.tokens) - tokens)
    return held, Phase(evaluate.seconds * len(whole.tokens) / tokens, evaluate.memory), Phase(seconds, update.memory + more), activations


def kept(config: Config, opened: rl.Opened, batch: Pack) -> tuple[float, float]:
    """Bytes a token that a forward pass of policy and critic keeps for the backward pass, and its seconds."""
    learner = opened.parts.learner
    part = batch.take(batch.split(config.micro_tokens)[0]).to(learner.device)
    began = perf_counter()
    with saved(learner.policy, learner.critic) as sizes, learner.autocast():
        values = "values" in opened.parts.objective.needs
        said = learner.policy(part, temperature=config.sampling.temperature, entropy=True, values=values and learner.critic is None)
        worths = learner.critic(part) if values and learner.critic is not None else None
    machine.wait(learner.device)
    del said, worths
    return sum(sizes.values()) / len(part.tokens), (perf_counter() - began) * len(batch.tokens) / len(part.tokens)


def _update(config: Config, opened: rl.Opened, batch: Pack) -> tuple[Phase, Phase]:
    """Evaluate and update on a batch whose answers all moved by random rewards."""
    learner, objective = opened.parts.learner, opened.parts.objective
    signals: list[Signals] = []
    evaluate = _timed(opened, lambda: signals.append(evaluated(config, opened.parts, batch)))
    experience = random_experience(opened.parts, batch, signals[0])
    return evaluate, _timed(opened, lambda: learner.update(batch, experience, objective, temperature=config.sampling.temperature))


def _timed(opened: rl.Opened, work: Callable[[], object]) -> Phase:
    return timed(opened.parts.learner.device, work)


# --- what is said of it --------------------------------------------------------------------------------------------------


def said(config: Config, policy: Policy, tried: Estimate, held: Mapping[str, int], critic: int) -> list[str]:
    """Lines for the plan: bytes by what they are for, seconds of the whole and of each phase. Adam keeps two numbers for each trained one."""
    every, trained = parameters(policy)
    missing = held.get(ABSENT, 0)
    cache = cached_bytes(policy.lm) * (min(config.prompts * config.samples, config.sampling.slots) * config.sampling.max_tokens)
    tokens = min(config.micro_tokens, round(tried.tokens))
    activations, most = tried.activations * tokens, max(phase.memory for phase in tried.phases.values())
    known = {"weights": every, **held, "critic": critic, "Adam": 2 * (trained + critic)}
    parts = {**known, "gradients": trained + critic, f"activations of {tokens:,} tokens": activations}
    rest = tried.memory + missing - sum(parts.values())
    counted = ", ".join(f"{name} {size(count)}" for name, count in parts.items() if count or name == "reference")
    seconds = ", ".join(f"{name} {phase.seconds:.2f} s + {size(phase.memory)}" for name, phase in tried.phases.items())
    return [
        f"memory     about {size(tried.memory + missing)} at the peak, {size(most)} of it for the largest phase: {counted}, Python, its libraries and all else {size(max(0, rest))}; "
        f"keys and values of the answers, while they are generated, {size(cache)}",
        f"time       about {duration(config.steps * tried.step)}: {config.steps} steps × {tried.step:.2f} s; {config.steps} × {tried.longest:.2f} s "
        f"if every answer is {config.sampling.max_tokens} tokens long; evaluations come on top",
        f"phases     {seconds}; tried here on parts of a step and scaled",
        *halved(config, policy),
    ]


def halved(config: Config, policy: Policy) -> list[str]:
    """What sampling in bfloat16 would bring on this CPU, where that is worth a line and nothing was chosen."""
    if config.sampling.dtype != "auto" or compat.device_of(policy.lm).type != "cpu":
        return []
    gain = halving(policy.lm, min(config.prompts * config.samples, config.sampling.slots))
    if gain < WORTH:
        return []
    return [
        f"sampling   sampling.dtype=bfloat16 would multiply weights {gain:.1f} times as fast here; answers then come from a rounded policy, "
        "which the `corrections` of an objective account for"
    ]
