"""The verbs of runs that learn from given rows, as a plan tries them: a step on some rows, and what is read without learning from it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from tilt.data.rollouts import Rollout
from tilt.data.steps import Stepwise
from tilt.learning.evaluation import likelihood
from tilt.learning.judged import Judged
from tilt.learning.learner import Learner, Passes
from tilt.learning.pairs import Anchors, Likelihoods, Reader, counts, read_anchors, update_pairs
from tilt.learning.steps import measure_steps, update_steps
from tilt.models.policy import Policy, RewardModel
from tilt.objectives import Objective, Preference
from tilt.optim.optimizers import Optimizer
from tilt.recipes import opening
from tilt.recipes.imitation import imitated
from tilt.recipes.measuring import Given, Reading
from tilt.recipes.settings import Training

if TYPE_CHECKING:
    from tilt.recipes import dpo, process_reward, reward_model
    from tilt.recipes.trying import Trial


def evaluations(held: Sequence[Any], steps: int, every: int) -> int:
    """How often a run of so many steps is evaluated: before, after, and every so many steps between."""
    return sum(opening.due(step, steps, every) for step in range(steps + 1)) if held else 0


def length(text: Rollout) -> int:
    """Tokens of a text with its prompt."""
    return len(text.prompt.tokens) + len(text.tokens)


def imitation(
    config: Training, objective: Objective, policy: Policy, device: torch.device, train: Sequence[Rollout], held: Sequence[Rollout],
    *, steps: int, every: int, stops: Sequence[int] = (), trial: Trial | None = None,
) -> Callable[[float], Given[Any]]:  # fmt: skip
    """Pretraining and supervised fine-tuning: each evaluation reads the held-out texts, and with a trial answers their prompts."""
    precision = opening.precision(config, device)
    optimizer = Optimizer(policy, config.optimizer.settings(), steps)  # type: ignore[attr-defined]
    learner = Learner(policy, optimizer, settings=Passes(micro_tokens=config.micro_tokens), autocast=precision)
    times = evaluations(held, steps, every)
    readings: dict[str, Reading[Any]] = {}
    if times:
        readings["evaluate"] = Reading(held, lambda texts: likelihood(policy, texts, config.micro_tokens, stops, precision), times, length)
    if times and trial is not None:
        longest = trial.sampling.max_tokens * trial.samples
        readings["answer"] = Reading(
            trial.prompts, lambda prompts: replace(trial, prompts=list(prompts))(), times, lambda prompt: len(prompt.tokens) + longest, together=True
        )  # fmt: skip
    return partial(Given, policy, device, train, length, lambda texts: lambda: imitated(learner, objective, texts, 0), readings)


def likelihoods(
    config: dpo.Config, row: Preference, policy: Policy, reference: Policy, device: torch.device, train: Sequence[Judged], held: Sequence[Judged], steps: int
) -> Callable[[float], Given[Judged]]:  # fmt: skip
    """Preference optimisation: a reference that stays reads every answer once; one that moves reads each batch before the step, and what is held out each time."""
    precision, micro = opening.precision(config, device), config.micro_tokens
    reader, against = Likelihoods(policy, row.needs), Likelihoods(reference, row.needs & {"heads"})
    asked, moves = "reference" in row.needs, config.reference_update.every > 0
    optimizer = Optimizer(policy, config.optimizer.settings(), steps)

    def read(examples: Sequence[Judged]) -> Anchors | None:
        return read_anchors(against, examples, micro, precision) if asked else None

    def known(examples: Sequence[Judged]) -> Anchors | None:
        """As many numbers as the reference would say of these, read of one example of each kind: how long a step takes does not depend on them."""
        kinds = {counts(example): example for example in examples}
        found = read(list(kinds.values()))
        return None if found is None else found.of([list(kinds).index(counts(example)) for example in examples])

    def update(examples: Sequence[Judged]) -> Callable[[], object]:
        near = None if moves else known(examples)

        def step() -> None:
            anchors = read(examples) if moves else near
            update_pairs(reader, optimizer, row, examples, anchors, micro_tokens=micro, autocast=precision)

        return step

    def evaluate(examples: Sequence[Judged]) -> None:
        from tilt.recipes.dpo import measure

        measure(reader, row, examples, read(examples) if moves else known(examples), micro, precision)

    readings: dict[str, Reading[Judged]] = {}
    if asked and not moves:
        readings["reference"] = Reading([*train, *held], read, 1, cost)
    if times := evaluations(held, steps, config.eval_every):
        readings["evaluate"] = Reading(held, evaluate, times, cost, like="" if config.reference is not None else "reference")
    return partial(Given, policy, device, train, cost, update, readings)


def scores(
    config: reward_model.Config, row: Preference, model: RewardModel, reader: Reader, views: Sequence[float], device: torch.device, train: Sequence[Judged],
    held: Sequence[Judged], steps: int,
) -> Callable[[float], Given[Judged]]:  # fmt: skip
    """A reward model on judged answers."""
    from tilt.recipes.reward_model import measure

    precision, optimizer = opening.precision(config, device), Optimizer(model, config.optimizer.settings(), steps)

    def update(examples: Sequence[Judged]) -> Callable[[], object]:
        return lambda: update_pairs(
            reader, optimizer, row, examples, None, views=views, micro_tokens=config.micro_tokens, autocast=precision
        )

    times = evaluations(held, steps, config.eval_every)
    readings = (
        {"evaluate": Reading(held, lambda examples: measure(reader, row, examples, config.micro_tokens), times, cost)} if times else {}
    )
    return partial(Given, model, device, train, cost, update, readings)


def labelled(
    config: process_reward.Config, model: RewardModel, device: torch.device, train: Sequence[Stepwise], held: Sequence[Stepwise], steps: int
) -> Callable[[float], Given[Stepwise]]:
    """A process reward model on answers whose steps are labelled."""
    precision, optimizer = opening.precision(config, device), Optimizer(model, config.optimizer.settings(), steps)

    def update(answers: Sequence[Stepwise]) -> Callable[[], object]:
        return lambda: update_steps(model, optimizer, answers, micro_tokens=config.micro_tokens, device=device, autocast=precision)

    def evaluate(answers: Sequence[Stepwise]) -> None:
        measure_steps(model, answers, config.micro_tokens, device, precision)

    times = evaluations(held, steps, config.eval_every)
    readings = {"evaluate": Reading(held, evaluate, times, lambda answer: length(answer.rollout))} if times else {}
    return partial(Given, model, device, train, lambda answer: length(answer.rollout), update, readings)


def cost(example: Judged) -> int:
    """Tokens of an example, mismatched answers with their prompt included."""
    return example.cost + sum(map(length, example.mismatched))
