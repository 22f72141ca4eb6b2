"""Reinforcement learning from rewards: the whole algorithm, from prompts to published weights, is the loop in `train`."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from time import perf_counter
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, model_validator

from tilt.data.packing import Pack, pack
from tilt.data.rollouts import Prompt, Rollout
from tilt.data.streams import Stream
from tilt.errors import NumericError, UsageError
from tilt.learning.evaluation import Assessment
from tilt.learning.learner import Learner, NonFinite, Passes, Report
from tilt.learning.meter import Meter
from tilt.models.adapters import adapter_off
from tilt.models.policy import Critic, Policy
from tilt.models.saving import fingerprint, save
from tilt.objectives import Experience, Objective, Rewards, Signals, card
from tilt.objectives.metrics import batch_metrics
from tilt.optim.optimizers import Optimizer
from tilt.recipes import opening
from tilt.recipes.finishing import Result, saved
from tilt.recipes.scoring import Scoring, scoring
from tilt.recipes.settings import Count, Evaluation, Sampling, Training
from tilt.recipes.settings import Optimizer as OptimizerSettings
from tilt.recipes.trying import Trial, sampling_of
from tilt.recipes.variants import resolve
from tilt.rewards.text import Text
from tilt.runs import checkpoints, rollout_store
from tilt.runs.directory import RunDirectory
from tilt.runs.journal import Journal, Sample
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
    reward: Annotated[Any, Field(description="file.py:function, a rule, a reward model, or a weighted list of them")]
    measure: Annotated[Any, Field(description="further rewards that are measured on held-out answers and never trained on")] = None
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
    max_kl: Annotated[float | None, Field(gt=0.0, description="stop before the sequence KL to the reference passes this, nats")] = None
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


def train(config: Config, parts: Parts, directory: RunDirectory, journal: Journal) -> tuple[Assessment, Assessment, int]:
    """The walk: prompts → rollouts → rewards → signals → experience → update → published weights → record."""
    sampler, learner, objective = parts.sampler, parts.learner, parts.objective
    temperature = config.sampling.temperature
    first = last = parts.trial()
    for step in range(config.steps):
        clock = Clock()
        prompts = parts.source.draw(step, config.prompts)
        with clock("generate"):
            rollouts = sampler.sample(prompts, config.samples, step=step)
        texts = parts.scoring.read(rollouts)
        with clock("reward"):
            rewards = parts.scoring.score(rollouts, texts)
        batch = pack(rollouts)
        with clock("evaluate"):
            signals = ended(learner.evaluate(batch, wanted(objective, config, learner.settings), temperature=temperature))
        experience = objective.prepare(rewards, signals, batch.layout)
        with clock("update"):
            report = _update(learner, batch, experience, objective, directory, temperature, step, only_critic=step < config.critic_warmup)
        with clock("publish"):
            sampler.load(learner.policy)
        metrics = measures(objective, rewards, signals, batch, rollouts, report) | clock.read(len(batch.tokens))
        if opening.due(step + 1, config.steps, config.eval.every) and step + 1 < config.steps:
            last = parts.trial()
            metrics |= {f"eval/{name}": value for name, value in last.metrics.items()}
        journal.step(step, metrics)
        record(config, directory, journal, parts, step, rollouts, texts, rewards, experience, report)
        if config.save_every and (step + 1) % config.save_every == 0 and step + 1 < config.steps:
            checkpoints.save(directory.checkpoints, step + 1, partial(save, learner.policy.lm, parts.tokenizer))
        if config.max_kl is not None and metrics.get("kl", 0.0) > config.max_kl:
            journal.note(f"stopped at step {step}: the sequence KL {metrics['kl']:.2f} is above max_kl {config.max_kl}")
            break
    last = parts.trial()
    journal.step(step + 1, {f"eval/{name}": value for name, value in last.metrics.items()})
    return first, last, step + 1


def wanted(objective: Objective, config: Config, settings: Passes) -> frozenset[str]:
    """Signals to evaluate: with one optimizer step a batch `old` is the policy's own forward pass, unless the credit reads it; a KL to be watched needs the reference."""
    needs = objective.needs | (frozenset({"reference"}) if config.max_kl is not None else frozenset())
    return needs if settings.steps > 1 or "old" in objective.credit.needs else needs - {"old"}


def ended(signals: Signals) -> Signals:
    """Signals whose value after the last action is 0: an answer's score is its last reward, also where the answer was cut."""
    return replace(signals, final=torch.zeros_like(signals.final))


def divergence(learner: Learner, temperature: float) -> Callable[[Sequence[Rollout]], float]:
    """Mean over answers of the log-ratio of policy to reference, summed over actions: an estimate of the sequence KL, nats."""

    def measure(rollouts: Sequence[Rollout]) -> float:
        batch = pack(rollouts)
        signals = learner.evaluate(batch, frozenset({"old", "reference"}), temperature=temperature)
        return float((signals.old - signals.reference).sum() / batch.layout.sequences)

    return measure


