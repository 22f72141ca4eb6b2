"""What a configuration says about rewards: one entry or a list, each a rule, a function or a reward model with a weight; parsed strictly, every error at once."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from tilt.config import build_piece, hint
from tilt.data.wording import check_template
from tilt.errors import UsageError
from tilt.rewards.crew import Crew
from tilt.rewards.functions import ON_ERROR, OnError, RewardFunction, Scored, load_function, locate
from tilt.rewards.isolate import Isolated
from tilt.rewards.programs import Code, Programs
from tilt.rewards.rules import RULES, Rule

GRADING = "Request: {prompt}\n\nAnswer: {answer}\n\nHow good is the answer to the request, from 1 (useless) to 10 (perfect)? Reply with the number alone.\n"
"""What a judge is asked about one answer, unless it is said otherwise; its grades end at 10."""


@dataclass(frozen=True)
class Function:
    """A function of the user's, `file.py:func`. Isolated, it runs in a worker: at most `memory` GiB for it and all that it starts, `cpu` seconds a process (0: no
    limit), `processes` at a time, files of `file_size` GiB.

    With `workers` the function is called once for the answers to each prompt, `timeout` seconds each, by so many processes beside each other; what it gives
    does not depend on how many, if it keeps nothing from call to call. With `overlap` such calls begin while other answers are generated.
    """

    file: str
    isolate: bool = False
    memory: float = 4.0
    cpu: int = 0
    processes: int = 256
    file_size: float = 1.0
    workers: int | None = None
    overlap: bool = False

    def __post_init__(self) -> None:
        if self.overlap and not self.isolate:
            raise UsageError(
                "`reward.function.overlap` lets a worker judge while answers are generated, and there is none: set isolate: true, or leave it out"
            )
        limits = ("memory", "cpu", "processes", "file_size", "workers")
        if not self.isolate and (idle := [name for name in limits if getattr(self, name) != getattr(type(self), name)]):
            raise UsageError(f"`reward.function.{idle[0]}` is about a worker, and there is none: set isolate: true, or leave it out")
        if wrong := [name for name in limits if name != "cpu" and (value := getattr(self, name)) is not None and not value > 0]:
            raise UsageError(f"`reward.function.{wrong[0]}` is {getattr(self, wrong[0])}: expected a number above 0")
        if self.cpu < 0:
            raise UsageError(f"`reward.function.cpu` is {self.cpu}: expected seconds, or 0 for no limit")


@dataclass(frozen=True)
class Given:
    """A Python function that the caller holds in hand."""

    call: Callable[..., Any]


@dataclass(frozen=True)
class Model:
    """A reward model: a folder, or a hub name."""

    path: str
    budget: int = 16384


@dataclass(frozen=True)
class Process:
    """A judge of steps: a process reward model's folder or hub name, or a function `file.py:func`. `separator` stands between steps; without it the model's own, for
    a function a line break."""

    path: str
    separator: str = ""
    budget: int = 16384


@dataclass(frozen=True)
class Judge:
    """A language model that grades answers from 1 to `scores`: a folder, or a hub name. The template holds {prompt} and {answer}; `rendering` auto makes it a user turn
    where the judge's tokenizer has a chat template, text leaves it as it stands."""

    model: str
    template: str = GRADING
    scores: int = 10
    rendering: Literal["auto", "text"] = "auto"
    budget: int = 16384

    def __post_init__(self) -> None:
        check_template(self.template, ("prompt", "answer"), "reward.judge.template")
        if self.scores < 2:
            raise UsageError(f"`reward.judge.scores` is {self.scores}: a judge needs at least 2 grades to tell answers apart")
        if self.scores != type(self).scores and self.template == GRADING:
            raise UsageError(
                f"`reward.judge.scores` is {self.scores}, and the template that is asked by itself names 10 grades: give a template"
            )
        if is_function(self.model):
            raise UsageError(f"`reward.judge.model` is {self.model}, a function: it needs no judge; give it as the reward itself")


