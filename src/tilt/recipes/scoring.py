"""From a recipe's `reward:` to a scorer: rules, functions and reward models, with the text that they read."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from tilt.data.rendering import renderer
from tilt.data.rollouts import Rollout
from tilt.data.steps import SEPARATOR, check_separator, decoder
from tilt.data.wording import Wording
from tilt.errors import UsageError
from tilt.models.loading import load, load_process_model, load_reward_model
from tilt.models.policy import Policy, RewardModel
from tilt.objectives import Rewards
from tilt.rewards.judge import Choices, Grade, tokens_of
from tilt.rewards.model import ModelReward, Rerendered, own_tokens, same_tokenizer
from tilt.rewards.process import ProcessReward, StepFunction, StepModel
from tilt.rewards.score import Scorer, build
from tilt.rewards.spec import Judge, Model, Process, RewardSpec, function_of, is_function
from tilt.rewards.text import Text, read

Read = Callable[[Sequence[Rollout]], list[Text]]


@dataclass(frozen=True)
class Scoring:
    """A scorer, how rollouts are read, the reward models in it with whether each reads the policy's own tokens, and other models that judge, by name."""

    score: Scorer
    read: Read
    models: tuple[tuple[RewardModel, bool], ...]
    others: tuple[tuple[str, nn.Module], ...] = ()

    @property
    def modules(self) -> dict[str, nn.Module]:
        """Every model that judges, by role; none of them may change."""
        return {f"reward model {i}": model for i, (model, _) in enumerate(self.models)} | dict(self.others)

    @property
    def critic_source(self) -> RewardModel | None:
        """The reward model that a critic can start from: the first that reads the policy's tokens."""
        return next((model for model, shared in self.models if shared), None)

    def judge(self, rollouts: Sequence[Rollout], *, training: bool = False) -> tuple[list[Text], Rewards]:
        """The answers as text, and what they earn; in `training` normalised parts learn from them."""
        texts = self.read(rollouts)
        return texts, self.score(rollouts, texts, training=training)

    @property
    def begin(self) -> Callable[[Sequence[Rollout]], None] | None:
        """What is to be told of the answers to a prompt as soon as they have ended; None where no part of the reward can begin before all have."""
        return (lambda rollouts: self.score.begin(rollouts, self.read(rollouts))) if self.score.overlaps else None

    def __call__(self, rollouts: Sequence[Rollout]) -> Rewards:
        return self.judge(rollouts)[1]

    @property
    def notes(self) -> list[str]:
        """What the first lines of a run say of its rewards."""
        return [f"rewards    {note}" for note in self.score.notes]

    def close(self) -> None:
        """End the workers of isolated functions."""
        self.score.close()


def reader(tokenizer: Any) -> Read:
    """Rollouts to text; special tokens, the stop token among them, are not part of it."""

    def decode(tokens: Sequence[int]) -> str:
        return str(tokenizer.decode(list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False))

    return lambda rollouts: read(rollouts, decode)


def scoring(reward: Any, tokenizer: Any, device: torch.device, *, missing_stop_penalty: float = 0.0, clip: float | None = None) -> Scoring:
    """The scorer that `reward:` asks for: names, rules, Python functions, reward models, or a list of them."""
    found: list[tuple[RewardModel, bool]] = []
    others: list[tuple[str, nn.Module]] = []

    def loaded(spec: RewardSpec) -> ModelReward | ProcessReward | Grade:
        if isinstance(spec.source, Process):
            reward, modules = steps_reward(spec, spec.source, tokenizer, device)
            others.extend(modules)
            return reward
        if isinstance(spec.source, Judge):
            grade = grades(spec, spec.source, device)
            others.append((f"judge {spec.name}", grade.choices.policy))
            return grade
        assert isinstance(spec.source, Model)
        model, words = load_reward_model(spec.source.path, device=device)
        shared = same_tokenizer(words, tokenizer)
        found.append((model, shared))
        how = own_tokens if shared else Rerendered(renderer(words, "auto"))
        return ModelReward(spec.name, model, how, spec.source.budget)

    bounds = (-math.inf, math.inf) if clip is None else (-clip, clip)
    score = build(reward, load_model=loaded, missing_eos_penalty=missing_stop_penalty, clip=bounds)
    return Scoring(score, reader(tokenizer), tuple(found), tuple(others))


def steps_reward(
    spec: RewardSpec, source: Process, tokenizer: Any, device: torch.device
) -> tuple[ProcessReward, list[tuple[str, nn.Module]]]:
    """The part of the reward that judges steps, and the model that it holds."""
    if is_function(source.path):
        separator = source.separator or SEPARATOR
        check_separator(separator, tokenizer)
        return ProcessReward(separator, decoder(tokenizer), StepFunction(function_of(spec), separator)), []
    model, words, trained = load_process_model(source.path, device=device)
    if not trained and not source.separator:
        raise UsageError(
            f"the reward `{spec.name}`: {source.path} does not say what stands between the steps that it was trained on\n"
            "  train it with `tilt prm`, or name it: {process: {path: …, separator: …}}"
        )
    if source.separator and trained not in ("", source.separator):
        raise UsageError(
            f"the reward `{spec.name}`: {source.path} was trained on steps separated by {trained!r}, not by {source.separator!r}; leave separator out"
        )
    separator = source.separator or trained
    check_separator(separator, tokenizer)
    check_separator(separator, words)
    how = own_tokens if same_tokenizer(words, tokenizer) else Rerendered(renderer(words, "auto"))
    judge = StepModel(spec.name, model, separator, decoder(words), how, source.budget)
    return ProcessReward(separator, decoder(tokenizer), judge), [(f"process reward model {spec.name}", model)]


def grades(spec: RewardSpec, source: Judge, device: torch.device) -> Grade:
    """The part of the reward that is a judge's expected grade."""
    policy, words = judge_model(source.model, device)
    said = tokens_of([str(i) for i in range(1, source.scores + 1)], words, f"{spec.name}.scores")
    return Grade(spec.name, Choices(policy, said, source.budget), wording(words, source.template, source.rendering))


def judge_model(path: str, device: torch.device) -> tuple[Policy, Any]:
    """A causal LM that is asked, frozen, and its tokenizer."""
    lm, words = load(path, device=device)
    return Policy(lm).requires_grad_(False).eval(), words


def wording(tokenizer: Any, template: str, rendering: str) -> Wording:
    """A judge's template: a user turn where the tokenizer has a chat template, unless it is to stand as text."""
    return Wording(tokenizer, template, rendering == "auto" and bool(tokenizer.chat_template))
