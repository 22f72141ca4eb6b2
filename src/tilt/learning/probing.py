"""What an update came to, on a few answers of its batch: log-probabilities before and after, and the tokens that were likeliest instead."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tilt.data.packing import Pack
from tilt.learning.learner import Learner
from tilt.learning.shares import share_of

FEWEST, SHARE, ALTERNATIVES = 8, 8, 5
"""At least so many answers are looked at, or one in so many of the batch; so many alternatives at each token."""


@dataclass(frozen=True)
class Probe:
    """Answers of a batch before its update: log-probabilities of their actions, `before` and by the KL anchor `anchor` [A], NaN for other answers; and of the
    alternatives the `ids` [A, 5], −1 for other answers, with log-probabilities under policy and reference, [A, 5]."""

    sequences: Tensor
    before: Tensor
    anchor: Tensor
    ids: Tensor
    policy: Tensor
    reference: Tensor


def chosen(batch: Pack) -> Tensor:
    """The answers that are looked at: whole groups spread evenly over the batch, of a group larger than the share its first answers."""
    groups = [torch.nonzero(batch.layout.prompt == p).flatten() for p in range(batch.layout.prompts)]
    wanted = max(FEWEST, batch.layout.sequences // SHARE)
    size = max(map(len, groups))
    count = min(len(groups), max(1, wanted // size))
    return torch.cat([groups[i * len(groups) // count][:wanted] for i in range(count)]).sort().values


@torch.no_grad()
def probe(learner: Learner, batch: Pack, temperature: float) -> Probe:
    """Look at a few answers before the update; the KL anchor, where there is one, is asked about the alternatives too."""
    sequences, count = chosen(batch), batch.layout.actions
    before, anchor = (torch.full((count,), torch.nan, dtype=batch.sampler.dtype) for _ in range(2))
    ids = torch.full((count, ALTERNATIVES), -1)
    policy, anchored = (torch.full((count, ALTERNATIVES), torch.nan, dtype=torch.float32) for _ in range(2))
    with learner.autocast():
        for part in batch.split(learner.settings.micro_tokens, sequences):
            actions, small = batch.layout.actions_of(part), share_of(batch, part).to(learner.device)
            said, top, best = learner.policy.alternatives(small, ALTERNATIVES, temperature)
            width = top.shape[1]
            before[actions] = said.cpu().to(before)
            ids[actions, :width], policy[actions, :width] = top.cpu(), best.cpu().float()
            if learner.reference is not None:
                with learner.reference() as model:
                    asked = model.said_of(small, torch.cat([small.actions[:, None], top], 1), temperature).cpu()
                anchor[actions], anchored[actions, :width] = asked[:, 0].to(anchor), asked[:, 1:].float()
    return Probe(sequences, before, anchor, ids, policy, anchored)


@torch.no_grad()
def result(learner: Learner, batch: Pack, found: Probe, temperature: float) -> Tensor:
    """log π after − before of each action that was looked at, [A]; NaN for the others. Computed as `before` was, so that an update of nothing gives 0."""
    after = torch.full_like(found.before, torch.nan)
    with learner.autocast():
        for part in batch.split(learner.settings.micro_tokens, found.sequences):
            small = share_of(batch, part).to(learner.device)
            said = learner.policy.said_of(small, small.actions[:, None], temperature)[:, 0]
            after[batch.layout.actions_of(part)] = said.cpu().to(after)
    return after - found.before
