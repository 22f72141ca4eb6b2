"""The mathematics of an update: rows of six choices on the action axis. Imports torch only."""

from tilt.objectives.algorithms import ALGORITHMS, PREFERENCES
from tilt.objectives.card import card
from tilt.objectives.credit import GAE, Credit, Credited, GroupRelative, Imitate, Return, ReturnToGo
from tilt.objectives.experience import Experience, Outputs, Rewards, Signals
from tilt.objectives.metrics import GLOSSARY, batch_metrics
from tilt.objectives.objective import Metrics, Objective
from tilt.objectives.pieces import PIECES
from tilt.objectives.policy import (
    K1,
    K2,
    K3,
    Average,
    CappedScore,
    Clip,
    GeometricRatio,
    GeometricTokenRatio,
    Importance,
    NoPenalty,
    NoRatio,
    Penalty,
    PerBudget,
    ProductRatio,
    Ratio,
    Score,
    SequenceAverage,
    SequenceK3,
    SoftGate,
    Surrogate,
    TokenAverage,
    TokenRatio,
    TwoSided,
)  # fmt: skip
from tilt.objectives.preference import (
    Centring,
    ImplicitReward,
    Link,
    Logistic,
    Margin,
    NoRegulariser,
    Pairs,
    Preference,
    Regulariser,
    ScoreMargin,
)
from tilt.objectives.value import NoValue, Value, ValueLoss
from tilt.segments import Layout

__all__ = [
    "ALGORITHMS", "GAE", "GLOSSARY", "K1", "K2", "K3", "PIECES", "PREFERENCES", "Average", "CappedScore", "Centring", "Clip", "Credit", "Credited",
    "Experience", "GeometricRatio", "GeometricTokenRatio", "GroupRelative", "Imitate", "ImplicitReward", "Importance", "Layout", "Link", "Logistic",
    "Margin", "Metrics", "NoPenalty", "NoRatio", "NoRegulariser", "NoValue", "Objective", "Outputs", "Pairs", "Penalty", "PerBudget", "Preference",
    "ProductRatio", "Ratio", "Regulariser", "Return", "ReturnToGo", "Rewards", "Score", "ScoreMargin", "SequenceAverage", "SequenceK3", "Signals",
    "SoftGate", "Surrogate", "TokenAverage", "TokenRatio", "TwoSided", "Value", "ValueLoss", "batch_metrics",
    "card",
]  # fmt: skip
