"""The audit finds and names planted mistakes, says what sound rows are, and agrees with the cards and with its own page."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from scripts import load
from torch import Tensor

from tilt.objectives import (
    ALGORITHMS,
    PREFERENCES,
    Average,
    Credit,
    Credited,
    EntropyBonus,
    GroupRelative,
    Layout,
    NoRatio,
    Objective,
    PerBudget,
    Return,
    Rewards,
    Score,
    SequenceAverage,
    Signals,
    Surrogate,
)
from tilt.objectives.card import _kl, unbiased_for
from tilt.oracle.audit import Audit, audit, plain
from tilt.oracle.checks import all_checks
from tilt.oracle.estimand import BEST, LIKELIHOOD, PER_LENGTH, PROBABILITY, TOKEN_KL, Estimand, J, estimand, named, pull
from tilt.oracle.pairs import audit_pairs
from tilt.segments import group_count, group_mean, group_std, group_sum, spread

DOCS = Path(__file__).parents[2] / "docs"
LOO = GroupRelative("leave_one_out", "none")


# ------------------------------------------------------------------------------------------------- planted mistakes


@dataclass(frozen=True)
class SelfMean(Credit):
    """The mean of the group, this answer included, and silent about it."""

    needs = frozenset[str]()
    compares = True

    def __call__(self, rewards: Rewards, signals: Signals, layout: Layout) -> Credited:
        relative = rewards.total - group_mean(rewards.total, layout, rewards.scored)[layout.prompt]
        return Credited(spread(relative, layout), spread(relative, layout), rewards.scored)


@dataclass(frozen=True)
class Liar(SelfMean):
    """The same under the name of leave-one-out."""

    centre: str = "leave_one_out"


@dataclass(frozen=True)
class Honest(SelfMean):
    """The same, and it says so."""

    centre: str = "mean"


@dataclass(frozen=True)
class Unmasked(Credit):
    """Leave-one-out over every answer, also those that nobody could score."""

    needs = frozenset[str]()
    compares = True

    def __call__(self, rewards: Rewards, signals: Signals, layout: Layout) -> Credited:
        every, total = torch.ones_like(rewards.scored), rewards.total
        others = (group_count(layout, every)[layout.prompt] - 1).clamp(min=1)
        relative = total - (group_sum(total, layout, every)[layout.prompt] - total) / others
        return Credited(spread(relative, layout), spread(relative, layout), every)


@dataclass(frozen=True)
class HalfMasked(Unmasked):
    """Unscored answers are not trained on, but stand in the baseline with reward 0."""

    def __call__(self, rewards: Rewards, signals: Signals, layout: Layout) -> Credited:
        return Unmasked.__call__(self, rewards, signals, layout)._replace(counted=rewards.scored)


@dataclass(frozen=True)
class Clamped(Credit):
    """(R - mean) / max(std, 1e-8)."""

    centre: str = "mean"
    needs = frozenset[str]()
    compares = True

    def __call__(self, rewards: Rewards, signals: Signals, layout: Layout) -> Credited:
        away = rewards.total - group_mean(rewards.total, layout, rewards.scored)[layout.prompt]
        relative = away / group_std(rewards.total, layout, rewards.scored, 1).clamp(min=1e-8)[layout.prompt]
        return Credited(spread(relative, layout), spread(relative, layout), rewards.scored)


@dataclass(frozen=True)
class Thief(Credit):
    """Reads the critic without asking for it."""

    needs = frozenset[str]()
    compares = False

    def __call__(self, rewards: Rewards, signals: Signals, layout: Layout) -> Credited:
        return Credited(rewards.total[layout.sequence] - signals.values, signals.values, rewards.scored)


@dataclass(frozen=True)
class Placed(Credit):
    """Takes the answer before in the batch for the other answer of the group."""

    needs = frozenset[str]()
    compares = True

    def __call__(self, rewards: Rewards, signals: Signals, layout: Layout) -> Credited:
        relative = rewards.total - rewards.total.roll(1)
        return Credited(spread(relative, layout), spread(relative, layout), rewards.scored)


@dataclass(frozen=True)
class Flipped(Surrogate):
    def __call__(self, ratio: Tensor, logprobs: Tensor, advantages: Tensor) -> Tensor:
        return -logprobs * advantages


@dataclass(frozen=True)
class MicroMean(Surrogate):
    def __call__(self, ratio: Tensor, logprobs: Tensor, advantages: Tensor) -> Tensor:
        return logprobs * advantages / len(logprobs)


@dataclass(frozen=True)
class Deaf(Surrogate):
    def __call__(self, ratio: Tensor, logprobs: Tensor, advantages: Tensor) -> Tensor:
        return logprobs * 0.0


@dataclass(frozen=True)
class NoStop(Average):
    def __call__(self, layout: Layout, counted: Tensor) -> Tensor:
        return PerBudget(1)(layout, counted).index_fill(0, layout.last, 0.0)


@dataclass(frozen=True)
class NoStart(Average):
    def __call__(self, layout: Layout, counted: Tensor) -> Tensor:
        return PerBudget(1)(layout, counted).index_fill(0, layout.starts, 0.0)


@dataclass(frozen=True)
class LastCount(Average):
    """Divides by the number of actions of the batch before."""

    seen: list[int] = field(default_factory=list)

    def __call__(self, layout: Layout, counted: Tensor) -> Tensor:
        count = self.seen[-1] if self.seen else layout.actions
        self.seen.append(layout.actions)
        return spread(counted, layout).to(torch.float64) / count


@dataclass(frozen=True)
class Recollection(Credit):
    """Subtracts the mean reward of the batch before."""

    seen: list[Tensor] = field(default_factory=list)
    needs = frozenset[str]()
    compares = False

    def __call__(self, rewards: Rewards, signals: Signals, layout: Layout) -> Credited:
        before = self.seen[-1] if self.seen else rewards.total.mean()
        self.seen.append(rewards.total.mean())
        return Credited(spread(rewards.total - before, layout), spread(rewards.total, layout), rewards.scored)


@dataclass(frozen=True)
class CountsDropped(Average):
    """1 / actions, those of answers that were dropped included."""

    def __call__(self, layout: Layout, counted: Tensor) -> Tensor:
        return spread(counted, layout).to(torch.float64) / layout.actions


def row(credit: Credit = LOO, surrogate: Surrogate = Score(), average: Average = PerBudget(1)) -> Objective:  # noqa: B008
    return Objective(credit, NoRatio(), surrogate, average)


PLANTED = {
    "baseline includes self": row(SelfMean()),
    "baseline includes self (declared otherwise)": row(Liar()),
    "mask dropped": row(Unmasked()),
    "mask dropped (in the baseline)": row(HalfMasked()),
    "sign flipped": row(surrogate=Flipped()),
    "mean over the micro-batch": row(surrogate=MicroMean()),
    "stop token unweighted": row(average=NoStop()),
    "first token unweighted": row(average=NoStart()),
    "stale normaliser": row(average=LastCount()),
    "stale normaliser: it counts answers that were dropped": row(average=CountsDropped()),
    "it remembers the batch before": row(Recollection()),
    "it trains on rounding noise": row(Clamped()),
    "it reads a signal that it does not ask for": row(Thief()),
    "it depends on the order of the batch": row(Placed()),
    "nothing is learned": row(surrogate=Deaf()),
}


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_mistake_is_found_and_named(name: str) -> None:
    """It alone: what follows from it is not blamed too."""
    found = audit(PLANTED[name], "mine")
    assert [mistake.name for mistake in found.mistakes] == [re.sub(r" \(.*\)", "", name)]
    assert not found.sound and found.verdict == f"do not train with it: {found.mistakes[0].name}"
    assert found.mistakes[0].evidence and found.mistakes[0].mend
    json.dumps(plain(found), allow_nan=False)


def test_a_declared_mean_is_not_blamed() -> None:
    found = audit(row(Honest()), "mine")
    assert found.sound and found.statement == "(1 - 1/G) grad J; J = E[R]"
    assert audit(row(GroupRelative("mean", "none")), "mine").sound


def test_a_row_that_fails_is_told_without_a_trace() -> None:
    class Broken(Score):
        def __call__(self, ratio: Tensor, logprobs: Tensor, advantages: Tensor) -> Tensor:
            if len(logprobs) > 12:
                raise ValueError("too many")
            return super().__call__(ratio, logprobs, advantages)

    found = audit(row(surrogate=Broken()), "mine")
    assert found.mistakes[0].name == "it fails on memory" and "too many" in found.mistakes[0].evidence


# ---------------------------------------------------------------------------------------------------- sound rows


def test_rloo_is_grad_j_and_its_own_measure() -> None:
    found = audit(ALGORITHMS["rloo"], "rloo")
    assert found.statement == "grad J; J = E[R] - 0.05 KL(policy || reference)" and found.sound
    assert found.cosine == pytest.approx(1) and found.error < 1e-12 and found.worth == pytest.approx(1)


def test_the_statements_of_rows() -> None:
    """What the numbers say of a few rows, in the words of the report."""
    said = {name: audit(ALGORITHMS[name], name) for name in ("ppo", "grpo", "high_entropy")}
    assert said["ppo"].statement == "grad J / E[n] / sigma as the batch grows; J = E[R] - 0.05 KL(policy || reference)"
    assert (
        said["ppo"].critic.startswith("with an exact critic")
        and said["ppo"].growth[0] > said["ppo"].growth[1] > said["ppo"].growth[2] > 0.01
    )
    assert said["grpo"].statement.startswith("with rewards 0 and 1 each prompt's grad E[(R - p) / n] times its own weight: 1.400, 1.456")
    assert (
        said["grpo"].pull
        == "-0.04 grad KL(reference || policy) with prefixes frozen, summed over actions; the row's average then weighs the answers"
    )
    assert said["high_entropy"].statement.startswith("biased") and all(one.sound for one in said.values())


def test_weights_of_prompts_are_those_of_the_closed_form() -> None:
    """w_4(p) of rewards 0 and 1 at p = 1/2 and 1/8, sample standard deviation."""
    from math import comb, sqrt

    def weight(p: float) -> float:
        return sum(comb(4, k) * p**k * (1 - p) ** (4 - k) * sqrt(k * (4 - k)) for k in range(5)) / (4 * p * (1 - p)) * sqrt(3 / 4)

    assert estimand(ALGORITHMS["luspo"]).weights == pytest.approx((weight(1 / 2), weight(1 / 8)), abs=1e-10)
    assert estimand(ALGORITHMS["dapo"]).weights == pytest.approx((weight(1 / 2), weight(1 / 8)), abs=1e-10)


def test_more_statements_of_estimands() -> None:
    assert estimand(row(Return(), average=SequenceAverage())).holds == "not", "without a baseline 1/n weighs R, not R - J"
    found = estimand(row(LOO, average=SequenceAverage()))
    assert (found.target, found.holds) == (PER_LENGTH, "exactly") and found.multiple == pytest.approx(1)
    twice = estimand(row(replace(LOO, kl=0.3)))
    assert twice.kl == pytest.approx(0.3, abs=1e-9) and twice.multiple == pytest.approx(1)
    bonus = pull(replace(row(), bonus=EntropyBonus(0.25)))
    assert (
        bonus is not None
        and (bonus.along, bonus.holds) == ("the entropy with prefixes frozen", "exactly")
        and bonus.multiple == pytest.approx(0.25)
    )


def test_multiples_have_names() -> None:
    assert named((1.0, 1.0, 1.0)) == "1" and named((-1.0, -1.0, -1.0)) == "-1"
    assert named((0.5, 2 / 3, 0.75)) == "(1 - 1/G)" and named((0.05, 2 / 30, 0.075)) == "(1 - 1/G) / 10"
    assert named((0.25, 0.25, 0.25)) == "1 / 4" and named((0.3, 0.3, 0.3)) == "0.3" and named((0.6, 0.8, 0.9), 1e-6) == "1.2 (1 - 1/G)"
    assert named((0.1, 0.5, 0.2)) == ""


@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_row_passes_every_check(name: str) -> None:
    found = all_checks(ALGORITHMS[name])
    assert len(found) == 9 and all(check.passed for check in found), [check for check in found if not check.passed]


# ------------------------------------------------------------------------------------------------ cards and pages


def claimed(text: str) -> tuple[str, str, bool]:
    """Target, how far it holds, and whether prompts have weights, as a card says."""
    if "not the gradient of J" in text and "best answers" not in text:
        return J, "not", False
    target = J
    for words, meant in (("likelihood of the demonstrations", LIKELIHOOD), ("probability of the tokens", PROBABILITY), ("best answers", BEST), ("of each token, prefixes frozen", TOKEN_KL), ("divided by its length", PER_LENGTH)):  # fmt: skip
        target = meant if target == J and words in text else target
    imitates = target in (LIKELIHOOD, PROBABILITY, BEST)
    grows = "consistent" in text or "as the batch grows" in text or imitates
    return target, "as the batch grows" if grows else "exactly", "with 0/1 rewards" in text


def agrees(text: str, found: Estimand) -> bool:
    return claimed(text) == (found.target, found.holds, bool(found.weights)) and ("no function" in text) == (found.gamma != 1)


SOME = ("sft", "rloo", "ppo_sequence", "sapo", "distill", "lite_ppo")


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in SOME else pytest.mark.slow) for n in ALGORITHMS])
def test_a_card_says_what_enumeration_finds(name: str) -> None:
    """`unbiased for`, the KL in the reward, and where the penalty pulls."""
    row, found = ALGORITHMS[name], estimand(ALGORITHMS[name])
    assert agrees(unbiased_for(row), found), (unbiased_for(row), found)
    assert found.holds == "not" or found.binary or found.kl == pytest.approx(getattr(row.credit, "kl", 0.0), abs=1e-8)
    if (pulls := pull(row)) is not None and pulls.multiple and "entropy" not in pulls.along:
        along, _, frozen = pulls.along.partition(" with ")
        assert along in _kl(row) and bool(frozen) == ("prefixes frozen" in _kl(row)), (_kl(row), pulls)


def test_the_agreement_can_fail() -> None:
    assert not agrees(unbiased_for(ALGORITHMS["rloo"]), estimand(ALGORITHMS["grpo_r1"]))
    assert not agrees(unbiased_for(ALGORITHMS["ppo"]), estimand(ALGORITHMS["rloo"]))


def script() -> ModuleType:
    return load(DOCS / "make_audit.py")


def recorded() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((DOCS / "data" / "audit.json").read_text(encoding="utf-8"))
    return found


def page_row(name: str) -> str:
    (line,) = (line for line in (DOCS / "audit.md").read_text(encoding="utf-8").splitlines() if line.startswith(f"| `{name}` |"))
    return line


def test_the_page_has_every_row_and_says_what_the_record_says() -> None:
    figures = recorded()
    assert list(figures) == [*ALGORITHMS, *PREFERENCES], "run `python docs/make_audit.py`"
    for name, told in figures.items():
        assert next(iter(told.values())).replace("|", "\\|") in page_row(name) and told["verdict"] in page_row(name)
        assert told["verdict"].startswith(("sound", "usable", "biased"))


def test_the_record_says_what_the_cards_say() -> None:
    """Without enumerating again: the words of both."""
    for name, told in ((name, recorded()[name]) for name in ALGORITHMS):
        target, holds, weighed = claimed(unbiased_for(ALGORITHMS[name]))
        text = told["expected gradient"]
        assert text.startswith("biased") == (holds == "not") and ("as the batch grows" in text) == (holds == "as the batch grows"), name
        assert text.startswith("with rewards 0 and 1") == weighed and ("/ n]" in text) == (target == PER_LENGTH), name


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in ("raft", "dr_grpo") else pytest.mark.slow) for n in ALGORITHMS])
def test_the_page_is_in_step(name: str) -> None:
    found: Audit = audit(ALGORITHMS[name], name)
    made = script()
    assert made.table(made.COLUMNS, [made.cells(found)]).splitlines()[2] == page_row(name), "run `python docs/make_audit.py`"
    assert made.recorded(found) == recorded()[name]


def test_checks_are_listed_in_the_page() -> None:
    page = (DOCS / "audit.md").read_text(encoding="utf-8")
    names: Sequence[str] = [check.name for check in all_checks(ALGORITHMS["rloo"])]
    listed = page.partition("| check | how |")[2].partition("\n\n")[0]
    for name in names:
        assert name.removeprefix("split over ") in listed, name
    for name in PLANTED:
        assert re.sub(r" \(.*\)", "", name) in listed, name


@pytest.mark.parametrize("name", PREFERENCES)
def test_the_second_table_is_in_step(name: str) -> None:
    found, made = audit_pairs(PREFERENCES[name], name), script()
    assert made.table(made.PAIR_COLUMNS, [made.pair_cells(found)]).splitlines()[2] == page_row(name), "run `python docs/make_audit.py`"
    assert made.recorded(found) == recorded()[name]
