"""The bridge: the enumerated language task as a finite process, its soft-optimal policy in closed form, and rows that go there."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from tilt.classic.bellman import action_values
from tilt.classic.episodes import score, trajectories
from tilt.classic.language import soft_value_iteration, state_policy, token_process
from tilt.classic.mdp import MDP, uniform
from tilt.classic.planning import evaluate, gain, value_iteration
from tilt.classic.tables import frozen_lake, random_processes
from tilt.errors import UsageError
from tilt.objectives import ALGORITHMS, GAE, GroupRelative, NoPenalty, NoRatio, NoValue, Objective, PerBudget, Score
from tilt.oracle import token_mdp as exact
from tilt.oracle.expectation import Situation, expect_by_prompt
from tilt.oracle.token_mdp import Answer, TokenMDP

BETA = 0.7


def close(a: Tensor, b: Tensor, atol: float = 1e-12) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=atol)


@pytest.fixture(scope="module")
def tree() -> TokenMDP:
    """Two prompts, three tokens, answers of one to three tokens, a reward for the whole answer and one for each token, a reference in general position."""

    def reward(prompt: int, answer: Answer) -> float:
        return 2.0 * (answer == (1, 0, 2)) if prompt else 0.9 * answer.count(0) - 0.4 * (answer[-1] != 2) + 0.25 * len(answer) ** 0.5

    found = TokenMDP.of(reward, steps=lambda g, a: [0.1 * t * (token - g) for t, token in enumerate(a)])
    return replace(found, reference=found.tilted(0.9, 5))


def test_a_token_process_is_the_tree(tree: TokenMDP) -> None:
    """Values, expected reward and trajectories of any policy are those of the enumeration."""
    mdp, logits = token_process(tree), tree.tilted(0.8, 1)
    policy = state_policy(logits)
    assert mdp.state_count == 2 * 7 + 1 and mdp.action_count == 3 and mdp.terminal.nonzero().tolist() == [[14]]
    close(evaluate(mdp, policy)[:-1].view(2, 7), exact.state_values(tree, logits))
    close(gain(mdp, policy), exact.expected_reward(tree, logits))
    found = trajectories(mdp, policy, tree.horizon)
    assert len(found.chance) == 30 and found.episodes.ended.all()
    close(found.chance.sort().values, 0.5 * exact.answer_logprobs(tree, logits).exp().flatten().sort().values)
    close(found.mean(found.episodes.returns(1.0)), exact.expected_reward(tree, logits))
    assert mdp.name(0) == "0:" and mdp.name(7 + tree.prefixes.index((0, 1))) == "1: 0 1"


def test_soft_value_iteration_is_the_tilted_reference(tree: TokenMDP) -> None:
    """pi*(y) = reference(y) exp(r(y) / beta) / Z for every answer of every prompt, and V*(prompt) = beta log Z."""
    mdp = token_process(tree)
    found = soft_value_iteration(mdp, BETA, reference=state_policy(tree.reference))
    logits = found.policy[:-1].view(2, 7, 3).log()
    tilted = exact.answer_logprobs(tree, tree.reference) + tree.returns / BETA
    close(exact.answer_logprobs(tree, logits), tilted.log_softmax(-1))
    close(found.values[[0, 7]], BETA * tilted.logsumexp(-1))
    closed = exact.optimum(tree, BETA)
    close(logits, closed.policy)
    close(found.values[[0, 7]], closed.value)
    assert found.sweeps == tree.horizon + 1, "one sweep a token, and one that changes nothing"


def test_soft_values_are_the_most_that_can_be_had(tree: TokenMDP) -> None:
    """E[r] - beta KL(policy || reference) is beta log Z less beta KL(policy || pi*), for every policy."""
    mdp = token_process(tree)
    best = soft_value_iteration(mdp, BETA, reference=state_policy(tree.reference))
    logits = best.policy[:-1].view(2, 7, 3).log()
    for seed in range(5):
        other = tree.tilted(1.0, seed)
        attained = exact.expected_reward(tree, other, kl=BETA)
        close((mdp.start * best.values).sum() - attained, BETA * exact.divergence(tree, other, logits))


def test_on_any_process_soft_values_lie_between_the_reference_and_the_best() -> None:
    """They solve the soft Bellman equation; beta → infinity is the reference's value, beta → 0 that of the best policy; many processes at once."""
    mdp = random_processes(50)
    previous = value_iteration(mdp, theta=1e-13).values
    for beta in (0.003, 0.1, 1.0, 30.0, 1e6):
        found = soft_value_iteration(mdp, beta)
        q = action_values(mdp, found.values)
        close(found.values, beta * ((q / beta).logsumexp(-1) - torch.tensor(3.0).double().log()), 1e-7 if beta > 100 else 1e-10)
        assert (found.values <= previous + 1e-7).all()
        previous = found.values
    close(found.values, evaluate(mdp, uniform(mdp)), 1e-4)
    close(soft_value_iteration(mdp, 1e-4).values, value_iteration(mdp).values, 2e-3)
    assert torch.equal(soft_value_iteration(mdp, 1e-4).policy.argmax(-1), value_iteration(mdp).policy)


