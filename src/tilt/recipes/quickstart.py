"""The quickstart: offline, from random weights, minutes on two cores. (a) SFT → GRPO on addition; (b) SFT → reward model → PPO on manners."""

from __future__ import annotations

import io
import json
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field
from rich.console import Console
from rich.table import Table

from tilt.config import Section
from tilt.data.tokenizers import characters
from tilt.recipes import opening, planning, reward_model, rl, sft
from tilt.recipes.finishing import Result
from tilt.recipes.session import session, stage_start
from tilt.recipes.settings import Run
from tilt.recipes.taking_up import NEW, Start
from tilt.runs.files import atomic_write
from tilt.runs.journal import Journal, read_metrics
from tilt.runs.text import curve, fence
from tilt.tasks import arithmetic, manners

SUM_REWARD = "exact"
NEXT = """What to try next
  {again}
  tilt algorithms grpo                               what the run computed, in formulas
  tilt rlhf examples/rlhf_instruct.yaml              the same road on real text
  tilt data show FILE, tilt sft --help               your own data"""
ADDITION_SFT: dict[str, Any] = {
    "batch": 256, "steps": 400, "stop_at": 0.45,
    "optimizer": {"lr": 2e-3, "schedule": "constant", "warmup": 20},
    "sampling": {"max_tokens": 5}, "eval": {"every": 10, "prompts": 512},
}  # fmt: skip
ADDITION_GRPO: dict[str, Any] = {
    "algorithm": "grpo", "objective": {"penalty": {"none": {}}}, "steps": 200, "prompts": 64, "samples": 8,
    "optimizer": {"lr": 5e-4, "warmup": 5, "schedule": "linear", "final": 0.05}, "sampling": {"max_tokens": 5},
    "eval": {"every": 40, "prompts": 980}, "rollouts_every": 50,
}  # fmt: skip
MANNERS_SFT: dict[str, Any] = {"batch": 64, "epochs": 6, "optimizer": {"lr": 3e-3, "schedule": "cosine", "warmup": 10}}
MANNERS_RM: dict[str, Any] = {
    "batch": 64,
    "epochs": 3,
    "span": 0.5,
    "normalise": True,
    "optimizer": {"lr": 3e-3, "schedule": "linear", "warmup": 10},
}
MANNERS_PPO: dict[str, Any] = {
    "algorithm": "ppo", "objective": {"credit": {"kl": 0.2}}, "steps": 50, "prompts": 64, "samples": 4, "sampling": {"max_tokens": 16},
    "optimizer": {"lr": 4e-4, "warmup": 3}, "critic_lr": 1e-3, "eval": {"every": 20, "prompts": 72, "samples": 4}, "rollouts_every": 20,
}  # fmt: skip


class Config(Run):
    """Two small tasks, every stage on its own randomness, one report."""

    parts: Annotated[tuple[str, ...], Field(description="which of addition and manners to run")] = ("addition", "manners")


def run(config: Config, start: Start = NEW) -> dict[str, Result]:
    """Run the parts in one directory and print what changed; resumed, with the stages that have finished left as they are."""
    opening.settle(config)
    began = time.perf_counter()
    found: dict[str, Result] = {}
    with session(config, "quickstart", "tiny", 1, (), start=start) as run:
        directory, journal = run.directory, run.journal
        journal.header(
            [
                "Tilt quickstart: tiny models from random weights, no network. Held-out prompts are seen by no stage.",
                f"run        {directory.path}",
            ]
        )
        for part, play in (("addition", _addition), ("manners", _manners)):
            if part in config.parts:
                found |= play(config, directory.path / part, journal)
        text = report(found, directory.path, time.perf_counter() - began)
        atomic_write(directory.path / "report.md", fence(text).encode())
        journal.note(text)
    return found


def _addition(config: Config, place: Path, journal: Journal) -> dict[str, Result]:
    """SFT until it is right 45 % of the time, then GRPO, which sees rewards only."""
    journal.note("(a) addition, 07+45=052: SFT to 45 %, then GRPO from rewards alone")
    task = arithmetic.Addition()
    data = _write(place, train=task.rows(held_out=False), held_out=task.rows(held_out=True))
    characters(arithmetic.ALPHABET).save_pretrained(place / "tokenizer")
    model = {"width": 128, "layers": 4, "heads": 4, "context": 32, "tokenizer": place / "tokenizer"}
    reward = {SUM_REWARD: {"answer": "answer"}}
    first = _stage(config, sft, "sft", place, model=model, data=data, reward=reward, **ADDITION_SFT)
    second = _stage(config, rl, "grpo", place, model=str(first.checkpoint), data=data, reward=reward, **ADDITION_GRPO)
    return {"addition/sft": first, "addition/grpo": second}


