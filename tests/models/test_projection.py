"""LoRA straight from the weights, in training and in drawing, against peft's own modules; and which of peft's options go through them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import numpy as np
import peft
import pytest
import torch
from decoders import build, exact_norms  # noqa: F401
from torch import Tensor
from transformers import PreTrainedModel

from tilt.data.packing import Pack, pack
from tilt.data.rollouts import Prompt, Rollout
from tilt.linear_head import plain
from tilt.models import compat, straight
from tilt.models.adapters import adapter_off, adapter_on, add_lora
from tilt.models.anatomy import is_common
from tilt.models.policy import Policy
from tilt.models.projection import adapters_of, matrix_of
from tilt.sampling.forward import Cached, forward_of
from tilt.sampling.lean import Lean


def moved(lm: PreTrainedModel, size: float = 0.3) -> PreTrainedModel:
    """Adapters that do something: B is zero at first."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in lm.named_parameters():
            if "lora_" in name:
                parameter.add_(size * torch.randn(parameter.shape, generator=generator).to(parameter.dtype))
    return lm


def injected(lm: PreTrainedModel, **options: Any) -> PreTrainedModel:
    """An adapter of peft's own making, with any of its options."""
    given = {"r": 3, "lora_alpha": 6, "target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"} | options
    peft.inject_adapter_in_model(peft.LoraConfig(**given), lm)
    for name, parameter in lm.named_parameters():
        parameter.data = parameter.data.to(compat.dtype_of(lm))
        parameter.requires_grad_("lora_" in name)
    return lm


def two(lm: PreTrainedModel) -> PreTrainedModel:
    """Two adapters of unlike ranks on some of the same layers, both on."""
    add_lora(lm, 2, 4.0, ["q_proj", "up_proj"], name="first")
    add_lora(lm, 3, 4.0, name="second")
    for layer in lm.modules():
        if hasattr(layer, "lora_A"):
            layer._active_adapter = ["first", "second"]
    return lm


def thawed(lm: PreTrainedModel) -> PreTrainedModel:
    return add_lora(lm, 2, 4.0).requires_grad_(True)


KINDS: dict[str, tuple[str, Callable[[PreTrainedModel], PreTrainedModel]]] = {
    "all-linear": ("qwen3", lambda lm: add_lora(lm, 3, 8.0)),
    "every bias": ("llama with every bias", lambda lm: add_lora(lm, 3, 8.0)),
    "norms after": ("gemma3", lambda lm: add_lora(lm, 2, 8.0)),
    "some kinds of layer": ("qwen2", lambda lm: add_lora(lm, 2, 8.0, ["v_proj", "o_proj", "gate_proj"])),
    "one layer alone": ("mistral", lambda lm: add_lora(lm, 2, 8.0, ["layers.1.self_attn.k_proj"])),
    "rank-stabilised": ("qwen3", lambda lm: injected(lm, use_rslora=True)),
    "two adapters": ("qwen3", two),
    "base trained too": ("qwen3 with biases", thawed),
}


def adapted(name: str, dtype: torch.dtype = torch.float64) -> PreTrainedModel:
    kind, adapt = KINDS[name]
    lm = moved(adapt(build(kind, dtype)))
    assert is_common(compat.body_of(lm)) and straight.fits(compat.body_of(lm))
    return lm


def uncopied(layer: Any) -> Tensor:
    assert not adapters_of(layer), "a copy of large weights"
    return matrix_of(layer).weight.detach()


def batch() -> Pack:
    """Three answers to one prompt, one to another, of 1 to 30 tokens."""
    generator = torch.Generator().manual_seed(3)

    def draw(n: int) -> tuple[int, ...]:
        return tuple(torch.randint(0, 29, (n,), generator=generator).tolist())

    first, second = Prompt(draw(9), 0), Prompt(draw(2), 1)
    return pack([Rollout.demonstration(p, draw(n)) for p, n in ((first, 6), (first, 1), (first, 30), (second, 5))])


def said(lm: PreTrainedModel) -> tuple[Tensor, dict[str, Tensor]]:
    """Log-probabilities and the gradient of a fixed sum of them for every weight that is trained."""
    lm.zero_grad(set_to_none=True)
    found = Policy(lm)(batch()).logprobs
    (found * torch.linspace(-1, 2, len(found), dtype=found.dtype)).sum().backward()
    return found.detach(), {name: p.grad for name, p in lm.named_parameters() if p.grad is not None}


def compared(lm: PreTrainedModel, bound: float) -> dict[str, Tensor]:
    found, gradient = said(lm)
    with plain():
        wanted, truth = said(lm)
    torch.testing.assert_close(found, wanted, rtol=bound, atol=bound)
    assert gradient.keys() == truth.keys()
    for name, slope in truth.items():
        assert float((gradient[name] - slope).norm()) <= bound * float(slope.norm()), name
    return gradient


pytestmark = pytest.mark.filterwarnings("ignore:Already found a `peft_config`")


@pytest.mark.usefixtures("exact_norms")
@pytest.mark.parametrize("name", KINDS)
def test_logprobs_and_gradients_are_the_modules(name: str) -> None:
    lm = adapted(name)
    gradient = compared(lm, 1e-9)
    trained = {n for n, p in lm.named_parameters() if p.requires_grad}
    inactive = {n for n in trained if "lm_head" in n and name != "base trained too"}
    assert gradient.keys() == trained - inactive, "of frozen weights there is no gradient"
    assert all(float(slope.norm()) > 0 for slope in gradient.values())


