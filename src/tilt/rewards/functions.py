"""Rewards that are the user's functions `file.py:func`: loaded with clear errors, called under a clock, their answers checked one by one.

Signature: (prompts, completions, **columns) -> list of numbers, or None where a completion cannot be scored; `async def` as well.
"""

from __future__ import annotations

import asyncio
import importlib.util
import inspect
import math
import numbers as kinds
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from tilt.errors import DataError, UsageError
from tilt.rewards.crew import Crew
from tilt.rewards.isolate import Died, Isolated, Raised
from tilt.rewards.programs import Programs
from tilt.rewards.rules import Scores
from tilt.rewards.text import inert

OnError = Literal["raise", "zero", "skip"]
ON_ERROR: Mapping[OnError, float | None] = {"raise": math.nan, "zero": 0.0, "skip": None}
WORKERS = (Isolated, Crew, Programs)


class Overtime(Exception):
    """A function took longer than its seconds."""


@dataclass(frozen=True)
class Scored:
    """What a function said of a batch: a score or None per completion, how many samples failed, and the first failure in words.

    `steps`, where steps are judged: for each completion the actions at which its steps end and what each step earns. They are the reward then, and `values`
    only tell of them.
    """

    values: Scores
    failures: int = 0
    message: str = ""
    steps: Sequence[Sequence[tuple[int, float]]] | None = None


@dataclass(frozen=True)
class RewardFunction:
    """A function with its rules of engagement: seconds per batch, and what happens to samples that it fails on.

    `raise` stops the run; `zero` gives them 0; `skip` leaves them unscored. Before that a batch with failures is tried again `retries` times, after 0.1 s, 0.2 s
    and so on. A thread that overruns its time cannot be ended, only a worker (`isolate`) can.
    """

    name: str
    call: Callable[..., Any]
    seconds: float = 60.0
    on_error: OnError = "raise"
    retries: int = 0

    def __call__(self, prompts: Sequence[str], completions: Sequence[str], columns: Mapping[str, Sequence[Any]]) -> Scored:
        arguments = wanted(
            self.call, self.name, {"prompts": list(prompts), "completions": list(completions), **{k: list(v) for k, v in columns.items()}}
        )
        for pause in [*(min(0.1 * 2**k, 5.0) for k in range(self.retries)), None]:
            said, cause = self._attempt(arguments, prompts, completions)
            if (not said.failures and not said.message) or pause is None:
                break
            time.sleep(pause)
        if not said.message:
            return said
        message = said.message + (f"\nIt was tried {self.retries + 1} times." if self.retries else "")
        if self.on_error == "raise":
            raise DataError(f"{message}\nMend it, or choose `on_error: zero` or `on_error: skip`.") from cause
        return replace(said, message=message)

    def _attempt(
        self, arguments: Mapping[str, Any], prompts: Sequence[str], completions: Sequence[str]
    ) -> tuple[Scored, BaseException | None]:
        """What one call gave, and what failed in it, with the error behind."""
        try:
            answer = self._run(arguments)
        except UsageError:
            raise
        except DataError as error:
            return self._failed(f": {error}", completions), error
        except (Raised, Died, Overtime) as error:
            return self._failed(f": {error}\n{_inputs(0, prompts, completions)}", completions), error
        except Exception as error:  # whatever a user's function raises
            said = f"raised {type(error).__name__}: {inert(str(error), 300)[1:-1]} ({_where(error)})"
            return self._failed(f": {said}\n{_inputs(0, prompts, completions)}", completions), error
        return self._checked(answer, prompts, completions), None

    def _failed(self, what: str, completions: Sequence[str]) -> Scored:
        return Scored([ON_ERROR[self.on_error]] * len(completions), len(completions), f"the reward {self.name}{what}")

    def _run(self, arguments: Mapping[str, Any]) -> Any:
        """The answer of the function, run in a thread of its own until the clock runs out."""
        if isinstance(self.call, WORKERS):
            return self.call(arguments)
        box: list[Any] = []

        def work() -> None:
            try:
                found = self.call(**arguments)
                box.append((asyncio.run(_finish(found)) if inspect.isawaitable(found) else found, None))
            except BaseException as error:
                box.append((None, error))

        thread = threading.Thread(target=work, name=f"reward {self.name}", daemon=True)
        thread.start()
        thread.join(self.seconds)
        if not box:
            raise Overtime(f"it did not answer within {self.seconds:g} s; the thread goes on, `isolate: true` would end it")
        value, error = box[0]
        if isinstance(error, SystemExit | KeyboardInterrupt | GeneratorExit):
            raise Raised(f"it called for the program's end: {type(error).__name__} {error}") from error
        if error is not None:
            raise error
        return value

    def _checked(self, answer: Any, prompts: Sequence[str], completions: Sequence[str]) -> Scored:
        """Numbers or None, one per completion; nothing is broadcast."""
        expected = f"expected a list with one number or None for each of the {len(completions)} completions"
        tolist = getattr(answer, "tolist", None)
        answer = tolist() if callable(tolist) else answer
        if not isinstance(answer, list | tuple) or len(answer) != len(completions):
            told = answer if isinstance(answer, dict) and isinstance(self.call, WORKERS) else {}
            count = len(answer) if isinstance(answer, list | tuple) else told.get("many")
            what = inert(str(told.get("type", type(answer).__name__)), 40)[1:-1] if count is None else f"{count} values"
            return self._failed(f" returned {what}; {expected}.\n{_inputs(0, prompts, completions)}", completions)
        values: Scores = []
        failures, first = 0, ""
        for i, value in enumerate(answer):
            score, wrong = number(value)
            if wrong:
                message = f"the reward {self.name} returned {wrong} for sample {i}; expected a finite number or None.\n{_inputs(i, prompts, completions)}"
                score, failures, first = ON_ERROR[self.on_error], failures + 1, first or message
            values.append(score)
        return Scored(values, failures, first)


