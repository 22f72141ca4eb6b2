"""The lean path against the model's own modules: hidden states in float64, log-probabilities in float32; and which models take it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from decoders import BASE, KINDS, MIXED, build, exact_norms  # noqa: F401
from torch import Tensor, nn
from transformers import PreTrainedModel

from tilt.models import compat
from tilt.models.anatomy import is_common
from tilt.models.heads import head_function
from tilt.sampling.cache import Decode, Store
from tilt.sampling.forward import Forward, forward_of
from tilt.sampling.lean import FUSED_BYTES, Lean


def walk(forward: Forward, vocabulary: int = 29) -> Iterator[Tensor]:
    """Hidden states of a fixed course: prompts of 1 to 300 tokens, groups of one and of several, rows at different places that leave and enter."""
    rng = np.random.default_rng(0)

    def words(n: int) -> Any:
        return rng.integers(0, vocabulary, n)

    yield forward.prefill([words(5), words(1), words(300)], 0)
    forward.arrange(np.array([0, 1, 2, 0, 2, 2]))
    for step in range(9):
        yield forward.decode(words(6), np.full(6, step))
    yield forward.prefill([words(7)], 3)
    forward.move_rows(np.array([5]), np.array([1]))
    forward.move_groups(np.array([3]), np.array([1]), 3)
    forward.arrange(np.array([0, 2, 2, 0, 2, 1, 1]))
    for step in range(20):
        yield forward.decode(words(7), np.array([9, 9, 9, 9, 9, 0, 0]) + step)
    forward.arrange(np.array([0, 2, 2]))
    yield forward.decode(words(3), np.array([29, 29, 29]))


@pytest.mark.usefixtures("exact_norms")
@pytest.mark.parametrize("name", KINDS)
@torch.inference_mode()
def test_hidden_states_are_the_modules(name: str) -> None:
    """Float64 to 1e-9, on prompts of unequal lengths, groups of one, windows shorter than the texts, with the rows out of order."""
    lm = build(name)
    assert is_common(compat.body_of(lm))
    pairs = list(zip(walk(forward_of(lm, 8)), walk(forward_of(lm, 8, lean=False)), strict=True))
    assert len(pairs) == 32
    for lean, modules in pairs:
        assert lean.shape == modules.shape and modules.std() > 0.1
        assert (lean - modules).abs().max() < 1e-9


@pytest.mark.parametrize("name", KINDS)
@torch.inference_mode()
def test_float32_logprobs_are_the_modules(name: str) -> None:
    """As the modules really are, to 1e-5, also where every product is taken by the layers themselves."""
    lm = build(name, torch.float32)
    head = head_function(lm)
    for lean, modules in zip(walk(forward_of(lm, 8)), walk(forward_of(lm, 8, lean=False)), strict=True):
        assert (head(lean).log_softmax(-1) - head(modules).log_softmax(-1)).abs().max() < 1e-5


@pytest.mark.usefixtures("exact_norms")
@pytest.mark.parametrize("name", ["qwen3 with biases", "llama", "gemma3"])
@torch.inference_mode()
def test_large_weights_are_not_copied_and_give_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert FUSED_BYTES > 2**20
    lm = build(name)
    fused = list(walk(forward_of(lm, 8)))
    monkeypatch.setattr("tilt.sampling.lean.FUSED_BYTES", 0)
    for a, b in zip(fused, walk(forward_of(lm, 8)), strict=True):
        assert (a - b).abs().max() < 1e-9


@torch.inference_mode()
def test_bfloat16_stays_near_float32() -> None:
    """Half precision weights: norms, softmax and angles in float32; hidden states as near to float32's as the modules' own are, give or take a half."""
    lm = build("qwen3", torch.float32)
    exact = list(walk(forward_of(lm, 8)))
    half = lm.to(torch.bfloat16)
    lean = [h.float() for h in walk(forward_of(half, 8))]
    modules = [h.float() for h in walk(forward_of(half, 8, lean=False))]

    def error(found: list[Tensor]) -> float:
        return sum(float((a - b).square().mean()) for a, b in zip(found, exact, strict=True)) ** 0.5

    assert error(lean) < 1.5 * error(modules)


@torch.inference_mode()
def test_weights_are_those_of_the_moment() -> None:
    """Changed in place, behind autograd's back, between two generations: the next forward has them, fused or not."""
    lm = build("qwen2")
    before = next(iter(walk(forward_of(lm, 8))))
    for parameter in lm.parameters():
        parameter.data.mul_(1.5)
    changed, modules = (next(iter(walk(forward_of(lm, 8, lean=lean)))) for lean in (True, False))
    assert (changed - before).abs().max() > 0.1
    assert (changed - modules).abs().max() < 1e-5


