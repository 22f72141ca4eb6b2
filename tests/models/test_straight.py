"""The training forward straight from the weights, against the model's own modules: hidden states and every gradient; and which models take it."""

from __future__ import annotations

import pytest
import torch
from decoders import KINDS, build, exact_norms  # noqa: F401
from torch import Tensor
from transformers import PreTrainedModel

from tilt.data.packing import Pack, pack
from tilt.data.rollouts import Prompt, Rollout
from tilt.linear_head import plain
from tilt.models import compat, straight
from tilt.models.heads import hidden_states


def batch() -> Pack:
    """Three answers to one prompt, one to another, of 1 to 40 tokens."""
    generator = torch.Generator().manual_seed(3)

    def draw(n: int) -> tuple[int, ...]:
        return tuple(torch.randint(0, 29, (n,), generator=generator).tolist())

    first, second = Prompt(draw(9), 0), Prompt(draw(2), 1)
    return pack([Rollout.demonstration(p, draw(n)) for p, n in ((first, 6), (first, 1), (first, 40), (second, 5))])


def said(lm: PreTrainedModel, row: Pack) -> tuple[Tensor, dict[str, Tensor]]:
    """Hidden states, and the gradient of a fixed projection of them for every weight of the body."""
    found = hidden_states(lm, row)
    slopes = torch.randn(found.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64).to(found.dtype)
    names, parameters = zip(*compat.body_of(lm).named_parameters(), strict=True)
    return found.detach(), dict(zip(names, torch.autograd.grad((found * slopes).sum(), parameters), strict=True))


@pytest.mark.usefixtures("exact_norms")
@pytest.mark.parametrize("kind", KINDS)
def test_the_modules_hidden_states_and_gradients(kind: str) -> None:
    lm, row = build(kind), batch()
    assert straight.fits(compat.body_of(lm))
    found, gradient = said(lm, row)
    with plain():
        assert not straight.fits(compat.body_of(lm))
        wanted, truth = said(lm, row)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-9 * float(wanted.abs().max()))
    for name, slope in truth.items():
        assert float((gradient[name] - slope).norm()) <= 1e-9 * float(slope.norm()), name


@pytest.mark.parametrize("kind", KINDS)
def test_float32(kind: str) -> None:
    lm, row = build(kind, torch.float32), batch()
    found, gradient = said(lm, row)
    with plain():
        wanted, truth = said(lm, row)
    torch.testing.assert_close(found, wanted, rtol=0, atol=2e-5 * float(wanted.abs().max()))
    for name, slope in truth.items():
        assert float((gradient[name] - slope).norm()) <= 1e-4 * float(slope.norm()), name


@pytest.mark.usefixtures("exact_norms")
@pytest.mark.parametrize("kind", ["qwen3 with windows", "llama with every bias", "gemma3"])
def test_the_last_layer_asks_where_something_is_wanted(kind: str) -> None:
    """Predictors and last tokens, in any order and more than once: values and gradients are those of the whole row."""
    lm, row = build(kind), batch()
    at = torch.cat([row.predictors, row.last_tokens])
    parameters = list(compat.body_of(lm).parameters())
    slopes = torch.randn(len(at), 24, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    found, wanted = hidden_states(lm, row, at), hidden_states(lm, row)[at]
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-9 * float(wanted.abs().max()))
    for one, other in zip(*(torch.autograd.grad((x * slopes).sum(), parameters) for x in (found, wanted)), strict=True):
        assert float((one - other).norm()) <= 1e-9 * float(other.norm())


def test_what_the_modules_alone_know() -> None:
    """Hooks, other architectures, half precision, autocast, recomputed activations and dropout go through the modules."""
    lm = build("qwen3", torch.float32)
    body = compat.body_of(lm)
    assert straight.fits(body)
    with torch.autocast("cpu", torch.bfloat16):
        assert not straight.fits(body)
    handle = body.layers[0].mlp.register_forward_hook(lambda *_: None)
    assert not straight.fits(body)
    handle.remove()
    body.layers[1].self_attn.attention_dropout = 0.1
    assert straight.fits(body) and not straight.fits(body.train())
    body.layers[1].self_attn.attention_dropout = 0.0
    compat.recompute_activations(lm)
    assert not straight.fits(body.train())
    assert not straight.fits(compat.body_of(build("qwen3", torch.bfloat16)))
    assert not straight.fits(compat.body_of(build("gpt2", torch.float32)))


def test_frozen_weights_get_no_gradient_and_the_rest_do() -> None:
    lm, row = build("qwen3"), batch()
    body = compat.body_of(lm)
    for name, parameter in body.named_parameters():
        parameter.requires_grad_("mlp" in name)
    hidden_states(lm, row).square().sum().backward()  # type: ignore[no-untyped-call]
    assert all((p.grad is not None) == ("mlp" in n) for n, p in body.named_parameters())


def test_a_second_derivative_is_refused() -> None:
    lm, row = build("qwen3"), batch()
    weight = compat.body_of(lm).layers[0].mlp.up_proj.weight
    with pytest.raises(RuntimeError, match="differentiate twice"):
        torch.autograd.grad(hidden_states(lm, row).square().sum(), weight, create_graph=True)
