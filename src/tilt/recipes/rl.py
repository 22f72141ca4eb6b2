"""Reinforcement learning from rewards: the whole algorithm, from prompts to published weights, is the loop in `train`."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, model_validator

from tilt.data.packing import pack
from tilt.data.rollouts import Prompt, Rollout
from tilt.data.streams import Stream
from tilt.errors import NumericError, UsageError
from tilt.learning.evaluation import Assessment
from tilt.learning.learner import Learner, Passes
from tilt.models import compat
from tilt.models.adapters import adapter_off
from tilt.models.policy import Critic, Policy
from tilt.models.saving import fingerprint
from tilt.objectives import Objective, Signals, card
from tilt.optim.optimizers import Optimizer
from tilt.recipes import opening, planning
from tilt.recipes.finishing import Result, keeping, saved, write_policy
from tilt.recipes.rehearsal import rehearse
from tilt.recipes.reporting import Clock, keep_rollouts, measures
from tilt.recipes.scoring import Scoring, scoring
from tilt.recipes.settings import Count, Evaluation, Reward, Sampling, Training
from tilt.recipes.settings import Optimizer as OptimizerSettings
from tilt.recipes.trying import Trial, sampling_of
from tilt.recipes.variants import origin, resolve
from tilt.runs import checkpoints
from tilt.runs.directory import RunDirectory
from tilt.runs.files import atomic_write
from tilt.runs.journal import Journal
from tilt.sampling.sampler import Sampler

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


class Config(Training):
    """Reinforcement learning of a policy from a reward, by any row of the table or one of your own."""

    algorithm: Annotated[str, Field(description="a name of `tilt algorithms`, or file.py:NAME")] = "grpo"
    objective: Annotated[dict[str, Any], Field(description="slots of the row to change, such as {surrogate: {high: 0.28}}")] = {}
    reward: Annotated[Reward, Field(description="file.py:function, a rule, a reward model, or a weighted list of them")]
    measure: Annotated[Reward, Field(description="further rewards that are measured on held-out answers and never trained on")] = None
    missing_stop_penalty: Annotated[float, Field(ge=0.0, description="taken from the reward of an answer that was cut at max_tokens")] = 0.0
    reference: Annotated[str | None, Field(description="the KL anchor; without it the policy as it starts")] = None
    critic: Annotated[
        Literal["auto", "reward_model", "policy", "shared"],
        Field(
            description="what the critic starts from, where the row needs one; auto = the reward model where there is one with the policy's tokens, else the policy"
        ),
    ] = "auto"
    critic_lr: Annotated[float | None, Field(gt=0.0, description="the critic's learning rate; without it the policy's")] = None
    critic_warmup: Annotated[int, Field(ge=0, description="first steps in which only the critic learns")] = 0
    steps: Count = 200
    prompts: Annotated[int, Field(ge=1, description="prompts a step")] = 32
    samples: Annotated[int, Field(ge=1, description="answers to each prompt")] = 8
    passes: Annotated[int, Field(ge=1, description="times each answer is trained on")] = 1
    minibatches: Annotated[int, Field(ge=1, description="optimizer steps a pass")] = 1
    sampling: Sampling = Sampling()
    optimizer: OptimizerSettings = OptimizerSettings(lr=1e-4)
    eval: Evaluation = Evaluation()
    max_kl: Annotated[
        float | None,
        Field(gt=0.0, description="stop after the first step whose answers have a sequence KL to the reference above this, nats"),
    ] = None
    stop_rise: Annotated[
        float | None,
        Field(
            gt=0.0,
            description="stop where the mean reward of four steps has risen by so many standard deviations of the first step's scores: "
            "a reward model is a proxy, and beyond some rise the policy only learns its weak sides",
        ),
    ] = None
    max_mismatch: Annotated[
        float,
        Field(
            gt=0.0, description="stop when learner and sampler differ by more than this in mean probability, before a batch's first update"
        ),
    ] = 0.05
    save_every: Annotated[int, Field(ge=0, description="steps between checkpoints; 0 = the last only")] = 0
    rollouts_every: Annotated[int, Field(ge=0, description="steps between stored rollouts; 0 = none")] = 10

    @model_validator(mode="after")
    def _possible(self) -> Config:
        _, row = resolve(self.algorithm, self.objective)
        problems = row.check(samples=self.samples, passes=self.passes)
        if row.passes is not None and self.minibatches > 1 and self.passes * self.minibatches > row.passes:
            problems.append(
                f"minibatches {self.minibatches}: {type(row.surrogate).__name__} has no ratio to correct for the steps in between; set minibatches to 1"
            )
        if self.minibatches > self.prompts * self.samples:
            problems.append(f"minibatches {self.minibatches} is more than the {self.prompts * self.samples} answers of a step")
        if row.value.needs and self.critic == "shared" and (self.critic_warmup or self.critic_lr is not None):
            problems.append(
                "critic shared has no weights of its own for critic_lr and critic_warmup; leave them out, or set critic to policy"
            )
        if self.critic_warmup >= self.steps:
            problems.append(f"critic_warmup {self.critic_warmup} leaves no step of {self.steps} for the policy; set it below steps")
        if problems:
            raise ValueError("; ".join(problems))
        return self


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
    write: Callable[[Path], None]


def train(config: Config, parts: Parts, directory: RunDirectory, journal: Journal) -> tuple[Assessment, Assessment, int]:
    """The walk: prompts → rollouts → rewards → signals → experience → update → published weights → record."""
    sampler, learner, objective, scorer = parts.sampler, parts.learner, parts.objective, parts.scoring
    temperature, skipped, said = config.sampling.temperature, 0, set[str]()
    warmup = config.critic_warmup if objective.value.needs else 0
    first = last = parts.trial()
    seen, taken = first.metrics, 0
    scores: list[float] = []
    deviation = 0.0
    for step in range(config.steps):
        if step > 0 and opening.due(step, config.steps, config.eval.every):
            last = parts.trial()
            seen = last.metrics
        clock = Clock()
        prompts = parts.source.draw(step, config.prompts)
        with clock("generate"):
            rollouts = sampler.sample(prompts, config.samples, step=step)
        with clock("reward"):
            texts = scorer.read(rollouts)
            rewards = scorer.score(rollouts, texts)
        batch = pack(rollouts)
        with clock("evaluate"):
            signals = ended(learner.evaluate(batch, wanted(objective, config, learner.settings), temperature=temperature))
        experience = objective.prepare(rewards, signals, batch.layout)
        watch = config.rollouts_every > 0 and (step % config.rollouts_every == 0 or step + 1 == config.steps)
        with clock("update"), keeping(directory, step):
            report = learner.update(
                batch, experience, objective, temperature=temperature, step=step, only_critic=step < warmup, watch=watch
            )
        with clock("publish"):
            sampler.load(learner.policy)
        skipped, taken = skipped + report.skipped, step + 1
        metrics = measures(objective, rewards, signals, batch, rollouts, report) | scorer.metrics() | clock.read(batch.layout.actions)
        counts = {"episode": (step + 1) * len(rollouts), "eps": len(rollouts) / metrics["time/step"], "skipped/total": skipped}
        journal.step(step, metrics | counts | {f"eval/{name}": value for name, value in seen.items()})
        seen = {}
        for part in scorer.score.report.messages.keys() - said:
            said.add(part)
            journal.note(f"reward     {scorer.score.report.messages[part]}")
        if watch:
            keep_rollouts(directory, journal, step, rollouts, texts, rewards, experience, objective, report, parts.tokenizer)
        scores.append(metrics["reward"])
        deviation = metrics.get("objective/scores_std", 0.0) if step == 0 else deviation
        if config.stop_rise is not None and risen(scores, deviation) >= config.stop_rise:
            journal.note(
                f"stopped at step {step}: the reward has risen by {risen(scores, deviation):.2f} deviations, stop_rise is {config.stop_rise}"
            )
            break
        if config.max_kl is not None and metrics.get("kl", 0.0) > config.max_kl:
            journal.note(f"stopped at step {step}: the sequence KL {metrics['kl']:.2f} is above max_kl {config.max_kl}")
            break
        if config.save_every and (step + 1) % config.save_every == 0 and step + 1 < config.steps:
            checkpoints.save(directory.checkpoints, step + 1, parts.write)
    last = parts.trial()
    journal.step(taken, {f"eval/{name}": value for name, value in last.metrics.items()})
    why = ": nothing in them could move the weights (every group earned the same)" if skipped else ""
    journal.note(f"skipped    {skipped} of {taken} batches{why}")
    return first, last, taken


def risen(scores: Sequence[float], deviation: float, over: int = 4) -> float:
    """Rise of the mean training reward, the last `over` steps against the first, in deviations of the first step's scores. Held-out prompts have no say."""
    return (sum(scores[-over:]) / over - scores[0]) / max(deviation, 1e-9) if len(scores) > over else 0.0


