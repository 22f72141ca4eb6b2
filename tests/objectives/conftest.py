"""Fixtures F and T of the specification, and random ragged batches, as nested lists and as tensors."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from itertools import chain

import pytest
import torch
from torch import Tensor

from tilt.objectives import Layout, Outputs, Rewards, Signals

Ragged = list[list[float]]


def flat(rows: Ragged) -> Tensor:
    return torch.tensor(list(chain.from_iterable(rows)), dtype=torch.float64)


@dataclass
class Case:
    """A batch as nested lists; `tensors` are what the library reads."""

    policy: Ragged
    old: Ragged
    reference: Ragged
    sampler: Ragged
    values: Ragged
    new_values: Ragged
    reward: list[float]
    prompt: list[int]
    steps: Ragged = field(default_factory=list)
    entropy: Ragged = field(default_factory=list)
    kl: Ragged = field(default_factory=list)

    def __post_init__(self) -> None:
        self.entropy = self.entropy or [[(7 * i + 3 * t) % 11 / 5 for t in range(len(row))] for i, row in enumerate(self.policy)]
        self.kl = self.kl or [[(5 * i + 2 * t) % 7 / 20 for t in range(len(row))] for i, row in enumerate(self.policy)]
        self.steps = self.steps or [[0.0] * len(row) for row in self.policy]

    @property
    def layout(self) -> Layout:
        return Layout.of([len(row) for row in self.policy], self.prompt)

    @property
    def rewards(self) -> Rewards:
        return Rewards.of(torch.tensor(self.reward, dtype=torch.float64), flat(self.steps))

    @property
    def signals(self) -> Signals:
        return Signals.of(
            flat(self.old), sampler=flat(self.sampler), reference=flat(self.reference), values=flat(self.values), entropy=flat(self.entropy)
        )

    def outputs(self) -> Outputs:
        return Outputs.of(
            flat(self.policy).requires_grad_(),
            entropy=flat(self.entropy),
            kl=flat(self.kl).requires_grad_(),
            values=flat(self.new_values).requires_grad_(),
        )


def fixture_f() -> Case:
    return Case(
        policy=[[-0.50, -1.20, -0.30], [-2.00, -0.10], [-0.70, -0.70, -1.50, -0.20], [-1.00]],
        old=[[-0.80, -1.00, -0.35], [-1.60, -0.40], [-0.70, -0.90, -1.00, -0.25], [-1.30]],
        reference=[[-0.60, -1.10, -0.50], [-1.80, -0.30], [-0.90, -0.60, -1.20, -0.40], [-1.10]],
        sampler=[[-0.75, -1.10, -0.35], [-1.60, -0.55], [-0.70, -0.90, -1.20, -0.25], [-1.00]],
        values=[[0.30, 0.10, 0.60], [0.20, 0.00], [0.50, 0.40, 0.10, 0.20], [-0.10]],
        new_values=[[0.50, 0.00, 0.70], [0.10, 0.30], [0.20, 0.40, 0.40, 0.90], [-0.60]],
        reward=[1.0, 0.0, 0.5, -1.0],
        prompt=[0, 0, 0, 0],
    )


def fixture_t() -> Case:
    """The corrected column: actions only, the score on the stop action."""
    return Case(
        policy=[[-0.50, -1.20, -0.30], [-2.00, -0.10, -0.70, -0.70, -1.50]],
        old=[[-0.80, -1.00, -0.35], [-1.60, -0.40, -0.70, -0.90, -1.00]],
        reference=[[-0.60, -1.10, -0.50], [-1.80, -0.30, -0.90, -0.60, -1.20]],
        sampler=[[-0.80, -1.00, -0.35], [-1.60, -0.40, -0.70, -0.90, -1.00]],
        values=[[0.30, 0.10, 0.60], [0.20, 0.00, 0.50, 0.40, 0.10]],
        new_values=[[0.50, 0.00, 0.70], [0.10, 0.30, 0.20, 0.40, 0.40]],
        reward=[1.0, -0.5],
        prompt=[0, 0],
    )


def random_case(seed: int) -> Case:
    """Several prompts with unequal numbers of answers of unequal lengths, answers interleaved, dense rewards on some actions."""
    rng = random.Random(seed)
    prompt = list(chain.from_iterable([g] * rng.randint(2, 4) for g in range(rng.randint(2, 4))))
    rng.shuffle(prompt)
    lengths = [rng.randint(1, 6) for _ in prompt]

    def ragged(low: float, high: float) -> Ragged:
        return [[rng.uniform(low, high) for _ in range(n)] for n in lengths]

    old = ragged(-2.5, -0.05)
    near = [[[x + rng.gauss(0, 0.4) for x in row] for row in old] for _ in range(3)]
    steps = [[rng.choice([0.0, 0.0, rng.uniform(-0.3, 0.3)]) for _ in range(n)] for n in lengths]
    return Case(near[0], old, near[1], near[2], ragged(-1, 1), ragged(-1, 1), [rng.uniform(-1, 1) for _ in prompt], prompt, steps)


CASES = {"F": fixture_f(), "T": fixture_t(), **{f"random{seed}": random_case(seed) for seed in range(6)}}


@pytest.fixture
def f() -> Case:
    return fixture_f()


@pytest.fixture
def t() -> Case:
    return fixture_t()


@pytest.fixture(params=["F", "T", "random0", "random1"])
def some(request: pytest.FixtureRequest) -> Case:
    """Four of the cases, for what must hold whatever the numbers are."""
    return CASES[request.param]


@pytest.fixture(params=list(CASES), ids=list(CASES))
def case(request: pytest.FixtureRequest) -> Case:
    """Fixtures F and T and six random ragged batches."""
    return CASES[request.param]