def _manners(config: Config, place: Path, journal: Journal) -> dict[str, Result]:
    """SFT on answers of mixed kindness, a reward model on pairs judged by the program, PPO with four models."""
    journal.note("(b) manners: SFT → reward model → PPO with actor, critic, reward model and reference")
    task = manners.Manners()
    shown = _write(place / "demonstrations", train=task.demonstrations(held_out=False), held_out=task.demonstrations(held_out=True))
    asked = _write(
        place / "prompts", **{name: [{"prompt": p} for p in task.prompts(held_out=name == "held_out")] for name in ("train", "held_out")}
    )
    pairs = _write(place / "pairs", train=task.pairs(held_out=False), held_out=task.pairs(held_out=True))
    model = {"width": 64, "layers": 2, "heads": 4, "context": 64, "vocabulary": 640}
    first = _stage(config, sft, "sft", place, model=model, data=shown, **MANNERS_SFT)
    second = _stage(config, reward_model, "reward_model", place, model=str(first.checkpoint), data=pairs, **MANNERS_RM)
    third = _stage(
        config,
        rl,
        "ppo",
        place,
        model=str(first.checkpoint),
        data=asked,
        reward={"model": str(second.checkpoint), "name": "reward_model"},
        **MANNERS_PPO,
    )
    return {"manners/sft": first, "manners/reward_model": second, "manners/ppo": third}


def _stage(config: Config, recipe: Any, name: str, place: Path, **settings: Any) -> Result:
    """One recipe as a run of its own under the quickstart's directory."""
    shared = {key: getattr(config, key) for key in ("seed", "threads", "device", "dtype", "quiet", "log_every")}
    made: Section = recipe.Config.model_validate(shared | {"name": name, "root": place} | settings)
    result: Result = recipe.run(made, stage_start(place / name))
    return result


def _write(place: Path, **parts: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Rows on disk, so that every stage is an ordinary run that can be repeated by hand."""
    place.mkdir(parents=True, exist_ok=True)
    for name, rows in parts.items():
        atomic_write(place / f"{name}.jsonl", "".join(json.dumps(row) + "\n" for row in rows).encode())
    return {"source": str(place / "train.jsonl"), "eval": str(place / "held_out.jsonl"), "template": "text"}


def preference_rate(answers: Iterable[tuple[str, str, str]]) -> float:
    """How often the program prefers the answer after to the answer before, ties counted half."""
    prompts, before, after = zip(*answers, strict=True)
    return manners.preference_rate(prompts, after, before)


def report(found: Mapping[str, Result], place: Path, seconds: float) -> str:
    """The table before/after with confidence intervals, the learning curve, and where everything lies."""
    console = Console(width=100, record=True, file=io.StringIO())
    table = Table("stage", "measured on held-out prompts", "before", "after", title="What training changed")
    for row in _rows(found):
        table.add_row(*row)
    console.print(table)
    text = console.export_text()
    for stage, name, label in (
        ("addition/grpo", "reward", "accuracy of the answers sampled in training"),
        ("manners/ppo", "reward", "score of the reward model in training"),
    ):
        if stage in found:
            text += "\n" + curve(
                f"{stage}: {label}, by step", [row[name] for row in read_metrics(found[stage].directory.metrics) if name in row]
            )
    again = f"tilt run {place}/addition/grpo/config.yaml name=mine algorithm=rloo"
    return text + f"\n{seconds:.0f} s in all; everything is in {place}\n{NEXT.format(again=again)}\n"


def _rows(found: Mapping[str, Result]) -> Iterable[tuple[str, str, str, str]]:
    def interval(measures: Mapping[str, float], name: str = "reward") -> str:
        return f"{measures[name]:.3f} ± {1.96 * measures[f'{name}_se']:.3f}"

    for stage, result in found.items():
        before, after = result.before, result.after
        if stage.startswith("addition"):
            yield stage, "accuracy of sampled answers", interval(before), interval(after)
        elif stage.endswith("sft"):
            yield stage, "nll of given answers, nats a token", f"{before['nll']:.3f}", f"{after['nll']:.3f}"
        elif stage.endswith("reward_model"):
            yield stage, "accuracy on pairs", f"{before['accuracy']:.3f}", f"{after['accuracy']:.3f}"
        else:
            yield stage, "score of the reward model", interval(before), interval(after)
            yield stage, "true preference rate over the SFT model", "0.500", f"{preference_rate(result.answers):.3f}"
            yield stage, "sequence KL to the reference, nats", f"{before['kl']:.2f}", f"{after['kl']:.2f}"


def plan(config: Config) -> list[str]:
    """What each stage would be told, in lines; nothing is trained or written."""
    addition = {"sft": ADDITION_SFT, "grpo": ADDITION_GRPO}
    manners_stages = {"sft": MANNERS_SFT, "reward_model": MANNERS_RM, "ppo": MANNERS_PPO}
    parts = {"addition": addition, "manners": manners_stages}
    return planning.stages(config, "quickstart", {f"{part}/{name}": given for part in config.parts for name, given in parts[part].items()})