Source = Rule | Code | Function | Given | Model | Process | Judge
KINDS: Mapping[str, type] = {**RULES, "code": Code, "function": Function, "model": Model, "process": Process, "judge": Judge}
COMMON: Mapping[str, str] = {
    "weight": "a finite number",
    "name": "text",
    "timeout": "seconds above 0",
    "on_error": "raise, zero or skip",
    "retries": "a whole number from 0 to 10",
    "normalise": "true or false",
}
EXAMPLES = "`rewards.py:score`, `{numeric: {answer: answer}}`, `{model: runs/rm/final, weight: 0.5}`, or a list of these"


@dataclass(frozen=True)
class RewardSpec:
    """One part of the reward: where its scores come from, the weight of the part in the sum, what happens when it fails and how often it is tried again, and whether training normalises it
    by the running mean and deviation of its scores."""

    name: str
    source: Source
    weight: float = 1.0
    timeout: float = 60.0
    on_error: OnError = "raise"
    retries: int = 0
    normalise: bool = False


def parse(value: Any, where: str = "reward") -> tuple[RewardSpec, ...]:
    """`file.py:func` | a Python function | a rule or its name | `{numeric: {answer: gold, weight: 2}}` | `{model: path, weight: 1}` | a list of them → specs with unique names."""
    if isinstance(value, list | tuple):
        if not value:
            raise UsageError(f"`{where}` is an empty list: expected {EXAMPLES}")
        entries = [(item, f"{where}.{i}") for i, item in enumerate(value)]
    else:
        entries = [(value, where)]
    specs, problems = [], []
    for item, place in entries:
        try:
            specs.append(_entry(item, place))
        except UsageError as error:
            problems.append(str(error))
    repeated = [name for name, count in Counter(spec.name for spec in specs).items() if count > 1]
    problems += [f"`{where}` has two parts named `{name}`: tell them apart with `name:`" for name in repeated]
    if problems:
        raise UsageError("\n".join(problems))
    return tuple(specs)


def _entry(value: Any, where: str) -> RewardSpec:
    if isinstance(value, RewardSpec):
        return value
    if isinstance(value, Rule):
        return RewardSpec(value.name, value)
    if callable(value):
        value = {"function": value}
    if isinstance(value, str):
        value = {value: {}} if value in KINDS else {"function": value}
    if not isinstance(value, Mapping):
        raise UsageError(f"`{where}` is {value!r}: expected {EXAMPLES}")
    kinds = [key for key in value if key in KINDS]
    unknown = [key for key in value if key not in KINDS and key not in COMMON]
    if unknown:
        raise UsageError("\n".join(f"unknown key `{where}.{key}`: {hint(str(key), [*KINDS, *COMMON])}" for key in unknown))
    if len(kinds) != 1:
        raise UsageError(f"`{where}` names {' and '.join(kinds) or 'no reward'}: give exactly one of {', '.join(KINDS)}")
    kind = kinds[0]
    if kind == "function" and callable(value[kind]):
        given = Given(value[kind])
        return RewardSpec(source=given, **_common({k: v for k, v in value.items() if k in COMMON}, _name(given), where))
    settings = {} if value[kind] is None else value[kind]
    if not isinstance(settings, Mapping):
        settings = {fields(KINDS[kind])[0].name: settings}  # {length: 64} is {length: {high: 64}}
    inner = {key: item for key, item in settings.items() if key in COMMON and key not in {f.name for f in fields(KINDS[kind])}}
    outer = {key: item for key, item in value.items() if key in COMMON}
    if both := inner.keys() & outer.keys():
        raise UsageError(f"`{where}` says {', '.join(sorted(both))} twice: keep one")
    source = build_piece({kind: {k: v for k, v in settings.items() if k not in inner}}, KINDS, where=where)
    spec = RewardSpec(source=source, **_common({**inner, **outer}, _name(source), where))
    if isinstance(source, Process) and spec.normalise:
        raise UsageError(f"`{where}.normalise` is about scores of whole answers, and process judges steps: leave it out")
    said = {**inner, **outer}
    if isinstance(source, Judge) and (idle := [key for key in ("timeout", "on_error", "retries") if key in said]):
        raise UsageError(f"`{where}.{idle[0]}` is about functions, and judge is a model: leave it out")
    if spec.retries and (isinstance(source, Model) or (isinstance(source, Process) and not is_function(source.path))):
        raise UsageError(f"`{where}.retries` is about functions, and {kind} is a model: leave it out")
    if isinstance(source, Code) and "timeout" in said:
        raise UsageError(f"`{where}.timeout` is about functions; code has `seconds` for each test: leave it out")
    return spec


