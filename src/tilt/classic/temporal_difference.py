"""Learning from steps: Monte-Carlo and TD(lam) prediction; SARSA, expected SARSA, Q-learning and double Q-learning. Truncation bootstraps, termination does not."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from tilt.classic.bellman import greedy
from tilt.classic.episodes import ACTION, COIN, ENDLESS, EXPLORE, OUTCOME, World, cumulative_rows, draws, steps_of, walk
from tilt.classic.mdp import MDP
from tilt.errors import UsageError

Rate = float | Callable[[int], float]
"""A number, or one for each episode from 0 on."""
Row = list[float]


@dataclass(frozen=True)
class Predicted:
    """Values of a policy [S], how often each state was updated [S], and the learning curve: the values after every episode [episodes, S]."""

    values: Tensor
    visits: Tensor
    history: Tensor


@dataclass(frozen=True)
class Learned:
    """Action values [S, A] and the policy that is greedy on them [S]; what each episode earned while it learned, undiscounted, and how long it was, [episodes]."""

    q: Tensor
    policy: Tensor
    returns: Tensor
    lengths: Tensor


# ---------------------------------------------------------------------------------------------- prediction


def monte_carlo(
    mdp: MDP,
    policy: Tensor,
    *,
    episodes: int,
    visits: Literal["first", "every"] = "first",
    alpha: Rate | None = None,
    seed: int = 0,
    limit: int | None = None,
    initial: Tensor | None = None,
) -> Predicted:
    """V(s) is the mean of the returns G_t that followed the first, or every, visit of s in an episode; with `alpha` V(s) += alpha (G_t - V(s)) instead.

    The return of an episode that was cut off goes on with the present V of the state where it stopped.
    """
    world, rows, most = World.of(mdp), cumulative_rows(mdp, policy), steps_of(mdp, limit)
    values, seen, history = _start(mdp, initial), [0] * mdp.state_count, []
    for episode in range(_counted(episodes)):
        steps, last, _ = walk(world, rows, most, draws(seed, episode))
        rate, found = None if alpha is None else _rate("alpha", alpha, episode), []
        following = values[last]  # 0 where the episode ended
        for s, _, r in reversed(steps):
            following = r + mdp.discount * following
            found.append((s, following))
        found.reverse()
        if visits == "first":
            found = list({s: (s, g) for s, g in reversed(found)}.values())
        for s, g in found:
            seen[s] += 1
            values[s] += (1 / seen[s] if rate is None else rate) * (g - values[s])
        history.append(values.copy())
    return _predicted(values, seen, history)


def temporal_difference(
    mdp: MDP,
    policy: Tensor,
    *,
    episodes: int,
    alpha: Rate = 0.1,
    lam: float = 0.0,
    traces: Literal["accumulating", "replacing"] = "accumulating",
    offline: bool = False,
    seed: int = 0,
    limit: int | None = None,
    initial: Tensor | None = None,
) -> Predicted:
    """TD(lam): delta = r + gamma V(s') - V(s), V += alpha delta e; the trace e of every state falls by gamma lam a step and rises by 1 (or to 1) where the walk is.

    lam 0 is V(s) += alpha (r + gamma V(s') - V(s)). `offline`: V changes at the end of an episode only; then the changes are those of the lambda-return.
    """
    if not 0 <= lam <= 1:
        raise UsageError(f"temporal_difference: lam={lam} must lie in [0, 1]")
    world, rows, most = World.of(mdp), cumulative_rows(mdp, policy), steps_of(mdp, limit)
    values, seen, history = _start(mdp, initial), [0] * mdp.state_count, []
    fade, up = mdp.discount * lam, traces == "accumulating"
    for episode in range(_counted(episodes)):
        rate = _rate("alpha", alpha, episode)
        trace: dict[int, float] = {}
        steps, last, _ = walk(world, rows, most, draws(seed, episode))
        target = values.copy() if offline else values
        for (s, _, r), after in zip(steps, [*(s for s, _, _ in steps[1:]), last], strict=True):
            delta = r + mdp.discount * values[after] - values[s]  # V of a terminal state is 0
            trace = {state: fade * e for state, e in trace.items()} if fade else {}
            trace[s] = trace.get(s, 0.0) + 1.0 if up else 1.0
            for state, e in trace.items():
                target[state] += rate * delta * e
            seen[s] += 1
        values = target
        history.append(values.copy())
    return _predicted(values, seen, history)


# ---------------------------------------------------------------------------------------------- control


def q_learning(
    mdp: MDP, *, episodes: int, alpha: Rate = 0.5, epsilon: Rate = 0.1, seed: int = 0, limit: int | None = None, initial: float = 0.0
) -> Learned:
    """Q(s, a) += alpha (r + gamma max_a' Q(s', a') - Q(s, a)), epsilon-greedy meanwhile (Watkins 1989): what is learned is the greedy policy's, whatever is done."""
    return _learn(mdp, "best", episodes, alpha, epsilon, seed, limit, initial)


def sarsa(
    mdp: MDP, *, episodes: int, alpha: Rate = 0.5, epsilon: Rate = 0.1, seed: int = 0, limit: int | None = None, initial: float = 0.0
) -> Learned:
    """Q(s, a) += alpha (r + gamma Q(s', a') - Q(s, a)) with the a' that is taken next: what is learned is the epsilon-greedy policy's own."""
    return _learn(mdp, "next", episodes, alpha, epsilon, seed, limit, initial)


def expected_sarsa(
    mdp: MDP, *, episodes: int, alpha: Rate = 0.5, epsilon: Rate = 0.1, seed: int = 0, limit: int | None = None, initial: float = 0.0
) -> Learned:
    """Q(s, a) += alpha (r + gamma sum_a' pi(a' | s') Q(s', a') - Q(s, a)), pi the epsilon-greedy policy: SARSA without the noise of a'."""
    return _learn(mdp, "mean", episodes, alpha, epsilon, seed, limit, initial)


def double_q_learning(
    mdp: MDP, *, episodes: int, alpha: Rate = 0.5, epsilon: Rate = 0.1, seed: int = 0, limit: int | None = None, initial: float = 0.0
) -> Learned:
    """Two tables, one of them updated a step by a coin: Q1(s, a) += alpha (r + gamma Q2(s', argmax Q1(s', .)) - Q1(s, a)), so that no table judges its own favourite
    (van Hasselt 2010). Acts by their mean, which is the result."""
    return _learn(mdp, "double", episodes, alpha, epsilon, seed, limit, initial)


def _learn(
    mdp: MDP,
    target: Literal["best", "next", "mean", "double"],
    episodes: int,
    alpha: Rate,
    epsilon: Rate,
    seed: int,
    limit: int | None,
    initial: float,
) -> Learned:
    world, most, gamma = World.of(mdp), steps_of(mdp, limit), mdp.discount
    tables = [[[0.0 if ends else initial] * mdp.action_count for ends in world.terminal] for _ in range(2 if target == "double" else 1)]
    q = tables[0] if target != "double" else [row.copy() for row in tables[0]]  # what the walk acts by
    returns, lengths = [], []
    for episode in range(_counted(episodes)):
        step, explore, drawn = _rate("alpha", alpha, episode), _rate("epsilon", epsilon, episode, zero=True), draws(seed, episode)
        s, total, length, done = world.begin(next(drawn)[0]), 0.0, 0, False
        now = next(drawn)
        a = choose(q[s], explore, now)
        while not done and length < most:
            after, r, done = world.step(s, a, now[OUTCOME])
            then = next(drawn)
            b = choose(q[after], explore, then) if target == "next" else 0
            learner = tables[int(now[COIN] * len(tables))]
            if done:
                ahead = 0.0
            elif target == "best":
                ahead = max(q[after])
            elif target == "next":
                ahead = q[after][b]
            elif target == "mean":
                ahead = (1 - explore) * max(q[after]) + explore * sum(q[after]) / len(q[after])
            else:
                ahead = tables[learner is tables[0]][after][_first_best(learner[after])]
            learner[s][a] += step * (r + gamma * ahead - learner[s][a])
            if target == "double":
                q[s][a] = (tables[0][s][a] + tables[1][s][a]) / 2
            total, length, s, now = total + r, length + 1, after, then
            a = b if target == "next" else choose(q[s], explore, now)
        if not done and most == ENDLESS:
            raise UsageError(f"an episode had not ended after {ENDLESS} steps: set a limit, or let epsilon be above 0")
        returns.append(total)
        lengths.append(length)
    found = torch.tensor(q, dtype=torch.float64)
    return Learned(found, greedy(found), torch.tensor(returns, dtype=torch.float64), torch.tensor(lengths))


def choose(row: Row, epsilon: float, now: Sequence[float]) -> int:
    """An action epsilon-greedy on a row of values: any with probability epsilon, else the first best."""
    return int(now[ACTION] * len(row)) if now[EXPLORE] < epsilon else _first_best(row)


def _first_best(row: Row) -> int:
    return row.index(max(row))


# ---------------------------------------------------------------------------------------------- settings


def _rate(name: str, given: Rate, episode: int, zero: bool = False) -> float:
    found = given(episode) if callable(given) else given
    if not (0 <= found <= 1 and (zero or found > 0)):
        raise UsageError(f"{name}={found} must lie in {'[' if zero else '('}0, 1]")
    return found


def _counted(episodes: int) -> int:
    if episodes < 1:
        raise UsageError(f"episodes={episodes} must be at least 1")
    return episodes


def _start(mdp: MDP, initial: Tensor | None) -> Row:
    """Values to start from; those of terminal states are 0."""
    if initial is None:
        return [0.0] * mdp.state_count
    if initial.shape != (mdp.state_count,):
        raise UsageError(f"initial has shape {tuple(initial.shape)}, not ({mdp.state_count},)")
    return torch.where(mdp.terminal, 0.0, initial.to(torch.float64)).tolist()


def _predicted(values: Row, seen: list[int], history: list[Row]) -> Predicted:
    return Predicted(torch.tensor(values, dtype=torch.float64), torch.tensor(seen), torch.tensor(history, dtype=torch.float64))
