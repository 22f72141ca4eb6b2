"""DeepSpeed-Chat's reward model and DPO step equal loops written from parity.md 5.2 and 5.4, on pads, equal pairs and truncated answers."""

from __future__ import annotations

import math
import random

import pytest
import torch
from torch import Tensor

from tilt.errors import UsageError
from tilt.learning.pairs import divergent_span
from tilt.objectives import PREFERENCES, Pairs, Span
from tilt.parity.pairs import PairQuirks, dpo_loss, end_scores, label_mask, span_loss, span_of, summed_logprobs

PAD, LENGTH, VOCABULARY = 0, 7, 6
CORRECTED = PairQuirks()


def random_pairs(seed: int) -> tuple[list[list[int]], list[list[int]]]:
    """Pairs with a prompt of two tokens: unequal ends, no pad at all, one that continues the other, two equal ones."""
    rng = random.Random(seed)
    sides: tuple[list[list[int]], list[list[int]]] = ([], [])
    for kind in ("plain", "full", "continues", "same", "plain", "padded"):
        prompt = [rng.randint(1, 5) for _ in range(2)]
        common = [rng.randint(1, 5) for _ in range(rng.randint(0, 2))]
        a, b = rng.sample(range(1, 6), 2)
        chosen = [*prompt, *common, a, *(rng.randint(1, 5) for _ in range(rng.randint(0, 2)))]
        rejected = [*prompt, *common, b, *(rng.randint(1, 5) for _ in range(rng.randint(0, 2)))]
        if kind == "full":
            chosen += [3] * (LENGTH - len(chosen))
        if kind == "continues":
            rejected = [*chosen, 2][:LENGTH]
            chosen = rejected[:-1]
        if kind == "same":
            rejected = list(chosen)
        for side, ids in ((sides[0], chosen), (sides[1], rejected)):
            side.append(ids + [PAD] * (LENGTH - len(ids)))
    return sides


def softplus(x: Tensor) -> Tensor:
    return torch.log1p(torch.exp(x))


def span_loop(
    chosen: list[list[int]], rejected: list[list[int]], s_c: list[list[Tensor]], s_r: list[list[Tensor]], beginning: int, pads: bool
) -> tuple[Tensor, list[tuple[float, float]]]:
    losses, ends = [], []
    for c, r, a, b in zip(chosen, rejected, s_c, s_r, strict=True):
        c_pads, r_pads = ([t for t, x in enumerate(ids) if x == PAD] for ids in (c, r))
        c_end = c_pads[beginning] if len(c_pads) > beginning else len(c)
        r_end = r_pads[beginning] if len(r_pads) > beginning else len(r)
        apart = [t for t in range(len(c)) if c[t] != r[t]]
        if apart:
            start, end = apart[0], max(c_end, r_end) if pads else min(c_end, r_end)
        else:
            start, end, c_end, r_end = len(c) - 1, len(c), len(c), len(c)
        span = [softplus(b[t] - a[t]) for t in range(start, end)]
        losses.append(torch.stack(span).mean() if span else softplus(b[r_end - 1] - a[c_end - 1]))
        ends.append((a[c_end - 1].item(), b[r_end - 1].item()))
    return torch.stack(losses).mean(), ends


@pytest.mark.parametrize("pads", [True, False], ids=["parity", "corrected"])
@pytest.mark.parametrize("seed", range(4))
def test_span_loss_equals_the_loop(seed: int, pads: bool) -> None:
    chosen, rejected = random_pairs(seed)
    generator = torch.Generator().manual_seed(seed)
    scores = [torch.randn(6, LENGTH, generator=generator, dtype=torch.float64).requires_grad_() for _ in range(2)]
    leaves = [[[x.detach().clone().requires_grad_() for x in row] for row in side] for side in scores]
    expected, ends = span_loop(chosen, rejected, leaves[0], leaves[1], 0, pads)
    expected.backward()

    span = span_of(torch.tensor(chosen), torch.tensor(rejected), PAD)
    loss = span_loss(scores[0], scores[1], span, PairQuirks(pads_in_span=pads))
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), abs=1e-12)
    for side, rows in zip(scores, leaves, strict=True):
        slopes = torch.stack([torch.stack([torch.zeros(()).double() if x.grad is None else x.grad for x in row]) for row in rows])
        assert (side.grad - slopes).abs().max() < 1e-12 and slopes.abs().max() > 0
    found = torch.stack(end_scores(scores[0], scores[1], span), 1)
    assert torch.allclose(found, torch.tensor(ends, dtype=torch.float64), atol=1e-12)


