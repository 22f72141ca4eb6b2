"""Reward model: a sequence classifier that scores the better answer of a pair higher (Bradley and Terry 1952; arXiv 2203.02155)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import torch
from pydantic import Field, model_validator

from tilt.data.streams import Stream
from tilt.learning.judged import Judged
from tilt.learning.pairs import EndScores, Reader, SpanScores, measured, read, update_pairs
from tilt.models.loading import padded_tokenizer
from tilt.models.policy import RewardModel
from tilt.objectives import Centring, Preference
from tilt.optim.optimizers import Optimizer
from tilt.recipes import judging, opening, planning, state
from tilt.recipes.finishing import Result
from tilt.recipes.pair_record import PairRecorder, Stored
from tilt.recipes.session import session
from tilt.recipes.settings import Optimizer as OptimizerSettings
from tilt.recipes.settings import Training
from tilt.recipes.supervised import supervised
from tilt.recipes.taking_up import NEW, Start, finished
from tilt.recipes.variants import override, preset_settings

IMPORTANT = ("loss", "accuracy", "margin", "eval/accuracy", "eval/loss", "grad_norm", "lr")


class Config(Training, Stored):
    """A reward model trained on pairs, rankings or labelled answers; it starts from the body of a language model."""

    algorithm: Annotated[str, Field(description="a preference row of `tilt algorithms` that reads scores, or file.py:NAME")] = (
        "reward_model"
    )
    objective: Annotated[dict[str, Any], Field(description="slots of the row to change, such as {link: {logistic: {smoothing: 0.1}}}")] = {}
    epochs: Annotated[float, Field(gt=0.0, description="passes over the examples; `steps` overrides it")] = 2.0
    steps: Annotated[int | None, Field(ge=1)] = None
    batch: Annotated[int, Field(ge=1, description="examples an optimizer step: pairs, rankings or labelled answers")] = 32
    optimizer: OptimizerSettings = OptimizerSettings(lr=5e-4, schedule="linear", warmup=10, weight_decay=0.1)
    margin: Annotated[
        float | None, Field(ge=0.0, description="by how much the better answer should win (arXiv 2307.09288); without it the row's own")
    ] = None
    centring: Annotated[
        float | None, Field(ge=0.0, description="coefficient of (chosen + rejected)^2 (arXiv 2312.09244); without it the row's own")
    ] = None
    span: Annotated[
        float,
        Field(ge=0.0, le=1.0, description="share of the loss on the mean of the scores along the answer, instead of the score at its end"),
    ] = 0.0
    eval_every: Annotated[int, Field(ge=0, description="steps between evaluations; 0 = before and after only")] = 0
    normalise: Annotated[bool, Field(description="scale the score layer so that the scores of training answers have deviation 1")] = False

    @model_validator(mode="before")
    @classmethod
    def _preset(cls, given: Any) -> Any:
        """A parity preset brings the defaults of its library; what is given stands."""
        return preset_settings(given)

    @model_validator(mode="after")
    def _possible(self) -> Config:
        name, row = self.row()
        if self.span and "span" in row.needs:
            raise ValueError(f"span {self.span:g}: `{name}` already compares along the answer, position by position; leave span out")
        return self

    def row(self) -> tuple[str, Preference]:
        """The name and the row that the run optimises."""
        if self.centring is not None and "regulariser" in self.objective:
            raise ValueError("centring and objective.regulariser say the same thing twice: drop one")
        name, row = judging.row_of(self.algorithm, self.objective, reads="score", margin=self.margin)
        return name, row if self.centring is None else override(row, {"regulariser": Centring(self.centring)}, where="centring")


def run(config: Config, start: Start = NEW) -> Result:
    """Train on judged answers, evaluate on held-out ones, and save as a sequence classifier."""
    if (done := finished(config, "reward_model", start)) is not None:
        return done
    device = opening.settle(config)
    name, row = config.row()
    rows = opening.rows(config.data, judging.want(row))
    lm, tokenizer, base = opening.language_model(config.model, config.tokenizer, lambda: opening.texts(rows.train), config.seed)
    render = opening.renderer(tokenizer, config.data, lm, rows)
    examples = judging.Examples.of(render, rows, row)
    train, held = examples.train, examples.held
    words = padded_tokenizer(tokenizer)
    model = RewardModel.from_policy(opening.policy_of(lm, device), padding=words.pad_token_id, seed=config.seed)
    if config.lora is not None:
        opening.adapted(model.model, config.lora)
    steps = config.steps or max(1, round(config.epochs * len(train) / config.batch))
    reader, views = reading(config, row, model, words.pad_token_id)
    optimizer, stream = Optimizer(model, config.optimizer.settings(), steps), Stream(train, config.seed)
    label = "rm" if config.algorithm == "reward_model" else judging.stem(name)
    held_row, batch, autocast = state.Held(row), min(config.batch, len(train)), opening.precision(config, device)

    def learn(step: int) -> tuple[dict[str, float], int]:
        chosen = stream.draw(step, batch)
        record(step, reader, held_row.row, chosen, None, views=views, micro_tokens=config.micro_tokens, autocast=autocast)
        report, held_row.row = update_pairs(
            reader, optimizer, held_row.row, chosen, None, views=views, micro_tokens=config.micro_tokens, autocast=autocast
        )
        return report, judging.tokens_of(chosen)

    with session(config, "reward_model", base, steps, IMPORTANT, label=label, start=start) as run:
        run.state.given["data"] = state.digest(train)
        run.state.publish(model.model, words)
        run.state.add(model=state.weights(model.model), optimizer=state.optimizing(optimizer), row=held_row.part)
        record = PairRecorder.of(config, run, words, steps)
        run.journal.header(
            [
                f"run        {run.directory.path}",
                opening.headline(base, model, device, config),
                *rows.notes,
                f"           {render.summary()}",
                *examples.notes,
                f"algorithm  {name}: {row!r}",
                f"steps      {steps} of {batch} {judging.unit(train)}",
                *(f"note       {note}" for note in row.notes()),
            ]
        )
        judging.describe(run.directory, config.algorithm, name, row)
        before, after, step = supervised(
            run, steps, config.eval_every, lambda: measure(reader, held_row.row, held, config.micro_tokens) if held else {}, learn
        )
        scale = (lambda: run.journal.note(normalise(model, train, config.micro_tokens))) if config.normalise else (lambda: None)
        return run.finish(before, after, at=step, prepare=scale)


def reading(config: Config, row: Preference, model: RewardModel, padding: int) -> tuple[Reader, Sequence[float]]:
    """What the row reads of the model's scores, and the share of each view in the loss."""
    reader: Reader = SpanScores(model, padding) if "span" in row.needs else EndScores(model, along=config.span > 0)
    return reader, (1 - config.span, config.span) if config.span else (1.0,)


