"""The learner: what the models say of a batch (`evaluate`), and the update that an objective asks for (`update`)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from tilt.data.packing import Pack
from tilt.errors import NumericError
from tilt.learning.meter import Meter
from tilt.models.policy import Critic, Policy
from tilt.objectives import Experience, Objective, Outputs, Signals
from tilt.optim.optimizers import Optimizer


@dataclass(frozen=True)
class Passes:
    """How one batch is used: `passes` over it, each in `minibatches` optimizer steps, each in micro-batches of at most `micro_tokens` tokens."""

    passes: int = 1
    minibatches: int = 1
    micro_tokens: int = 16384

    @property
    def steps(self) -> int:
        """Optimizer steps on one batch."""
        return self.passes * self.minibatches


@dataclass(frozen=True)
class Report:
    """What an update did: metrics of the step, and channels on the action axis of the last pass (`new`, `entropy`, `ratio`, `push` = -∂loss/∂logprobs)."""

    metrics: dict[str, float]
    channels: dict[str, Tensor] = field(default_factory=dict)
    skipped: bool = False


class NonFinite(NumericError):
    """A loss term or gradient that is not finite; carries the micro-batch that made it."""

    def __init__(self, term: str, batch: Pack) -> None:
        super().__init__(f"{term} is not finite; the update was not applied")
        self.term, self.batch = term, batch


class Learner:
    """The trained models with their optimizers. `reference` opens a context in which the returned policy is the KL anchor (LoRA: adapter off)."""

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
    ) -> None:
        self.policy, self.optimizer = policy, optimizer
        self.reference, self.critic, self.critic_optimizer = reference, critic, critic_optimizer
        self.settings, self.seed, self.autocast = settings, seed, autocast
        self.version = 0

    @property
    def device(self) -> torch.device:
        return next(self.policy.parameters()).device

    def evaluate(self, batch: Pack, needs: frozenset[str], *, temperature: float = 1.0) -> Signals:
        """Log-probabilities under old and reference, and the critic's values, of the signals named in `needs`; the others are NaN."""
        layout = batch.layout
        nan = torch.full((layout.actions,), float("nan"), dtype=batch.sampler.dtype)
        found = {
            "old": nan.clone(),
            "reference": nan.clone(),
            "values": nan.clone(),
            "final": nan.new_full((layout.sequences,), float("nan")),
        }
        if not needs & {"old", "reference", "values"}:
            return Signals(sampler=batch.sampler, **found)
        shared = self.critic is None and "values" in needs
        with torch.no_grad(), self.autocast():
            for part in batch.split(self.settings.micro_tokens):
                actions, small = layout.actions_of(part), batch.take(part).to(self.device)
                if "old" in needs or shared:
                    said = self.policy(small, temperature=temperature, values=shared)
                    found["old"][actions] = said.logprobs.cpu().to(nan.dtype)
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
    ) -> Report:
        """Train on the experience: passes, minibatches, micro-batches, one clipped optimizer step a minibatch.

        Sequences that cannot move the weights (advantage zero everywhere, no penalty, no value loss) are left out; the denominators keep them.
        A batch of nothing else is skipped. With one optimizer step a batch, `old` is the policy itself and the ratio is exactly 1.
        """
        live = self._live(experience, objective)
        if len(live) == 0:
            return Report({"skipped": 1.0}, skipped=True)
        fresh = self.settings.steps == 1 and not torch.isfinite(experience.signals.old).all()
        meter, channels = Meter(), _Channels(experience.layout.actions, batch.sampler.dtype)
        for part, scale in self._minibatches(live, step):
            for micro in batch.split(self.settings.micro_tokens, part):
                small, share = batch.take(micro).to(self.device), _to(experience.take(micro), self.device)
                with self.autocast():
                    said = self._forward(small, objective, temperature)
                if fresh:
                    share = replace(share, signals=replace(share.signals, old=said.logprobs.detach()))
                loss = objective.loss(said, share) * scale
                if not torch.isfinite(loss):
                    raise NonFinite(_culprit(said, share), small)
                if said.logprobs.requires_grad:
                    said.logprobs.retain_grad()
                loss.backward()
                meter.add(objective.metrics(said, share))
                meter.add({"loss": (loss.detach() / scale, torch.tensor(1 / self.settings.steps))}, total=True)
                channels.put(experience.layout.actions_of(micro), said, share, scale)
            self._step(meter, small, only_critic)
        self.version += 1
        return Report(meter.read() | {"lr": self.optimizer.lr, "skipped": 0.0, "sequences/trained": float(len(live))}, channels.read())

    def _forward(self, small: Pack, objective: Objective, temperature: float) -> Outputs:
        values = "values" in objective.needs
        said: Outputs = self.policy(small, temperature=temperature, entropy=True, values=values and self.critic is None)
        if values and self.critic is not None:
            each, final = self.critic(small)
            said = replace(said, values=each, final=final)
        return said

    def _live(self, experience: Experience, objective: Objective) -> Tensor:
        layout = experience.layout
        if objective.penalty.needs or objective.value.needs:
            return torch.arange(layout.sequences)
        moving = torch.zeros(layout.sequences).index_add_(0, layout.sequence, (experience.advantages * experience.weights != 0).float())
        return torch.nonzero(moving).flatten()

    def _minibatches(self, live: Tensor, step: int) -> Iterator[tuple[Tensor, float]]:
        """Sequences of each optimizer step, and the factor that makes its share of the batch's weights a whole one."""
        settings = self.settings
        if settings.minibatches == 1:
            yield from ((live, 1.0) for _ in range(settings.passes))
            return
        for number in range(settings.passes):
            generator = torch.Generator().manual_seed(hash((self.seed, step, number)) & 0x7FFFFFFF)
            order = torch.randperm(len(live), generator=generator)
            for part in order.chunk(settings.minibatches):
                yield live[part], len(live) / len(part)

    def _step(self, meter: Meter, small: Pack, only_critic: bool) -> None:
        for name, optimizer in {"grad_norm": self.optimizer, "critic/grad_norm": self.critic_optimizer}.items():
            if optimizer is None:
                continue
            if only_critic and optimizer is self.optimizer:
                optimizer.clear()
                continue
            norm = optimizer.step()
            if not torch.isfinite(norm):
                raise NonFinite("the gradient of the " + ("critic" if "critic" in name else "policy"), small)
            meter.add({name: (norm.detach(), torch.ones(()))})


