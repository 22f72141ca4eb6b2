"""Counted randomness: the uniform behind a token is a pure function of (run seed, stream, step, prompt, sample, position)."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Keys = NDArray[np.uint64]

_STEP = np.uint64(0x9E3779B97F4A7C15)  # 2^64 / golden ratio, splitmix64's increment
_FIRST = np.uint64(0xBF58476D1CE4E5B9)
_SECOND = np.uint64(0x94D049BB133111EB)


def mix(words: Keys) -> Keys:
    """The splitmix64 finaliser (Steele, Lea, Flood 2014; Stafford's variant 13): a bijection of 64-bit words in which every input bit moves half the output bits."""
    with np.errstate(over="ignore"):
        words = (words ^ (words >> np.uint64(30))) * _FIRST
        words = (words ^ (words >> np.uint64(27))) * _SECOND
    return words ^ (words >> np.uint64(31))


def fold(key: Keys, words: Keys) -> Keys:
    """Absorb one word into each key: key ← mix(mix(key) + word + increment)."""
    with np.errstate(over="ignore"):
        return mix(mix(key) + words + _STEP)


def keys(seed: int, stream: str, step: int, prompts: Sequence[int], samples: Sequence[int]) -> Keys:
    """One 64-bit key per answer, from the run's seed, the stream's name ("train", "eval", …), the step, and each answer's prompt id and sample number."""
    name = int.from_bytes(hashlib.blake2b(stream.encode(), digest_size=8).digest(), "little")
    key = np.zeros(len(prompts), dtype=np.uint64)
    for word in (seed, name, step):
        key = fold(key, _word(word))
    return fold(fold(key, np.asarray(prompts, dtype=np.int64).view(np.uint64)), np.asarray(samples, dtype=np.int64).view(np.uint64))


def uniforms(keys: Keys, positions: NDArray[np.int64]) -> NDArray[np.float64]:
    """One uniform in [0, 1) per (key, position), a multiple of 2^-52.

    Fifty-two bits, so that u · total < total holds in float64 for every total > 0: the inverse of a cumulative distribution never falls off its end.
    """
    with np.errstate(over="ignore"):
        counter = mix((positions.astype(np.uint64) + np.uint64(1)) * _STEP)
    return (mix(mix(keys ^ counter) + _STEP) >> np.uint64(12)).astype(np.float64) * 2.0**-52


def _word(value: int) -> Keys:
    """A Python integer of any sign as one 64-bit word."""
    return np.array([value & 0xFFFFFFFFFFFFFFFF], dtype=np.uint64)
