"""Process reward model: a sequence classifier read at the end of every step, the chance that the step is right (arXiv 2305.20050)."""

from __future__ import annotations

from functools import partial
from typing import Annotated

from pydantic import Field, model_validator

from tilt.data.steps import SEPARATOR, check_separator, stepwise
from tilt.data.streams import Stream
from tilt.learning.steps import measure_steps, update_steps
from tilt.models.loading import padded_tokenizer, write_separator
from tilt.models.policy import RewardModel
from tilt.optim.optimizers import Optimizer
from tilt.recipes import opening, planning, state
from tilt.recipes.finishing import Result
from tilt.recipes.session import session
from tilt.recipes.settings import Optimizer as OptimizerSettings
from tilt.recipes.settings import Training
from tilt.recipes.supervised import supervised
from tilt.recipes.taking_up import NEW, Start, finished

IMPORTANT = ("loss", "accuracy", "eval/first_wrong", "eval/accuracy", "eval/loss", "grad_norm", "lr")


class Config(Training):
    """A process reward model trained on answers whose steps are labelled; it starts from the body of a language model."""

    separator: Annotated[str, Field(min_length=1, description="what stands between two steps; it is saved with the model")] = SEPARATOR
    epochs: Annotated[float, Field(gt=0.0, description="passes over the answers; `steps` overrides it")] = 2.0
    steps: Annotated[int | None, Field(ge=1, description="optimizer steps")] = None
    batch: Annotated[int, Field(ge=1, description="answers an optimizer step")] = 32
    optimizer: OptimizerSettings = OptimizerSettings(lr=5e-4, schedule="linear", warmup=10, weight_decay=0.1)
    eval_every: Annotated[int, Field(ge=0, description="steps between evaluations; 0 = before and after only")] = 0

    @model_validator(mode="after")
    def _possible(self) -> Config:
        if self.data.train_on != "completion":
            raise ValueError(f"data.train_on {self.data.train_on}: without effect, the loss is on the ends of steps; leave it out")
        return self


def run(config: Config, start: Start = NEW) -> Result:
    """Train on labelled steps, evaluate on held-out answers, and save as a sequence classifier."""
    if (done := finished(config, "process_reward", start)) is not None:
        return done
    device = opening.settle(config)
    rows = opening.rows(config.data, "stepwise")
    lm, tokenizer, name = opening.language_model(config.model, config.tokenizer, lambda: opening.texts(rows.train), config.seed)
    render = opening.renderer(tokenizer, config.data, lm, rows)
    check_separator(config.separator, tokenizer)
    read = partial(stepwise, render, config.separator)
    train, held = render.each(read, rows.train), render.each(read, rows.held_out) if rows.held_out else []
    words = padded_tokenizer(tokenizer)
    model = RewardModel.from_policy(opening.policy_of(lm, device), padding=words.pad_token_id, seed=config.seed)
    write_separator(model, config.separator)
    if config.lora is not None:
        opening.adapted(model.model, config.lora)
    batch = min(config.batch, len(train))
    steps = config.steps or max(1, round(config.epochs * len(train) / config.batch))
    optimizer, stream, precision = (
        Optimizer(model, config.optimizer.settings(), steps),
        Stream(train, config.seed),
        opening.precision(config, device),
    )

    def learn(step: int) -> tuple[dict[str, float], int]:
        answers = stream.draw(step, batch)
        report = update_steps(model, optimizer, answers, micro_tokens=config.micro_tokens, device=device, autocast=precision)
        return report, sum(len(a.rollout.prompt.tokens) + len(a.rollout.tokens) for a in answers)

    with session(config, "process_reward", name, steps, IMPORTANT, label="prm", start=start) as run:
        run.state.given["data"] = state.digest(train)
        run.state.publish(model.model, words)
        run.state.add(model=state.weights(model.model), optimizer=state.optimizing(optimizer))
        run.journal.header(
            [
                f"run        {run.directory.path}",
                opening.headline(name, model, device, config),
                *rows.notes,
                f"           {render.summary()}; steps end at {config.separator!r} and at the end of the answer",
                f"steps      {steps} of {batch} answers",
            ]
        )
        before, after, step = supervised(
            run, steps, config.eval_every, lambda: measure_steps(model, held, config.micro_tokens, device, precision) if held else {}, learn
        )
        return run.finish(before, after, at=step)


def plan(config: Config) -> list[str]:
    """What a run would read, hold and take, in lines; nothing is trained or written."""
    return planning.labelled_steps(config)
