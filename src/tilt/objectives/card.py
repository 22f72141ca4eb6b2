"""The objective card: what a row computes, in formula and words, which models it holds, and what it is unbiased for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from tilt.objectives import preference_card
from tilt.objectives.algorithms import ALGORITHMS
from tilt.objectives.control import NoBonus, NoControl
from tilt.objectives.corrections import HighEntropy
from tilt.objectives.credit import GAE, GroupRelative, Imitate, ProcessRelative, Return, ReturnToGo, Teacher
from tilt.objectives.objective import Objective
from tilt.objectives.parts import PartsRelative
from tilt.objectives.penalty import K1, K2, K3, ExactKL, NoPenalty, OldKL, TrustRegion
from tilt.objectives.policy import (
    ClippedGeometricRatio,
    Importance,
    PerBudget,
    ProbabilityScore,
    ProductRatio,
    Ratio,
    Score,
    SequenceAverage,
    Surrogate,
    TokenAverage,
)
from tilt.objectives.preference import Preference
from tilt.objectives.preferences import PREFERENCES
from tilt.objectives.words import WORDS, words

__all__ = ["WORDS", "card", "compared", "models", "name_of", "unbiased_for", "words"]


def card(objective: Objective | Preference, **run_numbers: object) -> str:
    """The card of a row; `run_numbers` are what the run adds (samples=8, passes=1, prompts=64): shown, and samples and passes are checked."""
    rows = _preference_rows(objective) if isinstance(objective, Preference) else _rows(objective, run_numbers)
    if run_numbers:
        rows.append(("run", ", ".join(f"{key} {value}" for key, value in run_numbers.items())))
    width = max(len(name) for name, _ in rows)
    return "\n".join([name_of(objective), *(f"  {name:<{width}}  {text}" for name, text in rows)])


def compared(first: Objective | Preference, second: Objective | Preference) -> list[tuple[str, str, str]]:
    """Where two cards differ: (line of the card, in the first, in the second)."""
    cards = [dict(_preference_rows(row) if isinstance(row, Preference) else _rows(row, {})) for row in (first, second)]
    lines = list(dict.fromkeys([*cards[0], *cards[1]]))
    both = ((line, *(found.get(line, "none") for found in cards)) for line in lines)
    return [(line, a, b) for line, a, b in both if a != b]


def name_of(objective: Objective | Preference) -> str:
    """The row's name in THE TABLE, or `custom`."""
    named: Mapping[str, Objective | Preference] = {**ALGORITHMS, **PREFERENCES}
    return next((name for name, row in named.items() if row == objective), "custom")


def models(objective: Objective | Preference, *, ruled: bool = False) -> list[str]:
    """The models held in training: the policy and what the row compares it with; `ruled`: the reward is a rule, which is no model."""
    if isinstance(objective, Preference):
        return preference_card.models(objective)
    held = ["policy"]
    held += ["teacher" if isinstance(objective.credit, Teacher) else "reference"] if "reference" in objective.needs else []
    held += [] if ruled or objective.credit == Imitate() or isinstance(objective.credit, Teacher) else ["reward model (or a rule)"]
    held += ["critic"] if "values" in objective.needs else []
    return held


def clip_level(row: Objective) -> str:
    """At which level a clip cuts the gradient: of a token, of a whole answer, or none."""
    plain = [Surrogate.clipped, Ratio.clipped]
    clips = [getattr(type(piece), "clipped", None) for piece in (row.surrogate, row.ratio)]
    if "old" not in row.ratio.needs or all(clip is None or clip in plain for clip in clips):
        return "none"
    return "answer" if row.ratio.per_sequence and not isinstance(row.ratio, ClippedGeometricRatio) else "token"


def kl_place(row: Objective) -> str:
    """Where a KL divergence enters: the reward, the loss, the step, or nowhere."""
    where = ["reward"] if getattr(row.credit, "kl", 0.0) else []
    where += ["step"] if isinstance(row.penalty, TrustRegion) else [] if isinstance(row.penalty, NoPenalty) else ["loss"]
    return ", ".join(where) or "none"


