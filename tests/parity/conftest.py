"""Padded batches as nested lists: fixtures T and DS of parity.md, and random windows with padding, truncation and answers without actions."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from tilt.parity.window import Window

Grid = list[list[float]]
STAR = 77.0  # a slot that may hold anything


def grid(rows: Grid) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


@dataclass
class Padded:
    """A batch as nested lists of W slots each; `window` is what the library reads."""

    old: Grid
    ref: Grid
    new: Grid
    value: Grid
    new_value: Grid
    last: list[int]
    score: list[float]
    prompt: list[int]

    @property
    def width(self) -> int:
        return len(self.old[0])

    @property
    def window(self) -> Window:
        score, last, prompt = torch.tensor(self.score, dtype=torch.float64), torch.tensor(self.last), torch.tensor(self.prompt)
        return Window(grid(self.old), grid(self.ref), grid(self.value), last, score, prompt)

    def tensors(self) -> tuple[Tensor, Tensor]:
        """New log-probabilities and values, ready for a gradient."""
        return grid(self.new).requires_grad_(), grid(self.new_value).requires_grad_()


def fixture_t() -> Padded:
    return Padded(
        old=[[-0.80, -1.00, -0.35, STAR, STAR], [-1.60, -0.40, -0.70, -0.90, -1.00]],
        ref=[[-0.60, -1.10, -0.50, STAR, STAR], [-1.80, -0.30, -0.90, -0.60, -1.20]],
        new=[[-0.50, -1.20, -0.30, STAR, STAR], [-2.00, -0.10, -0.70, -0.70, -1.50]],
        value=[[0.30, 0.10, 0.60, 0.20, 0.90], [0.20, 0.00, 0.50, 0.40, 0.10]],
        new_value=[[0.50, 0.00, 0.70, 0.10, 0.80], [0.10, 0.30, 0.20, 0.40, 0.40]],
        last=[2, 4], score=[1.0, -0.5], prompt=[0, 0],
    )  # fmt: skip


def fixture_ds(last: int = 2) -> Padded:
    """Pad = eos: the first answer's stop token in slot 3 is padding (last 2); corrected, it is its last action (last 3)."""
    case = fixture_t()
    for rows, x in ((case.old, -0.50), (case.ref, -0.70), (case.new, -0.20)):
        rows[0][3] = x
    return replace(case, last=[last, 4], score=[1.0, -7.0])


def random_padded(seed: int, shortest: int = 0) -> Padded:
    """Answers of every length from `shortest` to the full window, junk behind them, two prompts."""
    rng = random.Random(seed)
    width, count = rng.randint(4, 7), 8
    lengths = [shortest, 1, width, width, *(rng.randint(1, width) for _ in range(count - 4))]
    prompt = [0, 0, 1, 1, *(rng.randint(0, 1) for _ in range(count - 4))]
    rng.shuffle(lengths)

    def rows(low: float, high: float) -> Grid:
        return [[rng.uniform(low, high) for _ in range(width)] for _ in range(count)]

    old = rows(-2.5, -0.05)
    near = [[[x + rng.gauss(0, 0.4) for x in row] for row in old] for _ in range(2)]
    scores = [rng.uniform(-8, 8) for _ in range(count)]
    return Padded(old, near[0], near[1], rows(-1, 1), rows(-1, 1), [n - 1 for n in lengths], scores, prompt)


CASES = {"T": fixture_t(), "DS": fixture_ds(), **{f"random{seed}": random_padded(seed) for seed in range(4)}}


@pytest.fixture
def t() -> Padded:
    return fixture_t()


@pytest.fixture
def ds() -> Padded:
    """Fixture DS as DeepSpeed-Chat reads it."""
    return fixture_ds()


@pytest.fixture
def ds_corrected() -> Padded:
    """Fixture DS with the stop token as an action."""
    return fixture_ds(last=3)


@pytest.fixture(params=list(CASES), ids=list(CASES))
def padded(request: pytest.FixtureRequest) -> Padded:
    return CASES[request.param]
