"""From files to packed tokens: sources, formats, rendering, rollouts, packing."""

from tilt.data.packing import Pack, pack
from tilt.data.rollouts import Prompt, Rollout, Sampling

__all__ = ["Pack", "Prompt", "Rollout", "Sampling", "pack"]
