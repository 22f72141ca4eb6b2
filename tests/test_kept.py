"""Kept sets: ragged, cut and joined without loss; scores within them against loops, in value and gradient."""

from __future__ import annotations

import math
from typing import Literal

import pytest
import torch
from torch import Tensor

from tilt import distributions
from tilt.distributions import Anchor, score_actions
from tilt.kept import Kept

SETS = [[4, 7], [], [2], [0, 3, 5, 8], [], [1, 8], [6]]
VOCABULARY = 9


def listed(kept: Kept) -> list[list[int]]:
    return [kept.ids[a:b].tolist() for a, b in zip(kept.offsets.tolist(), kept.offsets[1:].tolist(), strict=False)]


def test_the_worked_example() -> None:
    kept = Kept.of([[4, 7], [], [2]])
    assert kept.ids.tolist() == [4, 7, 2] and kept.offsets.tolist() == [0, 2, 2, 3] and len(kept) == 3
    assert kept.ids.dtype == torch.int32 and kept.offsets.dtype == torch.int64


def test_taking_joining_and_parting_lose_nothing() -> None:
    kept = Kept.of(SETS)
    order = torch.tensor([6, 0, 3, 1, 1, 5])
    assert listed(kept.take(order)) == [SETS[i] for i in order]
    assert listed(kept.take(torch.zeros(0, dtype=torch.long))) == []
    assert listed(kept.part(2, 5)) == SETS[2:5] and kept.part(1, 2) == Kept.whole(1) != kept.part(0, 1)
    assert Kept.join([kept.part(0, 3), Kept.whole(0), kept.part(3, 7)]) == kept
    assert listed(Kept.join([Kept.whole(2), kept])) == [[], [], *SETS]
    assert not Kept.whole(5).narrows and len(Kept.whole(5).take(order[:2])) == 2 and len(Kept.join([])) == 0


def test_a_mask_becomes_sets_and_back() -> None:
    allowed = torch.rand(40, VOCABULARY, generator=torch.Generator().manual_seed(0)) < 0.4
    allowed[7], allowed[8, 3] = True, True
    allowed[~allowed.any(-1)] = True
    kept = Kept.among(allowed)
    assert listed(kept) == [[] if row.all() else row.nonzero()[:, 0].tolist() for row in allowed]
    logits = torch.randn(40, VOCABULARY)
    assert torch.equal(kept.restrict(logits), logits.masked_fill(~allowed, -torch.inf))


@pytest.mark.parametrize("direction", ["to", "from"])
@pytest.mark.parametrize("small", [distributions.SMALL, 0])
@pytest.mark.parametrize("chunk", [2, 3, 100])
def test_scores_within_sets_equal_loops(monkeypatch: pytest.MonkeyPatch, small: int, chunk: int, direction: Literal["to", "from"]) -> None:
    """Log-probability, entropy, exact KL and the gradients to 1e-10 against sums over each set; kept and recomputed chunks; chunks that cut the sets anywhere."""
    monkeypatch.setattr(distributions, "SMALL", small)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(len(SETS), 5, generator=generator, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(VOCABULARY, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    other = torch.randn(len(SETS), VOCABULARY, generator=generator, dtype=torch.float64)
    actions = torch.tensor([one[i % len(one)] if one else 3 for i, one in enumerate(SETS)])
    each = torch.randn(3, len(SETS), generator=generator, dtype=torch.float64)
    anchor = Anchor(other, lambda h: h, direction)
    found = score_actions(
        hidden, lambda h: h @ weight.T, actions, temperature=0.7, entropy=True, chunk=chunk, against=anchor, kept=Kept.of(SETS)
    )
    grads = torch.autograd.grad((each * torch.stack(found)).sum(), (hidden, weight))

    logprobs, entropies, kls = [], [], []
    for h, o, among, action in zip(hidden, other, SETS, actions.tolist(), strict=True):
        scores: dict[int, Tensor] = {v: (h * weight[v]).sum() / 0.7 for v in (among or range(VOCABULARY))}
        total = sum((s.exp() for s in scores.values()), start=torch.zeros(()))
        logprobs.append(scores[action] - total.log())
        entropies.append(-sum(((s - total.log()) * s.exp() / total for s in scores.values()), start=torch.zeros(())))
        mine = {v: s - total.log() for v, s in scores.items()}
        mass = sum(math.exp(float(o[v]) / 0.7) for v in scores)
        theirs = {v: float(o[v]) / 0.7 - math.log(mass) for v in scores}
        if direction == "to":
            kls.append(sum((mine[v].exp() * (mine[v] - theirs[v]) for v in scores), start=torch.zeros(())))
        else:
            kls.append(sum((math.exp(theirs[v]) * (theirs[v] - mine[v]) for v in scores), start=torch.zeros(())))
    truth = (torch.stack(logprobs), torch.stack(entropies), torch.stack(kls))
    expected = torch.autograd.grad((each * torch.stack(truth)).sum(), (hidden, weight))
    for have, right in zip((*found, *grads), (*truth, *expected), strict=True):
        torch.testing.assert_close(have, right, rtol=0, atol=1e-10)


def test_no_mask_of_the_whole_batch_exists(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each restricted part has at most `chunk` rows."""
    rows: list[int] = []
    plain = Kept.restrict

    def seen(self: Kept, logits: Tensor) -> Tensor:
        rows.append(len(logits))
        return plain(self, logits)

    monkeypatch.setattr(Kept, "restrict", seen)
    hidden = torch.randn(len(SETS), VOCABULARY)
    score_actions(
        hidden, lambda h: h, torch.zeros(len(SETS), dtype=torch.long), temperature=1.0, entropy=False, chunk=3, kept=Kept.of(SETS)
    )
    assert rows == [3, 3, 1]
    rows.clear()
    score_actions(
        hidden, lambda h: h, torch.zeros(len(SETS), dtype=torch.long), temperature=1.0, entropy=False, chunk=3, kept=Kept.whole(len(SETS))
    )
    assert rows == []


def test_an_action_that_is_alone_in_its_set_is_certain() -> None:
    logprobs, entropies, _ = score_actions(
        torch.randn(1, 4), lambda h: h, torch.tensor([2]), temperature=1.0, entropy=True, chunk=8, kept=Kept.of([[2]])
    )
    assert float(logprobs[0]) == 0 and abs(float(entropies[0])) < 1e-6 and not math.isnan(float(entropies[0]))
