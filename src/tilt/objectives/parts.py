"""Credit from several rewards, each on a scale of its own before they are added."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from tilt.objectives.credit import NOTHING, Credit, Credited, check_not_negative, earned
from tilt.objectives.experience import Rewards, Signals
from tilt.segments import Layout, PromptMask, group_flat, group_mean, group_std, segment_sum, spread
from tilt.shapes import PerSequence, SequenceMask


@dataclass(frozen=True)
class PartsRelative(Credit):
    """Every part of the reward is normalised among the answers to its prompt, a_k = (r_k - mean) / (std + eps); Adv = sum_k w_k a_k, normalised the same way
    over all answers of the batch (GDPO, 2601.05242). Divisors n - ddof.

    A part that is absent for an answer (NaN) is in neither its sum nor the part's statistics; a part of which all answers to a prompt got the same
    gives exactly 0. Dense rewards count as one more part, their sum, of weight 1.
    """

    ddof: Literal[0, 1] = 1
    eps: float = 0.0

    def __post_init__(self) -> None:
        check_not_negative(self, eps=self.eps)

    @property
    def needs(self) -> frozenset[str]:
        return NOTHING

    @property
    def compares(self) -> bool:
        return True

    def flat(self, rewards: Rewards, layout: Layout) -> PromptMask:
        flat = torch.ones(layout.prompts, dtype=torch.bool, device=layout.prompt.device)
        for _, part, seen in _parts(rewards, layout):
            flat = flat & group_flat(part, layout, seen)
        return flat

    def __call__(self, rewards: Rewards, signals: Signals, layout: Layout) -> Credited:
        none = torch.zeros_like(rewards.total)
        each = torch.stack([none, *(weight * self._normalised(part, layout, seen) for weight, part, seen in _parts(rewards, layout))])
        total, rounding = each.sum(0), 16 * torch.finfo(each.dtype).eps * each.abs().sum(0)
        total = torch.where(total.abs() <= rounding, 0, total)  # parts that cancel leave a rounding error, which must not be normalised
        whole = Layout(layout.sequence, torch.zeros_like(layout.prompt))
        relative = torch.where(self.flat(rewards, layout)[layout.prompt], 0, self._normalised(total, whole, rewards.scored))
        return Credited(spread(relative, layout), spread(earned(rewards, layout), layout), rewards.scored)

    def _normalised(self, x: PerSequence, groups: Layout, seen: SequenceMask) -> PerSequence:
        """(x - mean) / (std + eps) in each group over the seen; 0 elsewhere, and where all seen of a group are equal."""
        away = x - group_mean(x, groups, seen)[groups.prompt]
        quiet = ~seen | group_flat(x, groups, seen)[groups.prompt]
        return torch.where(quiet, 0, away / torch.where(quiet, 1, group_std(x, groups, seen, self.ddof)[groups.prompt] + self.eps))


def _parts(rewards: Rewards, layout: Layout) -> list[tuple[float, PerSequence, SequenceMask]]:
    """Weight, values [S] (0 where absent) and presence [S] of each part that weighs anything; of a reward without parts, the reward itself."""
    given = dict(rewards.parts) or {"reward": rewards.total}
    found = []
    for name, part in given.items():
        values = part.to(rewards.total)
        seen = rewards.scored.to(values.device) & ~values.isnan()
        if weight := rewards.weights.get(name, 1.0):
            found.append((weight, torch.where(seen, values, 0), seen))
    if rewards.steps.any():
        found.append((1.0, segment_sum(rewards.steps, layout), rewards.scored))
    return found
