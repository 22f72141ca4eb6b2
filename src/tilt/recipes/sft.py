"""Supervised fine-tuning: imitate given answers, the stop token included."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from tilt.learning.evaluation import likelihood
from tilt.learning.learner import Learner, Passes
from tilt.models.policy import Policy
from tilt.objectives import Imitate, Objective
from tilt.optim.optimizers import Optimizer
from tilt.recipes import opening, planning
from tilt.recipes.finishing import Result
from tilt.recipes.imitation import imitate
from tilt.recipes.scoring import Scoring, scoring
from tilt.recipes.session import session
from tilt.recipes.settings import Evaluation, Reward, Sampling, Training
from tilt.recipes.settings import Optimizer as OptimizerSettings
from tilt.recipes.taking_up import NEW, Start, finished
from tilt.recipes.trying import Trial, sampling_of
from tilt.recipes.variants import resolve

IMPORTANT = ("loss", "eval/nll", "eval/reward", "grad_norm", "lr", "tokens_per_second")


class Config(Training):
    """Supervised fine-tuning on prompts with completions, conversations, or the chosen answers of pairs."""

    epochs: Annotated[float, Field(gt=0.0, description="passes over the rows; `steps` overrides it")] = 3.0
    steps: Annotated[int | None, Field(ge=1)] = None
    batch: Annotated[int, Field(ge=1, description="rows an optimizer step")] = 32
    algorithm: Annotated[str, Field(description="a row that imitates: sft, dft, or file.py:NAME")] = "sft"
    objective: Annotated[dict[str, Any], Field(description="slots of the row to change, such as {average: per_budget}")] = {}
    average: Annotated[
        Literal["token", "sequence"], Field(description="mean over tokens of the batch, or over sequences of their token means")
    ] = "token"
    optimizer: OptimizerSettings = OptimizerSettings(lr=1e-3, schedule="cosine", warmup=10)
    reward: Annotated[Reward, Field(description="score sampled answers to held-out prompts with this reward while training")] = None
    sampling: Sampling = Sampling()
    eval: Evaluation = Evaluation()
    stop_at: Annotated[float | None, Field(description="stop at the first evaluation whose mean reward reaches this")] = None

    @property
    def row(self) -> Objective:
        """The row that is trained: `algorithm` with its average and slots."""
        averaged = {"average": "sequence"} if self.average == "sequence" else {}
        return resolve(self.algorithm, averaged | self.objective)[1]

    @model_validator(mode="after")
    def _possible(self) -> Config:
        if self.row.credit != Imitate():
            raise ValueError(
                f"algorithm {self.algorithm} learns from rewards, and sft only has given answers: use `tilt rl`, or set algorithm to sft or dft"
            )
        if self.average != "token" and "average" in self.objective:
            raise ValueError("average and objective.average both choose the average: keep one")
        if self.row.needs:
            raise ValueError(
                f"objective reads {', '.join(sorted(self.row.needs))}, which given answers do not have: a row for sft has no ratio, penalty or critic"
            )
        if self.stop_at is not None and (self.reward is None or self.eval.every == 0):
            raise ValueError("stop_at needs a reward to compare with, and eval.every above 0 to look at it while training")
        idle = [
            *([] if self.sampling == Sampling() else ["sampling"]),
            *(f"eval.{key}" for key in Evaluation.model_fields if key != "every" and getattr(self.eval, key) != getattr(Evaluation(), key)),
        ]
        if self.reward is None and idle:
            raise ValueError(
                f"{', '.join(idle)}: without effect, since answers are sampled only to be scored; name a reward, or leave it out"
            )
        if self.sampling.dtype != "auto":
            raise ValueError("sampling.dtype: without effect, evaluation draws from the policy's own weights; leave it out")
        if self.sampling.keep_sets:
            raise ValueError(
                "sampling.keep_sets: without effect, since nothing is trained on sampled answers; truncate in `eval:`, or leave it out"
            )
        if self.reward is not None and self.data.eval is None and self.data.held_out == 0:
            raise ValueError(
                "reward scores answers to held-out prompts, and data.held_out is 0: hold some out, name data.eval, or leave reward out"
            )
        return self


def run(config: Config, start: Start = NEW) -> Result:
    """Train, evaluate before, during and after, and save."""
    if (done := finished(config, "sft", start)) is not None:
        return done
    device = opening.settle(config)
    rows = opening.rows(config.data, "sft")
    lm, tokenizer, name = opening.language_model(config.model, config.tokenizer, lambda: opening.texts(rows.train), config.seed)
    policy = opening.policy_of(opening.adapted(lm, config.lora), device)
    render = opening.renderer(tokenizer, config.data, lm, rows)
    train = render.demonstrations(rows.train)
    steps = config.steps or max(1, round(config.epochs * len(train) / config.batch))
    learner = Learner(
        policy,
        Optimizer(policy, config.optimizer.settings(), steps),
        settings=Passes(micro_tokens=config.micro_tokens, halve=config.halve_micro),
        autocast=opening.precision(config, device),
    )
    judged = None if config.reward is None else scoring(config.reward, tokenizer, device)
    with ExitStack() as ending:
        if judged is not None:
            ending.callback(judged.close)
        measure = _measure(config, learner, tokenizer, render, rows.held_out, judged)
        run = ending.enter_context(session(config, "sft", name, steps, IMPORTANT, start=start))
        run.state.publish(policy.lm, tokenizer)
        run.journal.header(
            [
                f"run        {run.directory.path}",
                opening.headline(name, policy, device, config),
                *rows.notes,
                f"           {render.summary()}",
                f"algorithm  {config.algorithm}: {config.row!r}",
                f"steps      {steps} of {min(config.batch, len(train))} rows",
            ]
        )
        before, after, step = imitate(
            learner, config.row, train, run, measure, steps=steps, batch=min(config.batch, len(train)), seed=config.seed, every=config.eval.every,
            stop=lambda found: config.stop_at is not None and found.get("reward", float("-inf")) >= config.stop_at,
        )  # fmt: skip
        return run.finish(before, after, at=step)


def _measure(
    config: Config, learner: Learner, tokenizer: Any, render: Any, held_out: list[dict[str, Any]], judged: Scoring | None
) -> Callable[[], dict[str, float]]:
    """Likelihood of the held-out answers, and what sampled answers to the same prompts earn where a reward is given."""
    if not held_out:
        return dict
    given = render.demonstrations(held_out)
    likely = partial(likelihood, learner.policy, given, config.micro_tokens, stops_of(config, render), learner.autocast)
    if judged is None:
        return likely
    trial = trial_of(config, learner.policy, tokenizer, render, held_out, judged)
    return lambda: likely() | trial().metrics


def stops_of(config: Config, render: Any) -> Sequence[int]:
    """The tokens that end an answer, where answers alone are trained."""
    return render.stop_ids if config.data.train_on == "completion" else ()  # type: ignore[no-any-return]


def trial_of(config: Config, policy: Policy, tokenizer: Any, render: Any, held_out: list[dict[str, Any]], judged: Scoring) -> Trial:
    """How the held-out prompts are answered and scored."""
    return Trial.of(
        policy, tokenizer, render.prompts(held_out), judged, sampling_of(config.sampling, render), config.eval,
        seed=config.seed, slots=config.sampling.slots, cache=config.sampling.cache,
    )  # fmt: skip


def plan(config: Config) -> list[str]:
    """What a run would read, hold and take, in lines; nothing is trained or written."""
    return planning.demonstrations(config)
