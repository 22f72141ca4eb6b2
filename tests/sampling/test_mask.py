"""NLPO's mask: the engine reads a second model beside the first, each with its own cache, and draws inside the second's top-p sets."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from tilt.data.packing import pack
from tilt.data.rollouts import Prompt, Rollout, Sampling
from tilt.errors import UsageError
from tilt.models import compat
from tilt.models.adapters import add_lora
from tilt.models.loading import tiny
from tilt.models.policy import Policy
from tilt.sampling.engine import Mask
from tilt.sampling.randomness import keys, uniforms
from tilt.sampling.sampler import Sampler

END, VOCABULARY, ROOM = 3, 19, 12


def build(seed: int, kind: str = "gpt2", dtype: torch.dtype = torch.float64) -> PreTrainedModel:
    """A small model whose distributions are uneven, in Tilt's attention."""
    lm = tiny(kind, vocabulary=VOCABULARY, width=16, layers=2, heads=2, context=48).to(dtype)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in lm.parameters():
            p.add_(torch.randn(p.shape, generator=generator, dtype=torch.float64).to(dtype) * 0.25)
    compat.use_attention(lm, "tilt")
    return lm.eval()


def prompts(lengths: Sequence[int] = (1, 7, 3, 12, 5)) -> list[Prompt]:
    rng = random.Random(2)
    return [Prompt(tuple(rng.randrange(VOCABULARY) for _ in range(n)), 10 + i) for i, n in enumerate(lengths)]


def sampler(lm: PreTrainedModel, mask: Mask | None, slots: int = 64, **settings: object) -> Sampler:
    made = Sampler(lm, None, Sampling(**{"max_tokens": ROOM, "stop_ids": (END,), **settings}), seed=4, slots=slots)  # type: ignore[arg-type]
    made.masking = mask
    return made


def sets_of(rollout: Rollout) -> list[list[int]]:
    assert rollout.kept is not None
    sets = [rollout.kept.ids[a:b].tolist() for a, b in pairwise(rollout.kept.offsets.tolist())]
    return [among or list(range(VOCABULARY)) for among in sets]


def nucleus(probs: Sequence[float], top_p: float) -> set[int]:
    """The smallest set of likeliest tokens that holds top_p, by sorting in Python."""
    chosen, mass = [], 0.0
    for token in sorted(range(len(probs)), key=lambda t: -probs[t]):
        if mass >= top_p:
            break
        chosen.append(token)
        mass += probs[token]
    return set(chosen)


@pytest.mark.parametrize(
    "settings", [{"temperature": 1.0}, {"temperature": 0.7}, {"temperature": 1.0, "top_k": 3, "keep_sets": True}], ids=str
)
def test_equals_reading_both_texts_whole_for_every_token(settings: dict[str, float]) -> None:
    """Float64; prompts shared by four answers; three slots, so that finished rows leave and waiting ones enter: sets, tokens and log-probabilities
    as whole forwards of both models by transformers' own attention."""
    lm, other = build(1), build(2)
    found = sampler(lm, Mask(other, 0.6), slots=3, **settings).sample(prompts(), 4, step=2)
    lengths = {len(r.tokens) for r in found}
    assert len(lengths) > 3 and len({r.tokens for r in found}) > 12
    for model in (lm, other):
        compat.use_attention(model, "eager")
    temperature, sizes = settings["temperature"], set()
    for rollout in found[::2]:
        key, text = keys(4, "train", 2, [rollout.prompt.id], [rollout.seed[3]]), list(rollout.prompt.tokens)
        for token, logprob, among in zip(rollout.tokens, rollout.logprobs, sets_of(rollout), strict=True):
            with torch.no_grad():
                probs, theirs = ((m(input_ids=torch.tensor([text])).logits[0, -1] / temperature).softmax(-1).tolist() for m in (lm, other))
            allowed = nucleus(theirs, 0.6) | {END}
            allowed = set(sorted(allowed, key=lambda t: -probs[t])[: int(settings.get("top_k", 0)) or None])
            assert set(among) == allowed and token in allowed
            u, total = float(uniforms(key, np.array([len(text)]))[0]) * sum(probs[t] for t in allowed), 0.0
            for candidate in sorted(allowed):
                total += probs[candidate]
                if total > u:
                    break
            assert candidate == token
            assert abs(logprob - np.log(probs[token] / sum(probs[t] for t in allowed))) < 1e-9
            sizes.add(len(allowed))
            text.append(token)
    assert len(sizes) > 2 or "top_k" in settings


