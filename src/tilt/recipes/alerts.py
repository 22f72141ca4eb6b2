"""Alerts: what in a step's metrics tells that a run goes wrong, with what is healthy and what to do."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from statistics import median
from typing import Annotated, Literal

from pydantic import Field

from tilt.config import Section

Name = Literal["spike", "kl", "flat", "entropy", "truncation", "length", "drift"]
WINDOW = 20  # steps behind a median
FIRST = 5  # steps that say where a run began
AGAIN = 50  # steps after which an alert that stands is said again


class Alerts(Section):
    """When a step is called unhealthy; an alert is a line in the log and, for the names in `stop`, the end of the run, with a checkpoint."""

    patience: Annotated[int, Field(ge=1, description="unhealthy steps in a row before an alert")] = 3
    spike: Annotated[float, Field(gt=1.0, description="norm of the gradient, in medians of the last 20 steps; one such step is enough")] = (
        10.0
    )
    kl: Annotated[float, Field(gt=0.0, description="sequence KL to the reference over the mean length, nats a token")] = 1.0
    flat: Annotated[float, Field(gt=0.0, le=1.0, description="share of groups whose answers all earned the same")] = 1.0
    entropy: Annotated[
        float, Field(ge=0.0, lt=1.0, description="the policy's entropy, in that of the first 5 steps, below which it has collapsed")
    ] = 0.05
    truncation: Annotated[float, Field(gt=0.0, le=1.0, description="share of answers cut at max_tokens")] = 0.5
    length: Annotated[float, Field(gt=1.0, description="mean length of answers, in that of the first 5 steps")] = 3.0
    drift: Annotated[float, Field(gt=0.0, description="mean |probability difference| of learner and sampler")] = 0.02
    stop: Annotated[tuple[Name, ...], Field(description="alerts that end the run, with a checkpoint")] = ()


@dataclass
class Watcher:
    """Looks at every step of a run; `norms` are the last gradient norms, `begun` what the first steps measured, `standing` how long each alert has stood."""

    limits: Alerts
    norms: list[float] = field(default_factory=list)
    begun: dict[str, list[float]] = field(default_factory=dict)
    standing: dict[str, int] = field(default_factory=dict)

    def see(self, metrics: Mapping[str, float]) -> dict[str, str]:
        """The alerts of this step that are new, or have stood for long, by name."""
        found = dict(self._unhealthy(metrics))
        for name in ("entropy", "length/mean"):
            if name in metrics and len(self.begun.setdefault(name, [])) < FIRST:
                self.begun[name].append(metrics[name])
        if "grad_norm" in metrics:
            self.norms = [*self.norms, metrics["grad_norm"]][-WINDOW:]
        self.standing = {name: self.standing.get(name, 0) + 1 for name in found}
        said = {}
        for name, text in found.items():
            after = 1 if name == "spike" else self.limits.patience
            if (self.standing[name] - after) % AGAIN == 0 and self.standing[name] >= after:
                said[name] = text
        return said

    def _unhealthy(self, metrics: Mapping[str, float]) -> Iterator[tuple[str, str]]:
        limits = self.limits
        norm, usual = metrics.get("grad_norm", 0.0), median(self.norms) if len(self.norms) >= FIRST else 0.0
        if usual > 0 and norm > limits.spike * usual:
            yield (
                "spike",
                (
                    f"the gradient's norm {norm:.3g} is {norm / usual:.0f} times the median of the last {len(self.norms)} steps\n"
                    "  healthy: within a factor of 3; look at this step's data, lower optimizer.lr, or set optimizer.clip_norm"
                ),
            )
        kl, length = metrics.get("kl", 0.0), max(metrics.get("length/mean", 1.0), 1.0)
        if kl / length > limits.kl:
            yield (
                "kl",
                (
                    f"the policy is {kl:.1f} nats from the reference, {kl / length:.2f} a token\n"
                    "  healthy: below 0.2 a token; raise the KL coefficient, lower optimizer.lr, or stop at max_kl"
                ),
            )
        share = metrics.get("groups/zero_variance", 0.0)
        if share >= limits.flat:
            yield (
                "flat",
                (
                    f"in {100 * share:.0f} % of the groups all answers earned the same: nothing is learned from them\n"
                    "  healthy: below 50 %; use harder or easier prompts, more samples, a finer reward, or keep: {mixed: true}"
                ),
            )
        for name, key, low, text in (
            (
                "entropy",
                "entropy",
                True,
                "  healthy: above a third of where it began; add bonus: entropy, raise clip high, or lower optimizer.lr",
            ),
            ("length", "length/mean", False, "  healthy: steady; look at the answers, add a length reward, or penalise those that are cut"),
        ):
            first = self.begun.get(key, [])
            now, start = metrics.get(key), sum(first) / len(first) if len(first) == FIRST else 0.0
            if now is None or start <= 0:
                continue
            if low and now < limits.entropy * start:
                yield name, f"the policy's entropy is {now:.3g} nats, from {start:.3g} at the start: it has collapsed\n{text}"
            if not low and now > limits.length * start:
                yield name, f"answers have {now:.0f} tokens, from {start:.0f} at the start\n{text}"
        cut = metrics.get("length/truncated", 0.0)
        if cut > limits.truncation:
            yield (
                "truncation",
                (
                    f"{100 * cut:.0f} % of the answers are cut at sampling.max_tokens: they never earn their ending\n"
                    "  healthy: below 10 %; raise sampling.max_tokens, set missing_stop_penalty, or check the stop token"
                ),
            )
        gap = metrics.get("sampler/probability_gap_mean", 0.0)
        if gap > limits.drift:
            yield (
                "drift",
                (
                    f"learner and sampler differ by {gap:.3g} in mean probability\n"
                    "  healthy: 1e-5 in float32, 0.005 in bfloat16; draw in sampling.dtype float32, or correct with truncated importance weights"
                ),
            )