def _rows(objective: Objective, run_numbers: Mapping[str, Any]) -> list[tuple[str, str]]:
    rows = [("loss", loss_formula(objective))]
    rows += [
        (f.name, words(getattr(objective, f.name)))
        for f in fields(Objective)
        if getattr(objective, f.name) not in ((), NoBonus(), NoControl())
    ]
    rows += [("statistics", _statistics(objective.credit)), ("KL", _kl(objective))]
    held = models(objective, ruled=run_numbers.get("reward_models") == 0)
    rows += [("clip", f"of the {level}" if (level := clip_level(objective)) != "none" else "none"), ("KL in", kl_place(objective))]
    rows += [("models held", f"{len(held)}: {', '.join(held)}"), ("signals", ", ".join(sorted(objective.needs)) or "none")]
    rows.append(("passes", "any number" if objective.passes is None else f"{objective.passes} over fresh samples"))
    rows.append(("unbiased for", unbiased_for(objective)))
    rows += [("note", note) for note in objective.notes()]
    samples, passes = int(run_numbers.get("samples", 2)), int(run_numbers.get("passes", 1))
    return rows + [("PROBLEM", problem) for problem in objective.check(samples, passes)]


def loss_formula(objective: Objective) -> str:
    """The loss in the names of the slots that the row fills."""
    value = f" + sum_t w_t {objective.value.coefficient:g} value_t" if objective.value.needs else ""
    penalty = "" if isinstance(objective.penalty, NoPenalty | TrustRegion) else " - penalty_t"
    bonus = " + bonus_t" if objective.bonus != NoBonus() else ""
    return f"-sum_t w_t {'c_t ' if objective.corrections else ''}(surrogate_t{penalty}{bonus}){value}"


