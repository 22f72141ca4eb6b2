"""Adam on all parameters as one vector: a small network's step costs the calls, not the arithmetic."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

Module = TypeVar("Module", bound=nn.Module)


class FlatAdam:
    """The parameters become views of one vector; `step` clips the gradient of a loss to a global norm and takes one step of Adam, exactly as over separate tensors."""

    def __init__(self, parameters: Sequence[nn.Parameter], lr: float, eps: float, clip_norm: float) -> None:
        self.parameters, self.clip_norm = list(parameters), clip_norm
        self.vector = nn.Parameter(torch.cat([p.detach().reshape(-1) for p in self.parameters]))
        start = 0
        for parameter in self.parameters:
            parameter.data = self.vector.data[start : start + parameter.numel()].view_as(parameter)
            start += parameter.numel()
        self.inner = torch.optim.Adam([self.vector], lr=lr, eps=eps, fused=True)

    def rate(self, lr: float) -> None:
        """Set the learning rate."""
        self.inner.param_groups[0]["lr"] = lr

    def step(self, loss: Tensor) -> None:
        """One step along the gradient of the loss; a parameter that the loss does not read has gradient 0."""
        slopes = torch.autograd.grad(loss, self.parameters, allow_unused=True, materialize_grads=True)
        slope = torch.cat([s.reshape(-1) for s in slopes])
        if self.clip_norm > 0 and (norm := float(torch.linalg.vector_norm(slope))) > self.clip_norm:
            slope *= self.clip_norm / norm
        self.vector.grad = slope
        self.inner.step()


def owned(module: Module) -> Module:
    """The module with each parameter in storage of its own again, so that it computes to the bit what a loaded copy does."""
    for parameter in module.parameters():
        parameter.data = parameter.data.clone()
    return module
