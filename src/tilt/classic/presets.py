"""Settings per method and environment: rows of THE TABLE with an environment's discount, after Stable-Baselines3's zoo."""

from __future__ import annotations

from dataclasses import replace

from tilt.classic.on_policy import OnPolicy
from tilt.objectives.algorithms import ALGORITHMS
from tilt.objectives.control import EntropyBonus, NoBonus
from tilt.objectives.credit import GAE, Credit, ReturnToGo
from tilt.objectives.objective import Objective
from tilt.objectives.penalty import TrustRegion
from tilt.objectives.policy import Clip, TokenAverage
from tilt.objectives.value import ValueLoss


def row(method: str, gamma: float, lam: float = 0.95, *, entropy: float = 0.0, value: float = 0.5) -> Objective:
    """The table's row of a method with an environment's discount: mean over actions, a critic, an entropy bonus where it is above 0."""
    table = {"reinforce": "reinforce_baseline", "a2c": "a2c", "ppo": "ppo", "ppo-kl": "ppo_kl", "trpo": "trpo"}
    credit: Credit = GAE(gamma, lam, whitened=method != "a2c")
    if method == "reinforce":
        credit = ReturnToGo(gamma, baseline="critic", whitened=True)
    found = replace(ALGORITHMS[table[method]], credit=credit, average=TokenAverage(), value=ValueLoss(value))
    return replace(found, bonus=EntropyBonus(entropy) if entropy else NoBonus())


def cartpole_ppo() -> OnPolicy:
    return OnPolicy(
        replace(row("ppo", 0.98, 0.8), surrogate=Clip(0.2, 0.2)),
        envs=8,
        steps=32,
        batch=256,
        passes=20,
        lr=1e-3,
        schedule="linear",
        clip_schedule="linear",
    )


def cartpole_trpo() -> OnPolicy:
    return OnPolicy(
        replace(row("trpo", 0.99, 0.98), penalty=TrustRegion(0.01, damping=1e-3, iterations=15)),
        envs=2,
        steps=512,
        batch=128,
        critic_passes=20,
        lr=1e-3,
    )