def test_the_end_has_no_soft_value() -> None:
    lake = frozen_lake()
    found = soft_value_iteration(lake, 0.1)
    assert not found.values[lake.terminal].any() and (found.policy.sum(-1) - 1).abs().max() < 1e-12


@pytest.mark.slow
def test_rloo_and_ppo_approach_the_soft_optimal_policy(tree: TokenMDP) -> None:
    """Followed to where their expected gradient vanishes, RLOO and PPO's first step (an exact critic, KL in the reward) end at it; on the way the gap only falls.

    Rewards are paid at the end here: the group's rows judge whole answers.
    """
    paid = replace(tree, rewards=tree.returns, steps=torch.zeros_like(tree.steps))
    best = soft_value_iteration(token_process(paid), BETA, reference=state_policy(paid.reference)).policy[:-1].view(2, 7, 3)
    rloo = replace(ALGORITHMS["rloo"], credit=GroupRelative("leave_one_out", "none", kl=BETA))
    ppo = Objective(GAE(1.0, 0.95, kl=BETA, whitened=False), NoRatio(), Score(), PerBudget(1), NoPenalty(), NoValue())
    for row, samples in ((rloo, 2), (ppo, 1)):
        at, gaps, slope = paid.tilted(1, 3).log_softmax(-1), [], torch.ones(())
        while slope.abs().max() > 1e-11 and len(gaps) < 2000:
            gaps.append(exact.divergence(paid, at, best.log()).item())
            slope = 2 * expect_by_prompt(row, Situation.of(paid, samples, at, critic=exact.state_values(paid, at, kl=BETA))).mean
            at = (at + 0.9 * slope / (exact.visits(paid, at).unsqueeze(-1) * at.exp())).log_softmax(-1)
        assert len(gaps) < 200 and all(a > b for a, b in pairwise(gaps) if b > 1e-12)
        close(at.exp(), best, 1e-9)


def test_rewards_that_look_ahead_make_no_process(tree: TokenMDP) -> None:
    ahead = TokenMDP.of(lambda g, a: 0.0, steps=lambda g, a: [float(len(a))] * len(a), prompts=1)
    with pytest.raises(UsageError, match=r"token 0 after \[\] earns 2 in one answer and 3 in another"):
        token_process(ahead)


def test_settings_that_cannot_be_met_are_refused() -> None:
    mdp = random_processes()
    with pytest.raises(UsageError, match="beta=0 must be above 0"):
        soft_value_iteration(mdp, 0)
    with pytest.raises(UsageError, match="after 3 sweeps"):
        soft_value_iteration(mdp, 1.0, sweeps=3)
    with pytest.raises(UsageError, match="add up to 1"):
        soft_value_iteration(mdp, 1.0, reference=torch.zeros(5, 3))
    assert isinstance(mdp, MDP) and score(uniform(mdp).log(), trajectories(mdp, uniform(mdp), 1).episodes).shape == (75,)
