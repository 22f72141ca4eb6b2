"""Advantages and losses in the padded window, as TRL 0.12.1, its GRPO fork and DeepSpeed-Chat compute them; without quirks, those of the row."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from tilt.distributions import k3
from tilt.errors import UsageError
from tilt.objectives import GAE, K3, Clip, Credit, GroupRelative, Layout, NoPenalty, Objective, ProductRatio, Rewards, Signals, TokenRatio
from tilt.parity.quirks import CORRECTED, Quirks
from tilt.parity.window import PerSlot, SlotMask, Window
from tilt.segments import discounted_sums, group_mean, group_std
from tilt.shapes import PerSequence, Scalar

STD_FLOOR = 1e-8
VARIANCE_EPS = 1e-8


class WindowCredit(NamedTuple):
    """Rewards, advantages before and after whitening, and the critic's targets (NaN where there is no critic), each [S, W]."""

    rewards: PerSlot
    raw: PerSlot
    returns: PerSlot
    advantages: PerSlot


class WindowLoss(NamedTuple):
    """The policy's loss, the critic's before its coefficient, and their weighted sum."""

    policy: Scalar
    value: Scalar
    total: Scalar


def masked_mean(x: PerSlot, mask: SlotMask) -> Scalar:
    """sum x m / sum m; an empty mask is refused."""
    if not bool(mask.any()):
        raise UsageError("masked_mean: nothing is left of the batch; every answer is padding")
    return torch.where(mask, x, 0).sum() / mask.sum()


def masked_whiten(x: PerSlot, mask: SlotMask, *, shift_mean: bool = True) -> PerSlot:
    """(x - mean) rsqrt(var + 1e-8) over the mask, unbiased variance; with `shift_mean` off the mean is added back."""
    mean, count = masked_mean(x, mask), mask.sum()
    variance = masked_mean((x - mean).square(), mask) * count / (count - 1)
    scaled = (x - mean) * (variance + VARIANCE_EPS).rsqrt()
    return scaled if shift_mean else scaled + mean


def critic_mask(window: Window, quirks: Quirks) -> SlotMask:
    """Slots on which the critic is trained."""
    return window.live | window.after if quirks.critic_after_last else window.live


def window_rewards(window: Window, kl: float, quirks: Quirks = CORRECTED, clip_reward: float = torch.inf) -> PerSlot:
    """r_t = -kl (old - reference)_t on actions, and the clamped score on the last action, or in the slot after it."""
    counted = window.live | window.after if quirks.kl_after_last else window.live
    rewards = torch.where(counted, -kl * (window.old - window.reference), 0) if kl else torch.zeros_like(window.old)
    paid = window.last.clamp(min=0)
    if quirks.score_after_last:
        paid = torch.where(window.last + 1 < window.width, window.last + 1, window.last)
    return rewards.scatter_add(1, paid[:, None], window.score.clamp(-clip_reward, clip_reward)[:, None])


def gae_credit(credit: GAE, window: Window, quirks: Quirks = CORRECTED) -> WindowCredit:
    """GAE over the whole window, V = 0 beyond the last state that is kept; targets are taken before the advantages are whitened."""
    kept = window.live | window.after if quirks.score_after_last else window.live
    values = torch.where(kept, window.values, 0)
    rewards = window_rewards(window, credit.kl, quirks, credit.clip_reward)
    if credit.whiten_rewards:
        rewards = torch.where(kept, masked_whiten(rewards, kept, shift_mean=False), 0)
    delta = rewards + credit.gamma * torch.nn.functional.pad(values[:, 1:], (0, 1)) - values
    rows = Layout.of([window.width] * len(values)).to(values.device)
    raw = discounted_sums(delta.flatten(), rows, credit.gamma * credit.lam).view_as(delta)
    advantages = masked_whiten(raw, window.live) if credit.whitened else raw
    return WindowCredit(rewards, raw, raw + values, torch.where(window.live, advantages, 0))


def group_credit(credit: GroupRelative, window: Window, quirks: Quirks = CORRECTED) -> WindowCredit:
    """One advantage a sequence, in all its slots: R = score - kl sum_t (old - reference)_t among the answers to its prompt."""
    reward: PerSequence = window.score
    if credit.kl:
        reward = reward - credit.kl * torch.where(window.live, window.old - window.reference, 0).sum(1)
    one_each = Layout(torch.arange(len(reward), device=reward.device), window.prompt)
    everyone = torch.ones_like(reward, dtype=torch.bool)
    if quirks.clamped_std and credit.scale == "group_std":
        away = reward - group_mean(reward, one_each, everyone)[window.prompt]
        relative = away / group_std(reward, one_each, everyone, credit.ddof)[window.prompt].clamp(min=STD_FLOOR)
    else:
        plain = GroupRelative(credit.centre, credit.scale, credit.ddof, credit.eps)
        relative = plain(Rewards.of(reward, actions=len(reward)), Signals.of(reward), one_each).advantages
    advantages = relative[:, None].expand_as(window.old)
    paid = torch.where(window.slots == window.last.clamp(min=0)[:, None], reward[:, None], 0)
    return WindowCredit(paid, advantages, torch.full_like(advantages, torch.nan), advantages)


