"""The dry run: everything that a run opens is opened, counted, shown and timed; nothing is trained and nothing is written."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from tilt.data.formats import Want
from tilt.data.rendering import Renderer, show
from tilt.data.rollouts import Prompt, Rollout
from tilt.data.steps import check_separator, stepwise
from tilt.learning.judged import Judged
from tilt.models.loading import padded_tokenizer
from tilt.models.policy import Policy, RewardModel
from tilt.objectives import ALGORITHMS, Objective, card
from tilt.parity import undressed
from tilt.recipes import given, judging, opening
from tilt.recipes.measuring import Given, foresee, parameters, said
from tilt.recipes.rehearsal import rehearse
from tilt.recipes.scoring import scoring
from tilt.recipes.settings import Run, Training
from tilt.recipes.trying import sampling_of
from tilt.recipes.variants import optimised
from tilt.runs.directory import auto_name
from tilt.runs.text import inert, middle, number
from tilt.sampling.sampler import Sampler

if TYPE_CHECKING:
    from tilt.recipes import dpo, labelling, pretrain, process_reward, ranking, reward_model, rl, rl_settings, sft

SHOWN = 1200  # terminal cells of an example
ABSENT = "reward model (of the policy's size, from the stage before)"


@dataclass(frozen=True)
class Opened:
    """What every recipe opens."""

    device: torch.device
    rows: opening.Rows
    lm: Any
    tokenizer: Any
    name: str
    render: Renderer


def texts(config: pretrain.Config, pieces: Callable[..., list[Rollout]]) -> list[str]:
    """The plan of pretraining."""
    began, found = perf_counter(), _open(config, config.read_as)
    policy = opening.policy_of(opening.adapted(found.lm, config.lora), found.device)
    train, held = (pieces(found.render, part, config.read_as, config.length) for part in (found.rows.train, found.rows.held_out))
    trial = given.imitation(
        config, ALGORITHMS["sft"], policy, found.device, train, held, steps=_steps(config, len(train)), every=config.eval_every
    )
    return _planned(config, "pretrain", "pieces", found, trial(perf_counter() - began), _texts(found, train))


def demonstrations(config: sft.Config) -> list[str]:
    """The plan of supervised fine-tuning."""
    from tilt.recipes.sft import stops_of, trial_of

    began, found = perf_counter(), _open(config, "sft")
    policy = opening.policy_of(opening.adapted(found.lm, config.lora), found.device)
    train, held = (found.render.demonstrations(rows) if rows else [] for rows in (found.rows.train, found.rows.held_out))
    with ExitStack() as ending:
        answered, rehearsed = None, list[str]()
        if config.reward is not None:
            judged = scoring(config.reward, found.tokenizer, found.device)
            ending.callback(judged.close)
            answered = trial_of(config, policy, found.tokenizer, found.render, found.rows.held_out, judged)
            rehearsed = [_earned(rehearse(judged, answered.sampler, [row.prompt for row in train[:2]]))]
        trial = given.imitation(
            config, config.row, policy, found.device, train, held, steps=_steps(config, len(train)), every=config.eval.every,
            stops=stops_of(config, found.render), trial=answered,
        )  # fmt: skip
        return _planned(config, "sft", "rows", found, trial(perf_counter() - began), _texts(found, train)) + rehearsed


def scored_pairs(config: reward_model.Config) -> list[str]:
    """The plan of a reward model."""
    from tilt.recipes.reward_model import reading

    began, (name, row) = perf_counter(), config.row()
    found = _open(config, judging.want(row))
    examples = judging.Examples.of(found.render, found.rows, row)
    padding = padded_tokenizer(found.tokenizer).pad_token_id
    model = RewardModel.from_policy(opening.policy_of(found.lm, found.device), padding=padding, seed=config.seed)
    opening.adapted(model.model, config.lora)
    steps = _steps(config, len(examples.train))
    trial = given.scores(config, row, model, *reading(config, row, model, padding), found.device, examples.train, examples.held, steps)
    label = "rm" if name == "reward_model" else judging.stem(name)
    return _planned(
        config,
        label,
        judging.unit(examples.train),
        found,
        trial(perf_counter() - began),
        _judged(found, examples),
        {},
        card(row, name=name),
    )


def labelled_steps(config: process_reward.Config) -> list[str]:
    """The plan of a process reward model."""
    began, found = perf_counter(), _open(config, "stepwise")
    check_separator(config.separator, found.tokenizer)
    read = partial(stepwise, found.render, config.separator)
    train, held = (found.render.each(read, rows) if rows else [] for rows in (found.rows.train, found.rows.held_out))
    model = RewardModel.from_policy(opening.policy_of(found.lm, found.device), padding=padded_tokenizer(found.tokenizer).pad_token_id)
    opening.adapted(model.model, config.lora)
    trial = given.labelled(config, model, found.device, train, held, _steps(config, len(train)))
    shown = _shown([show(answer.marked, found.tokenizer) for answer in train[:2]])
    return _planned(config, "prm", "answers", found, trial(perf_counter() - began), shown)


def compared_pairs(config: dpo.Config) -> list[str]:
    """The plan of preference optimisation: a reference that stays is read once, before the first step, and not held, unless it is another model."""
    from tilt.recipes.dpo import reference_of

    began, (name, row) = perf_counter(), config.row()
    found = _open(config, judging.want(row))
    examples = judging.Examples.of(found.render, found.rows, row)
    policy = opening.policy_of(opening.adapted(found.lm, config.lora), found.device)
    reference = reference_of(config, policy, found.tokenizer, found.device)
    held = {} if reference is policy else {"reference": parameters(reference)[0]}
    trial = given.likelihoods(
        config, row, policy, reference, found.device, examples.train, examples.held, _steps(config, len(examples.train))
    )
    return _planned(
        config,
        judging.stem(name),
        judging.unit(examples.train),
        found,
        trial(perf_counter() - began),
        _judged(found, examples),
        held,
        card(row, name=name),
    )


def ranked_answers(config: ranking.Config) -> list[str]:
    """The plan of ranking a model's own answers: what is asked, and what the reward says of the model as it is."""
    found = _open(config, "prompt")
    policy = opening.policy_of(found.lm, found.device)
    prompts = found.render.prompts([*found.rows.train, *found.rows.held_out])
    rehearsed = [] if config.reward is None else [_rehearsed(config, found, prompts)]
    kept = "steps are labelled" if config.rows == "steps" else f"{config.pairs} of each become pairs"
    return [
        *_opening(config, "rank", found, policy),
        *rehearsed,
        *_shown([_asked(p, found.tokenizer) for p in prompts[:2]]),
        f"answers    {config.samples} to each of {len(prompts):,} prompts, of at most {config.sampling.max_tokens} tokens; {kept}",
    ]


