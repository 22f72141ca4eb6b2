"""The engine against a loop that reads the whole text again for every token; the same tokens whatever the slots and the company."""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from tilt.data.packing import pack
from tilt.data.rollouts import Prompt, Rollout, Sampling
from tilt.models import compat
from tilt.models.policy import Policy
from tilt.sampling import engine, forward
from tilt.sampling.randomness import keys, uniforms
from tilt.sampling.sampler import Sampler

VOCABULARY = 23
END = 3
COMMON = {"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": END, "pad_token_id": 1}
LAYERED = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 48,
}
SHAPES: dict[str, dict[str, object]] = {
    "qwen3": LAYERED,
    "llama": {**LAYERED, "num_key_value_heads": 1},
    "gpt2": {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 48},
    "mistral": {**LAYERED, "sliding_window": 4},
    "gemma3_text": {**LAYERED, "sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"], "query_pre_attn_scalar": 8, "final_logit_softcapping": 2.0},
    "gemma2": {**LAYERED, "sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"], "query_pre_attn_scalar": 8, "attn_logit_softcapping": 0.5, "final_logit_softcapping": 2.0},
    "gpt_oss": {**LAYERED, "sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"], "num_local_experts": 2, "num_experts_per_tok": 1},
}  # fmt: skip


def build(kind: str, dtype: torch.dtype = torch.float64, scale: float = 6.0) -> PreTrainedModel:
    """A small model whose distributions are far from flat: the initial weights are multiplied by `scale`."""
    torch.manual_seed(0)
    lm = compat.causal_lm_from_config(compat.config_for(kind, **COMMON, **SHAPES[kind])).to(dtype)
    with torch.no_grad():
        for name, parameter in lm.named_parameters():
            if parameter.dim() > 1:
                parameter.mul_(scale if "embed" not in name and "wte" not in name else scale * 3)
            if "sinks" in name:
                parameter.normal_()
    compat.use_attention(lm, "tilt")
    return lm.eval()


def prompts(lengths: Sequence[int] = (1, 7, 3, 12, 5, 5, 2)) -> list[Prompt]:
    rng = random.Random(1)
    return [Prompt(tuple(rng.randrange(VOCABULARY) for _ in range(n)), 10 + i) for i, n in enumerate(lengths)]


def by_rereading(
    lm: PreTrainedModel, prompt: Prompt, sample: int, sampling: Sampling, *, seed: int, step: int, implementation: str = "eager"
) -> tuple[list[int], list[float]]:
    """One answer by a whole forward of transformers' own attention for every token, and a plain loop over the cumulative sum."""
    compat.use_attention(lm, implementation)
    key = keys(seed, "train", step, [prompt.id], [sample])
    text, logprobs = list(prompt.tokens), []
    with torch.no_grad():
        while len(logprobs) < sampling.max_tokens and len(text) < 48:
            logits = lm(input_ids=torch.tensor([text])).logits[0, -1].double() / sampling.temperature
            probs = torch.softmax(logits, -1).tolist()
            u, total, token = float(uniforms(key, np.array([len(text)]))[0]), 0.0, 0
            for candidate, p in enumerate(probs):
                total += p
                if total > u:
                    token = candidate
                    break
            logprobs.append(float(np.log(probs[token])))
            text.append(token)
            if token in sampling.stop_ids:
                break
    compat.use_attention(lm, "tilt")
    return text[len(prompt.tokens) :], logprobs


def sampler(lm: PreTrainedModel, slots: int = 64, **settings: object) -> Sampler:
    return Sampler(lm, None, Sampling(**{"max_tokens": 16, "stop_ids": (END,), **settings}), seed=4, slots=slots)  # type: ignore[arg-type]


def texts(rollouts: Sequence[Rollout]) -> dict[tuple[int, int], tuple[int, ...]]:
    return {(r.prompt.id, r.seed[3]): r.tokens for r in rollouts}