def test_what_is_not_the_common_decoder_runs_through_its_modules() -> None:
    """Other architectures, hooks, replaced forwards, strange layers, settings and dtypes."""

    def common(lm: PreTrainedModel) -> bool:
        return is_common(compat.body_of(lm))

    strange: list[PreTrainedModel] = [build(kind) for kind in ("gemma2", "phi3", "olmo2")]
    dynamic = {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}
    strange.append(compat.causal_lm_from_config(compat.config_for("llama", **(BASE | dynamic))))
    for change in range(7):
        body: Any = compat.body_of(lm := build("qwen3"))
        assert common(lm)
        block = body.layers[1]
        if change == 0:
            block.mlp.up_proj.register_forward_hook(lambda *_: None)
        elif change == 1:
            block.self_attn.forward = block.self_attn.forward
        elif change == 2:
            block.mlp.down_proj = nn.Sequential(block.mlp.down_proj)
        elif change == 3:
            block.self_attn.softcap = 3.0
        elif change == 4:
            block.self_attn.is_causal = False
        elif change == 5:
            block.mlp.up_proj.to(torch.float32)
        else:
            block.self_attn.extra = nn.Linear(2, 2).double()
        strange.append(lm)
    for number, lm in enumerate(strange):
        assert not common(lm), number
    assert isinstance(forward_of(build("llama"), 2).body, Lean)  # type: ignore[attr-defined]
    assert not isinstance(forward_of(strange[-1], 2).body, Lean)  # type: ignore[attr-defined]


@pytest.mark.parametrize("window", [None, 4, 9])
@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("group", [[0, 0, 1, 1], [0, 1, 1, 0, 2]])
def test_attention_in_turn_is_attention_at_once(window: int | None, sinks: bool, group: list[int]) -> None:
    """The prompt by the fused kernel and then the answer, against one softmax over both; float64 to 1e-12. Some rows' windows have left their prompt."""
    lengths, heads, kv_heads, width = np.array([2, 7, 5])[: max(group) + 1], 6, 2, 4
    rows = len(group)
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    prompts, answers = Store(len(lengths), 7), Store(rows, 8)
    prompts.layers[0] = (draw(len(lengths), kv_heads, 7, width), draw(len(lengths), kv_heads, 7, width))
    answers.layers[0] = (draw(rows, kv_heads, 8, width), draw(rows, kv_heads, 8, width))
    plan = Decode(prompts, answers, torch.device("cpu"))
    plan.arrange(np.array(group), lengths)
    plan.advance(np.array([3, 7, 0, 5, 1])[:rows])
    q, sink = draw(rows, heads, width) * 3, draw(heads) if sinks else None
    keys, values = prompts.layers[0]
    own = [x[:, :, : plan.longest].flatten(0, 1) for x in answers.layers[0]]
    found = plan._in_turn(q, keys, values, own[0], own[1], 0.4, window, sink)
    truth = plan._at_once(q * 0.4, keys.flatten(0, 1), values.flatten(0, 1), own[0], own[1], window, None, sink)
    assert (found - truth).abs().max() < 1e-12
    for row in range(rows):  # a loop over what the row sees
        place = int(lengths[group[row]])
        seen = [("p", i) for i in range(place)] + [("a", i) for i in range(int(plan.answered[row]) + 1)]
        seen = [s for s in seen if window is None or place + plan.answered[row] - (s[1] + (place if s[0] == "a" else 0)) < window]
        for head in range(heads):
            k = torch.stack([(keys[group[row]] if s[0] == "p" else answers.layers[0][0][row])[head // 3, s[1]] for s in seen])
            v = torch.stack([(values[group[row]] if s[0] == "p" else answers.layers[0][1][row])[head // 3, s[1]] for s in seen])
            scores = k @ q[row, head] * 0.4
            scores = scores if sink is None else torch.cat((scores, sink[head : head + 1]))
            assert (scores.softmax(0)[: len(seen)] @ v - found[row, head]).abs().max() < 1e-12
