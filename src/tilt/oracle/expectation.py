"""Exact expectations of a row's gradient: every batch that the sampler could draw, weighted by its probability; bias, variance, cosine."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import combinations_with_replacement, product
from math import factorial, prod

import torch
from torch import Tensor

from tilt.errors import NumericError, UsageError
from tilt.objectives import Objective, Outputs, Rewards, Signals
from tilt.oracle import token_mdp as exact
from tilt.oracle.token_mdp import TokenMDP
from tilt.segments import Layout

CHUNK = 16384
"""Batches that are evaluated at once."""


@dataclass(frozen=True)
class Situation:
    """Who answers, who is trained and what the models say: `samples` answers to each prompt of the MDP make a batch.

    `sampler` draws the answers, `old` is the policy before the batch's first step, `critic` [G, X] holds a value for every prefix.
    """

    mdp: TokenMDP
    samples: int
    policy: Tensor
    old: Tensor
    sampler: Tensor
    critic: Tensor

    @staticmethod
    def of(
        mdp: TokenMDP,
        samples: int,
        policy: Tensor,
        *,
        old: Tensor | None = None,
        sampler: Tensor | None = None,
        critic: Tensor | None = None,
    ) -> Situation:
        """On-policy unless said otherwise: old = policy, sampler = old; the critic is exact for `old` and the reward without KL."""
        before = policy if old is None else old
        drawing = before if sampler is None else sampler
        return Situation(mdp, samples, policy, before, drawing, exact.state_values(mdp, before) if critic is None else critic)

    @property
    def sequences(self) -> int:
        return self.mdp.prompts * self.samples

    @property
    def prompt(self) -> Tensor:
        """The prompt that each sequence of a batch answers, [S]."""
        return torch.arange(self.mdp.prompts).repeat_interleave(self.samples)

    @cached_property
    def said(self) -> dict[str, Tensor]:
        """What the models say about every action of every answer, [G * A] each."""
        mdp, at = self.mdp, self.mdp.prefix
        found = {name: exact.logprobs(mdp, getattr(self, name)) for name in ("policy", "old", "sampler")}
        found["reference"] = exact.logprobs(mdp, mdp.reference)
        found["values"], found["steps"] = self.critic[:, at], mdp.steps
        found["entropy"] = exact.entropies(self.old)[:, at]
        return {name: x.reshape(-1) for name, x in found.items()}

    def free(self, against: str) -> Tensor:
        """What a loss may differentiate: log-probability, entropy and exact KL of every action, [3, G, A]; the KL is NaN against `none`."""
        return self._by_action(_state(self.policy, self._other(against), against))

    def slopes(self, against: str) -> Tensor:
        """Derivatives of `free` by the logits of each action's own prompt, [3, G, A, X * V]."""
        state = torch.vmap(torch.vmap(torch.func.jacfwd(partial(_state, against=against))))
        each = self._by_action(state(self.policy, self._other(against)))
        at = torch.nn.functional.one_hot(self.mdp.prefix, len(self.mdp.prefixes)).unsqueeze(-1)
        return (at * each.unsqueeze(-2)).flatten(3)

    def _other(self, against: str) -> Tensor:
        return self.old if against == "old" else self.mdp.reference

    def _by_action(self, states: Tensor) -> Tensor:
        """From the outputs of every state [G, X, V + 2, …] those of every action [3, G, A, …]."""
        at, last = self.mdp.prefix, self.mdp.vocabulary
        return torch.stack([states[:, at, self.mdp.token], states[:, at, last], states[:, at, last + 1]])


def _state(policy: Tensor, other: Tensor, against: str) -> Tensor:
    """Log-probabilities of the next token, their entropy, and KL(policy || reference) or KL(old || policy), [..., V + 2]."""
    said = policy.log_softmax(-1)
    entropy, kl = exact.entropies(policy), exact.divergences(policy, other) if against == "reference" else exact.divergences(other, policy)
    return torch.cat([said, torch.stack([entropy, kl * (torch.nan if against == "none" else 1.0)], -1)], -1)


