"""Supervised fine-tuning: imitate given answers, the stop token included."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Annotated, Any, Literal

from pydantic import Field

from tilt.learning.evaluation import likelihood
from tilt.learning.learner import Learner, Passes
from tilt.models.saving import save
from tilt.objectives import ALGORITHMS, SequenceAverage
from tilt.optim.optimizers import Optimizer
from tilt.recipes import opening
from tilt.recipes.finishing import Result, saved
from tilt.recipes.imitation import imitate
from tilt.recipes.scoring import scoring
from tilt.recipes.settings import Evaluation, Sampling, Training
from tilt.recipes.settings import Optimizer as OptimizerSettings
from tilt.recipes.trying import Trial, sampling_of

IMPORTANT = ("loss", "eval/nll", "eval/reward", "grad_norm", "lr", "tokens_per_second")


class Config(Training):
    """Supervised fine-tuning on prompts with completions, conversations, or the chosen answers of pairs."""

    epochs: Annotated[float, Field(gt=0.0, description="passes over the rows; `steps` overrides it")] = 3.0
    steps: Annotated[int | None, Field(ge=1)] = None
    batch: Annotated[int, Field(ge=1, description="rows an optimizer step")] = 32
    average: Annotated[
        Literal["token", "sequence"], Field(description="mean over tokens of the batch, or over sequences of their token means")
    ] = "token"
    optimizer: OptimizerSettings = OptimizerSettings(lr=1e-3, schedule="cosine", warmup=10)
    reward: Annotated[Any, Field(description="score sampled answers to held-out prompts with this reward while training")] = None
    sampling: Sampling = Sampling()
    eval: Evaluation = Evaluation()
    stop_at: Annotated[float | None, Field(description="stop at the first evaluation whose mean reward reaches this")] = None


def run(config: Config) -> Result:
    """Train, evaluate before, during and after, and save."""
    device = opening.settle(config)
    rows = opening.rows(config.data, "sft")
    lm, tokenizer, name = opening.language_model(config.model, config.tokenizer, lambda: opening.texts(rows.train), config.seed)
    policy = opening.policy_of(opening.adapted(lm, config.lora), device)
    render = opening.renderer(tokenizer, config.data, lm, rows)
    train = render.demonstrations(rows.train)
    steps = config.steps or max(1, round(config.epochs * len(train) / config.batch))
    row = ALGORITHMS["sft"] if config.average == "token" else replace(ALGORITHMS["sft"], average=SequenceAverage())
    learner = Learner(
        policy,
        Optimizer(policy, config.optimizer.settings(), steps),
        settings=Passes(micro_tokens=config.micro_tokens),
        autocast=opening.precision(config, device),
    )
    measure = _measure(config, policy, tokenizer, render, rows.held_out)
    directory, journal = opening.directory(config, "sft", name, steps, IMPORTANT)
    with journal:
        journal.header(
            [
                f"run        {directory.path}",
                opening.headline(name, policy, device, config),
                *rows.notes,
                f"           {render.summary()}",
                f"steps      {steps} of {config.batch} rows",
            ]
        )
        before, after, step = imitate(
            learner, row, train, journal, measure, steps=steps, batch=min(config.batch, len(train)), seed=config.seed, every=config.eval.every,
            stop=lambda found: config.stop_at is not None and found.get("reward", float("-inf")) >= config.stop_at,
        )  # fmt: skip
        checkpoint = saved(directory, step, partial(save, policy.lm, tokenizer), config.save)
    return Result(directory, checkpoint, before, after)


def _measure(config: Config, policy: Any, tokenizer: Any, render: Any, held_out: list[dict[str, Any]]) -> Callable[[], dict[str, float]]:
    """Likelihood of the held-out answers, and what sampled answers to the same prompts earn where a reward is given."""
    if not held_out:
        return dict
    given = render.demonstrations(held_out)
    if config.reward is None:
        return lambda: likelihood(policy, given, config.micro_tokens)
    trial = Trial.of(
        policy, tokenizer, render.prompts(held_out), scoring(config.reward, tokenizer, next(policy.parameters()).device),
        sampling_of(config.sampling, render), config.eval, seed=config.seed, slots=config.sampling.slots,
    )  # fmt: skip
    return lambda: likelihood(policy, given, config.micro_tokens) | trial().metrics
