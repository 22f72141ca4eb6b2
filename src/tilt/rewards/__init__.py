"""Rewards: rules, your own functions (isolated if you wish), reward models, and their weighted sum."""

from tilt.rewards.check import check
from tilt.rewards.functions import RewardFunction, Scored, load_function
from tilt.rewards.model import ModelReward, Rerendered, own_tokens, same_tokenizer, same_tokens
from tilt.rewards.rules import RULES
from tilt.rewards.score import Part, Scorer, build
from tilt.rewards.spec import RewardSpec, parse
from tilt.rewards.text import Text, read

__all__ = [
    "RULES", "ModelReward", "Part", "Rerendered", "RewardFunction", "RewardSpec", "Scored", "Scorer", "Text",
    "build", "check", "load_function", "own_tokens", "parse", "read", "same_tokenizer", "same_tokens",
]  # fmt: skip