def test_fixture_of_the_reward_model() -> None:
    s_c = torch.tensor([[0.1, 0.2, 0.5, 0.9, 1.1, 0.3]], dtype=torch.float64)
    s_r = torch.tensor([[0.1, 0.2, 0.4, 0.1, -0.2, 0.6]], dtype=torch.float64)
    span = span_of(torch.tensor([[1, 2, 3, 3, 3, 3]]), torch.tensor([[1, 2, 4, 4, 4, PAD]]), PAD)
    assert (span.start.item(), span.chosen.item(), span.rejected.item()) == (2, 6, 5)
    assert span_loss(s_c, s_r, span).item() == pytest.approx(0.527715256081, abs=5.1e-13)
    better, worse = end_scores(s_c, s_r, span)
    assert better.item() == 0.3 and worse.item() == -0.2


def test_padding_at_the_beginning_is_skipped_and_equal_pairs_cost_log_2() -> None:
    ids = torch.tensor([[PAD, 3, 4, PAD, PAD]])
    other = torch.tensor([[PAD, 3, 5, 5, PAD]])
    span = span_of(ids, other, PAD, padding_at_beginning=1)
    assert (span.start.item(), span.chosen.item(), span.rejected.item()) == (2, 3, 4)
    scores = torch.tensor([[0.1, 0.4, -0.3, 0.8, 0.9]])
    assert span_loss(scores, scores, span_of(ids, ids, PAD, 1)).item() == pytest.approx(math.log(2))
    with pytest.raises(UsageError, match="first token"):
        span_of(torch.tensor([[1, 2]]), torch.tensor([[2, 2]]), PAD)


def logprob(logits: Tensor, row: list[int], t: int) -> Tensor:
    return logits[t - 1, row[t]] - torch.log(torch.exp(logits[t - 1]).sum())


@pytest.mark.parametrize("seed", range(4))
def test_dpo_loss_equals_the_loop_and_masking_the_prefix_changes_rewards_only(seed: int) -> None:
    chosen, rejected = random_pairs(seed)
    generator = torch.Generator().manual_seed(seed)
    # both answers of a pair see one prefix, so logits that predict a token of the common beginning are the same
    policy = torch.randn(2, 6, LENGTH, VOCABULARY, generator=generator, dtype=torch.float64)
    anchor = torch.randn(2, 6, LENGTH, VOCABULARY, generator=generator, dtype=torch.float64)
    for n, (c, r) in enumerate(zip(chosen, rejected, strict=True)):
        apart = next((t for t in range(LENGTH) if c[t] != r[t]), LENGTH)
        for x in (policy, anchor):
            x[1, n, :apart] = x[0, n, :apart]
    policy.requires_grad_()
    expected = []
    for n, sides in enumerate(zip(chosen, rejected, strict=True)):
        apart = next((t for t in range(LENGTH) if sides[0][t] != sides[1][t]), 0)
        ratio = []
        for side, row in enumerate(sides):
            kept = [t for t in range(max(1, apart), LENGTH) if row[t] != PAD]
            ratio.append(sum(logprob(policy[side, n], row, t) - logprob(anchor[side, n], row, t) for t in kept))
        expected.append(softplus(-0.1 * (ratio[0] - ratio[1])))

    ids = torch.tensor([chosen, rejected])
    found = {}
    for quirks in (PairQuirks(prefix_masked=True), CORRECTED):
        mask = [label_mask(ids[k], ids[1 - k], PAD, 2, quirks) for k in (0, 1)]
        sums = [[summed_logprobs(x[k], ids[k], mask[k]) for k in (0, 1)] for x in (policy, anchor)]
        loss, better, worse = dpo_loss((sums[0][0], sums[0][1]), (sums[1][0], sums[1][1]))
        found[quirks] = loss, (better.sum(), (better - worse).sum())
    (parity, parity_rewards), (corrected, rewards) = found.values()
    wanted = torch.stack(expected).mean()
    assert parity.item() == pytest.approx(wanted.item(), abs=1e-12)
    slopes = [torch.autograd.grad(x, policy)[0] for x in (parity, wanted)]
    assert (slopes[0] - slopes[1]).abs().max() < 1e-12 and slopes[1].abs().max() > 0
    assert corrected.item() == pytest.approx(parity.item(), abs=1e-12)
    assert abs(parity_rewards[0] - rewards[0]) > 1e-6 and abs(parity_rewards[1] - rewards[1]) < 1e-12


