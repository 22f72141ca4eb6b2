"""FlexAttention over packs, as far as a CPU can tell: who sees whom against a written rule, the blocks, the forward, gradients by a stand-in kernel, and when it is not used."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from decoders import build
from torch import Tensor, nn
from torch.nn.attention.flex_attention import create_block_mask

from tilt import linear_head
from tilt.data.packing import Segments, pack
from tilt.models import compat, flex
from tilt.models.attention import PackedAttention
from tilt.models.flex import BLOCK, FlexAttention, Spans
from tilt.models.heads import hidden_states
from tilt.models.policy import Policy
from tilt.recipes import opening
from tilt.recipes.settings import Run

FORESTS = {
    "unequal prompts, one-token answers": ([0, 4, 7, 8, 13, 15], [4, 3, 1, 5, 2, 6], [-1, 0, 0, -1, -1, 4]),
    "one answer each": ([0, 3, 4, 9], [3, 1, 5, 1], [-1, 0, -1, 2]),
    "a text alone": ([0], [6], [-1]),
    "longer than blocks": ([0, 300, 420, 421, 700], [300, 120, 1, 279, 60], [-1, 0, 0, 0, -1]),
}
WINDOWS = [None, 1, 2, 5, 7, 100, 10**6]


def forest(name: str) -> Segments:
    return Segments(*(torch.tensor(x) for x in FORESTS[name]))


def seen(segments: Segments, token: int, window: int | None) -> set[int]:
    """The rule as it is told: the token's parent, its own segment up to itself, of these the latest `window`."""
    s = next(i for i in range(len(segments.start)) if 0 <= token - int(segments.start[i]) < int(segments.length[i]))
    parent = int(segments.parent[s])
    above = [] if parent < 0 else list(range(int(segments.start[parent]), int(segments.start[parent] + segments.length[parent])))
    path = [*above, *range(int(segments.start[s]), token + 1)]
    return set(path if window is None else path[-window:])


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("name", FORESTS)
def test_who_sees_whom_for_every_pair(name: str, window: int | None) -> None:
    segments = forest(name)
    total = int(segments.length.sum())
    for tokens in (torch.arange(total), FlexAttention.closing(segments)[1]):
        spans = Spans.of(segments, tokens, window).padded(len(tokens) + 3)
        every = spans.sees(torch.arange(len(tokens) + 3)[:, None], torch.arange(total + 2))
        assert [set(row.nonzero()[:, 0].tolist()) for row in every] == [*(seen(segments, t, window) for t in tokens.tolist()), *[set()] * 3]


def test_the_worked_example() -> None:
    spans = Spans.of(Segments(torch.tensor([0, 2, 5]), torch.tensor([2, 3, 2]), torch.tensor([-1, 0, 0])), torch.arange(7), None)
    assert spans.above.tolist() == [0] * 7 and spans.above_end.tolist() == [0, 0, 2, 2, 2, 2, 2]
    assert spans.own.tolist() == [0, 0, 2, 2, 2, 5, 5] and spans.own_end.tolist() == [1, 2, 3, 4, 5, 6, 7]


@pytest.mark.parametrize("window", [None, 70, 200])
@pytest.mark.parametrize("last", [False, True])
def test_blocks_are_those_of_the_whole_mask(window: int | None, last: bool) -> None:
    """Which are empty, partial and full: torch's own answer from every pair."""
    segments = forest("longer than blocks")
    tokens = FlexAttention.closing(segments)[1] if last else torch.arange(760)
    spans = Spans.of(segments, tokens, window).padded(6 * BLOCK)
    found = spans.mask(6 * BLOCK)
    truth = create_block_mask(lambda b, h, q, k: spans.sees(q, k), 1, 1, 6 * BLOCK, 6 * BLOCK, device="cpu", BLOCK_SIZE=BLOCK)
    for ours, theirs in (
        (listed(found.kv_num_blocks, found.kv_indices), listed(truth.kv_num_blocks, truth.kv_indices)),
        (listed(found.full_kv_num_blocks, found.full_kv_indices), listed(truth.full_kv_num_blocks, truth.full_kv_indices)),
        (listed(found.q_num_blocks, found.q_indices), listed(truth.q_num_blocks, truth.q_indices)),
    ):
        assert ours == theirs
    assert any(listed(found.kv_num_blocks, found.kv_indices)) and (window is not None or found.full_kv_num_blocks.any())
    assert 0 < found.sparsity() < 100