def measures(
    objective: Objective, rewards: Rewards, signals: Signals, batch: Pack, rollouts: Sequence[Rollout], report: Report
) -> dict[str, float]:
    """The step's metrics, on actions, in the field's names."""
    old = torch.where(signals.old.isnan(), report.channels.get("new", signals.old), signals.old)
    meter = Meter()
    meter.add(batch_metrics(rewards, replace(signals, old=old), batch.layout, kl=getattr(objective.credit, "kl", 0.0)))
    gap = ((old.exp() - batch.sampler.exp()).abs())[~old.isnan()]
    found = meter.read() | report.metrics
    extra = {
        "reward": found.get("objective/scores", float("nan")),
        "length/truncated": sum(r.stop == "length" for r in rollouts) / len(rollouts),
        "val/num_eos_tokens": float(sum(r.stop == "stop" for r in rollouts)),
        "sampler/logprob_gap_mean": float(gap.mean()) if len(gap) else float("nan"),
        "sampler/logprob_gap_max": float(gap.max()) if len(gap) else float("nan"),
    }
    if "objective/kl" in found:
        extra["kl"] = found["objective/kl"]
    if "policy/entropy_avg" in found:
        extra["entropy"] = found["policy/entropy_avg"]
    return {k: v for k, v in (found | extra).items() if not math.isnan(v) or k == "reward"}


