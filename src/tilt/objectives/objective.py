"""An algorithm: a row of six choices, fixed on the batch by `prepare` and added up over its parts by `loss`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from tilt.errors import UsageError
from tilt.objectives.control import Bonus, Control, NoBonus, NoControl, check_control, coefficient
from tilt.objectives.corrections import Correction
from tilt.objectives.credit import Credit, Imitate, settled
from tilt.objectives.experience import Experience, Outputs, Rewards, Signals
from tilt.objectives.penalty import NoPenalty, Penalty, TrustRegion
from tilt.objectives.policy import Average, NoRatio, Ratio, Score, Sides, Surrogate, TokenAverage, nowhere
from tilt.objectives.value import NoValue, Value
from tilt.segments import Layout, segment_mean, segment_sum, spread
from tilt.shapes import ActionMask, Scalar

Metrics = dict[str, tuple[Tensor, Tensor]]
"""Detached (sum, weight) pairs: pairs of parts add; the metric is sum / weight, and is absent where the weight is 0."""


class Measure(Protocol):
    """Further metrics of a row, which move nothing: of the batch before its update, and of all micro-batches of the update together."""

    def batch(self, rewards: Rewards, signals: Signals, layout: Layout) -> dict[str, Tensor]: ...

    def part(self, outputs: Outputs, experience: Experience) -> Any:
        """What is remembered of one micro-batch."""

    def update(self, parts: Sequence[Any]) -> dict[str, Tensor]: ...


@dataclass(frozen=True)
class Objective:
    """loss = sum_t w_t (c_t (penalty_t - surrogate(ratio, logprobs, advantages)_t - bonus_t) + coefficient * value_t), c_t the product of the corrections.

    `prepare` fixes advantages and weights w on the whole batch; the losses of any split into whole sequences then add up to the loss of the batch.
    `control` gives the row of the next step, `measures` say more of it.
    """

    credit: Credit
    ratio: Ratio
    surrogate: Surrogate
    average: Average
    penalty: Penalty = field(default_factory=NoPenalty)
    value: Value = field(default_factory=NoValue)
    corrections: tuple[Correction, ...] = ()
    bonus: Bonus = field(default_factory=NoBonus)
    control: Control = field(default_factory=NoControl)
    measures: tuple[Measure, ...] = ()

    def __post_init__(self) -> None:
        check_control(self)
        if isinstance(self.ratio, NoRatio) and _still(self.surrogate):
            raise UsageError(
                f"{type(self.surrogate).__name__} moves the policy through the ratio, and the ratio is none: set ratio to token, product or geometric"
            )
        if isinstance(self.surrogate, Score) and not isinstance(self.ratio, NoRatio):
            raise UsageError(
                f"Score does not read the ratio, so {type(self.ratio).__name__} has no effect: set ratio to none, or surrogate to importance"
            )

    @property
    def needs(self) -> frozenset[str]:
        """Signals that a batch of several optimizer steps reads, among sampler, old, reference, values, entropy. With one step old may be the
        detached logprobs, unless `credit.needs` names it."""
        found = self.credit.needs | self.ratio.needs | self.penalty.needs | self.value.needs
        return found.union(*(correction.needs for correction in self.corrections))

    @property
    def against(self) -> str:
        """The policy that `outputs.kl` must compare with: none, reference or old."""
        return getattr(self.penalty, "against", "none")

    @property
    def passes(self) -> int | None:
        """How often one action may be trained on: None is any number, as for demonstrations, or where something holds the policy near the old one."""
        if isinstance(self.penalty, TrustRegion):
            return 1
        held = self.against == "old" or getattr(self.ratio, "bounded", False)
        return None if isinstance(self.credit, Imitate) or held else getattr(self.surrogate, "passes", None)

    def following(self, measured: Mapping[str, float]) -> Objective:
        """The row of the next step; a step that did not measure what the controller reads keeps this one."""
        return self.control(self, measured) if all(name in measured for name in getattr(self.control, "reads", ())) else self

    @property
    def controlled(self) -> dict[str, float]:
        """The coefficient that the controller moves, as a metric: `kl_coefficient` or `entropy_coefficient`; nothing without a controller."""
        moves = getattr(self.control, "moves", "")
        return {"entropy_coefficient" if moves == "entropy" else "kl_coefficient": coefficient(self)} if moves else {}

    def check(self, samples: int, passes: int) -> list[str]:
        """Why this row cannot run with so many samples a prompt and passes over a batch, in the user's words; empty when it can."""
        problems = []
        if self.credit.compares and samples < 2:
            problems.append(
                f"{self.credit!r} compares the answers to one prompt, so samples={samples} gives no signal: set samples to 2 or more"
            )
        if isinstance(self.penalty, TrustRegion) and passes > 1:
            problems.append(f"{self.penalty!r} takes one natural step on the whole batch, not passes={passes}: set passes to 1")
        elif self.passes is not None and passes > self.passes:
            problems.append(
                f"{self.surrogate!r} is right for {self.passes} pass over fresh samples, not passes={passes}: "
                f"set passes to {self.passes}, or choose a surrogate with a clipped ratio (clip)"
            )
        if "values" in self.credit.needs and "values" not in self.value.needs:
            problems.append(f"{self.credit!r} reads a critic that nothing trains: set value to value_loss")
        if "values" in self.value.needs and "values" not in self.credit.needs:
            problems.append(f"{self.value!r} trains a critic that {type(self.credit).__name__} never reads: set value to none")
        return problems

    def notes(self) -> list[str]:
        """What a reader of this row should know although it may run."""
        notes = []
        if self.ratio.per_sequence and isinstance(self.average, TokenAverage):
            notes.append(
                f"{type(self.ratio).__name__} with the token average weighs each sequence by its length: this is not GSPO, whose average is sequence"
            )
        return notes

    def prepare(self, rewards: Rewards, signals: Signals, layout: Layout) -> Experience:
        """Advantages, returns and weights of the whole batch; what does not count has advantage and weight 0."""
        with torch.no_grad():
            quiet_rewards, quiet_signals = settled(rewards, signals, layout)
            advantages, returns, counted, final = self.credit(quiet_rewards, quiet_signals, layout)
            counted = counted & quiet_rewards.trained
            seen = spread(counted, layout)
            weights = self.average(layout, counted).to(signals.old)
            kept = signals if signals.final.numel() else replace(signals, final=quiet_signals.final)
            factors = torch.ones_like(weights)
            for correction in self.corrections:
                factors = factors * correction.fixed(quiet_signals, layout, seen).to(weights)
            goals = torch.where(counted, final, torch.nan) if final.numel() else final
            return Experience(layout, kept, torch.where(seen, advantages, 0), torch.where(seen, returns, 0), weights, factors, goals)

    def loss(self, outputs: Outputs, experience: Experience) -> Scalar:
        """The part of the batch's loss that these whole sequences contribute; parts add, in value and gradient."""
        outputs, experience = _quiet(outputs, experience, _counted(experience))
        loss = self._policy_loss(outputs, experience)
        if self.value.needs:
            loss = loss + self.value.coefficient * self._value_loss(outputs, experience)
        return loss

    def _ratio(self, outputs: Outputs, experience: Experience) -> Tensor:
        return self.ratio(outputs.logprobs, experience.signals.old, experience.layout, experience.advantages)

    def _policy_loss(self, outputs: Outputs, experience: Experience) -> Tensor:
        gain = self.surrogate(self._ratio(outputs, experience), outputs.logprobs, experience.advantages)
        gain = gain - self.penalty(outputs, experience.signals, experience.layout)
        gain = gain + self.bonus(outputs) if self.bonus.coefficient else gain
        return -(experience.weights * self.factors(outputs, experience) * gain).sum()

    def factors(self, outputs: Outputs, experience: Experience) -> Tensor:
        """The product of the corrections of each action, [A], without gradient."""
        found = experience.factors
        with torch.no_grad():
            for correction in self.corrections:
                found = found * correction(outputs, experience)
        return found

    def clip_sides(self, outputs: Outputs, experience: Experience) -> Sides:
        """Actions whose gradient is cut, or whose weight is capped, because the ratio is too low, and because it is too high; none without a ratio."""
        if "old" not in self.ratio.needs:
            return nowhere(outputs.logprobs)
        old, advantages = experience.signals.old, experience.advantages
        found = nowhere(outputs.logprobs)
        if hasattr(self.surrogate, "clipped"):
            found = self.surrogate.clipped(self._ratio(outputs, experience), advantages)
        if hasattr(self.ratio, "clipped"):
            own = self.ratio.clipped(outputs.logprobs, old, advantages)
            found = (found[0] | own[0], found[1] | own[1])
        return found

    def _value_loss(self, outputs: Outputs, experience: Experience) -> Tensor:
        """Over the states before actions, and after the last one where it has a target: that state weighs what the last action weighs."""
        loss = (experience.weights * self.value(outputs.values, experience.signals.values, experience.returns)).sum()
        if experience.final.numel():
            known, weights = ~experience.final.isnan(), experience.weights[experience.layout.last]
            after = (torch.where(known, x, 0) for x in (outputs.final, experience.signals.final, experience.final))
            loss = loss + torch.where(known, weights * self.value(*after), 0).sum()
        return loss

    @torch.no_grad()
    def metrics(self, outputs: Outputs, experience: Experience) -> Metrics:
        """What this part says about the update, as (sum, weight); means are over actions (clip fractions of sequence ratios over sequences)."""
        seen = _counted(experience)
        outputs, experience = _quiet(outputs, experience, seen)
        layout, signals = experience.layout, experience.signals
        count, share = seen.sum().to(experience.weights), self.average.share(experience.weights, layout)
        found: Metrics = {"loss/policy_avg": (self._policy_loss(outputs, experience), share)}
        measured = seen & ~outputs.entropy.isnan()
        found["policy/entropy_avg"] = (torch.where(measured, outputs.entropy, 0).sum(), measured.sum().to(count))
        if "old" in self.ratio.needs:
            ratio, change = self._ratio(outputs, experience), outputs.logprobs - signals.old
            found["policy/approxkl_avg"] = (0.5 * change.square().sum(), count)
            found["val/ratio"] = (torch.where(seen, ratio, 0).sum(), count)
            found["val/ratio_spread"] = (torch.where(seen, (ratio - 1).square(), 0).sum(), count)
            low, high = self.clip_sides(outputs, experience)
            for name, mask in (("clipfrac_avg", low | high), ("clipfrac_low", low), ("clipfrac_high", high)):
                found[f"policy/{name}"] = _fraction(mask & seen, seen, layout, self.ratio.per_sequence)
        if not isinstance(self.penalty, NoPenalty | TrustRegion):
            found["policy/penalty_avg"] = (self.penalty(outputs, signals, layout).sum(), count)
        if self.against != "none":
            compared = seen & ~outputs.kl.isnan()
            found[f"policy/kl_{self.against}"] = (torch.where(compared, outputs.kl, 0).sum(), compared.sum().to(count))
        if self.corrections:
            found["policy/correction_avg"] = (torch.where(seen, self.factors(outputs, experience), 0).sum(), count)
        if self.value.needs:
            clipped = self.value.clipped(outputs.values, signals.values, experience.returns)
            found["loss/value_avg"] = (self._value_loss(outputs, experience), share)
            found["val/clipfrac_avg"] = _fraction(clipped & seen, seen, layout, False)
        return found


