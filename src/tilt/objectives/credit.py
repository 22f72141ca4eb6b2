"""Credit: which advantage each action receives, from rewards and signals (algorithms.md, credit)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import inf
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from tilt.errors import UsageError
from tilt.objectives.experience import Rewards, Signals
from tilt.segments import (
    Layout,
    PromptMask,
    discounted_sums,
    group_count,
    group_flat,
    group_max,
    group_mean,
    group_std,
    group_sum,
    segment_sum,
    spread,
)
from tilt.shapes import ActionMask, PerAction, PerSequence, SequenceMask

NOTHING: frozenset[str] = frozenset()


class Credited(NamedTuple):
    """Advantages and returns per action [A] (returns are the critic's targets, NaN where there are none), and which sequences count [S].

    `final`: the critic's target after the last action [S], NaN where a sequence has none; empty where there are none at all.
    """

    advantages: PerAction
    returns: PerAction
    counted: SequenceMask
    final: PerSequence = torch.zeros(0)


class Credit(Protocol):
    """Turns rewards into advantages. `needs` names the signals it reads; `compares` says that it needs several answers a prompt."""

    @property
    def needs(self) -> frozenset[str]: ...

    @property
    def compares(self) -> bool:
        return False

    def flat(self, rewards: Rewards, layout: Layout) -> PromptMask:
        """Prompts among whose answers this credit finds no difference in what they earned, [G]."""
        return group_flat(earned(rewards, layout), layout, rewards.scored)

    def __call__(self, rewards: Rewards, signals: Signals, layout: Layout) -> Credited: ...


def kl_needs(kl: float) -> frozenset[str]:
    """Signals read by a KL penalty in the reward: none when it is off."""
    return frozenset({"old", "reference"}) if kl else NOTHING


def shaped(rewards: Rewards, signals: Signals, layout: Layout, kl: float) -> PerAction:
    """r_t = dense reward + R on the last action - kl (l_old - l_ref)_t; with kl = 0 no signal is touched."""
    steps = rewards.steps.index_add(0, layout.last, rewards.total)
    return steps - kl * (signals.old - signals.reference) if kl else steps


def whiten(x: PerAction, seen: ActionMask, ddof: int, eps: float) -> PerAction:
    """(x - mean) / sqrt(var + eps) over the seen actions, divisor n - ddof; 0 elsewhere, and 0 everywhere if all seen are equal."""
    count = seen.sum()
    mean = torch.where(seen, x, 0).sum() / count
    away = torch.where(seen, x - mean, 0)
    flat = torch.where(seen, x, -inf).max() <= torch.where(seen, x, inf).min()
    return torch.where(seen & ~flat, away * ((away * away).sum() / (count - ddof) + eps).rsqrt(), 0)


def whitened_rewards(x: PerAction, seen: ActionMask) -> PerAction:
    """(x - mean) / sqrt(var + 1e-8) + mean over the seen actions, divisor n - 1, the mean added back (TRL's whiten_rewards); 0 elsewhere."""
    mean = torch.where(seen, x, 0).sum() / seen.sum()
    return torch.where(seen, whiten(x, seen, 1, 1e-8) + mean, 0)


def check_fraction(piece: object, **numbers: float) -> None:
    """Refuse a discount outside [0, 1]."""
    for name, number in numbers.items():
        if not 0 <= number <= 1:
            raise UsageError(f"{type(piece).__name__}: {name}={number} must lie in [0, 1]")


def check_not_negative(piece: object, **numbers: float) -> None:
    """Refuse a negative number."""
    for name, number in numbers.items():
        if not number >= 0:
            raise UsageError(f"{type(piece).__name__}: {name}={number} must not be negative")


def check_positive(piece: object, **numbers: float) -> None:
    """Refuse a number that is not above 0."""
    for name, number in numbers.items():
        if not number > 0:
            raise UsageError(f"{type(piece).__name__}: {name}={number} must be above 0")


@dataclass(frozen=True)
class Imitate(Credit):
    """Advantage 1 on every action; with keep="best" only the first best answer of each prompt counts (RAFT)."""

    keep: Literal["all", "best"] = "all"

    @property
    def needs(self) -> frozenset[str]:
        return NOTHING

    @property
    def compares(self) -> bool:
        return self.keep == "best"

    def __call__(self, rewards: Rewards, signals: Signals, layout: Layout) -> Credited:
        ones = torch.ones_like(signals.old)
        kept = rewards.scored if self.keep == "all" else best(earned(rewards, layout), layout, rewards.scored)
        return Credited(ones, torch.full_like(ones, torch.nan), kept)


@dataclass(frozen=True)
class Return(Credit):
    """Every action receives the whole return of its sequence: A_t = sum_k r_k."""

    @property
    def needs(self) -> frozenset[str]:
        return NOTHING

    def __call__(self, rewards: Rewards, signals: Signals, layout: Layout) -> Credited:
        total = spread(earned(rewards, layout), layout)
        return Credited(total, total, rewards.scored)


@dataclass(frozen=True)
class ReturnToGo(Credit):
    """A_t = sum_{k>=t} gamma^(k-t) r_k - b; b is 0, the critic's value of the state, or the mean return of the prompt's answers.

    With `kl` r_t carries -kl (l_old - l_ref)_t. `whitened`: minus the mean, over the standard deviation (divisor n - ddof), over all actions of the batch;
    `whiten_rewards`: the same of r_t, divisor n - 1, with the mean added back.
    """

    gamma: float = 1.0
    kl: float = 0.0
    baseline: Literal["none", "group_mean", "critic"] = "none"
    whitened: bool = False
    ddof: Literal[0, 1] = 0
    whiten_rewards: bool = False

    def __post_init__(self) -> None:
        check_fraction(self, gamma=self.gamma)
        check_not_negative(self, kl=self.kl)

    @property
    def needs(self) -> frozenset[str]:
        return kl_needs(self.kl) | (frozenset({"values"}) if self.baseline == "critic" else NOTHING)

    @property
    def compares(self) -> bool:
        return self.baseline == "group_mean"

    def __call__(self, rewards: Rewards, signals: Signals, layout: Layout) -> Credited:
        steps = shaped(rewards, signals, layout, self.kl)
        if self.whiten_rewards:
            steps = whitened_rewards(steps, spread(rewards.scored, layout))
        returns = discounted_sums(steps, layout, self.gamma)
        advantages = returns
        if self.baseline == "critic":
            advantages = returns - signals.values
        elif self.baseline == "group_mean":
            advantages = returns - spread(group_mean(segment_sum(steps, layout), layout, rewards.scored)[layout.prompt], layout)
        if self.whitened:
            advantages = whiten(advantages, spread(rewards.scored, layout), self.ddof, 0.0)
        return Credited(advantages, returns, rewards.scored)


@dataclass(frozen=True)
class GAE(Credit):
    """A_t = sum_k (gamma lam)^k delta_{t+k}, delta_t = r_t + gamma V_{t+1} - V_t (1506.02438); critic target A_t + V_t.

    `signals.final` is the value after the last action: 0 where the answer ended by itself, the critic's where it was cut.
    The score is clamped to +-clip_reward before -kl (l_old - l_ref)_t is added. `whitened`: mean 0, variance 1 over the batch's actions (divisor n - 1, + 1e-8);
    `whiten_rewards`: the same of r_t, with the mean added back.
    """

    gamma: float = 1.0
    lam: float = 0.95
    kl: float = 0.0
    clip_reward: float = inf
    whitened: bool = True
    whiten_rewards: bool = False

    def __post_init__(self) -> None:
        check_fraction(self, gamma=self.gamma, lam=self.lam)
        check_not_negative(self, kl=self.kl, clip_reward=self.clip_reward)

    @property
    def needs(self) -> frozenset[str]:
        return kl_needs(self.kl) | {"values"}

    def __call__(self, rewards: Rewards, signals: Signals, layout: Layout) -> Credited:
        clamped = replace(rewards, total=rewards.total.clamp(-self.clip_reward, self.clip_reward))
        following = signals.values.roll(-1).index_copy(0, layout.last, signals.final)
        steps = shaped(clamped, signals, layout, self.kl)
        if self.whiten_rewards:
            steps = whitened_rewards(steps, spread(rewards.scored, layout))
        delta = steps + self.gamma * following - signals.values
        advantages = discounted_sums(delta, layout, self.gamma * self.lam)
        returns = advantages + signals.values
        if self.whitened:
            advantages = whiten(advantages, spread(rewards.scored, layout), 1, 1e-8)
        return Credited(advantages, returns, rewards.scored)


@dataclass(frozen=True)
class GroupRelative(Credit):
    """Every action of a sequence receives (R - centre) / scale among the answers to its prompt (GRPO, RLOO); exactly 0 where all R are equal.

    centre: mean of the group, or of the others (leave_one_out). scale: none, std of the group + eps, std of the batch's R + eps,
    or `whitened`: mean 0 and standard deviation 1 over the batch's actions. Divisors n - ddof. R = sum of rewards - kl sum_t (l_old - l_ref)_t.
    """

    centre: Literal["mean", "leave_one_out"] = "mean"
    scale: Literal["none", "group_std", "batch_std", "whitened"] = "group_std"
    ddof: Literal[0, 1] = 1
    eps: float = 0.0
    kl: float = 0.0

    def __post_init__(self) -> None:
        check_not_negative(self, eps=self.eps, kl=self.kl)

    @property
    def needs(self) -> frozenset[str]:
        return kl_needs(self.kl)

    @property
    def compares(self) -> bool:
        return True

    def __call__(self, rewards: Rewards, signals: Signals, layout: Layout) -> Credited:
        reward, scored, prompt = segment_sum(shaped(rewards, signals, layout, self.kl), layout), rewards.scored, layout.prompt
        if self.centre == "mean":
            relative = reward - group_mean(reward, layout, scored)[prompt]
        else:
            others = (group_count(layout, scored)[prompt] - 1).clamp(min=1).to(reward.dtype)
            relative = reward - (group_sum(reward, layout, scored)[prompt] - reward) / others
        if self.scale == "group_std":
            relative = relative / (group_std(reward, layout, scored, self.ddof)[prompt] + self.eps)
        elif self.scale == "batch_std":
            whole = Layout(layout.sequence, torch.zeros_like(prompt))
            relative = relative / (group_std(reward, whole, scored, self.ddof) + self.eps)
        relative = torch.where(scored & ~group_flat(reward, layout, scored)[prompt], relative, 0)
        advantages = spread(relative, layout)
        if self.scale == "whitened":
            advantages = whiten(advantages, spread(scored, layout), self.ddof, self.eps**2)
        return Credited(advantages, spread(reward, layout), scored)


@dataclass(frozen=True)
class ProcessRelative(Credit):
    """A_t = sum of the normalised rewards of the steps that end at t or later (process supervision, 2402.03300); the score of the whole is not read.

    A step's reward lies on its last action (`rewards.steps`, `rewards.ends`), and is normalised over all steps of all answers to the prompt:
    less their mean, over their standard deviation (divisor n - ddof) + eps; 0 where all are equal.
    """

    ddof: Literal[0, 1] = 1
    eps: float = 0.0

    def __post_init__(self) -> None:
        check_not_negative(self, eps=self.eps)

    @property
    def needs(self) -> frozenset[str]:
        return NOTHING

    @property
    def compares(self) -> bool:
        return True

    def flat(self, rewards: Rewards, layout: Layout) -> PromptMask:
        group = Layout(torch.arange(layout.actions, device=layout.sequence.device), layout.prompt[layout.sequence])
        return group_flat(rewards.steps, group, rewards.ends & spread(rewards.scored, layout))

    def __call__(self, rewards: Rewards, signals: Signals, layout: Layout) -> Credited:
        group = Layout(torch.arange(layout.actions, device=layout.sequence.device), layout.prompt[layout.sequence])  # every action a member
        steps, ends = rewards.steps, rewards.ends
        relative = steps - group_mean(steps, group, ends)[group.prompt]
        relative = relative / (group_std(steps, group, ends, self.ddof)[group.prompt] + self.eps)
        relative = torch.where(ends & ~group_flat(steps, group, ends)[group.prompt], relative, 0)
        return Credited(discounted_sums(relative, layout, 1.0), discounted_sums(steps, layout, 1.0), rewards.scored)


@dataclass(frozen=True)
class Teacher(Credit):
    """A_t = sum_{k>=t} discount^(k-t) (l_teacher - l_old)_k: on-policy distillation (2306.08543, 2306.13649). The teacher is the reference; no reward is read.

    discount 0: each token's own log-ratio, prefixes frozen; 1, summed over actions: the gradient of -KL(policy || teacher) of whole answers.
    """

    discount: float = 0.0

    def __post_init__(self) -> None:
        check_fraction(self, discount=self.discount)

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"old", "reference"})

    def __call__(self, rewards: Rewards, signals: Signals, layout: Layout) -> Credited:
        advantages = discounted_sums(signals.reference - signals.old, layout, self.discount)
        return Credited(advantages, torch.full_like(advantages, torch.nan), rewards.scored)


