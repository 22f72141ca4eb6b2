"""The mathematics of an update: rows of six choices on the action axis. Imports torch only."""

from tilt.objectives.algorithms import ALGORITHMS
from tilt.objectives.card import card
from tilt.objectives.comparisons import (
    Baseline,
    DivergentSpan,
    Matching,
    MismatchedKL,
    Partner,
    RunningMean,
    SortedAnswers,
    SortedMargins,
    Zero,
)
from tilt.objectives.control import Bonus, Control, Doubling, EntropyBonus, EntropyTarget, NoBonus, NoControl, Proportional
from tilt.objectives.corrections import Correction, HighEntropy, MaskedImportance, SequenceMask, TruncatedImportance
from tilt.objectives.credit import GAE, Credit, Credited, GroupRelative, Imitate, ProcessRelative, Return, ReturnToGo, Teacher
from tilt.objectives.experience import Experience, Outputs, Rewards, Signals
from tilt.objectives.links import (
    Classifier,
    DiscoPop,
    Fidelity,
    Hinge,
    Link,
    Logistic,
    Misorder,
    NoiseContrast,
    Prospect,
    ReverseKL,
    Robust,
    Squared,
    Verdict,
    WinRate,
)
from tilt.objectives.margins import AlphaDivergence, ForwardKL, ImplicitReward, JensenShannon, Likelihood, LogOdds, Margin, ScoreMargin
from tilt.objectives.metrics import GLOSSARY, batch_metrics
from tilt.objectives.objective import Metrics, Objective
from tilt.objectives.pairs import Answers, Pairs, Span, pull
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
from tilt.objectives.preference import Preference
from tilt.objectives.preferences import PREFERENCES
from tilt.objectives.regularisers import Centring, ChosenNLL, Confidence, Constant, Even, LowerChosen, NoRegulariser, Regulariser, Weight
from tilt.objectives.value import NoValue, Value, ValueLoss
from tilt.segments import Layout

__all__ = [
    "ALGORITHMS", "GAE", "GLOSSARY", "K1", "K2", "K3", "PIECES", "PREFERENCES", "AlphaDivergence", "Answers", "Average", "Baseline",
    "Bonus", "CappedScore", "Centring", "ChosenNLL", "Classifier", "Clip", "ClippedGeometricRatio", "Confidence", "Constant",
    "Control", "Correction", "Credit", "Credited", "DiscoPop", "DivergentSpan", "Doubling", "EntropyBonus", "EntropyTarget", "Even",
    "ExactKL", "Experience", "Fidelity", "ForwardKL", "GeometricRatio", "GeometricTokenRatio", "GroupRelative", "HighEntropy", "Hinge",
    "Imitate", "ImplicitReward", "Importance", "JensenShannon", "Layout", "Likelihood", "Link", "LogOdds", "Logistic", "LowerChosen",
    "Margin", "MaskedImportance", "Matching", "Metrics", "MismatchedKL", "Misorder", "NoBonus", "NoControl", "NoPenalty", "NoRatio",
    "NoRegulariser", "NoValue", "NoiseContrast", "Objective", "OldKL", "Outputs", "Pairs", "Partner", "Penalty", "PerBudget",
    "Preference", "ProbabilityScore", "ProcessRelative", "ProductRatio", "Proportional", "Prospect", "Ratio", "Regulariser", "Return",
    "ReturnToGo", "ReverseKL", "Rewards", "Robust", "RunningMean", "Score", "ScoreMargin", "SequenceAverage", "SequenceMask",
    "Signals", "SmoothWeight", "SoftGate", "SortedAnswers", "SortedMargins", "Span", "Squared", "Surrogate", "Teacher", "TokenAverage",
    "TokenRatio", "TruncatedImportance", "TrustRegion", "TwoSided", "Value", "ValueLoss", "Verdict", "Weight", "WinRate", "Zero",
    "batch_metrics", "card", "pull",
]  # fmt: skip
