"""The type checker of jaxtyping's import hook in the tests: it checks arrays' shapes and dtypes against their annotations, and nothing else."""

from __future__ import annotations

import functools
import inspect
import typing
from collections.abc import Callable
from typing import Any

from jaxtyping import AbstractArray


def check(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, refusing arguments and results whose axes disagree: Float[Tensor, "A"] twice with 3 and 4 entries."""
    signature = inspect.signature(function)

    @functools.wraps(function)
    def checked(*args: Any, **kwargs: Any) -> Any:
        hints = _hints(function)
        for name, value in signature.bind(*args, **kwargs).arguments.items():
            _agree(value, hints.get(name), f"{function.__qualname__}: {name}")
        result = function(*args, **kwargs)
        _agree(result, hints.get("return"), f"{function.__qualname__}: result")
        return result

    return checked


@functools.cache
def _hints(function: Callable[..., Any]) -> dict[str, Any]:
    try:
        return typing.get_type_hints(function)
    except (NameError, TypeError):
        return {}


def _agree(value: Any, hint: Any, where: str) -> None:
    if typing.get_origin(hint) is tuple and isinstance(value, tuple):
        for item, inner in zip(value, typing.get_args(hint), strict=False):
            _agree(item, inner, where)
    elif isinstance(hint, type) and issubclass(hint, AbstractArray) and not isinstance(value, hint):
        raise TypeError(f"{where} is {tuple(getattr(value, 'shape', ()))} {getattr(value, 'dtype', type(value))}, not {hint}")