def test_an_equal_pair_keeps_everything_and_has_no_gradient() -> None:
    ids = torch.tensor([[1, 2, 3, PAD]])
    assert label_mask(ids, ids, PAD, 2).tolist() == [[True, True, True, False]]
    logits = torch.randn(1, 4, VOCABULARY, dtype=torch.float64, requires_grad=True)
    same = summed_logprobs(logits, ids, label_mask(ids, ids, PAD, 2))
    loss, _, _ = dpo_loss((same, same), (torch.zeros(1), torch.zeros(1)))
    loss.backward()
    assert loss.item() == pytest.approx(math.log(2)) and not logits.grad.any()


@pytest.mark.parametrize("smoothing, expected", [(0.0, [0.649159339, 0.723597113]), (0.1, [0.658159339, 0.717597113])])
def test_numbers_on_fixture_p(smoothing: float, expected: list[float]) -> None:
    policy = [torch.tensor(x, dtype=torch.float64) for x in ([-4.0, -3.0], [-6.5, -2.5])]
    anchor = [torch.tensor(x, dtype=torch.float64) for x in ([-4.4, -2.8], [-6.0, -2.9])]
    loss, better, worse = dpo_loss((policy[0], policy[1]), (anchor[0], anchor[1]), smoothing=smoothing)
    assert loss.item() == pytest.approx(sum(expected) / 2, abs=5.1e-10)
    assert (better - worse).tolist() == pytest.approx([0.09, -0.06])


@pytest.mark.parametrize("seed", range(4))
def test_the_row_that_trains_is_the_padded_loss(seed: int) -> None:
    """The scores that `tilt rm` compares, read along unpadded answers that go on with pads, cost what DeepSpeed-Chat's padded batch costs."""
    chosen, rejected = random_pairs(seed)
    generator = torch.Generator().manual_seed(seed)
    scores = [torch.randn(6, LENGTH, generator=generator, dtype=torch.float64) for _ in range(2)]
    same = [n for n, (c, r) in enumerate(zip(chosen, rejected, strict=True)) if c == r]
    scores[1][same] = scores[0][same]  # a reward model gives one text one score
    expected = span_loss(scores[0], scores[1], span_of(torch.tensor(chosen), torch.tensor(rejected), PAD))
    better, worse, owner = [], [], []
    for number, (c, r) in enumerate(zip(chosen, rejected, strict=True)):
        lengths = [row.index(PAD) if PAD in row else LENGTH for row in (c, r)]
        steps = divergent_span(c[2 : lengths[0]], r[2 : lengths[1]])  # behind the prompt of two tokens
        better += [scores[0][number, 2 + t] for t in steps]
        worse += [scores[1][number, 2 + t] for t in steps]
        owner += [number] * len(steps)
    span = Span(torch.stack(better), torch.stack(worse), torch.tensor(owner))
    zero = torch.zeros(6, dtype=torch.float64)
    found = PREFERENCES["rm_deepspeed_chat"].loss(Pairs.of(zero, zero, span=span))
    assert found.item() == pytest.approx(expected.item(), abs=1e-12)
