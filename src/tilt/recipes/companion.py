"""Texts to pretrain on beside reinforcement learning (`pretrain_data`): opened, cut into pieces, and some held out to be measured."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from tilt.data.streams import Stream
from tilt.errors import UsageError
from tilt.learning.evaluation import likelihood
from tilt.learning.pretraining import Pretraining
from tilt.models import compat
from tilt.models.policy import Policy
from tilt.recipes import opening
from tilt.recipes.pretrain import pieces
from tilt.recipes.rl_settings import Config
from tilt.recipes.settings import Data


@dataclass(frozen=True)
class Companion:
    """The texts' loss for the learner, what measures the held-out ones (`pretrain_nll`, `pretrain_perplexity`), and the lines that say what was read."""

    loss: Pretraining | None = None
    measure: Callable[[], Mapping[str, float]] = dict
    notes: tuple[str, ...] = ()


def companion(config: Config, policy: Policy, tokenizer: Any, device: torch.device) -> Companion:
    """What `pretrain_data` asks for; without it, nothing."""
    given = config.pretrain_data
    if given is None:
        return Companion()
    data = Data(source=given.source, columns=given.columns, held_out=given.held_out)
    rows = opening.rows(data, given.read_as)
    render = opening.renderer(tokenizer, data, policy.lm, rows)
    length = min(given.length, compat.context_of(policy.lm))
    train, held = (pieces(render, part, given.read_as, length) for part in (rows.train, rows.held_out))
    if given.batch > len(train):
        raise UsageError(
            f"pretrain_data.batch {given.batch}: {given.source} has only {len(train)} pieces to train on; set it to at most that"
        )
    loss = Pretraining(Stream(train, config.seed), given.batch, config.pretrain_coefficient)
    measure = partial(likelihood, policy, held, config.micro_tokens, autocast=opening.precision(config, device))
    notes = (
        *rows.notes,
        f"           {len(train)} pieces to pretrain on, {given.batch} an optimizer step, weight {loss.coefficient:g}; {len(held)} held out",
    )
    return Companion(loss, (lambda: {f"pretrain_{name}": value for name, value in measure().items()}) if held else dict, notes)