def test_slots_company_and_caches_do_not_matter() -> None:
    """Float64: the same tokens and sets for 1, 4 and 64 slots, shuffled prompts, one prompt alone, and a mask or a policy that is read again whole."""
    lm, other, asked = build(1), build(2), prompts()
    whole = {(r.prompt.id, r.seed[3]): r for r in sampler(lm, Mask(other, 0.7)).sample(asked, 4, step=0)}

    def same(found: Sequence[Rollout]) -> None:
        for r in found:
            twin = whole[r.prompt.id, r.seed[3]]
            assert r.tokens == twin.tokens and r.kept == twin.kept

    for slots in (1, 4):
        same(sampler(lm, Mask(other, 0.7), slots=slots).sample(asked[::-1], 4, step=0))
    same(sampler(lm, Mask(other, 0.7)).sample(asked[2:3], 2, step=0))
    for read_again in (lm, other):
        compat.use_attention(read_again, "eager")
        same(sampler(lm, Mask(other, 0.7), slots=5).sample(asked, 4, step=0))
        compat.use_attention(read_again, "tilt")


@pytest.mark.parametrize("kind", ["qwen3", "gpt2", "gemma3_text"])
def test_logprobs_are_the_learners(kind: str) -> None:
    """Float32, to 1e-4, within the mask's sets; far from the log-probabilities of the whole distribution."""
    lm = build(1, kind, torch.float32)
    rollouts = sampler(lm, Mask(build(2, kind, torch.float32), 0.5), slots=6, temperature=0.8).sample(prompts(), 4, step=0)
    batch = pack(rollouts)
    with torch.no_grad():
        assert (batch.sampler - Policy(lm)(batch, temperature=0.8).logprobs).abs().max() < 1e-4
    free = pack([Rollout(r.prompt, r.tokens, r.sampled, r.logprobs, r.stop, r.sampling) for r in rollouts])
    with torch.no_grad():
        assert (batch.sampler - Policy(lm)(free, temperature=0.8).logprobs).abs().max() > 0.1


def test_the_mask_is_a_copy_until_it_is_taken_again() -> None:
    """Sets follow the weights at the last `mask`, tokens follow the policy; evaluation asks the policy without it; LoRA is copied with its adapter."""
    lm = add_lora(build(1, "qwen3"), rank=2, alpha=4.0)
    made = Sampler(lm, None, Sampling(1.0, 1, (END,)), seed=4)
    assert made.sample(prompts(), 8, step=0)[0].kept is None
    made.mask(0.6)
    before = made.sample(prompts(), 8, step=0)
    with torch.no_grad():
        for name, p in lm.named_parameters():
            if "lora_B" in name:
                p.normal_()
    made.load(Policy(lm))
    moved = made.sample(prompts(), 8, step=0)
    assert [sets_of(r) for r in moved] == [sets_of(r) for r in before] and [r.logprobs for r in moved] != [r.logprobs for r in before]
    made.mask(0.6)
    assert [sets_of(r) for r in made.sample(prompts(), 8, step=0)] != [sets_of(r) for r in before]
    assert all(r.kept is None for r in made.evaluate(prompts(), 2, step=0))
    assert made.masking is not None and not any(p.requires_grad for p in made.masking.lm.parameters())
    with pytest.raises(UsageError, match="top_p is 1.0"):
        made.mask(1.0)


def test_the_end_is_always_allowed() -> None:
    """Also where the mask finds it all but impossible."""
    other = build(2)
    rollouts = sampler(build(1), Mask(other, 0.05)).sample(prompts(), 4, step=0)
    assert all(END in among for r in rollouts for among in sets_of(r)) and {2} <= {len(s) for r in rollouts for s in sets_of(r)} <= {1, 2}