def listed(counts: Any, indices: Any) -> list[set[int]]:
    return [set(row[:n].tolist()) for n, row in zip(counts[0, 0].tolist(), indices[0, 0], strict=True)]


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("heads", [(4, 2), (4, 4), (6, 1)])
@pytest.mark.parametrize("kind", ["plain", "softcap", "sinks"])
def test_the_forward_is_the_present_one(heads: tuple[int, int], kind: str) -> None:
    """Float32, torch's kernel for CPUs: grouped heads, windows, caps and sinks; every token asking, and in a last layer."""
    generator = torch.Generator().manual_seed(0)
    softcap, sinks = 0.7 if kind == "softcap" else None, torch.linspace(-1, 1, heads[0]) if kind == "sinks" else None
    for name in FORESTS:
        segments = forest(name)
        q, k, v = (torch.randn(1, n, int(segments.length.sum()), 16, generator=generator) for n in (heads[0], heads[1], heads[1]))
        for window in (None, 3, 90):
            for last in (False, True):
                plan = FlexAttention.closing(segments)[0] if last else FlexAttention.of(segments)
                other = PackedAttention.closing(segments)[0] if last else PackedAttention.of(segments)
                given = q[:, :, plan.tokens]
                found = plan._in_one(given, k, v, 0.3, window, softcap, sinks)
                wanted = other.attend(given, k, v, layer=0, scaling=0.3, window=window, softcap=softcap, sinks=sinks)
                assert found.shape == wanted.shape
                torch.testing.assert_close(found, wanted, atol=5e-6, rtol=0)


# --- with a kernel that has gradients ---------------------------------------------------------------------------------------


def by_pairs(q: Tensor, k: Tensor, v: Tensor, mask: Any, scaling: float, cap: Tensor | None, sinks: Tensor | None) -> Tensor:
    """The kernel from the blocks that it would visit: the rule inside those that are partial, everything inside those that are full."""
    every = mask.mask_mod(None, None, torch.arange(q.shape[2])[:, None], torch.arange(k.shape[2]))
    blocks = [torch.zeros(q.shape[2] // BLOCK, k.shape[2] // BLOCK, dtype=torch.bool) for _ in range(2)]
    for found, counts, indices in zip(
        blocks, (mask.kv_num_blocks, mask.full_kv_num_blocks), (mask.kv_indices, mask.full_kv_indices), strict=True
    ):
        for row, columns in enumerate(listed(counts, indices)):
            found[row, list(columns)] = True
    partial, full = (b.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1) for b in blocks)
    groups = q.shape[1] // k.shape[1]
    scores = q @ k.repeat_interleave(groups, 1).transpose(2, 3) * scaling
    scores = (scores if cap is None else cap * torch.tanh(scores / cap)).masked_fill(~(full | (partial & every)), -torch.inf)
    if sinks is not None:
        scores = torch.cat([scores, sinks[None, :, None, None].expand(*scores.shape[:3], 1).to(scores.dtype)], 3)
    return torch.softmax(scores, 3)[..., : k.shape[2]].nan_to_num(0) @ v.repeat_interleave(groups, 1)


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Tensor]]:
    """FlexAttention allowed here, by the stand-in; the calls of the kernel. Every kind is yet to be tried."""
    calls: list[Tensor] = []

    def kernel(q: Tensor, *given: Any) -> Tensor:
        calls.append(q)
        return by_pairs(q, *given)

    monkeypatch.setattr(flex, "DEVICES", frozenset({"cpu"}))
    monkeypatch.setattr(flex, "WIDTHS", range(1, 257))
    monkeypatch.setattr(flex, "_judged", {})
    monkeypatch.setattr(flex, "kernel", kernel)
    yield calls


KINDS = ["qwen3", "qwen3 with windows", "llama with every bias", "mistral", "gemma3"]