def window_credit(credit: Credit, window: Window, quirks: Quirks = CORRECTED) -> WindowCredit:
    """The advantages that a row's credit, with these quirks, gives to the slots of a window."""
    if isinstance(credit, GAE):
        return gae_credit(credit, window, quirks)
    if isinstance(credit, GroupRelative):
        return group_credit(credit, window, quirks)
    raise UsageError(f"window_credit: {credit!r} has no padded form; GAE and GroupRelative have one")


def change(window: Window, new: PerSlot) -> PerSlot:
    """D = logprobs - old on actions; 0 elsewhere, where both hold the mark 1.0."""
    return torch.where(window.live, new - window.old, 0)


def ratio_of(row: Objective, window: Window, new: PerSlot) -> PerSlot:
    """exp(D_t), or exp(sum_t D_t) in every slot of the sequence."""
    moved = change(window, new)
    if isinstance(row.ratio, ProductRatio):
        return moved.sum(1, keepdim=True).exp().expand_as(moved)
    if isinstance(row.ratio, TokenRatio):
        return moved.exp()
    raise UsageError(f"ratio_of: {row.ratio!r} has no padded form; token and product have one")


def clip_of(row: Objective) -> Clip:
    """The row's clipping, the only surrogate of the libraries at hand."""
    if not isinstance(row.surrogate, Clip):
        raise UsageError(f"clip_of: {row.surrogate!r} has no padded form; clip has one")
    return row.surrogate


def policy_terms(row: Objective, window: Window, credit: WindowCredit, new: PerSlot) -> tuple[PerSlot, PerSlot]:
    """-A rho and -A clip(rho), whose larger one is the loss."""
    clip, ratio = clip_of(row), ratio_of(row, window, new)
    return -credit.advantages * ratio, -credit.advantages * ratio.clamp(1 - clip.low, 1 + clip.high)


def value_terms(row: Objective, window: Window, credit: WindowCredit, new_values: PerSlot, mask: SlotMask) -> tuple[PerSlot, PerSlot]:
    """(V - R)^2 and (clip(V, V_old +- c) - R)^2, half of whose larger one is the loss; zeros outside the mask."""
    reach = getattr(row.value, "clip", torch.inf)
    new, old, target = (torch.where(mask, x, 0) for x in (new_values, window.values, credit.returns))
    return (new - target).square(), (new.clamp(old - reach, old + reach) - target).square()


def window_loss(
    row: Objective, window: Window, credit: WindowCredit, new: PerSlot, new_values: PerSlot, quirks: Quirks = CORRECTED, *, micro: int = 0
) -> WindowLoss:
    """The loss of a mini-batch in micro-batches of `micro` sequences (0: all in one)."""
    if quirks.micro_batch_means and micro:
        parts = torch.arange(len(new), device=new.device).split(micro)
        each = [window_loss(row, window.take(p), WindowCredit(*(x[p] for x in credit)), new[p], new_values[p], quirks) for p in parts]
        return WindowLoss(*(torch.stack(losses).mean() for losses in zip(*each, strict=True)))
    policy = _policy_loss(row, window, credit, new)
    value = torch.zeros_like(policy)
    if row.value.needs:
        mask = critic_mask(window, quirks)
        value = 0.5 * masked_mean(torch.maximum(*value_terms(row, window, credit, new_values, mask)), mask)
    return WindowLoss(policy, value, policy + row.value.coefficient * value)


def _policy_loss(row: Objective, window: Window, credit: WindowCredit, new: PerSlot) -> Tensor:
    loss = torch.maximum(*policy_terms(row, window, credit, new))
    if isinstance(row.penalty, K3):
        loss = loss + row.penalty.beta * k3(torch.where(window.live, new - window.reference, 0))
    elif not isinstance(row.penalty, NoPenalty):
        raise UsageError(f"window_loss: {row.penalty!r} has no padded form; none and k3 have one")
    return loss[:, 0].mean() if isinstance(row.ratio, ProductRatio) else masked_mean(loss, window.live)
