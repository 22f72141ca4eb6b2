"""Packed attention against a dense masked softmax written out, and what it refuses."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from tilt.data.packing import Segments
from tilt.errors import UsageError
from tilt.models import attention as library
from tilt.models.attention import PackedAttention, alike, attention

FOREST = Segments(torch.tensor([0, 4, 7, 8, 13, 15]), torch.tensor([4, 3, 1, 5, 2, 6]), torch.tensor([-1, 0, 0, -1, -1, 4]))


def dense(q, k, v, segments, scaling, window, softcap, sinks):
    """Token by token: its segment's earlier tokens and its parent's, within the window."""
    tokens, heads, groups = q.shape[2], q.shape[1], q.shape[1] // k.shape[1]
    out = torch.zeros(1, tokens, heads, v.shape[3], dtype=q.dtype)
    for start, length, parent in zip(segments.start.tolist(), segments.length.tolist(), segments.parent.tolist(), strict=True):
        above = [] if parent < 0 else list(range(int(segments.start[parent]), int(segments.start[parent] + segments.length[parent])))
        for i in range(length):
            path = above + list(range(start, start + i + 1))
            path = path if window is None else path[-window:]
            for h in range(heads):
                scores = k[0, h // groups, path] @ q[0, h, start + i] * scaling
                if softcap is not None:
                    scores = softcap * torch.tanh(scores / softcap)
                weights = scores.exp()
                total = weights.sum() + (0 if sinks is None else sinks[h].exp())
                out[0, start + i, h] = (weights / total) @ v[0, h // groups, path]
    return out


def inputs():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(1, heads, 21, 8, dtype=torch.float64, generator=generator, requires_grad=True) for heads in (4, 2, 2)]


@pytest.mark.parametrize("window", [None, 1, 2, 5, 7, 100])
@pytest.mark.parametrize(("softcap", "sinks"), [(None, None), (0.7, None), (None, torch.tensor([0.3, -1, 2, 0.0], dtype=torch.float64))])
def test_against_a_written_softmax(window, softcap, sinks):
    q, k, v = inputs()
    plan = PackedAttention.of(FOREST)
    got = plan.attend(q, k, v, layer=0, scaling=0.4, window=window, softcap=softcap, sinks=sinks)
    want = dense(q, k, v, FOREST, 0.4, window, softcap, sinks)
    torch.testing.assert_close(got, want, atol=1e-12, rtol=0)
    probe = torch.randn(got.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for ours, theirs in zip(
        torch.autograd.grad((got * probe).sum(), (q, k, v)), torch.autograd.grad((want * probe).sum(), (q, k, v)), strict=True
    ):
        torch.testing.assert_close(ours, theirs, atol=1e-11, rtol=0)


def test_one_mask_per_window():
    plan = PackedAttention.of(FOREST)
    for window in (None, 3, 3, 2, None):
        plan.attend(*inputs(), layer=0, scaling=1.0, window=window, softcap=None, sinks=None)
    assert len(plan.bunches) > 1 and all(set(bunch.masks) == {None, 3, 2} for bunch in plan.bunches)


def test_the_worked_example():
    """Row 5 6 | 7 8 E | 9 E."""
    plan = PackedAttention.of(Segments(torch.tensor([0, 2, 5]), torch.tensor([2, 3, 2]), torch.tensor([-1, 0, 0])))
    roots, children = plan.bunches
    assert roots.queries.tolist() == roots.keys.tolist() == [[0, 1]]
    assert children.queries.tolist() == [[2, 3, 4], [5, 6, 6]]
    assert children.keys.tolist() == [[0, 1, 2, 3, 4], [0, 1, 5, 6, 6]]
    assert plan.inverse.tolist() == [0, 1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("overhead", [0, 100, 10**6])
def test_bunches_change_nothing(monkeypatch, overhead):
    """However segments are put together, all the same comes out, windows included; each segment is in one bunch."""
    q, k, v = inputs()
    want = PackedAttention.of(FOREST).attend(q, k, v, layer=0, scaling=0.4, window=4, softcap=None, sinks=None)
    monkeypatch.setitem(library.OVERHEAD, "cpu", overhead)
    plan = PackedAttention.of(FOREST)
    assert len(plan.bunches) == 2 or overhead < 10**6
    assert sum(len(bunch.own) for bunch in plan.bunches) == len(FOREST.start)
    torch.testing.assert_close(plan.attend(q, k, v, layer=0, scaling=0.4, window=4, softcap=None, sinks=None), want, atol=1e-12, rtol=0)


def test_the_cheapest_bunches():
    """Against every way to cut the classes in order: no cheaper one."""
    sizes = [(0, 3), (0, 4), (0, 60), (0, 64), (0, 9), (0, 130)]
    assert alike(range(6), sizes, 100) == [[0, 1], [4], [2, 3], [5]]
    assert alike(range(6), sizes, 10**6) == [[0, 1, 2, 3, 4, 5]]
    assert alike([2, 0], sizes, 100) == [[0], [2]] and alike([], sizes, 1) == []
    asked = [(5, 2), (300, 2), (5, 40), (300, 33), (4, 70), (290, 1)]

    def cost(parts, overhead):
        return sum(
            len(p) * max(asked[i][1] for i in p) * (max(asked[i][0] for i in p) + max(asked[i][1] for i in p)) + overhead for p in parts
        )

    classes = alike(range(6), asked, 0)
    for overhead in (0, 50, 500, 5000, 50_000):
        ways = [
            [[i for c in classes[a:b] for i in c] for a, b in itertools.pairwise((0, *cuts, len(classes)))]
            for n in range(len(classes))
            for cuts in itertools.combinations(range(1, len(classes)), n)
        ]
        assert cost(alike(range(6), asked, overhead), overhead) == min(cost(way, overhead) for way in ways)


def test_the_closing_plan():
    """Row 5 6 | 7 8 E | 9 E: of the prompt only its end asks; what comes out is what the whole plan gives there, windows included."""
    plan, wanted = PackedAttention.closing(Segments(torch.tensor([0, 2, 5]), torch.tensor([2, 3, 2]), torch.tensor([-1, 0, 0])))
    assert wanted.tolist() == [1, 2, 3, 4, 5, 6]
    plan, wanted = PackedAttention.closing(FOREST)
    assert wanted.tolist() == [3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 14, 15, 16, 17, 18, 19, 20]
    q, k, v = inputs()
    for window in (None, 3):
        want = PackedAttention.of(FOREST).attend(q, k, v, layer=0, scaling=0.4, window=window, softcap=None, sinks=None)
        got = plan.attend(q[:, :, wanted], k, v, layer=0, scaling=0.4, window=window, softcap=None, sinks=None)
        torch.testing.assert_close(got, want[:, wanted], atol=1e-12, rtol=0)


def test_second_derivatives():
    """Trust regions differentiate twice; the math kernel allows it."""
    small = Segments(torch.tensor([0, 2, 4]), torch.tensor([2, 2, 1]), torch.tensor([-1, 0, 0]))
    q, k, v = (x[:, :, :5, :2].detach().requires_grad_() for x in inputs())
    with sdpa_kernel(SDPBackend.MATH):
        assert torch.autograd.gradgradcheck(
            lambda *x: PackedAttention.of(small).attend(*x, layer=0, scaling=0.4, window=None, softcap=None, sinks=None), (q, k, v)
        )


class Layer(nn.Module):
    layer_idx = 0


@pytest.mark.parametrize(
    ("unknown", "named"),
    [
        ({"position_bias": torch.zeros(1)}, "position_bias"),
        ({"attention_mask": torch.zeros(1)}, "attention_mask"),
        ({"dropout": 0.1}, "dropout=0.1"),
        ({"is_causal": False}, "is_causal=False"),
        ({"head_mask": 3}, "head_mask"),
    ],
)
def test_what_would_change_the_result_is_refused(unknown, named):
    with pytest.raises(UsageError, match=named):
        attention(Layer(), *inputs(), layout=PackedAttention.of(FOREST), **unknown)


def test_what_changes_nothing_is_accepted():
    out, _ = attention(
        Layer(), *inputs(), layout=PackedAttention.of(FOREST), use_cache=False, position_ids=torch.arange(21), is_causal=True, cache=None
    )
    want = PackedAttention.of(FOREST).attend(*inputs(), layer=0, scaling=8**-0.5, window=None, softcap=None, sinks=None)
    assert torch.equal(out, want)
