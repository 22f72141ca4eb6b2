"""Order without state: shuffles, batches, splits and mixtures that are functions of a seed and a counter."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Generic, TypeVar

import numpy as np

from tilt.data.formats import prompt_text
from tilt.data.sources import Row
from tilt.errors import DataError, UsageError

Item = TypeVar("Item")


@lru_cache(maxsize=8)
def permutation(seed: int, epoch: int, size: int) -> np.ndarray:
    """The order of `size` items in an epoch, keyed by (seed, epoch) alone: workers, restarts and earlier draws do not change it."""
    return np.random.Generator(np.random.Philox(key=[seed % 2**64, epoch])).permutation(size)


@dataclass(frozen=True)
class Stream(Generic[Item]):
    """Items in a shuffled order that starts anew each epoch; the step number is the only state, so resuming needs nothing else."""

    items: Sequence[Item]
    seed: int

    def __post_init__(self) -> None:
        if not self.items:
            raise DataError("there is nothing to draw from: no rows are left")

    def draw(self, step: int, n: int) -> list[Item]:
        """The n items of a step, all different. An epoch has floor(items / n) steps; the rest of its order is skipped.

        5 items, n = 2: steps 0 and 1 show four of them, step 2 starts a new order.
        """
        if not 1 <= n <= len(self.items):
            raise UsageError(
                f"a batch of {n} cannot be drawn from {len(self.items)} rows without repeating one\n  use a batch of at most {len(self.items)}"
            )
        epoch, place = divmod(step, self.steps(n))
        order = permutation(self.seed, epoch, len(self.items))
        return [self.items[i] for i in order[place * n : (place + 1) * n]]

    def spare(self, step: int, n: int) -> Iterator[Item]:
        """The items that `draw(step, n)` left, each once, in an order of the step's own."""
        epoch, place = divmod(step, self.steps(n))
        order = permutation(self.seed, epoch, len(self.items))
        rest = np.delete(order, slice(place * n, (place + 1) * n))
        return (self.items[rest[i]] for i in permutation(self.seed + 2**40, step, len(rest)))

    def steps(self, n: int) -> int:
        """Steps in an epoch of batches of n."""
        return len(self.items) // n


@dataclass(frozen=True)
class Mixture(Generic[Item]):
    """Several sources, each item drawn from source k with chance weight_k / sum; a function of the seed and a counter alone."""

    sources: Sequence[Sequence[Item]]
    weights: Sequence[float]
    seed: int

    def __post_init__(self) -> None:
        if len(self.sources) != len(self.weights) or not self.sources or min(self.weights) <= 0:
            raise UsageError(
                f"a mixture needs one positive weight per source, got {len(self.sources)} sources, weights {list(self.weights)}"
            )
        if not all(self.sources):
            raise DataError("a mixture has a source without rows")

    def draw(self, step: int, n: int) -> list[Item]:
        """The n items of a step. The k-th draw from a source is the k-th of its own shuffled order."""
        shares = np.cumsum(np.asarray(self.weights, dtype=float) / sum(self.weights))
        picks = np.searchsorted(shares[:-1], self._uniforms((step + 1) * n), side="right")
        drawn = []
        for counter in range(step * n, (step + 1) * n):
            k = int(picks[counter])
            before = int((picks[:counter] == k).sum())
            epoch, place = divmod(before, len(self.sources[k]))
            drawn.append(self.sources[k][permutation(self.seed + 1 + k, epoch, len(self.sources[k]))[place]])
        return drawn

    def _uniforms(self, count: int) -> np.ndarray:
        return np.random.Generator(np.random.Philox(key=[self.seed % 2**64, 2**63])).random(count)


def split(rows: Sequence[Row], parts: float | Sequence[float], *, by: str = "prompt", seed: int = 0) -> list[list[Row]]:
    """Rows in parts by a hash of their prompt (or of the column `by`), so that equal prompts never fall into different parts.

    `split(rows, 0.1)` → [nine tenths, one tenth]; `split(rows, [0.4, 0.4, 0.2])` → three parts. Adding rows moves none of the others.
    """
    shares = [1 - parts, parts] if isinstance(parts, (int, float)) else list(parts)
    if min(shares) <= 0 or abs(sum(shares) - 1) > 1e-9:
        raise UsageError(f"the parts of a split must be positive and sum to 1, got {shares}")
    ends = np.cumsum(shares)[:-1]
    made: list[list[Row]] = [[] for _ in shares]
    for row in rows:
        if by != "prompt" and by not in row:
            raise DataError(f"cannot split by {by!r}: a row has no such column\n  it has: {', '.join(row)}")
        key = prompt_text(row) if by == "prompt" else str(row[by])
        made[int(np.searchsorted(ends, _place(seed, key), side="right"))].append(row)
    if any(not part for part in made):
        sizes = ", ".join(str(len(part)) for part in made)
        raise DataError(f"a split of {len(rows)} rows into {shares} leaves an empty part (rows: {sizes})\n  give more rows or larger parts")
    return made


def _place(seed: int, key: str) -> float:
    """A number in [0, 1) from the seed and the key."""
    return int.from_bytes(hashlib.sha256(f"{seed}\0{key}".encode()).digest()[:7], "big") / 2**56


def blocks(texts: Iterable[Sequence[int]], length: int, eos: int) -> list[tuple[int, ...]]:
    """Texts end to end, each followed by `eos`, cut into blocks of `length` tokens; a last shorter piece is left off.

    Texts 1 2 and 3, length 2, eos 0 → 1 2 0 3 0 → blocks (1, 2) (0, 3).
    """
    if length < 2:
        raise UsageError(f"a block needs at least 2 tokens, one to predict from and one to predict; got {length}")
    row = [token for text in texts for token in (*text, eos)]
    if len(row) < length:
        raise DataError(f"the text has {len(row)} tokens, fewer than one block of {length}\n  use shorter blocks or more text")
    return [tuple(row[i : i + length]) for i in range(0, len(row) - length + 1, length)]
