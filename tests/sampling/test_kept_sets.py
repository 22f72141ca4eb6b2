"""Truncated training rollouts: every token carries what it was chosen among, and sampler, learner and reference score it under the same."""

from __future__ import annotations

import copy
import random
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from tilt.data.packing import Pack, pack
from tilt.data.rollouts import Prompt, Rollout, Sampling
from tilt.errors import UsageError
from tilt.learning.learner import Learner, Passes
from tilt.models import compat
from tilt.models.policy import Policy
from tilt.objectives import ALGORITHMS, NoPenalty, Rewards
from tilt.optim.optimizers import AdamW, Optimizer
from tilt.sampling.randomness import keys, uniforms
from tilt.sampling.sampler import Sampler, check

END = 3
COMMON = {"vocab_size": 23, "bos_token_id": 0, "eos_token_id": END, "pad_token_id": 1}
LAYERED = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "max_position_embeddings": 48,
}  # fmt: skip
SHAPES: dict[str, dict[str, object]] = {
    "qwen3": LAYERED,
    "gpt2": {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 48},
    "gemma3_text": {**LAYERED, "sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"], "query_pre_attn_scalar": 8, "final_logit_softcapping": 2.0},
}  # fmt: skip
CUTS = {"top_k": {"top_k": 5}, "top_p": {"top_p": 0.7}, "min_p": {"min_p": 0.2}, "all": {"top_k": 7, "top_p": 0.9, "min_p": 0.05}}


def build(kind: str, dtype: torch.dtype = torch.float64, scale: float = 6.0) -> PreTrainedModel:
    """A small model whose distributions are far from flat."""
    torch.manual_seed(0)
    lm = compat.causal_lm_from_config(compat.config_for(kind, **COMMON, **SHAPES[kind])).to(dtype)
    with torch.no_grad():
        for name, parameter in lm.named_parameters():
            if parameter.dim() > 1:
                parameter.mul_(scale if "embed" not in name and "wte" not in name else scale * 3)
    compat.use_attention(lm, "tilt")
    return lm.eval()


def prompts(lengths: Sequence[int] = (1, 7, 3, 12, 5, 5, 2)) -> list[Prompt]:
    rng = random.Random(1)
    return [Prompt(tuple(rng.randrange(23) for _ in range(n)), 10 + i) for i, n in enumerate(lengths)]


def sampler(lm: PreTrainedModel, slots: int = 64, **settings: object) -> Sampler:
    return Sampler(lm, None, Sampling(**{"max_tokens": 12, "stop_ids": (END,), "keep_sets": True, **settings}), seed=4, slots=slots)  # type: ignore[arg-type]


def sets_of(rollout: Rollout) -> list[list[int]]:
    assert rollout.kept is not None
    offsets = rollout.kept.offsets.tolist()
    return [rollout.kept.ids[a:b].tolist() for a, b in pairwise(offsets)]


def cut(probs: Sequence[float], top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0) -> set[int]:
    """The set that these settings leave, by sorting in Python."""
    order = sorted(range(len(probs)), key=lambda t: -probs[t])[: top_k or None]
    mass, whole = 0.0, sum(probs[t] for t in order)
    chosen = []
    for token in order:
        if mass >= top_p * whole:
            break
        chosen.append(token)
        mass += probs[token]
    return {t for t in chosen if probs[t] >= min_p * probs[order[0]]}


@pytest.mark.parametrize("settings", CUTS.values(), ids=CUTS)
def test_equals_reading_the_whole_text_for_every_token(settings: dict[str, float]) -> None:
    """Float64, fewer slots than answers: the same sets, tokens and log-probabilities as whole forwards of transformers' own attention and sorting in Python."""
    lm = build("gpt2", scale=3.0)
    found = sampler(lm, slots=5, temperature=0.8, **settings).sample(prompts((1, 7, 3, 12)), 3, step=2)
    assert len({r.tokens for r in found}) > 6
    compat.use_attention(lm, "eager")
    for rollout in found[::2]:
        key = keys(4, "train", 2, [rollout.prompt.id], [rollout.seed[3]])
        text = list(rollout.prompt.tokens)
        for token, logprob, among in zip(rollout.tokens, rollout.logprobs, sets_of(rollout), strict=True):
            with torch.no_grad():
                probs = (lm(input_ids=torch.tensor([text])).logits[0, -1] / 0.8).softmax(-1).tolist()
            allowed = cut(probs, **settings)
            assert set(among) == allowed and len(among) == len(allowed) and token in allowed
            u, total = float(uniforms(key, np.array([len(text)]))[0]) * sum(probs[t] for t in allowed), 0.0
            for candidate in sorted(allowed):
                total += probs[candidate]
                if total > u:
                    break
            assert candidate == token
            assert abs(logprob - np.log(probs[token] / sum(probs[t] for t in allowed))) < 1e-9
            text.append(token)


