"""Direct preference optimisation: the policy is its own reward model (arXiv 2305.18290)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from time import perf_counter
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from tilt.config import build_piece
from tilt.data.streams import Stream
from tilt.learning.pairs import Pair, likelihoods, packed, score_pairs, update_pairs
from tilt.models import compat
from tilt.models.policy import Policy
from tilt.models.saving import save
from tilt.objectives import PIECES, PREFERENCES, Answers, Pairs, Preference
from tilt.optim.optimizers import Optimizer
from tilt.recipes import opening, planning
from tilt.recipes.finishing import Result, keeping, saved
from tilt.recipes.settings import Optimizer as OptimizerSettings
from tilt.recipes.settings import Training

Precision = Callable[[], AbstractContextManager[object]]
IMPORTANT = ("loss", "accuracy", "margin", "eval/accuracy", "eval/margin", "grad_norm", "lr")


class Config(Training):
    """Direct preference optimisation on pairs; the reference is the policy as it starts."""

    beta: Annotated[float, Field(gt=0.0, description="strength of the tie to the reference")] = 0.1
    label_smoothing: Annotated[
        float, Field(ge=0.0, lt=0.5, description="share of pairs taken to be labelled the wrong way round (cDPO)")
    ] = 0.0
    epochs: Annotated[float, Field(gt=0.0, description="passes over the pairs; `steps` overrides it")] = 1.0
    steps: Annotated[int | None, Field(ge=1)] = None
    batch: Annotated[int, Field(ge=1, description="pairs an optimizer step")] = 32
    optimizer: OptimizerSettings = OptimizerSettings(lr=1e-4, schedule="linear", warmup=10)
    reference: Annotated[str | None, Field(description="another reference; without it the policy as it starts")] = None
    eval_every: Annotated[int, Field(ge=0, description="steps between evaluations; 0 = before and after only")] = 0


def run(config: Config) -> Result:
    """Score the reference once, train, evaluate on held-out pairs, and save."""
    device = opening.settle(config)
    rows = opening.rows(config.data, "preference")
    lm, tokenizer, name = opening.language_model(config.model, config.tokenizer, lambda: opening.texts(rows.train), config.seed)
    policy = opening.policy_of(opening.adapted(lm, config.lora), device)
    render = opening.renderer(tokenizer, config.data, lm, rows)
    train, held = render.pairs(rows.train), render.pairs(rows.held_out) if rows.held_out else []
    steps = config.steps or max(1, round(config.epochs * len(train) / config.batch))
    preference = replace(
        PREFERENCES["dpo"],
        margin=build_piece({"implicit_reward": {"beta": config.beta}}, PIECES["margin"], where="beta"),
        link=build_piece({"logistic": {"smoothing": config.label_smoothing}}, PIECES["link"], where="label_smoothing"),
    )
    precision = opening.precision(config, device)
    other = None if config.reference is None else opening.other_model(config.reference, tokenizer, device, "reference")
    anchors, held_anchors = (_anchor(config, policy, other, pairs, precision) if pairs else None for pairs in (train, held))
    numbered = Stream(list(range(len(train))), config.seed)
    optimizer = Optimizer(policy, config.optimizer.settings(), steps)
    directory, journal = opening.directory(config, "dpo", name, steps, IMPORTANT)
    with journal:
        journal.header(
            [
                f"run        {directory.path}",
                opening.headline(name, policy, device, config),
                *rows.notes,
                f"           {render.summary()}",
                f"algorithm  dpo: {preference!r}",
                f"steps      {steps} of {min(config.batch, len(train))} pairs",
            ]
        )
        first: dict[str, float] = {}
        for step in range(steps + 1):
            found = (
                measure(policy, preference, held, held_anchors, config.micro_tokens, precision)
                if held_anchors and opening.due(step, steps, config.eval_every)
                else {}
            )
            first = found if step == 0 else first
            named = {f"eval/{k}": v for k, v in found.items()}
            if step == steps:
                journal.step(step, named)
                break
            began, chosen = perf_counter(), numbered.draw(step, min(config.batch, len(train)))
            pairs, index = [train[i] for i in chosen], torch.tensor(chosen)
            assert anchors is not None
            with keeping(directory, step):
                report = update_pairs(
                    likelihoods(policy), optimizer, preference, pairs, (anchors[0][index], anchors[1][index]),
                    micro_tokens=config.micro_tokens, device=device, autocast=precision,
                )  # fmt: skip
            journal.step(step, report | {"tokens_per_second": len(packed(pairs).tokens) / (perf_counter() - began)} | named)
        checkpoint = saved(directory, steps, partial(save, policy.lm, tokenizer), config.save)
    return Result(directory, checkpoint, first, found)


def _anchor(config: Config, policy: Policy, other: Policy | None, pairs: Sequence[Pair], precision: Precision) -> tuple[Tensor, Tensor]:
    """Log-probabilities under the reference: another model, or the policy before its first step. They never change, so they are computed once."""
    return score_pairs(likelihoods(other or policy), pairs, config.micro_tokens, compat.device_of(policy), precision)


def measure(
    policy: Policy, preference: Preference, pairs: Sequence[Pair], anchors: tuple[Tensor, Tensor], micro_tokens: int, precision: Precision
) -> dict[str, float]:
    """Accuracy of the implicit reward, its margin and the loss on pairs that were not trained on."""
    chosen, rejected = score_pairs(likelihoods(policy), pairs, micro_tokens, compat.device_of(policy), precision)
    found = preference.metrics(Pairs.of(Answers.of(chosen, reference=anchors[0]), Answers.of(rejected, reference=anchors[1])))
    return {name.rpartition("/")[2]: float(value / weight) for name, (value, weight) in found.items()}


def plan(config: Config) -> list[str]:
    """What a run would read, hold and take, in lines; nothing is trained or written."""
    return planning.compared_pairs(config)
