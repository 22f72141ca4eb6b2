"""Reinforcement learning from rewards: the whole algorithm, from prompts to published weights, is the loop in `train`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from tilt.data.packing import pack
from tilt.data.rendering import Renderer
from tilt.data.rollouts import Prompt, Rollout
from tilt.data.streams import Stream
from tilt.errors import UsageError
from tilt.learning.diagnosis import explain
from tilt.learning.ema import Ema
from tilt.learning.evaluation import Assessment
from tilt.learning.guards import Guards
from tilt.learning.learner import Learner, Passes
from tilt.learning.pretraining import Pretraining
from tilt.learning.probing import probe, result
from tilt.models import compat
from tilt.models.policy import Policy
from tilt.objectives import Objective, Signals, TrustRegion, card
from tilt.optim.optimizers import Optimizer
from tilt.parity import PRESETS, described, undressed
from tilt.recipes import opening, planning, roles, state
from tilt.recipes.companion import companion
from tilt.recipes.finishing import Result, beside, keeping
from tilt.recipes.rehearsal import rehearse
from tilt.recipes.replaying import Store
from tilt.recipes.reporting import Clock, Looked, Recorder, Shown
from tilt.recipes.rl_settings import Config
from tilt.recipes.scoring import Scoring, scoring
from tilt.recipes.selecting import Answers, select
from tilt.recipes.session import Session, session
from tilt.recipes.stopping import Stopping
from tilt.recipes.taking_up import NEW, Start, finished
from tilt.recipes.trying import Trial, sampling_of
from tilt.recipes.variants import optimised, origin
from tilt.runs.files import atomic_write
from tilt.sampling.sampler import Sampler

Divergence = Callable[[Sequence[Rollout]], float]

IMPORTANT = (
    "reward",
    "eval/reward",
    "eval/kl",
    "kl",
    "entropy",
    "length/mean",
    "policy/clipfrac_avg",
    "grad_norm",
    "tokens_per_second",
    "time/step",
)


@dataclass(frozen=True)
class Parts:
    """What the loop works with."""

    source: Stream[Prompt]
    sampler: Sampler
    scoring: Scoring
    learner: Learner
    objective: Objective
    trial: Trial
    tokenizer: Any
    moving: roles.Moving | None = None


@dataclass(frozen=True)
class Opened:
    """What a run opened: the parts of the loop, what must never change, the names of the row and of the model, and the first lines of its log; the rows
    and how they become tokens, and what the short answers of the rehearsal earned."""

    parts: Parts
    frozen: roles.Frozen
    row: str
    model: str
    lines: list[str]
    rows: opening.Rows
    render: Renderer
    earned: list[float | None]


@dataclass
class Seen:
    """What is kept of an evaluation: its measures, and (prompt, answer) of each held-out answer."""

    metrics: dict[str, float]
    texts: list[list[str]]

    @staticmethod
    def of(found: Assessment) -> Seen:
        return Seen(found.metrics, [[text.prompt, text.completion] for text in found.texts])


def train(config: Config, parts: Parts, run: Session) -> tuple[Seen, Seen, int]:
    """The walk: prompts → rollouts → rewards → signals → experience → update → published weights → record."""
    sampler, learner, held, temperature = parts.sampler, parts.learner, state.Held(parts.objective), config.sampling.temperature
    shown = Shown(config.rollouts_every, config.channels_mb)
    recorder = Recorder(run.directory, run.journal, parts.tokenizer, config.steps, shown, parts.scoring.score.reasons)
    stopping, taken = Stopping(config.stop_rise, config.max_kl), 0
    remember(config, parts, run.state, held, recorder, stopping)
    for step in run.steps(config.steps):
        objective = held.row
        run.watch("evaluation")
        seen = parts.trial() if opening.due(step, config.steps, config.eval.every) and not run.replays else None
        if step == 0 and seen is not None:
            run.memory["before"] = asdict(Seen.of(seen))
        clock, watch = Clock(run.watch), recorder.watches(step)
        if config.mask is not None and step % config.mask.refresh == 0:
            sampler.mask(config.mask.top_p)
        answer = partial(answered, parts, config.samples, step, clock)
        answers = answer(parts.source.draw(step, config.prompts))
        answers = select(answers, answer, parts.source.spare(step, config.prompts), config.keep, objective.credit)
        batch = pack(answers.rollouts)
        with clock("evaluate"):
            signals = ended(learner.evaluate(batch, wanted(objective, config, learner.settings), temperature=temperature), objective)
        experience = objective.prepare(answers.rewards, signals, batch.layout)
        began = perf_counter()
        before = probe(learner, batch, temperature) if watch else None
        spent = perf_counter() - began
        with clock("update"), keeping(run.directory, step):
            report = learner.update(
                batch, experience, objective, temperature=temperature, step=step, only_critic=step < critic_warmup(config, objective), watch=watch,
                explain=partial(explain, learner, sampler.lm, answers.rollouts, batch, signals),
            )  # fmt: skip
        with clock("publish"):
            sampler.load(learner.policy)
        more = followed(parts, step + 1, config)
        began = perf_counter()
        looked = None if before is None else Looked(before, result(learner, batch, before, temperature))
        metrics = recorder.write(step, objective, answers, batch, experience, report, clock, seen, more, looked)
        run.recording[watch].append(perf_counter() - began + spent)
        if step >= critic_warmup(config, objective):
            held.row = objective.following(metrics | {"sequences": len(answers.rollouts)})
        run.alert(step, metrics)
        if why := stopping.reason(metrics):
            run.journal.note(f"stopped at step {step}: {why}")
            run.end(step + 1)
            break
    run.watch("evaluation")
    last = parts.trial()
    taken = run.memory.get("ended", config.steps)
    recorder.finish(taken, last, averaged(parts))
    return Seen(**run.memory["before"]), Seen.of(last), taken


def remember(config: Config, parts: Parts, kept: state.State, held: state.Held[Objective], recorder: Recorder, stopping: Stopping) -> None:
    """All that the next step depends on beside the configuration and the step's number, and what must be as it was."""
    learner, policy, moving = parts.learner, parts.learner.policy, parts.moving
    kept.given["data"] = state.digest(parts.source.items)
    kept.add(
        policy=state.weights(policy.lm),
        head=None if policy.value_head is None else state.weights(policy.value_head),
        optimizer=state.optimizing(learner.optimizer),
        critic=None if learner.critic is None else state.weights(learner.critic),
        critic_optimizer=state.optimizing(learner.critic_optimizer),
        ema=None if learner.ema is None else state.tensors_of(learner.ema.named),
        reference=None if moving is None else state.tensors_of(lambda: dict(moving.reference.named_parameters())),
        distance=None if moving is None else state.attributes(moving, "distance"),
        learner=progress(learner),
        counts=state.attributes(recorder, "answers", "skipped", "said"),
        shown=state.attributes(recorder.shown, "bytes"),
        stopping=state.attributes(stopping, "scores", "deviation"),
        **{
            f"reward_{part.name}": state.attributes(part.running, "count", "mean", "squares")
            for part in parts.scoring.score.parts
            if part.running
        },
    )
    kept.add(row=held.part)
    kept.add(sampler=published(parts.sampler, policy, config))