@pytest.mark.parametrize("kind", SHAPES)
def test_logprobs_are_the_learners(kind: str) -> None:
    """Float32: the sampler's log-probabilities against the learner's packed forward within the same sets, to 1e-4; without the sets they are far apart."""
    lm = build(kind, torch.float32, scale=3.0)
    batch = pack(sampler(lm, slots=8, temperature=0.7, **CUTS["all"]).sample(prompts(), 4, step=0))
    with torch.no_grad():
        assert (batch.sampler - Policy(lm)(batch, temperature=0.7).logprobs).abs().max() < 1e-4
        whole = Policy(lm)(pack([unkept(r) for r in rollouts_of(lm)]), temperature=0.7).logprobs
    assert (pack(rollouts_of(lm)).sampler - whole).abs().max() > 0.02


def rollouts_of(lm: PreTrainedModel) -> list[Rollout]:
    return sampler(lm, slots=8, temperature=0.7, **CUTS["all"]).sample(prompts(), 4, step=0)


def unkept(rollout: Rollout) -> Rollout:
    return Rollout(rollout.prompt, rollout.tokens, rollout.sampled, rollout.logprobs, rollout.stop, rollout.sampling)


def test_float64_agrees_to_1e_9() -> None:
    lm = build("gpt2")
    torch.set_default_dtype(torch.float64)
    try:
        batch = pack(sampler(lm, temperature=0.7, **CUTS["all"]).sample(prompts(), 4, step=0))
    finally:
        torch.set_default_dtype(torch.float32)
    with torch.no_grad():
        assert (batch.sampler - Policy(lm)(batch, temperature=0.7).logprobs).abs().max() < 1e-9


def test_slots_company_and_group_size_do_not_matter() -> None:
    """Float64: the same tokens and the same sets, whoever shares the batch."""
    lm, asked = build("gpt2"), prompts((1, 7, 3, 12, 5))
    whole = {(r.prompt.id, r.seed[3]): r for r in sampler(lm, top_p=0.8).sample(asked, 6, step=0)}
    assert len({len(s) for r in whole.values() for s in sets_of(r)}) > 4
    for slots, prompts_, samples in ((1, asked, 2), (4, asked[::-1], 6), (64, asked[3:4], 6)):
        for r in sampler(lm, slots=slots, top_p=0.8).sample(prompts_, samples, step=0):
            twin = whole[r.prompt.id, r.seed[3]]
            assert r.tokens == twin.tokens and r.kept == twin.kept


