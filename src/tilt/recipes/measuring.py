"""What training on given rows would take, measured on the real model: bytes by what they are for, and seconds of a forward and backward pass."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from time import perf_counter

import torch
from torch import Tensor, nn

from tilt.data.packing import Pack, pack
from tilt.data.rollouts import Rollout
from tilt.recipes import opening
from tilt.recipes.settings import Training
from tilt.runs.machine import wait

Examples = Sequence[Rollout]


@dataclass(frozen=True)
class Measured:
    """A forward and backward pass of the real model on examples: seconds a token, and bytes a token kept for the backward pass."""

    tokens: int
    seconds: float
    activations: float


def parameters(module: nn.Module) -> tuple[int, int]:
    """Bytes of all parameters, and of those that are trained."""
    sizes = [(p.numel() * p.element_size(), p.requires_grad) for p in module.parameters()]
    return sum(size for size, _ in sizes), sum(size for size, trained in sizes if trained)


def memory(config: Training, module: nn.Module, measured: Measured, batch: float, held: Mapping[str, int], critic: int) -> list[str]:
    """Bytes by what they are for: Adam keeps two numbers for each trained one, a critic is trained like the policy."""
    every, trained = parameters(module)
    tokens = min(config.micro_tokens, round(batch))
    parts = {
        "weights": every, "gradients": trained, "Adam": 2 * trained, "critic with its own": 4 * critic, **held,
        f"activations of {tokens:,} tokens": round(measured.activations * tokens),
    }  # fmt: skip
    said = ", ".join(f"{name} {size(count)}" for name, count in parts.items() if count or name == "reference")
    return [f"memory     about {size(sum(parts.values()))} at most: {said}"]


def size(count: float) -> str:
    """Bytes in MiB or GiB."""
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{max(count / 2**20, 0.1):.1f} MiB"


def attempt(loss: Callable[[Pack], Tensor], examples: Examples, config: Training, device: torch.device, module: nn.Module) -> Measured:
    """Time a forward and backward pass on a few examples, once to warm up and to count what is kept, twice by the clock."""
    weight = sum(p.numel() for p in module.parameters())
    budget = min(config.micro_tokens, max(64, min(2048, int(2e10 / max(weight, 1)))))
    chosen: list[Rollout] = []
    while len(chosen) < len(examples) and (not chosen or sum(len(r.prompt.tokens) + len(r.tokens) for r in chosen) < budget):
        chosen.append(examples[len(chosen)])
    batch = pack(chosen).to(device)
    own = {p.untyped_storage().data_ptr() for p in module.parameters()}
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    autocast = opening.precision(config, device)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor), autocast():
        loss(batch).backward()  # type: ignore[no-untyped-call]
    times = []
    for _ in range(2):
        began = perf_counter()
        with autocast():
            loss(batch).backward()  # type: ignore[no-untyped-call]
        wait(device)
        times.append(perf_counter() - began)
    seconds = min(times)
    module.zero_grad(set_to_none=True)
    return Measured(len(batch.tokens), seconds / len(batch.tokens), sum(kept.values()) / len(batch.tokens))
