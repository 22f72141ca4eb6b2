"""Running means and variances: observations scaled to mean 0 and variance 1, rewards to a return of variance 1."""

from __future__ import annotations

import numpy as np

from tilt.classic.dynamics import Array

CLIP = 10.0
"""No scaled number is further from 0."""


class Running:
    """Mean and variance of all rows seen, [D]: batches join by the parallel formula (Chan et al. 1979), so any split gives the same."""

    def __init__(self, size: int) -> None:
        self.count, self.mean, self.variance = 0.0, np.zeros(size), np.ones(size)

    def update(self, rows: Array) -> None:
        """Rows [..., D] join those seen before."""
        flat = rows.reshape(-1, len(self.mean)).astype(np.float64)
        mean, variance, count = flat.mean(0), flat.var(0), float(len(flat))
        total, apart = self.count + count, mean - self.mean
        spread = (self.count and self.variance * self.count) + variance * count + apart**2 * (self.count * count / total)
        self.mean, self.variance, self.count = self.mean + apart * (count / total), spread / total, total

    @property
    def scale(self) -> Array:
        """1 / standard deviation, [D]."""
        return 1 / np.sqrt(self.variance + 1e-8)

    def centred(self, rows: Array) -> Array:
        """(x - mean) / standard deviation, within ±10, float32."""
        return np.clip((rows - self.mean) * self.scale, -CLIP, CLIP).astype(np.float32)

    def state(self) -> dict[str, Array]:
        """What a saved agent keeps."""
        return {"mean": self.mean, "variance": self.variance, "count": np.array([self.count])}

    @staticmethod
    def restored(state: dict[str, Array]) -> Running:
        found = Running(len(state["mean"]))
        found.mean, found.variance, found.count = state["mean"].copy(), state["variance"].copy(), float(state["count"][0])
        return found


class RewardScale:
    """Divides rewards by the standard deviation of the discounted return that has been running in each of N environments; their mean stays."""

    def __init__(self, environments: int, gamma: float) -> None:
        self.gamma, self.running, self.seen = gamma, np.zeros(environments), Running(1)

    def __call__(self, rewards: Array, over: Array) -> Array:
        """Scaled rewards [T, N], after these have joined the statistics; `over` says where an episode ended."""
        sums = np.empty_like(rewards)
        for t in range(len(rewards)):
            self.running = self.running * self.gamma + rewards[t]
            sums[t] = self.running
            self.running = np.where(over[t], 0.0, self.running)
        self.seen.update(sums[..., None])
        return np.clip(rewards * self.seen.scale, -CLIP, CLIP)
