"""Tilt: reinforcement learning for language models, from supervised fine-tuning to PPO with four models.

`import tilt` loads nothing heavy: the sub-packages are imported where they are used.
"""

__version__ = "0.1.0"
