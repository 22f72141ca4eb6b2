"""Every optimisation of training together (packed rows, each prompt once, tiled head, answers that cannot move anything left out, micro-batches)
against none: padded batches, plain operations, every answer, one at a time."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tilt import linear_head
from tilt.data.rollouts import Prompt, Rollout
from tilt.learning import learner as learning
from tilt.learning.judged import Judged
from tilt.learning.learner import Passes
from tilt.learning.pairs import EndScores, Likelihoods, read_anchors, update_pairs
from tilt.models import compat
from tilt.models.policy import Policy, RewardModel
from tilt.objectives import ALGORITHMS, PREFERENCES, NoPenalty
from tilt.optim.optimizers import AdamW, Optimizer

ROWS = {
    "grpo": replace(ALGORITHMS["grpo"], penalty=NoPenalty()),  # leaves answers out
    "grpo with k3": ALGORITHMS["grpo"],
    "dapo": ALGORITHMS["dapo"],
    "rloo": ALGORITHMS["rloo"],
    "ppo": ALGORITHMS["ppo"],
}


@contextlib.contextmanager
def nothing(monkeypatch: pytest.MonkeyPatch, *models: torch.nn.Module) -> Iterator[None]:
    """Padded batches, plain operations, no answer left out."""
    for model in models:
        compat.use_attention(model, "sdpa")
        assert not compat.is_packed(model)
    with monkeypatch.context() as patch, linear_head.plain():
        patch.setattr(learning, "movable", lambda experience, objective: torch.ones(experience.layout.sequences, dtype=torch.bool))
        yield
    for model in models:
        compat.use_attention(model, "tilt")


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-9), (torch.float32, 1e-4)])
def test_the_gradient_is_that_of_the_plain_padded_path(
    name: str, dtype: torch.dtype, bound: float, make, batch, rewards, gradients, monkeypatch: pytest.MonkeyPatch
) -> None:
    def models_of(learner) -> list[torch.nn.Module]:
        with learner.reference() as anchor:
            return [learner.policy.lm, anchor.lm, *([] if learner.critic is None else [learner.critic.body])]

    def build(settings: Passes):
        learner = make(settings, critic=name == "ppo")
        for part in (learner.policy, learner.critic, *models_of(learner)):
            if part is not None:
                part.to(dtype)
        learner.guards = replace(learner.guards, sampler=1e-3, old=1e-3)
        return learner

    row, batch = ROWS[name], replace(batch, sampler=batch.sampler.to(dtype))
    rewards = replace(rewards, total=rewards.total.to(dtype), steps=rewards.steps.to(dtype))
    fast = build(Passes(micro_tokens=40))
    with torch.no_grad():
        values = fast.policy(batch).logprobs
    found, _, _ = gradients(fast, batch, rewards, row)
    plain = build(Passes(micro_tokens=1))
    with nothing(monkeypatch, *models_of(plain)):
        with torch.no_grad():
            torch.testing.assert_close(plain.policy(batch).logprobs, values, rtol=0, atol=bound)
        wanted, _, _ = gradients(plain, batch, rewards, row)
    for one, other in zip(found, wanted, strict=True):
        assert float(other.norm()) > 0
        assert float((one - other).norm() / other.norm()) <= bound


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-9), (torch.float32, 1e-4)])
def test_so_is_that_of_pairs_that_share_a_prompt(dtype: torch.dtype, bound: float, lm, monkeypatch: pytest.MonkeyPatch) -> None:
    """DPO, whose reference is read beforehand, and a reward model."""
    generator = torch.Generator().manual_seed(4)

    def draw(n: int) -> tuple[int, ...]:
        return tuple(torch.randint(0, 18, (n,), generator=generator).tolist())

    pairs = []
    for i in range(5):
        prompt = Prompt(draw(2 + i), i)
        pairs.append(Judged(tuple(Rollout.demonstration(prompt, (*draw(1 + (i + 3 * k) % 6), 19)) for k in range(2))))

    def dpo(model: torch.nn.Module, micro: int) -> Tensor:
        reader, row = Likelihoods(Policy(model), frozenset({"reference"})), PREFERENCES["dpo"]
        reference = copy.deepcopy(model)
        with torch.no_grad():
            for p in reference.parameters():
                p.mul_(0.9)
        anchors = read_anchors(Likelihoods(Policy(reference), frozenset()), pairs, micro, contextlib.nullcontext)
        return step(reader, Policy(model), row, anchors, micro)

    def reward_model(model: torch.nn.Module, micro: int) -> Tensor:
        judge = RewardModel.from_policy(Policy(model), padding=20)
        return step(EndScores(judge), judge, PREFERENCES["reward_model"], None, micro)

    def step(reader: Any, module: torch.nn.Module, row: Any, anchors: Any, micro: int) -> Tensor:
        optimizer = Optimizer(module, AdamW(1e-3), 10)
        found: list[Tensor] = []

        def keep() -> Tensor:
            found.append(torch.cat([torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in optimizer.parameters]))
            optimizer.clear()
            return torch.ones(())

        monkeypatch.setattr(optimizer, "step", keep)
        update_pairs(reader, optimizer, row, pairs, anchors, micro_tokens=micro)
        return found[0]

    lm.to(dtype)
    compat.use_attention(lm, "tilt")
    for run in (dpo, reward_model):
        found = run(lm, 40)
        with nothing(monkeypatch, lm):
            wanted = run(lm, 1)
        assert float(wanted.norm()) > 0
        assert float((found - wanted).norm() / wanted.norm()) <= bound
