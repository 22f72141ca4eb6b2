"""The enumeration against plain recursion over prefixes, finite differences, and the identities of the tilted optimum."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from math import exp, log

import pytest
import torch
from torch import Tensor

from tilt.errors import UsageError
from tilt.oracle import token_mdp as exact
from tilt.oracle.token_mdp import Answer, TokenMDP

ONE = 1e-12


def close(a: Tensor | float, b: Tensor | float, atol: float = ONE) -> None:
    torch.testing.assert_close(torch.as_tensor(a), torch.as_tensor(b, dtype=torch.float64), rtol=0, atol=atol)


def chances(mdp: TokenMDP, policy: Tensor, prompt: int, prefix: Answer) -> list[float]:
    """Next-token probabilities, by hand."""
    logits = policy[prompt, mdp.prefixes.index(prefix)].tolist()
    return [exp(x) / sum(exp(y) for y in logits) for x in logits]


def walk(mdp: TokenMDP, prompt: int, policies: list[Tensor], prefix: Answer = ()) -> list[tuple[Answer, list[float]]]:
    """Every answer with its probability under each policy, by recursion over prefixes."""
    found = []
    rows = [chances(mdp, policy, prompt, prefix) for policy in policies]
    for token in range(mdp.vocabulary):
        now, chance = (*prefix, token), [row[token] for row in rows]
        if token == mdp.vocabulary - 1 or len(now) == mdp.horizon:
            found.append((now, chance))
        else:
            found += [(answer, [a * b for a, b in zip(chance, rest)]) for answer, rest in walk(mdp, prompt, policies, now)]
    return found


def test_there_are_fifteen_answers_of_lengths_one_to_three(mdp: TokenMDP, policy: Tensor) -> None:
    assert mdp.answers_count == 15 and mdp.layout.actions == 41 and len(mdp.prefixes) == 7
    assert mdp.answers[:4] == ((2,), (0, 2), (1, 2), (0, 0, 0)) and mdp.layout.lengths.bincount().tolist() == [0, 1, 2, 12]
    for prompt in range(2):
        by_hand = dict(walk(mdp, prompt, [policy]))
        assert set(by_hand) == set(mdp.answers) and sum(x for (x,) in by_hand.values()) == pytest.approx(1, abs=ONE)
        close(exact.answer_logprobs(mdp, policy)[prompt].exp(), torch.tensor([by_hand[a][0] for a in mdp.answers], dtype=torch.float64))


def test_larger_trees() -> None:
    mdp = TokenMDP.of(lambda g, a: 0.0, prompts=1, vocabulary=4, horizon=4)
    assert mdp.answers_count == 1 + 3 + 9 + 27 * 4 and len(mdp.prefixes) == 1 + 3 + 9 + 27
    close(exact.visits(mdp, mdp.tilted())[:, 0], torch.ones(1))


def test_rewards_may_be_dense(policy: Tensor) -> None:
    mdp = TokenMDP.of(lambda g, a: 1.0 + g, steps=lambda g, a: [0.1 * token for token in a])
    assert mdp.returns[1, mdp.answers.index((1, 2))].item() == pytest.approx(2.3)


def test_values_equal_sums_over_all_answers(mdp: TokenMDP, policy: Tensor, other: Tensor) -> None:
    reward, forward, backward = 0.0, 0.0, 0.0
    for prompt in range(2):
        for answer, (p, q) in walk(mdp, prompt, [policy, other]):
            reward += p * mdp.returns[prompt, mdp.answers.index(answer)].item() / 2
            forward += p * log(p / q) / 2
            backward += q * log(q / p) / 2
    close(exact.expected_reward(mdp, policy), reward)
    close(exact.divergence(mdp, policy, other), forward)
    close(exact.divergence(mdp, other, policy), backward)
    close(exact.expected_reward(replace(mdp, reference=other), policy, kl=0.3), reward - 0.3 * forward)


def test_gradients_equal_finite_differences(mdp: TokenMDP, policy: Tensor, other: Tensor) -> None:
    functions: list[Callable[[Tensor], Tensor]] = [
        lambda p: exact.expected_reward(mdp, p, kl=0.2),
        lambda p: exact.divergence(mdp, p, other),
        lambda p: exact.divergence(mdp, other, p),
        lambda p: exact.frozen(mdp, policy, exact.divergences(p, other)),
        lambda p: exact.frozen(mdp, policy, exact.entropies(p)),
    ]
    for function in functions:
        found = exact.gradient(function, policy)
        for place in [(0, 0, 1), (0, 3, 2), (1, 1, 0), (1, 6, 2)]:
            shift = torch.zeros_like(policy)
            shift[place] = 1e-5
            close((function(policy + shift) - function(policy - shift)) / 2e-5, found[place], 1e-9)


def test_divergence_of_answers_is_the_sum_over_visited_prefixes(mdp: TokenMDP, policy: Tensor, other: Tensor) -> None:
    close(exact.frozen(mdp, policy, exact.divergences(policy, other)), exact.divergence(mdp, policy, other))
    entropy = -exact.answer_mean(mdp, policy, exact.answer_logprobs(mdp, policy))
    close(exact.frozen(mdp, policy, exact.entropies(policy)), entropy)


def test_state_values_are_conditional_means(mdp: TokenMDP, policy: Tensor) -> None:
    mdp = replace(mdp, steps=mdp.tilted(0.3, 9).flatten(1).repeat(1, 2)[:, :41])
    found = exact.state_values(mdp, policy, kl=0.3)

    def value(prompt: int, prefix: Answer) -> float:
        total, said, anchor = 0.0, chances(mdp, policy, prompt, prefix), chances(mdp, mdp.reference, prompt, prefix)
        for token in range(3):
            now = (*prefix, token)
            if token == 2 or len(now) == 3:
                number = mdp.answers.index(now)
                ahead = mdp.rewards[prompt, number].item() + mdp.steps[prompt, mdp.layout.last[number]].item()
            else:
                ahead = value(prompt, now) + paid(prompt, now)
            total += said[token] * (ahead - 0.3 * log(said[token] / anchor[token]))
        return total

    def paid(prompt: int, prefix: Answer) -> float:
        """The mean over answers through a prefix of the dense reward of its last token, which may depend on what follows."""
        place = len(prefix) - 1
        rows = [(p, n) for a, (p,) in walk(mdp, prompt, [policy]) if a[: place + 1] == prefix for n in [mdp.answers.index(a)]]
        each = [p * mdp.steps[prompt, mdp.layout.starts[n] + place].item() for p, n in rows]
        return sum(each) / sum(p for p, _ in rows)

    for prompt in range(2):
        for number, prefix in enumerate(mdp.prefixes):
            close(found[prompt, number], value(prompt, prefix))
    close(found[:, 0].mean(), exact.expected_reward(mdp, policy, kl=0.3))


@pytest.mark.parametrize("beta", [0.2, 0.7])
def test_the_optimum_is_the_tilted_reference(mdp: TokenMDP, policy: Tensor, beta: float) -> None:
    """policy* = reference exp(R / beta) / Z, J* = beta log Z, J* - J = beta KL(policy || policy*), and the gradient there is 0."""
    best = exact.optimum(mdp, beta)
    for prompt in range(2):
        weight = {a: p * exp(mdp.returns[prompt, mdp.answers.index(a)].item() / beta) for a, (p,) in walk(mdp, prompt, [mdp.reference])}
        z = sum(weight.values())
        close(best.value[prompt], beta * log(z))
        close(
            exact.answer_logprobs(mdp, best.policy)[prompt].exp(), torch.tensor([weight[a] / z for a in mdp.answers], dtype=torch.float64)
        )
    top = exact.expected_reward(mdp, best.policy, kl=beta)
    close(top, best.value.mean())
    close(top - exact.expected_reward(mdp, policy, kl=beta), beta * exact.divergence(mdp, policy, best.policy))
    close(exact.gradient(lambda p: exact.expected_reward(mdp, p, kl=beta), best.policy), torch.zeros_like(policy))


def test_the_implicit_reward_gives_the_reward_back(mdp: TokenMDP) -> None:
    """R = beta log(policy* / reference) + beta log Z."""
    best = exact.optimum(mdp, 0.5)
    ratio = exact.answer_logprobs(mdp, best.policy) - exact.answer_logprobs(mdp, mdp.reference)
    close(0.5 * ratio + best.value.unsqueeze(1), mdp.returns)


def test_policies_in_parts_are_fractions(mdp: TokenMDP) -> None:
    for parts in (3, 4, 8):
        quarters = mdp.in_parts(parts, seed=3).exp()
        close(quarters.sum(-1), torch.ones(2, 7))
        close(quarters * parts, (quarters * parts).round().clamp(min=1))
    with pytest.raises(UsageError, match="parts=2"):
        mdp.in_parts(2)


def test_shapes_are_refused(mdp: TokenMDP) -> None:
    with pytest.raises(UsageError, match="reference has shape"):
        replace(mdp, reference=torch.zeros(2, 6, 3))
    with pytest.raises(UsageError, match="vocabulary=1"):
        TokenMDP(1, 3, mdp.rewards, mdp.steps, mdp.reference)