def _preference_rows(row: Preference) -> list[tuple[str, str]]:
    held = models(row)
    return [
        ("loss", preference_card.loss_of(row)),
        *((slot, words(getattr(row, slot))) for slot in ("margin", "comparison", "link", "regulariser", "weight")),
        ("models held", f"{len(held)}: {', '.join(held)}"),
        ("signals", ", ".join(sorted(row.needs)) or "none"),
        ("consistent for", preference_card.consistent_for(row)),
        *(("note", note) for note in row.notes()),
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
    if isinstance(credit, PartsRelative):
        return (
            f"standard deviation of each part in each group, and of their sum over the batch, divisor n - {credit.ddof}, + {credit.eps:g}"
        )
    if isinstance(credit, ProcessRelative):
        return f"standard deviation of the step rewards of each group, divisor n - {credit.ddof}, + {credit.eps:g}"
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
    beta = getattr(objective.penalty, "beta", 0.0)
    if beta and (pull := _pull(objective.penalty)):
        parts.append(f"{pull}, times {beta:g}")
    return "; ".join(parts) or "none"


def _pull(penalty: object) -> str:
    """Which divergence a penalty in the loss pulls along (algorithms.md, section 9)."""
    if isinstance(penalty, ExactKL):
        return "exact in the loss: the gradient of KL(policy || reference) of each state, prefixes frozen"
    if isinstance(penalty, OldKL):
        return "to the old policy, exact, in the loss: the gradient of KL(old || policy) of each state; it ties one step to the last, not to the reference"
    if not isinstance(penalty, K1 | K2 | K3):
        return ""
    name, whole = (
        type(penalty).__name__.lower() + (" of the whole answer" if penalty.level == "sequence" else ""),
        penalty.level == "sequence",
    )
    if penalty.weighted and isinstance(penalty, K1 | K3):
        return f"{name}, weighted by policy / old, in the loss: its gradient is that of KL(policy || reference), " + (
            "exact" if whole else "prefixes frozen"
        )
    if isinstance(penalty, K1):
        return f"{name} in the loss: expected gradient 0, it pulls nowhere"
    if penalty.weighted:
        return f"{name}, weighted by policy / old, in the loss: a gradient of no divergence"
    along = "KL(policy || reference)" if isinstance(penalty, K2) else "KL(reference || policy)"
    if whole:
        return f"{name} in the loss: its gradient is that of {along}, exact"
    return f"{name} in the loss: pulls along {along}, prefixes frozen" + (
        "; the limit is not the tilted reference" if isinstance(penalty, K3) else ""
    )


def unbiased_for(objective: Objective) -> str:
    """What the expected gradient is at policy = old with an outcome reward, and what becomes of it after (algorithms.md, section 8)."""
    credit = objective.credit
    if isinstance(credit, Imitate):
        what = (
            "likelihood"
            if not isinstance(objective.surrogate, ProbabilityScore)
            else "summed probability of the tokens (the gradient of p, not of log p)"
        )
        return f"the {what} of the demonstrations" if credit.keep == "all" else f"the {what} of the best answers, not the gradient of J"
    if isinstance(credit, Teacher):
        how = (
            "of each token, prefixes frozen"
            if credit.discount == 0
            else "of whole answers, exact"
            if credit.discount == 1
            else "of neither tokens nor answers"
        )
        return f"-grad KL(policy || teacher) {how}; {_average_effect(objective, 'the divergence') or 'exact'}; stated at policy = old"
    if isinstance(credit, PartsRelative):
        return "the sum of the parts, each on the scale of its spread in its group: not the gradient of J"
    if isinstance(credit, ProcessRelative):
        return "the normalised step rewards still to come, each group on a scale of its own: not the gradient of J"
    kl = getattr(credit, "kl", 0.0)
    goal = f"J = E[R] - {kl:g} KL(policy || reference)" if kl else "J = E[R]"
    parts = [_credit_target(credit), _average_effect(objective), goal]
    if any(isinstance(correction, HighEntropy) for correction in objective.corrections):
        parts.append("on the actions of high entropy alone: not the gradient of J")
    if type(objective.surrogate) not in (Score, Importance) or getattr(objective.ratio, "bounded", False):
        parts.append("stated at policy = old; away from it the gate trades bias for stability")
    elif isinstance(objective.surrogate, Importance) and not isinstance(objective.ratio, ProductRatio):
        parts.append("stated at policy = old; away from it exact to first order")
    return "; ".join(part for part in parts if part)


def _credit_target(credit: object) -> str:
    if isinstance(credit, Return):
        return "grad J exactly"
    if isinstance(credit, ReturnToGo):
        exact = "(1 - 1/G) grad J" if credit.baseline == "group_mean" else "grad J exactly (any baseline of the state)"
        return exact + _discounting(credit.gamma) + (", over sigma as the batch grows (error O(1/B))" if credit.whitened else "")
    if isinstance(credit, GAE):
        exact = "grad J if lam = 1 or the critic is exact, else biased by its error" + _discounting(credit.gamma)
        return exact + (", over sigma as the batch grows" if credit.whitened else "")
    if isinstance(credit, GroupRelative):
        lone = credit.centre == "leave_one_out"
        if credit.scale == "none":
            return "grad J exactly, for every G >= 2" if lone else "(1 - 1/G) grad J"
        if credit.scale == "group_std":
            return "with 0/1 rewards each prompt's grad p times a weight w_G(p), 1/sqrt(p (1 - p)) for large G; with general rewards nothing simple"
        return ("grad J" if lone else "(1 - 1/G) grad J") + " over sigma as the batch grows"
    return "not known for this credit"


def _discounting(gamma: float) -> str:
    return "" if gamma == 1 else f", but with gamma {gamma:g} and without the factor gamma^t it is the gradient of no function"


def _average_effect(objective: Objective, goal: str = "J") -> str:
    average = objective.average
    if isinstance(average, PerBudget):
        return "" if average.length == 1 else f"divided by the constant length {average.length}"
    if isinstance(average, TokenAverage):
        return "with the token average consistent for it over E[length], bias O(1/B)"
    if isinstance(average, SequenceAverage):
        if isinstance(objective.ratio, ProductRatio):
            return ""
        relative = isinstance(objective.credit, GroupRelative)
        aim = ", so that J becomes E[(R - J) / n]: not J itself" if relative else ": not the gradient of J" if goal == "J" else ""
        return f"with each answer divided by its length{aim}"
    return "with an average of your own"