@dataclass(frozen=True)
class Expectation:
    """Mean of the ascent direction -grad loss over all batches, [G, X, V]; `variance` is the trace of its covariance; `answers` in a batch."""

    mean: Tensor
    variance: float
    answers: int

    @property
    def noise(self) -> float:
        """Variance over squared length of the mean, times the answers of a batch: what one answer adds; free of the gradient's scale."""
        length = self.mean.square().sum().item()
        return self.answers * self.variance / length if length else float("inf")


@dataclass(frozen=True)
class Comparison:
    """A gradient beside a target: the multiple of the target nearest to it, what is left over relative to it, their cosine, and |g - target| / |target|."""

    multiple: float
    residual: float
    cosine: float
    error: float


def compare(found: Tensor, target: Tensor) -> Comparison:
    """How far `found` is from `target`, and from the nearest multiple of it."""
    a, b = found.flatten(), target.flatten()
    long, aim = a.norm().item(), b.norm().item()
    if not aim:
        raise NumericError("the target gradient is 0: nothing can be compared with it")
    multiple = (a @ b).item() / aim**2
    left = (a - multiple * b).norm().item()
    return Comparison(multiple, left / long if long else 0.0, (a @ b).item() / (long * aim) if long else 0.0, (a - b).norm().item() / aim)


# ------------------------------------------------------------------------------------------------------- batches


