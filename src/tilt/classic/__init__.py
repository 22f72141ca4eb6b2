"""Classic reinforcement learning on the same mathematics: finite processes with known answers, solved, learned and improved step by step.

Pages that run through it: docs/classic.
"""

from tilt.classic.mdp import MDP, probabilities, uniform
from tilt.classic.tables import LAKE_4, LAKE_8, cliff_walking, frozen_lake, random_processes, random_walk, sutton_barto_grid, taxi

__all__ = [
    "LAKE_4",
    "LAKE_8",
    "MDP",
    "cliff_walking",
    "frozen_lake",
    "probabilities",
    "random_processes",
    "random_walk",
    "sutton_barto_grid",
    "taxi",
    "uniform",
]
