"""Trying a policy on held-out prompts: sample on randomness of its own, score, count."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from tilt.data.rendering import Renderer
from tilt.data.rollouts import Prompt, Rollout, Sampling
from tilt.learning.evaluation import Assessment, assess
from tilt.models.policy import Policy
from tilt.recipes import settings
from tilt.recipes.scoring import Scoring
from tilt.sampling.sampler import Sampler


def sampling_of(given: settings.Sampling, render: Renderer) -> Sampling:
    """The training settings, with the tokens that end an answer."""
    return Sampling(
        given.temperature, given.max_tokens, render.stop_ids, given.stop_strings, given.top_k, given.top_p, given.min_p, given.keep_sets
    )


@dataclass(frozen=True)
class Trial:
    """Held-out prompts, and how they are answered and scored. Each try draws with the same randomness, so that scores differ by the policy alone."""

    sampler: Sampler
    prompts: list[Prompt]
    scoring: Scoring
    sampling: Sampling
    samples: int
    also: Scoring | None = None
    divergence: Callable[[Sequence[Rollout]], float] = lambda rollouts: float("nan")
    more: Callable[[Sequence[Rollout]], Mapping[str, float]] = lambda rollouts: {}

    @staticmethod
    def of(
        policy: Policy,
        tokenizer: Any,
        prompts: Sequence[Prompt],
        scoring: Scoring,
        sampling: Sampling,
        given: settings.Evaluation,
        *,
        seed: int,
        slots: int,
        cache: int | None = None,
    ) -> Trial:
        own = replace(sampling, temperature=given.temperature, top_k=given.top_k, top_p=given.top_p, min_p=given.min_p, keep_sets=False)
        return Trial(
            Sampler(policy.lm, tokenizer, sampling, seed=seed, slots=slots, cache=cache),
            list(prompts)[: given.prompts],
            scoring,
            own,
            given.samples,
        )

    def __call__(self) -> Assessment:
        found = assess(self.sampler, self.prompts, self.scoring, self.scoring.read, samples=self.samples, sampling=self.sampling)
        measured = {} if self.also is None else self.also(found.rollouts).parts
        return replace(found, measured=measured, kl=self.divergence(found.rollouts), more=self.more(found.rollouts))