def measure(reader: Reader, row: Preference, examples: Sequence[Judged], micro_tokens: int) -> dict[str, float]:
    """Accuracy (ties count half), loss and margin of the scores at the end on examples that were not trained on; of pairs the share on which the longer
    answer is the better one."""
    pairs = read(reader, examples, micro_tokens)[0]
    found = {name: value for name, value in measured(row, pairs).items() if name in ("accuracy", "loss", "margin", "baseline")}
    found["score_std"] = float(torch.cat([pairs.chosen.scores, pairs.rejected.scores]).std())
    if pairs.paired:
        ends = [(len(e.answers[0].tokens), len(e.answers[-1].tokens)) for e in examples]
        found["longer_is_better"] = sum(best > worst for best, worst in ends) / len(ends)
    return found


def normalise(model: RewardModel, examples: Sequence[Judged], micro_tokens: int) -> str:
    """Scale the score layer so that the scores of the training answers have deviation 1; their mean stays a free constant of the Bradley-Terry model."""
    alone = [Judged((answer,)) for example in examples for answer in example.answers]
    scores = read(EndScores(model), alone, micro_tokens)[0].chosen.scores
    deviation = float(scores.std())
    layer = model.score_layer
    with torch.no_grad():
        layer.weight.div_(max(deviation, 1e-6))
    return (
        f"scores     divided by their deviation {deviation:.3f} on the training answers; mean {float(scores.mean()) / deviation:.2f} of it"
    )


def plan(config: Config) -> list[str]:
    """What a run would read, hold and take, in lines; nothing is trained or written."""
    return planning.scored_pairs(config)