@pytest.mark.parametrize("settings", [{"top_k": 3}, {"top_p": 0.6}, {"min_p": 0.3}], ids=str)
def test_tokens_follow_the_enumerated_truncated_distribution(settings: dict[str, float]) -> None:
    """χ² of 30,000 two-token answers against every path's truncated probability, from whole forwards of transformers' own attention."""
    torch.manual_seed(0)
    lm = compat.causal_lm_from_config(compat.config_for("qwen3", **{**COMMON, **LAYERED, "vocab_size": 7}))
    with torch.no_grad():
        for parameter in lm.parameters():
            if parameter.dim() > 1:
                parameter.mul_(8)
    compat.use_attention(lm, "tilt")
    prompt, number = Prompt((5, 2, 4), 0), 30_000
    rollouts = Sampler(lm, None, Sampling(1.2, 2, (END,), keep_sets=True, **settings), seed=0, slots=15_000).sample(
        [prompt], number, step=0
    )  # type: ignore[arg-type]
    compat.use_attention(lm, "eager")
    with torch.no_grad():
        first = (lm(input_ids=torch.tensor([prompt.tokens])).logits[0, -1].double() / 1.2).softmax(-1)
        second = (lm(input_ids=torch.tensor([[*prompt.tokens, a] for a in range(7)])).logits[:, -1].double() / 1.2).softmax(-1)

    def truncated(probs: list[float]) -> dict[int, float]:
        allowed = cut(probs, **settings)  # type: ignore[arg-type]
        return {t: probs[t] / sum(probs[i] for i in allowed) for t in allowed}

    paths: dict[tuple[int, ...], float] = {}
    for a, p in truncated(first.tolist()).items():
        paths |= {(END,): p} if a == END else {(a, b): p * q for b, q in truncated(second[a].tolist()).items()}
    counts = dict.fromkeys(paths, 0)
    for rollout in rollouts:
        counts[rollout.tokens] += 1
    chi2 = sum((counts[path] - p * number) ** 2 / (p * number) for path, p in paths.items())
    assert min(p * number for p in paths.values()) > 5 and len(paths) > 4
    assert chi2 < len(paths) - 1 + 4 * (2 * (len(paths) - 1)) ** 0.5


WHOLE = Passes()


def learner_of(lm: PreTrainedModel, settings: Passes = WHOLE) -> Learner:
    anchor = Policy(copy.deepcopy(lm))
    with torch.no_grad():
        for p in anchor.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(5)))

    @contextmanager
    def reference():  # type: ignore[no-untyped-def]
        yield anchor

    return Learner(Policy(lm), Optimizer(lm, AdamW(1e-3, clip_norm=0.0), 10), reference=reference, settings=settings)


@pytest.mark.parametrize("settings", CUTS.values(), ids=CUTS)
def test_old_and_reference_are_scored_within_the_sets_and_the_gradient_is_that_of_loops(settings: dict[str, float]) -> None:
    """Float64: GRPO with k3 against a loop that reads each text alone and renormalises over the stored sets: loss and every weight's gradient to 1e-9."""
    torch.set_default_dtype(torch.float64)
    try:
        lm = build("gpt2", scale=3.0)
        rollouts = sampler(lm, temperature=0.8, **settings).sample(prompts((4, 7)), 3, step=0)
        batch, learner, row = pack(rollouts), learner_of(lm, Passes(micro_tokens=30)), ALGORITHMS["grpo"]
        signals = learner.evaluate(batch, row.needs, temperature=0.8)
        assert learner.reference is not None
        with learner.reference() as anchor:
            expected = {name: alone(model, rollouts, 0.8) for name, model in (("old", lm), ("reference", anchor.lm))}
        for name, value in expected.items():
            torch.testing.assert_close(getattr(signals, name), value.detach(), rtol=0, atol=1e-9)
        rewards = Rewards.of(torch.tensor([1.0, 0, 0.5, 0, 2, 1]), actions=batch.layout.actions)
        experience = row.prepare(rewards, signals, batch.layout)
        lm.zero_grad()
        truth = row.loss(*outputs_of(alone(lm, rollouts, 0.8)), experience)
        truth.backward()
        right = {name: p.grad.clone() for name, p in lm.named_parameters() if p.grad is not None}
        lm.zero_grad()
        for part in batch.split(30):
            row.loss(learner.policy(batch.take(part), temperature=0.8, entropy=True), experience.take(part)).backward()
        for name, p in lm.named_parameters():
            torch.testing.assert_close(p.grad, right[name], rtol=0, atol=1e-9)
    finally:
        torch.set_default_dtype(torch.float32)


def outputs_of(logprobs: torch.Tensor):  # type: ignore[no-untyped-def]
    from tilt.objectives import Outputs

    return (Outputs.of(logprobs),)


def alone(lm: PreTrainedModel, rollouts: Sequence[Rollout], temperature: float) -> torch.Tensor:
    """One plain forward of transformers' own attention a text, and a sum over each token's set."""
    compat.use_attention(lm, "eager")
    found = []
    for r in rollouts:
        start = len(r.prompt.tokens)
        logits = lm(input_ids=torch.tensor([[*r.prompt.tokens, *r.tokens]])).logits[0, start - 1 : -1] / temperature
        for scores, token, among in zip(logits, r.tokens, sets_of(r), strict=True):
            found.append(scores[token] - torch.stack([scores[v] for v in among or range(len(scores))]).logsumexp(0))
    compat.use_attention(lm, "tilt")
    return torch.stack(found)


