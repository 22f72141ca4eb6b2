"""Learning from pairs: a scored answer against another answer to the same prompt, for reward models and direct preference optimisation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from tilt.data.packing import Pack, pack
from tilt.data.rollouts import Rollout
from tilt.learning.learner import NonFinite
from tilt.learning.meter import Meter
from tilt.models.policy import Policy, RewardModel
from tilt.objectives import Answers, Pairs, Preference
from tilt.optim.optimizers import Optimizer
from tilt.segments import segment_sum

Pair = tuple[Rollout, Rollout]
Score = Callable[[Pack], Tensor]
"""From a pack to K views of each sequence, [K, S], such as a reward model's score at the end and its mean over the answer."""


def likelihoods(policy: Policy) -> Score:
    """The view of direct preference optimisation: the sum of the log-probabilities of an answer's actions, [1, S]."""
    return lambda batch: segment_sum(policy(batch).logprobs, batch.layout)[None]


def end_scores(model: RewardModel) -> Score:
    """The reward model's score at the last token, [1, S]."""
    return lambda batch: model(batch)[None]


def end_and_span_scores(model: RewardModel) -> Score:
    """The score at the last token, and the mean of the scores read after every token of the answer, [2, S]."""

    def score(batch: Pack) -> Tensor:
        everywhere, lengths = model.everywhere(batch), batch.segments.length[batch.own]
        starts = batch.segments.start[batch.own]
        owner = torch.repeat_interleave(torch.arange(len(lengths), device=lengths.device), lengths)
        tokens = starts[owner] + torch.arange(len(owner), device=owner.device) - (lengths.cumsum(0) - lengths)[owner]
        means = everywhere.new_zeros(len(lengths)).index_add(0, owner, everywhere[tokens]) / lengths
        return torch.stack([everywhere[batch.last_tokens], means])

    return score


def packed(pairs: Sequence[Pair]) -> Pack:
    """Chosen and rejected answers in turn, 2N sequences; the answers of a pair share their prompt."""
    return pack([answer for pair in pairs for answer in pair])


def score_pairs(
    score: Score, pairs: Sequence[Pair], micro_tokens: int, device: torch.device,
    autocast: Callable[[], AbstractContextManager[object]] = nullcontext,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The first view of the chosen and of the rejected answers, [N] each, without gradient."""
    batch = packed(pairs)
    found = torch.zeros(2 * len(pairs))
    with torch.no_grad(), autocast():
        for part in batch.split(micro_tokens):
            found[part] = score(batch.take(part).to(device))[0].cpu().to(found)
    return found[0::2], found[1::2]


def update_pairs(
    score: Score, optimizer: Optimizer, preference: Preference, pairs: Sequence[Pair], reference: tuple[Tensor, Tensor] | None,
    *, views: Sequence[float] = (1.0,), micro_tokens: int, device: torch.device, autocast: Callable[[], AbstractContextManager[object]] = nullcontext,
) -> dict[str, float]:  # fmt: skip
    """One optimizer step on these pairs, in micro-batches of whole pairs; each pair weighs 1/N of the batch, and each view its share `views` of the loss.

    Metrics are those of the first view.
    """
    batch, meter, weight, lr = packed(pairs), Meter(), 1 / len(pairs), optimizer.lr
    for part in _whole_pairs(batch, micro_tokens):
        small = batch.take(torch.stack([2 * part, 2 * part + 1], 1).flatten()).to(device)
        with autocast():
            found = score(small)
        found = found if found.dtype == torch.float64 else found.float()
        shares = [
            Pairs.of(
                *(
                    Answers.of(
                        view[side::2],
                        reference=None if reference is None else reference[side][part].to(device),
                        weights=torch.full_like(view[side::2], weight),
                    )
                    for side in (0, 1)
                )
            )
            for view in found
        ]
        loss = torch.stack([portion * preference.loss(share) for portion, share in zip(views, shares, strict=True)]).sum()
        if not torch.isfinite(loss):
            raise NonFinite("the model's scores" if not torch.isfinite(found).all() else "the loss of the pairs", small)
        loss.backward()  # type: ignore[no-untyped-call]
        meter.add(preference.metrics(shares[0]))
        meter.add({"loss": (loss.detach(), torch.tensor(len(part) / len(pairs)))})
    norm = optimizer.step()
    if not torch.isfinite(norm):
        raise NonFinite("the gradient", small)
    named = {name.removeprefix("preference/"): value for name, value in meter.read().items()}
    return named | {"grad_norm": float(norm), "lr": lr}


def _whole_pairs(batch: Pack, budget: int) -> list[Tensor]:
    """Numbers of the pairs in each micro-batch of at most `budget` tokens."""
    costs = batch.costs.view(-1, 2).sum(1)
    above = batch.segments.parent[batch.own[0::2]]
    costs = costs + torch.where(above >= 0, batch.segments.length[above.clamp(min=0)], 0)
    parts: list[list[int]] = [[]]
    used = 0
    for number, cost in enumerate(costs.tolist()):
        if parts[-1] and used + cost > budget:
            parts.append([])
            used = 0
        parts[-1].append(number)
        used += cost
    return [torch.tensor(part) for part in parts]
