"""Shapes and dtypes in annotations, checked while the tests run: Float[Tensor, "A"] twice in one call with 3 and 4 entries is refused.

As jaxtyping's own import hook, at a tenth of its cost: only annotations of arrays are looked at, and only at the places where they stand.
"""

from __future__ import annotations

import functools
import importlib.abc
import importlib.machinery
import inspect
import sys
import typing
from collections.abc import Callable, Sequence
from dataclasses import is_dataclass
from types import FunctionType, ModuleType
from typing import Any

from jaxtyping import AbstractArray, jaxtyped


class Checked(importlib.abc.MetaPathFinder):
    """Imports these modules, and those inside them, with the shapes of every function and dataclass checked."""

    def __init__(self, modules: Sequence[str]) -> None:
        self.modules = tuple(modules)

    def find_spec(self, name: str, path: Any, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if not any(name == module or name.startswith(module + ".") for module in self.modules):
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def checked(module: ModuleType) -> None:
                execute(module)
                check_module(module)

            spec.loader.exec_module = checked  # type: ignore[method-assign]
        return spec


def install(modules: Sequence[str]) -> None:
    """Check the shapes of these modules from now on."""
    sys.meta_path.insert(0, Checked(modules))


def check_module(module: ModuleType) -> None:
    """Put a checked function in the place of each one that the module defines, in its classes too."""
    for name, found in list(vars(module).items()):
        if getattr(found, "__module__", None) != module.__name__:
            continue
        if isinstance(found, FunctionType):
            setattr(module, name, check(found))
        elif isinstance(found, type):
            for key, member in list(vars(found).items()):
                if key == "__init__" and is_dataclass(found):
                    setattr(found, key, check(member, found))
                elif isinstance(member, FunctionType) and not key.startswith("__init"):
                    setattr(found, key, check(member))
                elif isinstance(member, staticmethod):
                    setattr(found, key, staticmethod(check(member.__func__)))


def check(function: Callable[..., Any], fields: type | None = None) -> Callable[..., Any]:
    """The function, refusing arrays whose axes disagree; of a dataclass' __init__ the annotations are those of its `fields`."""

    @functools.cache
    def annotated() -> tuple[dict[int, tuple[str, Any]], dict[str, Any], Any]:
        hints = {name: hint for name, hint in _hints(fields or function).items() if _of_array(hint)}
        names = [*inspect.signature(function).parameters]
        return {i: (n, hints[n]) for i, n in enumerate(names) if n in hints}, hints, None if fields else hints.get("return")

    @functools.wraps(function)
    def checked(*args: Any, **kwargs: Any) -> Any:
        places, hints, result = annotated()
        if not hints:
            return function(*args, **kwargs)
        with jaxtyped("context"):  # type: ignore[attr-defined]
            for i, (name, hint) in places.items():
                if i < len(args):
                    _agree(args[i], hint, function, name)
            for name, value in kwargs.items():
                if name in hints:
                    _agree(value, hints[name], function, name)
            found = function(*args, **kwargs)
            if result is not None:
                _agree(found, result, function, "result")
        return found

    return checked


def _hints(thing: Any) -> dict[str, Any]:
    try:
        return typing.get_type_hints(thing)
    except (NameError, TypeError):
        return {}


@functools.cache
def _of_array(hint: Any) -> bool:
    if typing.get_origin(hint) is tuple:
        return any(_of_array(inner) for inner in typing.get_args(hint))
    return isinstance(hint, type) and issubclass(hint, AbstractArray)


def _agree(value: Any, hint: Any, function: Callable[..., Any], name: str) -> None:
    if typing.get_origin(hint) is tuple:
        if isinstance(value, tuple):
            for item, inner in zip(value, typing.get_args(hint), strict=False):
                _agree(item, inner, function, name)
    elif _of_array(hint) and not isinstance(value, hint):
        shape, dtype = tuple(getattr(value, "shape", ())), getattr(value, "dtype", type(value))
        raise TypeError(f"{function.__qualname__}: {name} is {shape} {dtype}, not {hint}")
