"""Pictures in characters for `tilt classic`: values and policies on grids, a walk through a process, and one episode of a control task."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from tilt.classic.agents import Agent
from tilt.classic.environments import Environments
from tilt.classic.episodes import sample
from tilt.classic.mdp import MDP

ARROWS = {"left": "←", "west": "←", "right": "→", "east": "→", "up": "↑", "north": "↑", "down": "↓", "south": "↓"}
FRAMES = 24
"""Lines of one episode."""


def tabular(mdp: MDP, values: Tensor, policy: Tensor) -> str:
    """Values and actions on the grid, `·` where an episode ends; without a grid the ten states of highest value."""
    if mdp.grid is None:
        best = values.argsort(descending=True)[:10].tolist()
        return "\n".join(
            [
                f"{len(values)} states; the best ten:",
                *(f"  {mdp.name(s):<12} {float(values[s]):9.4f}  {_action(mdp, int(policy[s]))}" for s in best),
            ]
        )
    rows, columns = mdp.grid
    lines = []
    for row in range(rows):
        cells = range(row * columns, (row + 1) * columns)
        numbers = "".join(f"{float(values[s]):9.3f}" if not mdp.terminal[s] else "        ·" for s in cells)
        arrows = " ".join("·" if mdp.terminal[s] else ARROWS.get(_action(mdp, int(policy[s])), str(int(policy[s]))) for s in cells)
        lines.append(f"{numbers}     {arrows}")
    return "\n".join(lines)


def _action(mdp: MDP, a: int) -> str:
    return mdp.actions[a] if mdp.actions else str(a)


def walk(mdp: MDP, policy: Tensor, seed: int) -> str:
    """One episode, a line a step."""
    found = sample(mdp, policy, 1, seed=seed, limit=mdp.limit or 200)
    states = [*found.states.tolist(), int(found.last[0])]
    lines = [
        f"  {t:>3}  {mdp.name(states[t]):<10} {_action(mdp, a):<8} → {mdp.name(states[t + 1]):<10} {r:+g}"
        for t, (a, r) in enumerate(zip(found.actions.tolist(), found.rewards.tolist(), strict=True))
    ]
    shown = lines if len(lines) <= FRAMES else [*lines[: FRAMES - 4], f"  … {len(lines) - FRAMES + 1} more steps", *lines[-3:]]
    how = "ended" if bool(found.ended[0]) else "was cut off"
    return "\n".join([f"one episode, which {how} after {len(lines)} steps and earned {float(found.rewards.sum()):g}:", *shown])


def episode(agent: Agent, environments: Environments, seed: int) -> str:
    """One episode with the likeliest actions, about 24 of its moments as a line each."""
    now, earned, moments, over = environments.reset(seed), 0.0, [], False
    while not over:
        action = agent.act(now)
        moments.append((now[0], action[0]))
        moved = environments.step(action)
        earned, over, now = earned + float(moved.rewards[0]), bool(moved.terminated[0] or moved.truncated[0]), moved.observations
    how = "ended" if moved.terminated[0] else "was cut off"
    every = max(1, -(-len(moments) // FRAMES))
    draw = DRAWINGS.get(agent.environment, _numbers)
    lines = [f"  {t:>5} {draw(*moments[t])}" for t in range(0, len(moments), every)]
    return "\n".join([f"one episode, which {how} after {len(moments)} steps and earned {earned:.1f}:", *lines])


def _at(place: float, low: float, high: float, mark: str, width: int = 61) -> str:
    """A mark on a line from low to high."""
    column = round((min(max(place, low), high) - low) / (high - low) * (width - 1))
    return "│" + " " * column + mark + " " * (width - 1 - column) + "│"


def _cart(seen: np.ndarray, action: np.ndarray) -> str:
    lean = "╱" if seen[2] > 0.01 else "╲" if seen[2] < -0.01 else "│"
    return _at(float(seen[0]), -2.4, 2.4, lean) + f" {'→' if action else '←'} {np.degrees(seen[2]):+5.1f}°"


def _car(seen: np.ndarray, action: np.ndarray) -> str:
    return _at(float(seen[0]), -1.2, 0.6, "█") + f" {'←·→'[int(action)]}"


def _pendulum(seen: np.ndarray, action: np.ndarray) -> str:
    angle = np.degrees(np.arctan2(seen[1], seen[0]))
    return _at(float(angle), -180, 180, "●") + f" {angle:+6.1f}° from upright, torque {float(action[0]):+.2f}"


def _acrobot(seen: np.ndarray, action: np.ndarray) -> str:
    tip = -float(seen[0]) - float(seen[0] * seen[2] - seen[1] * seen[3])
    return _at(tip, -2.0, 2.0, "●") + f" tip at {tip:+.2f}, goal above 1, torque {int(action) - 1:+d}"


def _numbers(seen: np.ndarray, action: np.ndarray) -> str:
    shown = np.flatnonzero(seen) if len(seen) > 12 else None
    told = f"state {shown.tolist()}" if shown is not None and len(shown) < 5 else " ".join(f"{x:+.2f}" for x in seen[:12].tolist())
    return f"{told}  action {torch.as_tensor(action).tolist()}"


DRAWINGS: dict[str, Callable[[np.ndarray, np.ndarray], str]] = {
    "CartPole-v1": _cart,
    "MountainCar-v0": _car,
    "Pendulum-v1": _pendulum,
    "Acrobot-v1": _acrobot,
}
