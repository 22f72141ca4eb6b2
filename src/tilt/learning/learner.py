"""The learner: what the models say of a batch (`evaluate`), and the update that an objective asks for (`update`)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tilt.data.packing import Pack
from tilt.distributions import Anchor
from tilt.errors import NumericError, UsageError
from tilt.learning.anchoring import Remembered, remember
from tilt.learning.channels import Channels
from tilt.learning.ema import Ema
from tilt.learning.exhaustion import exhausted
from tilt.learning.guards import STRICT, Explain, Gaps, Guards
from tilt.learning.meter import Meter
from tilt.learning.natural import natural_step
from tilt.learning.pretraining import Pretraining
from tilt.learning.shares import placed, share_of
from tilt.models.policy import Critic, Policy
from tilt.objectives import Experience, Metrics, NoPenalty, Objective, Outputs, Signals, TrustRegion
from tilt.optim.optimizers import Optimizer, clip


@dataclass(frozen=True)
class Passes:
    """How one batch is used: `passes` over it, each in `minibatches` optimizer steps, each in micro-batches of at most `micro_tokens` tokens.

    `max_gap` is the largest mean |probability under the learner - under the sampler, or under old| tolerated before a batch's first step.
    With `halve` an optimizer step for which memory does not suffice is begun again with half the `micro_tokens`, which stay so.
    """

    passes: int = 1
    minibatches: int = 1
    micro_tokens: int = 16384
    max_gap: float = 0.05
    halve: bool = False

    @property
    def steps(self) -> int:
        """Optimizer steps on one batch."""
        return self.passes * self.minibatches


SMALLEST = 16  # tokens below which micro-batches are not halved


@dataclass(frozen=True)
class Report:
    """What an update did: metrics of the step; channels on the action axis, NaN where an action was not trained on; which sequences were `trained`, [S]; what there is to say.

    `first` holds the log-probabilities of the first visit, which with one optimizer step are `old`. Where asked for, of the last pass:
    `new`, `entropy`, `ratio`, `clip` (+1 cut for being too high, -1 too low, 2 outside but not binding, 0 inside); and summed over the
    optimizer steps `push` = -∂loss/∂logprobs, `push_dist`, `push_value`.
    """

    metrics: dict[str, float]
    channels: dict[str, Tensor]
    trained: Tensor
    note: str = ""

    @property
    def skipped(self) -> bool:
        """Whether nothing in the batch could move the weights."""
        return not bool(self.trained.any())


@dataclass(frozen=True)
class Tally:
    """What the micro-batches of an update add up to: metrics, channels, and the parts of what the objective measures over the whole batch."""

    meter: Meter
    channels: Channels
    parts: list[list[Any]]

    def copy(self) -> Tally:
        """One that goes on from here by itself."""
        return Tally(self.meter.copy(), self.channels.copy(), [list(kept) for kept in self.parts])

    def add(self, micro: Tensor, said: Outputs, share: Experience, objective: Objective, loss: Tensor, weight: float) -> Metrics:
        """One micro-batch of these sequences, its part of the loss, and its weight in the mean of the losses; its own metrics."""
        metrics = objective.metrics(said, share)
        self.meter.add(metrics | {"loss": (loss, torch.tensor(weight))})
        for kept, measure in zip(self.parts, objective.measures, strict=True):
            kept.append(measure.part(said, share))
        self.channels.put(micro, said, share, objective)
        return metrics

    def read(self, objective: Objective) -> dict[str, float]:
        """Every metric of the update as a number."""
        found = self.meter.read()
        for kept, measure in zip(self.parts, objective.measures, strict=True):
            found |= {name: float(value) for name, value in measure.update(kept).items()} if kept else {}
        return found


class NonFinite(NumericError):
    """A loss term or gradient that is not finite; carries the micro-batch that made it, and its experience where there is one."""

    def __init__(self, term: str, batch: Pack, experience: Experience | None = None) -> None:
        super().__init__(f"{term} is not finite; the update was not applied")
        self.term, self.batch, self.experience = term, batch, experience


class Learner:
    """The trained models with their optimizers. `reference` opens a context in which the returned policy is the KL anchor (LoRA: adapter off).

    `pretraining` adds its loss to every optimizer step of the policy; `ema` follows each. `guards` must be kept before the first update.
    """

    def __init__(
        self,
        policy: Policy,
        optimizer: Optimizer,
        *,
        reference: Callable[[], AbstractContextManager[Policy]] | None = None,
        critic: Critic | None = None,
        critic_optimizer: Optimizer | None = None,
        settings: Passes = Passes(),
        seed: int = 0,
        autocast: Callable[[], AbstractContextManager[object]] = nullcontext,
        pretraining: Pretraining | None = None,
        ema: Ema | None = None,
        guards: Guards = STRICT,
    ) -> None:
        self.policy, self.optimizer, self.pretraining, self.ema = policy, optimizer, pretraining, ema
        self.reference, self.critic, self.critic_optimizer = reference, critic, critic_optimizer
        self.settings, self.seed, self.autocast, self.guards = settings, seed, autocast, guards
        self.version = 0

    @property
    def device(self) -> torch.device:
        return next(self.policy.parameters()).device

    def evaluate(self, batch: Pack, needs: frozenset[str], *, temperature: float = 1.0) -> Signals:
        """Log-probabilities under old and reference, the critic's values and old's entropy, of the signals named in `needs`; the others are NaN."""
        layout = batch.layout
        nan = torch.full((layout.actions,), float("nan"), dtype=batch.sampler.dtype)
        found = {
            "old": nan.clone(),
            "reference": nan.clone(),
            "values": nan.clone(),
            "entropy": nan.clone(),
            "final": nan.new_full((layout.sequences,), float("nan")),
        }
        if not needs & {"old", "reference", "values", "entropy"}:
            return Signals(sampler=batch.sampler, **found)
        shared = self.critic is None and "values" in needs
        with torch.no_grad(), self.autocast():
            for part in batch.split(self.settings.micro_tokens):
                actions, small = layout.actions_of(part), share_of(batch, part).to(self.device)
                if needs & {"old", "entropy"} or shared:
                    said = self.policy(small, temperature=temperature, entropy="entropy" in needs, values=shared)
                    found["old"][actions] = said.logprobs.cpu().to(nan.dtype)
                    found["entropy"][actions] = said.entropy.cpu().to(nan.dtype)
                    if shared:
                        found["values"][actions], found["final"][part] = said.values.cpu().to(nan.dtype), said.final.cpu().to(nan.dtype)
                if "reference" in needs:
                    assert self.reference is not None, "an objective with a KL term needs a reference"
                    with self.reference() as anchor:
                        found["reference"][actions] = anchor(small, temperature=temperature).logprobs.cpu().to(nan.dtype)
                if "values" in needs and self.critic is not None:
                    values, final = self.critic(small)
                    found["values"][actions], found["final"][part] = values.cpu().to(nan.dtype), final.cpu().to(nan.dtype)
        return Signals(sampler=batch.sampler, **found)

    def update(
        self,
        batch: Pack,
        experience: Experience,
        objective: Objective,
        *,
        temperature: float = 1.0,
        step: int = 0,
        only_critic: bool = False,
        watch: bool = False,
        explain: Explain | None = None,
    ) -> Report:
        """Train on the experience: passes, minibatches, micro-batches, one clipped optimizer step a minibatch; `watch` asks for all channels.

        Sequences that cannot move the weights (advantage zero everywhere, no penalty, no value loss) are left out; the denominators keep them.
        A batch of nothing else is skipped. With one optimizer step a batch, `old` is the policy itself and the ratio is exactly 1.
        A row with a trust region moves the policy by one natural step, in the precision of its weights, instead of an optimizer's.
        Before the first step the guards are looked at; `explain` finds what is to blame where one is broken.
        """
        settings, lr = self.settings, {} if isinstance(objective.penalty, TrustRegion) else {"lr": self.optimizer.lr}
        self._check(objective)
        live = movable(experience, objective)
        other = self._remember(batch, live, objective)
        autocast = nullcontext if isinstance(objective.penalty, TrustRegion) else self.autocast
        tally = Tally(Meter(), Channels(experience.layout, batch.sampler.dtype, watch), [list[Any]() for _ in objective.measures])
        fresh = settings.steps == 1 and not torch.isfinite(experience.signals.old).all()
        updates, note, count = 0, "", int(live.sum())
        for part, scale in self._minibatches(live, step):
            if len(part) == 0:
                self._pass_over(only_critic)
                continue

            def accumulate(tally: Tally, part: Tensor = part, scale: float = scale) -> tuple[Pack, Gaps]:
                gaps = Gaps(objective, self.guards, first=self.version == 0)
                for micro in batch.split(self.settings.micro_tokens, part):
                    share = placed(share_of(experience, micro), self.device)
                    anchor = None if other is None else other.of(batch.layout.actions_of(micro), self.device)
                    small = share_of(batch, micro).to(self.device)
                    with autocast():
                        said = self._forward(small, objective, temperature, anchor)
                    if fresh:
                        share = replace(share, signals=replace(share.signals, old=said.logprobs.detach()))
                    tally.channels.hold(said)
                    loss = self._backward(small, said, share, objective, scale)
                    gaps.see(said, share, tally.add(micro, said, share, objective, loss, len(micro) / count))
                return small, gaps

            tally, (small, gaps) = self._fitting(accumulate, tally, batch)
            if updates == 0:
                note = gaps.check(settings.max_gap, tally.channels.values["first"], explain)
                tally.meter.add(gaps.metrics())
            if self.pretraining is not None and not only_critic:
                tally.meter.add({"pretrain/nll": (self._pretrain(self.pretraining), torch.ones(()))})
            move = self.optimizer.step
            if isinstance(objective.penalty, TrustRegion):
                signals = replace(experience.signals, old=tally.channels.values["first"]) if fresh else experience.signals
                move = partial(self._natural, tally.meter, batch, replace(experience, signals=signals), objective, part, temperature)
            self._step(tally.meter, small, only_critic, move)
            updates += 1
        self.version += updates > 0
        found = tally.read(objective) | lr | {"skipped": float(updates == 0), "sequences/trained": float(count)}
        found |= {"micro_tokens": float(self.settings.micro_tokens)} if settings.halve else {}
        found |= {"policy/clipped": float((tally.channels.values["clip"].abs() == 1).sum())}
        if other is not None and objective.against == "old":
            found |= {"policy/kl_old": self._distance(batch, live, experience, other, temperature)}
        return Report(found, tally.channels.values, live, note)

    def _fitting(self, accumulate: Callable[[Tally], tuple[Pack, Gaps]], tally: Tally, batch: Pack) -> tuple[Tally, tuple[Pack, Gaps]]:
        """The gradient of an optimizer step, begun again in half the micro-batches where memory does not suffice and that is allowed; the tally with it."""
        while True:
            trial = tally.copy()
            try:
                return trial, accumulate(trial)
            except (RuntimeError, MemoryError) as error:
                if not self.settings.halve or not exhausted(error) or self.settings.micro_tokens <= SMALLEST:
                    raise
            for optimizer in (self.optimizer, self.critic_optimizer):
                if optimizer is not None:
                    optimizer.clear()
            self.settings = replace(self.settings, micro_tokens=self.settings.micro_tokens // 2)

    def _backward(self, small: Pack, said: Outputs, share: Experience, objective: Objective, scale: float) -> Tensor:
        """Add the gradient of a micro-batch; its part of the loss, detached."""
        loss = objective.loss(said, share) * scale
        if not torch.isfinite(loss):
            raise NonFinite(_culprit(said, share, objective), small, share)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach() / scale

    def _check(self, objective: Objective) -> None:
        """Refuse what a natural step cannot be combined with."""
        if not isinstance(objective.penalty, TrustRegion):
            return
        if self.settings.steps > 1:
            raise UsageError("a trust region takes one natural step on the whole batch: set passes and minibatches to 1")
        if self.pretraining is not None:
            raise UsageError(
                "a natural step follows the surrogate alone: leave pretrain_data and pretrain_coefficient out, or choose a row without trust_region"
            )
        if objective.value.needs and self.critic is None:
            raise UsageError(
                "a natural step moves the whole policy, so the critic needs weights of its own: set critic to policy or reward_model, not shared"
            )

    def _remember(self, batch: Pack, live: Tensor, objective: Objective) -> Remembered | None:
        """The distributions that the penalty compares the policy with, before the batch's first step: the reference's, or the policy's own."""
        if objective.against == "none" or isinstance(objective.penalty, TrustRegion) or not live.any():
            return None
        parts = batch.split(self.settings.micro_tokens, torch.nonzero(live).flatten())
        with self.autocast():
            if objective.against == "old":
                return remember(self.policy, batch, parts, "from", self.device)
            assert self.reference is not None, "an exact KL with the reference needs one"
            with self.reference() as anchor:
                return remember(anchor, batch, parts, "to", self.device)

    @torch.no_grad()
    def _distance(self, batch: Pack, live: Tensor, experience: Experience, other: Remembered, temperature: float) -> float:
        """Mean exact KL with what was remembered, at the weights as they are, over the actions that count."""
        total, count = torch.zeros((), dtype=torch.float64), (experience.weights != 0).sum()
        for part in batch.split(self.settings.micro_tokens, torch.nonzero(live).flatten()):
            actions = batch.layout.actions_of(part)
            with self.autocast():
                said = self.policy(share_of(batch, part).to(self.device), temperature=temperature, against=other.of(actions, self.device))
            total += torch.where(experience.weights[actions] != 0, said.kl.cpu(), 0).sum()
        return float(total / count)

    def _forward(self, small: Pack, objective: Objective, temperature: float, anchor: Anchor | None) -> Outputs:
        values = "values" in objective.needs
        said: Outputs = self.policy(small, temperature=temperature, entropy=True, values=values and self.critic is None, against=anchor)
        if values and self.critic is not None:
            each, final = self.critic(small)
            said = replace(said, values=each, final=final)
        return said

    def _minibatches(self, live: Tensor, step: int) -> Iterator[tuple[Tensor, float]]:
        """The live sequences of each optimizer step, and the factor that makes the weights of its share of the batch those of a whole one.

        All sequences are dealt out, then the others dropped: 6 sequences in 2 minibatches of 3, scale 2, whatever of each 3 is live.
        """
        settings, count = self.settings, len(live)
        if settings.minibatches == 1:
            yield from ((torch.nonzero(live).flatten(), 1.0) for _ in range(settings.passes))
            return
        for number in range(settings.passes):
            generator = torch.Generator().manual_seed(hash((self.seed, step, number)) & 0x7FFFFFFF)
            for part in torch.randperm(count, generator=generator).tensor_split(settings.minibatches):
                yield part[live[part]], count / max(1, len(part))

    def _step(self, meter: Meter, small: Pack, only_critic: bool, move: Callable[[], Tensor]) -> None:
        """Move the policy and step the critic's optimizer, or neither where a gradient is not finite. `move` returns the norm of the policy's gradient."""
        if self.critic_optimizer is not None and not torch.isfinite(clip(self.critic_optimizer.parameters, 0.0)):
            raise NonFinite("the gradient of the critic", small)
        if only_critic:
            self.optimizer.clear()
        else:
            norm = move()
            if not torch.isfinite(norm):
                raise NonFinite("the gradient of the policy", small)
            meter.add({"grad_norm": (norm, torch.ones(()))})
            if self.ema is not None:
                self.ema.follow()
        if self.critic_optimizer is not None:
            meter.add({"critic/grad_norm": (self.critic_optimizer.step(), torch.ones(()))})

    def _natural(
        self, meter: Meter, batch: Pack, experience: Experience, objective: Objective, sequences: Tensor, temperature: float
    ) -> Tensor:
        """A natural step inside the row's trust region in place of the optimizer's; returns the norm of the gradient, and moves nothing where that is not finite."""
        optimizer = self.optimizer
        norm = clip(optimizer.parameters, 0.0)
        if torch.isfinite(norm):
            taken = natural_step(
                self.policy, optimizer.parameters, objective, batch, experience, sequences, temperature=temperature,
                micro_tokens=self.settings.micro_tokens, device=self.device,
            )  # fmt: skip
            optimizer.steps += 1
            found = {
                "kl": taken.kl,
                "improvement": taken.improvement,
                "backtracks": taken.tried - taken.accepted,
                "cg_residual": taken.residual,
            }
            meter.add({f"trpo/{name}": (torch.tensor(float(value)), torch.ones(())) for name, value in found.items()})
        optimizer.clear()
        return norm

    def _pretrain(self, given: Pretraining) -> Tensor:
        """Add the gradient of the texts' loss; their mean negative log-likelihood, nats a token."""
        texts, total = given.draw(self.optimizer.steps), torch.zeros((), device=self.device)
        for part in texts.split(self.settings.micro_tokens):
            small = share_of(texts, part).to(self.device)
            with self.autocast():
                nll = given.nll(self.policy, small, texts.layout.actions)
            if not torch.isfinite(nll):
                raise NonFinite("the likelihood of the pretraining texts", small)
            (given.coefficient * nll).backward()  # type: ignore[no-untyped-call]
            total += nll.detach()
        return total

    def _pass_over(self, only_critic: bool) -> None:
        """A step that has nothing to train on still counts for the schedules, which end with the run."""
        for optimizer in (None if only_critic else self.optimizer, self.critic_optimizer):
            if optimizer is not None:
                optimizer.steps += 1


