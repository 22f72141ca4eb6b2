"""The sampler: prompts in, rollouts out, under named and counted randomness."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from tilt.data.rollouts import Prompt, Rollout, Sampling
from tilt.errors import UsageError
from tilt.models import compat
from tilt.models.adapters import plain_copy
from tilt.sampling.engine import Answer, Mask, Request, generate
from tilt.sampling.randomness import keys
from tilt.sampling.stopping import Stops


class Sampler:
    """Samples answers from a model in this process, in the weights' dtype unless told another, with at most `cache` bytes of keys and values. `version` counts the weights published to it."""

    def __init__(
        self,
        lm: PreTrainedModel,
        tokenizer: Any,
        sampling: Sampling,
        *,
        seed: int = 0,
        slots: int = 256,
        dtype: torch.dtype | None = None,
        cache: int | None = None,
    ) -> None:
        check(sampling, vocabulary_of(lm), training=True)
        if slots < 1:
            raise UsageError(f"slots is {slots}: the engine needs at least one row.")
        self.tokenizer, self.sampling, self.seed, self.slots, self.cache, self.version = tokenizer, sampling, seed, slots, cache, 0
        self.dtype = compat.dtype_of(lm) if dtype is None else dtype
        self.lm = self._published(lm)
        self.masking: Mask | None = None

    def mask(self, top_p: float) -> None:
        """Copy the published policy: until the next call, training answers are drawn inside the top-p sets of this copy (NLPO, 2210.01241)."""
        if not 0 < top_p < 1:
            raise UsageError(f"mask: top_p is {top_p}: it must be above 0 and below 1.")
        self.masking = None  # its memory first
        self.masking = Mask(plain_copy(self.lm).requires_grad_(False), top_p)

    def sample(
        self,
        prompts: Sequence[Prompt],
        samples: int,
        *,
        step: int,
        stream: str = "train",
        finished: Callable[[list[Rollout]], None] | None = None,
    ) -> list[Rollout]:
        """`samples` answers to each prompt, prompt by prompt, under the training settings and inside the mask where there is one.

        `finished` gets the answers to each prompt, in the order of the prompts, as soon as they and all before them have ended.
        """
        return self._rollouts(prompts, samples, self.sampling, step, stream, self.masking, finished)

    def evaluate(
        self, prompts: Sequence[Prompt], samples: int, *, step: int, sampling: Sampling | None = None, stream: str = "eval"
    ) -> list[Rollout]:
        """The same on randomness of its own and under any settings, greedy and truncated ones included, and without the mask; training is not disturbed."""
        settings = self.sampling if sampling is None else sampling
        check(settings, vocabulary_of(self.lm), training=False)
        return self._rollouts(prompts, samples, settings, step, stream)

    def load(self, policy: nn.Module) -> None:
        """Publish the policy's weights. In its own dtype the policy itself is sampled from, and nothing is copied; in another, they are cast once, adapters merged."""
        self.lm = self._published(getattr(policy, "lm", policy))  # type: ignore[arg-type]
        self.version += 1

    def _published(self, lm: PreTrainedModel) -> PreTrainedModel:
        """The model to sample from. Only parameters are cast: angles and other buffers keep their precision."""
        if compat.dtype_of(lm) == self.dtype:
            return lm
        twin = plain_copy(lm)
        for parameter in twin.parameters():
            parameter.data = parameter.data.to(self.dtype)
        return twin.requires_grad_(False)

    def _rollouts(
        self,
        prompts: Sequence[Prompt],
        samples: int,
        sampling: Sampling,
        step: int,
        stream: str,
        mask: Mask | None = None,
        finished: Callable[[list[Rollout]], None] | None = None,
    ) -> list[Rollout]:
        if samples < 1 or not prompts:
            return []
        context = compat.context_of(self.lm)
        refuse_long(prompts, context)
        ids = [prompt.id for prompt in prompts for _ in range(samples)]
        key = keys(self.seed, stream, step, ids, list(range(samples)) * len(prompts)).reshape(len(prompts), samples)
        requests = [
            Request(np.array(prompt.tokens, dtype=np.int64), key[i], min(sampling.max_tokens, context - len(prompt.tokens)))
            for i, prompt in enumerate(prompts)
        ]
        stops = Stops(vocabulary_of(self.lm), sampling.stop_ids, sampling.stop_strings, self._decode)

        def written(number: int, answers: Sequence[Answer]) -> list[Rollout]:
            prompt = prompts[number]
            return [
                Rollout(
                    prompt, a.tokens, (True,) * len(a.tokens), a.logprobs, a.stop, sampling, self.version, (self.seed, step, prompt.id, i), a.kept
                )
                for i, a in enumerate(answers)
            ]  # fmt: skip

        tell = None if finished is None else lambda number, answers: finished(written(number, answers))
        found = generate(self.lm, requests, sampling, stops, self.slots, mask, tell, self.cache)
        return [rollout for number, answers in enumerate(found) for rollout in written(number, answers)]

    def _decode(self, tokens: Sequence[int]) -> str:
        return str(self.tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False))


