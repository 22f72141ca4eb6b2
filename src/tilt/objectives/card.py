"""The objective card: what a row computes, in formula and words, which models it holds, and what it is unbiased for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import isinf
from typing import Any

from tilt.objectives.algorithms import ALGORITHMS, PREFERENCES
from tilt.objectives.credit import GAE, GroupRelative, Imitate, Return, ReturnToGo
from tilt.objectives.objective import Objective
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
from tilt.objectives.preference import Centring, ImplicitReward, Logistic, NoRegulariser, Preference, ScoreMargin
from tilt.objectives.value import NoValue, ValueLoss


def card(objective: Objective | Preference, **run_numbers: object) -> str:
    """The card of a row; `run_numbers` are what the run adds (samples=8, passes=1, prompts=64): shown, and samples and passes are checked."""
    rows = _preference_rows(objective) if isinstance(objective, Preference) else _rows(objective, run_numbers)
    if run_numbers:
        rows.append(("run", ", ".join(f"{key} {value}" for key, value in run_numbers.items())))
    width = max(len(name) for name, _ in rows)
    return "\n".join([name_of(objective), *(f"  {name:<{width}}  {text}" for name, text in rows)])


def name_of(objective: Objective | Preference) -> str:
    """The row's name in THE TABLE, or `custom`."""
    named: Mapping[str, Objective | Preference] = {**ALGORITHMS, **PREFERENCES}
    return next((name for name, row in named.items() if row == objective), "custom")


def words(piece: object) -> str:
    """The formula of a piece with its numbers; a piece from elsewhere is its own record and the first line of its docstring."""
    found = WORDS.get(type(piece))
    return found(piece) if found else f"{piece!r}: {(type(piece).__doc__ or '').strip().splitlines()[0]}"


def models(objective: Objective | Preference) -> list[str]:
    """The models held in training: the policy and what the row compares it with."""
    if isinstance(objective, Preference):
        return ["policy", "reference"] if "reference" in objective.needs else ["reward model"]
    held = ["policy"]
    held += ["reference"] if "reference" in objective.needs else []
    held += [] if objective.credit == Imitate() else ["reward model (or a rule)"]
    held += ["critic"] if "values" in objective.needs else []
    return held


def _rows(objective: Objective, run_numbers: Mapping[str, Any]) -> list[tuple[str, str]]:
    slots = ("credit", "ratio", "surrogate", "average", "penalty", "value")
    value = f" + {objective.value.coefficient:g} value_t" if objective.value.needs else ""
    penalty = "" if isinstance(objective.penalty, NoPenalty) else " - penalty_t"
    rows = [("loss", f"-sum_t w_t (surrogate_t{penalty}){' + sum_t w_t' + value[2:] if value else ''}")]
    rows += [(slot, words(getattr(objective, slot))) for slot in slots]
    rows += [("statistics", _statistics(objective.credit)), ("KL", _kl(objective))]
    held = models(objective)
    rows += [("models held", f"{len(held)}: {', '.join(held)}"), ("signals", ", ".join(sorted(objective.needs)) or "none")]
    rows.append(("passes", "any number" if objective.passes is None else f"{objective.passes} over fresh samples"))
    rows.append(("unbiased for", unbiased_for(objective)))
    rows += [("note", note) for note in objective.notes()]
    samples, passes = int(run_numbers.get("samples", 2)), int(run_numbers.get("passes", 1))
    return rows + [("PROBLEM", problem) for problem in objective.check(samples, passes)]


def _preference_rows(row: Preference) -> list[tuple[str, str]]:
    smoothing = row.link.smoothing if isinstance(row.link, Logistic) else 0.0
    aim = "the true reward up to a constant per prompt, on Bradley-Terry data that cover all answers"
    if isinstance(row.margin, ImplicitReward):
        aim = "the tilted policy reference * exp(reward / beta) / Z, on Bradley-Terry data that cover all answers"
    held = models(row)
    return [
        ("loss", "mean over pairs of link(margin) + regulariser"),
        *((slot, words(getattr(row, slot))) for slot in ("margin", "link", "regulariser")),
        ("models held", f"{len(held)}: {', '.join(held)}"),
        ("consistent for", aim if not smoothing else aim + f", when a share {smoothing:g} of the labels is wrong"),
    ]


