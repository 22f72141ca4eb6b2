"""Pieces that give a row the quirks of a padded window in a run: its advantages, its weights and its metrics are computed there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from tilt.errors import UsageError
from tilt.objectives import GAE, Credit, Credited, Experience, Objective, Outputs, Rewards, SequenceAverage, Signals, TokenAverage
from tilt.objectives.credit import settled
from tilt.parity.metrics import MicroBatch, rollout_metrics, update_metrics
from tilt.parity.padded import WindowCredit, window_credit
from tilt.parity.quirks import Quirks
from tilt.parity.window import PerSlot, narrow, widen, window_of
from tilt.segments import Layout
from tilt.shapes import ActionMask, PerAction, SequenceMask


@dataclass(frozen=True)
class WindowedCredit(Credit):
    """The advantages of `credit` as code with padded windows of `width` slots computes them, quirks included."""

    credit: Credit
    width: int
    quirks: Quirks

    def __post_init__(self) -> None:
        if self.quirks.kl_after_last and not self.quirks.stop_is_pad:
            raise UsageError(
                "kl_after_last without stop_is_pad reads the log-probability of a pad, which a run has not: switch stop_is_pad on, or kl_after_last off"
            )

    @property
    def kl(self) -> float:
        """Coefficient of the KL in the reward."""
        return float(getattr(self.credit, "kl", 0.0))

    @property
    def needs(self) -> frozenset[str]:
        after = isinstance(self.credit, GAE) and self.quirks.score_after_last and not self.quirks.stop_is_pad
        return self.credit.needs | (frozenset({"final"}) if after else frozenset())

    @property
    def compares(self) -> bool:
        return self.credit.compares

    def __call__(self, rewards: Rewards, signals: Signals, layout: Layout) -> Credited:
        if bool(rewards.steps.any()):
            raise UsageError("padded windows pay one score an answer: a parity preset cannot use dense rewards")
        if int(layout.lengths.max()) > self.width:
            raise UsageError(f"an answer of {int(layout.lengths.max())} actions does not fit a window of {self.width}")
        scored = torch.nonzero(rewards.scored).flatten()
        whole = window_of(rewards, signals, layout, self.width, stop_is_pad=self.quirks.stop_is_pad)
        found = window_credit(self.credit, whole.take(scored), self.quirks)
        advantages, returns = (
            x.new_zeros(layout.sequences, self.width).index_copy(0, scored, x) for x in (found.advantages, found.returns)
        )
        beyond = layout.lengths[:, None].clamp(max=self.width - 1)
        goal = torch.where(layout.lengths < self.width, returns.gather(1, beyond)[:, 0], torch.nan)
        outside = self.quirks.critic_after_last and not self.quirks.stop_is_pad
        return Credited(narrow(advantages, layout), narrow(returns, layout), rewards.scored, goal if outside else torch.zeros(0))


def _trained(layout: Layout, counted: SequenceMask, width: int, quirks: Quirks) -> tuple[ActionMask, ActionMask, Tensor]:
    """Actions on which the policy is trained, on which the critic is, and the number of states after an answer on which the critic is too."""
    short = layout.lengths < width
    dropped = torch.zeros(layout.actions, dtype=torch.bool, device=short.device)
    if quirks.stop_is_pad:
        dropped[layout.last] = short
    seen = counted[layout.sequence]
    policy = seen & ~dropped
    outside = (short & counted).sum() if quirks.critic_after_last and not quirks.stop_is_pad else torch.zeros_like(short.sum())
    return policy, seen if quirks.critic_after_last else policy, outside


@dataclass(frozen=True)
class WindowedAverage:
    """w_t = 1 / (number of states on which the critic is trained, in windows of `width` slots)."""

    width: int
    quirks: Quirks

    def __call__(self, layout: Layout, counted: SequenceMask) -> PerAction:
        _, critic, outside = _trained(layout, counted, self.width, self.quirks)
        return critic.to(torch.float64) / (critic.sum() + outside).clamp(min=1)

    def share(self, weights: PerAction, layout: Layout) -> Tensor:
        outside = self.quirks.critic_after_last and not self.quirks.stop_is_pad
        after = torch.where(layout.lengths < self.width, weights[layout.last], 0).sum() if outside else 0.0
        return weights.sum() + after


@dataclass(frozen=True)
class PolicyMask:
    """c_t = states of the critic / actions of the policy where the policy is trained, else 0: the policy's mean is over its own actions."""

    width: int
    quirks: Quirks
    needs: ClassVar[frozenset[str]] = frozenset()

    def fixed(self, signals: Signals, layout: Layout, seen: ActionMask) -> PerAction:
        counted = seen[layout.last]
        policy, critic, outside = _trained(layout, counted, self.width, self.quirks)
        return policy.to(torch.float64) * (critic.sum() + outside) / policy.sum().clamp(min=1)

    def __call__(self, outputs: Outputs, experience: Experience) -> PerAction:
        return torch.ones_like(experience.weights)


