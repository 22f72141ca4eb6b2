"""The pipeline of reinforcement learning from human feedback, in one directory: (pretrain →) SFT (→ ranked or labelled answers) → reward model (→ judge) → RL."""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Mapping
from typing import Annotated, Any

from pydantic import Field, model_validator
from rich.console import Console
from rich.table import Table

from tilt.config import Section
from tilt.recipes import labelling, opening, planning, pretrain, ranking, reward_model, rl, sft
from tilt.recipes.finishing import Result
from tilt.recipes.labelling import Config as Label
from tilt.recipes.pretrain import Config as Pretrain
from tilt.recipes.ranking import Config as Rank
from tilt.recipes.reward_model import Config as RewardModel
from tilt.recipes.rl import Config as Reinforce
from tilt.recipes.session import session, stage_start
from tilt.recipes.settings import Data, Run, Scratch
from tilt.recipes.sft import Config as Finetune
from tilt.recipes.taking_up import NEW, Start, completed, finished
from tilt.runs.files import atomic_write
from tilt.runs.text import fence, inert

PENDING = "(the model of the stage before)"
SHARED = ("seed", "threads", "device", "dtype", "log_every", "quiet")


class Config(Run):
    """Every stage in turn; each takes its settings from its own section, and data and model from here."""

    model: Annotated[str | Scratch, Field(description="what the first stage starts from")]
    data: Data
    tokenizer: str | None = None
    pretrain: Annotated[Pretrain | None, Field(description="next-token prediction before SFT; null skips it")] = None
    sft: Finetune
    rank: Annotated[
        Rank | None,
        Field(
            description="answers of the SFT model, ranked by a reward, which the reward models learn from; null: they learn from the data"
        ),
    ] = None
    label: Annotated[
        Label | None, Field(description="pairs of the SFT model's answers, labelled by a judge (RLAIF), which the reward models learn from")
    ] = None
    reward_model: RewardModel
    judge: Annotated[
        RewardModel | None,
        Field(description="a second reward model on the other half of the prompts, which measures and is never trained against"),
    ] = None
    rl: Reinforce

    @model_validator(mode="before")
    @classmethod
    def _share(cls, given: Any) -> Any:
        """Each stage's section, completed with what the pipeline gives it; what the section says itself stands."""
        if not isinstance(given, Mapping):
            return given
        data = given.get("data")
        base = {"source": data} if isinstance(data, str) else dict(data) if isinstance(data, Mapping) else {}
        halves = {"reward_model": "first", "judge": "second"} if given.get("judge") is not None else {}
        defaults: dict[str, dict[str, Any]] = {
            "pretrain": {"read_as": "preference"},
            "sft": {},
            "rank": {},
            "label": {},
            "reward_model": {},
            "judge": {},
            "rl": {"reward": {"model": PENDING}},
        }
        made = dict(given)
        for stage, extra in defaults.items():
            own = made.get(stage, {} if stage in ("sft", "reward_model", "rl") else None)
            if not isinstance(own, Mapping):
                continue
            half = {"half": halves[stage]} if stage in halves else {}
            rows = own.get("data", {})
            rows = {"source": rows} if isinstance(rows, str) else rows
            made[stage] = {"model": PENDING, **extra, **own, "data": {**base, **half, **rows} if isinstance(rows, Mapping) else rows}
        return made

    @model_validator(mode="after")
    def _possible(self) -> Config:
        if self.rank is not None and self.rank.rows != "pairs":
            raise ValueError(
                f"rank.rows {self.rank.rows}: the reward model learns from pairs; leave it out, and label steps with `tilt rank`"
            )
        if self.rank is not None and self.label is not None:
            raise ValueError("rank and label both make the pairs that the reward model learns from: keep one")
        return self


