"""Pretraining: predict every token of plain texts, each text attending to itself alone."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Annotated, Any, Literal

from pydantic import Field

from tilt.data.rendering import Renderer
from tilt.data.rollouts import Prompt, Rollout
from tilt.errors import DataError
from tilt.learning.evaluation import likelihood
from tilt.learning.learner import Learner, Passes
from tilt.objectives import ALGORITHMS
from tilt.optim.optimizers import Optimizer
from tilt.recipes import opening, planning
from tilt.recipes.finishing import Result
from tilt.recipes.imitation import imitate
from tilt.recipes.session import session
from tilt.recipes.settings import Optimizer as OptimizerSettings
from tilt.recipes.settings import Training
from tilt.recipes.taking_up import NEW, Start, finished

IMPORTANT = ("loss", "eval/nll", "grad_norm", "lr", "tokens_per_second")


class Config(Training):
    """Next-token prediction on every token of the texts."""

    read_as: Annotated[
        Literal["text", "sft", "preference"],
        Field(description="what a row holds: a text, a prompt with its answer, or a prompt with two (each a text)"),
    ] = "text"
    length: Annotated[int, Field(ge=2, description="longest piece of a text, in tokens")] = 256
    epochs: Annotated[float, Field(gt=0.0, description="passes over the pieces; `steps` overrides it")] = 3.0
    steps: Annotated[int | None, Field(ge=1)] = None
    batch: Annotated[int, Field(ge=1, description="pieces an optimizer step")] = 32
    optimizer: OptimizerSettings = OptimizerSettings(lr=2e-3, schedule="cosine", warmup=20, weight_decay=0.1)
    eval_every: Annotated[int, Field(ge=0, description="steps between evaluations; 0 = before and after only")] = 0


def run(config: Config, start: Start = NEW) -> Result:
    """Train on every token, evaluate before and after on held-out texts, and save."""
    if (done := finished(config, "pretrain", start)) is not None:
        return done
    device = opening.settle(config)
    rows = opening.rows(config.data, config.read_as)
    lm, tokenizer, name = opening.language_model(config.model, config.tokenizer, lambda: opening.texts(rows.train), config.seed)
    policy = opening.policy_of(opening.adapted(lm, config.lora), device)
    render = opening.renderer(tokenizer, config.data, lm, rows)
    train, held = (pieces(render, part, config.read_as, config.length) for part in (rows.train, rows.held_out))
    if not train:
        raise DataError(f"{config.data.source}: no text has two tokens, so there is nothing to predict")
    steps = config.steps or max(1, round(config.epochs * len(train) / config.batch))
    learner = Learner(
        policy,
        Optimizer(policy, config.optimizer.settings(), steps),
        settings=Passes(micro_tokens=config.micro_tokens, halve=config.halve_micro),
        autocast=opening.precision(config, device),
    )
    with session(config, "pretrain", name, steps, IMPORTANT, start=start) as run:
        run.state.publish(policy.lm, tokenizer)
        run.journal.header(
            [
                f"run        {run.directory.path}",
                opening.headline(name, policy, device, config),
                *rows.notes,
                f"           {len(train)} pieces to train on, {len(held)} held out",
                f"steps      {steps} of {min(config.batch, len(train))} pieces of at most {config.length} tokens",
            ]
        )
        measure = partial(likelihood, policy, held, config.micro_tokens, autocast=learner.autocast) if held else dict
        before, after, step = imitate(
            learner,
            ALGORITHMS["sft"],
            train,
            run,
            measure,
            steps=steps,
            batch=min(config.batch, len(train)),
            seed=config.seed,
            every=config.eval_every,
        )
        return run.finish(before, after, at=step)


def pieces(render: Renderer, rows: Sequence[dict[str, Any]], read_as: str, length: int) -> list[Rollout]:
    """Texts in pieces of at most `length` tokens, each a root of its own, every token trained that has one before it."""
    found = (token for token in _documents(render, rows, read_as))
    cut = (tokens[i : i + length] for tokens in found for i in range(0, len(tokens), length))
    return [
        Rollout.demonstration(Prompt((), number), tuple(tokens), (False,) + (True,) * (len(tokens) - 1))
        for number, tokens in enumerate(cut)
        if len(tokens) > 1
    ]


def _documents(render: Renderer, rows: Sequence[dict[str, Any]], read_as: str) -> Iterable[Sequence[int]]:
    if read_as == "text":
        yield from ((*render.text(str(row["text"])), render.tokenizer.eos_token_id) for row in rows)
    elif rows:
        answers = (a for pair in render.pairs(rows) for a in pair) if read_as == "preference" else render.demonstrations(rows)
        yield from (a.prompt.tokens + a.tokens for a in answers)


def plan(config: Config) -> list[str]:
    """What a run would read, hold and take, in lines; nothing is trained or written."""
    return planning.texts(config, pieces)
