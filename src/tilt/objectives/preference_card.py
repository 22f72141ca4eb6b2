"""What a preference row computes, in words: the formula of each piece, and what the row's minimiser is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import isinf
from typing import Any

from tilt.objectives.comparisons import DivergentSpan, MismatchedKL, Partner, RunningMean, SortedAnswers, SortedMargins, Zero
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
from tilt.objectives.preference import Preference
from tilt.objectives.regularisers import Centring, ChosenNLL, Confidence, Constant, Even, LowerChosen, NoRegulariser


def models(row: Preference) -> list[str]:
    """The models that training holds or has read."""
    if row.margin.reads == "score":
        return ["reward model"]
    return ["policy", "reference"] if "reference" in row.needs else ["policy"]


def loss_of(row: Preference) -> str:
    """The row's loss as one formula of its pieces."""
    pair = "good(chosen - baseline) + bad(rejected - baseline)" if row.apart else "link(h)"
    factor = "" if isinstance(row.weight, Even) else "weight * "
    extra = "" if isinstance(row.regulariser, NoRegulariser) else " + regulariser"
    return f"mean over pairs of {factor}{f'({pair})' if factor and row.apart else pair}{extra}" + (
        "; of labelled answers the mean of their own terms" if row.apart else ""
    )


def consistent_for(row: Preference) -> str:
    """The minimiser over all policies (or scores) on endless data that cover every answer: p is the chance that an answer beats the other, w the share of
    its comparisons that it wins."""
    parts = [_comparison(row), _aim(row)]
    if not isinstance(row.regulariser, NoRegulariser):
        parts.append("moved from there by the regulariser")
    if isinstance(row.weight, Confidence):
        parts.append("the weights change how fast, not where")
    return "; ".join(part for part in parts if part)


def _comparison(row: Preference) -> str:
    found: Mapping[type, str] = {
        SortedAnswers: "chosen rewards above rejected ones at every rank of the batch (first-order dominance), not pair by pair",
        SortedMargins: "the policy's margins above the reference's at every rank of the batch (first-order dominance), not pair by pair",
        DivergentSpan: "at each position of the span, for answers that begin as these do",
    }
    return found.get(type(row.comparison), "")


def _aim(row: Preference) -> str:
    if isinstance(row.comparison, (SortedAnswers, SortedMargins)):
        return ""
    described = _TARGETS.get(type(row.link))
    target = described(row.link) if described else "not known for this link"
    if row.margin.offset:
        return f"the right order, with gaps that the offset {row.margin.offset:g} widens beyond logit p: no finite one where every label agrees"
    if isinstance(row.link, Squared) and row.margin == ImplicitReward(1.0):
        return f"{target}; the tilted policy reference * exp(w / {row.link.beta:g}) / Z, where all answers are compared equally often (w counts itself as half a win)"
    known = isinstance(row.link, Robust) or (isinstance(row.link, Logistic) and not row.link.smoothing)
    return (
        f"{target}, which on Bradley-Terry data is {_meaning(row.margin)}"
        if known and not isinstance(row.comparison, DivergentSpan)
        else target
    )


_TARGETS: Mapping[type, Callable[[Any], str]] = {
    Logistic: lambda p: (
        f"h = logit of {1 - p.smoothing:g} p + {p.smoothing:g} (1 - p): the order is right, the gaps are smaller than the true ones and bounded"
        if p.smoothing
        else "h = logit p"
    ),
    Robust: lambda p: f"h = logit p of the right labels, where a share {p.smoothing:g} of them is wrong",
    Squared: lambda p: f"h = (2p - 1) / {2 * p.beta:g} as far as several answers allow: bounded, also where every label agrees",
    Hinge: lambda p: f"h = {p.distance:g} where p > .5, -{p.distance:g} where p < .5: the order alone",
    Fidelity: lambda p: (
        "h = 2 logit p: twice the true gap, from labels that are certain"
        if p.target == 1
        else "h = 2 log of the mean root odds: no simple function of p"
    ),
    ReverseKL: lambda p: f"h = (2p - 1) log {(1 - p.smoothing) / p.smoothing:g} as far as several answers allow: bounded",
    DiscoPop: lambda p: "no closed form: the loss is not convex" + (", and falls from h = 0 into a hollow below it" if p.uphill else ""),
    Misorder: lambda p: "the order alone: no finite minimum, h grows without end where p > .5",
    NoiseContrast: lambda p: "reward = log(2w): the level is fixed too",
    Classifier: lambda p: "reward = logit w + baseline",
    WinRate: lambda p: f"reward = (2w - 1) / {2 * p.beta:g}: linear in how often an answer wins",
    Prospect: lambda p: (
        f"the side of the baseline alone: no finite minimum, up where w > {p.undesirable / (p.desirable + p.undesirable):g}, else down; the slope dies out far from it"
    ),
}


