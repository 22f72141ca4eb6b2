"""A stand-in for torch.cuda.CUDAGraph on any device: what a step computes is written down operation by operation and done again on the same tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Recorder:
    """As a graph does, it knows nothing of Python: numbers that a step read once stay what they were, and a tensor made outside is read where it lies."""

    made: list[Recorder] = []

    def __init__(self) -> None:
        self.tape: list[tuple[Any, tuple[Any, ...], dict[str, Any], list[Tensor]]] = []
        self.replays = 0
        Recorder.made.append(self)

    @staticmethod
    def maker() -> Callable[[], Recorder]:
        return Recorder

    def record(self, step: Callable[[], Tensor]) -> Tensor:
        with _Writing(self.tape):
            self.out = out = step()
        for _, _, _, made in self.tape:  # nothing that the recording computed is there before a replay
            for tensor in made:
                tensor.fill_(float("nan") if tensor.is_floating_point() else 0)
        return out

    def replay(self) -> None:
        self.replays += 1
        for function, given, named, made in self.tape:
            for kept, new in zip(made, _tensors(function(*given, **named)) if made else self._done(function, given, named), strict=True):
                kept.copy_(new)

    @staticmethod
    def _done(function: Any, given: tuple[Any, ...], named: dict[str, Any]) -> list[Tensor]:
        function(*given, **named)
        return []


class _Writing(TorchDispatchMode):
    def __init__(self, tape: list[Any]) -> None:
        super().__init__()
        self.tape = tape

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = function(*args, **(kwargs or {}))
        before = {x.untyped_storage().data_ptr() for x in _tensors((args, kwargs))}
        if not _tensors(found):
            raise RuntimeError(f"{function} reads a number out of a tensor: no graph can")
        made = [x for x in _tensors(found) if x.untyped_storage().data_ptr() not in before]
        if made or function._schema.is_mutable:
            self.tape.append((function, args, kwargs or {}, made))
        return found


def _tensors(found: Any) -> list[Tensor]:
    return [x for x in tree_leaves(found) if isinstance(x, torch.Tensor)]
