"""Two prompts of different difficulty, unequal lengths, policies in general position."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tilt.oracle.token_mdp import Answer, TokenMDP


def reward(prompt: int, answer: Answer) -> float:
    """Any function of the answer will do: it depends on order, on length and on the stop; the second prompt pays for one answer in fifteen."""
    if prompt == 1:
        return 2.0 * (answer == (1, 0, 2)) - 0.3 * (answer[0] == 2)
    return 0.9 * answer.count(0) - 0.4 * (answer[-1] != 2) + 0.25 * len(answer) ** 0.5 - 0.6 * (answer[0] == 1)


def success(prompt: int, answer: Answer) -> float:
    """Rewards 0 and 1; the second prompt is solved by one answer in fifteen."""
    return float(answer == (1, 0, 2)) if prompt == 1 else float(0 in answer)


def anchored(mdp: TokenMDP, seed: int = 5) -> TokenMDP:
    return replace(mdp, reference=mdp.tilted(0.9, seed))


@pytest.fixture(scope="session")
def mdp() -> TokenMDP:
    return anchored(TokenMDP.of(reward))


@pytest.fixture(scope="session")
def binary() -> TokenMDP:
    return anchored(TokenMDP.of(success))


@pytest.fixture(scope="session")
def policy(mdp: TokenMDP) -> Tensor:
    return mdp.tilted(0.8, 1)


@pytest.fixture(scope="session")
def other(mdp: TokenMDP) -> Tensor:
    """A policy at some distance from `policy`."""
    return mdp.tilted(0.8, 1) + mdp.tilted(0.3, 2)


@pytest.fixture(scope="session")
def small() -> tuple[TokenMDP, Tensor, Tensor, Tensor]:
    """Four answers of lengths 1, 2, 3 and 3 (one token and a stop), two prompts: MDP, policy, old, and a wrong critic."""
    mdp = anchored(
        TokenMDP.of(lambda g, answer: [[0.4, 1.0, -0.7, 0.1], [-1.0, 0.0, 0.3, 2.0]][g][len(answer) - (answer[-1] == 1)], vocabulary=2)
    )
    critic = torch.tensor([[0.3 * len(x) - 0.1 for x in mdp.prefixes]] * 2, dtype=torch.float64)
    return mdp, mdp.tilted(0.7, 1), mdp.tilted(0.7, 1) + mdp.tilted(0.2, 2), critic


@pytest.fixture(scope="session")
def bandit() -> Callable[..., tuple[TokenMDP, Tensor]]:
    return arms_of


def arms_of(chances: list[list[float]], rewards: list[list[float]], reference: list[float] | None = None) -> tuple[TokenMDP, Tensor]:
    """Arms instead of answers: horizon 1, a row of chances and rewards for each prompt; the MDP and the policy."""
    found = torch.tensor(chances, dtype=torch.float64).log().unsqueeze(1)
    anchor = found if reference is None else torch.tensor(reference, dtype=torch.float64).log().expand_as(found)
    arms = TokenMDP.of(lambda g, a: rewards[g][a[0]], prompts=len(chances), vocabulary=len(chances[0]), horizon=1, reference=anchor)
    return arms, found