def _meaning(margin: object) -> str:
    if isinstance(margin, ScoreMargin):
        return "the true reward up to a constant per prompt"
    if isinstance(margin, ImplicitReward):
        if margin.mean:
            return "log(policy / reference) / n = reward / beta + constant: longer answers move more, not the tilted reference"
        if margin.tail != 1:
            return (
                "reward = beta log(policy / reference), the actions beyond the other answer's length counted less: not the tilted reference"
            )
        return "the tilted policy reference * exp(reward / beta) / Z"
    if isinstance(margin, ForwardKL | JensenShannon | AlphaDivergence):
        return "the policy of the largest E[reward] - beta D(policy || reference), D that divergence"
    if isinstance(margin, Likelihood):
        return f"{'mean log policy' if margin.mean else 'log policy'} = reward / {margin.beta:g} + constant: no reference holds it"
    if isinstance(margin, LogOdds):
        return "log-odds of the mean likelihoods = reward + constant: no reference holds it"
    return "not known for this margin"


def _times(factor: float) -> str:
    return "" if factor == 1 else f"{factor:g} "


def _offset(offset: float) -> str:
    return f" - {offset:g}" if offset else ""


WORDS: Mapping[type, Callable[[Any], str]] = {
    ScoreMargin: lambda p: "score(chosen) - score(rejected)" + _offset(p.offset),
    ImplicitReward: lambda p: (
        f"{p.beta:g} [u(chosen) - u(rejected)]{_offset(p.offset)}, u = log(policy / reference)"
        + (" / n" if p.mean else "")
        + (f", actions beyond the other answer's length times {p.tail:g}" if p.tail != 1 else "")
    ),
    ForwardKL: lambda p: f"{p.beta:g} [exp(-u(rejected)) - exp(-u(chosen))]{_offset(p.offset)}, u = log(policy / reference)",
    JensenShannon: lambda p: f"{p.beta:g} [log sigmoid(u(chosen)) - log sigmoid(u(rejected))]{_offset(p.offset)}, u = log(policy / reference)",
    AlphaDivergence: lambda p: f"{p.beta / (1 - p.alpha):g} [exp(-{1 - p.alpha:g} u(rejected)) - exp(-{1 - p.alpha:g} u(chosen))]{_offset(p.offset)}, u = log(policy / reference)",
    Likelihood: lambda p: f"{p.beta:g} [log policy(chosen){' / n' if p.mean else ''} - log policy(rejected){' / n' if p.mean else ''}]{_offset(p.offset)}",
    LogOdds: lambda p: f"odds(chosen) - odds(rejected){_offset(p.offset)}, odds = q - log(1 - exp q), q = log policy / n",
    Logistic: lambda p: "-log sigmoid(h)" if not p.smoothing else f"-{1 - p.smoothing:g} log sigmoid(h) - {p.smoothing:g} log sigmoid(-h)",
    Robust: lambda p: f"[-{1 - p.smoothing:g} log sigmoid(h) + {p.smoothing:g} log sigmoid(-h)] / {1 - 2 * p.smoothing:g}",
    Squared: lambda p: f"(h - {1 / (2 * p.beta):g})^2",
    Hinge: lambda p: f"max(0, {p.distance:g} - h)",
    Fidelity: lambda p: "1 - sqrt(P)" if p.target == 1 else f"1 - sqrt({p.target:g} P) - sqrt({1 - p.target:g} (1 - P)), P = sigmoid(h)",
    ReverseKL: lambda p: f"q log(q / {1 - p.smoothing:g}) + (1 - q) log((1 - q) / {p.smoothing:g}), q = sigmoid(h)",
    DiscoPop: lambda p: f"-(1 - m) log sigmoid(h) + m exp(-h), m = sigmoid(h / {p.temperature:g})",
    Misorder: lambda p: "1 - sigmoid(h)",
    NoiseContrast: lambda p: "good -log sigmoid(x) - .5 log sigmoid(-x), bad -.5 log sigmoid(-x), x = reward - baseline",
    Classifier: lambda p: "good -log sigmoid(x), bad -log sigmoid(-x), x = reward - baseline",
    WinRate: lambda p: f"good (x - {1 / (2 * p.beta):g})^2, bad (x + {1 / (2 * p.beta):g})^2, x = reward - baseline",
    Prospect: lambda p: f"good {_times(p.desirable)}sigmoid(-x), bad {_times(p.undesirable)}sigmoid(x), x = reward - baseline",
    NoRegulariser: lambda p: "none",
    Centring: lambda p: f"{p.coefficient:g} (chosen + rejected)^2, of the rewards",
    ChosenNLL: lambda p: f"-{_times(p.coefficient)}log policy(chosen){' / n' if p.mean else ''}",
    LowerChosen: lambda p: "sigmoid(reward of chosen)",
    Partner: lambda p: "h = chosen less rejected, pair by pair",
    SortedAnswers: lambda p: "h_k = k-th smallest chosen reward less k-th smallest rejected reward of the batch",
    SortedMargins: lambda p: "h_k = k-th smallest margin of the policy less k-th smallest margin of the reference in the batch",
    DivergentSpan: lambda p: "h_t at every position from the first difference to the longer end; the pair's loss is their mean",
    Zero: lambda p: "baseline 0",
    MismatchedKL: lambda p: "baseline = max(0, mean reward of prompts with answers to other prompts)",
    RunningMean: lambda p: "baseline = mean reward of all answers so far, this batch's included",
    Even: lambda p: "1",
    Constant: lambda p: f"{p.factor:g}",
    Confidence: lambda p: "exp of the mean over actions of logprobs - log sum_v p(v)^2, both answers" + ("" if isinf(p.cap) else f", at most {p.cap:g}"),
}  # fmt: skip
