"""The mathematics of an update: rows of six choices on the action axis. Imports torch only."""

from tilt.objectives.experience import Experience, Outputs, Rewards, Signals
from tilt.segments import Layout

__all__ = ["Experience", "Layout", "Outputs", "Rewards", "Signals"]
