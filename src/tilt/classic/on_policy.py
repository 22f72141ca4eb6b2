"""REINFORCE, A2C, PPO and TRPO on networks: rows of the objectives' table, prepared once a rollout and trained on minibatches of its actions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import torch
from torch import Tensor

from tilt.classic.agents import Agent, Report, Trained, check_numbers, check_training
from tilt.classic.environments import Environments
from tilt.classic.flat import FlatAdam, owned
from tilt.classic.networks import Activation, Categorical, Critic, Distribution, Gaussian, Policy
from tilt.classic.normalisation import RewardScale, Running
from tilt.classic.rollouts import SHUFFLE, Collector, Rollout, counted
from tilt.errors import NumericError, UsageError
from tilt.objectives.credit import ReturnToGo
from tilt.objectives.experience import Experience, Outputs, Rewards, Signals
from tilt.objectives.objective import Objective
from tilt.objectives.penalty import NoPenalty, OldKL, TrustRegion
from tilt.objectives.policy import Clip
from tilt.optim.trust_region import Taken, hessian_product, trust_region_step

Schedule = Literal["constant", "linear"]


@dataclass(frozen=True)
class OnPolicy:
    """How a row is trained: `length` steps in each of `envs` environments a rollout (0: whole episodes), then `passes` over it in minibatches of `batch` actions (0: all).

    Adam for policy and critic, gradients clipped to `clip_norm`; a row with a trust region takes its step instead, and the critic alone has `critic_passes`.
    `schedule` linear brings lr, `clip_schedule` linear the clip, to 0 at the end.
    """

    row: Objective
    envs: int = 8
    length: int = 128
    batch: int = 0
    passes: int = 1
    critic_passes: int = 0
    lr: float = 3e-4
    schedule: Schedule = "constant"
    clip_schedule: Schedule = "constant"
    clip_norm: float = 0.5
    hidden: tuple[int, ...] = (64, 64)
    activation: Activation = "tanh"
    log_std: float = 0.0
    normalise_observations: bool = False
    normalise_rewards: bool = False

    def __post_init__(self) -> None:
        check_numbers(
            self, at_least_one=("envs", "passes"), not_negative=("length", "batch", "critic_passes", "clip_norm"), positive=("lr",)
        )
        row = self.row
        if row.ratio.per_sequence or row.corrections or not isinstance(row.penalty, NoPenalty | OldKL | TrustRegion):
            raise UsageError(
                f"minibatches are of single actions, and there is no reference: ratio {row.ratio!r}, penalty {row.penalty!r} or corrections do not fit; "
                "choose the token ratio, and no penalty, old_kl or trust_region"
            )
        if "values" not in row.needs:
            raise UsageError(
                "the state where a rollout is cut off needs a value: give the row a critic (credit gae, or return_to_go with baseline critic)"
            )
        if isinstance(row.penalty, TrustRegion) and self.passes > 1:
            raise UsageError(
                f"passes={self.passes}: a trust region takes one step a rollout; `critic_passes` is how often the critic is fitted"
            )
        if isinstance(row.penalty, TrustRegion) and self.critic_passes < 1:
            raise UsageError("critic_passes=0: nothing would train the critic that the trust region's advantages need")
        if not isinstance(row.penalty, TrustRegion) and row.passes is not None and self.passes > row.passes:
            raise UsageError(f"{row.surrogate!r} is right for {row.passes} pass over fresh actions, not passes={self.passes}")
        if self.clip_schedule == "linear" and not isinstance(row.surrogate, Clip):
            raise UsageError(f"clip_schedule=linear: {type(row.surrogate).__name__} has no clip to shrink")

    @property
    def gamma(self) -> float:
        return float(getattr(self.row.credit, "gamma", 1.0))


def train(
    settings: OnPolicy,
    environments: Environments,
    *,
    steps: int,
    seed: int = 0,
    progress: Callable[[Report], None] | None = None,
    name: str = "",
    method: str = "",
) -> Trained:
    """Roll out, prepare, update, and again until `steps` steps have been taken in all environments together."""
    check_training(settings.envs, environments, steps)
    learner = Learner(settings, environments, seed)
    while learner.collector.steps < steps:
        learner.iterate(min(1.0, learner.collector.steps / steps))
        if progress is not None:
            progress(Report(learner.collector.steps, steps, learner.collector.finished))
    policy, critic = owned(learner.policy), owned(learner.critic)
    agent = Agent(name, method, settings, environments.actions, policy, critic, learner.collector.observed, seed)
    return Trained(agent, learner.collector.finished, learner.collector.steps)


class Learner:
    """Policy, critic and their optimizer, and the row, which a controller may move."""

    def __init__(self, settings: OnPolicy, environments: Environments, seed: int) -> None:
        self.settings, self.row, self.seed, self.updates = settings, settings.row, seed, 0
        size, actions = environments.observation, environments.actions
        self.policy = Policy(size, actions, settings.hidden, settings.activation, 2 * seed, settings.log_std)
        self.critic = Critic(size, settings.hidden, settings.activation, 2 * seed + 1)
        scale = RewardScale(settings.envs, settings.gamma) if settings.normalise_rewards else None
        self.collector = Collector(environments, seed, scale, Running(size) if settings.normalise_observations else None)
        apart = settings.critic_passes > 0
        self.together = None if apart else FlatAdam([self.policy, self.critic], settings.lr, 1e-5, settings.clip_norm)
        natural = isinstance(self.row.penalty, TrustRegion)
        self.actor = FlatAdam([self.policy], settings.lr, 1e-5, settings.clip_norm) if apart and not natural else None
        self.fitter = FlatAdam([self.critic], settings.lr, 1e-5, settings.clip_norm) if apart else None
        self.taken: Taken | None = None

    def iterate(self, done: float) -> None:
        """One rollout and its update; `done` is the share of the training that is behind."""
        left = 1.0 - done
        for optimizer in (self.together, self.actor, self.fitter):
            if optimizer is not None:
                optimizer.rate(self.settings.lr * (left if self.settings.schedule == "linear" else 1.0))
        row = self.row
        if self.settings.clip_schedule == "linear":
            assert isinstance(row.surrogate, Clip)
            row = replace(row, surrogate=Clip(row.surrogate.low * left, row.surrogate.high * left))
        rollout = self.collector.collect(self.policy, self.settings.length)
        old, experience = prepared(row, rollout, self.policy, self.critic)
        columns = Columns.of(rollout, old, experience)
        if self.together is not None:
            value = row.value.coefficient
            self._train(
                self.together, columns, lambda part: policy_loss(row, part, self.policy) + value * critic_loss(row, part, self.critic)
            )
        elif self.actor is not None:
            self._train(self.actor, columns, lambda part: policy_loss(row, part, self.policy))
        else:
            self.taken = natural_step(row, rollout, old, experience, self.policy)
        if self.fitter is not None:
            self._train(self.fitter, columns, lambda part: critic_loss(row, part, self.critic), self.settings.critic_passes)
        if self.row.controlled:
            with torch.no_grad():
                kl = float(self.policy(rollout.observations).kl_from(old).mean())
            self.row = self.row.following({"policy/kl_old": kl})

    def _train(self, optimizer: FlatAdam, columns: Columns, loss: Callable[[Columns], Tensor], passes: int | None = None) -> None:
        """Every action once a pass, in minibatches whose losses weigh what the whole batch's would."""
        count = len(columns.actions)
        size = min(self.settings.batch or count, count)
        for _ in range(self.settings.passes if passes is None else passes):
            mixed = columns
            if size < count:
                mixed = columns.take(torch.from_numpy(counted(self.seed, SHUFFLE, self.updates).permutation(count)))
            self.updates += 1
            for start in range(0, count, size):
                part = mixed.take(slice(start, start + size)) if size < count else mixed
                found = loss(part)
                optimizer.step(found * (count / len(part.actions)) if size < count else found)
        if not bool(torch.isfinite(found.detach())):
            told = f"the loss is {float(found.detach())} after {self.collector.steps} steps"
            raise NumericError(f"{told}: lower lr, or normalise observations and rewards")