def wanted(objective: Objective, config: Config, settings: Passes) -> frozenset[str]:
    """Signals to evaluate: with one optimizer step a batch `old` is the policy's own forward pass, unless the credit reads it; a KL to be watched needs the reference."""
    needs = objective.needs | (frozenset({"reference"}) if config.max_kl is not None else frozenset())
    return needs if settings.steps > 1 or "old" in objective.credit.needs else needs - {"old"}


def ended(signals: Signals) -> Signals:
    """Signals whose value after the last action is 0: an answer's score is its last reward, also where the answer was cut."""
    return replace(signals, final=torch.zeros_like(signals.final))


def divergence(learner: Learner, temperature: float) -> Callable[[Sequence[Rollout]], float]:
    """Mean over answers of the log-ratio of policy to reference, summed over actions: an estimate of the sequence KL, nats.

    Both are taken at the temperature at which the answers were sampled; answers to a truncated distribution give none (NaN).
    """

    def measure(rollouts: Sequence[Rollout]) -> float:
        if any(r.sampling.truncated for r in rollouts):
            return math.nan
        batch = pack(rollouts)
        signals = learner.evaluate(batch, frozenset({"old", "reference"}), temperature=temperature)
        return float((signals.old - signals.reference).sum() / batch.layout.sequences)

    return measure


