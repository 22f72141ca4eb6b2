"""A reference that follows the policy."""

from __future__ import annotations

import torch

from tilt.errors import UsageError
from tilt.models.adapters import merged_state
from tilt.models.policy import Policy


@torch.no_grad()
def move_reference(reference: Policy, policy: Policy, share: float) -> None:
    """reference ← share · policy + (1 − share) · reference, weight by weight, adapters added to the policy's weights (TR-DPO, 2404.09656)."""
    theirs = merged_state(policy.lm)
    for name, weight in reference.lm.named_parameters():
        if name not in theirs or theirs[name].shape != weight.shape:
            raise UsageError(
                f"the reference has a weight {name} of shape {tuple(weight.shape)} that the policy has not, so it cannot move towards the policy.\n"
                "Name a reference of the policy's architecture and size, or leave reference_update out."
            )
        weight.lerp_(theirs[name].to(weight), share)
