"""Packed rows with shared prompts give each text's own plain forward: log-probabilities and gradients, per architecture."""

from __future__ import annotations

import pytest
import torch

from tilt.data.packing import pack
from tilt.data.rollouts import Prompt, Rollout
from tilt.linear_head import plain
from tilt.models import compat
from tilt.models.policy import Policy

REQUIRED = ["qwen3", "qwen2", "llama", "gpt2", "gemma3_text", "mistral"]
FURTHER = ["gemma2", "granite", "cohere", "gpt_oss"]
PLAIN = {"gemma2": "eager", "gpt_oss": "eager"}


def gradients(lm, loss):
    lm.zero_grad()
    loss.backward()
    return {n: p.grad.clone() for n, p in lm.named_parameters() if p.grad is not None}


def compare(lm, rollouts, alone, kind, tolerance):
    policy = Policy(lm, chunk=3)
    assert compat.is_packed(lm) and policy.note == ""
    batch = pack(rollouts)
    weights = torch.linspace(-1, 1, len(batch.actions), dtype=compat.dtype_of(lm))
    packed = policy(batch, temperature=0.7).logprobs
    packed_gradients = gradients(lm, (weights * packed).sum())
    compat.use_attention(lm, PLAIN.get(kind, "sdpa"))
    plain = alone(lm, rollouts, 0.7)
    plain_gradients = gradients(lm, (weights * plain).sum())
    assert plain.std() > 0.3, "the model should prefer some tokens"
    torch.testing.assert_close(packed, plain, atol=tolerance, rtol=0)
    assert packed_gradients.keys() == plain_gradients.keys()
    for name, gradient in plain_gradients.items():
        torch.testing.assert_close(
            packed_gradients[name], gradient, atol=tolerance * max(1.0, float(gradient.abs().max())), rtol=0, msg=name
        )


@pytest.mark.parametrize("kind", REQUIRED + FURTHER)
def test_float32(kind, make, rollouts, alone):
    compare(make(kind), rollouts, alone, kind, 1e-5)


@pytest.mark.parametrize("kind", REQUIRED)
def test_float64(kind, make, rollouts, alone):
    """Where an architecture norms or rotates in float32, a last bit can flip there: 1e-7 instead of 1e-10."""
    with plain():  # norms that do not round differ from those that do: tests/models/test_straight.py
        compare(make(kind, torch.float64), rollouts, alone, kind, 1e-10 if kind == "gpt2" else 2e-7)


def texts(shape):
    prompts = [Prompt(tuple(range(i + 1, i + 1 + n)), i) for i, (n, _) in enumerate(shape)]
    return [
        Rollout.demonstration(p, tuple((7 * i + j) % 48 for j in range(n)))
        for p, (_, lengths) in zip(prompts, shape, strict=True)
        for i, n in enumerate(lengths)
    ]


@pytest.mark.parametrize(
    "shape",
    [[(1, [1])], [(5, [1])], [(1, [9, 1])], [(12, [1, 1, 1])], [(3, [2]), (8, [5]), (1, [7])], [(2, [6, 6]), (13, [1, 8, 3])]],
    ids=["one token each", "one answer of one token", "one-token prompt", "one-token answers", "one answer each", "two groups"],
)
@pytest.mark.parametrize("kind", ["qwen3", "gemma3_text", "gpt2"])
def test_shapes(kind, shape, make, alone):
    """Also where the window (4) is shorter than prompt, answer, or both."""
    lm, rollouts = make(kind), texts(shape)
    packed = Policy(lm)(pack(rollouts)).logprobs
    compat.use_attention(lm, "sdpa")
    torch.testing.assert_close(packed, alone(lm, rollouts), atol=1e-5, rtol=0)


def test_texts_without_prompt_only(make, alone):
    lm = make("mistral")
    rollouts = [Rollout.demonstration(Prompt((), i), tuple(range(i, i + n)), (False, *[True] * (n - 1))) for i, n in enumerate([6, 2, 9])]
    packed = Policy(lm)(pack(rollouts)).logprobs
    compat.use_attention(lm, "sdpa")
    torch.testing.assert_close(packed, alone(lm, rollouts), atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", ["qwen3", "gemma3_text"])
def test_company_changes_nothing(kind, make, rollouts):
    """A part of a pack, in any order, says of each sequence what the whole pack says."""
    policy, whole = Policy(make(kind)), pack(rollouts)
    everything = policy(whole).logprobs
    for part in ([3], [4, 0], [2, 1, 3]):
        index = torch.tensor(part)
        torch.testing.assert_close(policy(whole.take(index)).logprobs, everything[whole.layout.actions_of(index)], atol=1e-5, rtol=0)


def test_the_prompt_is_read_once(make, rollouts):
    """T counts each shared prompt once: 9 + 6 + 1 + 4 and 3 + 11 and 7 tokens."""
    assert Policy(make("llama")).hidden(pack(rollouts)).shape == (20 + 14 + 7, 32)


def test_entropy_temperature_and_values(make, batch, rollouts):
    policy = Policy(make("qwen3", torch.float64), value_head=True)
    torch.nn.init.normal_(policy.value_head.weight)
    said = policy(batch, temperature=0.5, entropy=True, values=True)
    hidden = policy.hidden(batch)
    logits = policy.head(hidden[batch.predictors]) / 0.5
    p = torch.softmax(logits, -1)
    torch.testing.assert_close(said.entropy, -(p * p.log()).sum(-1))
    torch.testing.assert_close(said.logprobs, p.log()[torch.arange(len(p)), batch.actions])
    values = (hidden * policy.value_head.weight[0]).sum(-1)
    torch.testing.assert_close(said.values, values[batch.predictors])
    torch.testing.assert_close(said.final, values[batch.last_tokens])
    assert torch.isnan(policy(batch).values).all() and torch.isnan(policy(batch).entropy).all() and torch.isnan(policy(batch).final).all()


@pytest.mark.parametrize("kind", ["mamba", "recurrent_gemma", "bloom"])
def test_padded_fallback(kind, make, rollouts, alone):
    """Architectures that cannot run packed rows are scored in padded batches, exactly, and say so."""
    lm = make(kind)
    policy = Policy(lm, value_head=True)
    assert not compat.is_packed(lm) and "padded batches" in policy.note and type(lm).__name__ in policy.note
    batch = pack(rollouts)
    weights = torch.linspace(-1, 1, len(batch.actions))
    packed, plain = policy(batch).logprobs, alone(lm, rollouts)
    torch.testing.assert_close(packed, plain, atol=1e-5, rtol=0)
    ours, theirs = gradients(lm, (weights * packed).sum()), gradients(lm, (weights * plain).sum())
    for name, gradient in theirs.items():
        torch.testing.assert_close(ours[name], gradient, atol=1e-5 * max(1.0, float(gradient.abs().max())), rtol=0, msg=name)
    assert policy(batch, values=True).final.shape == (5,)


def test_gradient_checkpointing_keeps_the_layout(make, batch):
    lm = make("qwen3")
    policy = Policy(lm)
    plain = gradients(lm, policy(batch).logprobs.sum())
    compat.recompute_activations(lm)
    lm.train()
    again = gradients(lm, policy(batch).logprobs.sum())
    for name, gradient in plain.items():
        torch.testing.assert_close(again[name], gradient, atol=1e-5, rtol=1e-4, msg=name)
