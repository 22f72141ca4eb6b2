"""Ragged sums, means, discounted sums and group statistics equal loops, may be differentiated twice, and pass over unscored entries."""

from __future__ import annotations

import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tilt.segments import (
    Layout,
    discounted_sums,
    group_count,
    group_flat,
    group_max,
    group_mean,
    group_min,
    group_std,
    group_sum,
    segment_mean,
    segment_sum,
    spread,
)

LENGTHS = st.lists(st.integers(1, 9), min_size=1, max_size=6)


def rows(x: Tensor, layout: Layout) -> list[list[float]]:
    found: list[list[float]] = [[] for _ in range(layout.sequences)]
    for i, value in zip(layout.sequence.tolist(), x.tolist(), strict=True):
        found[i].append(value)
    return found


def test_worked_examples() -> None:
    layout, x = Layout.of([2, 1]), torch.tensor([1.0, 2.0, 5.0])
    assert segment_sum(x, layout).tolist() == [3, 5]
    assert segment_mean(x, layout).tolist() == [1.5, 5]
    assert spread(torch.tensor([7, 9]), layout).tolist() == [7, 7, 9]
    assert discounted_sums(x, layout, 0.5).tolist() == [2, 2, 5]
    assert layout.positions.tolist() == [0, 1, 0]


@given(LENGTHS, st.sampled_from([0.0, 0.3, 0.95, 1.0]), st.integers(0, 2**31))
@settings(max_examples=40, deadline=None)
def test_segments_equal_loops(lengths: list[int], factor: float, seed: int) -> None:
    layout = Layout.of(lengths)
    x = torch.randn(sum(lengths), dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    split = rows(x, layout)
    assert segment_sum(x, layout).tolist() == pytest.approx([sum(row) for row in split])
    assert segment_mean(x, layout).tolist() == pytest.approx([sum(row) / len(row) for row in split])
    expected = [sum(factor ** (k - t) * row[k] for k in range(t, len(row))) for row in split for t in range(len(row))]
    assert discounted_sums(x, layout, factor).tolist() == pytest.approx(expected, abs=1e-12)


def test_sums_may_be_differentiated_twice() -> None:
    layout = Layout.of([3, 1, 2])
    x = torch.randn(6, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    for function in (
        lambda y: segment_sum(y**3, layout),
        lambda y: segment_mean(y**3, layout),
        lambda y: discounted_sums(y**3, layout, 0.7),
    ):
        assert torch.autograd.gradcheck(function, x) and torch.autograd.gradgradcheck(function, x)


def test_a_junk_neighbour_stays_in_its_own_sequence() -> None:
    x = torch.tensor([1.0, float("nan"), 2.0, 3.0])
    assert discounted_sums(x, Layout.of([2, 2]), 0.5)[2:].tolist() == [3.5, 3.0]
    assert segment_sum(x, Layout.of([2, 2]))[1] == 5


@given(st.lists(st.tuples(st.integers(0, 3), st.booleans()), min_size=1, max_size=12), st.integers(0, 2**31))
@settings(max_examples=40, deadline=None)
def test_groups_equal_loops(members: list[tuple[int, bool]], seed: int) -> None:
    prompt = [g for g, _ in members]
    layout = Layout.of([1] * len(prompt), prompt)
    x = torch.randn(len(prompt), dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    scored = torch.tensor([s for _, s in members])
    x[~scored] = float("nan")
    for g in range(max(prompt) + 1):
        kept = [x[i].item() for i, (owner, seen) in enumerate(members) if owner == g and seen]
        assert group_count(layout, scored)[g] == len(kept)
        assert group_sum(x, layout, scored)[g].item() == pytest.approx(sum(kept))
        assert group_mean(x, layout, scored)[g].item() == pytest.approx(sum(kept) / max(len(kept), 1))
        assert group_max(x, layout, scored)[g].item() == max(kept, default=float("-inf"))
        assert group_min(x, layout, scored)[g].item() == min(kept, default=float("inf"))
        assert group_flat(x, layout, scored)[g].item() == (len(set(kept)) <= 1)
        assert group_std(x, layout, scored, 1)[g] == 0 or len(kept) > 1, "one entry, or none, has no spread"
        if len(kept) > 1:
            assert group_std(x, layout, scored, 1)[g].item() == pytest.approx(statistics.stdev(kept))
            assert group_std(x, layout, scored, 0)[g].item() == pytest.approx(statistics.pstdev(kept))


def test_layout_parts() -> None:
    layout = Layout.of([2, 1, 3], [5, 5, 7])
    assert layout.actions_of(torch.tensor([2, 0])).tolist() == [3, 4, 5, 0, 1]
    part = layout.take(torch.tensor([2, 0]))
    assert part.sequence.tolist() == [0, 0, 0, 1, 1] and part.prompt.tolist() == [1, 0]
    assert layout.to("meta").sequence.is_meta and layout.to("meta").prompt.is_meta


def test_no_sequences_no_trouble() -> None:
    layout, none = Layout.of([]), torch.zeros(0)
    assert layout.prompts == layout.actions == 0 and discounted_sums(none, layout, 0.5).shape == segment_sum(none, layout).shape == (0,)
    assert group_mean(none, layout, none.bool()).shape == (0,)