def run(config: Config) -> Result:
    """Open everything, walk, save, and check that the frozen models never changed."""
    with ExitStack() as ending:
        return _run(config, ending)


def _run(config: Config, ending: ExitStack) -> Result:
    device = opening.settle(config)
    name, objective = resolve(config.algorithm, config.objective)
    rows = opening.rows(config.data, "prompt")
    lm, tokenizer, model = opening.language_model(config.model, config.tokenizer, lambda: opening.texts(rows.train), config.seed)
    policy = opening.policy_of(
        opening.adapted(lm, config.lora), device, value_head=bool(objective.value.needs) and config.critic == "shared"
    )
    render = opening.renderer(tokenizer, config.data, lm, rows)
    prompts, held = render.prompts(rows.train), render.prompts(rows.held_out) if rows.held_out else []
    if config.prompts > len(prompts):
        raise UsageError(f"prompts {config.prompts}: the data have only {len(prompts)} training prompts; set prompts to at most that")
    judged = scoring(config.reward, tokenizer, device, missing_stop_penalty=config.missing_stop_penalty)
    ending.callback(judged.close)
    also = None if config.measure is None else scoring(config.measure, tokenizer, device)
    if also is not None:
        ending.callback(also.close)
    reference, frozen = _reference(config, policy, tokenizer, device)
    critic = _critic(config, policy, objective, judged, device)
    sampling = sampling_of(config.sampling, render)
    settings, each = config.optimizer.settings(), config.passes * config.minibatches
    learner = Learner(
        policy, Optimizer(policy, settings, (config.steps - (config.critic_warmup if objective.value.needs else 0)) * each), reference=reference, critic=critic,
        critic_optimizer=None if critic is None else Optimizer(critic, replace(settings, lr=config.critic_lr or settings.lr), config.steps * each),
        settings=Passes(config.passes, config.minibatches, config.micro_tokens, config.max_mismatch), seed=config.seed,
        autocast=opening.precision(config, device),
    )  # fmt: skip
    trial = Trial.of(policy, tokenizer, held or prompts, judged, sampling, config.eval, seed=config.seed, slots=config.sampling.slots)
    trial = replace(trial, also=also, divergence=divergence(learner, config.eval.temperature))
    write = partial(write_policy, policy, tokenizer, critic)
    parts = Parts(
        Stream(prompts, config.seed), Sampler(lm, tokenizer, sampling, seed=config.seed, slots=config.sampling.slots), judged, learner, objective,
        trial, tokenizer, write,
    )  # fmt: skip
    for scorer in (judged, also):
        if scorer is not None:
            rehearse(scorer, parts.sampler, prompts)
    frozen |= {f"reward model {i}": m for i, (m, _) in enumerate(judged.models)}
    frozen |= {f"measuring model {i}": m for i, (m, _) in enumerate(also.models if also else ())}
    marks = {role: fingerprint(module) for role, module in frozen.items()}
    directory, journal = opening.directory(config, "rl", model, config.steps, IMPORTANT, label=Path(name.rpartition(":")[0] or name).stem)
    with journal:
        journal.header([
            f"run        {directory.path}", opening.headline(model, policy, device, config), *rows.notes, f"           {render.summary()}",
            *([] if held else ["           nothing is held out: evaluations ask training prompts"]),
            f"algorithm  {name}: {objective!r}",
            f"steps      {config.steps} of {config.prompts} prompts × {config.samples} answers; {each} optimizer steps each",
            *(f"note       {note}" for note in [*notes(config, policy, objective), *cramped(prompts, lm, config.sampling.max_tokens)]),
        ])  # fmt: skip
        described = "\n".join(
            [*origin(config.algorithm).lines(objective), "", card(objective, name=name, samples=config.samples, passes=config.passes)]
        )
        atomic_write(directory.path / "objective.txt", described + "\n")
        before, after, step = train(config, parts, directory, journal)
        checkpoint = saved(directory, step, write, config.save)
        for role, mark in marks.items():
            if fingerprint(frozen[role]) != mark:
                raise NumericError(f"the {role} changed during training: this is a defect of Tilt, and the run cannot be trusted")
            journal.note(f"unchanged  {role} {mark[:12]}")
    answers = tuple((b.prompt, b.completion, a.completion) for b, a in zip(before.texts, after.texts, strict=True))
    return Result(directory, checkpoint, before.metrics, after.metrics, answers)


