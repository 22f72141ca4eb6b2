"""When a run of reinforcement learning ends before its last step: the policy has gone far enough, or too far."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field


@dataclass
class Stopping:
    """Watches the steps' metrics: `rise` is the rise of the reward that is enough, in deviations; `kl` the sequence KL that is too much, nats."""

    rise: float | None = None
    kl: float | None = None
    scores: list[float] = field(default_factory=list)
    deviation: float = 0.0

    def reason(self, metrics: Mapping[str, float]) -> str:
        """Why the run should end after the step of these metrics; empty where it should go on."""
        self.deviation = self.deviation if self.scores else metrics.get("objective/scores_std", 0.0)
        self.scores.append(metrics["reward"])
        if self.rise is not None and risen(self.scores, self.deviation) >= self.rise:
            return f"the reward has risen by {risen(self.scores, self.deviation):.2f} deviations, stop_rise is {self.rise}"
        if self.kl is not None and metrics.get("kl", 0.0) > self.kl:
            return f"the sequence KL {metrics['kl']:.2f} is above max_kl {self.kl}"
        return ""


def risen(scores: Sequence[float], deviation: float, first: int = 4, last: int = 6) -> float:
    """Rise of the mean training reward, the `last` steps against the `first`, in deviations of the first step's scores. Held-out prompts have no say."""
    if len(scores) < first + last:
        return 0.0
    return (sum(scores[-last:]) / last - sum(scores[:first]) / first) / max(deviation, 1e-9)