def _statistics(credit: object) -> str:
    if isinstance(credit, GroupRelative):
        noise = {
            "none": "no standard deviation",
            "group_std": f"standard deviation of each group, divisor n - {credit.ddof}, + {credit.eps:g}",
            "batch_std": f"standard deviation of the batch's rewards, divisor n - {credit.ddof}, + {credit.eps:g}",
            "whitened": f"whitened over the batch's actions, divisor n - {credit.ddof}, eps {credit.eps:g}",
        }[credit.scale]
        return noise + "; groups of equal rewards have advantage exactly 0, decided by max = min"
    if isinstance(credit, ReturnToGo) and credit.whitened:
        return f"whitened over the batch's actions, divisor n - {credit.ddof}, eps 0"
    if isinstance(credit, GAE) and credit.whitened:
        return "whitened over the batch's actions, divisor n - 1, variance + 1e-08"
    return "none"


def _kl(objective: Objective) -> str:
    kl = getattr(objective.credit, "kl", 0.0)
    parts = []
    if kl:
        parts.append(f"in the reward: k1 times {kl:g}, fixed for all passes; its gradient is that of KL(policy || reference), exact")
    pulls = {
        K1: "k1 in the loss: expected gradient 0, it pulls nowhere",
        K2: "k2 in the loss: pulls along KL(policy || reference), prefixes frozen",
        K3: "k3 in the loss: pulls along KL(reference || policy), prefixes frozen; the limit is not the tilted reference",
        SequenceK3: "k3 of the whole answer in the loss: its gradient is that of KL(reference || policy), exact",
    }
    beta = getattr(objective.penalty, "beta", 0.0)
    parts += [f"{text}, times {beta:g}" for piece, text in pulls.items() if type(objective.penalty) is piece]
    return "; ".join(parts) or "none"


def unbiased_for(objective: Objective) -> str:
    """What the expected gradient is at policy = old with an outcome reward, and what becomes of it after (algorithms.md, section 8)."""
    credit = objective.credit
    if isinstance(credit, Imitate):
        return (
            "the likelihood of the demonstrations" if credit.keep == "all" else "the likelihood of the best answers, not the gradient of J"
        )
    kl = getattr(credit, "kl", 0.0)
    goal = f"J = E[R] - {kl:g} KL(policy || reference)" if kl else "J = E[R]"
    parts = [_credit_target(credit), _average_effect(objective), goal]
    if type(objective.surrogate) not in (Score, Importance):
        parts.append("stated at policy = old; away from it the gate trades bias for stability")
    elif isinstance(objective.surrogate, Importance) and not isinstance(objective.ratio, ProductRatio):
        parts.append("stated at policy = old; away from it exact to first order")
    return "; ".join(part for part in parts if part)


def _credit_target(credit: object) -> str:
    if isinstance(credit, Return):
        return "grad J exactly"
    if isinstance(credit, ReturnToGo):
        exact = "(1 - 1/G) grad J" if credit.baseline == "group_mean" else "grad J exactly (any baseline of the state)"
        exact += (
            ""
            if credit.gamma == 1
            else f", but with gamma {credit.gamma:g} and without the factor gamma^t it is the gradient of no function"
        )
        return exact + (", over sigma as the batch grows (error O(1/B))" if credit.whitened else "")
    if isinstance(credit, GAE):
        return "grad J if lam = 1 or the critic is exact, else biased by its error" + (
            ", over sigma as the batch grows" if credit.whitened else ""
        )
    if isinstance(credit, GroupRelative):
        lone = credit.centre == "leave_one_out"
        if credit.scale == "none":
            return "grad J exactly, for every G >= 2" if lone else "(1 - 1/G) grad J"
        if credit.scale == "group_std":
            return "with 0/1 rewards each prompt's grad p times a weight w_G(p), 1/sqrt(p (1 - p)) for large G; with general rewards nothing simple"
        return ("grad J" if lone else "(1 - 1/G) grad J") + " over sigma as the batch grows"
    return "not known for this credit"


def _average_effect(objective: Objective) -> str:
    average = objective.average
    if isinstance(average, PerBudget):
        return "" if average.length == 1 else f"divided by the constant length {average.length}"
    if isinstance(average, TokenAverage):
        return "with the token average consistent for it over E[length], bias O(1/B)"
    if isinstance(average, SequenceAverage):
        return (
            ""
            if isinstance(objective.ratio, ProductRatio)
            else "with each answer divided by its length, so that J becomes E[(R - J) / n]: not J itself"
        )
    return "with an average of your own"


def _clamp(limit: float) -> str:
    return "" if isinf(limit) else f" clamped to +-{limit:g}"


def _shaped(kl: float) -> str:
    return f", r_t with -{kl:g} (old - reference)_t" if kl else ""