class _Channels:
    """Per-action values of the latest micro-batch that held each action."""

    def __init__(self, actions: int, dtype: torch.dtype) -> None:
        self.values = {name: torch.full((actions,), float("nan"), dtype=dtype) for name in ("new", "entropy", "ratio", "push", "values")}

    def put(self, actions: Tensor, said: Outputs, share: Experience, scale: float) -> None:
        new = said.logprobs.detach()
        push = torch.zeros_like(new) if said.logprobs.grad is None else -said.logprobs.grad / scale
        found = {
            "new": new,
            "entropy": said.entropy.detach(),
            "ratio": (new - share.signals.old).exp(),
            "push": push,
            "values": said.values.detach(),
        }
        for name, value in found.items():
            self.values[name][actions] = value.cpu().to(self.values[name].dtype)

    def read(self) -> dict[str, Tensor]:
        return self.values


def _to(experience: Experience, device: torch.device) -> Experience:
    if device.type == "cpu":
        return experience
    signals = Signals(**{k: v.to(device) for k, v in vars(experience.signals).items()})
    return Experience(
        experience.layout.to(device), signals, *(x.to(device) for x in (experience.advantages, experience.returns, experience.weights))
    )


def _culprit(said: Outputs, share: Experience) -> str:
    """The first term that is not finite, in the order in which the loss is made."""
    terms = {"the policy's log-probabilities": said.logprobs, "the advantages": share.advantages, "the weights": share.weights}
    for name, value in terms.items():
        if not torch.isfinite(value).all():
            return name
    return "the loss"


def parameters(module: nn.Module) -> tuple[int, int]:
    """Number of parameters, and of those that are trained."""
    return sum(p.numel() for p in module.parameters()), sum(p.numel() for p in module.parameters() if p.requires_grad)