def test_the_ratio_is_exactly_1_on_the_first_pass() -> None:
    """Evaluated `old` and the first of two passes over the same micro-batches; then the ratio moves, inside the sets."""
    lm = build("qwen3", torch.float32, scale=2.0)
    batch = pack(sampler(lm, **CUTS["all"]).sample(prompts((4, 7)), 4, step=0))
    learner, row = learner_of(lm, Passes(2)), ALGORITHMS["dapo"]
    signals = learner.evaluate(batch, frozenset({"old"}), temperature=1.0)
    rewards = Rewards.of(torch.arange(8.0), actions=batch.layout.actions)
    report = learner.update(batch, row.prepare(rewards, signals, batch.layout), row, watch=True)
    assert report.metrics["val/first_gap"] == 0.0 and report.metrics["sampler/probability_gap_mean"] < 1e-5
    assert torch.equal(report.channels["first"], signals.old) and float((report.channels["ratio"] - 1).abs().max()) > 1e-6
    single = learner_of(build("qwen3", torch.float32, scale=2.0))
    nan = single.evaluate(batch, frozenset())
    assert single.update(batch, row.prepare(rewards, nan, batch.layout), row).metrics["val/ratio"] == 1.0
    assert isinstance(row.penalty, NoPenalty)


def test_packs_carry_the_sets_raggedly() -> None:
    """Taking, splitting and mixing with answers to the whole vocabulary give each sequence its own sets; tokens that were not sampled have none."""
    lm = build("gpt2")
    rollouts = [
        *sampler(lm, top_p=0.8).sample(prompts((4, 7)), 3, step=0),
        Rollout.demonstration(Prompt((1, 2), 99), (5, 6, 7), (True, False, True)),
    ]
    batch = pack(rollouts)
    assert len(batch.kept) == batch.layout.actions
    for chosen in (torch.tensor([6, 2, 0]), *batch.split(20)):
        assert ragged(batch.take(chosen)) == [(sets_of(rollouts[i]) if rollouts[i].kept else [[], []]) for i in chosen]
    assert not pack(rollouts[6:]).kept.narrows


def ragged(batch: Pack) -> list[list[list[int]]]:
    starts, ends = batch.layout.starts.tolist(), batch.layout.ends.tolist()
    offsets = batch.kept.offsets.tolist()
    return [[batch.kept.ids[offsets[a] : offsets[a + 1]].tolist() for a in range(s, e)] for s, e in zip(starts, ends, strict=True)]


def test_evaluation_is_as_before() -> None:
    """Truncated evaluation answers are the same with sets and without; without, they carry log-probabilities of the whole distribution."""
    lm = build("gpt2")
    for settings in CUTS.values():
        given = Sampling(1.0, 8, (END,), **settings)  # type: ignore[arg-type]
        found = sampler(lm, top_k=3).evaluate(prompts((4, 2)), 3, step=0, sampling=given)
        kept = sampler(lm, top_k=3).evaluate(prompts((4, 2)), 3, step=0, sampling=replace(given, keep_sets=True))
        assert [r.tokens for r in found] == [r.tokens for r in kept] and all(r.kept is None for r in found)
        batch = pack(found)
        with torch.no_grad():
            assert (batch.sampler - Policy(lm)(batch).logprobs).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"top_k": 5}, "top_k 5 in a training rollout.*(?s:.*)Set keep_sets"),
        ({"min_p": 0.1}, "min_p 0.1 in a training rollout"),
        ({"min_p": 1.0}, "min_p is 1.0"),
        ({"keep_sets": True}, "keep_sets has no sets to keep"),
        ({"keep_sets": True, "top_k": 2, "temperature": 0.0}, "keep_sets with temperature 0"),
    ],
)
def test_what_still_cannot_be_scored_is_refused(settings: dict[str, object], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        check(Sampling(**settings), 12, training=True)  # type: ignore[arg-type]
    check(Sampling(top_k=5, keep_sets=True), 12, training=True)