def movable(experience: Experience, objective: Objective) -> Tensor:
    """Sequences that can move the weights, [S]: with a penalty or a value loss all that weigh anything, else those with an advantage other than 0."""
    layout = experience.layout
    moved = not isinstance(objective.penalty, NoPenalty) or objective.bonus.coefficient or objective.value.needs
    restless = moved or objective.measures or not _rests(objective)
    strength = experience.weights if restless else experience.advantages * experience.weights
    moving = (strength != 0).to(torch.get_default_dtype())
    return torch.zeros(layout.sequences).index_add_(0, layout.sequence, moving) > 0


def _rests(objective: Objective) -> bool:
    """Whether the surrogate has no gradient where the advantage is 0, on a probe: true of every row of the table, not of every row of one's own."""
    ratio, logprobs = torch.tensor([0.5, 1.0, 2.0], requires_grad=True), torch.full((3,), -1.0, requires_grad=True)
    gain = objective.surrogate(ratio, logprobs, torch.zeros(3))
    if not gain.requires_grad:
        return True
    found = torch.autograd.grad(gain.sum(), (ratio, logprobs), allow_unused=True)
    return all(slope is None or not slope.any() for slope in found)


def _culprit(said: Outputs, share: Experience, objective: Objective) -> str:
    """The first term that is not finite, in the order in which the loss is made."""
    seen, signals = share.weights != 0, share.signals
    asked = objective.needs
    terms = {"the policy's log-probabilities": said.logprobs, "the weights": share.weights}
    terms |= {"the reference's log-probabilities": signals.reference} if "reference" in asked else {}
    terms |= (
        {f"the exact KL with the {objective.against} policy": said.kl}
        if objective.against != "none" and not isinstance(objective.penalty, TrustRegion)
        else {}
    )
    terms |= {"the critic's values": said.values, "the critic's values before the update": signals.values} if "values" in asked else {}
    terms |= {"the old log-probabilities": signals.old} if "old" in asked else {}
    for name, value in (terms | {"the advantages": share.advantages}).items():
        if not torch.isfinite(value[seen]).all():
            return name
    return "the loss"
