"""The audit of a row: what its expected gradient is, how noisy it is beside RLOO's, whether the batch's form matters, and a verdict to act on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from time import perf_counter

from tilt.objectives import GroupRelative, NoRatio, Objective, PerBudget, Score, TokenAverage
from tilt.oracle import estimand as found_by
from tilt.oracle import token_mdp as exact
from tilt.oracle.checks import FOLLOWS, Check, all_checks
from tilt.oracle.estimand import BEST, LIKELIHOOD, NOTHING, PER_LENGTH, PROBABILITY, TOKEN_KL, WHOLE_KL, Estimand, J, Pull
from tilt.oracle.expectation import Situation, compare, couples, effective_samples, expect, limit
from tilt.oracle.scene import Scene, policy_part, without_kl

SMALL = "2 prompts x 2 answers"


@dataclass(frozen=True)
class Mistake:
    """A defect: its name, the evidence, and how to mend it."""

    name: str
    evidence: str
    mend: str


@dataclass(frozen=True)
class Audit:
    """Everything that was found about a row; `mistakes` decide the verdict. Numbers are of small batches: two answers to each of two prompts."""

    name: str
    estimand: Estimand
    statement: str
    cosine: float
    error: float
    noise: float
    noise_rloo: float
    critic: str
    pull: str
    away: str
    growth: tuple[float, ...]
    checks: tuple[Check, ...]
    mistakes: tuple[Mistake, ...]
    verdict: str
    seconds: float

    @property
    def sound(self) -> bool:
        return not self.mistakes

    @property
    def worth(self) -> float:
        """How many answers of RLOO's tell as much as one of this row's, about the direction that each follows."""
        return self.noise_rloo / self.noise if self.noise else float("inf")


def audit(row: Objective, name: str = "custom") -> Audit:
    """Audit a row on the enumerated MDP; some seconds."""
    began = perf_counter()
    checks = tuple(all_checks(row))
    mistakes = _causes(checks)
    nothing = Estimand(NOTHING, "not", 0.0, cosine=0.0, error=1.0)
    if not checks[0].passed:
        return _closed(name, nothing, "no expected gradient: it depends on the batches before", checks, mistakes, began)
    try:
        found = found_by.estimand(row)
        statement, mistakes = _statement(row, found), mistakes + _turned(found)
        if found.target == NOTHING and not mistakes:
            mistakes.append(Mistake("nothing is learned", "the expected gradient is 0", "the advantages do not reach the loss"))
        noise, rloo = _noises(row, found)
        critic, pull, away = _critic(row, found), _pull(found_by.pull(row)), _away(row, found)
        growth = found_by.growth(row) if found.target == J and found.holds == "as the batch grows" and not found.binary else ()
    except (ArithmeticError, AssertionError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        mistakes.append(Mistake("it fails on the enumerated batches", f"{type(error).__name__}: {error}", "mend the error first"))
        return _closed(name, nothing, "no expected gradient: the row fails", checks, mistakes, began)
    return Audit(
        name, found, statement, found.cosine, found.error, noise, rloo, critic, pull, away, growth, checks, tuple(mistakes),
        _verdict(found, mistakes),
        perf_counter() - began,
    )  # fmt: skip


def _causes(checks: Sequence[Check]) -> list[Mistake]:
    """Each mistake once, without what follows from an earlier one."""
    found: dict[str, Mistake] = {}
    for check in checks:
        if not check.passed and not any(check.mistake in FOLLOWS.get(name, ()) for name in found):
            found.setdefault(check.mistake, Mistake(check.mistake, check.seen, check.mend))
    return list(found.values())


def _closed(name: str, found: Estimand, statement: str, checks: tuple[Check, ...], mistakes: Sequence[Mistake], began: float) -> Audit:
    nan = float("nan")
    return Audit(
        name,
        found,
        statement,
        nan,
        nan,
        nan,
        nan,
        "",
        "",
        "",
        (),
        checks,
        tuple(mistakes),
        _verdict(found, mistakes),
        perf_counter() - began,
    )


# ----------------------------------------------------------------------------------------------------- statements


def _statement(row: Objective, found: Estimand) -> str:
    """What the expected gradient is, in one line."""
    where = "" if found.holds == "exactly" else " as the batch grows"
    if found.target == NOTHING:
        return "0"
    if found.target == J and found.weights:
        weights = ", ".join(f"{w:.3f}" for w in found.weights)
        length = " / E[n]" if where and isinstance(row.average, TokenAverage) else ""
        return f"with rewards 0 and 1 each prompt's grad p{length} times its own weight{where}: {weights} for p = 1/2, 1/8 and G = 4; with others not grad J"
    if found.target == PER_LENGTH and found.weights:
        weights = ", ".join(f"{w:.3f}" for w in found.weights)
        return f"with rewards 0 and 1 each prompt's grad E[(R - p) / n] times its own weight{where}: {weights} for p = 1/2, 1/8 and G = 4; not grad J"
    if found.holds == "not":
        return f"no multiple of grad J, at no size of the batch (nearest: {found.target})" if found.target != J else "biased: not a multiple of grad J, at no size of the batch"  # fmt: skip
    if found.target != J:
        return f"{found.multiple:.4g} grad {found.target}{where}"
    return f"{_times(row, found)}{where}; J = {found.goal}"


def _times(row: Objective, found: Estimand) -> str:
    """The multiple of grad J as a formula, and what a discount makes of J."""
    grad = "grad J" if found.gamma == 1 else f"sum_t grad l_t sum_(k>=t) {found.gamma:g}^(k-t) r_k, the gradient of no function,"
    grown = found.holds != "exactly"
    free = grown and found_by.scale_free(row)
    text = found_by.named(found_by.multiples(row), 5e-3 if free else 1e-7)
    length = " / E[n]" if grown and (isinstance(row.average, TokenAverage) if free else text) else ""
    if free:
        return f"{'-' if found.multiple < 0 else ''}{'(1 - 1/G) ' if '(1 - 1/G)' in text else ''}{grad}{length} / sigma"
    if text in ("1", "-1"):
        return f"{text[:-1]}{grad}{length}"
    return f"{text or f'{found.multiple:.4g}'} {grad}{length}"


def _turned(found: Estimand) -> list[Mistake]:
    """A gradient that points the other way."""
    down = found.multiple < 0 or any(w < 0 for w in found.weights) or (found.holds == "not" and found.cosine < -0.3)
    if not down:
        return []
    goal = found.target if found.target != J else "the expected reward"
    return [Mistake("sign flipped", f"training lowers {goal}: cosine {found.cosine:.3f}", "loss = -sum of weight * gain: raise the gain")]


def _noises(row: Objective, found: Estimand) -> tuple[float, float]:
    """Variance over squared length, per answer, of the policy part and of RLOO on the same rewards."""
    at = found_by.setting_of(row, found)
    rloo = Objective(GroupRelative("leave_one_out", "none", kl=getattr(row.credit, "kl", 0.0)), NoRatio(), Score(), PerBudget(1))
    return expect(policy_part(row), at).noise, expect(rloo, found_by.scene_of(row).at(rloo)).noise


def _critic(row: Objective, found: Estimand) -> str:
    """Whether the critic must be right."""
    if "values" not in row.needs:
        return ""
    plain = policy_part(row)
    scene = Scene.fit(plain)
    wrong = scene.at(plain, critic=scene.at(plain).critic + scene.mdp.tilted(0.8, seed=7)[..., 0])
    mean = limit(plain, wrong) if couples(plain, wrong) else expect(plain, wrong).mean
    aim = exact.score_mean(
        scene.mdp,
        scene.policy,
        scene.policy,
        exact.to_go(scene.mdp, scene.policy, kl=found.kl or getattr(row.credit, "kl", 0.0), gamma=found.gamma),
    )
    near = compare(mean, aim)
    if found.holds == "not":
        return f"with a wrong critic the cosine to grad J is {near.cosine:.3f}"
    return "any critic" if near.residual < found_by.TIGHT else f"with an exact critic; with a wrong one cosine {near.cosine:.3f}"


def _pull(found: Pull | None) -> str:
    """What penalty and bonus add to the gradient."""
    if found is None:
        return ""
    if not found.multiple:
        return "nothing at policy = old"
    where = {"exactly": ", exactly", "as the batch grows": ", as the batch grows", "not": f", nearly: cosine {found.cosine:.3f}"}[
        found.holds
    ]
    if found.averaged:
        where = ", summed over actions; the row's average then weighs the answers"
    return f"{found.multiple:+.3g} grad {found.along}{where}"


def _away(row: Objective, found: Estimand) -> str:
    """What is left of the claim one step away from old, for rows that may take several steps on a batch."""
    if row.passes == 1 or found.target != J or found.binary or found.holds == "not":
        return ""
    bare = without_kl(policy_part(row))
    scene = Scene.fit(bare)
    old = scene.policy + scene.mdp.tilted(0.1, seed=8)
    at = Situation.of(scene.mdp, 2, scene.policy, old=old, critic=exact.state_values(scene.mdp, old, gamma=found.gamma))
    aim = exact.score_mean(scene.mdp, scene.policy, scene.policy, exact.to_go(scene.mdp, scene.policy, gamma=found.gamma))
    near, far = compare(expect(bare, at).mean, aim), exact.divergence(scene.mdp, old, scene.policy).item()
    if near.residual < found_by.TIGHT:
        return "still exact"
    return f"cosine {near.cosine:.4f} to grad J at KL(old || policy) = {far:.3f} ({effective_samples(at):.0f} % effective samples)"


def _verdict(found: Estimand, mistakes: Sequence[Mistake]) -> str:
    """What a user should do."""
    if mistakes:
        return "do not train with it: " + "; ".join(dict.fromkeys(mistake.name for mistake in mistakes))
    if found.target == J and found.gamma != 1:
        return "usable: it follows the discounted reward without the factor gamma^t; gamma 1 follows J"
    if found.target == J and found.weights:
        return (
            "usable: it raises each prompt's success, prompts weighed by difficulty; with rewards of many values the direction is its own"
        )
    if found.target == J and found.holds == "exactly":
        return (
            "sound: it raises J" if abs(found.multiple - 1) < found_by.TIGHT else "sound: it raises J, the learning rate takes the multiple"
        )
    if found.target == J and found.holds == "as the batch grows":
        return f"sound in large batches: the bias in {SMALL} is {100 * found.error:.0f} % of the gradient and falls as 1 / batch"
    if found.target == PER_LENGTH:
        return "usable: it favours short right answers and long wrong ones; average per_budget follows J"
    if found.target in (LIKELIHOOD, PROBABILITY, BEST):
        return "sound for imitation; it does not follow grad J"
    if found.target in (WHOLE_KL, TOKEN_KL):
        return "sound for distillation; it reads no reward"
    return f"biased: its direction is not grad J's at any batch size (cosine {found.cosine:.2f}); choose it for other reasons than J"


def plain(found: Audit) -> dict[str, object]:
    """An audit as nested dictionaries; infinite and absent numbers are None."""
    from dataclasses import asdict
    from math import isfinite

    def clean(x: object) -> object:
        if isinstance(x, dict):
            return {key: clean(value) for key, value in x.items()}
        if isinstance(x, list | tuple):
            return [clean(value) for value in x]
        return None if isinstance(x, float) and not isfinite(x) else x

    return {key: clean(value) for key, value in (asdict(found) | {"worth": found.worth, "sound": found.sound}).items()}