def record(
    config: Config, directory: RunDirectory, journal: Journal, parts: Parts, step: int, rollouts: Sequence[Rollout], texts: Sequence[Text],
    rewards: Rewards, experience: Experience, report: Report,
) -> None:  # fmt: skip
    """Keep the step's rollouts with their token channels, and show a few."""
    if not config.rollouts_every or (step % config.rollouts_every and step + 1 != config.steps):
        return
    layout, signals = experience.layout, experience.signals
    each = experience.advantages[layout.starts]
    new = report.channels.get("new", signals.old)
    old = torch.where(signals.old.isnan(), new, signals.old)
    channels = {
        "sampler_logprobs": signals.sampler, "old_logprobs": old, "reference_logprobs": signals.reference, "new_logprobs": new,
        "delta_ref": new - signals.reference, "kl": (signals.reference - new).exp() - (signals.reference - new) - 1,
        "adv_t": experience.advantages, "value": signals.values, "return": experience.returns,
        **{name: report.channels[name] for name in ("ratio", "entropy", "push") if name in report.channels},
    }  # fmt: skip
    channels = {name: value for name, value in channels.items() if not value.isnan().all()}
    rollout_store.write(
        directory.rollouts, step,
        rollout_store.RolloutTable(rollouts, texts, rewards, parts.tokenizer, {"advantage": each, **_groups(rewards, layout.prompt)}, channels, run=directory.name),
    )  # fmt: skip
    rows = [
        Sample(
            texts[i].prompt,
            texts[i].completion,
            {k: float(v[i]) for k, v in rewards.parts.items()} or {"reward": float(rewards.total[i])},
            float(each[i]),
        )
        for i in range(0, len(rollouts), max(1, len(rollouts) // 4))
    ]
    journal.samples(step, rows[:4])


def _groups(rewards: Rewards, prompt: torch.Tensor) -> dict[str, torch.Tensor]:
    """Mean and standard deviation of the rewards of each sequence's group."""
    total = torch.where(rewards.scored, rewards.total, torch.nan)
    means, spreads = torch.full_like(total, torch.nan), torch.full_like(total, torch.nan)
    for group in prompt.unique():
        member = prompt == group
        found = total[member & rewards.scored]
        if len(found):
            means[member], spreads[member] = found.mean(), found.std(correction=0)
    return {"group_mean": means, "group_std": spreads}


class Clock:
    """Seconds of each phase of a step."""

    def __init__(self) -> None:
        self.began, self.seconds = perf_counter(), {}  # type: tuple[float, dict[str, float]]

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        start = perf_counter()
        yield
        self.seconds[f"time/{phase}"] = perf_counter() - start

    def read(self, tokens: int) -> dict[str, float]:
        step = perf_counter() - self.began
        return self.seconds | {"time/step": step, "tokens_per_second": tokens / step}


def _update(
    learner: Learner,
    batch: Pack,
    experience: Experience,
    objective: Objective,
    directory: RunDirectory,
    temperature: float,
    step: int,
    *,
    only_critic: bool,
) -> Report:
    """The update; what is not finite stops the run, with the offending micro-batch kept on disk."""
    try:
        return learner.update(batch, experience, objective, temperature=temperature, step=step, only_critic=only_critic)
    except NonFinite as error:
        kept = directory.path / f"bad_batch_step_{step:06d}.pt"
        torch.save({"batch": vars(error.batch), "experience": vars(experience), "step": step, "term": error.term}, kept)
        raise NumericError(
            f"step {step}: {error.term} is not finite; the update was not applied.\n"
            f"  kept: {kept} (torch.load) holds the micro-batch and the experience\n"
            "  mend: lower the learning rate, clip the gradient (optimizer.clip_norm), and look at the rewards of this step"
        ) from None


def run(config: Config) -> Result:
    """Open everything, walk, save, and check that the frozen models never changed."""
    device = opening.settle(config)
    name, objective = resolve(config.algorithm, config.objective)
    rows = opening.rows(config.data, "prompt")
    lm, tokenizer, model = opening.language_model(config.model, config.tokenizer, lambda: opening.texts(rows.train), config.seed)
    lm = opening.adapted(lm, config.lora)
    policy = opening.policy_of(lm, device, value_head=bool(objective.value.needs) and config.critic == "shared")
    render = opening.renderer(tokenizer, config.data, lm, rows)
    prompts, held = render.prompts(rows.train), render.prompts(rows.held_out) if rows.held_out else []
    judged = scoring(config.reward, tokenizer, device, missing_stop_penalty=config.missing_stop_penalty)
    reference, anchor = _reference(config, policy, device)
    critic = _critic(config, policy, objective, judged, device)
    sampling = sampling_of(config.sampling, render)
    total = config.steps * config.passes * config.minibatches
    settings = config.optimizer.settings()
    learner = Learner(
        policy, Optimizer(policy, settings, total), reference=reference, critic=critic,
        critic_optimizer=None if critic is None else Optimizer(critic, replace(settings, lr=config.critic_lr or settings.lr), total),
        settings=Passes(config.passes, config.minibatches, config.micro_tokens), seed=config.seed, autocast=opening.precision(config, device),
    )  # fmt: skip
    trial = Trial.of(policy, tokenizer, held or prompts, judged, sampling, config.eval, seed=config.seed, slots=config.sampling.slots)
    trial = replace(
        trial,
        also=None if config.measure is None else scoring(config.measure, tokenizer, device),
        divergence=divergence(learner, sampling.temperature),
    )
    parts = Parts(
        Stream(prompts, config.seed), Sampler(lm, tokenizer, sampling, seed=config.seed, slots=config.sampling.slots), judged, learner, objective,
        trial, tokenizer,
    )  # fmt: skip
    if config.prompts > len(prompts):
        raise UsageError(f"prompts {config.prompts}: the data have only {len(prompts)} training prompts; set prompts to at most that")
    frozen: dict[str, torch.nn.Module] = {f"reward model {i}": m for i, (m, _) in enumerate(judged.models)} | (
        {} if anchor is None else {"reference": anchor}
    )
    marks = {role: fingerprint(m) for role, m in frozen.items()}
    directory, journal = opening.directory(config, name if ":" not in name else "rl", model, config.steps, IMPORTANT)
    with journal:
        journal.header([
            f"run        {directory.path}", opening.headline(model, policy, device, config), *rows.notes, f"           {render.summary()}",
            f"algorithm  {name}: {objective!r}",
            f"steps      {config.steps} of {config.prompts} prompts × {config.samples} answers; {config.passes * config.minibatches} optimizer steps each",
            *( [f"note       {policy.note}"] if policy.note else [] ), *(f"note       {n}" for n in objective.notes()),
        ])  # fmt: skip
        (directory.path / "objective.txt").write_text(
            card(objective, name=name, samples=config.samples, passes=config.passes) + "\n", encoding="utf-8"
        )
        before, after, step = train(config, parts, directory, journal)
        checkpoint = saved(directory, step, partial(save, policy.lm, tokenizer), config.save)
        for role, mark in marks.items():
            if fingerprint(frozen[role]) != mark:
                raise NumericError(f"the {role} changed during training: this is a defect of Tilt, and the run cannot be trusted")
            journal.note(f"unchanged  {role} {mark[:12]}")
    answers = tuple((b.prompt, b.completion, a.completion) for b, a in zip(before.texts, after.texts, strict=True))
    return Result(directory, checkpoint, before.metrics, after.metrics, answers)


def _reference(config: Config, policy: Policy, device: torch.device) -> tuple[Callable[[], AbstractContextManager[Policy]], Policy | None]:
    """The KL anchor: another checkpoint, the adapter switched off, or a frozen copy of the policy as it starts."""
    if config.lora is not None and config.reference is None:

        @contextmanager
        def base() -> Iterator[Policy]:
            with adapter_off(policy.lm):
                yield policy

        return base, None
    anchor = (
        Policy(copy.deepcopy(policy.lm))
        if config.reference is None
        else opening.policy_of(opening.language_model(config.reference, None, tuple, 0)[0], device)
    )
    anchor.requires_grad_(False)

    @contextmanager
    def frozen() -> Iterator[Policy]:
        yield anchor

    return frozen, anchor


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
