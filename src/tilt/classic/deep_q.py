"""DQN: a network of action values, fitted to r + gamma max Q_target(s', .) on replayed steps; on one-hot states it is Q-learning bit for bit."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from tilt.classic.agents import Agent, Report, Trained, check_numbers, check_training
from tilt.classic.dynamics import Discrete
from tilt.classic.environments import Environments
from tilt.classic.flat import FlatAdam, owned
from tilt.classic.networks import ActionValues, Activation
from tilt.classic.rollouts import NOISE, REPLAY, ROWS, Book, counted
from tilt.errors import NumericError, UsageError


@dataclass(frozen=True)
class DeepQ:
    """How DQN learns: every `every` steps `updates` gradient steps on `batch` replayed transitions; the target network is copied every `target` steps.

    `learn_after` steps are taken at random first; epsilon falls from `epsilon` to `epsilon_end` over the first `explore` share of the training.
    `double`: the online network chooses the action that the target network values (1509.06461). `returns`: rewards of so many steps before the bootstrap.
    `schedule` linear brings lr to 0 at the end. Without hidden layers Q is one matrix.
    """

    gamma: float = 0.99
    envs: int = 1
    lr: float = 2.3e-3
    schedule: Literal["constant", "linear"] = "constant"
    batch: int = 64
    buffer: int = 100_000
    learn_after: int = 1000
    every: int = 256
    updates: int = 128
    target: int = 10
    epsilon: float = 1.0
    epsilon_end: float = 0.04
    explore: float = 0.16
    double: bool = False
    returns: int = 1
    loss: Literal["huber", "square"] = "huber"
    optimizer: Literal["adam", "sgd"] = "adam"
    clip_norm: float = 10.0
    hidden: tuple[int, ...] = (256, 256)
    activation: Activation = "relu"
    dtype: Literal["float32", "float64"] = "float32"

    def __post_init__(self) -> None:
        check_numbers(
            self, at_least_one=("envs", "batch", "buffer", "every", "updates", "target", "returns"), not_negative=("learn_after", "clip_norm"), positive=("lr",),
            fraction=("gamma", "epsilon", "epsilon_end", "explore"),
        )  # fmt: skip
        if self.buffer < self.envs:
            raise UsageError(f"DeepQ: buffer={self.buffer} holds less than one step of envs={self.envs} environments")


class Replay:
    """The last `size` transitions: s, a, the discounted rewards, gamma^n (0 where the episode ended), and the state after n steps."""

    def __init__(self, size: int, observation: int, dtype: torch.dtype = torch.float32) -> None:
        self.size, self.written = size, 0
        self.before, self.after = (torch.zeros(size, observation, dtype=dtype) for _ in range(2))
        self.actions = torch.zeros(size, dtype=torch.long)
        self.rewards, self.factors = (torch.zeros(size, dtype=dtype) for _ in range(2))
        self._views = [x.numpy() for x in (self.before, self.actions, self.rewards, self.factors, self.after)]

    def add(self, *row: object) -> None:
        """One transition, in place of the oldest where the buffer is full."""
        at = self.written % self.size
        for view, value in zip(self._views, row, strict=True):
            view[at] = value
        self.written += 1

    def __len__(self) -> int:
        return min(self.written, self.size)

    def take(self, which: Tensor) -> tuple[Tensor, ...]:
        return self.before[which], self.actions[which], self.rewards[which], self.factors[which], self.after[which]


class Ahead:
    """Turns single steps into n-step transitions: a step waits until n rewards are known or its episode is over, then goes on with what was found by then."""

    def __init__(self, replay: Replay, steps: int, gamma: float, environments: int) -> None:
        self.replay, self.steps, self.gamma = replay, steps, gamma
        self.waiting: list[deque[tuple[np.ndarray, int, float]]] = [deque() for _ in range(environments)]

    def add(self, i: int, before: np.ndarray, action: int, reward: float, after: np.ndarray, terminated: bool, over: bool) -> None:
        """A step of environment i; termination ends the bootstrap, a time limit only the waiting."""
        row = self.waiting[i]
        row.append((before, action, reward))
        while row and (over or len(row) == self.steps):
            total = 0.0
            for _, _, r in reversed(row):
                total = r + self.gamma * total
            first, chosen, _ = row.popleft()
            self.replay.add(first, chosen, total, 0.0 if terminated else self.gamma ** (len(row) + 1), after)


@torch.no_grad()
def bootstrapped(q: nn.Module, target: nn.Module, part: tuple[Tensor, ...], double: bool) -> Tensor:
    """r + gamma^n max Q_target(s', .), or with `double` Q_target(s', argmax Q(s', .)), [B]."""
    _, _, rewards, factors, after = part
    values = target(after)
    ahead = values.gather(1, q(after).argmax(1, keepdim=True)).squeeze(1) if double else values.amax(1)
    return rewards + factors * ahead


def train(
    settings: DeepQ,
    environments: Environments,
    *,
    steps: int,
    seed: int = 0,
    progress: Callable[[Report], None] | None = None,
    name: str = "",
    method: str = "dqn",
) -> Trained:
    """Step, store, and learn every so often, until `steps` steps have been taken in all environments together."""
    check_training(settings.envs, environments, steps)
    learner = DeepQLearner(settings, environments, seed, steps)
    while learner.steps < steps:
        learner.play(min(settings.every, steps - learner.steps))
        if learner.steps > settings.learn_after:
            learner.learn()
        if progress is not None:
            progress(Report(learner.steps, steps, learner.book.finished))
    agent = Agent(name, method, settings, environments.actions, owned(learner.q), None, None, seed)
    return Trained(agent, learner.book.finished, learner.steps)


class DeepQLearner:
    """Two networks, the replay buffer, and where the episodes stand."""

    def __init__(self, settings: DeepQ, environments: Environments, seed: int, total: int) -> None:
        if not isinstance(environments.actions, Discrete):
            raise UsageError(
                f"DQN takes the best of finitely many actions, and this environment's are {environments.actions}: use ppo, trpo or a2c"
            )
        self.settings, self.environments, self.seed, self.total = settings, environments, seed, total
        self.q: nn.Module = ActionValues(environments.observation, environments.actions.count, settings.hidden, settings.activation, seed)
        self.dtype = torch.float64 if settings.dtype == "float64" else torch.float32
        self.q.to(self.dtype)
        self.target = copy.deepcopy(self.q).requires_grad_(False)
        self.target_version = -1
        self.optimizer = FlatAdam([self.q], settings.lr, 1e-8, settings.clip_norm) if settings.optimizer == "adam" else None
        self.replay = Replay(settings.buffer, environments.observation, self.dtype)
        self.ahead = Ahead(self.replay, settings.returns, settings.gamma, environments.count)
        self.now = environments.reset(seed)
        self.book, self.moves, self.learned = Book(environments.count), 0, 0

    @property
    def steps(self) -> int:
        """Steps taken in all environments together."""
        return self.book.steps

    @property
    def epsilon(self) -> float:
        """The chance of a random action at this step."""
        s = self.settings
        done = min(1.0, self.steps / max(1.0, s.explore * self.total))
        return 1.0 if self.steps < s.learn_after else s.epsilon + (s.epsilon_end - s.epsilon) * done

    @property
    def lr(self) -> float:
        """The learning rate at this step."""
        return self.settings.lr * (1 - min(1.0, self.steps / self.total) if self.settings.schedule == "linear" else 1.0)

    def play(self, steps: int) -> None:
        """So many steps, in all environments together, epsilon-greedy."""
        for _ in range(-(-steps // self.environments.count)):
            if self.moves % ROWS == 0:
                self.uniforms = counted(self.seed, NOISE, self.moves // ROWS).random((ROWS, 2, self.environments.count))
            explore, which = self.uniforms[self.moves % ROWS]
            self._step(explore < self.epsilon, which)
            self.moves += 1

    def _step(self, explore: np.ndarray, which: np.ndarray) -> None:
        assert isinstance(self.environments.actions, Discrete)
        actions = (which * self.environments.actions.count).astype(np.int64)
        if not explore.all():
            with torch.inference_mode():
                best = self.q(torch.from_numpy(self.now).to(self.dtype)).argmax(1).numpy()
            actions = np.where(explore, actions, best)
        before, moved = self.now, self.environments.step(actions)
        over = moved.terminated | moved.truncated
        self.book.add(moved.rewards, over)
        for i in range(self.environments.count):
            self.ahead.add(i, before[i], int(actions[i]), float(moved.rewards[i]), moved.last[i], bool(moved.terminated[i]), bool(over[i]))
        self.now = moved.observations

    def learn(self) -> None:
        """The gradient steps that are due. While the target network stands still its values are found in one pass for all of them."""
        s = self.settings
        if (version := self.steps // s.target) != self.target_version:
            self.target.load_state_dict(self.q.state_dict())
            self.target_version = version
        if self.optimizer is not None:
            self.optimizer.rate(self.lr)
        drawn = counted(self.seed, REPLAY, self.learned).integers(len(self.replay), size=(s.updates, s.batch))
        self.learned += 1
        parts = self.replay.take(torch.from_numpy(drawn))
        goals = None if s.double else self._goals(parts)
        for k in range(s.updates):
            part = tuple(x[k] for x in parts)
            goal = bootstrapped(self.q, self.target, part, True) if goals is None else goals[k]
            values = self.q(part[0]).gather(1, part[1].unsqueeze(1)).squeeze(1)
            if s.loss == "huber":
                loss = nn.functional.smooth_l1_loss(values, goal)
            else:
                loss = 0.5 * (values - goal).square().mean()
            self._descend(loss)
        if not bool(torch.isfinite(loss.detach())):
            raise NumericError(f"DQN's loss is {float(loss.detach())} after {self.steps} steps: lower lr")

    def _goals(self, parts: tuple[Tensor, ...]) -> Tensor:
        """The targets of all minibatches, [updates, batch], about 1,024 transitions at a time: what fits the cache."""
        several = max(1, 1024 // self.settings.batch)
        found = [
            bootstrapped(self.q, self.target, tuple(x[k : k + several].flatten(0, 1) for x in parts), False)
            for k in range(0, self.settings.updates, several)
        ]
        return torch.cat(found).view(self.settings.updates, -1)

    def _descend(self, loss: Tensor) -> None:
        if self.optimizer is not None:
            self.optimizer.step(loss)
            return
        parameters = list(self.q.parameters())
        with torch.no_grad():
            for parameter, slope in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
                parameter.sub_(self.lr * slope)
