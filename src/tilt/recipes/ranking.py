"""Preference data from a model's own answers: several to each prompt, ranked by a reward, with the record of where each pair comes from."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import combinations
from typing import Annotated, Any, Literal

from pydantic import Field

from tilt.data.rollouts import Prompt
from tilt.errors import DataError
from tilt.models.saving import fingerprint
from tilt.objectives import Rewards
from tilt.recipes import opening, planning
from tilt.recipes.finishing import Result
from tilt.recipes.rehearsal import rehearse
from tilt.recipes.scoring import scoring
from tilt.recipes.settings import Data, Reward, Run, Sampling
from tilt.recipes.trying import sampling_of
from tilt.rewards.score import earned_by
from tilt.rewards.text import Text
from tilt.runs.files import atomic_write
from tilt.sampling.sampler import Sampler

IMPORTANT = ("pairs", "ties", "gap", "time/step")


class Config(Run):
    """Answers of a model to every prompt, ranked by a reward: what a reward model or DPO learns from."""

    model: Annotated[str, Field(description="whose answers are ranked: a checkpoint's folder or a hub name")]
    data: Data
    tokenizer: Annotated[str | None, Field(description="tokenizer folder or name, where the model brings none")] = None
    reward: Annotated[Reward, Field(description="what ranks them: file.py:function, a rule, a reward model, or a weighted list of them")]
    samples: Annotated[int, Field(ge=2, description="answers to each prompt")] = 4
    prompts: Annotated[int, Field(ge=1, description="prompts at a time")] = 64
    pairs: Annotated[
        Literal["extremes", "all"], Field(description="the best answer of a prompt against the worst, or every two of different rewards")
    ] = "extremes"
    gap: Annotated[float, Field(ge=0.0, description="rewards of a pair must differ by more than this")] = 0.0
    sampling: Sampling = Sampling()


@dataclass(frozen=True)
class Ranked:
    """A pair in the words of its file: the answers, what they earned, and which samples they are."""

    prompt: Any
    chosen: str
    rejected: str
    chosen_score: float
    rejected_score: float
    chosen_sample: int
    rejected_sample: int
    sampled_from: str


def run(config: Config) -> Result:
    """Sample, rank, and write `pairs.jsonl` with `provenance.json` beside it."""
    device = opening.settle(config)
    rows = opening.rows(config.data, "prompt")
    lm, tokenizer, name = opening.language_model(config.model, config.tokenizer, tuple, config.seed)
    policy = opening.policy_of(lm, device)
    render = opening.renderer(tokenizer, config.data, lm, rows)
    prompts = render.prompts([*rows.train, *rows.held_out])
    judged = scoring(config.reward, tokenizer, device)
    sampling, mark = sampling_of(config.sampling, render), fingerprint(policy)
    sampler = Sampler(lm, tokenizer, sampling, seed=config.seed, slots=config.sampling.slots)
    rehearse(judged, sampler, prompts)
    parts = [prompts[i : i + config.prompts] for i in range(0, len(prompts), config.prompts)]
    directory, journal = opening.directory(config, "ranking", name, len(parts), IMPORTANT, label="rank")
    made: list[Ranked] = []
    with journal:
        journal.header(
            [f"run        {directory.path}", opening.headline(name, policy, device, config), *rows.notes, f"           {render.summary()}"]
        )
        for step, part in enumerate(parts):
            rollouts = sampler.sample(part, config.samples, step=step, stream="rank")
            texts, rewards = judged.judge(rollouts)
            rewards = replace(rewards, total=earned_by(rollouts, rewards))
            found = [
                pair for i, prompt in enumerate(part) for pair in ranked(config, prompt, i, texts, rewards, f"{config.model}@{mark[:12]}")
            ]
            made += found
            gaps = [pair.chosen_score - pair.rejected_score for pair in found]
            flat = len(part) - len({json.dumps(pair.prompt, ensure_ascii=False) for pair in found})
            journal.step(step, {"pairs": len(found), "ties": flat} | ({"gap": sum(gaps) / len(gaps)} if gaps else {}))
        judged.close()
        if not made:
            raise DataError("no prompt has two answers of different rewards: raise samples or sampling.temperature, or look at the reward")
        atomic_write(directory / "pairs.jsonl", "".join(json.dumps(asdict(pair), ensure_ascii=False) + "\n" for pair in made))
        plain = opening.recorded(config)[0]
        assert isinstance(plain, Config)
        record = {
            "model": config.model, "sha256": mark, "seed": config.seed, "samples": config.samples, "sampling": asdict(sampling),
            "reward": plain.reward, "prompts": len(prompts), "pairs": len(made),
        }  # fmt: skip
        atomic_write(directory / "provenance.json", json.dumps(record, indent=2, ensure_ascii=False, default=str) + "\n")
        journal.note(f"pairs      {len(made)} from {len(prompts)} prompts: {directory / 'pairs.jsonl'}")
    return Result(directory, directory.path, {}, {"pairs": float(len(made))})


def ranked(config: Config, prompt: Prompt, number: int, texts: Sequence[Text], rewards: Rewards, source: str) -> Iterator[Ranked]:
    """The pairs among the answers to the prompt that stands at this number of its batch; equal texts and unscored answers make none."""
    own = range(number * config.samples, (number + 1) * config.samples)
    scored = sorted((i for i in own if rewards.scored[i]), key=lambda i: -float(rewards.total[i]))
    every = combinations(scored, 2) if config.pairs == "all" else [(scored[0], scored[-1])] if len(scored) > 1 else []
    for better, worse in every:
        high, low = float(rewards.total[better]), float(rewards.total[worse])
        if high - low > config.gap and texts[better].completion != texts[worse].completion:
            asked = prompt.columns.get("prompt_turns", prompt.columns.get("prompt", texts[better].prompt))
            samples = better - own.start, worse - own.start
            yield Ranked(asked, texts[better].completion, texts[worse].completion, high, low, *samples, source)


def plan(config: Config) -> list[str]:
    """What a run would read, hold and take, in lines; nothing is trained or written."""
    return planning.ranked_answers(config)
