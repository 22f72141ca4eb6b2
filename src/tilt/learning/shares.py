"""Parts of a batch: some sequences of a pack or of its experience, on the device that computes."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor

from tilt.data.packing import Pack
from tilt.objectives import Experience, Signals

Shareable = TypeVar("Shareable", Pack, Experience)


def share_of(whole: Shareable, sequences: Tensor) -> Shareable:
    """`whole.take(sequences)`, or the whole itself where these are all its sequences in order."""
    count = whole.layout.sequences
    return whole if len(sequences) == count and torch.equal(sequences, torch.arange(count)) else whole.take(sequences)


def placed(experience: Experience, device: torch.device) -> Experience:
    """The experience on this device."""
    if device.type == "cpu":
        return experience
    signals = Signals(**{k: v.to(device) for k, v in vars(experience.signals).items()})
    per_action = (experience.advantages, experience.returns, experience.weights, experience.factors)
    advantages, returns, weights, factors = (x.to(device) for x in per_action)
    return Experience(experience.layout.to(device), signals, advantages, returns, weights, factors, experience.final.to(device))