def prepared(row: Objective, rollout: Rollout, policy: Policy, critic: Critic) -> tuple[Distribution, Experience]:
    """The old policy in every state, and the rollout's experience: V(last observation) where a piece was cut off, 0 where its episode ended."""
    with torch.no_grad():
        old = policy(rollout.observations).frozen()
        values = critic(torch.cat((rollout.observations, rollout.last)))
        before, after = values.split((len(rollout.actions), len(rollout.ended)))
        final = torch.where(rollout.ended, 0.0, after)
        signals = Signals.of(old.logprobs(rollout.actions), values=before, final=final)
        steps = rollout.rewards
        if isinstance(row.credit, ReturnToGo):  # it reads rewards alone: what a piece would still have earned is paid with its last one
            steps = steps.index_add(0, rollout.layout.last, row.credit.gamma * final)
        rewards = Rewards.of(torch.zeros(rollout.layout.sequences), steps=steps)
        return old, row.prepare(rewards, signals, rollout.layout)


@dataclass(frozen=True)
class Columns:
    """The experience of some actions, side by side: what a minibatch's loss reads, each [A]; `before` is the old policy there."""

    experience: Experience
    observations: Tensor
    actions: Tensor
    numbers: Tensor
    before: tuple[Tensor, ...]
    kind: type[Categorical] | type[Gaussian] | None

    @staticmethod
    def of(rollout: Rollout, old: Distribution | None, experience: Experience) -> Columns:
        e = experience
        numbers = torch.stack((e.signals.old, e.advantages, e.weights * e.factors, e.signals.values, e.returns, e.weights))
        kind = None if old is None else type(old)
        before = () if old is None else tuple(getattr(old, f.name) for f in fields(old))  # type: ignore[arg-type]
        return Columns(experience, rollout.observations, rollout.actions, numbers, before, kind)  # type: ignore[arg-type]

    def take(self, which: Any) -> Columns:
        """These actions alone."""
        before = tuple(x if x.dim() == 1 else x[which] for x in self.before)  # a log standard deviation is of all states
        return replace(
            self, observations=self.observations[which], actions=self.actions[which], numbers=self.numbers[:, which], before=before
        )