def progress(learner: Learner) -> state.Part:
    """How many updates the learner made, and how large its micro-batches still are."""

    def restore(numbers: Any, tensors: state.Tensors) -> None:
        learner.version = int(numbers["version"])
        if learner.settings.halve:
            learner.settings = replace(learner.settings, micro_tokens=min(learner.settings.micro_tokens, int(numbers["micro_tokens"])))

    return state.Part(lambda: {"version": learner.version, "micro_tokens": learner.settings.micro_tokens}, restore=restore)


def published(sampler: Sampler, policy: Policy, config: Config) -> state.Part:
    """What the sampler draws from: the policy's weights, published as often as they were, and the mask's copy. It comes after the policy's part."""

    def restore(numbers: Any, tensors: state.Tensors) -> None:
        sampler.load(policy)
        sampler.version = int(numbers)
        if tensors and config.mask is not None:
            sampler.mask(config.mask.top_p)
            state.put(masked(), tensors)

    def masked() -> dict[str, torch.Tensor]:
        return {} if sampler.masking is None else dict(sampler.masking.lm.named_parameters())

    return state.Part(lambda: sampler.version, masked, restore)


def answered(parts: Parts, samples: int, step: int, clock: Clock, prompts: Sequence[Prompt]) -> Answers:
    """Answers to each prompt, and what they earn; what judges in a worker of its own may begin while others are generated."""
    with clock("generate"):
        rollouts = parts.sampler.sample(prompts, samples, step=step, finished=parts.scoring.begin)
    with clock("reward"):
        texts, rewards = parts.scoring.judge(rollouts, training=True)
    return Answers(rollouts, texts, rewards, parts.scoring.score.report)


