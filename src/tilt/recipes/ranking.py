"""Data from a model's own answers, several to each prompt: pairs ranked by a reward, or labelled steps, with the record of where they come from."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import combinations
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from tilt.data.rollouts import Prompt, Rollout
from tilt.data.shapes import TURNS
from tilt.errors import DataError
from tilt.models.saving import fingerprint
from tilt.objectives import Rewards
from tilt.recipes import opening, planning
from tilt.recipes.finishing import Result
from tilt.recipes.rehearsal import rehearse
from tilt.recipes.scoring import Scoring, scoring
from tilt.recipes.session import session
from tilt.recipes.settings import Data, Reward, Run, Sampling
from tilt.recipes.taking_up import NEW, Start, finished, recorded
from tilt.recipes.trying import sampling_of
from tilt.rewards.process import ProcessReward
from tilt.rewards.score import earned_by
from tilt.rewards.spec import Process, parse
from tilt.rewards.text import Text, inert
from tilt.runs.files import atomic_write
from tilt.sampling.sampler import Sampler

IMPORTANT = ("pairs", "ties", "gap", "answers", "right", "time/step")

NAMES = {"pairs": "pairs", "steps": "answers"}
NOTHING = {
    "pairs": "no prompt has two answers of different rewards: raise samples or sampling.temperature, or look at the reward",
    "steps": "no answer has a whole step that the reward judges: raise sampling.max_tokens, or look at the reward",
}


class Config(Run):
    """Answers of a model to every prompt, ranked by a reward: what a reward model or DPO learns from; or their steps labelled, for a process reward model."""

    model: Annotated[str, Field(description="whose answers are ranked: a checkpoint's folder or a hub name")]
    data: Data
    tokenizer: Annotated[str | None, Field(description="tokenizer folder or name, where the model brings none")] = None
    reward: Annotated[Reward, Field(description="what ranks them: file.py:function, a rule, a reward model, or a weighted list of them")]
    samples: Annotated[int, Field(ge=2, description="answers to each prompt")] = 4
    prompts: Annotated[int, Field(ge=1, description="prompts at a time")] = 64
    rows: Annotated[
        Literal["pairs", "steps"],
        Field(description="pairs of answers; or every answer with what a `process` reward says of each step, 0 to 1, as its label"),
    ] = "pairs"
    pairs: Annotated[
        Literal["extremes", "all"], Field(description="the best answer of a prompt against the worst, or every two of different rewards")
    ] = "extremes"
    gap: Annotated[float, Field(ge=0.0, description="rewards of a pair must differ by more than this")] = 0.0
    sampling: Sampling = Sampling()

    @model_validator(mode="after")
    def _possible(self) -> Config:
        if self.rows == "pairs":
            return self
        if idle := [key for key in ("pairs", "gap") if key in self.model_fields_set]:
            raise ValueError(f"{', '.join(idle)}: without effect, rows steps makes no pairs; leave it out")
        specs = [] if self.reward is None else parse(self.reward)
        if self.reward is not None and not (len(specs) == 1 and isinstance(specs[0].source, Process) and specs[0].weight == 1):
            raise ValueError("rows steps needs one judge of steps, of weight 1: reward: {process: file.py:function} or {process: MODEL}")
        return self


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


@dataclass(frozen=True)
class Labelled:
    """An answer in steps in the words of its file: what the judge says of each, from 0 to 1, and which sample it is."""

    prompt: Any
    steps: list[str]
    labels: list[float]
    sample: int
    sampled_from: str


def run(config: Config, start: Start = NEW) -> Result:
    """Sample, judge, and write `pairs.jsonl` or `steps.jsonl` with `provenance.json` beside it; resumed, it begins again."""
    if (done := finished(config, "ranking", start)) is not None:
        return done
    device = opening.settle(config)
    rows = opening.rows(config.data, "prompt")
    lm, tokenizer, name = opening.language_model(config.model, config.tokenizer, tuple, config.seed)
    policy = opening.policy_of(lm, device)
    render = opening.renderer(tokenizer, config.data, lm, rows)
    prompts = render.prompts([*rows.train, *rows.held_out])
    judged = scoring(config.reward, tokenizer, device)
    sampling, mark = sampling_of(config.sampling, render), fingerprint(policy)
    drawn = opening.drawing_dtype(config, config.sampling.dtype, device)
    sampler = Sampler(lm, tokenizer, sampling, seed=config.seed, slots=config.sampling.slots, dtype=drawn, cache=config.sampling.cache)
    rehearse(judged, sampler, prompts)
    parts = [prompts[i : i + config.prompts] for i in range(0, len(prompts), config.prompts)]
    made: list[Ranked | Labelled] = []
    with session(config, "ranking", name, len(parts), IMPORTANT, label="rank", start=start) as run:
        directory = run.directory
        shown = opening.headline(name, policy, device, config)
        run.journal.header([f"run        {directory.path}", shown, *rows.notes, f"           {render.summary()}", *judged.notes])
        for step in run.steps(len(parts)):
            part = parts[step]
            rollouts = sampler.sample(part, config.samples, step=step, stream="rank")
            texts, rewards = judged.judge(rollouts)
            found, measures = _made(config, part, rollouts, texts, rewards, judged, f"{config.model}@{mark[:12]}")
            made += found
            run.journal.step(step, measures)
        judged.close()
        if not made:
            raise DataError(NOTHING[config.rows])
        atomic_write(directory / f"{config.rows}.jsonl", "".join(json.dumps(asdict(row), ensure_ascii=False) + "\n" for row in made))
        plain = recorded(config)[0]
        assert isinstance(plain, Config)
        record = {
            "model": config.model, "sha256": mark, "seed": config.seed, "samples": config.samples, "sampling": asdict(sampling),
            "reward": plain.reward, "prompts": len(prompts), NAMES[config.rows]: len(made),
        }  # fmt: skip
        atomic_write(directory / "provenance.json", json.dumps(record, indent=2, ensure_ascii=False, default=str) + "\n")
        run.journal.note(f"{NAMES[config.rows]:<10} {len(made)} from {len(prompts)} prompts: {directory / f'{config.rows}.jsonl'}")
        return run.finish({}, {NAMES[config.rows]: float(len(made))}, at=len(parts))


def _made(
    config: Config, prompts: Sequence[Prompt], rollouts: Sequence[Rollout], texts: Sequence[Text], rewards: Rewards, judged: Scoring, source: str
) -> tuple[list[Ranked | Labelled], dict[str, float]]:  # fmt: skip
    """The rows that a batch of answers makes, and their measures."""
    if config.rows == "steps":
        judge = judged.score.parts[0].call
        assert isinstance(judge, ProcessReward)
        answers = list(labelled(config, rollouts, texts, rewards, judge.separator, source))
        labels = [label for answer in answers for label in answer.labels]
        return [*answers], {"answers": len(answers)} | ({"right": sum(labels) / len(labels)} if labels else {})
    rewards = replace(rewards, total=earned_by(rollouts, rewards))
    found = [pair for i, prompt in enumerate(prompts) for pair in ranked(config, prompt, i, texts, rewards, source)]
    gaps = [pair.chosen_score - pair.rejected_score for pair in found]
    flat = len(prompts) - len({json.dumps(pair.prompt, ensure_ascii=False) for pair in found})
    return [*found], {"pairs": len(found), "ties": flat} | ({"gap": sum(gaps) / len(gaps)} if gaps else {})


def asked(prompt: Prompt, text: Text) -> Any:
    """A prompt as its data had it: turns, or text."""
    return prompt.columns.get(TURNS, prompt.columns.get("prompt", text.prompt))


def labelled(
    config: Config, rollouts: Sequence[Rollout], texts: Sequence[Text], rewards: Rewards, separator: str, source: str
) -> Iterator[Labelled]:
    """Answers with the judge's word on each step. The last step of an answer that was cut is left out, and an answer with a step that could not be judged."""
    start = 0
    for number, (rollout, text) in enumerate(zip(rollouts, texts, strict=True)):
        own = slice(start, start + sum(rollout.sampled))
        start = own.stop
        labels = [round(label, 6) for label in rewards.steps[own][rewards.ends[own]].tolist()]
        steps = [step for step in text.completion.split(separator) if step.strip()]
        if not all(0 <= label <= 1 for label in labels):
            raise DataError(
                f"the judge says {labels} of the steps of {inert(text.completion)}: a label is the chance that a step is right, 0 to 1"
            )
        whole = len(steps) - (rollout.stop == "length")
        if whole > 0 and len(labels) == len(steps):
            yield Labelled(asked(rollout.prompt, text), steps[:whole], labels[:whole], number % config.samples, source)


def ranked(config: Config, prompt: Prompt, number: int, texts: Sequence[Text], rewards: Rewards, source: str) -> Iterator[Ranked]:
    """The pairs among the answers to the prompt that stands at this number of its batch; equal texts and unscored answers make none."""
    own = range(number * config.samples, (number + 1) * config.samples)
    scored = sorted((i for i in own if rewards.scored[i]), key=lambda i: -float(rewards.total[i]))
    every = combinations(scored, 2) if config.pairs == "all" else [(scored[0], scored[-1])] if len(scored) > 1 else []
    for better, worse in every:
        high, low = float(rewards.total[better]), float(rewards.total[worse])
        if high - low > config.gap and texts[better].completion != texts[worse].completion:
            samples = better - own.start, worse - own.start
            yield Ranked(asked(prompt, texts[better]), texts[better].completion, texts[worse].completion, high, low, *samples, source)


def plan(config: Config) -> list[str]:
    """What a run would read, hold and take, in lines; nothing is trained or written."""
    return planning.ranked_answers(config)
