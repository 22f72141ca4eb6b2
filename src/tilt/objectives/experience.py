"""What an objective reads: rewards, the models' signals, and the experience made of them, all on the action axis."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields

import torch
from torch import Tensor

from tilt.segments import Layout


@dataclass(frozen=True)
class Rewards:
    """What was earned: `total` per sequence [S] (the weighted sum of `parts`), dense `steps` per action [A], which sequences could be `scored` [S],
    and the actions at which a judged step `ends` [A] (process supervision; a step may earn 0).

    Sequences that are not `trained` on [S] (all are by default) weigh nothing and are in no denominator; what they earned still stands in baselines
    and deviations. `weights` are those of the parts; a part without one weighs 1.
    """

    total: Tensor
    parts: Mapping[str, Tensor] = field(default_factory=dict)
    steps: Tensor = field(default_factory=lambda: torch.zeros(0))
    scored: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.bool))
    ends: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.bool))
    trained: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.bool))
    weights: Mapping[str, float] = field(default_factory=dict)

    @staticmethod
    def of(
        total: Tensor,
        steps: Tensor | None = None,
        *,
        parts: Mapping[str, Tensor] | None = None,
        scored: Tensor | None = None,
        ends: Tensor | None = None,
        trained: Tensor | None = None,
        weights: Mapping[str, float] | None = None,
        actions: int = 0,
    ) -> Rewards:
        """Sequence rewards, all scored and trained on unless said otherwise; `steps` are zeros [actions] where none are given, and `ends` are where they are not 0."""
        dense = torch.zeros(actions, dtype=total.dtype, device=total.device) if steps is None else steps
        every = torch.ones_like(total, dtype=torch.bool)
        return Rewards(
            total, parts or {}, dense, every if scored is None else scored, dense != 0 if ends is None else ends, every if trained is None else trained,
            weights or {},
        )  # fmt: skip

    @staticmethod
    def join(given: Sequence[Rewards]) -> Rewards:
        """The rewards of several batches end to end; all have the same parts."""
        first = given[0]
        parts = {name: torch.cat([r.parts[name] for r in given]) for name in first.parts}
        whole = {name: torch.cat([getattr(r, name) for r in given]) for name in ("total", "steps", "scored", "ends", "trained")}
        return Rewards(parts=parts, weights=first.weights, **whole)

    def take(self, sequences: Tensor, layout: Layout) -> Rewards:
        """The rewards of these sequences of a layout, in the order in which they are named."""
        actions = layout.actions_of(sequences)
        return Rewards(
            self.total[sequences], {name: part[sequences] for name, part in self.parts.items()}, self.steps[actions], self.scored[sequences],
            self.ends[actions], self.trained[sequences], self.weights,
        )  # fmt: skip


@dataclass(frozen=True)
class Signals:
    """Log-probabilities of the actions under the sampler, the old policy and the reference, the critic's values, the old policy's entropy (A each),
    and the critic's value after the last action (S).

    A signal that nobody asked for is NaN: typed, and loud if used.
    """

    sampler: Tensor
    old: Tensor
    reference: Tensor
    values: Tensor
    entropy: Tensor
    final: Tensor

    @staticmethod
    def of(
        old: Tensor,
        *,
        sampler: Tensor | None = None,
        reference: Tensor | None = None,
        values: Tensor | None = None,
        entropy: Tensor | None = None,
        final: Tensor | None = None,
        sequences: int = 0,
    ) -> Signals:
        nan = torch.full_like(old, float("nan"))
        end = old.new_full((sequences,), float("nan")) if final is None else final
        first, second, third, fourth = (nan if x is None else x for x in (sampler, reference, values, entropy))
        return Signals(first, old, second, third, fourth, end)


@dataclass(frozen=True)
class Outputs:
    """What the learner's forward pass gives the loss: logprobs, entropy, exact KL and values (A each), final value (S). What a row does not need is NaN."""

    logprobs: Tensor
    entropy: Tensor
    kl: Tensor
    values: Tensor
    final: Tensor

    @staticmethod
    def of(
        logprobs: Tensor,
        *,
        entropy: Tensor | None = None,
        kl: Tensor | None = None,
        values: Tensor | None = None,
        final: Tensor | None = None,
        sequences: int = 0,
    ) -> Outputs:
        nan = torch.full_like(logprobs, float("nan"))
        end = nan.new_full((sequences,), float("nan")) if final is None else final
        return Outputs(logprobs, nan if entropy is None else entropy, nan if kl is None else kl, nan if values is None else values, end)


@dataclass(frozen=True)
class Experience:
    """Ready for the loss: advantages, returns, weights, and factors on the weights of the policy term (A each), fixed on the whole batch before any split.

    `final` is the critic's target for the state after the last action, [S], NaN where a sequence has none; empty where the credit sets none.
    """

    layout: Layout
    signals: Signals
    advantages: Tensor
    returns: Tensor
    weights: Tensor
    factors: Tensor
    final: Tensor = field(default_factory=lambda: torch.zeros(0))

    def take(self, sequences: Tensor) -> Experience:
        """The part of the experience that belongs to these sequences, actions in the order in which the sequences are named."""
        actions = self.layout.actions_of(sequences)
        per_sequence = {"final"}
        signals = Signals(
            **{f.name: getattr(self.signals, f.name)[sequences if f.name in per_sequence else actions] for f in fields(Signals)}
        )
        advantages, returns, weights, factors = (x[actions] for x in (self.advantages, self.returns, self.weights, self.factors))
        final = self.final[sequences] if self.final.numel() else self.final
        return Experience(self.layout.take(sequences), signals, advantages, returns, weights, factors, final)
