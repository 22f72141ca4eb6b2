"""Order is a function of a seed and a counter: batches, splits, mixtures and blocks."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tilt.data.streams import Mixture, Stream, blocks, permutation, split
from tilt.errors import DataError, UsageError


@given(size=st.integers(1, 50), n=st.integers(1, 50), seed=st.integers(0, 2**40))
def test_an_epoch_shows_items_once_and_batches_repeat_none(size: int, n: int, seed: int) -> None:
    stream = Stream(range(size), seed)
    if n > size:
        with pytest.raises(UsageError, match=f"batch of {n} cannot be drawn from {size} rows"):
            stream.draw(0, n)
        return
    drawn = [stream.draw(step, n) for step in range(2 * stream.steps(n))]
    for epoch in (drawn[: stream.steps(n)], drawn[stream.steps(n) :]):
        seen = [item for batch in epoch for item in batch]
        assert len(seen) == len(set(seen)) == size // n * n


def test_a_draw_depends_on_seed_and_step_alone() -> None:
    fresh = [Stream(range(100), 7).draw(step, 10) for step in range(25)]
    worn = Stream(range(100), 7)
    assert [worn.draw(step, 10) for step in reversed(range(25))][::-1] == fresh
    assert fresh[0] != fresh[10], "a new epoch has a new order"
    assert Stream(range(100), 8).draw(0, 10) != fresh[0]


def test_a_seed_gives_the_order_it_always_gave() -> None:
    assert permutation(0, 0, 8).tolist() == [5, 0, 6, 1, 7, 2, 4, 3]
    assert len({tuple(permutation(seed, epoch, 8).tolist()) for seed in range(5) for epoch in range(5)}) == 25
    assert sorted(permutation(3, 4, 8).tolist()) == list(range(8))


def test_every_place_is_equally_likely() -> None:
    counts = Counter(int(permutation(seed, epoch, 4)[0]) for seed in range(40) for epoch in range(40))
    assert all(320 < counts[k] < 480 for k in range(4))  # mean 400, five standard deviations


def test_an_empty_stream_is_refused() -> None:
    with pytest.raises(DataError, match="nothing to draw"):
        Stream([], 0)


ROWS = [{"prompt": f"p{n % 300}", "n": n} for n in range(600)]


def test_equal_prompts_stay_together() -> None:
    train, held = split(ROWS, 0.2)
    assert not {row["prompt"] for row in train} & {row["prompt"] for row in held}
    assert sorted(row["n"] for row in train + held) == list(range(600))
    assert 60 < len(held) < 180


def test_a_split_does_not_move_when_rows_are_added_or_shuffled() -> None:
    _, held = split(ROWS, 0.2)
    more = [{"prompt": f"new{n}"} for n in range(50)] + ROWS[::-1]
    _, again = split(more, 0.2)
    assert {row["prompt"] for row in again if not row["prompt"].startswith("new")} == {row["prompt"] for row in held}
    assert {row["prompt"] for row in split(ROWS, 0.2, seed=1)[1]} != {row["prompt"] for row in held}


def test_parts_and_columns() -> None:
    parts = split(ROWS, [0.5, 0.3, 0.2], by="n")
    assert [round(len(part) / 600, 1) for part in parts] == [0.5, 0.3, 0.2]
    smaller, larger = split(ROWS, 0.1)[1], split(ROWS, 0.3)[1]
    assert [row for row in smaller if row not in larger] == [], "a larger held-out part contains the smaller"


@pytest.mark.parametrize("parts", [0.0, 1.0, -0.1, 1.5, [0.5, 0.6], [0.5, 0.5, 0.0]])
def test_parts_that_are_none_are_refused(parts: float | list[float]) -> None:
    with pytest.raises(UsageError, match="sum to 1"):
        split(ROWS, parts)


def test_an_empty_part_and_an_absent_column_are_errors() -> None:
    with pytest.raises(DataError, match=r"leaves an empty part \(rows: .*\b0\b"):
        split([{"prompt": "a"}] * 9, 0.5)
    with pytest.raises(DataError, match="cannot split by 'topic'"):
        split(ROWS, 0.5, by="topic")


def test_a_mixture_keeps_its_weights_and_each_order() -> None:
    mixture = Mixture([range(100), range(1000, 1100)], [3, 1], seed=5)
    batches = [mixture.draw(step, 20) for step in range(50)]
    assert [Mixture([range(100), range(1000, 1100)], [3, 1], seed=5).draw(step, 20) for step in (49, 0)] == [batches[49], batches[0]]
    drawn = [item for batch in batches for item in batch]
    assert 680 < sum(item < 1000 for item in drawn) < 820
    for first in ([item for item in drawn if item < 1000][:100], [item for item in drawn if item >= 1000][:100]):
        assert len(set(first)) == 100, "each source goes once through its rows before any repeats"


@pytest.mark.parametrize("weights", [[1.0], [1.0, 0.0], [1.0, -1.0]])
def test_weights_that_are_none_are_refused(weights: list[float]) -> None:
    with pytest.raises(UsageError, match="positive weight"):
        Mixture([[1], [2]], weights, 0)


def test_blocks() -> None:
    assert blocks([[1, 2], [3]], 2, eos=0) == [(1, 2), (0, 3)]
    assert blocks([[1, 2], [3, 4]], 3, eos=0) == [(1, 2, 0), (3, 4, 0)]
    with pytest.raises(DataError, match="fewer than one block"):
        blocks([[1]], 3, eos=0)
    with pytest.raises(UsageError, match="at least 2"):
        blocks([[1, 2]], 1, eos=0)
