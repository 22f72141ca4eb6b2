"""What a step of reinforcement learning says of itself: its metrics, its stored rollouts with token channels, its clock."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from time import perf_counter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tilt.data.packing import Pack
from tilt.data.rollouts import Rollout
from tilt.learning.channels import SHOWN
from tilt.learning.evaluation import Assessment
from tilt.learning.learner import Report
from tilt.learning.meter import Meter
from tilt.learning.probing import Probe
from tilt.objectives import Credit, Experience, Objective, Rewards, Signals
from tilt.objectives.credit import earned, settled, shaped
from tilt.objectives.metrics import batch_metrics
from tilt.objectives.objective import Metrics
from tilt.recipes.selecting import Answers, alike
from tilt.rewards.text import Text
from tilt.runs import rollout_store
from tilt.runs.directory import RunDirectory
from tilt.runs.journal import Journal, Sample
from tilt.segments import group_count, group_mean, group_std

Why = Callable[[Sequence[Rollout], Sequence[Text]], Sequence[Mapping[str, Any]]]
"""Why each part of the reward scored each answer as it did, where it can tell."""


class Looked(NamedTuple):
    """What was looked at of a few answers: what the update came to, [A], and the alternatives at their tokens."""

    before: Probe
    result: Tensor

    @property
    def alternatives(self) -> rollout_store.Alternatives:
        return rollout_store.Alternatives(self.before.ids, self.before.policy, self.before.reference)

    def channels(self, known: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """`result`; and where the update did not read the reference, what it says of these answers, as if it had."""
        found = {"result": self.result}
        if known["reference_logprobs"].isnan().all():
            anchor = self.before.anchor
            moved = torch.where(known["new_logprobs"].isnan(), self.before.before, known["new_logprobs"]) - anchor
            found |= {"reference_logprobs": anchor, "delta_ref": moved, "kl": torch.expm1(-moved) + moved}
        return found


@dataclass
class Shown:
    """Which steps are stored with their token channels: every `every`-th, and the last; `bytes` of channels were stored, of a budget in megabytes.

    Once half of the budget is used, half as often; once half of the rest is, half as often again; and so on. every 10: 0 10 … 40 60 80 120 …
    """

    every: int
    budget: float
    bytes: int = 0

    def due(self, step: int, steps: int) -> bool:
        every = self.every * 2 ** int(math.log2(self.budget / max(self.budget - self.bytes / 1e6, self.budget / 2**20)))
        return self.every > 0 and (step % every == 0 or step + 1 == steps)


class Recorder:
    """Writes what each step says of itself, and counts answers and skipped batches over the run."""

    def __init__(self, directory: RunDirectory, journal: Journal, tokenizer: Any, steps: int, shown: Shown, why: Why) -> None:
        self.directory, self.journal, self.tokenizer, self.steps, self.shown, self.why = directory, journal, tokenizer, steps, shown, why
        self.answers, self.skipped, self.said = 0, 0, list[str]()

    def watches(self, step: int) -> bool:
        """Whether the rollouts of this step are stored with all their token channels, and some shown."""
        return self.shown.due(step, self.steps)

    def write(
        self, step: int, objective: Objective, answers: Answers, batch: Pack, experience: Experience, report: Report, clock: Clock,
        seen: Assessment | None, more: Mapping[str, float], looked: Looked | None = None,
    ) -> dict[str, float]:  # fmt: skip
        """The step's metrics, written with `more` and those of the evaluation before it; its rollouts where it is watched; a reward's first failure in words."""
        count = len(answers.drawn.rollouts)
        self.answers, self.skipped = self.answers + count, self.skipped + report.skipped
        metrics = measures(objective, answers.rewards, experience.signals, batch, answers.rollouts, report)
        metrics |= groups_kept(answers, objective.credit) | _read(answers.report.metrics()) | clock.read(batch.layout.actions)
        counts = {"episode": self.answers, "eps": count / metrics["time/step"], "skipped/total": self.skipped} | objective.controlled
        self.journal.step(step, metrics | counts | dict(more) | evaluated(seen))
        if report.note:
            self.journal.note(f"guards     {report.note}")
        messages = answers.report.messages
        for part in sorted(messages.keys() - set(self.said)):
            self.said.append(part)
            self.journal.note(f"reward     {messages[part]}")
        if self.shown.every > 0:
            shown = self.watches(step)
            self.shown.bytes += keep_rollouts(
                self.directory,
                step,
                answers,
                experience,
                objective,
                report,
                self.tokenizer,
                shown=self.why if shown else None,
                looked=looked,
            )
            if shown:
                show_samples(self.journal, step, answers, experience)
        return metrics

    def finish(self, taken: int, last: Assessment, more: Mapping[str, float]) -> None:
        """The last evaluation with what else was measured at the end, and how many of the batches moved nothing."""
        self.journal.step(taken, evaluated(last) | {f"eval/{name}": value for name, value in more.items()})
        why = ": nothing in them could move the weights (every group earned the same)" if self.skipped else ""
        self.journal.note(f"skipped    {self.skipped} of {taken} batches{why}")


def groups_kept(answers: Answers, credit: Credit) -> dict[str, float]:
    """With dynamic sampling: groups kept and drawn, the share of the drawn whose answers all earned the same, and the mean reward of all that was drawn."""
    if not answers.selected:
        return {}
    every = answers.drawn
    layout, scored = every.layout, every.rewards.scored
    flat = alike(every, credit)
    return {
        "groups/kept": float((~flat).sum()), "groups/drawn": float(layout.prompts), "groups/zero_variance": float(flat.double().mean()),
        "reward": float(earned(every.rewards, layout)[scored].double().mean()) if scored.any() else math.nan,
    }  # fmt: skip


def _read(pairs: Metrics) -> dict[str, float]:
    return {name: float(value / weight) for name, (value, weight) in pairs.items()}


def evaluated(seen: Assessment | None) -> dict[str, float]:
    """An evaluation's measures under their names in the journal; none where there was none."""
    return {} if seen is None else {f"eval/{name}": value for name, value in seen.metrics.items()}


