"""THE TABLE: every algorithm is a row of choices; docs/algorithms.md has the formulas and papers."""

from __future__ import annotations

from collections.abc import Mapping
from math import inf
from types import MappingProxyType

from tilt.objectives.control import Doubling, EntropyBonus, EntropyTarget
from tilt.objectives.corrections import HighEntropy, TruncatedImportance
from tilt.objectives.credit import GAE, GroupRelative, Imitate, ProcessRelative, Return, ReturnToGo, Teacher
from tilt.objectives.objective import Objective
from tilt.objectives.penalty import K2, K3, NoPenalty, OldKL, TrustRegion
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
)  # fmt: skip
from tilt.objectives.value import ValueLoss

GROUP = GroupRelative()
LEAVE_ONE_OUT = GroupRelative("leave_one_out", "none", kl=0.05)
CRITIC = GAE(gamma=1.0, lam=0.95, kl=0.05)

# fmt: off
ALGORITHMS: Mapping[str, Objective] = MappingProxyType({
    #                                 credit                                     ratio                       surrogate               average            penalty                    value, corrections, bonus, control
    "sft":                   Objective(Imitate(),                                 NoRatio(),                  Score(),                TokenAverage()),
    "dft":                   Objective(Imitate(),                                 NoRatio(),                  ProbabilityScore(),     TokenAverage()),
    "raft":                  Objective(Imitate(keep="best"),                      NoRatio(),                  Score(),                TokenAverage()),
    "reinforce":             Objective(Return(),                                  NoRatio(),                  Score(),                PerBudget(1)),
    "reinforce_rtg":         Objective(ReturnToGo(),                              NoRatio(),                  Score(),                PerBudget(1)),
    "reinforce_baseline":    Objective(ReturnToGo(baseline="critic"),             NoRatio(),                  Score(),                PerBudget(1),      NoPenalty(),               ValueLoss(0.5)),
    "a2c":                   Objective(GAE(0.99, 1.0, kl=0.1, whitened=False),    NoRatio(),                  Score(),                TokenAverage(),    NoPenalty(),               ValueLoss(1.0)),
    "rloo":                  Objective(LEAVE_ONE_OUT,                             NoRatio(),                  Score(),                PerBudget(1)),
    "rloo_clip":             Objective(LEAVE_ONE_OUT,                             ProductRatio(),             Clip(0.2, 0.2),         SequenceAverage()),
    "ppo":                   Objective(CRITIC,                                    TokenRatio(),               Clip(0.2, 0.2),         TokenAverage(),    NoPenalty(),               ValueLoss(0.1, 0.2)),
    "ppo_sequence":          Objective(GAE(kl=0.05, whitened=False),              TokenRatio(),               Clip(0.2, 0.2),         SequenceAverage(), NoPenalty(),               ValueLoss(0.1, 0.2)),
    "ppo_dual_clip":         Objective(CRITIC,                                    TokenRatio(),               TwoSided(0.2, 0.2, 3),  TokenAverage(),    NoPenalty(),               ValueLoss(0.1, 0.2)),
    "nlpo":                  Objective(GAE(0.99, 0.95, kl=0.1),                   TokenRatio(),               Clip(0.2, 0.2),         TokenAverage(),    NoPenalty(),               ValueLoss(1.0)),
    "ppo_kl":                Objective(CRITIC,                                    TokenRatio(),               Importance(),           TokenAverage(),    OldKL(1.0),                ValueLoss(0.1, 0.2),                          control=Doubling(0.01)),
    "trpo":                  Objective(GAE(lam=0.97),                             TokenRatio(),               Importance(),           TokenAverage(),    TrustRegion(0.01),         ValueLoss(0.5)),
    "reinforce_pp":          Objective(ReturnToGo(kl=0.01, whitened=True),        TokenRatio(),               Clip(0.2, 0.2),         TokenAverage()),
    "reinforce_pp_baseline": Objective(GroupRelative("mean", "whitened", ddof=0), TokenRatio(),               Clip(0.2, 0.2),         TokenAverage(),    K2(0.01)),
    "grpo":                  Objective(GROUP,                                     TokenRatio(),               Clip(0.2, 0.2),         SequenceAverage(), K3(0.04)),
    "grpo_r1":               Objective(GROUP,                                     ProductRatio(),             Clip(0.2, 0.2),         SequenceAverage(), K3(0.04, "sequence")),
    "grpo_process":          Objective(ProcessRelative(),                         TokenRatio(),               Clip(0.2, 0.2),         SequenceAverage(), K3(0.04)),
    "grpo_unbiased_kl":      Objective(GROUP,                                     TokenRatio(),               Clip(0.2, 0.2),         SequenceAverage(), K3(0.04, weighted=True)),
    "grpo_two_sided":        Objective(GROUP,                                     TokenRatio(),               TwoSided(0.2, 0.2, 4),  TokenAverage(),    K3(0.001)),
    "grpo_tis":              Objective(GROUP,                                     TokenRatio(),               Clip(0.2, 0.2),         TokenAverage(),                               corrections=(TruncatedImportance(2.0),)),
    "decoupled_ppo":         Objective(GROUP,                                     TokenRatio(),               Clip(0.2, 0.2),         TokenAverage(),                               corrections=(TruncatedImportance(inf),)),
    "dr_grpo":               Objective(GroupRelative("mean", "none"),             TokenRatio(),               Clip(0.2, 0.2),         PerBudget(3000)),
    "dapo":                  Objective(GROUP,                                     TokenRatio(),               Clip(0.2, 0.28),        TokenAverage()),
    "high_entropy":          Objective(GROUP,                                     TokenRatio(),               Clip(0.2, 0.28),        TokenAverage(),                               corrections=(HighEntropy(0.2),)),
    "skywork":               Objective(GROUP,                                     TokenRatio(),               Clip(0.2, 0.2),         TokenAverage(),                               bonus=EntropyBonus(0.005), control=EntropyTarget(0.2, 0.005)),
    "lite_ppo":              Objective(GroupRelative("mean", "batch_std"),        TokenRatio(),               Clip(0.2, 0.2),         TokenAverage()),
    "gspo":                  Objective(GROUP,                                     GeometricRatio(),           Clip(3e-4, 4e-4),       SequenceAverage()),
    "gspo_token":            Objective(GROUP,                                     GeometricTokenRatio(),      Clip(3e-4, 4e-4),       SequenceAverage()),
    "luspo":                 Objective(GROUP,                                     GeometricRatio(),           Clip(3e-4, 4e-4),       PerBudget(1)),
    "gmpo":                  Objective(GROUP,                                     ClippedGeometricRatio(0.4), Importance(),           SequenceAverage()),
    "cispo":                 Objective(GROUP,                                     TokenRatio(),               CappedScore(1.28),      TokenAverage()),
    "vespo":                 Objective(GROUP,                                     ProductRatio(),             SmoothWeight(2, 3),     TokenAverage()),
    "sapo":                  Objective(GROUP,                                     TokenRatio(),               SoftGate(1, 1.05),      SequenceAverage()),
    "distill":               Objective(Teacher(),                                 TokenRatio(),               Importance(),           TokenAverage()),
})
# fmt: on
