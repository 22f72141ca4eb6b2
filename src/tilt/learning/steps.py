"""Learning from labelled steps: one step of a process reward model, and its measures."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from tilt.data.packing import pack
from tilt.data.steps import Stepwise
from tilt.learning.learner import NonFinite
from tilt.models.policy import RewardModel
from tilt.objectives.process import first_wrong, step_loss
from tilt.optim.optimizers import Optimizer
from tilt.segments import Layout

Autocast = Callable[[], AbstractContextManager[object]]


def update_steps(
    model: RewardModel, optimizer: Optimizer, answers: Sequence[Stepwise], *, micro_tokens: int, device: torch.device, autocast: Autocast = nullcontext
) -> dict[str, float]:  # fmt: skip
    """One optimizer step on these answers, in micro-batches of whole answers; each step weighs 1/J of the batch's J steps."""
    batch, lr = pack([answer.rollout for answer in answers]), optimizer.lr
    total = sum(len(answer.ends) for answer in answers)
    loss_sum = right = torch.zeros((), device=device)
    for part in batch.split(micro_tokens):
        small, chosen = batch.take(part).to(device), [answers[i] for i in part.tolist()]
        with autocast():
            scores = model.after(small, [answer.ends for answer in chosen])
        scores = scores if scores.dtype == torch.float64 else scores.float()
        labels = _labels(chosen).to(scores)
        loss = step_loss(scores, labels, torch.full_like(labels, 1 / total))
        if not torch.isfinite(loss):
            raise NonFinite("the scores of the steps", small)
        loss.backward()  # type: ignore[no-untyped-call]
        loss_sum, right = loss_sum + loss.detach(), right + ((scores > 0) == (labels > 0.5)).sum()
    norm = optimizer.step()
    if not torch.isfinite(norm):
        raise NonFinite("the gradient", small)
    return {"loss": float(loss_sum), "accuracy": float(right) / total, "grad_norm": float(norm), "lr": lr}


def score_steps(
    model: RewardModel, answers: Sequence[Stepwise], micro_tokens: int, device: torch.device, autocast: Autocast = nullcontext
) -> Tensor:
    """The score of every step of every answer in order, [J], without gradient."""
    batch = pack([answer.rollout for answer in answers])
    found: list[Tensor] = [torch.zeros(0)] * len(answers)
    with torch.no_grad(), autocast():
        for part in batch.split(micro_tokens):
            numbers = part.tolist()
            ends = [answers[i].ends for i in numbers]
            scores = model.after(batch.take(part).to(device), ends).float().cpu()
            for i, own in zip(numbers, scores.split([len(e) for e in ends]), strict=True):
                found[i] = own
    return torch.cat(found)


def measure_steps(
    model: RewardModel, answers: Sequence[Stepwise], micro_tokens: int, device: torch.device, autocast: Autocast = nullcontext
) -> dict[str, float]:
    """Loss and accuracy over steps; over answers, `first_wrong`: how often the first step that the model finds wrong is the one that is,
    `located`: the same among answers with a wrong step, `cleared`: the share of the faultless ones in which it finds none."""
    scores = score_steps(model, answers, micro_tokens, device, autocast)
    labels = _labels(answers).to(scores)
    layout = Layout.of([len(answer.ends) for answer in answers])
    truth = first_wrong(labels > 0.5, layout)
    same, faulty = first_wrong(scores > 0, layout) == truth, truth < layout.lengths
    found = {
        "loss": float(step_loss(scores, labels, torch.full_like(labels, 1 / len(labels)))),
        "accuracy": float(((scores > 0) == (labels > 0.5)).float().mean()),
        "first_wrong": float(same.float().mean()),
        "located": float(same[faulty].float().mean()),
        "cleared": float(same[~faulty].float().mean()),
    }
    return {name: value for name, value in found.items() if not math.isnan(value)}


def _labels(answers: Sequence[Stepwise]) -> Tensor:
    return torch.tensor([label for answer in answers for label in answer.labels], dtype=torch.float64)