@pytest.mark.parametrize("kind", [*KINDS, "gemma2", "gpt_oss", "gpt2"])
def test_whole_models_in_float32(kind: str, make: Any, rollouts: Any, on_cpu: list[Tensor]) -> None:
    """Log-probabilities and gradients against the plain padded forward, straight from weights and through modules."""
    lm = build(kind, torch.float32) if kind in KINDS else make(kind)
    batch = pack([r for r in rollouts if max((*r.prompt.tokens, *r.tokens)) < compat.head_of(lm).weight.shape[0]])
    if kind in KINDS:
        batch = pack([replaced(r) for r in rollouts])
    policy = Policy(lm.requires_grad_(True))
    weights = torch.linspace(-1, 1, len(batch.actions))

    def found() -> tuple[Tensor, Tensor]:
        lm.zero_grad()
        logprobs = policy(batch).logprobs
        (weights * logprobs).sum().backward()  # type: ignore[no-untyped-call]
        return logprobs.detach(), torch.cat([p.grad.flatten() for p in lm.parameters() if p.grad is not None])

    ours = found()
    assert on_cpu and not any(flex._judged.values())
    before = len(on_cpu)
    compat.use_attention(lm, "eager" if kind in ("gemma2", "gpt_oss") else "sdpa")
    with linear_head.plain():
        theirs = found()
    assert len(on_cpu) == before
    torch.testing.assert_close(ours[0], theirs[0], atol=2e-5, rtol=0)
    assert float((ours[1] - theirs[1]).norm() / theirs[1].norm()) < 1e-4


def replaced(rollout: Any) -> Any:
    """The same in a vocabulary of 29."""
    from dataclasses import replace

    return replace(
        rollout, prompt=replace(rollout.prompt, tokens=tuple(t % 29 for t in rollout.prompt.tokens)), tokens=tuple(t % 29 for t in rollout.tokens)
    )  # fmt: skip


def test_each_kind_is_tried_once_and_then_used(on_cpu: list[Tensor]) -> None:
    segments = forest("one answer each")
    q, k, v = (torch.randn(1, n, 10, 16) for n in (4, 2, 2))
    plan, given = FlexAttention.of(segments), {"layer": 0, "scaling": 0.3, "window": None, "softcap": None, "sinks": None}
    plan.attend(q, k, v, **given)
    tried = len(on_cpu)
    assert tried == 7  # two packs, two of them twice with a window, all twice, and the call itself
    with torch.inference_mode():
        plan.attend(q, k, v, **given)
    assert len(on_cpu) == tried + 1 and not any(flex._judged.values()) and not plan.bunches
    plan.attend(*(x.double() for x in (q, k, v)), **given)
    assert len(on_cpu) == tried + 1 and plan.bunches, "float64 goes in bunches"


