"""Prompts and rollouts: what is asked and what was answered, token by token, on the CPU and ragged."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from tilt.kept import Kept

Stop = Literal["stop", "length", "abort"]


@dataclass(frozen=True)
class Sampling:
    """Settings under which an answer is sampled. They travel with it, and it is scored under the same ones.

    Truncation keeps the `top_k` likeliest tokens, then the smallest set of those that holds `top_p` of their mass, then the tokens at least
    `min_p` times as likely as the likeliest; 0, 1 and 0 switch it off. `temperature` 0 is greedy. With `keep_sets` a rollout carries the set
    that each token was chosen among, and its log-probabilities are of the truncated, renormalised distribution: it can be scored again.
    """

    temperature: float = 1.0
    max_tokens: int = 128
    stop_ids: tuple[int, ...] = ()
    stop_strings: tuple[str, ...] = ()
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    keep_sets: bool = False

    @property
    def truncated(self) -> bool:
        """Whether the distribution sampled from is not the model's whole distribution at this temperature."""
        return self.temperature == 0 or self.narrows

    @property
    def narrows(self) -> bool:
        """Whether fewer than all tokens may be drawn."""
        return self.top_k > 0 or self.top_p < 1 or self.min_p > 0


@dataclass(frozen=True)
class Prompt:
    """What is asked: its tokens, an id that is stable over the run, and the data row's columns, which travel to rewards."""

    tokens: tuple[int, ...]
    id: int
    columns: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Rollout:
    """One answer: every token after the prompt, which of them the policy chose, how likely the sampler found them (NaN where not chosen), and why it ended.

    `seed` = (run seed, step, prompt id, sample number) keys the randomness; `version` counts the weights that sampled it. `kept` has one set for
    each token that the policy chose: what it was chosen among; None where that was the whole vocabulary throughout.
    """

    prompt: Prompt
    tokens: tuple[int, ...]
    sampled: tuple[bool, ...]
    logprobs: tuple[float, ...]
    stop: Stop
    sampling: Sampling
    version: int = 0
    seed: tuple[int, int, int, int] = (0, 0, 0, 0)
    kept: Kept | None = None

    def __post_init__(self) -> None:
        assert len(self.tokens) == len(self.sampled) == len(self.logprobs), "one flag and one log-probability per token"
        assert self.kept is None or len(self.kept) == sum(self.sampled), "one kept set per sampled token"

    @staticmethod
    def demonstration(prompt: Prompt, tokens: tuple[int, ...], trained: tuple[bool, ...] | None = None) -> Rollout:
        """A given answer instead of a sampled one: `trained` tokens (all by default) are its actions."""
        chosen = (True,) * len(tokens) if trained is None else trained
        return Rollout(prompt, tokens, chosen, (float("nan"),) * len(tokens), "stop", Sampling())
