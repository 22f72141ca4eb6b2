"""Preference data from a judge (RLAIF, arXiv 2309.00267): pairs of the data or of a model's own answers, asked in both orders, labelled softly."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from itertools import combinations
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from tilt.data.conversations import plain_text
from tilt.data.shapes import RANKED, TURNS
from tilt.errors import DataError
from tilt.models.saving import fingerprint
from tilt.recipes import opening, planning
from tilt.recipes.comparers import Judge, Opened, changed, opened
from tilt.recipes.finishing import Result
from tilt.recipes.scoring import reader
from tilt.recipes.session import session
from tilt.recipes.settings import Data, Run, Sampling
from tilt.recipes.taking_up import NEW, Start, finished
from tilt.recipes.trying import sampling_of
from tilt.rewards.judge import Opinions, compare
from tilt.runs.files import atomic_write
from tilt.sampling.sampler import Sampler

IMPORTANT = ("pairs", "confidence", "consistency", "position_bias", "agreement", "outside", "time/step")
TOKENS = 4  # of an answer that is sampled for a rehearsal


class Config(Run):
    """Pairs that a judge labels, softly: what a reward model or DPO learns from."""

    judge: Annotated[Judge, Field(description="who labels: a causal LM, or file.py:function; a mapping for more")]
    data: Data
    model: Annotated[
        str | None, Field(description="whose answers to the prompts of the data are labelled; null: the data bring the answers, in pairs")
    ] = None
    tokenizer: Annotated[str | None, Field(description="tokenizer folder or name, where the model brings none")] = None
    samples: Annotated[int, Field(ge=2, description="answers of the model to each prompt; every two of them make a pair")] = 2
    prompts: Annotated[int, Field(ge=1, description="prompts at a time; without a model, pairs")] = 64
    orders: Annotated[
        Literal["both", "one"], Field(description="each pair is asked both ways round, or once, in an order drawn by the seed")
    ] = "both"
    combine: Annotated[
        Literal["log_odds", "mean"],
        Field(
            description="how both orders become one probability: half the difference of their log-odds, which a constant bias for a place leaves alone; "
            "or the mean of the probabilities (the paper), which such a bias draws towards 1/2"
        ),
    ] = "log_odds"
    margin: Annotated[float, Field(ge=0.0, lt=0.5, description="pairs whose probability is nearer to 1/2 than this are left out")] = 0.0
    hard: Annotated[bool, Field(description="labels of 0 and 1 instead of probabilities; ties are left out")] = False
    sampling: Sampling = Sampling()

    @model_validator(mode="after")
    def _effective(self) -> Config:
        if self.model is None:
            if idle := changed(self, ("tokenizer", "samples", "sampling")):
                raise ValueError(f"{idle[0]} is about answers that are sampled, and there is no model: name one, or leave {idle[0]} out")
            if idle := changed(self.data, ("template", "train_on", "max_prompt_tokens", "max_tokens", "over_length")):
                raise ValueError(f"data.{idle[0]} is about a model that reads the data, and there is none: name one, or leave it out")
        if self.orders == "one" and self.combine == "mean":
            raise ValueError("combine mean has two orders to combine, and orders is one: leave one of them out")
        return self


@dataclass(frozen=True)
class Pair:
    """Two answers to one prompt, not yet judged, as they stand in the data or were sampled, with their numbers among the answers to it."""

    prompt: Any
    one: Any
    other: Any
    numbers: tuple[int, int]

    @property
    def texts(self) -> tuple[str, str, str]:
        """Prompt and answers as the judge reads them."""
        return plain_text(self.prompt), plain_text(self.one), plain_text(self.other)

    @property
    def differs(self) -> bool:
        return self.texts[1] != self.texts[2]

    @property
    def turned(self) -> Pair:
        return replace(self, one=self.other, other=self.one, numbers=(self.numbers[1], self.numbers[0]))


@dataclass(frozen=True)
class Labelled:
    """A pair in the words of its file: the answers, P(chosen is better), the log-odds that the judge gave the first place with either answer in it (null where
    it was not asked), and which of the answers to the prompt they are."""

    prompt: Any
    chosen: Any
    rejected: Any
    probability: float
    log_odds_chosen_first: float | None
    log_odds_rejected_first: float | None
    chosen_number: int
    rejected_number: int
    judged_by: str
    sampled_from: str | None


@dataclass(frozen=True)
class Answers:
    """Where pairs come from, a batch at a time; what was read, and what of it belongs in the record."""

    batches: int
    draw: Callable[[int], list[Pair]]
    few: Callable[[], list[Pair]]
    notes: list[str]
    record: Mapping[str, Any]
    source: str | None = None


def run(config: Config, start: Start = NEW) -> Result:
    """Sample where a model is named, ask the judge, and write `pairs.jsonl` with `provenance.json` beside it; resumed, it begins again."""
    if (done := finished(config, "labelling", start)) is not None:
        return done
    with ExitStack() as ending:
        answers, judge = opened_answers(config), opened(config.judge, config)
        ending.callback(judge.close)
        ask(config, judge, answers.few())
        run = ending.enter_context(session(config, "labelling", judge.name, answers.batches, IMPORTANT, label="label", start=start))
        directory = run.directory
        run.journal.header([f"run        {directory.path}", *answers.notes, f"judge      {judge.name}, {asked_how(config)}"])
        made: list[Labelled] = []
        said: list[Opinions] = []
        counts: Counter[str] = Counter()
        agreed: list[float] = []
        for step in run.steps(answers.batches):
            drawn = answers.draw(step)
            pairs = placed(config, [pair for pair in drawn if pair.differs], step)
            counts.update({"the same answer twice": len(drawn) - len(pairs)} if len(pairs) < len(drawn) else {})
            opinions = ask(config, judge, pairs)
            found = list(labelled(config, pairs, opinions, judge.name, answers.source, counts))
            same = agreement(pairs, opinions) if answers.source is None else []
            run.journal.step(step, {"pairs": len(found)} | opinions.metrics() | ({"agreement": sum(same) / len(same)} if same else {}))
            made, said, agreed = made + found, [*said, opinions], agreed + same
        if not made:
            raise DataError(
                f"of {sum(counts.values())} pairs none is left: {dict(counts)}\n  lower margin, or look at the judge and the answers"
            )
        whole = Opinions.join(said).metrics() | ({"agreement": sum(agreed) / len(agreed)} if agreed else {})
        atomic_write(directory / "pairs.jsonl", "".join(json.dumps(asdict(pair), ensure_ascii=False) + "\n" for pair in made))
        record = {
            "judge": judge.record, "orders": config.orders, "combine": config.combine if config.orders == "both" else None, "margin": config.margin,
            "hard": config.hard, "seed": config.seed, **answers.record, "pairs": len(made), "counts": dict(counts), **whole,
        }  # fmt: skip
        atomic_write(directory / "provenance.json", json.dumps(record, indent=2, ensure_ascii=False, default=str) + "\n")
        run.journal.note(f"pairs      {len(made)} labelled: {directory / 'pairs.jsonl'}")
        return run.finish({}, {"pairs": float(len(made)), **whole}, at=answers.batches)


def placed(config: Config, pairs: list[Pair], step: int) -> list[Pair]:
    """The pairs as they are asked: where each is asked in one order only, that order is drawn by the seed, since data often put the better answer first."""
    if config.orders == "both":
        return pairs
    rng = random.Random(f"{config.seed} {step}")
    return [pair.turned if rng.random() < 0.5 else pair for pair in pairs]


def ask(config: Config, judge: Opened, pairs: Sequence[Pair]) -> Opinions:
    """What the judge says of these pairs."""
    prompts, first, second = ([pair.texts[i] for pair in pairs] for i in range(3))
    return compare(judge.compare, prompts, first, second, orders=config.orders, combine=config.combine)


def labelled(
    config: Config, pairs: Sequence[Pair], opinions: Opinions, judge: str, source: str | None, counts: Counter[str]
) -> Iterator[Labelled]:  # fmt: skip
    """The pairs with their labels, the likelier answer as the chosen one (of a tie the first); what is left out is counted by its reason."""
    columns = (opinions.probability, opinions.first, opinions.swapped)
    for pair, chance, first, swapped in zip(pairs, *(column.tolist() for column in columns), strict=True):
        if chance != chance:
            counts["not judged"] += 1
        elif abs(chance - 0.5) < config.margin:
            counts["within the margin"] += 1
        elif config.hard and chance == 0.5:
            counts["ties"] += 1
        else:
            counts["labelled"] += 1
            if chance < 0.5:
                pair, chance, first, swapped = pair.turned, 1 - chance, swapped, first
            given, against = (None if x != x else x for x in (first, swapped))
            label = 1.0 if config.hard else chance
            yield Labelled(pair.prompt, pair.one, pair.other, label, given, against, pair.numbers[0], pair.numbers[1], judge, source)


def agreement(pairs: Sequence[Pair], opinions: Opinions) -> list[float]:
    """Of each pair that was judged whether the judge prefers what the data put first, a tie half."""
    chances = zip(pairs, opinions.probability.tolist(), strict=True)
    return [0.5 if p == 0.5 else float((p > 0.5) == (pair.numbers[0] < pair.numbers[1])) for pair, p in chances if p == p]


def asked_how(config: Config) -> str:
    """`in both orders, log_odds`: how each pair is asked, and what becomes of the answers."""
    how = f"in both orders, combined by {config.combine}" if config.orders == "both" else "in one order each"
    return how + (", hard labels" if config.hard else ", soft labels") + (f", margin {config.margin:g}" if config.margin else "")


# --- what is judged ---------------------------------------------------------------------------------------------------


def opened_answers(config: Config) -> Answers:
    """The pairs of the data, or a model that answers its prompts."""
    return _given(config) if config.model is None else _sampled(config, config.model)


def _given(config: Config) -> Answers:
    rows = opening.rows(config.data, "preference")
    every = [
        Pair(row["prompt"], one, other, (i, j))
        for row in (*rows.train, *rows.held_out)
        for (i, one), (j, other) in combinations(enumerate(row.get(RANKED) or (row["chosen"], row["rejected"])), 2)
    ]
    different = [pair for pair in every if pair.differs]
    if not different:
        raise DataError(f"{config.data.source}: the two answers of every row are the same, so there is nothing to judge")

    def draw(step: int) -> list[Pair]:
        return every[step * config.prompts : (step + 1) * config.prompts]

    return Answers(
        -(-len(every) // config.prompts),
        draw,
        lambda: different[:1],
        [*rows.notes, f"           {len(different)} pairs to judge"],
        {"data": config.data.source},
    )


def _sampled(config: Config, model: str) -> Answers:
    device = opening.settle(config)
    rows = opening.rows(config.data, "prompt")
    lm, tokenizer, name = opening.language_model(model, config.tokenizer, lambda: opening.texts(rows.train), config.seed)
    policy = opening.policy_of(lm, device)
    render = opening.renderer(tokenizer, config.data, lm, rows)
    prompts = render.prompts([*rows.train, *rows.held_out])
    sampling, mark, read = sampling_of(config.sampling, render), fingerprint(policy), reader(tokenizer)
    drawn = opening.drawing_dtype(config, config.sampling.dtype, device)
    sampler = Sampler(lm, tokenizer, sampling, seed=config.seed, slots=config.sampling.slots, dtype=drawn, cache=config.sampling.cache)
    texts_of = [prompt.columns.get(TURNS, prompt.columns["prompt"]) for prompt in prompts]

    def pairs(said: Sequence[str], asked: Sequence[Any]) -> list[Pair]:
        """Every two answers to one prompt."""
        own = [said[i * config.samples : (i + 1) * config.samples] for i in range(len(asked))]
        return [
            Pair(prompt, a, b, (i, j))
            for prompt, texts in zip(asked, own, strict=True)
            for (i, a), (j, b) in combinations(enumerate(texts), 2)
        ]

    def draw(step: int) -> list[Pair]:
        part = slice(step * config.prompts, (step + 1) * config.prompts)
        rollouts = sampler.sample(prompts[part], config.samples, step=step, stream="label")
        return pairs([text.completion for text in read(rollouts)], texts_of[part])

    def few() -> list[Pair]:
        short = replace(sampling, max_tokens=min(TOKENS, sampling.max_tokens))
        rollouts = sampler.evaluate(prompts[:1], 2, step=0, sampling=short, stream="rehearsal")
        one, other = (text.completion for text in read(rollouts))
        return [Pair(texts_of[0], one, other, (0, 1))]

    notes = [opening.headline(name, policy, device, config), *rows.notes, f"           {render.summary()}"]
    record = {
        "model": model,
        "sha256": mark,
        "samples": config.samples,
        "sampling": asdict(sampling),
        "data": config.data.source,
        "prompts": len(prompts),
    }
    return Answers(-(-len(prompts) // config.prompts), draw, few, notes, record, f"{model}@{mark[:12]}")


def plan(config: Config) -> list[str]:
    """What a run would read, hold and take, in lines; nothing is trained or written."""
    answers, judge = opened_answers(config), opened(config.judge, config)
    pairs = answers.few()
    opinions = ask(config, judge, pairs)
    judge.close()
    return planning.labels(config, judge.name, answers, judge.shown(*pairs[0].texts), float(opinions.probability[0]), asked_how(config))