def _still(surrogate: Surrogate) -> bool:
    """Whether the surrogate has no gradient by the log-probabilities themselves, so that without a ratio nothing moves."""
    logprobs = torch.full((2,), -1.0, requires_grad=True)
    return not surrogate(torch.ones(2), logprobs, torch.tensor([1.0, -1.0])).requires_grad


def _counted(experience: Experience) -> ActionMask:
    """Actions of the sequences that carry any weight, [A]."""
    return spread(segment_sum(experience.weights.abs(), experience.layout) > 0, experience.layout)


def _quiet(outputs: Outputs, experience: Experience, seen: ActionMask) -> tuple[Outputs, Experience]:
    """Zeros in place of whatever the other sequences hold: neither their NaN nor their overflow reaches the loss or its gradient."""

    def zero(x: Tensor) -> Tensor:
        return torch.where(seen, x, 0)

    signals = experience.signals
    kept = Signals(**{f.name: getattr(signals, f.name) if f.name == "final" else zero(getattr(signals, f.name)) for f in fields(Signals)})
    return (
        Outputs(zero(outputs.logprobs), zero(outputs.entropy), zero(outputs.kl), zero(outputs.values), outputs.final),
        replace(experience, signals=kept),
    )


def _fraction(mask: ActionMask, seen: ActionMask, layout: Layout, per_sequence: bool) -> tuple[Tensor, Tensor]:
    """How many of the seen actions, or of their sequences, are in the mask, and of how many."""
    shape = torch.zeros((), dtype=torch.float64, device=mask.device)
    if per_sequence:
        return segment_mean(mask.to(shape), layout).sum(), segment_mean(seen.to(shape), layout).sum()
    return mask.sum().to(shape), seen.sum().to(shape)