def followed(parts: Parts, taken: int, config: Config) -> dict[str, float]:
    """Move a reference that follows the policy where its turn has come; how far it is from the first."""
    if parts.moving is None:
        return {}
    if taken % config.reference_update.every == 0:
        parts.moving.move(parts.learner.policy)
    return {"reference/distance": parts.moving.distance}


def wanted(objective: Objective, config: Config, settings: Passes) -> frozenset[str]:
    """Signals to evaluate: with one optimizer step a batch `old` is the policy's own forward pass, unless the credit reads it; a KL to be watched needs the reference."""
    needs = objective.needs | (frozenset({"reference"}) if config.max_kl is not None else frozenset())
    return needs if settings.steps > 1 or "old" in objective.credit.needs else needs - {"old"}


def critic_warmup(config: Config, objective: Objective) -> int:
    """First steps in which only the critic learns: none where there is no critic."""
    return config.critic_warmup if objective.value.needs else 0


def averaged(parts: Parts) -> dict[str, float]:
    """What the average of the weights earns on the held-out prompts, and its KL; nothing where no average is kept."""
    if parts.learner.ema is None:
        return {}
    with parts.learner.ema.applied():
        found = parts.trial().metrics
    return {f"ema_{name}": found[name] for name in ("reward", "kl") if name in found}


def ended(signals: Signals, objective: Objective) -> Signals:
    """Signals whose value after the last action is 0, unless the row reads it: an answer's score is its last reward, also where the answer was cut."""
    return signals if "final" in objective.credit.needs else replace(signals, final=torch.zeros_like(signals.final))


def divergence(learner: Learner, temperature: float, anchor: roles.Anchor | None = None) -> Divergence:
    """Mean over answers of the log-ratio of policy to reference (or to `anchor`), summed over actions: an estimate of the sequence KL, nats.

    Both are taken at the temperature at which the answers were sampled; answers to a truncated distribution give none (NaN).
    """
    reader = learner if anchor is None else Learner(
        learner.policy, learner.optimizer, reference=anchor, settings=learner.settings, autocast=learner.autocast
    )  # fmt: skip

    def measure(rollouts: Sequence[Rollout]) -> float:
        if any(r.sampling.truncated for r in rollouts):
            return math.nan
        batch = pack(rollouts)
        signals = reader.evaluate(batch, frozenset({"old", "reference"}), temperature=temperature)
        return float((signals.old - signals.reference).sum() / batch.layout.sequences)

    return measure


def also_measured(texts: Callable[[], Mapping[str, float]], first: Divergence | None, rollouts: Sequence[Rollout]) -> dict[str, float]:
    """What an evaluation measures besides the answers' rewards: held-out texts, and the KL to the first reference where it has moved on."""
    far = math.nan if first is None else first(rollouts)
    return {**texts(), **({} if math.isnan(far) else {"kl_first": far})}