@pytest.mark.parametrize("name", ["all-linear", "every bias", "two adapters", "base trained too"])
def test_float32(name: str) -> None:
    compared(adapted(name, torch.float32), 1e-4)


@pytest.mark.usefixtures("exact_norms")
@pytest.mark.parametrize("fused", [2**28, 0])
@pytest.mark.parametrize("name", KINDS)
@torch.inference_mode()
def test_drawing_reads_the_adapters(name: str, fused: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Merged into a copy, or beside weights of which there is no copy: hidden states are the modules', also after an update and with the adapter off."""
    monkeypatch.setattr("tilt.sampling.lean.FUSED_BYTES", fused)
    if not fused:
        monkeypatch.setattr("tilt.sampling.lean.merged", uncopied)
    lm = adapted(name)

    def walked(lean: bool) -> Tensor:
        forward = forward_of(lm, 8, lean=lean)
        assert isinstance(forward, Cached) and isinstance(forward.body, Lean) == lean
        parts = [forward.prefill([np.arange(7), np.arange(3) + 20], 0)]
        forward.arrange(np.array([0, 1, 1]))
        parts += [forward.decode(np.array([5, 6, 7]) + step, np.full(3, step)) for step in range(4)]
        return torch.cat(parts)

    seen = []
    for role in (nullcontext(), nullcontext(), adapter_off(lm)):
        with role:
            seen.append((walked(True), walked(False)))
        moved(lm)
    for lean, modules in seen:
        assert (lean - modules).abs().max() < 1e-9
    assert all((one[0] - other[0]).abs().max() > 1e-3 for one, other in ((seen[0], seen[1]), (seen[0], seen[2]), (seen[1], seen[2])))


@pytest.mark.usefixtures("exact_norms")
def test_roles_are_switched_from_pass_to_pass() -> None:
    """Off is the base to the last bit, one adapter alone is itself, and a reference asked between forward and backward leaves the gradient what it is."""
    base = Policy(build("qwen3"))(batch()).logprobs.detach()
    lm = moved(two(build("qwen3")))
    both, truth = said(lm)
    with adapter_off(lm):
        assert torch.equal(Policy(lm)(batch()).logprobs, base)
    with adapter_on(lm, "first"):
        first = Policy(lm)(batch()).logprobs.detach()
        with plain():
            torch.testing.assert_close(Policy(lm)(batch()).logprobs.detach(), first, rtol=1e-9, atol=1e-9)
    assert not torch.allclose(first, both, atol=1e-3) and not torch.allclose(first, base, atol=1e-3)
    lm.zero_grad(set_to_none=True)
    found = Policy(lm)(batch()).logprobs
    with torch.no_grad(), adapter_off(lm):
        Policy(lm)(batch())
    (found * torch.linspace(-1, 2, len(found), dtype=found.dtype)).sum().backward()
    for name, parameter in lm.named_parameters():
        assert (parameter.grad is None) == (name not in truth)
        assert parameter.grad is None or torch.equal(parameter.grad, truth[name])


def merge(lm: PreTrainedModel) -> PreTrainedModel:
    for layer in lm.modules():
        if hasattr(layer, "lora_A"):
            layer.merge()
    return lm


def of_its_own(lm: PreTrainedModel) -> PreTrainedModel:
    body: Any = compat.body_of(lm)
    body.layers[1].mlp.down_proj.base_layer = torch.nn.Sequential(body.layers[1].mlp.down_proj.base_layer)
    return lm


STRANGE: dict[str, Callable[[PreTrainedModel], PreTrainedModel]] = {
    "weight-decomposed": lambda lm: injected(lm, use_dora=True),
    "activated by a token": lambda lm: injected(lm, alora_invocation_tokens=[1]),
    "biases": lambda lm: injected(lm, lora_bias=True),
    "dropout": lambda lm: injected(lm, lora_dropout=0.1),
    "embeddings": lambda lm: injected(lm, target_modules=["embed_tokens"]),
    "merged": lambda lm: merge(injected(lm)),
    "a base that is no matrix": lambda lm: of_its_own(injected(lm)),
    "IA3": lambda lm: peft.inject_adapter_in_model(
        peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"], task_type="CAUSAL_LM"), lm
    ),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", STRANGE)
def test_what_peft_alone_knows_goes_through_its_modules(name: str) -> None:
    lm = STRANGE[name](build("llama with every bias", torch.float32))
    assert not is_common(compat.body_of(lm)) and not straight.fits(compat.body_of(lm))
    with torch.no_grad():
        found = Policy(lm)(batch()).logprobs
        with plain():
            torch.testing.assert_close(Policy(lm)(batch()).logprobs, found, rtol=0, atol=1e-5)


def test_a_second_derivative_is_refused() -> None:
    lm = adapted("all-linear")
    weight = next(p for name, p in lm.named_parameters() if "lora_A" in name)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        torch.autograd.grad(Policy(lm)(batch()).logprobs.square().sum(), weight, create_graph=True)