def _common(given: Mapping[str, Any], name: str, where: str) -> dict[str, Any]:
    """The settings that every kind has, checked."""
    fine = {
        "weight": lambda v: _is_number(v) and math.isfinite(v),
        "timeout": lambda v: _is_number(v) and 0 < v < math.inf,
        "name": lambda v: isinstance(v, str) and v != "",
        "on_error": lambda v: isinstance(v, str) and v in ON_ERROR,
        "retries": lambda v: isinstance(v, int) and not isinstance(v, bool) and 0 <= v <= 10,
        "normalise": lambda v: isinstance(v, bool),
    }
    problems = [f"`{where}.{key}` is {v!r}: expected {COMMON[key]}" for key, v in given.items() if not fine[key](v)]
    if problems:
        raise UsageError("\n".join(problems))
    return {"name": name, **{k: float(v) if k in ("weight", "timeout") else v for k, v in given.items()}}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _name(source: Source) -> str:
    """The name of a part that was given none: the function's, the rule's, or `model`."""
    if isinstance(source, Function):
        return source.file.rpartition(":")[2]
    if isinstance(source, Given):
        return getattr(source.call, "__name__", type(source.call).__name__)
    if isinstance(source, Code | Model | Process | Judge):
        return type(source).__name__.lower()
    return source.name


def check_files(specs: Sequence[RewardSpec], base: Path = Path()) -> None:
    """Refuse a function whose file is not there, before anything is loaded."""
    for spec in specs:
        if isinstance(spec.source, Function):
            locate(spec.source.file, base)
        if isinstance(spec.source, Process) and is_function(spec.source.path):
            locate(spec.source.path, base)


def is_function(path: str) -> bool:
    """Whether this names a function in a Python file: `rules.py:right`."""
    return path.rpartition(":")[0].endswith(".py")


def function_of(spec: RewardSpec, base: Path = Path()) -> RewardFunction:
    """A rule or a function, ready to be called, also one that judges steps; the file of an isolated one is run in its worker only."""
    source = spec.source
    if isinstance(source, Process):
        source = Function(source.path)
    assert not isinstance(source, Model | Judge), "models are loaded by the recipe"
    how = (spec.timeout, spec.on_error, spec.retries)
    if isinstance(source, Code):
        return RewardFunction(spec.name, Programs.start(source), *how)
    if isinstance(source, Given):
        return RewardFunction(spec.name, source.call, *how)
    if not isinstance(source, Function):
        return RewardFunction(spec.name, source, *how)
    if not source.isolate:
        return RewardFunction(spec.name, load_function(source.file, base)[2], *how)
    path, name = locate(source.file, base)
    worker = Isolated(path, name, spec.timeout, source.memory, source.cpu, source.processes, source.file_size)
    crew = worker if source.workers in (None, 1) else Crew(worker, source.workers or 1)
    crew.start()
    return RewardFunction(spec.name, crew, *how)


ScoreModel = Callable[..., Scored]
LoadModel = Callable[[RewardSpec], ScoreModel]
