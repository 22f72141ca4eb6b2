"""Every piece in words: its formula with its own numbers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields
from math import isinf
from typing import Any

from tilt.objectives.control import Doubling, EntropyBonus, EntropyTarget, NoBonus, NoControl, Proportional
from tilt.objectives.corrections import HighEntropy, MaskedImportance, SequenceMask, TruncatedImportance
from tilt.objectives.credit import GAE, GroupRelative, Imitate, ProcessRelative, Return, ReturnToGo, Teacher
from tilt.objectives.parts import PartsRelative
from tilt.objectives.penalty import K1, K2, K3, ExactKL, NoPenalty, OldKL, TrustRegion
from tilt.objectives.pieces import PIECES
from tilt.objectives.policy import (
    CappedScore,
    Clip,
    ClippedGeometricRatio,
    GeometricRatio,
    GeometricTokenRatio,
    Importance,
    NoRatio,
    PerBudget,
    ProbabilityScore,
    ProductRatio,
    Score,
    SequenceAverage,
    SmoothWeight,
    SoftGate,
    TokenAverage,
    TokenRatio,
    TwoSided,
)
from tilt.objectives.preference_card import WORDS as PREFERENCE_WORDS
from tilt.objectives.value import NoValue, ValueLoss


def spelled(slot: str, piece: Any) -> str:
    """A piece as configuration spells it, with what differs from its defaults: clip(high=0.28); several joined."""
    if isinstance(piece, tuple):
        return ", ".join(spelled(slot, each) for each in piece)
    name, kind = next((name, kind) for name, kind in PIECES[slot].items() if kind is type(piece))
    plain = kind()
    changed = [f"{f.name}={getattr(piece, f.name)}" for f in fields(piece) if getattr(piece, f.name) != getattr(plain, f.name)]
    return f"{name}({', '.join(changed)})" if changed else name


def words(piece: object) -> str:
    """The formula of a piece with its numbers, of several joined; a piece from elsewhere is its own record and the first line of its docstring."""
    if isinstance(piece, tuple):
        return ", ".join(words(each) for each in piece) or "none"
    found = WORDS.get(type(piece))
    return found(piece) if found else f"{piece!r}: {(type(piece).__doc__ or '').strip().splitlines()[0]}"


def _clamp(limit: float) -> str:
    return "" if isinf(limit) else f" clamped to +-{limit:g}"


def _shaped(kl: float) -> str:
    return f", r_t with -{kl:g} (old - reference)_t" if kl else ""


def _estimate(piece: K1 | K2 | K3, kind: str) -> str:
    """beta kind(u), with u and the weight of its level."""
    whole = piece.level == "sequence"
    weight = "" if not piece.weighted else "(policy / old of the answer) " if whole else "rho_t "
    u = ("U", "sum_t (logprobs - reference)_t") if whole else ("u_t", "logprobs - reference")
    return f"{piece.beta:g} {weight}{kind.format(u[0])}, {u[0].removesuffix('_t')} = {u[1]}"


_WHITENED = ", rewards whitened over the batch with their mean added back"
_BASELINES = {"none": "", "group_mean": " - mean return of the prompt's answers", "critic": " - V_t"}
_SCALES = {"none": "", "group_std": " / std(group)", "batch_std": " / std(batch)", "whitened": ", whitened over the batch"}

_OF = {"token": "(old / sampler)_t", "sequence": "old / sampler of the answer"}

WORDS: Mapping[type, Callable[[Any], str]] = {
    Imitate: lambda p: "Adv_t = 1" + ("" if p.keep == "all" else " on the first best answer of each prompt; the others do not count"),
    Return: lambda p: "Adv_t = sum_k r_k, the whole return",
    ReturnToGo: lambda p: (
        f"Adv_t = sum_(k>=t) {p.gamma:g}^(k-t) r_k{_BASELINES[p.baseline]}{', whitened' if p.whitened else ''}{_shaped(p.kl)}{_WHITENED if p.whiten_rewards else ''}"
    ),
    GAE: lambda p: (
        f"Adv_t = sum_k ({p.gamma:g} * {p.lam:g})^k delta_(t+k), delta_t = r_t + {p.gamma:g} V_(t+1) - V_t"
        f"{', whitened' if p.whitened else ''}{_shaped(p.kl)}{', score' + _clamp(p.clip_reward) if _clamp(p.clip_reward) else ''}{_WHITENED if p.whiten_rewards else ''}"
    ),
    GroupRelative: lambda p: (
        f"Adv_t = (R - mean of {'the other answers' if p.centre == 'leave_one_out' else 'the group'}){_SCALES[p.scale]}"
        + (f", R with -{p.kl:g} sum_t (old - reference)_t" if p.kl else "")
    ),
    PartsRelative: lambda p: f"Adv_t = x / std over the batch, x = sum_k w_k (r_k - mean of the group) / {'std' if p.ddof else 'std (divisor n)'}(group), over the parts k of the reward",
    ProcessRelative: lambda p: f"Adv_t = sum of (step reward - mean) / {'std' if p.ddof else 'std (divisor n)'}, over the steps of the group, of steps that end at t or later",
    Teacher: lambda p: "Adv_t = (reference - old)_t" if p.discount == 0 else f"Adv_t = sum_(k>=t) {p.discount:g}^(k-t) (reference - old)_k",
    NoRatio: lambda p: "none",
    TokenRatio: lambda p: "rho_t = exp(logprobs - old)_t",
    ProductRatio: lambda p: "rho = exp(sum_t (logprobs - old)_t), one per answer",
    GeometricRatio: lambda p: "rho = exp(mean_t (logprobs - old)_t), one per answer",
    GeometricTokenRatio: lambda p: "rho_t = sg[exp(mean (logprobs - old))] exp(logprobs - sg[logprobs])_t",
    ClippedGeometricRatio: lambda p: f"rho = exp(mean_t m_t), m = logprobs - old, held at +-{p.width:g} where it would go further, one per answer",
    Score: lambda p: "logprobs_t Adv_t",
    Importance: lambda p: "rho_t Adv_t",
    Clip: lambda p: f"min(rho Adv, clip(rho, {1 - p.low:g}, {1 + p.high:g}) Adv)",
    TwoSided: lambda p: f"min(min(rho, {p.delta:g}) Adv, clip(rho, {1 - p.low:g}, {1 + p.high:g}) Adv)",
    CappedScore: lambda p: f"sg[min(rho, {p.cap:g})] Adv logprobs",
    SoftGate: lambda p: f"(4 / tau) sigmoid(tau (rho - 1)) Adv, tau = {p.positive:g} where Adv > 0, else {p.negative:g}",
    ProbabilityScore: lambda p: "sg[exp(logprobs)_t] logprobs_t Adv_t",
    SmoothWeight: lambda p: f"sg[rho^k exp(l (1 - rho))] Adv logprobs, (k, l) = ({p.power:g}, {p.decay:g}) where Adv >= 0, else ({p.decay:g}, {p.power:g})",
    TokenAverage: lambda p: "w_t = 1 / A, A actions in the batch",
    SequenceAverage: lambda p: "w_t = 1 / (S n_i), S answers, n_i actions in this one",
    PerBudget: lambda p: "w_t = 1 / S, S answers" if p.length == 1 else f"w_t = 1 / (S * {p.length}), S answers",
    NoPenalty: lambda p: "none",
    K1: lambda p: _estimate(p, "{0}"),
    K2: lambda p: _estimate(p, "{0}^2 / 2"),
    K3: lambda p: _estimate(p, "(exp(-{0}) + {0} - 1)"),
    ExactKL: lambda p: f"{p.beta:g} KL(policy || reference)_t over the whole vocabulary",
    OldKL: lambda p: f"{p.beta:g} KL(old || policy)_t over the whole vocabulary",
    TrustRegion: lambda p: (
        f"none in the loss; the step keeps mean KL(old || policy) <= {p.limit:g}: natural gradient ({p.iterations} conjugate gradients, damping {p.damping:g}"
        f"{'' if p.share == 1 else f', on {p.share:.0%} of the answers'}), "
        f"line search ({p.backtracks} times {p.decay:g})"
    ),
    NoValue: lambda p: "none",
    ValueLoss: lambda p: (
        ".5 (V - R)^2" if isinf(p.clip) else f".5 max((V - R)^2, (clip(V, V_old +- {p.clip:g}) - R)^2)"
    ) + f", coefficient {p.coefficient:g}",
    TruncatedImportance: lambda p: f"times {_OF[p.level]}" if isinf(p.cap) else f"times min({_OF[p.level]}, {p.cap:g})",
    MaskedImportance: lambda p: f"times x where {p.low:g} <= x <= {p.high:g}, else 0, x = {_OF[p.level]}",
    SequenceMask: lambda p: f"times 0 for answers with Adv < 0 and mean_t (sampler - logprobs)_t > {p.delta:g}",
    HighEntropy: lambda p: f"times 1 on the {p.share:.0%} of actions with the highest entropy, else 0",
    NoBonus: lambda p: "none",
    EntropyBonus: lambda p: f"{p.coefficient:g} entropy_t",
    NoControl: lambda p: "none",
    Doubling: lambda p: f"beta of the penalty doubles where KL(old || policy) > 1.5 * {p.target:g} and halves where it is < {p.target:g} / 1.5",
    Proportional: lambda p: f"the KL coefficient grows by clip(KL / {p.target:g} - 1, -{p.limit:g}, {p.limit:g}) n / {p.horizon:g} after n answers",
    EntropyTarget: lambda p: f"the entropy coefficient rises by {p.step:g} where the entropy is < {p.target:g}, else falls by it",
    **PREFERENCE_WORDS,
}  # fmt: skip
