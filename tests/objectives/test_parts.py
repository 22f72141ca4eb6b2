"""Credit from several rewards, and whitened rewards, against loops written from their formulas."""

from __future__ import annotations

import math
from dataclasses import replace
from statistics import fmean, stdev, variance

import pytest
import torch

from tilt.errors import UsageError
from tilt.objectives import ALGORITHMS, GAE, Layout, PartsRelative, ReturnToGo, Rewards, Signals

NAN = math.nan
LAYOUT = Layout.of([3, 1, 2, 4, 2, 1, 2, 3], [0, 0, 0, 0, 1, 1, 1, 1])
PARTS = {
    "right": [1.0, 0, 0, 1, 1, 1, 1, 1],
    "short": [-0.2, -0.5, NAN, -0.1, NAN, NAN, NAN, NAN],
    "kind": [0.3, 0.4, 0.1, NAN, 2.0, 5.0, 3.5, 9.0],
}
WEIGHTS = {"right": 1.0, "short": 0.5, "kind": 2.0}


def given(scored: list[bool] | None = None, **more) -> Rewards:
    parts = {name: torch.tensor(values) for name, values in PARTS.items()}
    total = sum(w * parts[name].nan_to_num() for name, w in WEIGHTS.items())
    seen = None if scored is None else torch.tensor(scored)
    return Rewards.of(total.double(), parts=parts, weights=WEIGHTS, scored=seen, actions=LAYOUT.actions, **more)


def credited(credit, rewards: Rewards, layout: Layout = LAYOUT) -> torch.Tensor:
    row = replace(ALGORITHMS["dapo"], credit=credit)
    return row.prepare(rewards, Signals.of(torch.zeros(layout.actions, dtype=torch.float64)), layout).advantages[layout.starts]


@pytest.mark.parametrize("scored", [None, [True] * 6 + [False, True]])
def test_parts_relative_is_its_loop(scored: list[bool] | None) -> None:
    """Each part less its mean over its deviation among the answers that have it, weighted, added, and normalised over the batch."""
    seen = scored or [True] * 8
    sums = [0.0] * 8
    for name, weight in WEIGHTS.items():
        for group in (range(4), range(4, 8)):
            values = [(i, float(torch.tensor(PARTS[name][i]))) for i in group if seen[i] and not math.isnan(PARTS[name][i])]
            if len({v for _, v in values}) < 2:
                continue
            mean, deviation = fmean(v for _, v in values), stdev(v for _, v in values)
            for i, v in values:
                sums[i] += weight * (v - mean) / deviation
    kept = [x for x, s in zip(sums, seen, strict=True) if s]
    expected = [(x - fmean(kept)) / stdev(kept) if s else 0.0 for x, s in zip(sums, seen, strict=True)]
    found = credited(PartsRelative(), given(scored))
    assert found.tolist() == pytest.approx(expected, abs=1e-6)  # parts are stored in float32
    assert float(found.std()) == pytest.approx(1.0, abs=1e-6) if scored is None else True


def test_parts_keep_apart_what_their_sum_confounds() -> None:
    """Groups whose answers earned (0, 0) (1, 0) and (0, 0) (1, 1): GRPO gives both pairs the same advantages, GDPO twice as much to the second."""
    layout = Layout.of([1, 1, 1, 1], [0, 0, 1, 1])
    parts = {"a": torch.tensor([0.0, 1, 0, 1]), "b": torch.tensor([0.0, 0, 0, 1])}
    rewards = Rewards.of((parts["a"] + parts["b"]).double(), parts=parts, actions=4)
    plain, apart = credited(ALGORITHMS["dapo"].credit, rewards, layout), credited(PartsRelative(), rewards, layout)
    assert torch.allclose(plain[:2], plain[2:]) and torch.allclose(2 * apart[:2], apart[2:]) and float(apart[3]) > 0


def test_equal_parts_give_exactly_nothing_and_one_part_is_a_group_on_the_batch_s_scale() -> None:
    layout = Layout.of([2, 1, 1, 3, 1, 1], [0, 0, 0, 1, 1, 1])
    same = Rewards.of(torch.full((6,), 0.3).double(), parts={"a": torch.full((6,), 0.3), "b": torch.full((6,), 0.1)}, actions=9)
    assert credited(PartsRelative(), same, layout).tolist() == [0.0] * 6 and PartsRelative().flat(same, layout).all()
    cancel = Rewards.of(torch.zeros(6), parts={"a": torch.arange(6.0), "b": -torch.arange(6.0)}, actions=9)
    assert not PartsRelative().flat(cancel, layout).any() and ALGORITHMS["dapo"].credit.flat(cancel, layout).all()
    one = Rewards.of(torch.tensor([0.0, 1, 5, 2, 2, 2.5]).double(), actions=9)
    group = credited(ALGORITHMS["dapo"].credit, one, layout)
    assert torch.allclose(credited(PartsRelative(), one, layout), group / group.std())
    half = Rewards.of(torch.tensor([1.0, 1, 1, 0, 1, 2]).double(), actions=9)
    assert credited(PartsRelative(), half, layout)[:3].tolist() == [0.0] * 3


