"""A cache that is too small for all: answers wait or begin again, and are the same token for token; what is held stays within the limit."""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from tilt.data.rollouts import Prompt, Rollout, Sampling
from tilt.errors import UsageError
from tilt.models import compat
from tilt.models.work import cached_bytes
from tilt.sampling import engine, forward
from tilt.sampling.cache import Store
from tilt.sampling.engine import Queue
from tilt.sampling.sampler import Sampler

LAYERED = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "max_position_embeddings": 96,
}  # fmt: skip
SHAPES: dict[str, dict[str, int]] = {"qwen3": LAYERED, "gpt2": {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 96}}


def build(kind: str) -> PreTrainedModel:
    """Two layers in float64, distributions far from flat."""
    torch.manual_seed(0)
    lm = compat.causal_lm_from_config(
        compat.config_for(kind, vocab_size=23, bos_token_id=0, eos_token_id=3, pad_token_id=1, **SHAPES[kind])
    ).double()
    with torch.no_grad():
        for parameter in lm.parameters():
            if parameter.dim() > 1:
                parameter.mul_(6)
    compat.use_attention(lm, "tilt")
    return lm.eval()


def prompts(lengths: Sequence[int] = (1, 7, 3, 12, 5, 5, 2)) -> list[Prompt]:
    rng = random.Random(1)
    return [Prompt(tuple(rng.randrange(23) for _ in range(n)), 10 + i) for i, n in enumerate(lengths)]


def texts(rollouts: Sequence[Rollout]) -> dict[tuple[int, int], tuple[int, ...]]:
    return {(r.prompt.id, r.seed[3]): r.tokens for r in rollouts}


@pytest.mark.parametrize("kind", ["qwen3", "gpt2"])
@pytest.mark.parametrize("settings", [{}, {"keep_sets": True, "top_k": 5}])
@pytest.mark.parametrize("places", [96, 160, 300])
def test_a_small_cache_draws_the_same(kind: str, settings: dict[str, object], places: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Float64: seven prompts of 1 to 33 tokens, four answers each, against no limit. Answers do begin again, and no store outgrows the limit."""
    lm, asked = build(kind), prompts((1, 7, 3, 33, 12, 5, 20))
    made = Sampling(**{"max_tokens": 40, "stop_ids": () if places == 300 else (3,), **settings})  # type: ignore[arg-type]
    whole = Sampler(lm, None, made, seed=4, slots=64).sample(asked, 4, step=0)
    assert max(len(r.tokens) for r in whole) > 30
    held, lost = [], []
    stores: list[Store] = []

    def watched(body: object, *args: object) -> forward.Cached:
        cached = forward_made(body, *args)
        stores[:] = [cached.prompts, cached.answers]
        return cached

    forward_made, begin, record = forward.Cached, Queue._begin_again, Queue.record

    def counted(self: Queue, answers: np.ndarray) -> None:
        lost.extend(answers)
        begin(self, answers)

    def recorded(self: Queue, *args: object) -> object:
        held.append(sum(x[0].shape[0] * x[0].shape[2] for store in stores for x in store.layers.values()) // 2)
        return record(self, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(forward, "Cached", watched)
    monkeypatch.setattr(Queue, "_begin_again", counted)
    monkeypatch.setattr(Queue, "record", recorded)
    found = Sampler(lm, None, made, seed=4, slots=64, cache=places * cached_bytes(lm)).sample(asked, 4, step=0)
    assert texts(found) == texts(whole) and [r.seed for r in found] == [r.seed for r in whole]
    assert max(abs(a - b) for x, y in zip(found, whole, strict=True) for a, b in zip(x.logprobs, y.logprobs, strict=True)) < 1e-6
    if settings:
        assert all(x.kept.ids.tolist() == y.kept.ids.tolist() for x, y in zip(found, whole, strict=True) if x.kept and y.kept)
    assert lost and max(held) <= places


def test_an_ample_cache_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """No answer begins again where all fit."""
    lm, asked = build("qwen3"), prompts()
    monkeypatch.setattr(engine.Queue, "_begin_again", None)
    made = Sampling(max_tokens=16, stop_ids=(3,))
    whole = Sampler(lm, None, made, seed=4).sample(asked, 3, step=0)
    assert texts(Sampler(lm, None, made, seed=4, cache=2**20).sample(asked, 3, step=0)) == texts(whole)


def test_a_cache_too_small_for_one_answer_is_refused() -> None:
    lm = build("qwen3")
    with pytest.raises(UsageError, match=r"hold 40 tokens, and one answer with its prompt needs 48 .*\n.*cache_gib"):
        Sampler(lm, None, Sampling(max_tokens=20), cache=40 * cached_bytes(lm)).sample(prompts((3,)), 1, step=0)
