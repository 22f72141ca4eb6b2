"""One intermediate number of a step: what it is, its formula, the function that computed it, where that stands, and whose it is."""

from __future__ import annotations

import ast
import functools
import importlib.util
import inspect
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

import tilt
from tilt.segments import Layout

Axis = Literal["batch", "prompt", "answer", "action", "pair"]

STAGES: Mapping[str, str] = {
    "prompts": "1  prompts (004:275)",
    "responses": "2  responses of the actor (004:276)",
    "experience": "3  experience: what reward model, reference and critic say, and what is made of it (004:277)",
    "update": "4  losses and the update of actor and critic (004:278)",
    "elsewhere": "the same name in other code",
    "examples": "worked examples of the notes",
}
"""The four steps of the loop, then what is not part of it."""


@dataclass(frozen=True)
class Entry:
    """A number of a step, or one per prompt, answer, action or pair. `source` is a paper or lines of the study notes (003:245).

    `function` computed it; a name (`tilt.models.policy:Critic.forward`) stands for a model's function where the batch brings the model's answers along.
    """

    stage: str
    name: str
    formula: str
    function: Callable[..., Any] | str
    source: str
    value: Tensor
    axis: Axis

    @property
    def computed_by(self) -> str:
        """`module:qualified.name` of the function."""
        return self.function if isinstance(self.function, str) else name_of(self.function)

    @property
    def place(self) -> str:
        """`file:line` of the function as it stands now; torch's own functions are in `torch`."""
        return place_of(self.computed_by)

    def same_as(self, other: Entry) -> bool:
        """Whether two algorithms agree on this number and on how it is made."""
        return self.formula == other.formula and self.computed_by == other.computed_by and torch.equal(self.value, other.value)

    def rows(self, layout: Layout | None) -> list[list[float]]:
        """The value as lists: per answer where it is one per action, else one list."""
        flat = [float(x) for x in self.value.flatten()]
        if self.axis != "action" or layout is None:
            return [flat]
        ends = layout.ends.tolist()
        return [flat[start:end] for start, end in zip([0, *ends], ends, strict=False)]


@dataclass
class Notebook:
    """The entries of a step, in the order in which they are computed."""

    entries: list[Entry] = field(default_factory=list)
    stage: str = "prompts"

    def __call__(self, name: str, formula: str, function: Any, source: str, value: Tensor | float, axis: Axis) -> Tensor:
        """Note a value and give it back. A piece of a row stands for its `__call__`."""
        made = torch.as_tensor(value, dtype=torch.float64) if not isinstance(value, Tensor) else value
        code = function if isinstance(function, str) or inspect.isroutine(function) else type(function).__call__
        self.entries.append(Entry(self.stage, name, formula, code, source, made.detach().clone(), axis))
        return made


def name_of(function: Callable[..., Any]) -> str:
    """`module:qualified.name` of a function, the one inside its wrappers."""
    inner = inspect.unwrap(function)
    own = inspect.isfunction(inner) and not inner.__module__.startswith("torch")
    return f"{inner.__module__}:{inner.__qualname__}" if own else f"torch:{inner.__name__}"


@functools.cache
def _statements(file: str) -> list[ast.stmt]:
    return ast.parse(Path(file).read_text(encoding="utf-8")).body


def _within_package(file: Path) -> Path:
    """tilt/objectives/policy.py, wherever the package is installed; a file from elsewhere as it is."""
    package = Path(tilt.__file__).parent
    return file.relative_to(package.parent) if file.is_relative_to(package) else file


def place_of(name: str) -> str:
    """`file:line` of `module:qualified.name`, read from the source as it is, without importing the module."""
    module, _, path = name.partition(":")
    if module == "torch":
        return "torch"
    spec = importlib.util.find_spec(module)
    assert spec is not None and spec.origin is not None, f"{module} has no source"
    body = _statements(spec.origin)
    for part in path.split("."):
        found = next((node for node in body if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == part), None)
        assert found is not None, f"{name} is not in {spec.origin}"
        body, line = found.body, found.lineno
    file = Path(spec.origin)
    return f"{os.path.relpath(file) if file.is_relative_to(Path.cwd()) else _within_package(file)}:{line}"