def test_parts_that_cancel_leave_nothing_beside_a_group_that_differs() -> None:
    """Parts of .1 0 and 0 .3 disagree, equally on their own scales: exactly 0; the other group has the batch's mean 0 and deviation 1."""
    layout = Layout.of([1, 2, 1, 1], [0, 0, 1, 1])
    parts = {"a": torch.tensor([0.1, 0, 0, 1]), "b": torch.tensor([0.0, 0.3, 0, 1])}
    found = credited(PartsRelative(), Rewards.of((parts["a"] + parts["b"]).double(), parts=parts, actions=5), layout)
    assert found[:2].tolist() == [0, 0] and found[2:].tolist() == pytest.approx([-(1.5**0.5), 1.5**0.5], abs=1e-6)


def test_dense_rewards_are_one_more_part() -> None:
    layout = Layout.of([2, 2], [0, 0])
    steps = torch.tensor([1.0, 2, 0, 0]).double()
    rewards = Rewards.of(torch.tensor([0.0, 1]).double(), steps)
    assert credited(PartsRelative(), rewards, layout).tolist() == [0.0, 0.0]  # the two parts disagree, equally
    assert credited(PartsRelative(), replace(rewards, total=torch.zeros(2).double()), layout)[0] > 0


def test_a_part_of_weight_0_makes_no_difference() -> None:
    """As that of a judge of steps, whose rewards stand at the steps."""
    layout = Layout.of([1, 1], [0, 0])
    rewards = Rewards.of(torch.zeros(2).double(), parts={"a": torch.tensor([0.0, 1])}, weights={"a": 0.0}, actions=2)
    assert PartsRelative().flat(rewards, layout).tolist() == [True] and credited(PartsRelative(), rewards, layout).tolist() == [0.0, 0.0]


def test_the_scale_of_a_part_does_not_matter() -> None:
    base = credited(PartsRelative(), given())
    scaled = replace(given(), parts={name: 100 * x - 7 if name == "kind" else x for name, x in given().parts.items()})
    assert torch.allclose(base, credited(PartsRelative(), scaled), atol=1e-5)


def test_a_negative_epsilon_is_refused_and_one_answer_gives_no_signal() -> None:
    with pytest.raises(UsageError, match="eps"):
        PartsRelative(eps=-1.0)
    assert replace(ALGORITHMS["grpo"], credit=PartsRelative()).check(samples=1, passes=1)


# --- whitened rewards ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scored", [[True] * 3, [True, False, True]])
def test_whitened_rewards_are_their_loop(scored: list[bool]) -> None:
    """(r - mean) / sqrt(var + 1e-8) + mean over the actions of scored answers, divisor n - 1, before returns and before GAE."""
    lengths, kl, gamma, lam = [3, 1, 4], 0.1, 0.9, 0.8
    layout = Layout.of(lengths)
    generator = torch.Generator().manual_seed(0)
    old, reference, values = (torch.randn(8, generator=generator, dtype=torch.float64) for _ in range(3))
    total = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    rewards = Rewards.of(total, scored=torch.tensor(scored), actions=8)
    signals = Signals.of(old, reference=reference, values=values, final=torch.zeros(3, dtype=torch.float64))
    rows, at = [], 0
    for n, r in zip(lengths, total.tolist(), strict=True):
        rows.append([-kl * float(old[at + t] - reference[at + t]) + (r if t == n - 1 else 0.0) for t in range(n)])
        at += n
    seen = [x for row, s in zip(rows, scored, strict=True) if s for x in row]
    mean, spread = fmean(seen), math.sqrt(variance(seen) + 1e-8)
    rows = [[(x - mean) / spread + mean for x in row] for row in rows]
    returns, advantages, at = [], [], 0
    for row, n in zip(rows, lengths, strict=True):
        back, gae, kept_returns, kept = 0.0, 0.0, [0.0] * n, [0.0] * n
        for t in reversed(range(n)):
            back = row[t] + gamma * back
            following = float(values[at + t + 1]) if t + 1 < n else 0.0
            gae = row[t] + gamma * following - float(values[at + t]) + gamma * lam * gae
            kept_returns[t], kept[t] = back, gae
        returns.append(kept_returns)
        advantages.append(kept)
        at += n
    row = ALGORITHMS["ppo"]
    for credit, truth in (
        (ReturnToGo(gamma, kl, whiten_rewards=True), returns),
        (GAE(gamma, lam, kl, whitened=False, whiten_rewards=True), advantages),
    ):
        found = replace(row, credit=credit).prepare(rewards, signals, layout).advantages
        expected = [x if s else 0.0 for answer, s in zip(truth, scored, strict=True) for x in answer]
        assert found.tolist() == pytest.approx(expected, abs=1e-12)


def test_rewards_that_are_all_equal_stay_as_they_are() -> None:
    rewards = Rewards.of(torch.zeros(2), torch.full((5,), 0.25, dtype=torch.float64))
    row = replace(ALGORITHMS["reinforce_rtg"], credit=ReturnToGo(0.0, whiten_rewards=True))
    assert row.prepare(rewards, Signals.of(torch.zeros(5, dtype=torch.float64)), Layout.of([2, 3])).advantages.tolist() == [0.25] * 5
