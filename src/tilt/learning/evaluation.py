"""Measures on held-out data: likelihood of given answers, accuracy on pairs, and what sampled answers earn."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tilt.data.packing import pack
from tilt.data.rollouts import Prompt, Rollout, Sampling
from tilt.distributions import score_actions
from tilt.models.policy import Policy
from tilt.objectives import Rewards
from tilt.rewards.score import earned_by
from tilt.rewards.text import Text
from tilt.sampling.sampler import Sampler


def likelihood(
    policy: Policy, rollouts: Sequence[Rollout], micro_tokens: int, stop_ids: Sequence[int] = (),
    autocast: Callable[[], AbstractContextManager[object]] = nullcontext,
) -> dict[str, float]:  # fmt: skip
    """Mean negative log-likelihood of the trained tokens (nats a token) and its perplexity; of the answers that end with a stop token, `ends` is
    the share after which the policy finds some stop token the likeliest."""
    batch = pack(rollouts)
    device = next(policy.parameters()).device
    total = torch.zeros((), dtype=torch.float64)
    stops = torch.tensor(list(stop_ids), dtype=torch.long)
    ended = torch.isin(batch.actions[batch.layout.last], stops)
    right = 0
    with torch.no_grad(), autocast():
        for part in batch.split(micro_tokens):
            small = batch.take(part).to(device)
            chosen = policy.before_actions(small)
            logprobs = score_actions(chosen, policy.head, small.actions, temperature=1.0, entropy=False, chunk=policy.chunk).logprobs
            total -= logprobs.double().sum().cpu()
            if len(stops):
                likeliest = policy.head(chosen[small.layout.last]).argmax(-1).cpu()
                right += int((torch.isin(likeliest, stops) & ended[part]).sum())
    nll = float(total) / batch.layout.actions
    found = {"nll": nll, "perplexity": math.exp(min(nll, 50.0))}
    return found | ({"ends": right / int(ended.sum())} if ended.any() else {})


@dataclass(frozen=True)
class Assessment:
    """What the policy's answers to held-out prompts earn, with the answers themselves."""

    rollouts: list[Rollout]
    texts: list[Text]
    rewards: Rewards
    measured: Mapping[str, Tensor] = field(default_factory=dict)
    kl: float = float("nan")
    more: Mapping[str, float] = field(default_factory=dict)

    @property
    def metrics(self) -> dict[str, float]:
        """Mean reward with its standard error over prompts, each part's mean, what was only measured, sequence KL to the reference, length, truncation, distinct-2, and `more`."""
        total = earned_by(self.rollouts, self.rewards)[self.rewards.scored]
        lengths = [sum(r.sampled) for r in self.rollouts]
        found = {
            "reward": float(total.mean()) if len(total) else float("nan"),
            "reward_std": float(total.std()) if len(total) > 1 else 0.0,
            "reward_se": standard_error(self.rollouts, self.rewards),
            "length": sum(lengths) / len(lengths),
            "truncated": sum(r.stop == "length" for r in self.rollouts) / len(self.rollouts),
            "distinct_2": sum(distinct(texts, 2) for texts in self.rounds) / len(self.rounds),
        }
        for kind, values in (("reward", self.rewards.parts), ("measure", self.measured)):
            for name, value in values.items():
                kept = value[~value.isnan()]
                if len(kept):
                    found |= {f"{kind}/{name}": float(kept.mean()), f"{kind}/{name}_std": float(kept.std()) if len(kept) > 1 else 0.0}
        return found | ({} if math.isnan(self.kl) else {"kl": self.kl}) | dict(self.more)

    @property
    def rounds(self) -> list[list[str]]:
        """The first answers to all prompts, the second ones, …: distinct n-grams of texts together fall with the number of texts, those of a round do not."""
        seen: Counter[int] = Counter()
        found: dict[int, list[str]] = {}
        for rollout, text in zip(self.rollouts, self.texts, strict=True):
            found.setdefault(seen[rollout.prompt.id], []).append(text.completion)
            seen[rollout.prompt.id] += 1
        return list(found.values())


def assess(
    sampler: Sampler, prompts: Sequence[Prompt], score: Callable[[Sequence[Rollout]], Rewards], read: Callable[[Sequence[Rollout]], list[Text]],
    *, samples: int, sampling: Sampling, step: int = 0,
) -> Assessment:  # fmt: skip
    """Answer each prompt `samples` times on the evaluation stream of randomness, and score the answers."""
    rollouts = sampler.evaluate(prompts, samples, sampling=sampling, step=step)
    return Assessment(rollouts, read(rollouts), score(rollouts))


def standard_error(rollouts: Sequence[Rollout], rewards: Rewards) -> float:
    """Standard error of the mean reward, prompts taken as the independent units."""
    by_prompt: dict[int, list[float]] = {}
    for rollout, total, scored in zip(rollouts, earned_by(rollouts, rewards).tolist(), rewards.scored.tolist(), strict=True):
        if scored:
            by_prompt.setdefault(rollout.prompt.id, []).append(total)
    means = torch.tensor([sum(v) / len(v) for v in by_prompt.values()], dtype=torch.float64)
    return float(means.std() / len(means) ** 0.5) if len(means) > 1 else 0.0


def distinct(texts: Sequence[str], n: int) -> float:
    """Distinct word n-grams over all word n-grams of the texts together (arXiv 1510.03055)."""
    grams = [tuple(words[i : i + n]) for words in (t.split() for t in texts) for i in range(len(words) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 0.0
