"""LoRA roles: off is the reference exactly, forward and backward belong to one role, and nothing changes who is trainable."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from tilt.data.packing import pack
from tilt.errors import UsageError
from tilt.models.adapters import adapter_off, adapter_on, add_lora, save_adapter
from tilt.models.loading import load
from tilt.models.policy import Policy
from tilt.models.saving import fingerprint, save


def move(lm, word="lora_"):
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for n, p in lm.named_parameters():
            if word in n:
                p.add_(torch.randn(p.shape, generator=generator) * 0.1)


def trainable(lm):
    return {n for n, p in lm.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("kind", ["qwen3", "gpt2"])
def test_off_is_the_base_exactly(kind, make, batch):
    lm = make(kind)
    policy = Policy(lm)
    base = policy(batch).logprobs
    add_lora(lm, 4, 8)
    torch.testing.assert_close(policy(batch).logprobs, base, rtol=0, atol=1e-5, msg="B = 0 at first")
    move(lm)
    before, moved = trainable(lm), policy(batch).logprobs
    with adapter_off(lm):
        assert torch.equal(policy(batch).logprobs, base)
        assert trainable(lm) == before
    assert torch.equal(policy(batch).logprobs, moved) and not torch.allclose(moved, base, atol=1e-2)
    assert trainable(lm) == before and all("lora_" in n for n in before)


def test_state_returns_after_an_error(make, batch):
    lm = add_lora(make("qwen3"), 2, 4)
    move(lm)
    moved = Policy(lm)(batch).logprobs
    with pytest.raises(ZeroDivisionError), adapter_off(lm):
        raise ZeroDivisionError
    assert torch.equal(Policy(lm)(batch).logprobs, moved)


def test_a_frozen_adapter_stays_frozen(make, batch):
    """peft's set_adapter would make it trainable; a role switch must not."""
    lm = add_lora(make("qwen3"), 2, 4, name="reward")
    add_lora(lm, 2, 4, name="policy")
    move(lm)
    before = trainable(lm)
    assert before and all(".policy." in n for n in before)
    policy, prints = Policy(lm), fingerprint(lm)
    with adapter_on(lm, "reward"):
        assert trainable(lm) == before
        reward = policy(batch).logprobs
    acting = policy(batch).logprobs
    assert not torch.allclose(reward, acting, atol=1e-3)
    with adapter_off(lm), adapter_on(lm, "policy"):
        assert torch.equal(policy(batch).logprobs, acting)
    acting.sum().backward()
    assert trainable(lm) == before and {n for n, p in lm.named_parameters() if p.grad is not None} == before and fingerprint(lm) == prints


@pytest.mark.parametrize("recompute", [False, True])
def test_reference_inside_the_step_leaves_the_policy_its_gradient(recompute, make, batch):
    """A step that asks the reference between the policy's forward and backward has the gradient of one that does not."""
    lm = add_lora(make("qwen3"), 2, 4)
    move(lm)
    policy = Policy(lm)
    if recompute:
        from tilt.models import compat

        compat.recompute_activations(lm)
        lm.train()

    def gradient(ask):
        lm.zero_grad()
        said = policy(batch).logprobs
        if ask:
            with torch.no_grad(), adapter_off(lm):
                policy(batch)
        said.sum().backward()
        return {n: p.grad.clone() for n, p in lm.named_parameters() if p.grad is not None}

    with_reference, without = gradient(True), gradient(False)
    assert without and max(float(g.abs().max()) for g in without.values()) > 0.1
    for name, g in without.items():
        assert torch.equal(with_reference[name], g), name


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_adapter_alone_opens_on_its_base(kind, make, batch, rollouts, alone, words, tmp_path):
    lm = make(kind)
    save(lm, words, tmp_path / "base")
    add_lora(lm, 4, 8)
    move(lm)
    ours = Policy(lm)(batch).logprobs
    save_adapter(lm, tmp_path / "adapter", base=str(tmp_path / "base"))
    again, _ = load(tmp_path / "adapter")
    torch.testing.assert_close(Policy(again)(pack(rollouts)).logprobs, ours, atol=1e-5, rtol=0)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")
    torch.testing.assert_close(alone(plain, rollouts), ours, atol=1e-5, rtol=0)


def test_targets(make):
    lm = add_lora(make("llama"), 2, 4, targets=["q_proj", "down_proj"])
    assert {n.split(".lora_")[0].rsplit(".", 1)[-1] for n in trainable(lm)} == {"q_proj", "down_proj"}
    with pytest.raises(UsageError, match=r"(?s)attention_q.*down_proj"):
        add_lora(make("llama"), 2, 4, targets=["attention_q"])
    with pytest.raises(UsageError, match=r"no adapter 'other'"), adapter_on(lm, "other"):
        pass
    with pytest.raises(UsageError, match="no adapter to switch"), adapter_off(make("llama")):
        pass


def test_the_seed_fixes_the_adapter_and_spares_the_global_generator(make):
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first, second = add_lora(make("llama"), 2, 4, seed=1), add_lora(make("llama"), 2, 4, seed=1)
    assert torch.equal(state, torch.get_rng_state()) and fingerprint(first) == fingerprint(second)
    assert fingerprint(add_lora(make("llama"), 2, 4, seed=2)) != fingerprint(first)
