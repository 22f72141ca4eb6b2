"""Walking through a process: counted draws, sampled episodes on the action axis of language models, and every trajectory with its probability."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from tilt.classic.mdp import MDP, probabilities
from tilt.errors import UsageError
from tilt.segments import Layout, discounted_sums, segment_sum

ENDLESS = 1_000_000
"""Steps after which an episode without a time limit counts as one that never ends."""
EXPLORE, ACTION, OUTCOME, COIN = range(4)
"""What the four uniforms of a step are for: whether to explore, which action, which outcome, which of two tables (double Q-learning)."""


def draws(seed: int, episode: int) -> Iterator[Sequence[float]]:
    """Four uniforms in [0, 1) a step, a function of (seed, episode, step) alone; those of step 0 choose the start, those of step t the t-th action and what follows it."""
    if seed < 0:
        raise UsageError(f"seed={seed} must not be negative")
    generator = np.random.Generator(np.random.Philox(key=seed, counter=[0, 0, episode, 0]))
    size = 32
    while True:
        yield from generator.random((size, 4)).tolist()
        size = min(2 * size, 1024)


@dataclass(frozen=True)
class World:
    """A process as plain lists, for walking: `cumulative`, `following` and `earned` of the possible outcomes of action a in state s."""

    start: list[float]
    cumulative: list[list[list[float]]]
    following: list[list[list[int]]]
    earned: list[list[list[float]]]
    terminal: list[bool]

    @staticmethod
    def of(mdp: MDP) -> World:
        if mdp.lead:
            raise UsageError(f"episodes are sampled from one process, not from {tuple(mdp.lead)} of them at once")
        chance, following, earned = mdp.chance.tolist(), mdp.following.tolist(), mdp.earned.tolist()
        kept = [[[k for k, p in enumerate(row) if p > 0] for row in rows] for rows in chance]

        def only(table: list[list[list]]) -> list[list[list]]:
            return [[[row[k] for k in ks] for row, ks in zip(rows, many)] for rows, many in zip(table, kept)]

        return World(
            cumulative_of(mdp.start.tolist()), [[cumulative_of(row) for row in rows] for rows in only(chance)], only(following), only(earned), mdp.terminal.tolist()
        )  # fmt: skip

    def begin(self, u: float) -> int:
        """A first state, from one uniform."""
        return bisect_right(self.start, u)

    def step(self, s: int, a: int, u: float) -> tuple[int, float, bool]:
        """(next state, reward, whether that ends the episode) of an action, from one uniform."""
        k = bisect_right(self.cumulative[s][a], u)
        after = self.following[s][a][k]
        return after, self.earned[s][a][k], self.terminal[after]


def cumulative_of(chances: Sequence[float]) -> list[float]:
    """Running sums, 1 from the last possible entry on, so that the inverse never falls off the end."""
    sums, last = list(accumulate(chances)), max(i for i, p in enumerate(chances) if p > 0)
    return [*sums[:last], *([1.0] * (len(sums) - last))]


# ---------------------------------------------------------------------------------------------- episodes


@dataclass(frozen=True)
class Episodes:
    """E episodes end to end: `states`, `actions` and `rewards` [A], the action axis; `layout` says in which episode each is, and which episodes began alike.

    `last` is the state in which an episode stopped [E]; it `ended` there, or it was cut off by the time limit [E].
    """

    layout: Layout
    states: Tensor
    actions: Tensor
    rewards: Tensor
    last: Tensor
    ended: Tensor

    @staticmethod
    def of(walks: Sequence[tuple[Sequence[tuple[int, int, float]], int, bool]]) -> Episodes:
        """From lists of (state, action, reward), each with the state that it stopped in and whether it ended."""
        steps = [step for walk, _, _ in walks for step in walk]
        states, actions, rewards = zip(*steps, strict=True)
        starts = torch.tensor([walk[0][0] for walk, _, _ in walks])
        layout = Layout.of([len(walk) for walk, _, _ in walks], starts.unique(return_inverse=True)[1])
        return Episodes(
            layout, torch.tensor(states), torch.tensor(actions), torch.tensor(rewards, dtype=torch.float64),
            torch.tensor([last for _, last, _ in walks]), torch.tensor([ended for _, _, ended in walks]),
        )  # fmt: skip

    def returns(self, discount: float) -> Tensor:
        """G(tau) = sum_t gamma^t r_t of each episode, [E]."""
        return discounted_sums(self.rewards, self.layout, discount)[self.layout.starts]


def sample(mdp: MDP, policy: Tensor, count: int, *, seed: int = 0, first: int = 0, limit: int | None = None) -> Episodes:
    """Episodes number `first` … first + count - 1 of a seed under a policy; each is the same whichever others are drawn. They are cut off after `limit` steps (mdp.limit unless given)."""
    world, rows = World.of(mdp), cumulative_rows(mdp, policy)
    most = steps_of(mdp, limit)
    if count < 1:
        raise UsageError(f"sample: count={count} must be at least 1")
    return Episodes.of([walk(world, rows, most, draws(seed, first + i)) for i in range(count)])


def walk(
    world: World, rows: Sequence[Sequence[float]], most: int, drawn: Iterator[Sequence[float]]
) -> tuple[list[tuple[int, int, float]], int, bool]:
    """One episode as (state, action, reward), where it stopped, and whether it ended there."""
    steps: list[tuple[int, int, float]] = []
    s, done = world.begin(next(drawn)[0]), False
    while not done and len(steps) < most:
        now = next(drawn)
        a = bisect_right(rows[s], now[ACTION])
        after, r, done = world.step(s, a, now[OUTCOME])
        steps.append((s, a, r))
        s = after
    if not done and most == ENDLESS:
        raise UsageError(f"an episode had not ended after {ENDLESS} steps: set a limit, or a policy that ends")
    return steps, s, done


def cumulative_rows(mdp: MDP, policy: Tensor) -> list[list[float]]:
    """The running sums of pi(. | s) in every state."""
    chosen = probabilities(mdp, policy)
    if chosen.dim() != 2:
        raise UsageError("episodes are sampled under one policy, [S] or [S, A]")
    return [cumulative_of(row) for row in chosen.tolist()]


def steps_of(mdp: MDP, limit: int | None) -> int:
    """The time limit of an episode."""
    most = mdp.limit if limit is None else limit
    if most is not None and most < 1:
        raise UsageError(f"limit={most} must be at least 1 step")
    return ENDLESS if most is None else most


# ---------------------------------------------------------------------------------------------- enumeration


@dataclass(frozen=True)
class Trajectories:
    """Every trajectory that a policy may take, and its probability P(tau) = mu(s_0) prod_t pi(a_t | s_t) p(s_(t+1), r_t | s_t, a_t), [E]."""

    episodes: Episodes
    chance: Tensor

    def mean(self, x: Tensor) -> Tensor:
        """E[x] of a quantity of trajectories, [E] → []."""
        return (self.chance * x).sum()


def trajectories(mdp: MDP, policy: Tensor, horizon: int | None = None, *, most: int = 200_000) -> Trajectories:
    """All trajectories of at most `horizon` steps (mdp.limit unless given); those that have not ended by then are cut off."""
    steps = mdp.limit if horizon is None else horizon
    if steps is None or steps < 1:
        raise UsageError(f"trajectories: horizon={horizon} must be at least 1 step; this process has no limit of its own")
    chosen, found, chances = probabilities(mdp, policy).detach().tolist(), [], []
    chance, following, earned, ends = mdp.chance.tolist(), mdp.following.tolist(), mdp.earned.tolist(), mdp.terminal.tolist()
    open_: list[tuple[float, int, tuple[tuple[int, int, float], ...]]] = [(p, s, ()) for s, p in enumerate(mdp.start.tolist()) if p > 0]
    while open_:
        likely, s, path = open_.pop()
        if ends[s] or len(path) == steps:
            found.append((path, s, ends[s]))
            chances.append(likely)
            if len(found) + len(open_) > most:
                raise UsageError(f"trajectories: there are more than {most} within {steps} steps; shorten the horizon or raise `most`")
            continue
        for a, pi in enumerate(chosen[s]):
            for p, after, r in zip(chance[s][a], following[s][a], earned[s][a]):
                if pi * p > 0:
                    open_.append((likely * pi * p, after, (*path, (s, a, r))))
    return Trajectories(Episodes.of(found), torch.tensor(chances, dtype=torch.float64))


def score(policy_logprobs: Tensor, episodes: Episodes) -> Tensor:
    """sum_t log pi(a_t | s_t) of each episode, [E], from log-probabilities [S, A]: all of log P(tau) that depends on the policy."""
    return segment_sum(policy_logprobs[episodes.states, episodes.actions], episodes.layout)
