"""What an update compares the policy with: another policy's distributions before every action of a batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from tilt.data.packing import Pack
from tilt.distributions import Anchor
from tilt.learning.shares import share_of
from tilt.models.heads import Head, frozen_head
from tilt.models.policy import Policy


@dataclass(frozen=True)
class Remembered:
    """Hidden states [A, D] on the CPU, zeros where they were not asked for, the head that reads them, and the direction of the KL."""

    hidden: Tensor
    head: Head
    direction: Literal["to", "from"]

    def of(self, actions: Tensor, device: torch.device) -> Anchor:
        """The anchor of these actions."""
        return Anchor(self.hidden[actions].to(device), self.head, self.direction)


def remember(policy: Policy, batch: Pack, parts: Sequence[Tensor], direction: Literal["to", "from"], device: torch.device) -> Remembered:
    """The distributions of a policy as it is now, over the sequences of at least one part, one forward pass a part."""
    hidden = torch.zeros(0)
    for part in parts:
        found = policy.before_actions(share_of(batch, part).to(device)).cpu()
        hidden = hidden if len(hidden) else found.new_zeros(batch.layout.actions, found.shape[-1])
        hidden[batch.layout.actions_of(part)] = found
    return Remembered(hidden, frozen_head(policy.lm), direction)