def number(value: Any) -> tuple[float | None, str]:
    """A score as a float, or what is wrong with it: True → 1.0; nan, '1' and [1.0] are refused."""
    if value is None:
        return None, ""
    if callable(item := getattr(value, "item", None)):  # a scalar of numpy or torch
        try:
            value = item()
        except (TypeError, ValueError, RuntimeError):
            return None, f"an array of type {type(value).__name__}"
    if not isinstance(value, kinds.Real):
        said = (
            inert(str(value["type"]), 40)[1:-1]
            if isinstance(value, dict) and value.keys() == {"type"}
            else f"{type(value).__name__} {inert(str(value), 40)}"
        )
        return None, f"a value of type {said}"
    try:
        score = float(value)
    except OverflowError:
        score = math.inf
    return (score, "") if math.isfinite(score) else (None, str(score))


def wanted(call: Callable[..., Any], name: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments that a function asks for: all of them where it takes **columns, else those it names."""
    if isinstance(call, WORKERS):
        return dict(arguments)  # the worker knows the function and picks
    parameters = inspect.signature(call).parameters
    missing = [
        p.name
        for p in parameters.values()
        if p.default is p.empty and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) and p.name not in arguments
    ]
    if missing:
        raise UsageError(
            f"the reward {name} asks for {', '.join(missing)}; there are: {', '.join(sorted(arguments))}.\n"
            "Rename the parameter, or map the data's column with `columns:`."
        )
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return dict(arguments)
    return {k: v for k, v in arguments.items() if k in parameters}


def load_function(reference: str, base: Path = Path()) -> tuple[Path, str, Callable[..., Any]]:
    """The function that `file.py:func` names, the file relative to `base`; the file is run."""
    path, name = locate(reference, base)
    module_name = f"tilt_reward_{path.stem}_{abs(hash(path)):x}"
    spec = importlib.util.spec_from_file_location(module_name, path)
    if spec is None or spec.loader is None:
        raise UsageError(f"{path} is not a Python file: a reward function is named as file.py:func.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise UsageError(f"the reward file {path} cannot be loaded: {type(error).__name__}: {error} ({_where(error)})") from error
    found = getattr(module, name, None)
    if not callable(found):
        there = [k for k, v in vars(module).items() if inspect.isfunction(v) and v.__module__ == module_name and not k.startswith("_")]
        what = f"has no function '{name}'" if found is None else f"names '{name}', which is {type(found).__name__} and cannot be called"
        raise UsageError(f"{path} {what}; it has: {', '.join(there) or 'no function'}.")
    return path, name, found


def locate(reference: str, base: Path = Path()) -> tuple[Path, str]:
    """`rewards/mine.py:score` → the file, which must exist, and the name."""
    file, colon, name = reference.rpartition(":")
    if not colon or not file.endswith(".py") or not name.isidentifier():
        raise UsageError(f"'{reference}' does not name a reward function: write file.py:func.")
    path = Path(os.path.expanduser(file))
    path = (path if path.is_absolute() else base / path).resolve()
    if not path.is_file():
        raise UsageError(f"there is no reward file {path} (from '{reference}').")
    return path, name


async def _finish(awaitable: Any) -> Any:
    return await awaitable


def _where(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    return f"{Path(frames[-1].filename).name}, line {frames[-1].lineno}" if frames else "no line known"


def _inputs(i: int, prompts: Sequence[str], completions: Sequence[str]) -> str:
    """The sample in question, short and inert."""
    if not completions:
        return "sample: none, the batch is empty"
    return f"sample {i}: prompt {inert(prompts[i])}, completion {inert(completions[i])}"
