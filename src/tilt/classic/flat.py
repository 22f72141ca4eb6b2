"""Adam on all parameters as one vector, perceptrons taped: a small network's step costs the calls, not the arithmetic."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.optim.adam import adam

from tilt.classic.networks import Perceptron
from tilt.classic.tape import Tape

Module = TypeVar("Module", bound=nn.Module)


class FlatAdam:
    """The parameters become views of one vector; `step` clips the gradient of a loss to a global norm and takes one step of Adam, exactly as over separate tensors.

    The perceptrons among the modules are taped until `owned` frees them.
    """

    def __init__(self, modules: Sequence[nn.Module], lr: float, eps: float, clip_norm: float) -> None:
        self.lr, self.eps, self.clip_norm = lr, eps, clip_norm
        parameters = [p for module in modules for p in module.parameters()]
        self.vector = torch.cat([p.detach().reshape(-1) for p in parameters])
        self.slope, self.mean, self.square = (torch.zeros_like(self.vector) for _ in range(3))
        self.count, start = torch.zeros(()), 0
        slopes: dict[nn.Parameter, Tensor] = {}
        for parameter in parameters:
            part = slice(start, start + parameter.numel())
            parameter.data, slopes[parameter] = self.vector[part].view_as(parameter), self.slope[part].view_as(parameter)
            start += parameter.numel()
        found = [part for module in modules for part in module.modules() if isinstance(part, Perceptron)]
        self.tapes = [_taped(perceptron, slopes) for perceptron in found]
        inside = {p for perceptron in found for p in perceptron.parameters()}
        self.loose = {p: slope for p, slope in slopes.items() if p not in inside}

    def rate(self, lr: float) -> None:
        """Set the learning rate."""
        self.lr = lr

    def step(self, loss: Tensor) -> None:
        """One step along the gradient of the loss; a parameter that the loss does not read has gradient 0."""
        outputs = [output for tape in self.tapes for output, _ in tape.kept]
        slopes = iter(torch.autograd.grad(loss, [*outputs, *self.loose], allow_unused=True, materialize_grads=True))
        with torch.no_grad():
            self.slope.zero_()
            for tape in self.tapes:
                tape.backward(slopes)
            for into, slope in zip(self.loose.values(), slopes, strict=True):
                into.copy_(slope)
            if self.clip_norm > 0 and (norm := float(torch.linalg.vector_norm(self.slope))) > self.clip_norm:
                self.slope *= self.clip_norm / norm
            adam(
                [self.vector], [self.slope], [self.mean], [self.square], [], [self.count], fused=True, amsgrad=False, beta1=0.9, beta2=0.999,
                lr=self.lr, weight_decay=0.0, eps=self.eps, maximize=False,
            )  # fmt: skip


def _taped(perceptron: Perceptron, slopes: dict[nn.Parameter, Tensor]) -> Tape:
    layers = [(layer.weight, layer.bias) for layer in perceptron.layers]
    perceptron.tape = Tape(
        [(w.detach(), b.detach()) for w, b in layers],  # type: ignore[operator]
        [(slopes[w], slopes[b]) for w, b in layers],  # type: ignore[index]
        perceptron.activation is torch.tanh,
    )
    return perceptron.tape


def owned(module: Module) -> Module:
    """The module with each parameter in storage of its own again and no tape, so that it computes to the bit what a loaded copy does."""
    for part in module.modules():
        if isinstance(part, Perceptron):
            part.tape = None
    for parameter in module.parameters():
        parameter.data = parameter.data.clone()
    return module