def run(config: Config, start: Start = NEW) -> Result:
    """Open everything, walk, save, and check that the frozen models never changed."""
    if (done := finished(config, "rl", start)) is not None:
        return done
    with ExitStack() as ending:
        opened = assembled(config, ending)
        label = Path(opened.row.rpartition(":")[0] or opened.row).stem
        run = ending.enter_context(session(config, "rl", opened.model, config.steps, IMPORTANT, label=label, start=start))
        parts, learner = opened.parts, opened.parts.learner
        if start.rewards is not None:
            parts = replace(parts, scoring=Store(start.rewards).scoring(parts.scoring))
        run.state.given |= opened.frozen.marks
        run.state.publish(learner.policy.lm, parts.tokenizer, partial(beside, learner.policy, parts.tokenizer, learner.critic, learner.ema))
        run.journal.header([f"run        {run.directory.path}", *opened.lines])
        atomic_write(run.directory / "objective.txt", _described(config, opened.row, parts))
        before, after, taken = train(config, parts, run)
        for line in opened.frozen.verify():
            run.journal.note(line)
        answers = ((prompt, old, new) for (prompt, old), (_, new) in zip(before.texts, after.texts, strict=True))
        return run.finish(before.metrics, after.metrics, answers, at=taken)


def assembled(config: Config, ending: ExitStack) -> Opened:
    """Everything that a run works with, all that can be refused refused; `ending` closes what is open when the run ends."""
    device = opening.settle(config)
    name, objective = optimised(config.algorithm, config.objective, config.quirks, config.sampling.max_tokens)
    rows = opening.rows(config.data, "prompt")
    lm, tokenizer, model = opening.language_model(config.model, config.tokenizer, lambda: opening.texts(rows.train), config.seed)
    shared = bool(objective.value.needs) and config.critic == "shared"
    policy = opening.policy_of(opening.adapted(lm, config.lora), device, value_head=shared)
    render = opening.renderer(tokenizer, config.data, lm, rows)
    prompts, held = render.prompts(rows.train), render.prompts(rows.held_out) if rows.held_out else []
    if config.prompts > len(prompts):
        raise UsageError(f"prompts {config.prompts}: the data have only {len(prompts)} training prompts; set prompts to at most that")
    judged = scoring(config.reward, tokenizer, device, missing_stop_penalty=config.missing_stop_penalty, clip=config.reward_clip)
    ending.callback(judged.close)
    also = None if config.measure is None else scoring(config.measure, tokenizer, device)
    if also is not None:
        ending.callback(also.close)
    anchor, modules = roles.reference(config, policy, tokenizer, device)
    texts = companion(config, policy, tokenizer, device)
    learner = _learner(config, objective, policy, anchor, roles.critic(config, policy, objective, judged, device), texts.loss, device)
    sampling = sampling_of(config.sampling, render)
    moving = roles.moving(config, anchor, policy)
    modules |= {} if moving is None else {"first reference": moving.first}
    first = None if moving is None else divergence(learner, config.eval.temperature, roles.always(moving.first))
    trial = Trial.of(
        policy,
        tokenizer,
        held or prompts,
        judged,
        sampling,
        config.eval,
        seed=config.seed,
        slots=config.sampling.slots,
        cache=config.sampling.cache,
    )
    trial = replace(
        trial, also=also, divergence=divergence(learner, config.eval.temperature), more=partial(also_measured, texts.measure, first)
    )
    drawn = opening.drawing_dtype(config, config.sampling.dtype, device)
    sampler = Sampler(lm, tokenizer, sampling, seed=config.seed, slots=config.sampling.slots, dtype=drawn, cache=config.sampling.cache)
    earned = rehearse(judged, sampler, prompts)
    if also is not None:
        rehearse(also, sampler, prompts)
    modules |= judged.modules | {f"measuring {role}": module for role, module in (also.modules if also else {}).items()}
    lines = [
        opening.headline(model, policy, device, config), *rows.notes, f"           {render.summary()}", *texts.notes, *judged.notes,
        *([] if held else ["           nothing is held out: evaluations ask training prompts"]),
        f"algorithm  {name}: {objective!r}",
        f"steps      {config.steps} of {config.prompts} prompts × {config.samples} answers; {learner.settings.steps} optimizer steps each",
        *(f"note       {note}" for note in [*notes(config, policy, objective), *cramped(prompts, lm, config.sampling.max_tokens)]),
    ]  # fmt: skip
    parts = Parts(Stream(prompts, config.seed), sampler, judged, learner, objective, trial, tokenizer, moving)
    return Opened(parts, roles.Frozen.of(modules), name, model, lines, rows, render, earned)


