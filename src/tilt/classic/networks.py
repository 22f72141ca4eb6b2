"""Small networks for control: a policy over discrete or continuous actions, a critic, action values; started as Stable-Baselines3 and CleanRL start theirs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

from tilt.classic.dynamics import Actions, Continuous
from tilt.classic.tape import Tape
from tilt.errors import UsageError

Activation = Literal["tanh", "relu"]
ACTIVATIONS = {"tanh": torch.tanh, "relu": torch.relu}


class Distribution(Protocol):
    """What a policy says of A states."""

    def logprobs(self, actions: Tensor) -> Tensor:
        """log pi(a_t | s_t), [A]."""

    def entropy(self) -> Tensor:
        """H of each state, [A]."""

    def kl_from(self, old: Distribution) -> Tensor:
        """KL(old || this) of each state, [A]."""

    def sample(self, noise: Tensor) -> Tensor:
        """An action from each state's noise."""

    def mode(self) -> Tensor:
        """The likeliest action of each state."""

    def frozen(self) -> Distribution:
        """The same numbers, whatever the policy becomes: a parameter among them is copied."""


@dataclass(frozen=True)
class Categorical:
    """A softmax over discrete actions: normalised `logits` [A, actions]. One uniform is one action, by the inverse of the cumulative distribution."""

    logits: Tensor

    @staticmethod
    def of(scores: Tensor) -> Categorical:
        return Categorical(scores.log_softmax(-1))

    def logprobs(self, actions: Tensor) -> Tensor:
        return self.logits.gather(-1, actions.unsqueeze(-1)).squeeze(-1)

    def entropy(self) -> Tensor:
        return -(self.logits.exp() * self.logits).sum(-1)

    def kl_from(self, old: Distribution) -> Tensor:
        assert isinstance(old, Categorical)
        return (old.logits.exp() * (old.logits - self.logits)).sum(-1)

    def sample(self, noise: Tensor) -> Tensor:
        below = self.logits.exp().cumsum(-1)[..., :-1] <= noise.unsqueeze(-1)
        return below.sum(-1)

    def mode(self) -> Tensor:
        return self.logits.argmax(-1)

    def frozen(self) -> Categorical:
        return Categorical(self.logits.detach())


@dataclass(frozen=True)
class Gaussian:
    """Independent normals: `mean` [A, n] and a log standard deviation that no state changes, [n]. The noise is standard normal."""

    mean: Tensor
    log_std: Tensor

    def logprobs(self, actions: Tensor) -> Tensor:
        off = (actions - self.mean) * (-self.log_std).exp()
        return -(0.5 * off * off + self.log_std).sum(-1) - 0.5 * math.log(2 * math.pi) * self.mean.shape[-1]

    def entropy(self) -> Tensor:
        return (self.log_std.sum() + 0.5 * (1 + math.log(2 * math.pi)) * self.mean.shape[-1]).expand(self.mean.shape[:-1])

    def kl_from(self, old: Distribution) -> Tensor:
        assert isinstance(old, Gaussian)
        shift, ratio = old.mean - self.mean, old.log_std - self.log_std
        return (-ratio + 0.5 * ((2 * ratio).exp() + shift * shift * (-2 * self.log_std).exp()) - 0.5).sum(-1)

    def sample(self, noise: Tensor) -> Tensor:
        return self.mean + self.log_std.exp() * noise

    def mode(self) -> Tensor:
        return self.mean

    def frozen(self) -> Gaussian:
        return Gaussian(self.mean.detach(), self.log_std.detach().clone())


class Perceptron(nn.Module):
    """Linear layers with an activation between them, none after the last: `sizes` 4 64 64 2."""

    def __init__(self, sizes: Sequence[int], activation: Activation = "tanh") -> None:
        super().__init__()
        if len(sizes) < 2 or min(sizes) < 1 or activation not in ACTIVATIONS:
            raise UsageError(
                f"a network needs layers of at least 1 unit and an activation of {', '.join(ACTIVATIONS)}, not {list(sizes)} and {activation!r}"
            )
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(sizes))
        self.activation = ACTIVATIONS[activation]
        self.tape: Tape | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.tape is not None:
            return self.tape.forward(x)
        *inner, last = self.layers
        for layer in inner:
            x = self.activation(nn.functional.linear(x, layer.weight, layer.bias))  # type: ignore[arg-type]
        return nn.functional.linear(x, last.weight, last.bias)  # type: ignore[arg-type]

    def orthogonal(self, generator: torch.Generator, last: float) -> Perceptron:
        """Orthogonal weights of gain sqrt(2), of gain `last` in the last layer; biases 0."""
        with torch.no_grad():
            for number, layer in enumerate(self.layers):
                gain = last if number == len(self.layers) - 1 else math.sqrt(2)
                nn.init.orthogonal_(layer.weight, gain, generator)  # type: ignore[arg-type]
                layer.bias.zero_()  # type: ignore[operator]
        return self

    def uniform(self, generator: torch.Generator) -> Perceptron:
        """Weights and biases uniform in ±1 / sqrt(inputs), PyTorch's own start."""
        with torch.no_grad():
            for layer in self.layers:
                bound = 1 / math.sqrt(layer.in_features)  # type: ignore[arg-type]
                for parameter in (layer.weight, layer.bias):
                    parameter.uniform_(-bound, bound, generator=generator)  # type: ignore[union-attr, operator]
        return self


class Policy(nn.Module):
    """pi(. | s): a perceptron gives the logits of discrete actions, or the mean of a Gaussian whose log standard deviation is a parameter of its own."""

    def __init__(
        self, observation: int, actions: Actions, hidden: Sequence[int], activation: Activation, seed: int, log_std: float = 0.0
    ) -> None:
        super().__init__()
        self.continuous = isinstance(actions, Continuous)
        outputs = actions.size if isinstance(actions, Continuous) else actions.count
        self.body = Perceptron([observation, *hidden, outputs], activation).orthogonal(torch.Generator().manual_seed(seed), 0.01)
        if self.continuous:
            self.log_std = nn.Parameter(torch.full((outputs,), float(log_std)))

    def forward(self, observations: Tensor) -> Categorical | Gaussian:
        said = self.body(observations)
        return Gaussian(said, self.log_std) if self.continuous else Categorical.of(said)


class Critic(nn.Module):
    """V(s), [A]."""

    def __init__(self, observation: int, hidden: Sequence[int], activation: Activation, seed: int) -> None:
        super().__init__()
        self.body = Perceptron([observation, *hidden, 1], activation).orthogonal(torch.Generator().manual_seed(seed), 1.0)

    def forward(self, observations: Tensor) -> Tensor:
        return self.body(observations).squeeze(-1)


class ActionValues(nn.Module):
    """Q(s, .), [A, actions]. Without hidden layers it is one matrix, from 0: a table where states are one-hot."""

    def __init__(self, observation: int, actions: int, hidden: Sequence[int], activation: Activation, seed: int) -> None:
        super().__init__()
        self.body: nn.Module = nn.Linear(observation, actions, bias=False)
        if not hidden:
            nn.init.zeros_(self.body.weight)  # type: ignore[arg-type]
            return
        self.body = Perceptron([observation, *hidden, actions], activation).uniform(torch.Generator().manual_seed(seed))

    def forward(self, observations: Tensor) -> Tensor:
        return self.body(observations)