def vocabulary_of(lm: PreTrainedModel) -> int:
    """How many tokens the model scores; a tokenizer may know fewer."""
    return int(compat.head_of(lm).weight.shape[0])


def greedy(sampling: Sampling) -> Sampling:
    """The same settings with the most likely token taken each time."""
    return replace(sampling, temperature=0.0, top_k=0, top_p=1.0, min_p=0.0, keep_sets=False)


def check(sampling: Sampling, vocabulary: int, *, training: bool) -> None:
    """Refuse settings that make no distribution, and in training those whose distribution the learner cannot score."""
    wrong = []
    if not sampling.temperature >= 0 or sampling.temperature == float("inf"):
        wrong.append(f"temperature is {sampling.temperature}: it must be a number, at least 0")
    if sampling.max_tokens < 1:
        wrong.append(f"max_tokens is {sampling.max_tokens}: an answer has at least one token")
    if sampling.top_k < 0:
        wrong.append(f"top_k is {sampling.top_k}: it must be at least 1, or 0 for all tokens")
    if not 0 < sampling.top_p <= 1:
        wrong.append(f"top_p is {sampling.top_p}: it must be above 0 and at most 1")
    if not 0 <= sampling.min_p < 1:
        wrong.append(f"min_p is {sampling.min_p}: it must be at least 0 and below 1")
    if sampling.keep_sets and not sampling.narrows and not wrong:
        wrong.append("keep_sets has no sets to keep: set top_k, top_p or min_p, or leave it out")
    if sampling.keep_sets and sampling.temperature == 0:
        wrong.append("keep_sets with temperature 0: the likeliest token is not drawn from a set; leave keep_sets out")
    strange = [i for i in sampling.stop_ids if not 0 <= i < vocabulary]
    if strange:
        wrong.append(f"stop_ids has {strange[0]}, and the vocabulary ends at {vocabulary - 1}")
    if "" in sampling.stop_strings:
        wrong.append("stop_strings has an empty string, which every text contains")
    if training and sampling.temperature == 0 and not wrong:
        wrong.append(
            "temperature 0 in a training rollout: an answer that is certain cannot be weighed against others.\nUse temperature > 0 for training; be greedy in evaluation only"
        )
    elif training and sampling.narrows and not sampling.keep_sets and not wrong:
        asked = (
            f"top_k {sampling.top_k}" if sampling.top_k else f"top_p {sampling.top_p}" if sampling.top_p < 1 else f"min_p {sampling.min_p}"
        )
        wrong.append(
            f"{asked} in a training rollout: the policy would be scored under another distribution than it was sampled from.\nSet keep_sets, so that each token keeps what it was chosen among; or narrow by the temperature alone, and truncate in evaluation only"
        )
    if wrong:
        raise UsageError("sampling: " + "\nsampling: ".join(wrong) + ".")


def refuse_long(prompts: Sequence[Prompt], context: int) -> None:
    """Every prompt must have a token to start from and leave room for one token of answer."""
    empty = [p.id for p in prompts if not p.tokens]
    if empty:
        raise UsageError(
            f"{len(empty)} of {len(prompts)} prompts have no tokens (first: prompt {empty[0]}).\nStart them with a beginning-of-text token."
        )
    long = [p for p in prompts if len(p.tokens) >= context]
    if long:
        worst = max(long, key=lambda p: len(p.tokens))
        raise UsageError(
            f"{len(long)} of {len(prompts)} prompts do not fit the model's context of {context} tokens with room for an answer"
            f" (longest: prompt {worst.id}, {len(worst.tokens)} tokens).\nDrop or shorten them, or take a model with a longer context."
        )