def labels(config: labelling.Config, judge: str, answers: labelling.Answers, shown: str, chance: float, how: str) -> list[str]:
    """The plan of labelling by a judge: what it is asked about the first pair, and what it says of it."""
    return [
        f"run        {_place(config, 'label', judge)}",
        *answers.notes,
        f"judge      {judge}, {how}; of the example it says that the first answer is better with probability {number(chance)}",
        *_shown([f"a pair{' of short answers of the model' if config.model is not None else ''}, as the judge reads it\n{shown}"]),
        f"labels     {answers.batches} batches of {config.prompts} {'prompts' if config.model is not None else 'pairs'}"
        + (f", {config.samples} answers of at most {config.sampling.max_tokens} tokens to each" if config.model is not None else ""),
    ]


def reinforcement(config: rl_settings.Config) -> list[str]:
    """The plan of reinforcement learning. Without a reward (as in a pipeline, where the stage before makes it) a model of the policy's size stands in."""
    from tilt.recipes.estimating import estimate, said

    name, objective = optimised(config.algorithm, config.objective, config.quirks, config.sampling.max_tokens)
    tried, opened = estimate(config)
    policy, device = opened.parts.learner.policy, opened.parts.learner.device
    found = Opened(device, opened.rows, policy.lm, opened.parts.tokenizer, opened.model, opened.render)
    prompts, longest = opened.parts.source.items, config.sampling.max_tokens
    held, critic = _held(config, objective, opened, policy)
    return [
        *_opening(config, Path(name.rpartition(":")[0] or name).stem, found, policy),
        *([] if config.reward is None else [_earned(opened.earned)]),
        *_shown([_asked(p, found.tokenizer) for p in prompts[:2]]),
        f"steps      {config.steps} of {config.prompts} prompts × {config.samples} answers of at most {longest} tokens, {tried.length:.0f} as the model answers now: "
        f"about {tried.tokens:,.0f} tokens a step; {config.passes * config.minibatches} optimizer steps each; "
        f"{config.steps * config.prompts / len(prompts):.1f} passes over the {len(prompts):,} prompts",
        *said(config, policy, tried, held, critic),
        *([f"note       {policy.note}"] if policy.note else []),
        "objective  "
        + card(undressed(objective), name=name, samples=config.samples, passes=config.passes, **config.narrowing).replace(
            "\n", "\n           "
        ),
    ]


