"""The loop of supervised training: draw given texts, imitate them, measure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from time import perf_counter

from tilt.data.packing import pack
from tilt.data.rollouts import Rollout
from tilt.data.streams import Stream
from tilt.learning.learner import Learner
from tilt.objectives import Objective, Rewards
from tilt.recipes.finishing import keeping
from tilt.recipes.opening import due
from tilt.runs.directory import RunDirectory
from tilt.runs.journal import Journal

Measures = dict[str, float]


def imitate(
    learner: Learner, objective: Objective, texts: Sequence[Rollout], directory: RunDirectory, journal: Journal, measure: Callable[[], Measures],
    *, steps: int, batch: int, seed: int, every: int = 0, stop: Callable[[Measures], bool] = lambda measures: False,
) -> tuple[Measures, Measures, int]:  # fmt: skip
    """Measures before and after, and the number of steps taken: `steps`, or fewer where an evaluation says `stop`."""
    stream = Stream(texts, seed)
    first: Measures = {}
    for step in range(steps + 1):
        measures = measure() if due(step, steps, every) else {}
        first = measures if step == 0 else first
        if step == steps or (measures and stop(measures)):
            break
        began = perf_counter()
        given = pack(stream.draw(step, batch))
        rewards = Rewards.of(given.sampler.new_zeros(given.layout.sequences), actions=given.layout.actions)
        experience = objective.prepare(rewards, learner.evaluate(given, frozenset()), given.layout)
        with keeping(directory, step):
            report = learner.update(given, experience, objective, step=step)
        journal.step(step, report.metrics | {"tokens_per_second": len(given.tokens) / (perf_counter() - began)} | _named(measures))
    journal.step(step, _named(measures))
    return first, measures, step


def _named(measures: Measures) -> Measures:
    return {f"eval/{name}": value for name, value in measures.items()}
