"""Guards before the first update: the policy that is trained must be the one that sampled, the one that was scored, and the one it starts from."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from tilt.errors import NumericError
from tilt.objectives import Experience, Objective, Outputs
from tilt.objectives.objective import Metrics

NAMES = {
    "sampler": "the sampler",
    "old": "the policy of a moment ago (`old`)",
    "reference": "the reference (a copy of the policy as it starts)",
}
METRICS = {"sampler": "sampler/probability_gap_mean", "old": "val/first_gap", "reference": "val/reference_gap"}


@dataclass(frozen=True)
class Guards:
    """What the first update of a run tolerates: the largest |log-probability difference| of an action between the policy's own forward pass and
    `sampler`, `old`, and the `reference` where it is a `fresh` copy; and the share of the batch that the clip cuts, `clipped`.

    Where one side computes in half precision (`half`), the mean |probability difference| instead, `probability`, and the clip is not looked at.
    """

    sampler: float = 1e-4
    old: float = 1e-5
    reference: float = 1e-5
    probability: float = 5e-3
    clipped: float = 0.0
    half: bool = False
    fresh: bool = False


ROUNDING = 1e-3
"""The largest |log-probability difference| that may be rounding, float32; of large models with sharp distributions it is a few 1e-5."""

STRICT = Guards()
"""The guards of a run that says nothing of them."""


class Mismatch(NumericError):
    """The policy that is trained is not the one that sampled, or not the one that was scored. `whom` it disagrees with: sampler, old, reference, or clip.

    `scores` [A] are the log-probabilities of the policy's own forward pass, NaN where it did not look.
    """

    def __init__(self, whom: str, text: str, scores: Tensor | None = None, diagnosis: str = "") -> None:
        super().__init__(f"{text}\n  diagnosis  {diagnosis}" if diagnosis else text)
        self.whom, self.text, self.scores = whom, text, scores

    def explained(self, diagnosis: str) -> Mismatch:
        """The same, with what is to blame."""
        return Mismatch(self.whom, self.text, self.scores, diagnosis)


Explain = Callable[[Mismatch], str]
"""What is to blame for a mismatch; empty where nothing is found."""


class Gaps:
    """How far the first forward pass over a batch is from every earlier score of the same actions: sum and maximum of the differences."""

    def __init__(self, objective: Objective, guards: Guards, first: bool) -> None:
        self.objective, self.guards, self.first = objective, guards, first
        self.probability: dict[str, tuple[Tensor, Tensor]] = {}
        self.largest: dict[str, Tensor] = {}
        self.clipped = (torch.zeros(()), torch.zeros(()))

    def see(self, said: Outputs, share: Experience, metrics: Metrics) -> None:
        """One micro-batch: what the forward pass said of it, and the objective's metrics."""
        before = {"sampler": share.signals.sampler}
        before |= {"old": share.signals.old} if "old" in self.objective.needs else {}
        before |= {"reference": share.signals.reference} if self.guards.fresh and self.first else {}
        now = said.logprobs.detach()
        for whom, other in before.items():
            known = ~other.isnan()
            gap = torch.where(known, (now.exp() - other.exp()).abs(), 0).sum(), known.sum()
            most = torch.where(known, (now - other).abs(), 0).max()
            total, count = self.probability.get(whom, (0, 0))
            self.probability[whom] = (gap[0] + total, gap[1] + count)
            self.largest[whom] = torch.maximum(most, self.largest.get(whom, most))
        if "policy/clipfrac_avg" in metrics:
            cut, among = metrics["policy/clipfrac_avg"]
            self.clipped = (self.clipped[0].to(cut) + cut, self.clipped[1].to(among) + among)

    def metrics(self) -> Metrics:
        """Mean |probability difference| to each, as pairs."""
        return {METRICS[whom]: (value, count.to(value)) for whom, (value, count) in self.probability.items()}

    def check(self, most: float, scores: Tensor, explain: Explain | None) -> str:
        """Stop where a mean |probability difference| is above `most`, or at a run's `first` update where a guard is not kept.

        A difference that nothing explains and that is no log-probability larger than ROUNDING is rounding; it is said, and the run goes on.
        """
        notes = []
        for error in self._broken(most, scores):
            why = "" if explain is None or error.whom == "clip" else explain(error)
            if why or explain is None or error.whom == "clip" or not self._rounding(error.whom):
                raise error.explained(why or "none found")
            notes.append(f"{error.text.splitlines()[0].partition('; the update')[0]}: nothing explains it, so it is taken for rounding")
        return "; ".join(notes)

    def _rounding(self, whom: str) -> bool:
        return not self.guards.half and float(self.largest[whom]) <= ROUNDING

    def _broken(self, most: float, scores: Tensor) -> Iterator[Mismatch]:
        """Every guard that is not kept."""
        guards, first = self.guards, self.first
        for whom, (value, count) in self.probability.items():
            mean, largest = float(value / count.clamp(min=1)), float(self.largest[whom])
            limit = guards.probability if guards.half else getattr(guards, whom)
            found, name = (mean, "probability") if guards.half else (largest, whom)
            if mean > most:
                yield Mismatch(whom, _sentence(whom, mean, largest, f"max_mismatch {most:g}"), scores)
            elif first and found > limit:
                yield Mismatch(whom, _sentence(whom, mean, largest, f"guards.{name} {limit:g}"), scores)
        cut, among = (float(x) for x in self.clipped)
        if first and not guards.half and among and cut / among > guards.clipped:
            yield Mismatch(
                "clip",
                f"the clip cuts {cut / among:.3g} of the batch before anything was learned, above guards.clipped {guards.clipped:g}: "
                f"{self.objective.surrogate!r}; the update was not applied",
                scores,
            )


def _sentence(whom: str, mean: float, largest: float, limit: str) -> str:
    return (
        f"the learner and {NAMES[whom]} disagree about the same answers: mean |probability difference| {mean:.3g}, "
        f"largest |log-probability difference| {largest:.3g}, above {limit}; the update was not applied.\n"
        "  healthy: 1e-5 in float32, a mean of 0.005 in bfloat16; `max_mismatch` and `guards` set the limits"
    )
