"""A token MDP small enough to enumerate: every answer is listed, so J, KL, their gradients and the tilted optimum are exact, in float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from tilt.errors import UsageError
from tilt.segments import Layout, discounted_sums

Answer = tuple[int, ...]


@dataclass(frozen=True)
class TokenMDP:
    """Answers of 1 to `horizon` tokens over `vocabulary` tokens, the last of which stops; N of them, with A actions and X prefixes in all.

    Vocabulary 3, horizon 3: N = 15 answers of lengths 1 to 3, A = 41, X = 7. A policy is a tensor of logits [G, X, V], one softmax per prompt
    and prefix. `rewards` [G, N] is earned by the whole answer, `steps` [G, A] after each action, `reference` [G, X, V] is the KL anchor.
    Prompts are drawn evenly: every expectation over a batch or over J is a mean over prompts.
    """

    vocabulary: int
    horizon: int
    rewards: Tensor
    steps: Tensor
    reference: Tensor

    def __post_init__(self) -> None:
        if self.vocabulary < 2 or self.horizon < 1:
            raise UsageError(
                f"TokenMDP: vocabulary={self.vocabulary} must be at least 2 (one token stops) and horizon={self.horizon} at least 1"
            )
        shapes = {"rewards": (self.answers_count,), "steps": (self.layout.actions,), "reference": (len(self.prefixes), self.vocabulary)}
        for name, shape in shapes.items():
            given = tuple(getattr(self, name).shape)
            if given != (self.prompts, *shape):
                raise UsageError(f"TokenMDP: {name} has shape {given}, not {(self.prompts, *shape)}")

    @staticmethod
    def of(
        reward: Callable[[int, Answer], float],
        *,
        prompts: int = 2,
        vocabulary: int = 3,
        horizon: int = 3,
        steps: Callable[[int, Answer], list[float]] = lambda prompt, answer: [0.0] * len(answer),
        reference: Tensor | None = None,
    ) -> TokenMDP:
        """The MDP in which `reward(prompt, answer)` is earned; without a reference it is the uniform policy."""
        answers, prefixes = _tree(vocabulary, horizon)
        earned = [[float(reward(g, answer)) for answer in answers] for g in range(prompts)]
        dense = [[float(x) for answer in answers for x in steps(g, answer)] for g in range(prompts)]
        anchor = torch.zeros(prompts, len(prefixes), vocabulary) if reference is None else reference
        return TokenMDP(vocabulary, horizon, _exact(earned), _exact(dense), anchor.to(torch.float64))

    @property
    def prompts(self) -> int:
        return len(self.rewards)

    @property
    def answers_count(self) -> int:
        return len(self.answers)

    @cached_property
    def answers(self) -> tuple[Answer, ...]:
        """Every answer, shortest first: with vocabulary 3 these are 2 | 0 2 | 1 2 | 0 0 0 | 0 0 1 …"""
        return _tree(self.vocabulary, self.horizon)[0]

    @cached_property
    def prefixes(self) -> tuple[Answer, ...]:
        """Every state in which a token is chosen, the empty prefix first."""
        return _tree(self.vocabulary, self.horizon)[1]

    @cached_property
    def layout(self) -> Layout:
        """Every answer once, as one group."""
        return Layout.of([len(answer) for answer in self.answers], [0] * len(self.answers))

    @cached_property
    def prefix(self) -> Tensor:
        """The state in which each action was chosen, [A]."""
        number = {prefix: i for i, prefix in enumerate(self.prefixes)}
        return torch.tensor([number[answer[:t]] for answer in self.answers for t in range(len(answer))])

    @cached_property
    def token(self) -> Tensor:
        """The token of each action, [A]."""
        return torch.tensor([token for answer in self.answers for token in answer])

    @cached_property
    def returns(self) -> Tensor:
        """What each answer earns in all, [G, N]."""
        return self.rewards + self.over_answers(self.steps)

    def over_answers(self, x: Tensor) -> Tensor:
        """Sum of x [G, A] over the actions of each answer, [G, N]."""
        return x.new_zeros(len(x), self.answers_count).index_add(1, self.layout.sequence, x)

    def tilted(self, scale: float = 1.0, seed: int = 0) -> Tensor:
        """A policy with normal logits of this standard deviation, [G, X, V]."""
        generator = torch.Generator().manual_seed(seed)
        return scale * torch.randn(self.reference.shape, dtype=torch.float64, generator=generator)

    def in_parts(self, parts: int, seed: int = 0) -> Tensor:
        """A policy whose every probability is a whole positive number of `parts`-ths: parts 4 gives 1/4 1/2 1/4 in some order, [G, X, V].

        Every answer then has a probability in multiples of parts^-horizon, so a finite batch can hold each exactly as often as it is expected.
        """
        if parts < self.vocabulary:
            raise UsageError(f"TokenMDP.in_parts: parts={parts} must be at least the vocabulary, {self.vocabulary}")
        generator = torch.Generator().manual_seed(seed)
        extra = torch.randint(self.vocabulary, (*self.reference.shape[:2], parts - self.vocabulary), generator=generator)
        counts = torch.ones_like(self.reference).scatter_add(2, extra, torch.ones(extra.shape, dtype=torch.float64))
        return (counts / parts).log()


def _tree(vocabulary: int, horizon: int) -> tuple[tuple[Answer, ...], tuple[Answer, ...]]:
    """Answers and prefixes, shortest first."""
    stop = vocabulary - 1
    levels: list[list[Answer]] = [[()]]
    while len(levels) < horizon:
        levels.append([(*prefix, token) for prefix in levels[-1] for token in range(stop)])
    ended = [(*prefix, stop) for level in levels for prefix in level]
    cut = [(*prefix, v) for prefix in levels[-1] for v in range(stop)]
    return tuple(sorted(ended + cut, key=lambda a: (len(a), a))), tuple(prefix for level in levels for prefix in level)


def _exact(rows: list[list[float]]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


# ---------------------------------------------------------------------------------------------- exact quantities


def logprobs(mdp: TokenMDP, policy: Tensor) -> Tensor:
    """log policy of every action of every answer, [G, A]."""
    return policy.log_softmax(-1)[:, mdp.prefix, mdp.token]


def answer_logprobs(mdp: TokenMDP, policy: Tensor) -> Tensor:
    """log policy of every answer, [G, N]."""
    return mdp.over_answers(logprobs(mdp, policy))


def visits(mdp: TokenMDP, policy: Tensor) -> Tensor:
    """Probability that an answer passes through each prefix, [G, X]."""
    chance = answer_logprobs(mdp, policy).exp()[:, mdp.layout.sequence]
    return torch.zeros_like(policy[..., 0]).index_add(1, mdp.prefix, chance)


def expected_reward(mdp: TokenMDP, policy: Tensor, *, kl: float = 0.0) -> Tensor:
    """J = E[R] - kl KL(policy || reference), mean over prompts."""
    found = answer_mean(mdp, policy, mdp.returns)
    return found - kl * divergence(mdp, policy, mdp.reference) if kl else found


def answer_mean(mdp: TokenMDP, policy: Tensor, x: Tensor) -> Tensor:
    """E[x] of a quantity of answers [G, N] when the policy answers, mean over prompts."""
    return (answer_logprobs(mdp, policy).exp() * x).sum(1).mean()


def divergence(mdp: TokenMDP, p: Tensor, q: Tensor) -> Tensor:
    """KL(p || q) of whole answers, mean over prompts."""
    return answer_mean(mdp, p, answer_logprobs(mdp, p) - answer_logprobs(mdp, q))


def divergences(p: Tensor, q: Tensor) -> Tensor:
    """KL(p || q) of the next token at every prefix, [G, X]."""
    gap = p.log_softmax(-1) - q.log_softmax(-1)
    return (p.softmax(-1) * gap).sum(-1)


def entropies(policy: Tensor) -> Tensor:
    """Entropy of the next token at every prefix, [G, X]."""
    return -(policy.softmax(-1) * policy.log_softmax(-1)).sum(-1)


def frozen(mdp: TokenMDP, sampler: Tensor, x: Tensor) -> Tensor:
    """E[sum_t x(prefix_t)] over prefixes that `sampler` visits, held fixed: x [G, X] alone carries a gradient. Mean over prompts."""
    return (visits(mdp, sampler).detach() * x).sum(1).mean()


def gradient(function: Callable[[Tensor], Tensor], policy: Tensor) -> Tensor:
    """Gradient of a scalar function of the policy's logits, [G, X, V]."""
    at = policy.detach().clone().requires_grad_()
    value = function(at)
    found = torch.autograd.grad(value, at, allow_unused=True)[0] if value.requires_grad else None
    return torch.zeros_like(at) if found is None else found