def _learner(
    config: Config, objective: Objective, policy: Policy, anchor: roles.Anchor, critic: roles.Critic | None, texts: Pretraining | None,
    device: torch.device,
) -> Learner:  # fmt: skip
    """The learner, with an optimizer for the policy and one for a critic of its own, each with the schedule of the steps in which it learns."""
    settings = config.optimizer.settings()
    passes = Passes(config.passes, config.minibatches, config.micro_tokens, config.max_mismatch, config.halve_micro)
    learning = config.steps - critic_warmup(config, objective)
    dtypes = (compat.dtype_of(policy.lm), opening.drawing_dtype(config, config.sampling.dtype, device))
    half = opening.precision(config, device) is not nullcontext or any(dtype in (torch.float16, torch.bfloat16) for dtype in dtypes)
    guards = Guards(**config.guards.model_dump(), half=half, fresh=config.reference is None)
    own = None if critic is None else Optimizer(critic, replace(settings, lr=config.critic_lr or settings.lr), config.steps * passes.steps)
    return Learner(
        policy, Optimizer(policy, settings, learning * passes.steps), reference=anchor, critic=critic, critic_optimizer=own, settings=passes,
        seed=config.seed, autocast=opening.precision(config, device), pretraining=texts,
        ema=None if config.ema is None else Ema(policy.lm, config.ema), guards=guards,
    )  # fmt: skip


def _described(config: Config, name: str, parts: Parts) -> str:
    """What is optimised, for the run's record: the row, the file it came from, and its card with this run's numbers."""
    objective, judges = parts.objective, len(parts.scoring.modules)
    numbers = card(undressed(objective), name=name, samples=config.samples, passes=config.passes, reward_models=judges, **config.narrowing)
    parity = ["", *described(name, config.quirks)] if name in PRESETS else []
    return "\n".join([*origin(config.algorithm).lines(objective), "", numbers, *parity]) + "\n"


def cramped(prompts: Sequence[Prompt], lm: Any, wanted: int) -> list[str]:
    """That some answers must end before they have `wanted` tokens, because prompt and answer share the model's context."""
    context = compat.context_of(lm)
    few = [len(p.tokens) for p in prompts if len(p.tokens) + wanted > context]
    said = f"{len(few)} of {len(prompts)} prompts leave less than sampling.max_tokens {wanted} of the model's context of {context} tokens: their answers are cut at {context - max(few, default=0)} or more"
    return [said] if few else []


def notes(config: Config, policy: Policy, objective: Objective) -> list[str]:
    """What a reader of the run should know although it may run, settings of a critic that the row does not have among them."""
    idle = [key for key in ("critic", "critic_lr", "critic_warmup") if getattr(config, key) != type(config).model_fields[key].default]
    chosen = [
        f"dynamic sampling: groups whose answers all earned the same are replaced, in at most {config.keep.draws} draws of prompts a step"
    ]
    chosen = (chosen if config.keep.mixed else []) + (
        [] if config.keep.cut else ["answers cut at max_tokens weigh nothing; their rewards stay in baselines"]
    )
    unused = [f"{', '.join(idle)}: without effect, this row has no critic"] if idle and not objective.value.needs else []
    if isinstance(objective.penalty, TrustRegion) and not objective.value.needs and "optimizer" in config.model_fields_set:
        unused.append("optimizer: without effect, a trust region sets the length of its own step and this row has no critic")
    return [*([policy.note] if policy.note else []), *objective.notes(), *unused, *chosen]


def plan(config: Config) -> list[str]:
    """What a run would read, hold and take, in lines; nothing is trained or written."""
    return planning.reinforcement(config)
