"""Exact KL in the policy's forward pass: with a reference, with the adapter switched off, and with what the policy was before its weights changed."""

from __future__ import annotations

import copy

import pytest
import torch

from tilt.data.packing import pack
from tilt.distributions import Anchor
from tilt.models import compat
from tilt.models.adapters import adapter_off, add_lora
from tilt.models.attention import twice_differentiable
from tilt.models.heads import frozen_head, head_function
from tilt.models.policy import Policy
from tilt.optim.trust_region import hessian_product


def logits(policy, batch):
    return policy.head(policy.hidden(batch)[batch.predictors]) / 0.7


def shifted(lm, by: float = 0.1):
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for p in lm.parameters():
            if p.requires_grad:
                p.add_(by * torch.randn(p.shape, generator=generator, dtype=p.dtype))
    return lm


def agrees(policy, batch, anchor: Anchor, other: torch.Tensor) -> None:
    """KL and its gradient equal the plain sums over the vocabulary."""
    trained = [p for p in policy.parameters() if p.requires_grad]
    said = policy(batch, temperature=0.7, against=anchor)
    weights = torch.linspace(0.5, 2, len(said.kl), dtype=torch.float64)
    found = torch.autograd.grad((weights * said.kl).sum(), trained)
    p, q = logits(policy, batch).log_softmax(-1), other.detach().log_softmax(-1)
    p, q = (p, q) if anchor.direction == "to" else (q, p)
    plain = (p.exp() * (p - q)).sum(-1)
    assert plain.min() > 1e-6 and (said.kl - plain).abs().max() < 1e-10
    expected = torch.autograd.grad((weights * plain).sum(), trained)
    assert max(float((a - b).abs().max()) for a, b in zip(found, expected, strict=True)) < 1e-10
    assert max(float(b.abs().max()) for b in expected) > 1e-3


@pytest.mark.parametrize("direction", ["to", "from"])
def test_with_a_reference_of_its_own(make, batch, direction):
    lm = make("gpt2", torch.float64)
    policy, reference = Policy(lm, chunk=3), Policy(shifted(copy.deepcopy(lm)))
    reference.requires_grad_(False)
    anchor = Anchor(reference.before_actions(batch), frozen_head(reference.lm), direction)
    agrees(policy, batch, anchor, logits(reference, batch))


def test_with_the_adapter_off(make, batch):
    lm = make("gpt2", torch.float64)
    policy = Policy(shifted(add_lora(lm, 2, 4.0)), chunk=3)
    with adapter_off(policy.lm):
        anchor, other = Anchor(policy.before_actions(batch), frozen_head(policy.lm), "to"), logits(policy, batch)
    agrees(policy, batch, anchor, other)


@pytest.mark.parametrize("lora", [False, True])
def test_with_the_policy_of_a_moment_ago(make, batch, lora):
    """The head is copied where it is trained, and shared where it is frozen."""
    lm = make("gpt2", torch.float64)
    policy = Policy(add_lora(lm, 2, 4.0) if lora else lm, chunk=3)
    anchor, other = Anchor(policy.before_actions(batch), frozen_head(policy.lm), "from"), logits(policy, batch).detach()
    assert not anchor.hidden.requires_grad
    shifted(policy.lm)
    agrees(policy, batch, anchor, other)
    said = policy(batch)
    assert said.kl.isnan().all(), "nobody asked"


def test_a_trained_head_is_copied_and_a_frozen_one_is_not(make):
    lm = make("qwen3")
    own = compat.head_of(lm).weight
    hidden = torch.randn(2, own.shape[1])
    kept, live = frozen_head(lm), head_function(lm)
    before = live(hidden).detach().clone()
    with torch.no_grad():
        own.add_(1.0)
    assert torch.equal(kept(hidden), before) and not torch.equal(live(hidden), before)
    shared = frozen_head(lm.requires_grad_(False))
    with torch.no_grad():
        own.add_(1.0)
    assert torch.equal(shared(hidden), live(hidden))


def test_values_and_entropies_come_beside_it(make, batch):
    policy = Policy(make("gpt2", torch.float64), value_head=True)
    anchor = Anchor(policy.before_actions(batch), frozen_head(policy.lm), "to")
    said = policy(batch, entropy=True, values=True, against=anchor)
    assert (
        said.kl.abs().max() < 1e-12 and (said.entropy > 0).all() and not said.values.any() and said.final.shape == (batch.layout.sequences,)
    )


@pytest.mark.parametrize("kind", ["qwen3", "llama", "gpt2", "gemma3_text", "mistral", "gemma2"])
def test_packed_rows_have_second_derivatives(kind, make, rollouts, alone):
    """The Hessian of a function of the log-probabilities times a vector equals that of each text alone under plain attention."""
    lm, batch = make(kind, torch.float64), pack(rollouts)
    parameters = list(lm.parameters())
    generator = torch.Generator().manual_seed(3)
    vector = [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in parameters]
    slopes = torch.linspace(-1, 1, len(batch.actions), dtype=torch.float64)
    with twice_differentiable():
        found = hessian_product(lambda: (slopes * Policy(lm, chunk=3)(batch).logprobs.exp()).sum(), parameters)(vector)
    compat.use_attention(lm, "eager")
    expected = hessian_product(lambda: (slopes * alone(lm, rollouts).exp()).sum(), parameters)(vector)
    scale = max(float(e.abs().max()) for e in expected)
    assert scale > 0.1 and max(float((a - b).abs().max()) for a, b in zip(found, expected, strict=True)) < 2e-6 * scale


def test_the_fused_attention_has_none(make, batch):
    lm = make("llama")
    with pytest.raises(RuntimeError, match="derivative|double backward|not implemented"):
        hessian_product(lambda: Policy(lm)(batch).logprobs.sum(), list(lm.parameters()))([torch.ones_like(p) for p in lm.parameters()])
