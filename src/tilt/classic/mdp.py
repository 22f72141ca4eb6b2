"""A finite Markov decision process: p(s', r | s, a) as K outcomes of every action, a discount, where episodes start and which states end them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from typing import Any

import torch
from torch import Tensor

from tilt.errors import UsageError

Table = Mapping[int, Mapping[int, Sequence[tuple[float, int, float, bool]]]]
"""P[s][a] = [(p, s', r, done), …], the form of Gymnasium's toy environments; sequences in place of mappings do as well."""

CLOSE = 1e-9
"""How far probabilities may be from adding up to 1."""


@dataclass(frozen=True, eq=False)
class MDP:
    """S states, A actions, K outcomes of each: outcome k of action a in state s has a probability `chance`, a next state `following` and a reward `earned`,
    each [..., S, A, K]; r_t is received after a_t. Episodes start from `start` [..., S] and end in `terminal` states [..., S], which lead to themselves and earn 0.

    Leading axes are many processes of one size, worked at once. `limit`: steps after which an episode is cut off. Names and a grid (rows, columns) are for readers.
    """

    chance: Tensor = field(repr=False)
    following: Tensor = field(repr=False)
    earned: Tensor = field(repr=False)
    start: Tensor = field(repr=False)
    terminal: Tensor = field(repr=False)
    discount: float
    limit: int | None = None
    states: tuple[str, ...] = field(default=(), repr=False)
    actions: tuple[str, ...] = ()
    grid: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        _check(self)

    @staticmethod
    def of(
        transition: Any,
        reward: Any,
        *,
        discount: float,
        start: Any = None,
        terminal: Any = None,
        limit: int | None = None,
        states: Sequence[str] = (),
        actions: Sequence[str] = (),
        grid: tuple[int, int] | None = None,
    ) -> MDP:
        """The process with these arrays: `transition` [..., S, A, S'], `reward` [..., S, A] expected or [..., S, A, S'] by next state.

        Rows of `terminal` states are replaced: they lead to themselves and earn 0. Without `start` every other state is as likely.
        """
        chance, earned = _numbers("transition", transition), _numbers("reward", reward)
        if chance.dim() < 3 or chance.shape[-1] != chance.shape[-3] or not chance.numel():
            raise UsageError(
                f"MDP.of: transition has shape {tuple(chance.shape)}; it needs [..., S, A, S], one row of next states for every action"
            )
        if earned.shape == chance.shape[:-1]:
            earned = earned.unsqueeze(-1).expand_as(chance)
        elif earned.shape != chance.shape:
            raise UsageError(
                f"MDP.of: reward has shape {tuple(earned.shape)}, not {tuple(chance.shape[:-1])} [S, A] or {tuple(chance.shape)} [S, A, S]"
            )
        count, lead = chance.shape[-1], chance.shape[:-3]
        ends = _ends(terminal, lead, count)
        still = torch.eye(count, dtype=torch.float64).unsqueeze(1)
        shut = ends[..., None, None]
        chance, earned = torch.where(shut, still, chance), torch.where(shut, 0.0, earned)
        open_ = (~ends).to(torch.float64)
        first = open_ / open_.sum(-1, keepdim=True) if start is None else _numbers("start", start).expand(*lead, count)
        following = torch.arange(count).expand_as(chance)
        return MDP(chance, following, earned, first, ends, discount, limit, tuple(states), tuple(actions), grid)

    @staticmethod
    def from_table(
        table: Table | Sequence[Any],
        *,
        discount: float,
        start: int | Sequence[float],
        limit: int | None = None,
        states: Sequence[str] = (),
        actions: Sequence[str] = (),
        grid: tuple[int, int] | None = None,
    ) -> MDP:
        """The process of P[s][a] = [(p, s', r, done), …]; `start` is a state, or the probability of each.

        A state that is only entered with done ends episodes. Where one is entered both ways, the transitions that are done lead to one more state, "end".
        """
        rows = [[list(table[s][a]) for a in range(len(table[s]))] for s in range(len(table))]
        if not rows or not rows[0] or len({len(row) for row in rows}) != 1 or not all(o for row in rows for o in row):
            raise UsageError("MDP.from_table: P[s][a] must list outcomes for the same actions 0 … A-1 in every state 0 … S-1")
        count, width = len(rows), len(rows[0])
        every = [outcome for row in rows for outcomes in row for outcome in outcomes]
        if any(len(outcome) != 4 or not 0 <= int(outcome[1]) < count for outcome in every):
            raise UsageError(
                f"MDP.from_table: an outcome must be (probability, next state, reward, done) with a next state in 0 … {count - 1}"
            )
        done, open_ = ({int(s) for p, s, _, over in every if p > 0 and bool(over) is ended} for ended in (True, False))
        more = bool(done & open_)
        size, outcomes = count + more, max(len(o) for row in rows for o in row)
        chance = torch.zeros(size, width, outcomes, dtype=torch.float64)
        earned = torch.zeros_like(chance)
        following = torch.arange(size)[:, None, None].repeat(1, width, outcomes)
        ends = torch.zeros(size, dtype=torch.bool)
        ends[[*(done - open_), *([count] if more else [])]] = True
        for s, row in enumerate(rows):
            for a, listed in enumerate(row):
                for k, (p, after, r, over) in enumerate(listed):
                    chance[s, a, k], earned[s, a, k] = float(p), float(r)
                    following[s, a, k] = count if over and int(after) in open_ else int(after)
        chance[ends], earned[ends], following[ends] = 0.0, 0.0, torch.arange(size)[ends][:, None, None]
        chance[ends, :, 0] = 1.0
        first = torch.zeros(size, dtype=torch.float64)
        first[:count] = _first(start, count)
        names = (*states, "end") if states and more else tuple(states)
        return MDP(chance, following, earned, first, ends, discount, limit, names, tuple(actions), None if more else grid)

    @staticmethod
    def from_env(env: Any, *, discount: float) -> MDP:
        """The process of an environment that exposes P[s][a] and `initial_state_distrib`, as Gymnasium's FrozenLake, CliffWalking and Taxi do; its time limit is kept."""
        inner = getattr(env, "unwrapped", env)
        table, start = getattr(inner, "P", None), getattr(inner, "initial_state_distrib", None)
        if table is None or start is None:
            raise UsageError(
                f"MDP.from_env: {type(inner).__name__} has no {'P' if table is None else 'initial_state_distrib'}; "
                "give the table to MDP.from_table, or arrays to MDP.of"
            )
        shape = tuple(getattr(getattr(inner, "desc", None), "shape", None) or getattr(inner, "shape", None) or ())
        fits = len(shape) == 2 and prod(shape) == len(table)
        limit = getattr(getattr(env, "spec", None), "max_episode_steps", None)
        return MDP.from_table(
            table, discount=discount, start=[float(p) for p in start], limit=limit, grid=(shape[0], shape[1]) if fits else None
        )

    @property
    def state_count(self) -> int:
        return self.chance.shape[-3]

    @property
    def action_count(self) -> int:
        return self.chance.shape[-2]

    @property
    def lead(self) -> torch.Size:
        """The leading axes: empty for one process."""
        return self.chance.shape[:-3]

    @cached_property
    def transition(self) -> Tensor:
        """p(s' | s, a), [..., S, A, S']."""
        found = self.chance.new_zeros(*self.chance.shape[:-1], self.state_count)
        return found.scatter_add(-1, self.following, self.chance)

    @cached_property
    def reward(self) -> Tensor:
        """E[r | s, a], [..., S, A]."""
        return (self.chance * self.earned).sum(-1)

    def name(self, state: int) -> str:
        """What a reader calls a state."""
        return self.states[state] if self.states else str(state)


def probabilities(mdp: MDP, policy: Tensor) -> Tensor:
    """pi(a | s) [..., S, A] of a deterministic policy (an action for every state, integers [..., S]) or of a stochastic one [..., S, A], checked.

    Leading axes of a policy are many policies at once. What comes in float32 is divided by its sum.
    """
    if not policy.is_floating_point():
        if (
            policy.shape[-1:] != (mdp.state_count,)
            or policy.dtype == torch.bool
            or not bool(((policy >= 0) & (policy < mdp.action_count)).all())
        ):
            raise UsageError(
                f"a deterministic policy is one action in 0 … {mdp.action_count - 1} for each of {mdp.state_count} states, [S], not {_told(policy)}"
            )
        return torch.nn.functional.one_hot(policy.long(), mdp.action_count).to(torch.float64)
    if policy.shape[-2:] != (mdp.state_count, mdp.action_count):
        raise UsageError(f"a stochastic policy is pi(a | s), [..., {mdp.state_count}, {mdp.action_count}], not {_told(policy)}")
    found, exact = policy.to(torch.float64), policy.dtype == torch.float64
    total = found.sum(-1, keepdim=True)
    if not bool((found >= 0).all() and ((total.detach() - 1).abs() < (CLOSE if exact else 1e-5)).all()):
        raise UsageError(
            "a stochastic policy needs probabilities that are not negative and add up to 1 in every state; logits need .softmax(-1)"
        )
    return found if exact else found / total


def uniform(mdp: MDP) -> Tensor:
    """The policy that takes every action as often, [S, A]."""
    return torch.full((mdp.state_count, mdp.action_count), 1 / mdp.action_count, dtype=torch.float64)


# ---------------------------------------------------------------------------------------------- what is refused


def _check(mdp: MDP) -> None:
    shape = mdp.chance.shape
    if len(shape) < 3 or 0 in shape:
        raise UsageError(f"MDP: chance has shape {tuple(shape)}, not [..., S, A, K] with at least one state, action and outcome")
    for name, wanted in (("following", shape), ("earned", shape), ("start", shape[:-2]), ("terminal", shape[:-2])):
        if getattr(mdp, name).shape != wanted:
            raise UsageError(f"MDP: {name} has shape {tuple(getattr(mdp, name).shape)}, not {tuple(wanted)}")
    if not 0 <= mdp.discount <= 1:
        raise UsageError(f"MDP: discount={mdp.discount} must lie in [0, 1]")
    if mdp.limit is not None and mdp.limit < 1:
        raise UsageError(f"MDP: limit={mdp.limit} must be at least 1 step, or None for no limit")
    for name, count in (("states", mdp.state_count), ("actions", mdp.action_count)):
        if getattr(mdp, name) and len(getattr(mdp, name)) != count:
            raise UsageError(f"MDP: {len(getattr(mdp, name))} names for {count} {name}")
    if mdp.grid is not None and prod(mdp.grid) != mdp.state_count:
        raise UsageError(f"MDP: a grid of {mdp.grid[0]} × {mdp.grid[1]} does not hold {mdp.state_count} states")
    if not bool(((mdp.following >= 0) & (mdp.following < mdp.state_count)).all()):
        raise UsageError(f"MDP: a next state lies outside 0 … {mdp.state_count - 1}")
    if not bool(mdp.earned.isfinite().all()):
        raise UsageError("MDP: a reward is not finite")
    total = mdp.chance.sum(-1)
    wrong = ((total - 1).abs() > CLOSE) | ~(mdp.chance >= 0).all(-1)
    if bool(wrong.any()):
        *_, s, a = wrong.nonzero()[0].tolist()
        bad = total[wrong][0].item()
        raise UsageError(
            f"MDP: the outcomes of action {a} in state {mdp.name(s)} have probabilities that add up to {bad:.6g}; none may be negative, and all must add up to 1"
        )
    if bool(((mdp.start.sum(-1) - 1).abs() > CLOSE).any()) or not bool((mdp.start >= 0).all()):
        raise UsageError("MDP: the probabilities of `start` must not be negative and must add up to 1")
    if bool((mdp.start[mdp.terminal] > 0).any()):
        raise UsageError("MDP: an episode cannot start in a terminal state; leave those out of `start`")
    here = torch.arange(mdp.state_count)[:, None, None]
    if bool((mdp.terminal[..., None, None] & (mdp.chance > 0) & ((mdp.following != here) | (mdp.earned != 0))).any()):
        raise UsageError("MDP: a terminal state must lead to itself and earn 0; MDP.of and MDP.from_table see to that")


def _numbers(name: str, given: Any) -> Tensor:
    try:
        return torch.as_tensor(given, dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UsageError(f"MDP: {name} is not an array of numbers: {error}") from None


def _ends(terminal: Any, lead: torch.Size, count: int) -> Tensor:
    """A mask [..., S] from a mask, from state numbers, or from None."""
    if terminal is None:
        return torch.zeros(*lead, count, dtype=torch.bool)
    given = torch.as_tensor(terminal)
    if given.dtype == torch.bool:
        if given.shape[-1:] != (count,):
            raise UsageError(f"MDP.of: terminal is a mask of shape {tuple(given.shape)} for {count} states")
        return given.expand(*lead, count)
    if given.dim() != 1 or (given.is_floating_point() and given.numel()) or not bool(((given >= 0) & (given < count)).all()):
        raise UsageError(f"MDP.of: terminal must be a mask [..., S] or a list of states in 0 … {count - 1}")
    mask = torch.zeros(count, dtype=torch.bool)
    mask[given.long()] = True
    return mask.expand(*lead, count)


def _first(start: Any, count: int) -> Tensor:
    """The probabilities of the first states, from one state or from all of them."""
    given = _numbers("start", start)
    if given.dim() == 0 and float(given) in range(count):
        return torch.eye(count, dtype=torch.float64)[int(given)]
    if given.shape != (count,):
        raise UsageError(f"MDP.from_table: start={start} must be a state in 0 … {count - 1}, or {count} probabilities")
    return given


def _told(policy: Tensor) -> str:
    return f"{str(policy.dtype).removeprefix('torch.')} {tuple(policy.shape)}"
