"""Rewards that are reward models: frozen, scored in parts of a token budget, under the tokenizer that the model was trained with."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from tilt.data.packing import pack
from tilt.data.rendering import Renderer
from tilt.data.rollouts import Rollout
from tilt.data.shapes import TURNS
from tilt.errors import NumericError
from tilt.models.policy import RewardModel
from tilt.rewards.functions import Scored
from tilt.rewards.text import Text, inert

Retokenise = Callable[[Rollout, Text], Rollout]


def own_tokens(rollout: Rollout, text: Text) -> Rollout:
    """The rollout as it was sampled: for a reward model that shares the policy's tokenizer."""
    return rollout


@dataclass(frozen=True)
class Rerendered:
    """The same prompt and answer under the reward model's own tokenizer and template; an answer that was cut off gets no stop token.

    Control tokens that an answer spells are text here: a policy cannot open turns of its own before its judge.
    """

    renderer: Renderer

    def __call__(self, rollout: Rollout, text: Text) -> Rollout:
        columns = rollout.prompt.columns
        asked = columns[TURNS] if self.renderer.chat and TURNS in columns else columns.get("prompt", text.prompt)
        row = {"prompt": asked, "completion": ""} | ({"tools": columns["tools"]} if "tools" in columns else {})
        closed = self.renderer.demonstration(row, rollout.prompt.id)
        said = self.renderer.literal(text.completion)
        tokens = (*said, *closed.tokens) if rollout.stop == "stop" else (said or closed.tokens[:1])
        return replace(Rollout.demonstration(closed.prompt, tuple(tokens)), stop=rollout.stop)


def same_tokens(one: Any, other: Any) -> bool:
    """Whether two tokenizers give every text the same tokens: the same object, or equal vocabularies, special tokens and splits of a probe.

    What either pads with does not matter: no text holds it, and a reward model whose base has no room for one is given its own.
    """
    probe = "Tilt 3.14: naïve café, 你好\n\n  def f(x):\treturn  x**2  # 1,080.00"
    padding = {t.pad_token for t in (one, other)} - {t.eos_token for t in (one, other)}
    first, second = ({word: i for word, i in t.get_vocab().items() if word not in padding} for t in (one, other))
    return one is other or (
        first == second
        and (one.eos_token_id, one.bos_token_id) == (other.eos_token_id, other.bos_token_id)
        and one.encode(probe, add_special_tokens=False) == other.encode(probe, add_special_tokens=False)
    )


def same_tokenizer(one: Any, other: Any) -> bool:
    """Whether two tokenizers also render conversations alike: the same tokens and the same chat template."""
    return same_tokens(one, other) and one.chat_template == other.chat_template


@dataclass(frozen=True)
class ModelReward:
    """The reward model's score of each rollout, at its last token; `budget` is the number of tokens in one forward."""

    name: str
    model: RewardModel
    retokenise: Retokenise = own_tokens
    budget: int = 16384

    def __post_init__(self) -> None:
        self.model.requires_grad_(False).eval()

    @torch.no_grad()
    def __call__(self, rollouts: Sequence[Rollout], texts: Sequence[Text]) -> Scored:
        if not rollouts:
            return Scored([])
        row = pack([self.retokenise(rollout, text) for rollout, text in zip(rollouts, texts, strict=True)])
        device = next(self.model.parameters()).device
        scores = torch.empty(len(rollouts))
        for part in row.split(self.budget):
            scores[part] = self.model(row.take(part).to(device)).float().cpu()
        values = scores.tolist()
        for i, value in enumerate(values):
            if not math.isfinite(value):
                raise NumericError(
                    f"the reward model {self.name} scored sample {i} as {value}: prompt {inert(texts[i].prompt)}, completion {inert(texts[i].completion)}\n"
                    "Look at its training run, or load it in float32."
                )
        return Scored(values)