@pytest.mark.parametrize("fault", ["forward", "gradient", "nan", "error"])
def test_what_differs_or_fails_is_not_used_and_said(fault: str, on_cpu: list[Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    plain = flex.kernel

    class Bent(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:  # type: ignore[override]
            return x.clone()

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Tensor:  # type: ignore[override]
            return g * 1.001

    def wrong(*given: Any) -> Tensor:
        out = plain(*given)
        if fault == "error":
            raise RuntimeError("no such kernel\nmore")
        return {"forward": out * 1.001, "gradient": Bent.apply(out), "nan": out * float("nan")}[fault]  # type: ignore[no-untyped-call]

    monkeypatch.setattr(flex, "kernel", wrong)
    segments = forest("one answer each")
    q, k, v = (torch.randn(1, n, 10, 16) for n in (4, 2, 2))
    given = {"layer": 0, "scaling": 0.3, "window": None, "softcap": None, "sinks": None}
    with pytest.warns(UserWarning, match="FlexAttention is not used for torch.float32 heads of width 16: " + ("no such kernel$" if fault == "error" else "its results differ")):  # fmt: skip
        out = flex.plan(segments).attend(q, k, v, **given)
    assert torch.equal(out, PackedAttention.of(segments).attend(q, k, v, **given))
    calls = len(on_cpu)
    assert torch.equal(flex.plan(segments).attend(q, k, v, **given), out) and len(on_cpu) == calls


def test_a_kernel_that_fails_later_is_left(on_cpu: list[Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    segments = forest("one answer each")
    q, k, v = (torch.randn(1, n, 10, 16) for n in (4, 2, 2))
    given = {"layer": 0, "scaling": 0.3, "window": None, "softcap": None, "sinks": None}
    flex.plan(segments).attend(q, k, v, **given)

    def failing(*_: Any) -> Tensor:
        raise RuntimeError("no such length")

    monkeypatch.setattr(flex, "kernel", failing)
    with pytest.warns(UserWarning, match="no such length"):
        out = flex.plan(segments).attend(q, k, v, **given)
    assert torch.equal(out, PackedAttention.of(segments).attend(q, k, v, **given))

    def full(*_: Any) -> Tensor:
        raise torch.OutOfMemoryError("too long")

    monkeypatch.setattr(flex, "_judged", {flex._name(q, k, v, None, None): ""})
    monkeypatch.setattr(flex, "kernel", full)
    with pytest.raises(torch.OutOfMemoryError):
        flex.plan(segments).attend(q, k, v, **given)


def test_two_switches(on_cpu: list[Tensor]) -> None:
    segments = forest("one answer each")
    assert isinstance(flex.plan(segments), FlexAttention) and isinstance(flex.closing(segments)[0], FlexAttention)
    for switch in (flex.off, linear_head.plain):
        with switch():
            assert isinstance(flex.plan(segments), PackedAttention) and isinstance(flex.closing(segments)[0], PackedAttention)
    assert not flex.allowed(torch.device("meta"))


def test_on_a_cpu_nothing_changes() -> None:
    assert not flex.allowed(torch.device("cpu")) and flex.allowed(torch.device("cuda"))
    assert isinstance(flex.plan(forest("a text alone")), PackedAttention)


def test_the_first_use_may_be_anywhere(on_cpu: list[Tensor]) -> None:
    """In inference mode, and under hooks that keep what a recomputed layer saves: the trial sees nothing of either."""
    q, k, v = (torch.randn(1, n, 10, 16) for n in (4, 2, 2))
    given, saved = {"layer": 0, "scaling": 0.3, "window": None, "softcap": None, "sinks": None}, list[int]()
    with torch.inference_mode(), torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(1) or x, lambda x: x):
        flex.plan(forest("one answer each")).attend(q, k, v, **given)
    assert len(on_cpu) == 7 and not any(flex._judged.values()) and not saved


def test_autocast_decides_the_dtype(on_cpu: list[Tensor], make: Any, batch: Any) -> None:
    """Queries in float32 beside values in bfloat16, as norms leave them: the kernel gets one dtype, and outputs are near."""
    lm = make("qwen3")
    with torch.no_grad():
        exact = hidden_states(lm, batch)
        on_cpu.clear()
        with torch.autocast("cpu", torch.bfloat16):
            rough = hidden_states(lm, batch)
    assert {q.dtype for q in on_cpu} == {torch.bfloat16}
    assert float((rough - exact).abs().max() / exact.abs().max()) < 0.1


def test_the_first_lines_say_which_way(on_cpu: list[Tensor], make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    lm, device = make("qwen3"), torch.device("cpu")

    plain = Run()

    def said(run: Run = plain) -> str:
        return opening.headline("m", Policy(lm), device, run).partition("\n")[2]

    assert said() == "attention  FlexAttention, one kernel a row"
    assert said(Run(dtype="bfloat16")) == said() and {q.dtype for q in on_cpu} == {torch.float32, torch.bfloat16}
    monkeypatch.setattr(flex, "_judged", {})
    monkeypatch.setattr(flex, "kernel", lambda *_: nn.Linear(1, 1))
    with pytest.warns(UserWarning, match="not used"):
        assert said().startswith("attention  padded bunches; FlexAttention is not used: ")
    compat.use_attention(lm, "sdpa")
    assert said() == "attention  the model's own, on padded batches"
    monkeypatch.setattr(flex, "DEVICES", frozenset())
    assert said() == ""
