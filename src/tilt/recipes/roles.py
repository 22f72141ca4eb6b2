"""The models that a run of reinforcement learning holds beside the policy: reference, critic, and the proof that the frozen ones never changed."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from tilt.errors import NumericError, UsageError
from tilt.learning.reference import move_reference
from tilt.models.adapters import adapter_off, plain_copy
from tilt.models.policy import Critic, Policy
from tilt.models.saving import fingerprint
from tilt.objectives import Objective
from tilt.recipes import opening
from tilt.recipes.rl_settings import Config
from tilt.recipes.scoring import Scoring

Anchor = Callable[[], AbstractContextManager[Policy]]
"""Opens a context in which the returned policy is the KL anchor."""


@dataclass
class Moving:
    """A reference that follows the policy (reset: share 1; an average: a small share), the one it was at first, and how far it has come from that."""

    reference: Policy
    first: Policy
    share: float
    distance: float = 0.0

    def move(self, policy: Policy) -> None:
        """reference ← share · policy + (1 − share) · reference; `distance` = |reference − first| / |first| over all weights."""
        move_reference(self.reference, policy, self.share)
        pairs = [(a.detach(), b.detach()) for a, b in zip(self.reference.parameters(), self.first.parameters(), strict=True)]
        away, size = (sum(float(x.double().square().sum()) for x in xs) for xs in ([a - b for a, b in pairs], [b for _, b in pairs]))
        self.distance = (away / size) ** 0.5


def moving(config: Config, anchor: Anchor, policy: Policy) -> Moving | None:
    """The reference as one that follows the policy, where `reference_update` asks for it; what cannot follow is refused."""
    if not config.reference_update.every:
        return None
    with anchor() as reference:
        move_reference(reference, policy, 0.0)
        return Moving(reference, copy.deepcopy(reference), config.reference_update.share)


def always(policy: Policy) -> Anchor:
    """This policy as an anchor."""

    @contextmanager
    def separate() -> Iterator[Policy]:
        yield policy

    return separate


def reference(config: Config, policy: Policy, tokenizer: Any, device: torch.device) -> tuple[Anchor, dict[str, nn.Module]]:
    """The KL anchor: another checkpoint, the adapter switched off, or a frozen copy of the policy as it starts; and what must never change.

    One that follows the policy has weights of its own, adapters added, and may change.
    """
    if config.reference_update.every and config.reference is None:
        return always(Policy(plain_copy(policy.lm)).requires_grad_(False)), {}
    if config.lora is not None and config.reference is None:
        base = nn.ParameterList(p for name, p in policy.lm.named_parameters() if "lora_" not in name)

        @contextmanager
        def adapterless() -> Iterator[Policy]:
            with adapter_off(policy.lm):
                yield policy

        return adapterless, {"base under the adapter": base}
    if config.reference is None:
        anchor = Policy(copy.deepcopy(policy.lm)).requires_grad_(False)
    else:
        anchor = opening.other_model(config.reference, tokenizer, device, "reference")
    return always(anchor), {} if config.reference_update.every else {"reference": anchor}


def critic(config: Config, policy: Policy, objective: Objective, judged: Scoring, device: torch.device) -> Critic | None:
    """The critic that the row needs: from the reward model, from the policy, or none of its own where it shares the policy's body."""
    if not objective.value.needs or config.critic == "shared":
        return None
    source = judged.critic_source
    if config.critic == "reward_model" and source is None:
        raise UsageError(
            "critic reward_model: no reward model here reads the policy's tokens, so no critic can start from one; set critic to policy, shared or auto"
        )
    made = Critic.from_policy(policy) if source is None or config.critic == "policy" else Critic.from_reward_model(source)
    return made.to(device).requires_grad_(True)


@dataclass(frozen=True)
class Frozen:
    """Modules that must never change, by role, and the fingerprint of each when it was opened."""

    modules: Mapping[str, nn.Module]
    marks: Mapping[str, str]

    @staticmethod
    def of(modules: Mapping[str, nn.Module]) -> Frozen:
        return Frozen(modules, {role: fingerprint(module) for role, module in modules.items()})

    def verify(self) -> Iterator[str]:
        """A line for each module that is what it was; one that changed stops the run."""
        for role, mark in self.marks.items():
            if fingerprint(self.modules[role]) != mark:
                raise NumericError(f"the {role} changed during training: this is a defect of Tilt, and the run cannot be trusted")
            yield f"unchanged  {role} {mark[:12]}"