def complete(signals: Signals, report: Report) -> Signals:
    """Signals with `old` wherever it is known: as evaluated, else as the update first saw it, else (for sequences left out) as sampled."""
    first = torch.where(report.channels["first"].isnan(), signals.sampler, report.channels["first"])
    return replace(signals, old=torch.where(signals.old.isnan(), first.to(signals.old), signals.old))


def measures(
    objective: Objective, rewards: Rewards, signals: Signals, batch: Pack, rollouts: Sequence[Rollout], report: Report
) -> dict[str, float]:
    """The step's metrics, on actions, in the field's names."""
    known = complete(signals, report)
    meter = Meter()
    meter.add(batch_metrics(rewards, known, batch.layout, kl=getattr(objective.credit, "kl", 0.0)))
    gap = (known.old - batch.sampler).abs()
    more = {name: float(value) for measure in objective.measures for name, value in measure.batch(rewards, known, batch.layout).items()}
    found = meter.read() | report.metrics
    sizes = batch.kept.sizes[batch.kept.sizes > 0]
    extra = {
        "sampler/kept_mean": float(sizes.double().mean()) if len(sizes) else math.nan,
        "reward": found.get("objective/scores", math.nan),
        "length/truncated": sum(r.stop == "length" for r in rollouts) / len(rollouts),
        "val/num_eos_tokens": float(sum(r.stop == "stop" for r in rollouts)),
        "sampler/logprob_gap_mean": float(gap.mean()),
        "sampler/logprob_gap_max": float(gap.max()),
        "kl": found.get("objective/kl", math.nan),
        "entropy": found.get("policy/entropy_avg", math.nan),
    }
    return {name: value for name, value in (found | extra | more).items() if not math.isnan(value) or name == "reward"}


def keep_rollouts(
    directory: RunDirectory, step: int, answers: Answers, experience: Experience, objective: Objective, report: Report, tokenizer: Any, *,
    shown: Why | None, looked: Looked | None = None,
) -> int:  # fmt: skip
    """Store the step's rollouts, where they are `shown` with why they were scored so and their token channels; the bytes of these before they are compressed."""
    every, advantages = answers.drawn, experience.advantages[experience.layout.starts]
    sequences: dict[str, Tensor | Sequence[Any]] = {
        "advantage": lengthened(advantages, len(every.rollouts)),
        **groups(every.rewards, every.layout),
        "dropped_reason": dropped(every, report.trained, objective.credit),
    }
    channels = token_channels(answers.rewards, experience, objective, report) if shown else {}
    if shown and any(reasons := shown(every.rollouts, every.texts)):
        sequences["checker"] = [json.dumps(each, ensure_ascii=False) for each in reasons]
    if looked is not None:
        channels |= looked.channels(channels)
    count = every.layout.actions
    kept = {name: lengthened(value, count) for name, value in channels.items() if not value.isnan().all()}
    table = rollout_store.RolloutTable(
        every.rollouts, every.texts, every.rewards, tokenizer, sequences,
        kept, run=directory.name, shown=shown is not None, alternatives=None if looked is None else looked.alternatives,
    )  # fmt: skip
    rollout_store.write(directory.rollouts, step, table)
    return count * sum(1 if name == "clip" else 2 for name in kept)