def groups(answers: int, samples: int, *, ordered: bool) -> tuple[Tensor, Tensor]:
    """Every group of `samples` out of `answers` answers [B, samples], and in how many orders it can be drawn [B].

    Two answers, two samples: 0 0, 0 1, 1 0, 1 1 once each; not ordered 0 0 once, 0 1 twice, 1 1 once.
    """
    if ordered:
        drawn = torch.tensor(list(product(range(answers), repeat=samples)))
        return drawn, torch.ones(len(drawn), dtype=torch.float64)
    found = list(combinations_with_replacement(range(answers), samples))
    counts = [factorial(samples) // prod(factorial(group.count(a)) for a in set(group)) for group in found]
    return torch.tensor(found), torch.tensor(counts, dtype=torch.float64)


def batches(situation: Situation, *, ordered: bool) -> tuple[Tensor, Tensor]:
    """Every batch [B, S] as the answer of each of its sequences, and its probability [B]."""
    group, orders = groups(situation.mdp.answers_count, situation.samples, ordered=ordered)
    logprobs = exact.answer_logprobs(situation.mdp, situation.sampler)
    drawn, chance = torch.zeros(1, 0, dtype=torch.long), torch.ones(1, dtype=torch.float64)
    for own in logprobs:
        each = orders * own[group].sum(1).exp()
        drawn = torch.cat([drawn.repeat_interleave(len(group), 0), group.repeat(len(drawn), 1)], 1)
        chance = (chance.unsqueeze(1) * each).flatten()
    return drawn, chance


def ascent(objective: Objective, situation: Situation, drawn: Tensor) -> Tensor:
    """-grad loss of each of these batches [B, S], by prompt: [B, G, X * V]. The row is applied to each batch by itself."""
    found = torch.zeros(len(drawn), situation.mdp.prompts, situation.policy[0].numel(), dtype=torch.float64)
    by_logits, together = situation.slopes(objective.against), batched(objective, situation)
    for rows, layout, index in _alike(situation, drawn):
        total = situation.mdp.rewards[situation.prompt, drawn[rows]]
        found[rows] = -_gradient(_by_outputs(objective, situation, layout, total, index, together), index, by_logits)
    return found


def _gradient(slopes: Sequence[Tensor | None], index: Tensor, by_logits: Tensor) -> Tensor:
    """Gradient of each batch's loss by the logits, [b, G, X * V], from its slopes by the outputs of its actions, which stand at `index` [b, A]."""
    _, prompts, actions, size = by_logits.shape
    found = torch.zeros(len(index), prompts, size, dtype=torch.float64)
    for slope, rates in zip(slopes, by_logits, strict=True):
        if slope is not None:
            dense = torch.zeros(len(index), prompts * actions, dtype=torch.float64).scatter_add(1, index, slope)
            found += torch.einsum("bga,gax->bgx", dense.view(-1, prompts, actions), rates)
    return found


def _alike(situation: Situation, drawn: Tensor) -> Iterator[tuple[Tensor, Layout, Tensor]]:
    """Batches of one pattern of lengths at a time: which they are [b], their layout, and where each action stands among all [b, A]."""
    mdp = situation.mdp
    lengths = mdp.layout.lengths[drawn]
    patterns, which = torch.unique(lengths, dim=0, return_inverse=True)
    for number, pattern in enumerate(patterns):
        layout = Layout.of(pattern, situation.prompt)
        first = mdp.layout.starts[drawn] + situation.prompt * mdp.layout.actions
        for rows in torch.nonzero(which == number).flatten().split(CHUNK):
            yield rows, layout, first[rows][:, layout.sequence] + layout.positions


def _by_outputs(
    objective: Objective, situation: Situation, layout: Layout, total: Tensor, index: Tensor, together: bool
) -> list[Tensor | None]:
    """Derivatives of each batch's loss by log-probabilities, entropies and exact KL, [b, A] each; None where the loss does not depend on them.

    All batches `together` where the row allows it, one after the other where it looks at numbers (as in `if reward.max() > 0`).
    """
    given = {name: x[index] for name, x in situation.said.items()}
    free = [x.reshape(-1)[index].requires_grad_() for x in situation.free(objective.against)]
    loss = partial(_loss, objective, layout)
    if together:
        losses: Tensor = torch.vmap(loss)(free[0], free[1], free[2], total, given)
    else:
        each = [loss(free[0][b], free[1][b], free[2][b], total[b], {name: x[b] for name, x in given.items()}) for b in range(len(total))]
        losses = torch.stack(each)
    if not losses.requires_grad:
        return [None] * len(free)
    return list(torch.autograd.grad(losses.sum(), free, allow_unused=True))


def _loss(
    objective: Objective, layout: Layout, logprobs: Tensor, entropy: Tensor, kl: Tensor, total: Tensor, given: Mapping[str, Tensor]
) -> Tensor:
    """The row's loss on one batch."""
    said, final = {name: x for name, x in given.items() if name not in ("policy", "steps")}, total.new_zeros(layout.sequences)
    signals = Signals(**said, final=final)
    experience = objective.prepare(Rewards.of(total, given["steps"]), signals, layout)
    return objective.loss(Outputs(logprobs, entropy, kl, given["values"], final), experience)


def batched(objective: Objective, situation: Situation) -> bool:
    """Whether the row can be applied to many batches at once: it cannot where it looks at a number or chooses by a mask."""
    layout = situation.mdp.layout
    given = {name: x[: layout.actions].expand(2, -1) for name, x in situation.said.items()}
    free = situation.free(objective.against)[:, 0].unsqueeze(1).expand(-1, 2, -1)
    total = situation.mdp.rewards[0].expand(2, -1)
    try:
        torch.vmap(partial(_loss, objective, layout))(free[0], free[1], free[2], total, given)
    except RuntimeError:
        return False
    return True


# -------------------------------------------------------------------------------------------------- expectations


def expect(objective: Objective, situation: Situation, *, ordered: bool = False) -> Expectation:
    """Mean and variance of -grad loss over every batch: (N^samples)^G of them. `ordered` where the order within a group may matter."""
    drawn, chance = batches(situation, ordered=ordered)
    found = ascent(objective, situation, drawn).flatten(1)
    mean = chance @ found
    variance = (chance @ found.square().sum(1) - mean.square().sum()).item()
    return Expectation(mean.view_as(situation.policy), max(variance, 0.0), situation.sequences)


def expect_by_prompt(objective: Objective, situation: Situation, *, ordered: bool = False) -> Expectation:
    """The same for rows in which no group looks at another: G N^samples batches, in which the other prompts' groups stand still."""
    group, orders = groups(situation.mdp.answers_count, situation.samples, ordered=ordered)
    logprobs = exact.answer_logprobs(situation.mdp, situation.sampler)
    means, variance = [], 0.0
    for g, own in enumerate(logprobs):
        chance = orders * own[group].sum(1).exp()
        drawn = torch.zeros(len(group), situation.sequences, dtype=torch.long)
        drawn[:, g * situation.samples : (g + 1) * situation.samples] = group
        found = ascent(objective, situation, drawn)[:, g]
        means.append(chance @ found)
        variance += (chance @ found.square().sum(1) - means[-1].square().sum()).item()
    return Expectation(torch.stack(means).view_as(situation.policy), max(variance, 0.0), situation.sequences)


def couples(objective: Objective, situation: Situation, *, trials: int = 32, seed: int = 0) -> bool:
    """Whether a prompt's gradient changes with the answers to the other prompts, in random batches."""
    generator = torch.Generator().manual_seed(seed)
    first, second = torch.randint(situation.mdp.answers_count, (2, trials, situation.sequences), generator=generator)
    kept = situation.prompt == 0
    before, after = ascent(objective, situation, first)[:, 0], ascent(objective, situation, torch.where(kept, first, second))[:, 0]
    return bool(((before - after).abs().amax() > 1e-10 * before.abs().amax().clamp(min=1e-30)).item())


def limit(objective: Objective, situation: Situation) -> Tensor:
    """-grad loss of one batch that holds every group of every prompt exactly as often as it is expected: where ever larger batches lead, [G, X, V].

    It needs a sampler whose probabilities are fractions (`TokenMDP.in_parts`): the batch is as large as their common denominator.
    """
    mdp = situation.mdp
    group, orders = groups(mdp.answers_count, situation.samples, ordered=False)
    chance = orders * exact.answer_logprobs(mdp, situation.sampler)[:, group].sum(2).exp()
    size = _denominator(chance)
    times = (chance * size).round().long()
    each = [group.repeat_interleave(t, 0) for t in times]
    drawn, prompt = torch.cat([x.flatten() for x in each]), torch.arange(mdp.prompts).repeat_interleave(size * situation.samples)
    owner = torch.arange(mdp.prompts * size).repeat_interleave(situation.samples)
    layout = Layout.of(mdp.layout.lengths[drawn], owner)
    index = (mdp.layout.starts[drawn] + prompt * mdp.layout.actions)[layout.sequence] + layout.positions
    slopes = _by_outputs(objective, situation, layout, mdp.rewards[prompt, drawn].unsqueeze(0), index.unsqueeze(0), False)
    return -_gradient(slopes, index.unsqueeze(0), situation.slopes(objective.against))[0].view_as(situation.policy)


def _denominator(chance: Tensor, largest: int = 1 << 20) -> int:
    """The smallest number 2^a 3^b 5^c of equal parts that these probabilities are whole numbers of."""
    sizes = sorted(2**a * 3**b * 5**c for a in range(21) for b in range(13) for c in range(9) if 2**a * 3**b * 5**c <= largest)
    for size in sizes:
        if (chance * size - (chance * size).round()).abs().max() < 1e-6:
            return size
    raise UsageError(f"the sampler's probabilities are not whole numbers of 1/{largest} or more: use TokenMDP.in_parts with 4 or 5 parts")


def effective_samples(situation: Situation) -> float:
    """How many of one hundred answers the importance weights policy / sampler leave: 100 / E[w^2], mean over prompts."""
    old = exact.answer_logprobs(situation.mdp, situation.sampler)
    weight = exact.answer_logprobs(situation.mdp, situation.policy) - old
    return (100 / (old + 2 * weight).exp().sum(1)).mean().item()


def fixed_point(
    objective: Objective, mdp: TokenMDP, samples: int, policy: Tensor, *, step: float = 1.0, tolerance: float = 1e-14, steps: int = 20_000
) -> Tensor:
    """The policy [G, X, V] at which the row's exact expected gradient is 0, by natural-gradient ascent from `policy`, on-policy all the way."""
    at = policy.log_softmax(-1)
    for _ in range(steps):
        found = expect_by_prompt(objective, Situation.of(mdp, samples, at)).mean * mdp.prompts
        if found.abs().max() < tolerance:
            return at
        at = (at + step * found / (exact.visits(mdp, at).unsqueeze(-1) * at.exp())).log_softmax(-1)
    raise NumericError(
        f"no fixed point after {steps:,} steps of {step:g}: the gradient is still {found.abs().max().item():.1e}; take a smaller step"
    )
