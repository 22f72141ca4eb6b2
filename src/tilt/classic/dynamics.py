"""The equations of motion of CartPole, Acrobot, MountainCar and Pendulum on N states at once, [N, state], in float64; step for step those of Gymnasium."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


@dataclass(frozen=True)
class Discrete:
    """Actions 0 … count - 1."""

    count: int


@dataclass(frozen=True)
class Continuous:
    """Actions of R^n between `low` and `high`; what lies outside is clipped by the environment."""

    low: tuple[float, ...]
    high: tuple[float, ...]

    @property
    def size(self) -> int:
        return len(self.low)


Actions = Discrete | Continuous


class Dynamics(Protocol):
    """Equations of motion: `start` turns uniforms [N, state] into first states, `step` gives (next states, rewards [N], ended [N]), `observe` [N, observation]."""

    actions: ClassVar[Actions]
    state: ClassVar[int]
    observation: ClassVar[int]
    limit: ClassVar[int]

    def start(self, uniforms: Array) -> Array: ...

    def step(self, states: Array, actions: Array) -> tuple[Array, Array, Array]: ...

    def observe(self, states: Array) -> Array: ...


@dataclass(frozen=True)
class CartPole(Dynamics):
    """A pole on a cart that is pushed by ±10 N: +1 a step until it leans by 12° or the cart is 2.4 away (Barto, Sutton and Anderson 1983); explicit Euler, 0.02 s.

    State x, x', theta, theta' (also what is observed), each uniform in ±0.05 at first.
    """

    actions: ClassVar[Actions] = Discrete(2)
    state: ClassVar[int] = 4
    observation: ClassVar[int] = 4
    limit: ClassVar[int] = 500

    def start(self, uniforms: Array) -> Array:
        return 0.1 * uniforms - 0.05

    def step(self, states: Array, actions: Array) -> tuple[Array, Array, Array]:
        _, speed, angle, turn = states.T
        sin, cos = np.sin(angle), np.cos(angle)
        push = (20.0 * actions - 10.0 + 0.05 * turn * turn * sin) / 1.1
        spin = (9.8 * sin - cos * push) / (0.5 * (4.0 / 3.0 - 0.1 * cos * cos / 1.1))
        rates = np.stack((speed, push - 0.05 * spin * cos / 1.1, turn, spin), 1)
        after = states + 0.02 * rates
        away = np.abs(after)
        ended = (away[:, 0] > 2.4) | (away[:, 2] > 12 * 2 * np.pi / 360)
        return after, np.ones(len(after)), ended

    def observe(self, states: Array) -> Array:
        return states.astype(np.float32)


@dataclass(frozen=True)
class Acrobot(Dynamics):
    """Two links, a torque of -1, 0 or 1 on the joint between them: -1 a step until the tip is one link above the bar (Sutton 1996); Runge-Kutta 4, 0.2 s.

    State theta1, theta2, theta1', theta2', each uniform in ±0.1 at first; observed are cos and sin of both angles, and the speeds.
    """

    actions: ClassVar[Actions] = Discrete(3)
    state: ClassVar[int] = 4
    observation: ClassVar[int] = 6
    limit: ClassVar[int] = 500

    def start(self, uniforms: Array) -> Array:
        return (0.2 * uniforms - 0.1).astype(np.float32).astype(np.float64)

    def step(self, states: Array, actions: Array) -> tuple[Array, Array, Array]:
        torque = actions - 1.0
        k1 = self.rates(states, torque)
        k2 = self.rates(states + 0.1 * k1, torque)
        k3 = self.rates(states + 0.1 * k2, torque)
        k4 = self.rates(states + 0.2 * k3, torque)
        after = states + 0.2 / 6.0 * (k1 + 2 * k2 + 2 * k3 + k4)
        after[:, :2] = np.remainder(after[:, :2] + np.pi, 2 * np.pi) - np.pi
        limits = np.array([4 * np.pi, 9 * np.pi])
        after[:, 2:] = np.minimum(np.maximum(after[:, 2:], -limits), limits)
        ended = -np.cos(after[:, 0]) - np.cos(after[:, 0] + after[:, 1]) > 1.0
        return after, np.where(ended, 0.0, -1.0), ended

    @staticmethod
    def rates(states: Array, torque: Array) -> Array:
        """Time derivatives of the state; masses and lengths 1, centres of mass at 0.5, moments of inertia 1."""
        one, two, fast, faster = states.T
        cos, sin = np.cos(two), np.sin(two)
        d1 = 0.25 + (1.25 + cos) + 2.0
        d2 = 0.25 + 0.5 * cos + 1.0
        phi2 = 4.9 * np.sin(one + two)  # cos(x - pi/2)
        phi1 = -0.5 * faster * faster * sin - faster * fast * sin + 14.7 * np.sin(one) + phi2
        second = (torque + d2 / d1 * phi1 - 0.5 * fast * fast * sin - phi2) / (1.25 - d2 * d2 / d1)
        return np.stack((fast, faster, -(d2 * second + phi1) / d1, second), 1)

    def observe(self, states: Array) -> Array:
        one, two = states[:, 0], states[:, 1]
        return np.stack((np.cos(one), np.sin(one), np.cos(two), np.sin(two), states[:, 2], states[:, 3]), 1).astype(np.float32)


@dataclass(frozen=True)
class MountainCar(Dynamics):
    """A car too weak for the hill, pushed left, not at all or right: -1 a step until it is at 0.5 (Moore 1990). State position, in [-.6, -.4] at first, and speed."""

    actions: ClassVar[Actions] = Discrete(3)
    state: ClassVar[int] = 2
    observation: ClassVar[int] = 2
    limit: ClassVar[int] = 200

    def start(self, uniforms: Array) -> Array:
        return np.stack((0.2 * uniforms[:, 0] - 0.6, np.zeros(len(uniforms))), 1)

    def step(self, states: Array, actions: Array) -> tuple[Array, Array, Array]:
        place, speed = states.T
        speed = np.clip(speed + (actions - 1) * 0.001 - 0.0025 * np.cos(3 * place), -0.07, 0.07)
        place = np.clip(place + speed, -1.2, 0.6)
        speed = np.where((place == -1.2) & (speed < 0), 0.0, speed)
        return np.stack((place, speed), 1), np.full(len(place), -1.0), (place >= 0.5) & (speed >= 0)

    def observe(self, states: Array) -> Array:
        return states.astype(np.float32)


@dataclass(frozen=True)
class Pendulum(Dynamics):
    """A pendulum that a torque in [-2, 2] should hold upright: reward -(theta² + 0.1 theta'² + 0.001 u²), before the step; never ends. Observed: cos, sin, theta'."""

    actions: ClassVar[Actions] = Continuous((-2.0,), (2.0,))
    state: ClassVar[int] = 2
    observation: ClassVar[int] = 3
    limit: ClassVar[int] = 200

    def start(self, uniforms: Array) -> Array:
        return (2 * uniforms - 1) * np.array([np.pi, 1.0])

    def step(self, states: Array, actions: Array) -> tuple[Array, Array, Array]:
        angle, turn = states.T
        torque = np.clip(actions[:, 0], -2.0, 2.0)
        off = np.remainder(angle + np.pi, 2 * np.pi) - np.pi
        cost = off * off + 0.1 * turn * turn + 0.001 * torque * torque
        turn = np.clip(turn + (15.0 * np.sin(angle) + 3.0 * torque) * 0.05, -8.0, 8.0)
        return np.stack((angle + turn * 0.05, turn), 1), -cost, np.zeros(len(angle), dtype=bool)

    def observe(self, states: Array) -> Array:
        angle = states[:, 0]
        return np.stack((np.cos(angle), np.sin(angle), states[:, 1]), 1).astype(np.float32)


DYNAMICS: Mapping[str, Dynamics] = MappingProxyType(
    {"CartPole-v1": CartPole(), "Acrobot-v1": Acrobot(), "MountainCar-v0": MountainCar(), "Pendulum-v1": Pendulum()}
)
"""Gymnasium's ids that are simulated here."""
