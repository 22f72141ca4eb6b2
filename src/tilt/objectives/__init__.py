"""The mathematics of an update: rows of six choices on the action axis. Imports torch only."""

from tilt.objectives.algorithms import ALGORITHMS, PREFERENCES
from tilt.objectives.card import card
from tilt.objectives.control import Bonus, Control, Doubling, EntropyBonus, EntropyTarget, NoBonus, NoControl, Proportional
from tilt.objectives.corrections import Correction, HighEntropy, MaskedImportance, SequenceMask, TruncatedImportance
from tilt.objectives.credit import GAE, Credit, Credited, GroupRelative, Imitate, ProcessRelative, Return, ReturnToGo, Teacher
from tilt.objectives.experience import Experience, Outputs, Rewards, Signals
from tilt.objectives.metrics import GLOSSARY, batch_metrics
from tilt.objectives.objective import Metrics, Objective
from tilt.objectives.penalty import K1, K2, K3, ExactKL, NoPenalty, OldKL, Penalty, TrustRegion
from tilt.objectives.pieces import PIECES
from tilt.objectives.policy import (
    Average,
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
    Ratio,
    Score,
    SequenceAverage,
    SmoothWeight,
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
    "ALGORITHMS", "GAE", "GLOSSARY", "K1", "K2", "K3", "PIECES", "PREFERENCES", "Average", "Bonus", "CappedScore", "Centring", "Clip",
    "ClippedGeometricRatio", "Control", "Correction", "Credit", "Credited", "Doubling", "EntropyBonus", "EntropyTarget", "ExactKL",
    "Experience", "GeometricRatio", "GeometricTokenRatio", "GroupRelative", "HighEntropy", "Imitate", "ImplicitReward", "Importance",
    "Layout", "Link", "Logistic", "Margin", "MaskedImportance", "Metrics", "NoBonus", "NoControl", "NoPenalty", "NoRatio",
    "NoRegulariser", "NoValue", "Objective", "OldKL", "Outputs", "Pairs", "Penalty", "PerBudget", "Preference", "ProbabilityScore",
    "ProcessRelative", "ProductRatio", "Proportional", "Ratio", "Regulariser", "Return", "ReturnToGo", "Rewards", "Score", "ScoreMargin",
    "SequenceAverage", "SequenceMask", "Signals", "SmoothWeight", "SoftGate", "Surrogate", "Teacher", "TokenAverage", "TokenRatio",
    "TruncatedImportance", "TrustRegion", "TwoSided", "Value", "ValueLoss", "batch_metrics", "card",
]  # fmt: skip