@dataclass(frozen=True)
class Optimum:
    """The policy that maximises E[R] - beta KL(policy || reference), and what it attains for each prompt: beta log Z, [G]."""

    policy: Tensor
    value: Tensor


def optimum(mdp: TokenMDP, beta: float) -> Optimum:
    """The soft Bellman recursion from the last token back: V(x) = beta log sum_v reference(v | x) exp(Q(x, v) / beta)."""
    ahead: dict[Answer, Tensor] = {answer: mdp.returns[:, n] for n, answer in enumerate(mdp.answers)}
    anchor, logits = mdp.reference.log_softmax(-1), torch.empty_like(mdp.reference)
    for number in reversed(range(len(mdp.prefixes))):
        prefix = mdp.prefixes[number]
        gains = torch.stack([ahead[(*prefix, v)] for v in range(mdp.vocabulary)], -1)
        logits[:, number] = anchor[:, number] + gains / beta
        ahead[prefix] = beta * logits[:, number].logsumexp(-1)
    return Optimum(logits.log_softmax(-1), ahead[()])


def to_go(mdp: TokenMDP, policy: Tensor, *, kl: float = 0.0, gamma: float = 1.0) -> Tensor:
    """sum_(k>=t) gamma^(k-t) (r_k - kl log(policy / reference)_k) after each action of each answer, [G, A]."""
    said = logprobs(mdp, policy) - logprobs(mdp, mdp.reference)
    paid = (mdp.steps - kl * said).index_add(1, mdp.layout.last, mdp.rewards)
    return torch.stack([discounted_sums(row, mdp.layout, gamma) for row in paid])


def state_values(mdp: TokenMDP, policy: Tensor, *, kl: float = 0.0, gamma: float = 1.0) -> Tensor:
    """V(x) = E[`to_go` | prefix x] when the policy answers, [G, X]."""
    chance = answer_logprobs(mdp, policy).exp()[:, mdp.layout.sequence]
    total = torch.zeros_like(policy[..., 0]).index_add(1, mdp.prefix, chance * to_go(mdp, policy, kl=kl, gamma=gamma))
    return total / visits(mdp, policy)


def score_mean(mdp: TokenMDP, policy: Tensor, sampler: Tensor, x: Tensor) -> Tensor:
    """E[sum_t x_t grad log policy(action_t)] over answers of `sampler`, x [G, A] held fixed; mean over prompts, [G, X, V]."""
    chance = answer_logprobs(mdp, sampler).exp()[:, mdp.layout.sequence]
    return gradient(lambda p: (chance * x.detach() * logprobs(mdp, p)).sum(1).mean(), policy)
