"""Tiny models with strong weights, texts that stress packing, and a tokenizer of fifty words."""

from __future__ import annotations

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Tokenizer

from tilt.data.packing import pack
from tilt.data.rollouts import Prompt, Rollout
from tilt.models.loading import tiny

WINDOW = {"sliding_window": 4}
MIXED = {"layer_types": ["sliding_attention", "full_attention"]}
SETTINGS = {
    "qwen3": {},
    "qwen2": {},
    "llama": {},
    "gpt2": {},
    "gemma3_text": WINDOW | MIXED,
    "mistral": WINDOW,
    "gemma2": WINDOW | MIXED | {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0},
    "granite": {"logits_scaling": 3.0},
    "cohere": {"logit_scale": 3.0},
    "gpt_oss": WINDOW | MIXED | {"num_local_experts": 2, "num_experts_per_tok": 1},
}


@pytest.fixture
def make():
    """A tiny model by kind, its weights enlarged so that attention and caps matter."""

    def build(kind: str, dtype: torch.dtype = torch.float32, **settings):
        lm = tiny(kind, vocabulary=50, width=32, layers=2, heads=4, context=64, **(SETTINGS.get(kind, {}) | settings))
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for p in lm.parameters():
                p.add_(torch.randn(p.shape, generator=generator) * 0.1)
        return lm.to(dtype)

    return build


@pytest.fixture
def rollouts():
    """Three answers to one prompt (one of a single token), one to another, a text without prompt, and one answer with a token that was not sampled."""

    def draw(n: int, seed: int) -> tuple[int, ...]:
        return tuple(torch.randint(0, 48, (n,), generator=torch.Generator().manual_seed(seed)).tolist())

    first, second, none = Prompt(draw(9, 1), 0), Prompt(draw(3, 2), 1), Prompt((), 2)
    return [
        Rollout.demonstration(first, draw(6, 3)),
        Rollout.demonstration(first, draw(1, 4)),
        Rollout.demonstration(second, draw(11, 5)),
        Rollout.demonstration(none, draw(7, 6), (False, *[True] * 6)),
        Rollout.demonstration(first, draw(4, 7), (True, False, True, True)),
    ]


@pytest.fixture
def batch(rollouts):
    return pack(rollouts)


@pytest.fixture
def alone():
    """Log-probabilities of the sampled tokens by one plain forward call per text, without Tilt's attention."""

    def score(lm, rollouts, temperature: float = 1.0) -> torch.Tensor:
        out = []
        for r in rollouts:
            text = torch.tensor([*r.prompt.tokens, *r.tokens])
            logprobs = torch.log_softmax(lm(input_ids=text[None], use_cache=False).logits[0, :-1] / temperature, -1)
            every = logprobs.gather(1, text[1:, None])[:, 0]
            chosen = [len(r.prompt.tokens) + i - 1 for i, s in enumerate(r.sampled) if s]
            out.append(every[chosen])
        return torch.cat(out)

    return score


def _words():
    vocabulary = {f"w{i}": i for i in range(48)} | {"<eos>": 48, "<pad>": 49}
    plain = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    made = PreTrainedTokenizerFast(tokenizer_object=plain, eos_token="<eos>", pad_token="<pad>")
    made.chat_template = "{% for m in messages %}{{ m.content }} {% endfor %}{% if add_generation_prompt %}w7{% endif %}"
    return made


@pytest.fixture
def words():
    """Fifty words, <eos> 48, <pad> 49, and a chat template."""
    return _words()


@pytest.fixture
def words_for():
    """A tokenizer that transformers opens as itself beside this kind of model: for qwen2 that is its own class."""

    def choose(kind: str):
        if kind != "qwen2":
            return _words()
        vocabulary = {chr(ord("!") + i): i for i in range(48)} | {"<eos>": 48, "<pad>": 49}
        return Qwen2Tokenizer(vocab=vocabulary, merges=[], unk_token="<eos>", eos_token="<eos>", pad_token="<pad>")

    return choose
