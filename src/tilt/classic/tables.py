"""Processes with known answers, built here from their rules: FrozenLake, CliffWalking, Taxi, the grid of Sutton and Barto, walks, and random processes."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from tilt.classic.mdp import MDP
from tilt.errors import UsageError

LAKE_4 = ("SFFF", "FHFH", "FFFH", "HFFG")
LAKE_8 = ("SFFFFFFF", "FFFFFFFF", "FFFHFFFF", "FFFFFHFF", "FFFHFFFF", "FHHFFFHF", "FHFFHFHF", "FFFHFFFG")
LEFT, DOWN, RIGHT, UP = (0, -1), (1, 0), (0, 1), (-1, 0)

Outcome = tuple[float, int, float, bool]


def frozen_lake(rows: Sequence[str] = LAKE_4, *, slippery: bool = True, discount: float = 0.99, limit: int | None = None) -> MDP:
    """S start, F ice, H hole, G goal; reward 1 on entering G, else 0, and H and G end the episode. Actions left, down, right, up.

    On slippery ice the direction is the chosen one or a neighbour of it, a third each. The limit is 100 steps, or 200 on a lake larger than 4 × 4.
    """
    text = "".join(rows)
    if len({len(row) for row in rows}) != 1 or set(text) - set("SFHG") or "S" not in text or "G" not in text:
        raise UsageError("frozen_lake: a map has rows of one length made of S F H G, with an S and a G")
    size = (len(rows), len(rows[0]))

    def outcome(s: int, direction: tuple[int, int], chance: float) -> Outcome:
        after = _moved(s, direction, size)
        return chance, after, float(text[after] == "G"), text[after] in "HG"

    def listed(s: int, a: int) -> list[Outcome]:
        if text[s] in "HG":
            return [(1.0, s, 0.0, True)]
        return _slipping(lambda d, p: outcome(s, (LEFT, DOWN, RIGHT, UP)[d], p), a, slippery)

    table = [[listed(s, a) for a in range(4)] for s in range(len(text))]
    start = [(letter == "S") / text.count("S") for letter in text]
    steps = (100 if len(text) <= 16 else 200) if limit is None else limit
    return MDP.from_table(
        table, discount=discount, start=start, limit=steps, states=_cells(size), actions=("left", "down", "right", "up"), grid=size
    )


def cliff_walking(*, slippery: bool = False, discount: float = 1.0, limit: int | None = None) -> MDP:
    """4 × 12 cells, from the lower left to the lower right corner; -1 a step, and -100 and back to the start, without an end, for stepping off the cliff between them.

    Actions up, right, down, left. Slippery: the direction is the chosen one or a neighbour of it, a third each. No time limit of its own.
    """
    size, start, goal = (4, 12), 36, 47

    def outcome(s: int, direction: tuple[int, int], chance: float) -> Outcome:
        after = _moved(s, direction, size)
        if start < after < goal:
            return chance, start, -100.0, False
        return chance, after, -1.0, after == goal

    def listed(s: int, a: int) -> list[Outcome]:
        if s == goal:
            return [(1.0, s, 0.0, True)]
        return _slipping(lambda d, p: outcome(s, (UP, RIGHT, DOWN, LEFT)[d], p), a, slippery)

    table = [[listed(s, a) for a in range(4)] for s in range(48)]
    return MDP.from_table(
        table, discount=discount, start=start, limit=limit, states=_cells(size), actions=("up", "right", "down", "left"), grid=size
    )


STANDS = ((0, 0), (0, 4), (4, 0), (4, 3))
WALLS = {(0, 1), (1, 1), (3, 0), (4, 0), (3, 2), (4, 2)}
"""Cells with a wall on their east side."""


def taxi(*, discount: float = 0.99, limit: int | None = 200) -> MDP:
    """A taxi on 5 × 5 cells fetches a passenger from one of four stands and brings them to another: +20 on delivery, which ends the episode, -10 for a wrong
    pickup or dropoff, else -1.

    State ((row 5 + column) 5 + passenger) 4 + destination, passenger 4 is in the taxi; actions south, north, east, west, pickup, dropoff.
    """
    table = [[[_drive(s, a)] for a in range(6)] for s in range(500)]
    first = [(s // 4 % 5 < 4 and s // 4 % 5 != s % 4) / 300 for s in range(500)]
    return MDP.from_table(
        table, discount=discount, start=first, limit=limit, actions=("south", "north", "east", "west", "pickup", "dropoff"),
        states=[f"{s // 100},{s // 20 % 5} {'RGYBt'[s // 4 % 5]}→{'RGYB'[s % 4]}" for s in range(500)],
    )  # fmt: skip


def _drive(s: int, a: int) -> Outcome:
    row, column, passenger, goal = s // 100, s // 20 % 5, s // 4 % 5, s % 4
    here, reward, done = (row, column), -1.0, False
    if passenger == goal:
        return 1.0, s, 0.0, True
    if a < 2:
        row = min(row + 1, 4) if a == 0 else max(row - 1, 0)
    elif a == 2 and here not in WALLS:
        column = min(column + 1, 4)
    elif a == 3 and (row, column - 1) not in WALLS:
        column = max(column - 1, 0)
    elif a == 4:
        passenger, reward = (4, -1.0) if passenger < 4 and here == STANDS[passenger] else (passenger, -10.0)
    elif a == 5:
        if passenger == 4 and here == STANDS[goal]:
            passenger, reward, done = goal, 20.0, True
        elif passenger == 4 and here in STANDS:
            passenger = STANDS.index(here)
        else:
            reward = -10.0
    return 1.0, ((row * 5 + column) * 5 + passenger) * 4 + goal, reward, done


def sutton_barto_grid(*, discount: float = 0.9) -> MDP:
    """5 × 5 cells, actions north, east, south, west: any action at (0, 1) earns 10 and leads to (4, 1), at (0, 3) earns 5 and leads to (2, 3); a step off the grid
    earns -1 and stays, every other step 0 (Sutton and Barto, example 3.5)."""
    jumps = {1: (21, 10.0), 3: (13, 5.0)}

    def outcome(s: int, a: int) -> Outcome:
        if s in jumps:
            return 1.0, *jumps[s], False
        after = _moved(s, (UP, RIGHT, DOWN, LEFT)[a], (5, 5))
        return 1.0, after, -1.0 if after == s else 0.0, False

    table = [[[outcome(s, a)] for a in range(4)] for s in range(25)]
    return MDP.from_table(
        table, discount=discount, start=[1 / 25] * 25, states=_cells((5, 5)), actions=("north", "east", "south", "west"), grid=(5, 5)
    )


def random_walk(states: int = 5, *, discount: float = 1.0) -> MDP:
    """A row of states between two ends, from the middle; the only action steps left or right, half each; 1 for leaving on the right (Sutton and Barto, example 6.2).

    The true value of state i of n is i / (n + 1).
    """
    if states < 1:
        raise UsageError(f"random_walk: states={states} must be at least 1")
    last = states + 1
    table = [
        [[(0.5, i - 1, 0.0, i == 1), (0.5, i + 1, float(i == states), i == states)] if 0 < i < last else [(1.0, i, 0.0, True)]]
        for i in range(last + 1)
    ]
    names = ["left", *(str(i) for i in range(1, last)), "right"]
    return MDP.from_table(table, discount=discount, start=(states + 1) // 2, states=names, actions=("step",), grid=(1, last + 1))


def random_processes(count: int | None = None, *, states: int = 5, actions: int = 3, discount: float = 0.9, seed: int = 0) -> MDP:
    """Processes whose next states and starts are uniform on the simplex and whose rewards are normal: `count` of them along a leading axis, or one without it."""
    generator = torch.Generator().manual_seed(seed)
    lead = () if count is None else (count,)

    def simplex(*shape: int) -> torch.Tensor:
        drawn = -torch.rand(*lead, *shape, generator=generator, dtype=torch.float64).log()
        return drawn / drawn.sum(-1, keepdim=True)

    reward = torch.randn(*lead, states, actions, generator=generator, dtype=torch.float64)
    return MDP.of(simplex(states, actions, states), reward, discount=discount, start=simplex(states))


def _moved(s: int, direction: tuple[int, int], size: tuple[int, int]) -> int:
    """The cell in that direction, or the same one at the border."""
    row, column = (min(max(place + step, 0), end - 1) for place, step, end in zip(divmod(s, size[1]), direction, size, strict=True))
    return row * size[1] + column


def _slipping(outcome: Callable[[int, float], Outcome], a: int, slippery: bool) -> list[Outcome]:
    """The outcome of a direction, or a third each of it and its neighbours."""
    return [outcome((a + turn) % 4, 1 / 3) for turn in (-1, 0, 1)] if slippery else [outcome(a, 1.0)]


def _cells(size: tuple[int, int]) -> list[str]:
    return [f"({row}, {column})" for row in range(size[0]) for column in range(size[1])]
