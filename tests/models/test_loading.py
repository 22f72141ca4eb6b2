"""Models by folder, hub name and kind; what cannot be read or scored is refused in a few lines."""

from __future__ import annotations

import shutil

import pytest
import torch
from torch import nn

from tilt.data.packing import pack
from tilt.errors import UsageError
from tilt.models import agreement, compat
from tilt.models.attention import PackedAttention
from tilt.models.loading import load, load_reward_model, tiny
from tilt.models.policy import Policy
from tilt.models.saving import fingerprint, save


def test_hub_name_from_the_local_cache(make, words, tmp_path, monkeypatch):
    """models--owner--name/refs/main names the snapshot."""
    lm = make("qwen3")
    repository = tmp_path / "hub" / "models--somebody--tiny-model"
    save(lm, words, repository / "snapshots" / "abc123")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc123")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    found, tokens = load("somebody/tiny-model")
    assert fingerprint(found) == fingerprint(lm) and tokens.eos_token_id == 48
    with pytest.raises(UsageError, match=r"somebody/other: neither a folder here nor found in the hub's local cache"):
        load("somebody/other")


def test_tiny_is_seeded_and_leaves_the_global_generator_alone():
    torch.manual_seed(0)
    state = torch.get_rng_state()
    same = [fingerprint(tiny("qwen3", vocabulary=40, width=16, layers=1, heads=2, context=32, seed=s)) for s in (1, 1, 2)]
    assert same[0] == same[1] != same[2] and torch.equal(state, torch.get_rng_state())
    with pytest.raises(UsageError, match="no_such_kind"):
        tiny("no_such_kind", vocabulary=40)


@pytest.mark.parametrize("kind", ["gpt2", "opt", "phi"])
def test_dropout_is_off_even_in_train_mode(kind, make, batch):
    """These architectures drop out by default, or do when asked."""
    lm = make(kind, **({"resid_pdrop": 0.3, "embd_pdrop": 0.3} if kind == "phi" else {})).train()
    assert not any(m.p for m in lm.modules() if isinstance(m, nn.Dropout))
    assert torch.equal(Policy(lm)(batch).logprobs, Policy(lm)(batch).logprobs)


def test_bad_folders(make, words, tmp_path):
    with pytest.raises(UsageError, match="there is no such folder"):
        load(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match=r"has no config\.json"):
        load(tmp_path / "empty")
    save(make("llama"), words, tmp_path / "good")
    shutil.copytree(tmp_path / "good", tmp_path / "broken")
    (tmp_path / "broken" / "model.safetensors").write_bytes(b"not weights")
    with pytest.raises(UsageError, match=r"broken: cannot be read"):
        load(tmp_path / "broken")
    shutil.copytree(tmp_path / "good", tmp_path / "weightless")
    (tmp_path / "weightless" / "model.safetensors").unlink()
    with pytest.raises(UsageError, match=r"weightless: cannot be read"):
        load(tmp_path / "weightless")
    with pytest.raises(UsageError, match=r"lacks weights of a reward model: score\.weight"):
        load_reward_model(tmp_path / "good")


def test_a_tokenizer_with_more_tokens_than_the_model(make, words, tmp_path):
    words.add_tokens(["more", "still more"])
    save(make("llama"), words, tmp_path)
    with pytest.raises(UsageError, match="52 tokens but the embedding only 50 rows"):
        load(tmp_path)


@pytest.mark.parametrize("kind", ["gemma3_text", "mistral"])
def test_the_self_check_sees_a_neglected_window(kind, make, monkeypatch):
    whole = PackedAttention.attend
    monkeypatch.setattr(PackedAttention, "attend", lambda self, *x, window, **k: whole(self, *x, window=None, **k))
    lm = tiny(kind, vocabulary=50, width=32, layers=2, heads=4, context=64, sliding_window=1000)
    assert not compat.is_packed(lm) and "log-probabilities differ" in agreement.note(lm)


def test_the_self_check_restores_windows():
    lm = tiny("mistral", vocabulary=50, width=32, layers=2, heads=4, context=64, sliding_window=17)
    assert compat.is_packed(lm) and lm.config.sliding_window == 17


def test_an_unknown_head_is_refused(make):
    lm = make("llama")
    compat.use_attention(lm, "sdpa")
    head = lm.lm_head
    lm.lm_head = nn.Sequential(head)
    lm.get_output_embeddings = lambda: nn.Sequential(head, nn.ReLU())
    with pytest.raises(UsageError, match="Its vocabulary head has a step that Tilt does not know"):
        agreement.settle(lm)


def test_bfloat16_is_packed_too(words, rollouts, tmp_path):
    save(tiny("qwen3", vocabulary=50, width=32, layers=2, heads=4, context=64), words, tmp_path)
    lm, _ = load(tmp_path, dtype=torch.bfloat16)
    assert compat.is_packed(lm)
    assert Policy(lm)(pack(rollouts)).logprobs.dtype == torch.float32