_BASELINES = {"none": "", "group_mean": " - mean return of the prompt's answers", "critic": " - V_t"}
_SCALES = {"none": "", "group_std": " / std(group)", "batch_std": " / std(batch)", "whitened": ", whitened over the batch"}

WORDS: Mapping[type, Callable[[Any], str]] = {
    Imitate: lambda p: "Adv_t = 1" + ("" if p.keep == "all" else " on the first best answer of each prompt; the others do not count"),
    Return: lambda p: "Adv_t = sum_k r_k, the whole return",
    ReturnToGo: lambda p: (
        f"Adv_t = sum_(k>=t) {p.gamma:g}^(k-t) r_k{_BASELINES[p.baseline]}{', whitened' if p.whitened else ''}{_shaped(p.kl)}"
    ),
    GAE: lambda p: (
        f"Adv_t = sum_k ({p.gamma:g} * {p.lam:g})^k delta_(t+k), delta_t = r_t + {p.gamma:g} V_(t+1) - V_t"
        f"{', whitened' if p.whitened else ''}{_shaped(p.kl)}{', score' + _clamp(p.clip_reward) if _clamp(p.clip_reward) else ''}"
    ),
    GroupRelative: lambda p: (
        f"Adv_t = (R - mean of {'the other answers' if p.centre == 'leave_one_out' else 'the group'}){_SCALES[p.scale]}"
        + (f", R with -{p.kl:g} sum_t (old - reference)_t" if p.kl else "")
    ),
    NoRatio: lambda p: "none",
    TokenRatio: lambda p: "rho_t = exp(logprobs - old)_t",
    ProductRatio: lambda p: "rho = exp(sum_t (logprobs - old)_t), one per answer",
    GeometricRatio: lambda p: "rho = exp(mean_t (logprobs - old)_t), one per answer",
    GeometricTokenRatio: lambda p: "rho_t = sg[exp(mean (logprobs - old))] exp(logprobs - sg[logprobs])_t",
    Score: lambda p: "logprobs_t Adv_t",
    Importance: lambda p: "rho_t Adv_t",
    Clip: lambda p: f"min(rho Adv, clip(rho, {1 - p.low:g}, {1 + p.high:g}) Adv)",
    TwoSided: lambda p: f"min(min(rho, {p.delta:g}) Adv, clip(rho, {1 - p.low:g}, {1 + p.high:g}) Adv)",
    CappedScore: lambda p: f"sg[min(rho, {p.cap:g})] Adv logprobs",
    SoftGate: lambda p: f"(4 / tau) sigmoid(tau (rho - 1)) Adv, tau = {p.positive:g} where Adv > 0, else {p.negative:g}",
    TokenAverage: lambda p: "w_t = 1 / A, A actions in the batch",
    SequenceAverage: lambda p: "w_t = 1 / (S n_i), S answers, n_i actions in this one",
    PerBudget: lambda p: "w_t = 1 / S, S answers" if p.length == 1 else f"w_t = 1 / (S * {p.length}), S answers",
    NoPenalty: lambda p: "none",
    K1: lambda p: f"{p.beta:g} u_t, u = logprobs - reference",
    K2: lambda p: f"{p.beta:g} u_t^2 / 2, u = logprobs - reference",
    K3: lambda p: f"{p.beta:g} (exp(-u_t) + u_t - 1), u = logprobs - reference",
    SequenceK3: lambda p: f"{p.beta:g} (exp(-U) + U - 1), U = sum_t (logprobs - reference)_t",
    NoValue: lambda p: "none",
    ValueLoss: lambda p: (
        ".5 (V - R)^2" if isinf(p.clip) else f".5 max((V - R)^2, (clip(V, V_old +- {p.clip:g}) - R)^2)"
    ) + f", coefficient {p.coefficient:g}",
    ScoreMargin: lambda p: "score(chosen) - score(rejected)" + (f" - {p.offset:g}" if p.offset else ""),
    ImplicitReward: lambda p: f"{p.beta:g} [log(policy/reference)(chosen) - log(policy/reference)(rejected)]" + (f" - {p.offset:g}" if p.offset else ""),
    Logistic: lambda p: "-log sigmoid(h)" if not p.smoothing else f"-{1 - p.smoothing:g} log sigmoid(h) - {p.smoothing:g} log sigmoid(-h)",
    NoRegulariser: lambda p: "none",
    Centring: lambda p: f"{p.coefficient:g} (chosen + rejected)^2, of the rewards",
}  # fmt: skip
