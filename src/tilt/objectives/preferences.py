"""THE SECOND TABLE: every objective on compared or labelled answers is a row of five choices; docs/algorithms.md has the formulas and papers."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from tilt.objectives.comparisons import DivergentSpan, MismatchedKL, RunningMean, SortedAnswers, SortedMargins, Zero
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
)  # fmt: skip
from tilt.objectives.margins import AlphaDivergence, ForwardKL, ImplicitReward, JensenShannon, Likelihood, LogOdds, ScoreMargin
from tilt.objectives.preference import Preference
from tilt.objectives.regularisers import ChosenNLL, Confidence, Constant, LowerChosen, NoRegulariser

NONE = NoRegulariser()
IMPLICIT = ImplicitReward(0.1)

# fmt: off
PREFERENCES: Mapping[str, Preference] = MappingProxyType({
    #                               margin                                      link             regulariser           comparison       weight
    "reward_model":      Preference(ScoreMargin(),                              Logistic()),
    "rm_deepspeed_chat": Preference(ScoreMargin(),                              Logistic(),      NONE,                 DivergentSpan()),
    "dpo":               Preference(IMPLICIT,                                   Logistic()),
    "cdpo":              Preference(IMPLICIT,                                   Logistic(0.1)),
    "robust":            Preference(IMPLICIT,                                   Robust(0.1)),
    "ipo":               Preference(ImplicitReward(1.0),                        Squared(0.1)),
    "ipo_mean":          Preference(ImplicitReward(1.0, mean=True),             Squared(0.1)),
    "hinge":             Preference(IMPLICIT,                                   Hinge(1.0)),
    "fidelity":          Preference(IMPLICIT,                                   Fidelity()),
    "exo_pair":          Preference(IMPLICIT,                                   ReverseKL(0.1)),
    "discopop":          Preference(IMPLICIT,                                   DiscoPop(0.05)),
    "rpo":               Preference(IMPLICIT,                                   Logistic(),      ChosenNLL(1.0, mean=True)),
    "apo_down":          Preference(IMPLICIT,                                   Misorder(),      LowerChosen()),
    "aot":               Preference(IMPLICIT,                                   Logistic(),      NONE,                 SortedMargins()),
    "aot_unpaired":      Preference(IMPLICIT,                                   Logistic(),      NONE,                 SortedAnswers()),
    "sigmoid_norm":      Preference(ImplicitReward(0.1, mean=True),             Logistic()),
    "ld_dpo":            Preference(ImplicitReward(0.1, tail=0.5),              Logistic()),
    "dpo_forward_kl":    Preference(ForwardKL(0.1),                             Logistic()),
    "dpo_js":            Preference(JensenShannon(0.1),                         Logistic()),
    "dpo_alpha":         Preference(AlphaDivergence(0.1, 0.5),                  Logistic()),
    "wpo":               Preference(IMPLICIT,                                   Logistic(),      weight=Confidence()),
    "simpo":             Preference(Likelihood(2.0, offset=0.5, mean=True),     Logistic()),
    "cpo":               Preference(Likelihood(0.1),                            Logistic(),      ChosenNLL(1.0)),
    "slic":              Preference(Likelihood(1.0),                            Hinge(1.0),      ChosenNLL(1.0)),
    "orpo":              Preference(LogOdds(),                                  Logistic(),      ChosenNLL(1.0, mean=True), weight=Constant(0.1)),
    "kto":               Preference(IMPLICIT,                                   Prospect(),      NONE,                 MismatchedKL()),
    "bco_pair":          Preference(IMPLICIT,                                   Classifier(),    NONE,                 RunningMean()),
    "nca_pair":          Preference(IMPLICIT,                                   NoiseContrast(), NONE,                 Zero()),
    "apo_zero":          Preference(IMPLICIT,                                   Prospect(),      NONE,                 Zero()),
    "sppo_hard":         Preference(ImplicitReward(1.0),                        WinRate(0.1),    NONE,                 Zero()),
})
# fmt: on