def earned(rewards: Rewards, layout: Layout) -> PerSequence:
    """What a sequence earned in all: its reward and the sum of its dense rewards."""
    return rewards.total + segment_sum(rewards.steps, layout)


def best(reward: PerSequence, layout: Layout, scored: SequenceMask) -> SequenceMask:
    """The first best scored answer of each prompt."""
    top = scored & (reward == group_max(reward, layout, scored)[layout.prompt])
    order = torch.arange(layout.sequences, device=reward.device, dtype=torch.float64)
    return order == -group_max(-order, layout, top)[layout.prompt]


def settled(rewards: Rewards, signals: Signals, layout: Layout) -> tuple[Rewards, Signals]:
    """Rewards and signals as credit reads them: in the signals' dtype and device, dense rewards [A], final values [S], and zeros in place
    of whatever an unscored sequence holds. Without final values every answer ended by itself, so they are 0."""
    old = signals.old
    scored = rewards.scored.to(old.device)
    seen = spread(scored, layout)
    steps = rewards.steps.to(old) if rewards.steps.numel() else torch.zeros_like(old)
    final = signals.final if signals.final.numel() else old.new_zeros(layout.sequences)

    def quiet(x: Tensor) -> Tensor:
        return torch.where(seen, x, 0)

    ends = rewards.ends.to(old.device) if rewards.ends.numel() else steps != 0
    per_action = {name: quiet(getattr(signals, name)) for name in ("sampler", "old", "reference", "values", "entropy")}
    return (
        replace(
            rewards,
            total=torch.where(scored, rewards.total.to(old), 0),
            steps=quiet(steps),
            scored=scored,
            ends=ends & seen,
            trained=rewards.trained.to(old.device) if rewards.trained.numel() else torch.ones_like(scored),
        ),
        Signals(**per_action, final=torch.where(scored, final.to(old), 0)),
    )