def run(config: Config, start: Start = NEW) -> Result:
    """Every stage in `<run>/<stage>/`, each an ordinary run with a config.yaml that reruns it alone, and one report table.

    Resumed, the stages that have finished stay as they are, and the one that was cut short goes on.
    """
    if (done := finished(config, "rlhf", start)) is not None:
        return done
    opening.settle(config)
    opening.rows(config.data, "preference")
    rows: list[list[str]] = []
    model: str | Scratch = config.model
    began = time.perf_counter()

    def stage(
        name: str, do: Callable[[Any, Start], Result], settings: Section, report: Callable[[Result], list[list[str]]], **more: Any
    ) -> Result:
        start = time.perf_counter()
        shared = {key: getattr(config, key) for key in SHARED if key not in settings.model_fields_set}
        journal.note(f"── {name} " + "─" * max(0, 70 - len(name)))
        result = do(
            settings.model_copy(update=shared | {"name": name, "root": directory.path, "tokenizer": words(config, settings)} | more),
            stage_start(directory.path / name),
        )
        rows.extend([name, *row] for row in [*report(result), ["seconds", "", f"{time.perf_counter() - start:.0f}"]])
        return result

    def start_of(settings: Any) -> str | Scratch:
        """What a stage starts from: what its section says, else the model of the stage before (for a reward model, the SFT model)."""
        return model if settings.model == PENDING else settings.model

    named = config.model if isinstance(config.model, str) else config.model.kind
    with session(config, "rlhf", named, 1, (), start=start) as run:
        directory, journal = run.directory, run.journal
        if config.pretrain is not None:
            model = str(stage("pretrain", pretrain.run, config.pretrain, _likelihood, model=start_of(config.pretrain)).checkpoint)
        model = str(stage("sft", sft.run, config.sft, _likelihood, model=start_of(config.sft)).checkpoint)
        compared: dict[str, Any] = {}
        if config.rank is not None:
            made = stage("rank", ranking.run, config.rank, _ranked, model=start_of(config.rank)).directory / "pairs.jsonl"
            compared = {"data": config.reward_model.data.model_copy(update={"source": str(made), "columns": {}})}
        if config.label is not None:
            made = stage("label", labelling.run, config.label, _labelled, model=start_of(config.label)).directory / "pairs.jsonl"
            compared = {"data": config.reward_model.data.model_copy(update={"source": str(made), "columns": {}})}
        scored = stage("reward_model", reward_model.run, config.reward_model, _accuracy, model=start_of(config.reward_model), **compared)
        extra: dict[str, Any] = {"model": start_of(config.rl), "reward": _filled(config.rl.reward, str(scored.checkpoint))}
        if config.judge is not None:
            halved = {key: value.model_copy(update={"half": config.judge.data.half}) for key, value in compared.items()}
            judge = stage("judge", reward_model.run, config.judge, _accuracy, model=start_of(config.judge), seed=config.seed + 1, **halved)
            extra["measure"] = config.rl.measure or {"model": str(judge.checkpoint), "name": "judge"}
        final = stage("rl", rl.run, config.rl, _improvement, **extra)
        rows.append(["all", "seconds", "", f"{time.perf_counter() - began:.0f}"])
        text = _report(rows, final)
        atomic_write(directory.path / "report.md", fence(text).encode())
        journal.note(text)
        return completed(Result(directory, final.checkpoint, final.before, final.after, final.answers))


def words(config: Config, stage: Any) -> str | None:
    """The tokenizer that a stage is given: its own section's, else the pipeline's where it also has the pipeline's model."""
    return stage.tokenizer or (config.tokenizer if stage.model == PENDING else None)


def _filled(reward: Any, path: str) -> Any:
    """The reward with the pipeline's own reward model in place of the one that was pending."""
    if isinstance(reward, Mapping):
        return {key: path if value == PENDING else value for key, value in reward.items()}
    return [_filled(item, path) for item in reward] if isinstance(reward, list | tuple) else reward


def _likelihood(result: Result) -> list[list[str]]:
    return [["held-out nll, nats a token", f"{result.before.get('nll', float('nan')):.3f}", f"{result.after.get('nll', float('nan')):.3f}"]]


def _ranked(result: Result) -> list[list[str]]:
    return [["pairs of ranked answers", "", f"{result.after['pairs']:.0f}"]]


def _labelled(result: Result) -> list[list[str]]:
    measures = [("confidence of the judge", "confidence"), ("its bias, log-odds of the first place", "position_bias")]
    return [["labelled pairs", "", f"{result.after['pairs']:.0f}"]] + [
        [said, "", f"{result.after[name]:.3f}"] for said, name in measures if name in result.after
    ]


def _accuracy(result: Result) -> list[list[str]]:
    return [
        ["held-out accuracy", f"{result.before.get('accuracy', float('nan')):.3f}", f"{result.after.get('accuracy', float('nan')):.3f}"]
    ]


def _improvement(result: Result) -> list[list[str]]:
    """Held-out measures before and after, and the rise of every score in deviations of the SFT model's own scores."""
    before, after = result.before, result.after
    found = []
    for name, label in (
        ("reward", "reward"),
        *((k, k.partition("/")[2]) for k in before if k.startswith("measure/") and not k.endswith("_std")),
    ):
        rise = (after[name] - before[name]) / max(before[f"{name}_std"], 1e-9)
        found.append([f"{label}: mean score", f"{before[name]:.3f}", f"{after[name]:.3f}"])
        found.append([f"{label}: rise in SFT deviations", "", f"{rise:+.2f}"])
    for name, label in (
        ("kl", "sequence KL to the reference, nats"),
        ("length", "answer length, tokens"),
        ("truncated", "truncated"),
        ("distinct_2", "distinct-2"),
    ):
        if name in after:
            found.append([label, f"{before[name]:.3f}", f"{after[name]:.3f}"])
    return found


def _report(rows: list[list[str]], final: Result) -> str:
    """The report: one table over all stages, and five held-out prompts answered before and after."""
    console = Console(width=110, record=True, file=io.StringIO())
    table = Table("stage", "measure", "before", "after", title="the whole road")
    for row in rows:
        table.add_row(*row)
    console.print(table)
    lines = [console.export_text(), "five held-out prompts, before and after", ""]
    for prompt, before, after in final.answers[:5]:
        lines += [f"prompt  {inert(prompt)}", f"before  {inert(before)}", f"after   {inert(after)}", ""]
    return "\n".join(lines)


def plan(config: Config) -> list[str]:
    """What every stage would read, hold and take, in lines; nothing is trained or written."""
    plans: dict[str, Callable[[Any], list[str]]] = {
        "pretrain": pretrain.plan,
        "sft": sft.plan,
        "rank": ranking.plan,
        "label": labelling.plan,
        "reward_model": reward_model.plan,
        "judge": reward_model.plan,
        "rl": rl.plan,
    }
    return planning.pipeline(config, plans, PENDING, words)