def cramped(prompts: Sequence[Prompt], lm: Any, wanted: int) -> list[str]:
    """That some answers must end before they have `wanted` tokens, because prompt and answer share the model's context."""
    context = compat.context_of(lm)
    few = [len(p.tokens) for p in prompts if len(p.tokens) + wanted > context]
    said = f"{len(few)} of {len(prompts)} prompts leave less than sampling.max_tokens {wanted} of the model's context of {context} tokens: their answers are cut at {context - max(few, default=0)} or more"
    return [said] if few else []


def notes(config: Config, policy: Policy, objective: Objective) -> list[str]:
    """What a reader of the run should know although it may run, settings of a critic that the row does not have among them."""
    idle = [key for key in ("critic", "critic_lr", "critic_warmup") if getattr(config, key) != type(config).model_fields[key].default]
    unused = [f"{', '.join(idle)}: without effect, this row has no critic"] if idle and not objective.value.needs else []
    return [*([policy.note] if policy.note else []), *objective.notes(), *unused]


def _reference(
    config: Config, policy: Policy, tokenizer: Any, device: torch.device
) -> tuple[Callable[[], AbstractContextManager[Policy]], dict[str, torch.nn.Module]]:
    """The KL anchor: another checkpoint, the adapter switched off, or a frozen copy of the policy as it starts; and what must never change."""
    if config.lora is not None and config.reference is None:
        base = torch.nn.ParameterList(p for name, p in policy.lm.named_parameters() if "lora_" not in name)

        @contextmanager
        def adapterless() -> Iterator[Policy]:
            with adapter_off(policy.lm):
                yield policy

        return adapterless, {"base under the adapter": base}
    if config.reference is None:
        anchor = Policy(copy.deepcopy(policy.lm)).requires_grad_(False)
    else:
        anchor = opening.other_model(config.reference, tokenizer, device, "reference")

    @contextmanager
    def separate() -> Iterator[Policy]:
        yield anchor

    return separate, {"reference": anchor}


def _critic(config: Config, policy: Policy, objective: Objective, judged: Scoring, device: torch.device) -> Critic | None:
    """The critic that the row needs: from the reward model, from the policy, or none of its own where it shares the policy's body."""
    if not objective.value.needs or config.critic == "shared":
        return None
    source = judged.critic_source
    if config.critic == "reward_model" and source is None:
        raise UsageError(
            "critic reward_model: no reward model here reads the policy's tokens, so no critic can start from one; set critic to policy, shared or auto"
        )
    made = Critic.from_policy(policy) if source is None or config.critic == "policy" else Critic.from_reward_model(source)
    return made.to(device).requires_grad_(True)


def plan(config: Config) -> list[str]:
    """What a run would read, hold and take, in lines; nothing is trained or written."""
    return planning.reinforcement(config)
