"""The names under which configuration finds each piece: `surrogate: {clip: {low: 0.2}}` is PIECES["surrogate"]["clip"](low=0.2)."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from tilt.objectives.comparisons import DivergentSpan, MismatchedKL, Partner, RunningMean, SortedAnswers, SortedMargins, Zero
from tilt.objectives.control import Doubling, EntropyBonus, EntropyTarget, NoBonus, NoControl, Proportional
from tilt.objectives.corrections import HighEntropy, MaskedImportance, SequenceMask, TruncatedImportance
from tilt.objectives.credit import GAE, GroupRelative, Imitate, ProcessRelative, Return, ReturnToGo, Teacher
from tilt.objectives.links import (
    Classifier,
    DiscoPop,
    Fidelity,
    Hinge,
    Logistic,
    Misorder,
    NoiseContrast,
    Prospect,
    ReverseKL,
    Robust,
    Squared,
    WinRate,
)
from tilt.objectives.margins import AlphaDivergence, ForwardKL, ImplicitReward, JensenShannon, Likelihood, LogOdds, ScoreMargin
from tilt.objectives.parts import PartsRelative
from tilt.objectives.penalty import K1, K2, K3, ExactKL, NoPenalty, OldKL, TrustRegion
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
from tilt.objectives.regularisers import Centring, ChosenNLL, Confidence, Constant, Even, LowerChosen, NoRegulariser
from tilt.objectives.value import NoValue, ValueLoss

# fmt: off
PIECES: Mapping[str, Mapping[str, type]] = MappingProxyType({
    "credit":      {"imitate": Imitate, "return": Return, "return_to_go": ReturnToGo, "gae": GAE, "group_relative": GroupRelative,
                    "parts_relative": PartsRelative, "process_relative": ProcessRelative, "teacher": Teacher},
    "ratio":       {"none": NoRatio, "token": TokenRatio, "product": ProductRatio, "geometric": GeometricRatio, "geometric_token": GeometricTokenRatio,
                    "clipped_geometric": ClippedGeometricRatio},
    "surrogate":   {"score": Score, "importance": Importance, "clip": Clip, "two_sided": TwoSided, "capped_score": CappedScore, "soft_gate": SoftGate,
                    "probability_score": ProbabilityScore, "smooth_weight": SmoothWeight},
    "average":     {"token": TokenAverage, "sequence": SequenceAverage, "per_budget": PerBudget},
    "penalty":     {"none": NoPenalty, "k1": K1, "k2": K2, "k3": K3, "exact_kl": ExactKL, "old_kl": OldKL, "trust_region": TrustRegion},
    "value":       {"none": NoValue, "value_loss": ValueLoss},
    "corrections": {"truncated_importance": TruncatedImportance, "masked_importance": MaskedImportance, "sequence_mask": SequenceMask,
                    "high_entropy": HighEntropy},
    "bonus":       {"none": NoBonus, "entropy": EntropyBonus},
    "control":     {"none": NoControl, "doubling": Doubling, "proportional": Proportional, "entropy_target": EntropyTarget},
    "margin":      {"score": ScoreMargin, "implicit_reward": ImplicitReward, "forward_kl": ForwardKL, "jensen_shannon": JensenShannon,
                    "alpha_divergence": AlphaDivergence, "likelihood": Likelihood, "log_odds": LogOdds},
    "link":        {"logistic": Logistic, "robust": Robust, "squared": Squared, "hinge": Hinge, "fidelity": Fidelity, "reverse_kl": ReverseKL,
                    "discopop": DiscoPop, "misorder": Misorder, "noise_contrast": NoiseContrast, "classifier": Classifier, "win_rate": WinRate,
                    "prospect": Prospect},
    "regulariser": {"none": NoRegulariser, "centring": Centring, "chosen_nll": ChosenNLL, "lower_chosen": LowerChosen},
    "comparison":  {"pair": Partner, "sorted_answers": SortedAnswers, "sorted_margins": SortedMargins, "span": DivergentSpan, "zero": Zero,
                    "mismatched_kl": MismatchedKL, "running_mean": RunningMean},
    "weight":      {"even": Even, "constant": Constant, "confidence": Confidence},
})
# fmt: on
