"""Settings per method and environment: rows of THE TABLE with an environment's discount, in most places after Stable-Baselines3's zoo."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

from tilt.classic import deep_q, on_policy
from tilt.classic.deep_q import DeepQ
from tilt.classic.on_policy import OnPolicy
from tilt.errors import UsageError
from tilt.objectives.algorithms import ALGORITHMS
from tilt.objectives.control import Doubling, EntropyBonus, NoBonus
from tilt.objectives.credit import GAE, Credit, ReturnToGo
from tilt.objectives.objective import Objective
from tilt.objectives.penalty import OldKL, TrustRegion
from tilt.objectives.policy import TokenAverage
from tilt.objectives.value import ValueLoss

ROWS: Mapping[str, str] = MappingProxyType(
    {"reinforce": "reinforce_baseline", "a2c": "a2c", "ppo": "ppo", "ppo-kl": "ppo_kl", "trpo": "trpo"}
)
"""Method → row of THE TABLE."""
METHODS = ("dqn", *ROWS)


@dataclass(frozen=True)
class Preset:
    """Settings of a method for an environment, and how many steps it is given."""

    settings: OnPolicy | DeepQ
    steps: int


def row(method: str, gamma: float, lam: float = 0.95, *, entropy: float = 0.0, value: float = 1.0) -> Objective:
    """The table's row of a method with an environment's discount: mean over actions, a critic, an entropy bonus where it is above 0.

    `value` 1 is (V - R)^2 / 2 in the loss, what Stable-Baselines3 calls 0.5.
    """
    credit: Credit = GAE(gamma, lam, whitened=method != "a2c")
    if method == "reinforce":
        credit = ReturnToGo(gamma, baseline="critic", whitened=True)
    found = replace(ALGORITHMS[ROWS[method]], credit=credit, average=TokenAverage(), value=ValueLoss(value))
    return replace(found, bonus=EntropyBonus(entropy) if entropy else NoBonus())


def ppo(gamma: float, lam: float, *, kl: bool = False, entropy: float = 0.0, **settings: Any) -> OnPolicy:
    """PPO, its ratio held by the clip, or with `kl` by a penalty whose coefficient doubles and halves."""
    found = row("ppo-kl" if kl else "ppo", gamma, lam, entropy=entropy)
    if kl:
        found, settings = (
            replace(found, penalty=OldKL(1.0), control=Doubling(0.01)),
            {k: v for k, v in settings.items() if k != "clip_schedule"},
        )
    return OnPolicy(found, **settings)


def trpo(gamma: float, lam: float, **settings: Any) -> OnPolicy:
    """TRPO with steps of KL 0.01 and a critic that is fitted apart."""
    region = TrustRegion(0.01, iterations=15, damping=1e-3)
    return OnPolicy(replace(row("trpo", gamma, lam), penalty=region), envs=2, lr=1e-3, batch=128, **settings)


SCALED: dict[str, Any] = {"normalise_observations": True, "normalise_rewards": True}
PPO: Mapping[str, tuple[int, dict[str, Any]]] = MappingProxyType(
    {
        "CartPole-v1": (100_000, dict(gamma=0.98, lam=0.8, length=32, batch=256, passes=20, lr=1e-3, schedule="linear", clip_schedule="linear")),
        "Acrobot-v1": (200_000, dict(gamma=0.99, lam=0.94, envs=16, length=128, batch=256, passes=4, lr=1e-3, schedule="linear", **SCALED)),
        "MountainCar-v0": (1_000_000, dict(gamma=0.99, lam=0.98, envs=16, length=16, batch=256, passes=4, lr=1e-3, schedule="linear", **SCALED)),
        "Pendulum-v1": (100_000, dict(gamma=0.9, lam=0.95, envs=4, length=512, batch=128, passes=10, lr=1e-3, schedule="linear")),
        "LunarLander-v3": (1_000_000, dict(gamma=0.999, lam=0.98, envs=16, length=1024, batch=256, passes=8, lr=1e-3, schedule="linear", entropy=0.01)),
        "": (200_000, dict(gamma=0.99, lam=0.95, envs=8, length=256, batch=256, passes=10, lr=3e-4, **SCALED)),
    }
)  # fmt: skip
TRPO: Mapping[str, tuple[int, dict[str, Any]]] = MappingProxyType(
    {
        "CartPole-v1": (100_000, dict(gamma=0.99, lam=0.98, length=512, critic_passes=20)),
        "Acrobot-v1": (100_000, dict(gamma=0.99, lam=0.98, length=1024, critic_passes=20, **SCALED)),
        "MountainCar-v0": (100_000, dict(gamma=0.99, lam=0.98, length=1024, critic_passes=20, **SCALED)),
        "Pendulum-v1": (100_000, dict(gamma=0.9, lam=0.95, length=1024, critic_passes=15)),
        "": (200_000, dict(gamma=0.99, lam=0.95, length=1024, critic_passes=20, **SCALED)),
    }
)  # fmt: skip
DQN: Mapping[str, tuple[int, DeepQ]] = MappingProxyType(
    {
        "CartPole-v1": (
            50_000,
            DeepQ(lr=1e-3, schedule="linear", hidden=(64, 64), buffer=50_000, every=32, updates=16, target=256, double=True, returns=3),
        ),
        "Acrobot-v1": (100_000, DeepQ(lr=6.3e-4, batch=128, buffer=50_000, every=4, updates=4, target=250, epsilon_end=0.1, explore=0.12)),
        "MountainCar-v0": (120_000, DeepQ(lr=4e-3, batch=128, buffer=10_000, gamma=0.98, every=16, updates=8, target=600, epsilon_end=0.07, explore=0.2)),
        "": (200_000, DeepQ(lr=5e-4, batch=64, every=16, updates=8, target=500, epsilon_end=0.05, explore=0.2, double=True)),
    }
)  # fmt: skip
A2C: Mapping[str, tuple[int, OnPolicy]] = MappingProxyType(
    {
        "CartPole-v1": (500_000, OnPolicy(row("a2c", 0.99, 0.95), length=16, lr=2e-3, schedule="linear")),
        "": (500_000, OnPolicy(row("a2c", 0.99, 0.95), length=16, lr=1e-3, schedule="linear", **SCALED)),
    }
)
REINFORCE: Mapping[str, tuple[int, OnPolicy]] = MappingProxyType(
    {
        "CartPole-v1": (300_000, OnPolicy(row("reinforce", 0.99), length=0, batch=512, critic_passes=5, lr=5e-3, schedule="linear")),
        "": (500_000, OnPolicy(row("reinforce", 0.99), length=0, batch=512, critic_passes=5, lr=2e-3, schedule="linear", **SCALED)),
    }
)


def preset(method: str, environment: str) -> Preset:
    """A method's settings for an environment, or those for any other one."""
    if method not in METHODS:
        raise UsageError(f"method {method!r} is none of {', '.join(METHODS)}")

    def chosen(table: Mapping[str, tuple[int, Any]]) -> tuple[int, Any]:
        return table[environment if environment in table else ""]

    if method in ("ppo", "ppo-kl"):
        steps, settings = chosen(PPO)
        return Preset(ppo(kl=method == "ppo-kl", **settings), steps)
    if method == "trpo":
        steps, settings = chosen(TRPO)
        return Preset(trpo(**settings), steps)
    steps, made = chosen({"dqn": DQN, "a2c": A2C, "reinforce": REINFORCE}[method])  # type: ignore[type-var]
    return Preset(made, steps)


def train(settings: OnPolicy | DeepQ, *given: Any, **named: Any) -> Any:
    """Train with the settings of either kind: `deep_q.train` or `on_policy.train`."""
    return deep_q.train(settings, *given, **named) if isinstance(settings, DeepQ) else on_policy.train(settings, *given, **named)
