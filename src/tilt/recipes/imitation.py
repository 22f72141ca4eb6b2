"""Supervised training on given texts: draw them, imitate them, measure."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from tilt.data.packing import pack
from tilt.data.rollouts import Rollout
from tilt.data.streams import Stream
from tilt.learning.learner import Learner
from tilt.objectives import Objective, Rewards
from tilt.recipes import state
from tilt.recipes.session import Session
from tilt.recipes.supervised import Measures, supervised


def imitate(
    learner: Learner, objective: Objective, texts: Sequence[Rollout], run: Session, measure: Callable[[], Measures],
    *, steps: int, batch: int, seed: int, every: int = 0, stop: Callable[[Measures], bool] = lambda measures: False,
) -> tuple[Measures, Measures, int]:  # fmt: skip
    """Measures before and after, and the number of steps taken: `steps`, or fewer where an evaluation says `stop`."""
    stream = Stream(texts, seed)
    run.state.given["data"] = state.digest(texts)
    run.state.add(
        policy=state.weights(learner.policy.lm), optimizer=state.optimizing(learner.optimizer), learner=state.attributes(learner, "version")
    )

    def learn(step: int) -> tuple[Measures, int]:
        return imitated(learner, objective, stream.draw(step, batch), step)

    return supervised(run, steps, every, measure, learn, stop)


def imitated(learner: Learner, objective: Objective, texts: Sequence[Rollout], step: int) -> tuple[Measures, int]:
    """One update on these texts: its metrics, and the tokens that went through the model."""
    given = pack(texts)
    rewards = Rewards.of(given.sampler.new_zeros(given.layout.sequences), actions=given.layout.actions)
    experience = objective.prepare(rewards, learner.evaluate(given, frozenset()), given.layout)
    return learner.update(given, experience, objective, step=step).metrics, len(given.tokens)
