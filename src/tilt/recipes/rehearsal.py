"""A rehearsal before the run directory is made: the reward is asked once about short answers, so that its mistakes cost nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from tilt.data.rollouts import Prompt
from tilt.recipes.scoring import Scoring
from tilt.rewards.score import earned_by
from tilt.sampling.sampler import Sampler

TOKENS = 4


def rehearse(judged: Scoring, sampler: Sampler, prompts: Sequence[Prompt]) -> list[float | None]:
    """What two answers of a few tokens to each of the first two prompts earn; on randomness of its own, so that no later answer changes."""
    short = replace(sampler.sampling, max_tokens=min(TOKENS, sampler.sampling.max_tokens))
    rollouts = sampler.evaluate(list(prompts)[:2], 2, step=0, sampling=short, stream="rehearsal")
    rewards = judged(rollouts)
    return [total if seen else None for total, seen in zip(earned_by(rollouts, rewards).tolist(), rewards.scored.tolist(), strict=True)]