@dataclass(frozen=True)
class WindowedMetrics:
    """The metrics of `row` in windows of `width` slots, under `parity/`, as the library of the quirks reports them.

    Not among them: policy/entropy_avg over pads, whose entropies no run has, and stop tokens behind the first, which no run samples.
    """

    row: Objective
    width: int
    quirks: Quirks

    def batch(self, rewards: Rewards, signals: Signals, layout: Layout) -> dict[str, Tensor]:
        quiet, known = settled(rewards, signals, layout)
        scored = torch.nonzero(quiet.scored).flatten()
        if not len(scored) or known.reference.isnan().any():
            return {}
        window = window_of(quiet, known, layout, self.width, stop_is_pad=self.quirks.stop_is_pad).take(scored)
        credit = window_credit(self.row.credit, window, self.quirks)
        found = rollout_metrics(window, credit, float(getattr(self.row.credit, "kl", 0.0)), window.score.new_zeros(0), self.quirks)
        return {f"parity/{name}": value for name, value in found.items() if name != "val/num_eos_tokens"}

    def part(self, outputs: Outputs, experience: Experience) -> MicroBatch:
        layout, width = experience.layout, self.width
        final = experience.final if experience.final.numel() else None
        zeros = Rewards.of(experience.advantages.new_zeros(layout.sequences))
        values = outputs.final.detach() if outputs.final.numel() else None

        def wide(x: Tensor, after: Tensor | None = None) -> PerSlot:
            return widen(x.detach(), layout, width, after)

        advantages = wide(experience.advantages)
        credit = WindowCredit(torch.zeros_like(advantages), advantages, wide(experience.returns, final), advantages)
        window = window_of(zeros, experience.signals, layout, width, stop_is_pad=self.quirks.stop_is_pad)
        return MicroBatch(window, credit, wide(outputs.logprobs), wide(outputs.values, values), wide(outputs.entropy))

    def update(self, parts: Sequence[MicroBatch]) -> dict[str, Tensor]:
        found = update_metrics(self.row, parts, self.quirks)
        absent = {"policy/entropy_avg"} if self.quirks.window_means else set[str]()
        return {f"parity/{name}": value for name, value in found.items() if name not in absent}


def undressed(objective: Objective) -> Objective:
    """The row under a preset's quirks; any other row as it is."""
    return next((measure.row for measure in objective.measures if isinstance(measure, WindowedMetrics)), objective)


def dressed(row: Objective, width: int, quirks: Quirks) -> Objective:
    """The row with these quirks, for answers of at most `width` tokens; its loss, its critic's targets and its metrics are those of the padded window."""
    masked = quirks.stop_is_pad or quirks.critic_after_last
    if masked and not isinstance(row.average, TokenAverage):
        raise UsageError(f"the quirks {' and '.join(quirks.on)} are of a token mean; {type(row.average).__name__} has no padded form")
    assert isinstance(row.average, TokenAverage | SequenceAverage)
    return replace(
        row,
        credit=WindowedCredit(row.credit, width, quirks),
        average=WindowedAverage(width, quirks) if masked else row.average,
        corrections=(*row.corrections, PolicyMask(width, quirks)) if masked else row.corrections,
        measures=(WindowedMetrics(row, width, quirks),),
    )