@pytest.mark.parametrize("kind", SHAPES)
def test_equals_reading_the_whole_text_for_every_token(kind: str) -> None:
    """Float64: the same tokens and log-probabilities as transformers' eager attention; texts outgrow the windows; fewer slots than answers.

    GPT-2 agrees to 1e-9. The others compute norms, angles and eager softmax in float32 whatever the weights, and agree to 1e-5.
    """
    lm = build(kind, torch.float32 if kind == "gpt_oss" else torch.float64)  # its experts' grouped product has no float64
    found = sampler(lm, slots=5, temperature=0.8).sample(prompts(), 3, step=2)
    assert len({r.tokens for r in found}) > 10 and max(len(r.tokens) for r in found) == 16
    for rollout in found[::2]:
        tokens, logprobs = by_rereading(lm, rollout.prompt, rollout.seed[3], rollout.sampling, seed=4, step=2)
        assert list(rollout.tokens) == tokens
        assert np.abs(np.array(rollout.logprobs) - logprobs).max() < (1e-9 if kind == "gpt2" else 1e-5)
        assert rollout.stop == ("stop" if tokens[-1] == END else "length")


@pytest.mark.parametrize("kind", ["qwen3", "gpt2", "gemma3_text"])
def test_slots_company_and_group_size_do_not_matter(kind: str) -> None:
    """Float64, token for token: 1, 3 and 64 slots, prompts shuffled, a prompt alone, one sample or eight."""
    lm, asked = build(kind), prompts((1, 7, 3, 12, 5))
    whole = texts(sampler(lm).sample(asked, 8, step=0))
    assert len(whole) == 40
    for slots in (1, 3):
        assert texts(sampler(lm, slots=slots).sample(asked, 8, step=0)) == whole
    assert texts(sampler(lm, slots=7).sample(random.Random(0).sample(asked, len(asked)), 8, step=0)) == whole
    one = texts(sampler(lm).sample(asked[::-1], 1, step=0))
    assert one == {name: tokens for name, tokens in whole.items() if name[1] == 0}
    alone = texts(sampler(lm).sample(asked[3:4], 8, step=0))
    assert alone == {name: tokens for name, tokens in whole.items() if name[0] == asked[3].id}
    assert texts(sampler(lm).sample(asked, 8, step=1)) != whole


def test_the_padded_fallback_draws_the_same() -> None:
    """A model outside the attention interface is read again for every token, on the same randomness."""
    lm, asked = build("qwen3"), prompts()
    cached = sampler(lm, slots=6).sample(asked, 3, step=0)
    compat.use_attention(lm, "eager")
    again = sampler(lm, slots=6).sample(asked, 3, step=0)
    assert texts(cached) == texts(again)
    assert max(abs(a - b) for x, y in zip(cached, again, strict=True) for a, b in zip(x.logprobs, y.logprobs, strict=True)) < 1e-5


@pytest.mark.parametrize("kind", SHAPES)
def test_logprobs_are_the_learners(kind: str) -> None:
    """Float32: the sampler's log-probabilities against the learner's packed forward, at the same temperature, to 1e-4."""
    lm = build(kind, torch.float32, scale=3.0)
    rollouts = sampler(lm, slots=8, temperature=0.7).sample(prompts(), 4, step=0)
    batch = pack(rollouts)
    with torch.no_grad():
        learner = Policy(lm)(batch, temperature=0.7).logprobs
    assert (batch.sampler - learner).abs().max() < 1e-4


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_tokens_follow_the_enumerated_probabilities(temperature: float) -> None:
    """χ² of 50,000 two-token answers against every path's probability, from whole forwards of transformers' own attention."""
    torch.manual_seed(0)
    config = compat.config_for("qwen3", **{**COMMON, **LAYERED, "vocab_size": 7})
    lm = compat.causal_lm_from_config(config)
    with torch.no_grad():
        for parameter in lm.parameters():
            if parameter.dim() > 1:
                parameter.mul_(8)
    compat.use_attention(lm, "tilt")
    prompt, number = Prompt((5, 2, 4), 0), 50_000
    rollouts = Sampler(lm, None, Sampling(temperature, 2, (END,)), seed=0, slots=25_000).sample([prompt], number, step=0)
    compat.use_attention(lm, "eager")
    with torch.no_grad():
        first = (lm(input_ids=torch.tensor([prompt.tokens])).logits[0, -1].double() / temperature).softmax(-1)
        second = (lm(input_ids=torch.tensor([[*prompt.tokens, a] for a in range(7)])).logits[:, -1].double() / temperature).softmax(-1)
    paths = {(END,): float(first[END])} | {(a, b): float(first[a] * second[a, b]) for a in range(7) if a != END for b in range(7)}
    assert abs(sum(paths.values()) - 1) < 1e-9
    counts = dict.fromkeys(paths, 0)
    for rollout in rollouts:
        counts[rollout.tokens] += 1
    large = [path for path in paths if paths[path] * number >= 10]
    rest = number - sum(counts[path] for path in large)
    expected = [paths[path] * number for path in large]
    chi2 = sum((counts[path] - e) ** 2 / e for path, e in zip(large, expected, strict=True))
    leftover = number - sum(expected)
    if leftover > 1:
        chi2 += (rest - leftover) ** 2 / leftover
    freedom = len(large) - (leftover <= 1)
    assert freedom > 15
    assert chi2 < freedom + 4 * (2 * freedom) ** 0.5


