"""The names under which configuration finds each piece: `surrogate: {clip: {low: 0.2}}` is PIECES["surrogate"]["clip"](low=0.2)."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from tilt.objectives.credit import GAE, GroupRelative, Imitate, Return, ReturnToGo
from tilt.objectives.policy import (
    K1,
    K2,
    K3,
    CappedScore,
    Clip,
    GeometricRatio,
    GeometricTokenRatio,
    Importance,
    NoPenalty,
    NoRatio,
    PerBudget,
    ProductRatio,
    Score,
    SequenceAverage,
    SequenceK3,
    SoftGate,
    TokenAverage,
    TokenRatio,
    TwoSided,
)
from tilt.objectives.preference import Centring, ImplicitReward, Logistic, NoRegulariser, ScoreMargin
from tilt.objectives.value import NoValue, ValueLoss

# fmt: off
PIECES: Mapping[str, Mapping[str, type]] = MappingProxyType({
    "credit":      {"imitate": Imitate, "return": Return, "return_to_go": ReturnToGo, "gae": GAE, "group_relative": GroupRelative},
    "ratio":       {"none": NoRatio, "token": TokenRatio, "product": ProductRatio, "geometric": GeometricRatio, "geometric_token": GeometricTokenRatio},
    "surrogate":   {"score": Score, "importance": Importance, "clip": Clip, "two_sided": TwoSided, "capped_score": CappedScore, "soft_gate": SoftGate},
    "average":     {"token": TokenAverage, "sequence": SequenceAverage, "per_budget": PerBudget},
    "penalty":     {"none": NoPenalty, "k1": K1, "k2": K2, "k3": K3, "sequence_k3": SequenceK3},
    "value":       {"none": NoValue, "value_loss": ValueLoss},
    "margin":      {"score": ScoreMargin, "implicit_reward": ImplicitReward},
    "link":        {"logistic": Logistic},
    "regulariser": {"none": NoRegulariser, "centring": Centring},
})
# fmt: on
