"""Counted randomness: pinned values, uniform, independent across every part of the key, and no collisions."""

from __future__ import annotations

import numpy as np
import pytest

from tilt.sampling.randomness import keys, mix, uniforms


def splitmix64(state: int) -> tuple[int, int]:
    """The published generator in Python integers: next state, output."""
    state = (state + 0x9E3779B97F4A7C15) % 2**64
    z = state
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
    return state, z ^ (z >> 31)


def test_mix_is_the_published_finaliser() -> None:
    """splitmix64 from seed 1234567 gives 6457827717110365317, 3203168211198807973, … (the reference implementation's known answers)."""
    state, known = 1234567, [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431, 16408922859458223821]
    for answer in known:
        state, output = splitmix64(state)
        assert output == answer
        assert int(mix(np.array([state], dtype=np.uint64))[0]) == answer


def test_pinned_values_never_change() -> None:
    """A run is replayed from its seeds alone, so these numbers are part of the format of a run."""
    key = keys(7, "train", 3, [11, 11, 12], [0, 1, 0])
    assert key.tolist() == [8962091244595670749, 1694416101167190034, 9904690569085554759]
    assert uniforms(key, np.array([0, 1, 2])).tolist() == [0.8828016497210036, 0.5808153901256219, 0.12485081397694442]


@pytest.mark.parametrize("change", ["seed", "stream", "step", "prompt", "sample"])
def test_every_part_of_the_key_counts(change: str) -> None:
    parts = {"seed": 1, "stream": "train", "step": 2, "prompt": 3, "sample": 4}
    other = {**parts, change: "eval" if change == "stream" else parts[change] + 1}  # type: ignore[operator]
    first, second = (keys(p["seed"], p["stream"], p["step"], [p["prompt"]] * 1, [p["sample"]]) for p in (parts, other))  # type: ignore[arg-type]
    assert first != second
    positions = np.arange(4000)
    a, b = uniforms(np.repeat(first, 4000), positions), uniforms(np.repeat(second, 4000), positions)
    assert abs(np.corrcoef(a, b)[0, 1]) < 4 / np.sqrt(4000)


def test_parts_do_not_trade_places() -> None:
    """Prompt 1 sample 2 is not prompt 2 sample 1, and seed and step do not add up to the same key."""
    assert keys(0, "train", 0, [1], [2]) != keys(0, "train", 0, [2], [1])
    assert keys(1, "train", 2, [0], [0]) != keys(2, "train", 1, [0], [0])


def test_no_collisions_over_a_run() -> None:
    """400 steps × 32 prompts × 8 samples, negative and large seeds included: all keys differ; so do 200 positions of 5,000 of them."""
    found = [
        keys(seed, "train", step, np.repeat(np.arange(32), 8).tolist(), np.tile(np.arange(8), 32).tolist())
        for seed in (0, -1, 2**63)
        for step in range(400)
    ]
    every = np.concatenate(found)
    assert len(np.unique(every)) == len(every) == 3 * 400 * 256
    some = uniforms(np.repeat(every[:5000], 200), np.tile(np.arange(200), 5000))
    assert len(np.unique(some)) == len(some)  # a chance repeat among a million 52-bit values has probability 1e-4


def test_uniform_along_positions_and_along_keys() -> None:
    """χ² with 64 cells, and the mean and serial correlation, within four standard deviations."""
    key = keys(5, "train", 0, list(range(20_000)), [0] * 20_000)
    for draws in (
        uniforms(key, np.full(20_000, 3)),
        uniforms(np.repeat(key[:1], 20_000), np.arange(20_000)),
        uniforms(np.repeat(key[:200], 100), np.tile(np.arange(100), 200)),
    ):
        assert draws.min() >= 0 and draws.max() < 1
        cells = np.bincount((draws * 64).astype(int), minlength=64)
        chi2 = float(((cells - len(draws) / 64) ** 2 / (len(draws) / 64)).sum())
        assert abs(chi2 - 63) < 4 * np.sqrt(2 * 63)
        assert abs(draws.mean() - 0.5) < 4 / np.sqrt(12 * len(draws))
        assert abs(np.corrcoef(draws[1:], draws[:-1])[0, 1]) < 4 / np.sqrt(len(draws))


def test_a_uniform_never_reaches_one_times_any_total() -> None:
    """The largest uniform, 1 - 2^-52, times a total stays below the total: the inverse distribution cannot fall off its end."""
    largest = 1 - 2.0**-52
    totals = np.concatenate((np.random.default_rng(0).uniform(0.25, 4, 100_000), [1.0, np.nextafter(1, 2), np.nextafter(2, 1), 0.5]))
    assert (largest * totals < totals).all()
