"""Reward model: a sequence classifier that scores the better answer of a pair higher (Bradley and Terry 1952; arXiv 2203.02155)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from time import perf_counter
from typing import Annotated, Any

import torch
from pydantic import Field

from tilt.config import build_piece
from tilt.data.streams import Stream
from tilt.learning.pairs import Pair, end_and_span_scores, end_scores, packed, score_pairs, update_pairs
from tilt.models.loading import padded_tokenizer
from tilt.models.policy import RewardModel
from tilt.models.saving import save
from tilt.objectives import PIECES, PREFERENCES
from tilt.optim.optimizers import Optimizer
from tilt.recipes import opening, planning
from tilt.recipes.finishing import Result, keeping, saved
from tilt.recipes.settings import Optimizer as OptimizerSettings
from tilt.recipes.settings import Training

IMPORTANT = ("loss", "accuracy", "margin", "eval/accuracy", "eval/loss", "grad_norm", "lr")


class Config(Training):
    """A reward model trained on pairs; it starts from the body of a language model."""

    epochs: Annotated[float, Field(gt=0.0, description="passes over the pairs; `steps` overrides it")] = 2.0
    steps: Annotated[int | None, Field(ge=1)] = None
    batch: Annotated[int, Field(ge=1, description="pairs an optimizer step")] = 32
    optimizer: OptimizerSettings = OptimizerSettings(lr=5e-4, schedule="linear", warmup=10, weight_decay=0.1)
    margin: Annotated[float, Field(ge=0.0, description="by how much the better answer should win (arXiv 2307.09288)")] = 0.0
    centring: Annotated[float, Field(ge=0.0, description="coefficient of (chosen + rejected)^2 (arXiv 2312.09244)")] = 0.0
    span: Annotated[
        float,
        Field(ge=0.0, le=1.0, description="share of the loss on the mean of the scores along the answer, instead of the score at its end"),
    ] = 0.0
    eval_every: Annotated[int, Field(ge=0, description="steps between evaluations; 0 = before and after only")] = 0
    normalise: Annotated[bool, Field(description="scale the score layer so that the scores of training answers have deviation 1")] = False


def run(config: Config) -> Result:
    """Train on pairs, evaluate on held-out ones, and save as a sequence classifier."""
    device = opening.settle(config)
    rows = opening.rows(config.data, "preference")
    lm, tokenizer, name = opening.language_model(config.model, config.tokenizer, lambda: opening.texts(rows.train), config.seed)
    render = opening.renderer(tokenizer, config.data, lm, rows)
    train, held = render.pairs(rows.train), render.pairs(rows.held_out) if rows.held_out else []
    words = padded_tokenizer(tokenizer)
    model = RewardModel.from_policy(opening.policy_of(lm, device), padding=words.pad_token_id, seed=config.seed)
    if config.lora is not None:
        opening.adapted(model.model, config.lora)
    steps = config.steps or max(1, round(config.epochs * len(train) / config.batch))
    margin = build_piece({"score": {"offset": config.margin}}, PIECES["margin"], where="margin")
    calm = build_piece(
        {"centring": {"coefficient": config.centring}} if config.centring else {"none": {}}, PIECES["regulariser"], where="centring"
    )
    preference = replace(PREFERENCES["reward_model"], margin=margin, regulariser=calm)
    score = end_and_span_scores(model) if config.span else end_scores(model)
    views = (1 - config.span, config.span) if config.span else (1.0,)
    optimizer, stream = Optimizer(model, config.optimizer.settings(), steps), Stream(train, config.seed)
    directory, journal = opening.directory(config, "reward_model", name, steps, IMPORTANT, label="rm")
    with journal:
        journal.header(
            [
                f"run        {directory.path}",
                opening.headline(name, model, device, config),
                *rows.notes,
                f"           {render.summary()}",
                f"steps      {steps} of {min(config.batch, len(train))} pairs",
            ]
        )
        first: dict[str, float] = {}
        for step in range(steps + 1):
            found = measure(model, held, config.micro_tokens, device) if held and opening.due(step, steps, config.eval_every) else {}
            first = found if step == 0 else first
            named = {f"eval/{k}": v for k, v in found.items()}
            if step == steps:
                journal.step(step, named)
                break
            began, pairs = perf_counter(), stream.draw(step, min(config.batch, len(train)))
            with keeping(directory, step):
                report = update_pairs(
                    score, optimizer, preference, pairs, None, views=views, micro_tokens=config.micro_tokens, device=device,
                    autocast=opening.precision(config, device),
                )  # fmt: skip
            journal.step(step, report | {"tokens_per_second": len(packed(pairs).tokens) / (perf_counter() - began)} | named)
        if config.normalise:
            journal.note(normalise(model, train, config.micro_tokens, device))
        checkpoint = saved(directory, steps, partial(save, model.model, words), config.save)
    return Result(directory, checkpoint, first, found)


def measure(model: RewardModel, pairs: Sequence[Pair], micro_tokens: int, device: torch.device) -> dict[str, float]:
    """Accuracy (ties count half), mean loss, and mean margin on pairs that were not trained on, with the share on which the longer answer is the better."""
    chosen, rejected = score_pairs(end_scores(model), pairs, micro_tokens, device)
    gap = chosen - rejected
    return {
        "accuracy": float((gap > 0).float().mean() + 0.5 * (gap == 0).float().mean()),
        "loss": float(torch.nn.functional.softplus(-gap).mean()),
        "margin": float(gap.mean()),
        "score_std": float(torch.cat([chosen, rejected]).std()),
        "longer_is_better": sum(len(c.tokens) > len(r.tokens) for c, r in pairs) / len(pairs),
    }


def normalise(model: RewardModel, pairs: Sequence[Pair], micro_tokens: int, device: torch.device) -> str:
    """Scale the score layer so that the scores of the training answers have deviation 1; their mean stays a free constant of the Bradley-Terry model."""
    scores: Any = torch.cat(score_pairs(end_scores(model), pairs, micro_tokens, device))
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