def test_uneven_work_with_fewer_slots_than_answers() -> None:
    """Prompts of 1 to 40 tokens, some with room for one token only, 3 slots: every answer as when each is alone, in prompt-major order."""
    lm, asked = build("qwen3"), prompts((40, 1, 47, 20, 2, 46, 9, 1))
    found = sampler(lm, slots=3, max_tokens=30).sample(asked, 3, step=0)
    assert [(r.prompt.id, r.seed[3]) for r in found] == [(p.id, n) for p in asked for n in range(3)]
    for prompt in asked:
        alone = sampler(lm, slots=3, max_tokens=30).sample([prompt], 3, step=0)
        assert texts(alone) == {(prompt.id, r.seed[3]): r.tokens for r in found if r.prompt.id == prompt.id}
    for r in found:
        room = min(30, 48 - len(r.prompt.tokens))
        assert len(r.tokens) <= room and (r.stop == "stop") == (r.tokens[-1] == END)
        assert r.stop == "stop" or len(r.tokens) == room


def test_long_answers_outgrow_the_first_chunk_of_the_cache() -> None:
    """150 tokens in a cache that begins with 64 columns, rows entering at different times."""
    torch.manual_seed(0)
    lm = compat.causal_lm_from_config(compat.config_for("qwen3", **{**COMMON, **LAYERED, "max_position_embeddings": 256})).double()
    compat.use_attention(lm, "tilt")
    asked = prompts((3, 9, 1))
    whole = Sampler(lm, None, Sampling(max_tokens=150), slots=6).sample(asked, 2, step=0)
    assert all(len(r.tokens) == 150 for r in whole)
    assert texts(Sampler(lm, None, Sampling(max_tokens=150), slots=2).sample(asked, 2, step=0)) == texts(whole)
    with torch.no_grad():
        learner = Policy(lm)(pack(whole)).logprobs
    assert (pack(whole).sampler.double() - learner).abs().max() < 1e-5


@pytest.mark.parametrize("kind", SHAPES)
def test_a_long_prompt_is_read_in_parts(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A budget of 16 tokens and prompts of up to 40: read in parts of 6 to 16, the answers are those of whole prompts, windows and sinks included."""
    lm = build(kind, torch.float32 if kind == "gpt_oss" else torch.float64)
    asked = prompts((40, 3, 17, 33, 16))
    whole = sampler(lm, slots=6, max_tokens=7).sample(asked, 2, step=0)
    parts: list[int] = []
    run = forward.Cached._run

    def watched(self: forward.Cached, tokens: np.ndarray, *rest: object) -> torch.Tensor:
        parts.append(len(tokens))
        return run(self, tokens, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(forward.Cached, "_run", watched)
    for module in (forward, engine):
        monkeypatch.setattr(module, "PREFILL_TOKENS", 16)
    found = sampler(lm, slots=6, max_tokens=7).sample(asked, 2, step=0)
    assert max(parts) == 16 and parts[:7] == [6] * 6 + [4]
    assert texts(found) == texts(whole)
    assert max(abs(a - b) for x, y in zip(found, whole, strict=True) for a, b in zip(x.logprobs, y.logprobs, strict=True)) < 1e-5
