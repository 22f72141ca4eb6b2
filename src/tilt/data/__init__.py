"""From files to packed tokens: sources, formats, rendering, rollouts, packing."""

from tilt.data.formats import Dataset, read
from tilt.data.packing import Pack, pack
from tilt.data.rendering import Renderer, renderer
from tilt.data.rollouts import Prompt, Rollout, Sampling
from tilt.data.sources import Source, load
from tilt.data.streams import Stream, blocks, split

__all__ = [
    "Dataset",
    "Pack",
    "Prompt",
    "Renderer",
    "Rollout",
    "Sampling",
    "Source",
    "Stream",
    "blocks",
    "load",
    "pack",
    "read",
    "renderer",
    "split",
]