def token_channels(rewards: Rewards, experience: Experience, objective: Objective, report: Report) -> dict[str, Tensor]:
    """What is known of every action, on the action axis; differences are taken before they are stored in half precision."""
    layout, signals, new = experience.layout, complete(experience.signals, report), report.channels["new"]
    quiet, known = settled(rewards, replace(signals, reference=signals.reference.nan_to_num()), layout)
    return {
        "sampler_logprobs": signals.sampler, "old_logprobs": signals.old, "reference_logprobs": signals.reference, "new_logprobs": new,
        "delta_ref": new - signals.reference, "kl": torch.expm1(signals.reference - new) - (signals.reference - new),
        "adv_t": experience.advantages, "value": signals.values, "return": experience.returns,
        "token_reward": shaped(quiet, known, layout, getattr(objective.credit, "kl", 0.0)),
        **{name: report.channels[name] for name in SHOWN if name != "new"},
    }  # fmt: skip


def show_samples(journal: Journal, step: int, answers: Answers, experience: Experience) -> None:
    """Four answers of the step, for people."""
    rewards, advantages = answers.rewards, experience.advantages[experience.layout.starts]
    journal.samples(
        step,
        [
            Sample(text.prompt, text.completion, {k: float(v[i]) for k, v in rewards.parts.items()}, float(advantages[i]))
            for i, text in list(enumerate(answers.texts))[:: max(1, len(answers.texts) // 4)]
        ][:4],
    )


def lengthened(values: Tensor, count: int) -> Tensor:
    """Values and then NaN, so many in all: what was dropped was not looked at."""
    return torch.cat([values, values.new_full((count - len(values),), math.nan)])


def dropped(every: Answers, trained: Tensor, credit: Credit) -> list[str | None]:
    """Why an answer was left out of the update: it could not be scored (filter), it was cut and is not to be trained on (overlong), or its advantage was 0,
    as in every group that dynamic sampling dropped (zero_variance)."""
    used = torch.cat([trained, trained.new_zeros(len(every.rollouts) - len(trained))])
    cut = ~every.rewards.trained & torch.tensor([r.stop == "length" for r in every.rollouts]) & ~alike(every, credit)[every.layout.prompt]
    pairs = zip(every.rewards.scored.tolist(), used.tolist(), cut.tolist(), strict=True)
    return ["filter" if not scored else None if moved else "overlong" if long else "zero_variance" for scored, moved, long in pairs]


def groups(rewards: Rewards, layout: Any) -> dict[str, Tensor]:
    """Mean and standard deviation (divisor n) of the scored rewards of each sequence's group; NaN where none is scored."""
    any_scored = group_count(layout, rewards.scored) > 0
    found = {
        "group_mean": group_mean(earned(rewards, layout), layout, rewards.scored),
        "group_std": group_std(earned(rewards, layout), layout, rewards.scored, 0),
    }
    return {name: torch.where(any_scored, value, torch.nan)[layout.prompt] for name, value in found.items()}


class Clock:
    """Seconds of each phase of a step, added up where a phase comes again; `watch` is told of each."""

    def __init__(self, watch: Callable[[str], None] = lambda phase: None) -> None:
        self.began, self.watch = perf_counter(), watch
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        self.watch(phase)
        start = perf_counter()
        yield
        self.seconds[f"time/{phase}"] = self.seconds.get(f"time/{phase}", 0.0) + perf_counter() - start

    def read(self, actions: int) -> dict[str, float]:
        """Seconds of the phases and of the whole step, and sampled tokens a second of the whole."""
        step = perf_counter() - self.began
        return self.seconds | {"time/step": step, "tokens_per_second": actions / step}
