"""Random tabular decision processes with every quantity exact, many at a time."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor


@dataclass(frozen=True)
class Processes:
    """B processes: moves [B, S, A, S], rewards [B, S, A], starts [B, S]; r is received after the action, the return is discounted by gamma."""

    moves: Tensor
    rewards: Tensor
    starts: Tensor
    gamma: float = 0.9

    def visits(self, policy: Tensor) -> Tensor:
        """rho = (I - gamma P_pi^T)^-1 mu, [B, S]: discounted visits, sum 1 / (1 - gamma)."""
        return torch.linalg.solve(self._system(policy).mT, self.starts)

    def values(self, policy: Tensor) -> Tensor:
        """V = (I - gamma P_pi)^-1 r_pi, [B, S]."""
        return torch.linalg.solve(self._system(policy), (policy * self.rewards).sum(-1))

    def advantages(self, policy: Tensor) -> Tensor:
        """Q - V, [B, S, A]."""
        values = self.values(policy)
        return self.rewards + self.gamma * torch.einsum("bsat,bt->bsa", self.moves, values) - values[..., None]

    def gain(self, policy: Tensor) -> Tensor:
        """J = mu · V, [B]."""
        return (self.starts * self.values(policy)).sum(-1)

    def best(self) -> Tensor:
        """J of an optimal policy, by value iteration, [B]."""
        values = torch.zeros_like(self.starts)
        for _ in range(500):
            values = (self.rewards + self.gamma * torch.einsum("bsat,bt->bsa", self.moves, values)).amax(-1)
        return (self.starts * values).sum(-1)

    def _system(self, policy: Tensor) -> Tensor:
        return torch.eye(self.starts.shape[-1]) - self.gamma * torch.einsum("bsa,bsat->bst", policy, self.moves)


@pytest.fixture(autouse=True)
def _float64():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


@pytest.fixture
def processes():
    """`processes(B)`: B random processes of 5 states and 3 actions, gamma .9."""

    def make(count: int, seed: int = 0, states: int = 5, actions: int = 3) -> Processes:
        generator = torch.Generator().manual_seed(seed)

        return Processes(
            _simplex(generator, count, states, actions, states),
            torch.randn(count, states, actions, generator=generator),
            _simplex(generator, count, states),
        )

    return make


def _simplex(generator: torch.Generator, *shape: int) -> Tensor:
    """Uniform on the simplex of the last axis."""
    drawn = -torch.rand(*shape, generator=generator).log()
    return drawn / drawn.sum(-1, keepdim=True)
