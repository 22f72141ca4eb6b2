"""A small policy in float64 and a batch of sampled answers with unequal lengths, some groups of which earned the same."""

from __future__ import annotations

import copy
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch

from tilt.data.packing import pack
from tilt.data.rollouts import Prompt, Rollout
from tilt.learning.learner import Learner, Passes
from tilt.models.loading import tiny
from tilt.models.policy import Critic, Policy
from tilt.objectives import Objective, Rewards
from tilt.optim.optimizers import AdamW, Optimizer

WHOLE = Passes()


@pytest.fixture(autouse=True)
def _float64():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


@pytest.fixture
def lm():
    model = tiny("gpt2", vocabulary=20, width=16, layers=2, heads=2, context=32).double()  # whose norms stay in float64
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=generator) * 0.2)
    return model


@pytest.fixture
def batch(lm):
    """Twelve answers of 1 to 6 tokens to four prompts, with the policy's own log-probabilities as the sampler's."""
    generator = torch.Generator().manual_seed(2)

    def draw(n: int) -> tuple[int, ...]:
        return tuple(torch.randint(0, 20, (n,), generator=generator).tolist())

    prompts = [Prompt(draw(2 + i), i) for i in range(4)]
    rollouts = [Rollout.demonstration(prompts[i // 3], draw(1 + i * 5 % 6)) for i in range(12)]
    row = pack(rollouts)
    with torch.no_grad():
        return replace(row, sampler=Policy(lm)(row).logprobs)


@pytest.fixture
def rewards(batch):
    """Groups 0 and 2 earned the same, group 1 differs, group 3 has an answer that could not be scored."""
    total = torch.tensor([1.0, 1, 1, 0, 1, 0.5, 0, 0, 0, 2, 3, 0])
    scored = torch.ones(12, dtype=torch.bool)
    scored[11] = False
    return Rewards.of(total, scored=scored, actions=batch.layout.actions)


@pytest.fixture
def make(lm):
    """A learner on a copy of the model; `critic` gives it one of its own, `shared` a value head on the same body."""

    def build(settings: Passes = WHOLE, *, critic: bool = False, shared: bool = False, clip_norm: float = 0.0, steps: int = 10, **more):
        policy = Policy(copy.deepcopy(lm), value_head=shared)
        rule = AdamW(1e-3, clip_norm=clip_norm, **more)
        own = Critic.from_policy(policy).double() if critic else None
        anchor = Policy(copy.deepcopy(lm)).requires_grad_(False)
        with torch.no_grad():
            for p in anchor.parameters():
                p.mul_(0.9)

        from contextlib import contextmanager

        @contextmanager
        def reference():
            yield anchor

        return Learner(
            policy,
            Optimizer(policy, rule, steps),
            reference=reference,
            critic=own,
            critic_optimizer=None if own is None else Optimizer(own, rule, steps),
            settings=settings,
        )

    return build


@pytest.fixture
def gradients():
    """The gradients an update hands to its optimizers, step by step, with the weights left as they are."""

    def collect(learner, batch, rewards, objective, temperature: float = 1.0, step: int = 0):
        found = []

        def spy(optimizer):
            def note():
                grads = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in optimizer.parameters]
                found.append(torch.cat([g.flatten() for g in grads]))
                optimizer.clear()
                return torch.ones(())

            optimizer.step = note

        spy(learner.optimizer)
        if learner.critic_optimizer is not None:
            spy(learner.critic_optimizer)
        signals = learner.evaluate(
            batch,
            objective.needs if learner.settings.steps > 1 else objective.needs - {"old"} | objective.credit.needs,
            temperature=temperature,
        )
        signals = replace(signals, final=torch.zeros_like(signals.final))
        experience = objective.prepare(rewards, signals, batch.layout)
        report = learner.update(batch, experience, objective, temperature=temperature, step=step, watch=True)
        return found, report, experience

    return collect


@pytest.fixture
def frozen(monkeypatch):
    """A context in which whatever is detached, and every correction, keeps the value of the first evaluation: what a derivative holds still.

    It gives a function to be called before each evaluation.
    """

    @contextmanager
    def hold():
        kept, place, plain, factors = [], [0], torch.Tensor.detach, Objective.factors

        def first(make):
            if place[0] == len(kept):
                kept.append(plain(make()).clone())
            place[0] += 1
            return kept[place[0] - 1]

        with monkeypatch.context() as patch:
            patch.setattr(torch.Tensor, "detach", lambda x: first(lambda: plain(x)))
            patch.setattr(Objective, "factors", lambda row, *given: first(lambda: factors(row, *given)))
            yield lambda: place.__setitem__(0, 0)

    return hold