def policy_loss(row: Objective, part: Columns, policy: Policy) -> Tensor:
    """-sum_t w_t (surrogate - penalty + bonus)_t over these actions: the terms of `Objective.loss`, without a pass over what is not there."""
    old, advantages, weights, *_ = part.numbers.unbind()
    said = policy(part.observations)
    logprobs = said.logprobs(part.actions)
    layout = part.experience.layout
    gain = row.surrogate(row.ratio(logprobs, old, layout, advantages), logprobs, advantages)
    against, bonus = row.against == "old" and isinstance(row.penalty, OldKL), bool(row.bonus.coefficient)
    if against or bonus:
        entropy = said.entropy() if bonus else logprobs
        kl = said.kl_from(part.kind(*part.before)) if against and part.kind is not None else logprobs
        outputs = Outputs(logprobs, entropy, kl, logprobs, part.experience.signals.final)
        gain = gain - row.penalty(outputs, part.experience.signals, layout) if against else gain
        gain = gain + row.bonus(outputs) if bonus else gain
    return -(weights * gain).sum()


def critic_loss(row: Objective, part: Columns, critic: Critic) -> Tensor:
    """sum_t w_t value(V, V_old, R)_t over these actions."""
    _, _, _, before, returns, weights = part.numbers.unbind()
    return (weights * row.value(critic(part.observations), before, returns)).sum()


def natural_step(row: Objective, rollout: Rollout, old: Distribution, experience: Experience, policy: Policy) -> Taken:
    """A step of the policy to the edge of the row's trust region, or none; the Fisher products on an even `share` of the pieces of episodes."""
    rule, parameters = row.penalty, list(policy.parameters())
    assert isinstance(rule, TrustRegion)
    columns = Columns.of(rollout, old, experience)
    gradient = torch.autograd.grad(-policy_loss(row, columns, policy), parameters)
    count = max(1, round(rule.share * rollout.layout.sequences))
    chosen = rollout.layout.actions_of((torch.arange(count) / rule.share).long())
    some = columns.take(chosen)
    assert some.kind is not None
    fixed = some.kind(*some.before)

    def apart() -> Tensor:
        return policy(some.observations).kl_from(fixed).mean()

    def measure() -> tuple[float, float]:
        with torch.no_grad():
            return -float(policy_loss(row, columns, policy)), float(policy(rollout.observations).kl_from(old).mean())

    return trust_region_step(
        parameters, gradient, hessian_product(apart, parameters), measure,
        limit=rule.limit, iterations=rule.iterations, damping=rule.damping, backtracks=rule.backtracks, decay=rule.decay,
    )  # fmt: skip
