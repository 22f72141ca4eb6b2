"""Checkpoints of six architectures in, plain checkpoints with the same logits out: full fine-tuning and adapters, policy and reward model."""

from __future__ import annotations

import json
import math

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, PreTrainedTokenizerFast, Qwen2Tokenizer

from tilt.data.packing import pack
from tilt.data.rollouts import Prompt, Rollout
from tilt.models.loading import load_reward_model, tiny
from tilt.models.saving import save
from tilt.recipes import reward_model, rl

KINDS = {"qwen3": {}, "qwen2": {}, "llama": {}, "gpt2": {}, "mistral": {"sliding_window": 4}, "gemma3_text": {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}}  # fmt: skip
LETTERS = [chr(ord("a") + i) for i in range(20)]
TEXTS = {"template": "text", "held_out": 0.2}


def tokenizer(kind: str):
    """Letters; for qwen2 its own class, since AutoTokenizer would open any other as that."""
    vocabulary = {letter: i for i, letter in enumerate(LETTERS)} | {"<eos>": 20, "<pad>": 21}
    if kind == "qwen2":
        return Qwen2Tokenizer(vocab=vocabulary, merges=[], unk_token="<eos>", eos_token="<eos>", pad_token="<pad>")
    plain = Tokenizer(models.WordLevel(vocabulary, unk_token="a"))
    plain.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=plain, eos_token="<eos>", pad_token="<pad>")


@pytest.fixture
def checkpoint(tmp_path):
    def write(kind: str):
        lm = tiny(kind, vocabulary=22, width=16, layers=2, heads=2, context=32, **KINDS[kind])
        save(lm, tokenizer(kind), tmp_path / kind)
        return tmp_path / kind

    return write


@pytest.mark.parametrize("lora", [None, {"rank": 2, "alpha": 4.0}], ids=["full", "lora"])
@pytest.mark.parametrize("kind", KINDS)
def test_train_save_open(checkpoint, shared, tmp_path, metrics, kind, lora):
    start = checkpoint(kind)
    rows, pairs = tmp_path / "rows.jsonl", tmp_path / "pairs.jsonl"
    rows.write_text("".join(json.dumps({"prompt": a + b}) + "\n" for a in LETTERS[:6] for b in LETTERS[:4]))
    pairs.write_text(
        "".join(json.dumps({"prompt": a + b, "chosen": "aab", "rejected": "c"}) + "\n" for a in LETTERS[:6] for b in LETTERS[:4])
    )
    scored = reward_model.run(
        reward_model.Config.model_validate(
            shared | {"model": str(start), "data": {"source": str(pairs), **TEXTS}, "steps": 2, "batch": 4, "lora": lora}
        )
    )
    result = rl.run(
        rl.Config.model_validate(
            shared
            | {
                "algorithm": "ppo", "model": str(start), "data": {"source": str(rows), **TEXTS}, "reward": {"model": str(scored.checkpoint)}, "steps": 2,
                "prompts": 4, "samples": 2, "passes": 2, "sampling": {"max_tokens": 5}, "eval": {"prompts": 2}, "lora": lora, "optimizer": {"lr": 1e-2},
            }
        )
    )  # fmt: skip
    assert all(math.isfinite(value) for line in metrics(result) for value in line.values())
    assert metrics(result)[1]["sampler/logprob_gap_max"] < 1e-4  # the sampler runs the trained weights, adapters included

    before, after = (AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32) for place in (start, result.checkpoint))
    moved = {name for name, value in after.state_dict().items() if not torch.equal(value, before.state_dict()[name])}
    assert (
        moved
        and not any("lora" in name for name in after.state_dict())
        and (lora is None or all("embed" not in name and "wte" not in name for name in moved))
    )
    words = AutoTokenizer.from_pretrained(result.checkpoint)
    assert words("abc")["input_ids"] == tokenizer(kind)("abc")["input_ids"] and words.eos_token_id == 20

    ids = torch.tensor([words("abcab")["input_ids"]])
    answer = Rollout.demonstration(Prompt(tuple(ids[0, :2].tolist()), 0), tuple(ids[0, 2:].tolist()))
    with torch.no_grad():
        scorer, _ = load_reward_model(scored.checkpoint)
        plain = AutoModelForSequenceClassification.from_pretrained(scored.checkpoint, dtype=torch.float32)
        assert float(scorer(pack([answer]))[0]) == pytest.approx(float(plain(ids).logits[0, 0]), abs=1e-5)


@pytest.mark.parametrize("lora", [None, {"rank": 2, "alpha": 4.0}], ids=["full", "lora"])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_saved_gives_the_trained_models_logits(checkpoint, shared, tmp_path, monkeypatch, kind, lora):
    """The policy in memory at the end of a run, and plain transformers on its folder, agree to 1e-5."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": a + b}) + "\n" for a in LETTERS[:6] for b in LETTERS[:4]))
    held = []
    found = rl.train
    monkeypatch.setattr(rl, "train", lambda config, parts, *more: (held.append(parts.learner.policy), found(config, parts, *more))[1])
    result = rl.run(
        rl.Config.model_validate(
            shared
            | {
                "algorithm": "dapo", "model": str(checkpoint(kind)), "data": {"source": str(rows), **TEXTS}, "reward": {"length": 3}, "steps": 2,
                "prompts": 4, "samples": 4, "sampling": {"max_tokens": 5}, "eval": {"prompts": 2}, "lora": lora, "optimizer": {"lr": 1e-2},
            }
        )
    )  # fmt: skip
    ids = (0, 1, 2, 3, 4, 5, 6, 7)
    answer = pack([Rollout.demonstration(Prompt(ids[:2], 0), ids[2:])])
    plain = AutoModelForCausalLM.from_pretrained(result.checkpoint, dtype=torch.float32)
    with torch.no_grad():
        ours = held[0].head(held[0].hidden(answer))
        theirs = plain(torch.tensor([ids])).logits[0]
    assert torch.allclose(ours, theirs, atol=1e-5)
