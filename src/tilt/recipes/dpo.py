"""Preference optimisation: the policy is its own reward model (DPO, arXiv 2305.18290, and every row of the second table that reads likelihoods)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Annotated, Any

import torch
from pydantic import Field, model_validator

from tilt.data.streams import Stream
from tilt.learning.judged import Judged
from tilt.learning.pairs import Anchors, Likelihoods, measured, read_anchors, update_pairs, whole_batch
from tilt.learning.reference import move_reference
from tilt.models.adapters import plain_copy
from tilt.models.policy import Policy
from tilt.objectives import Preference
from tilt.optim.optimizers import Optimizer
from tilt.recipes import judging, opening, planning, state
from tilt.recipes.finishing import Result
from tilt.recipes.pair_record import PairRecorder, Stored
from tilt.recipes.session import session
from tilt.recipes.settings import Optimizer as OptimizerSettings
from tilt.recipes.settings import ReferenceUpdate, Training
from tilt.recipes.supervised import supervised
from tilt.recipes.taking_up import NEW, Start, finished
from tilt.recipes.variants import preset_settings

Precision = Callable[[], AbstractContextManager[object]]
IMPORTANT = ("loss", "accuracy", "margin", "eval/accuracy", "eval/margin", "grad_norm", "lr")


class Config(Training, Stored):
    """Preference optimisation on pairs, rankings or labelled answers, by any row of the table or one of your own; the reference is the policy as it starts."""

    algorithm: Annotated[str, Field(description="a preference row of `tilt algorithms` that reads likelihoods, or file.py:NAME")] = "dpo"
    objective: Annotated[dict[str, Any], Field(description="slots of the row to change, such as {link: {hinge: {distance: 0.5}}}")] = {}
    beta: Annotated[float | None, Field(gt=0.0, description="strength of the tie to the reference; without it the row's own")] = None
    label_smoothing: Annotated[
        float | None, Field(ge=0.0, lt=0.5, description="share of pairs taken to be labelled the wrong way round; without it the row's own")
    ] = None
    epochs: Annotated[float, Field(gt=0.0, description="passes over the examples; `steps` overrides it")] = 1.0
    steps: Annotated[int | None, Field(ge=1)] = None
    batch: Annotated[int, Field(ge=1, description="examples an optimizer step: pairs, rankings or labelled answers")] = 32
    optimizer: OptimizerSettings = OptimizerSettings(lr=1e-4, schedule="linear", warmup=10)
    reference: Annotated[str | None, Field(description="another reference; without it the policy as it starts")] = None
    reference_update: ReferenceUpdate = ReferenceUpdate()
    eval_every: Annotated[int, Field(ge=0, description="steps between evaluations; 0 = before and after only")] = 0

    @model_validator(mode="before")
    @classmethod
    def _preset(cls, given: Any) -> Any:
        """A parity preset brings the defaults of its library; what is given stands."""
        return preset_settings(given)

    @model_validator(mode="after")
    def _possible(self) -> Config:
        name, row = self.row()
        if "reference" not in row.needs:
            idle = ["reference"] * (self.reference is not None) + ["reference_update"] * (self.reference_update.every > 0)
            if idle:
                raise ValueError(
                    f"{' and '.join(idle)}: without effect, `{name}` reads no reference; leave it out, or choose a row such as dpo"
                )
        return self

    def row(self) -> tuple[str, Preference]:
        """The name and the row that the run optimises."""
        return judging.row_of(self.algorithm, self.objective, reads="likelihood", beta=self.beta, label_smoothing=self.label_smoothing)


def run(config: Config, start: Start = NEW) -> Result:
    """Score the reference once (or each batch, where it moves), train, evaluate on held-out examples, and save."""
    if (done := finished(config, "dpo", start)) is not None:
        return done
    device = opening.settle(config)
    name, row = config.row()
    rows = opening.rows(config.data, judging.want(row))
    lm, tokenizer, model = opening.language_model(config.model, config.tokenizer, lambda: opening.texts(rows.train), config.seed)
    policy = opening.policy_of(opening.adapted(lm, config.lora), device)
    render = opening.renderer(tokenizer, config.data, lm, rows)
    examples = judging.Examples.of(render, rows, row)
    train, held = examples.train, examples.held
    steps = config.steps or max(1, round(config.epochs * len(train) / config.batch))
    precision = opening.precision(config, device)
    reader = Likelihoods(policy, row.needs)
    reference = reference_of(config, policy, tokenizer, device)
    anchors = _anchoring(config, row, reference, train, precision)
    held_anchors = _anchoring(config, row, reference, held, precision)
    numbered = Stream(list(range(len(train))), config.seed)
    optimizer = Optimizer(policy, config.optimizer.settings(), steps)
    held_row, batch = state.Held(row), min(config.batch, len(train))
    moving = reference if config.reference_update.every else None

    def learn(step: int) -> tuple[dict[str, float], int]:
        numbers = numbered.draw(step, batch)
        chosen = [train[i] for i in numbers]
        near = anchors(numbers)
        record(step, reader, held_row.row, chosen, near, micro_tokens=config.micro_tokens, autocast=precision)
        report, held_row.row = update_pairs(
            reader, optimizer, held_row.row, chosen, near, micro_tokens=config.micro_tokens, autocast=precision
        )
        if moving is not None and (step + 1) % config.reference_update.every == 0:
            move_reference(moving, policy, config.reference_update.share)
        return report, judging.tokens_of(chosen)

    def measured_held() -> dict[str, float]:
        return measure(reader, held_row.row, held, held_anchors(range(len(held))), config.micro_tokens, precision) if held else {}

    with session(config, "dpo", model, steps, IMPORTANT, label=judging.stem(name), start=start) as run:
        run.state.given["data"] = state.digest(train)
        run.state.publish(policy.lm, tokenizer)
        run.state.add(policy=state.weights(policy.lm), optimizer=state.optimizing(optimizer), row=held_row.part)
        run.state.add(reference=None if moving is None else state.tensors_of(lambda: dict(moving.named_parameters())))
        record = PairRecorder.of(config, run, tokenizer, steps)
        run.journal.header(
            [
                f"run        {run.directory.path}",
                opening.headline(model, policy, device, config),
                *rows.notes,
                f"           {render.summary()}",
                *examples.notes,
                f"algorithm  {name}: {row!r}",
                f"steps      {steps} of {batch} {judging.unit(train)}",
                *(f"note       {note}" for note in row.notes()),
            ]
        )
        judging.describe(run.directory, config.algorithm, name, row)
        before, after, step = supervised(run, steps, config.eval_every, measured_held, learn)
        return run.finish(before, after, at=step)


def reference_of(config: Config, policy: Policy, tokenizer: Any, device: torch.device) -> Policy:
    """Who is asked for the reference's log-probabilities: another model, a copy that will move, or the policy itself before its first step."""
    if config.reference is not None:
        return opening.other_model(config.reference, tokenizer, device, "reference")
    return Policy(plain_copy(policy.lm)).requires_grad_(False) if config.reference_update.every else policy


def _anchoring(
    config: Config, row: Preference, reference: Policy, examples: Sequence[Judged], precision: Precision
) -> Callable[[Sequence[int]], Anchors | None]:
    """From the numbers of examples to what the reference says of them: read once for all, or anew each time where the reference moves."""
    reader = Likelihoods(reference, row.needs & {"heads"})
    if "reference" not in row.needs or not examples:
        return lambda numbers: None
    if config.reference_update.every:
        return lambda numbers: read_anchors(reader, [examples[i] for i in numbers], config.micro_tokens, precision)
    known = read_anchors(reader, examples, config.micro_tokens, precision)
    return known.of


def measure(
    reader: Likelihoods, row: Preference, examples: Sequence[Judged], anchors: Anchors | None, micro_tokens: int, precision: Precision
) -> dict[str, float]:
    """Accuracy of the row's reward, its margin and the loss on examples that were not trained on."""
    return measured(row, whole_batch(reader, row, examples, anchors, micro_tokens, precision)[0])


def plan(config: Config) -> list[str]:
    """What a run would read, hold and take, in lines; nothing is trained or written."""
    return planning.compared_pairs(config)