def pipeline(
    config: Any, plans: Mapping[str, Callable[[Any], list[str]]], pending: str, words: Callable[[Any, Any], str | None]
) -> list[str]:
    """The plans of a pipeline's stages, each on the model that the first stage starts from, since no stage has trained one."""
    root = _place(config, "rlhf", config.model if isinstance(config.model, str) else config.model.kind)
    lines = [f"run        {root}", "           every stage is planned on the model that the first one starts from: none has been trained"]
    for name, plan in plans.items():
        stage = getattr(config, name)
        if stage is None:
            continue
        shared = {key: getattr(config, key) for key in Run.model_fields if key not in stage.model_fields_set}
        shared |= {"name": name, "root": Path(root), "tokenizer": words(config, stage)}
        shared |= {"model": config.model} if stage.model == pending else {}
        shared |= {"reward": None} if pending in str(getattr(stage, "reward", "")) else {}
        lines += ["", f"── {name} " + "─" * max(0, 70 - len(name)), *plan(stage.model_copy(update=shared))]
    return lines


def stages(config: Run, recipe: str, settings: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The plan of a fixed programme: where it will lie, and the settings of each stage."""
    lines = [f"run        {_place(config, recipe, 'tiny')}"]
    return lines + [f"{name:<10} " + ", ".join(f"{key} {value}" for key, value in given.items()) for name, given in settings.items()]


# --- what the recipes share ----------------------------------------------------------------------------------------------


def _open(config: Training | ranking.Config, want: Want) -> Opened:
    device = opening.settle(config)
    rows = opening.rows(config.data, want)
    lm, tokenizer, name = opening.language_model(config.model, config.tokenizer, lambda: opening.texts(rows.train), config.seed)
    return Opened(device, rows, lm, tokenizer, name, opening.renderer(tokenizer, config.data, lm, rows))


def _place(config: Run, recipe: str, model: str) -> str:
    """The directory that the run would make; one without a name gets six characters at its end."""
    return str(Path(config.root) / (config.name or auto_name(recipe, model)[:-6] + "······"))


def _opening(config: Training | ranking.Config, recipe: str, found: Opened, module: nn.Module) -> list[str]:
    return [
        f"run        {_place(config, recipe, found.name)}",
        opening.headline(found.name, module, found.device, config),
        *found.rows.notes,
        f"           {found.render.summary()}; the longest a prompt may be is {found.render.max_prompt_tokens} tokens, an answer {found.render.max_tokens}: "
        f"longer ones are {'left out' if found.render.over_length == 'drop' else 'cut'}",
    ]


def _planned(
    config: Training, recipe: str, unit: str, found: Opened, trial: Given[Any], shown: list[str], held: Mapping[str, int] = {}, described: str = ""
) -> list[str]:  # fmt: skip
    """What the plans of runs on given rows say: what is read, what a step is, what the run holds and takes."""
    settings: Any = config
    count, steps, batch = len(trial.rows), _steps(config, len(trial.rows)), min(settings.batch, len(trial.rows))
    foreseen = foresee(config, trial, steps, batch)
    few = f" (batch {settings.batch} is more than there are)" if batch < settings.batch else ""
    model: Any = trial.module
    return [
        *_opening(config, recipe, found, trial.module),
        *shown,
        f"steps      {steps} of {batch} {unit}{few}: about {foreseen.tokens:,.0f} tokens a step, {steps * batch / count:.1f} passes over the {count:,} {unit}",
        *said(trial.module, foreseen, held),
        *([f"note       {model.note}"] if model.note else []),
        *(["objective  " + described.replace("\n", "\n           ")] if described else []),
    ]


def _steps(config: Any, count: int) -> int:
    """Optimizer steps on so many rows."""
    return config.steps or max(1, round(config.epochs * count / config.batch))


def _texts(found: Opened, train: Sequence[Rollout]) -> list[str]:
    return _shown([show(example, found.tokenizer) for example in train[:2]])


def _judged(found: Opened, examples: judging.Examples) -> list[str]:
    return [*examples.notes, *_shown([f"{title}, " + show(answer, found.tokenizer) for title, answer in _titled(examples.train)])]


def _titled(examples: Sequence[Judged]) -> list[tuple[str, Rollout]]:
    """The answers of the first example and how they were judged; of labelled answers the first two."""
    if not examples[0].paired:
        return [("good" if example.good else "bad", example.answers[0]) for example in examples[:2]]
    answers = examples[0].answers
    titles = ("chosen", "rejected") if len(answers) == 2 else [f"rank {n}" for n in range(1, len(answers) + 1)]
    return list(zip(titles, answers, strict=True))


def _shown(examples: Sequence[str]) -> list[str]:
    """Examples as the model sees them, inert and not longer than a screen."""
    lines = []
    for which, text in enumerate(examples):
        head, _, body = text.partition("\n")
        lines += [f"example {which}  {head}", f"           {middle(inert(body), SHOWN)}"]
    return lines


def _asked(prompt: Prompt, tokenizer: Any) -> str:
    return f"{len(prompt.tokens)} tokens, a prompt; every token of an answer is trained\n{tokenizer.decode(list(prompt.tokens))}"


def _rehearsed(config: Any, found: Opened, prompts: Sequence[Prompt]) -> str:
    """The reward is asked once, about short answers of the model as it is, so that its mistakes show here."""
    judged = scoring(config.reward, found.tokenizer, found.device)
    earned = rehearse(judged, Sampler(found.lm, found.tokenizer, sampling_of(config.sampling, found.render), seed=config.seed), prompts)
    judged.close()
    return _earned(earned)


def _earned(earned: Sequence[float | None]) -> str:
    values = ["no score" if total is None else number(total) for total in earned]
    return f"reward     {len(values)} short answers of the model as it is get {', '.join(values)}"


def _held(config: rl_settings.Config, objective: Objective, opened: rl.Opened, policy: Policy) -> tuple[dict[str, int], int]:
    """Bytes of each frozen model that the run holds beside the policy, and of the critic."""
    body = parameters(policy)[0]
    held: dict[str, int] = {"reference": 0 if config.lora is not None and config.reference is None else body}
    if config.mask is not None:
        held["mask"] = body
    if config.reference_update.every:
        held |= {"reference": body, "first reference": body}
    if config.reward is None:
        held[ABSENT] = body
    else:
        held |= {role: parameters(model)[0] for role, model in opened.parts.scoring.modules.items()}
    if config.ema is not None:
        held["average of the weights"] = parameters(policy)[1]
    return held, 0 if opened.parts.learner.critic is None else parameters(opened.parts.learner.critic)[0]
