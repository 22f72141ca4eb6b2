"""The audit of rows on judged answers: its world against plain loops, planted mistakes, and the cards of the second table."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from tilt.objectives import PREFERENCES, Answers, ImplicitReward, Logistic, Pairs, Preference
from tilt.objectives.preference_card import consistent_for
from tilt.oracle import token_mdp as exact
from tilt.oracle.pairs import WORTH, World, audit_pairs

# ---------------------------------------------------------------------------------------------------- the world


@pytest.mark.parametrize("wrong", [0, 1])
def test_labels_come_as_often_as_bradley_terry_has_them(wrong: int) -> None:
    world = World.of(wrong)
    worth = [WORTH[len(a) - (a[-1] == 1)] for a in world.mdp.answers]
    labels = list(zip(world.first.tolist(), world.second.tolist()))
    assert len(labels) == 6 * (450 if wrong else 45)
    for i in range(4):
        for j in range(4):
            if i != j:
                chance = worth[i] / (worth[i] + worth[j])
                share = labels.count((i, j)) / (labels.count((i, j)) + labels.count((j, i)))
                assert share == pytest.approx((1 - wrong / 10) * chance + wrong / 10 * (1 - chance), abs=1e-12)


def test_statistics_of_answers_equal_loops() -> None:
    world = World.of()
    policy = world.mdp.tilted(0.7, seed=2)
    pairs, said, anchor = world.policy_pairs(policy), policy.log_softmax(-1)[0], world.mdp.reference.log_softmax(-1)[0]
    for n in range(0, len(world.first), 11):
        for side, own, other in ((pairs.chosen, world.first, world.second), (pairs.rejected, world.second, world.first)):
            mine, theirs = world.mdp.answers[own[n]], world.mdp.answers[other[n]]
            places = [(world.mdp.prefixes.index(mine[:t]), token) for t, token in enumerate(mine)]
            shared = min(len(mine), len(theirs))
            for statistic, logits, upto in (("scores", said, 9), ("reference", anchor, 9), ("heads", said, shared), ("reference_heads", anchor, shared)):  # fmt: skip
                assert getattr(side, statistic)[n].item() == pytest.approx(sum(logits[place].item() for place in places[:upto]), abs=1e-12)
            assert side.lengths[n] == len(mine)


def test_the_loss_is_the_mean_over_all_labels() -> None:
    """DPO by hand: -mean over pairs and both labels of p log sigmoid(h)."""
    world = World.of()
    policy, total = world.mdp.tilted(0.7, seed=2), 0.0
    u = (exact.answer_logprobs(world.mdp, policy) - exact.answer_logprobs(world.mdp, world.mdp.reference))[0]
    worth = [WORTH[len(a) - (a[-1] == 1)] for a in world.mdp.answers]
    for i in range(4):
        for j in range(4):
            if i != j:
                total -= worth[i] / (worth[i] + worth[j]) / 6 * logsigmoid(0.1 * (u[i] - u[j])).item()
    assert PREFERENCES["dpo"].loss(world.policy_pairs(policy)).item() == pytest.approx(total, abs=1e-12)


# ---------------------------------------------------------------------------------------------- planted mistakes


@dataclass(frozen=True)
class Link:
    """A loss of one's own, by what it gets wrong."""

    fault: str

    def __call__(self, margin: Tensor, probability: Tensor) -> Tensor:
        if self.fault == "sign flipped":
            return -logsigmoid(-margin)
        if self.fault == "mean over the micro-batch":
            return -logsigmoid(margin) / len(margin)
        if self.fault == "it depends on the order of the batch":
            return -logsigmoid(margin) * torch.linspace(0.5, 1.5, len(margin))
        if self.fault == "it overflows":
            return (1 + (-margin * 100).exp()).log()
        raise ValueError("too many pairs")


@dataclass(frozen=True)
class Silent(ImplicitReward):
    """Reads the reference and does not say so."""

    needs: ClassVar[frozenset[str]] = frozenset()  # type: ignore[assignment]


FAULTS = ["sign flipped", "mean over the micro-batch", "it depends on the order of the batch", "it overflows"]


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_mistake_is_found_and_named(fault: str) -> None:
    found = audit_pairs(Preference(ImplicitReward(0.1), Link(fault)), "mine")
    assert fault in [check.mistake for check in found.mistakes] and not found.sound
    assert found.verdict.startswith("do not train with it") and fault in found.verdict


def test_a_statistic_that_is_read_in_secret_is_found() -> None:
    found = audit_pairs(Preference(Silent(0.1), Logistic()), "mine")
    assert [check.mistake for check in found.mistakes] == ["it reads a signal that it does not ask for"]
    assert "reference" in found.mistakes[0].seen


def test_a_piece_that_looks_at_the_batch_and_does_not_say_so_is_found() -> None:
    """Sorted margins in the place of single ones: parts of the batch have other order statistics."""

    class Coupled(type(PREFERENCES["aot"].comparison)):  # type: ignore[misc]
        coupled: ClassVar[bool] = False

    row = replace(PREFERENCES["aot"], comparison=Coupled())
    assert "mean over the micro-batch" in [check.mistake for check in audit_pairs(row, "mine").mistakes]
    assert audit_pairs(PREFERENCES["aot"]).sound


# ------------------------------------------------------------------------------------------------------- cards


@pytest.mark.parametrize("name", PREFERENCES)
def test_a_card_says_what_enumeration_finds(name: str) -> None:
    """Stationary at the tilted policy (the true reward) if and only if the card says so, and nothing moves it from there."""
    row, found = PREFERENCES[name], audit_pairs(PREFERENCES[name], name)
    text = consistent_for(row)
    told = ("tilted policy reference * exp(reward" in text or "the true reward up to a constant" in text) and "moved from there" not in text
    assert found.sound, found.mistakes
    assert found.statement.startswith("stationary") == told or name == "rm_deepspeed_chat", (text, found.statement)


def test_robust_is_consistent_for_labels_that_are_wrong() -> None:
    assert audit_pairs(PREFERENCES["robust"]).statement.endswith("where 1 of ten labels are wrong")
    assert not audit_pairs(PREFERENCES["cdpo"]).statement.startswith("stationary")


def test_first_steps_from_the_reference() -> None:
    """Up in the expected reward, but for discopop, whose loss rises at indifference."""
    cosines: dict[str, Any] = {name: audit_pairs(row, name).cosine for name, row in PREFERENCES.items()}
    assert [name for name, cosine in cosines.items() if cosine < 0] == ["discopop"]
    assert isinstance(World.of().policy_pairs(World.of().mdp.reference), Pairs) and isinstance(World.of().pairs(torch.zeros(4).double(), torch.zeros(9).double()).chosen, Answers)  # fmt: skip
