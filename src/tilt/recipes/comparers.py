"""Who compares two answers: the settings of a judge, and the judge that they ask for, loaded and named."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from tilt.config import Section
from tilt.data.wording import check_template
from tilt.errors import UsageError
from tilt.models.saving import fingerprint
from tilt.recipes import opening
from tilt.recipes.scoring import judge_model, wording
from tilt.recipes.settings import Run
from tilt.rewards.functions import locate
from tilt.rewards.judge import Choices, Comparer, FunctionComparer, ModelComparer, verdict_tokens
from tilt.rewards.spec import Function, check_files, function_of, is_function, parse

TEMPLATE = (
    "Request: {prompt}\n\nAnswer 1: {first}\n\nAnswer 2: {second}\n\n"
    "Which answer to the request is better? Reply with the number alone, 1 or 2.\n"
)


def _callable(given: Any) -> Any:
    """A function of two answers that can be had: its entry parses, and its file is there."""
    if given is not None:
        try:
            (spec,) = parse({"function": given}, "judge.function")
            check_files((spec,))
            if idle := [key for key in ("weight", "normalise") if isinstance(given, Mapping) and key in given]:
                raise UsageError(f"`judge.function.{idle[0]}` is about rewards, and a judge compares: leave it out")
            if spec.on_error == "zero":
                raise UsageError(
                    "`judge.function.on_error` zero would label a pair where the function failed: raise, or skip, which leaves it out"
                )
        except UsageError as error:
            raise ValueError(str(error)) from error
    return given


def changed(given: Section, keys: Sequence[str]) -> list[str]:
    """Those of these settings that are not as they would be by themselves."""
    return [key for key in keys if getattr(given, key) != type(given).model_fields[key].default]


class Judge(Section):
    """Who compares two answers: a causal LM that is asked, or a function (prompts, first, second) → P(the first is better)."""

    model: Annotated[str | None, Field(description="a causal LM: a run, a checkpoint's folder or a hub name")] = None
    function: Annotated[
        Any, AfterValidator(_callable), Field(description="or file.py:function, or {file: …, isolate: true, timeout: 60, on_error: skip}")
    ] = None
    template: Annotated[str, Field(description="what the model is asked: a text that holds {prompt}, {first} and {second}")] = TEMPLATE
    verdicts: Annotated[tuple[str, str], Field(description="what it answers where the first is better, where the second is")] = ("1", "2")
    rendering: Annotated[
        Literal["auto", "text"],
        Field(description="auto = a user turn where its tokenizer has a chat template; text = the template as it stands"),
    ] = "auto"
    budget: Annotated[int, Field(ge=16, description="most tokens in one forward pass of the model")] = 16384

    @model_validator(mode="before")
    @classmethod
    def _name_alone(cls, given: object) -> object:
        return {"function" if is_function(given) else "model": given} if isinstance(given, str) else given

    @model_validator(mode="after")
    def _possible(self) -> Judge:
        if (self.model is None) == (self.function is None):
            raise ValueError("a judge is a model or a function: give exactly one of judge.model and judge.function")
        if self.function is not None and (idle := changed(self, ("template", "verdicts", "rendering", "budget"))):
            raise ValueError(f"judge.{idle[0]} is about a model, and the judge is a function: leave it out")
        if self.template == TEMPLATE and changed(self, ("verdicts",)):
            raise ValueError(
                "the template that is asked by itself names the verdicts 1 and 2, and judge.verdicts has others: give a template"
            )
        try:
            check_template(self.template, ("prompt", "first", "second"), "judge.template")
        except UsageError as error:
            raise ValueError(str(error)) from error
        return self


@dataclass(frozen=True)
class Opened:
    """A judge that can be asked, its name in records, and what of it belongs there; `shown` is a question as it reads it."""

    compare: Comparer
    name: str
    record: Mapping[str, Any]
    shown: Callable[[str, str, str], str]
    close: Callable[[], object] = lambda: None


def opened(judge: Judge, run: Run) -> Opened:
    """The judge, loaded; what its tokenizer cannot say is refused."""
    return _function(judge.function) if judge.model is None else _model(judge, judge.model, run)


def _model(judge: Judge, path: str, run: Run) -> Opened:
    policy, words = judge_model(path, opening.settle(run))
    said, asked = verdict_tokens(judge.verdicts, words, "judge.verdicts"), wording(words, judge.template, judge.rendering)
    mark = fingerprint(policy)
    name = f"{path}@{mark[:12]}"
    record = {
        "model": path, "sha256": mark, "template": judge.template, "template_sha256": sha256(judge.template.encode()).hexdigest(),
        "verdicts": judge.verdicts, "rendering": "turn" if asked.chat else "text",
    }  # fmt: skip

    def shown(prompt: str, first: str, second: str) -> str:
        return str(words.decode(asked(prompt=prompt, first=first, second=second)))

    return Opened(ModelComparer(name, Choices(policy, said, judge.budget), asked), name, record, shown)


def _function(given: Any) -> Opened:
    (spec,) = parse({"function": given}, "judge.function")
    assert isinstance(spec.source, Function)
    if idle := [key for key in ("overlap", "workers") if getattr(spec.source, key)]:
        raise UsageError(f"`judge.function.{idle[0]}` is about rewards, and a judge of pairs is asked once about all: leave it out")
    function, (path, name) = function_of(spec), locate(spec.source.file)
    record = {"function": spec.source.file, "sha256": sha256(path.read_bytes()).hexdigest()}

    def shown(prompt: str, first: str, second: str) -> str:
        return f"{name}({[prompt]}, {[first]}, {[second]})"

    return Opened(FunctionComparer(function), spec.source.file, record, shown, getattr(function.call, "stop", lambda: None))
