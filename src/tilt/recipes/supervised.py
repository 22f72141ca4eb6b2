"""The loop of every recipe that learns from given answers: measure, learn from a batch, record."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from time import perf_counter

from tilt.recipes.finishing import keeping
from tilt.recipes.opening import due
from tilt.recipes.session import Session

Measures = dict[str, float]


def supervised(
    run: Session, steps: int, every: int, measure: Callable[[], Measures], learn: Callable[[int], tuple[Mapping[str, float], int]],
    stop: Callable[[Measures], bool] = lambda measures: False,
) -> tuple[Measures, Measures, int]:  # fmt: skip
    """Measures before and after, and the number of steps taken: `steps`, or fewer where an evaluation says `stop`.

    `learn` takes one optimizer step and returns its metrics and how many tokens it read.
    """
    measures: Measures = {}
    step, named = steps, measures
    for step in run.steps(steps + 1):
        run.watch("evaluate")
        measures = measure() if due(step, steps, every) and not run.replays else {}
        named = {f"eval/{name}": value for name, value in measures.items()}
        if step == 0:
            run.memory["before"] = measures
        if step == steps or (measures and stop(measures)):
            break
        run.watch("update")
        began = perf_counter()
        with keeping(run.directory, step):
            metrics, tokens = learn(step)
        run.journal.step(step, {**metrics, "tokens_per_second": tokens / (perf_counter() - began), **named})
        run.alert(step, metrics)
    run.journal.step(step, named)
    return run.memory["before"], measures, step
