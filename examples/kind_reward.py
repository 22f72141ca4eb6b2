"""Rewards of your own: `tilt rl … --reward examples/kind_reward.py:kind`. None marks an answer that cannot be scored."""

from __future__ import annotations

import asyncio

KIND = ("please", "thank", "sorry", "glad", "welcome", "would", "could")
RUDE = ("stupid", "idiot", "shut", "whatever", "ugh")


def kind(prompts: list[str], completions: list[str], **columns: list[object]) -> list[float | None]:
    """Kind words less rude ones, at most 3 of each; an empty answer is not scored. `columns` holds every other column of the data by name."""
    return [_kindness(text) if text.strip() else None for text in completions]


async def slow_kind(completions: list[str]) -> list[float | None]:
    """The same, asked of a service: an `async def` reward waits for all answers at once."""
    return list(await asyncio.gather(*(_ask(text) for text in completions)))


async def _ask(text: str) -> float | None:
    await asyncio.sleep(0.01)  # a request to your judge
    return _kindness(text)


def _kindness(text: str) -> float:
    words = [word.strip(".,!?;:").lower() for word in text.split()]
    return float(min(3, sum(w in KIND for w in words)) - min(3, sum(w in RUDE for w in words)))
