"""Preference rows: the numbers of fixture P, loops from the papers in value and gradient, parts that add up, and what is refused."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tilt.errors import UsageError
from tilt.objectives import (
    PREFERENCES,
    AlphaDivergence,
    Answers,
    Centring,
    ChosenNLL,
    Classifier,
    Confidence,
    Constant,
    DiscoPop,
    DivergentSpan,
    Even,
    Fidelity,
    ForwardKL,
    Hinge,
    ImplicitReward,
    JensenShannon,
    Likelihood,
    Logistic,
    MismatchedKL,
    NoiseContrast,
    NoRegulariser,
    Pairs,
    Partner,
    Preference,
    Prospect,
    ReverseKL,
    Robust,
    RunningMean,
    ScoreMargin,
    SortedAnswers,
    SortedMargins,
    Span,
    Squared,
    WinRate,
    Zero,
    pull,
)


def double(*numbers: float) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


def fixture_p(**more: Any) -> Pairs:
    """Two pairs; head sums are of equal log-probabilities within each answer."""
    w, lost, ref_w, ref_l, n_w, n_l = double(-4, -3), double(-6.5, -2.5), double(-4.4, -2.8), double(-6, -2.9), double(4, 3), double(5, 2)
    short = torch.minimum(n_w, n_l)
    return Pairs.of(
        Answers.of(w, reference=ref_w, lengths=n_w, heads=w * short / n_w, reference_heads=ref_w * short / n_w, confidence=double(0.1, -0.2)),
        Answers.of(lost, reference=ref_l, lengths=n_l, heads=lost * short / n_l, reference_heads=ref_l * short / n_l, confidence=double(0.3, 0.05)),
        mismatched=Answers.of(double(-3.0, -2.0), reference=double(-3.2, -1.9)),
        **more,
    )  # fmt: skip


P = fixture_p()
SCORES = Pairs.of(double(1.2, -0.3), double(0.4, 0.5))
DPO, RM = PREFERENCES["dpo"], PREFERENCES["reward_model"]
BARE = {"regulariser": NoRegulariser(), "weight": Even()}

NUMBERS: dict[str, tuple[Preference, list[float]]] = {
    "dpo": (DPO, [0.649159339, 0.723597113]),
    "cdpo": (PREFERENCES["cdpo"], [0.658159339, 0.717597113]),
    "robust": (PREFERENCES["robust"], [0.637909339, 0.731097113]),
    "ipo": (PREFERENCES["ipo"], [16.81, 31.36]),
    "ipo_mean": (PREFERENCES["ipo_mean"], [23.04, 27.7377778]),
    "hinge": (PREFERENCES["hinge"], [0.91, 1.06]),
    "slic": (replace(PREFERENCES["slic"], **BARE), [0, 1.5]),
    "simpo": (PREFERENCES["simpo"], [0.644396660, 0.693147181]),
    "orpo": (replace(PREFERENCES["orpo"], regulariser=NoRegulariser()), [0.049696246, 0.052471551]),
    "fidelity": (PREFERENCES["fidelity"], [0.277168882, 0.303577357]),
    "fidelity at .9": (replace(DPO, link=Fidelity(0.9)), [0.095740985, 0.112380347]),
    "exo_pair": (PREFERENCES["exo_pair"], [0.462432890, 0.544223906]),
    "nca_pair": (PREFERENCES["nca_pair"], [1.364250575, 1.401469353]),
    "bco_pair": (PREFERENCES["bco_pair"], [1.341814624, 1.416533412]),
    "bco_pair at 0": (replace(PREFERENCES["bco_pair"], comparison=Zero()), [1.341806815, 1.416544347]),
    "sppo_hard": (PREFERENCES["sppo_hard"], [41.41, 56.2]),
    "aot": (PREFERENCES["aot"], [0.723597113, 0.649159339]),
    "aot_unpaired": (PREFERENCES["aot_unpaired"], [0.678259676, 0.693147181]),
    "apo_zero": (PREFERENCES["apo_zero"], [0.977503937, 1.014998500]),
    "apo_down": (PREFERENCES["apo_down"], [0.987513842, 1.009995668]),
    "discopop": (PREFERENCES["discopop"], [0.876373017, 0.801891159]),
    "sigmoid_norm": (PREFERENCES["sigmoid_norm"], [0.683197180, 0.706569400]),
    "cpo": (replace(PREFERENCES["cpo"], **BARE), [0.575939420, 0.718459648]),
    "dpo_forward_kl": (PREFERENCES["dpo_forward_kl"], [0.645423229, 0.721080883]),
    "dpo_js": (PREFERENCES["dpo_js"], [0.670359793, 0.707504977]),
    "dpo_alpha": (PREFERENCES["dpo_alpha"], [0.647699819, 0.722201381]),
    "kto": (PREFERENCES["kto"], [0.491250893 + 0.486253465, 0.506249675 + 0.508749107]),
}


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_on_fixture_p(name: str) -> None:
    row, expected = NUMBERS[name]
    assert row.each(P).tolist() == pytest.approx(expected, abs=1e-7 if max(expected) > 20 else 1.1e-9)
    assert row.loss(P).item() == pytest.approx(sum(expected) / 2, abs=1e-7 if max(expected) > 20 else 1.1e-9)


def test_numbers_of_length_and_of_weights() -> None:
    ld = PREFERENCES["ld_dpo"]
    assert (ld.margin(P.chosen) - ld.margin(P.rejected))[0].item() == pytest.approx(0.085, abs=1e-12)
    assert ld.each(P)[0].item() == pytest.approx(0.651550034, abs=1e-9)
    assert PREFERENCES["wpo"].each(P).tolist() == pytest.approx([0.649159339 * math.exp(0.4), 0.723597113 * math.exp(-0.15)], abs=2e-9)
    assert replace(PREFERENCES["wpo"], weight=Confidence(1.0)).each(P)[0].item() == pytest.approx(0.649159339, abs=1e-9)
    assert PREFERENCES["rpo"].each(P).tolist() == pytest.approx([0.649159339 + 1, 0.723597113 + 1], abs=1e-9)
    assert PREFERENCES["orpo"].each(P).tolist() == pytest.approx([1 + 0.049696246, 1 + 0.052471551], abs=1e-9)
    assert PREFERENCES["cpo"].each(P).tolist() == pytest.approx([4 + 0.575939420, 3 + 0.718459648], abs=1e-9)
    assert PREFERENCES["slic"].each(P).tolist() == pytest.approx([4, 4.5], abs=1e-12)


def test_numbers_of_the_reward_model() -> None:
    assert RM.loss(SCORES).item() == pytest.approx(0.771100665948, abs=1e-12)
    expected = [0.437487951, 1.313261688]
    assert replace(RM, margin=ScoreMargin(0.2)).each(SCORES).tolist() == pytest.approx(expected, abs=1e-9)
    own = Pairs.of(SCORES.chosen, SCORES.rejected, margins=double(0.2, 0.2))
    assert RM.each(own).tolist() == pytest.approx(expected, abs=1e-9), "a margin from the data"
    assert replace(RM, regulariser=Centring(0.01)).loss(SCORES).item() == pytest.approx(0.784100665948, abs=1e-12)


def test_numbers_of_the_divergent_span() -> None:
    """r^c, r^r from the first difference at 2 to the longer end at 6, the shorter answer's padding included (end scores .3 and -.2)."""
    chosen, rejected = double(0.1, 0.2, 0.5, 0.9, 1.1, 0.3), double(0.1, 0.2, 0.4, 0.1, -0.2, 0.6)
    pairs = Pairs.of(double(0.3), double(-0.2), span=Span(chosen[2:6], rejected[2:6], torch.zeros(4).long()))
    row = PREFERENCES["rm_deepspeed_chat"]
    assert row.loss(pairs).item() == pytest.approx(0.527715256081, abs=1e-12)
    found = {key: (total / weight).item() for key, (total, weight) in row.metrics(pairs).items()}
    assert found["preference/accuracy"] == 1.0 and found["preference/margin"] == pytest.approx(0.5), "metrics are those of the end scores"


def test_spans_of_unequal_length_are_means_of_each_pair() -> None:
    generator = torch.Generator().manual_seed(1)
    chosen, rejected = (torch.randn(9, dtype=torch.float64, generator=generator).requires_grad_() for _ in range(2))
    pair = torch.tensor([0, 0, 0, 1, 2, 2, 2, 2, 2])
    pairs = Pairs.of(double(1, 2, 3), double(0, 0, 0), span=Span(chosen, rejected, pair))
    row = PREFERENCES["rm_deepspeed_chat"]
    expected = sum(torch.log1p(torch.exp(rejected[t] - chosen[t])) / [3, 1, 5][int(pair[t])] / 3 for t in range(9))
    torch.testing.assert_close(row.loss(pairs), expected, rtol=0, atol=1e-12)
    whole = torch.autograd.grad(row.loss(pairs), (chosen, rejected))
    for ours, theirs in zip(whole, torch.autograd.grad(expected, (chosen, rejected)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    parts = [pairs.take(torch.tensor(part)) for part in ([2, 0], [1])]
    torch.testing.assert_close(sum(row.loss(part) for part in parts), row.loss(pairs), rtol=0, atol=1e-12)
    torch.testing.assert_close(row.loss(Pairs.join(parts)), row.loss(pairs), rtol=0, atol=1e-12)
    assert Pairs.join(parts).span.pair.tolist() == [1, 1, 1, 0, 0, 0, 0, 0, 2]
    same = Pairs.of(double(1), double(1), span=Span(double(0.3), double(0.3), torch.tensor([0])))
    assert row.loss(same).item() == pytest.approx(math.log(2)), "answers that never part are compared at their last position"


# ------------------------------------------------------------------------------------------------ loops from the papers


@dataclass
class Case:
    """Ragged log-probabilities of N pairs: policy with gradient, reference without."""

    chosen: list[Tensor]
    rejected: list[Tensor]
    ref_chosen: list[Tensor]
    ref_rejected: list[Tensor]
    confidence: Tensor

    @property
    def leaves(self) -> list[Tensor]:
        return [*self.chosen, *self.rejected]

    def answers(self, side: str) -> Answers:
        own, other, ref = (
            (self.chosen, self.rejected, self.ref_chosen) if side == "chosen" else (self.rejected, self.chosen, self.ref_rejected)
        )
        short = [min(len(a), len(b)) for a, b in zip(own, other, strict=True)]
        return Answers.of(
            torch.stack([x.sum() for x in own]), reference=torch.stack([x.sum() for x in ref]), lengths=double(*(len(x) for x in own)),
            heads=torch.stack([x[:n].sum() for x, n in zip(own, short, strict=True)]),
            reference_heads=torch.stack([x[:n].sum() for x, n in zip(ref, short, strict=True)]),
            confidence=self.confidence[0 if side == "chosen" else 1],
        )  # fmt: skip

    def pairs(self) -> Pairs:
        mismatched = Answers.of(double(-3.0, -2.0, -4), reference=double(-3.6, -1.9, -4.4))
        return Pairs.of(self.answers("chosen"), self.answers("rejected"), mismatched=mismatched)


def case(seed: int, n: int = 6) -> Case:
    generator = torch.Generator().manual_seed(seed)

    def ragged(lengths: list[int], grad: bool) -> list[Tensor]:
        return [(-2 * torch.rand(k, dtype=torch.float64, generator=generator) - 0.02).requires_grad_(grad) for k in lengths]

    sizes = [torch.randint(1, 7, (n,), generator=generator).tolist() for _ in range(2)]
    made = [ragged(size, grad) for grad in (True, False) for size in sizes]
    return Case(*made, confidence=torch.randn(2, n, dtype=torch.float64, generator=generator) / 3)


def s(x: Tensor) -> Tensor:
    return 1 / (1 + torch.exp(-x))


def ls(x: Tensor) -> Tensor:
    return torch.log(s(x))


def loop(name: str, c: Case) -> list[Tensor]:
    """The loss of each pair, written down from the paper, at the row's settings (beta .1, e .1)."""
    beta, e, losses = 0.1, 0.1, []
    n = len(c.chosen)
    total_w, total_l = [x.sum() for x in c.chosen], [x.sum() for x in c.rejected]
    ratio_w = [a.sum() - b.sum() for a, b in zip(c.chosen, c.ref_chosen, strict=True)]
    ratio_l = [a.sum() - b.sum() for a, b in zip(c.rejected, c.ref_rejected, strict=True)]
    if name == "aot":
        policy = sorted((a - b for a, b in zip(total_w, total_l, strict=True)), key=lambda x: x.item())
        reference = sorted((a.sum() - b.sum() for a, b in zip(c.ref_chosen, c.ref_rejected, strict=True)), key=lambda x: x.item())
        return [-ls(beta * (a - b)) for a, b in zip(policy, reference, strict=True)]
    if name == "aot_unpaired":
        return [
            -ls(beta * (a - b))
            for a, b in zip(sorted(ratio_w, key=lambda x: x.item()), sorted(ratio_l, key=lambda x: x.item()), strict=True)
        ]
    running = sum(beta * r.item() for r in [*ratio_w, *ratio_l]) / (2 * n)
    kl = max(0.0, ((-3.0 + 3.6) + (-2.0 + 1.9) + (-4 + 4.4)) / 3)
    for i in range(n):
        W, L, cw, rl, nw, nl = total_w[i], total_l[i], ratio_w[i], ratio_l[i], len(c.chosen[i]), len(c.rejected[i])
        h = beta * (cw - rl)
        pw, pl = W / nw, L / nl
        if name == "ld_dpo":
            short = min(nw, nl)

            def less(x: Tensor, short: int = short) -> Tensor:
                return x[:short].sum() + 0.5 * x[short:].sum()

            h = beta * (less(c.chosen[i]) - less(c.ref_chosen[i]) - less(c.rejected[i]) + less(c.ref_rejected[i]))
        if name in ("dpo", "ld_dpo"):
            loss = -ls(h)
        elif name == "cdpo":
            loss = -(1 - e) * ls(h) - e * ls(-h)
        elif name == "robust":
            loss = (-(1 - e) * ls(h) + e * ls(-h)) / (1 - 2 * e)
        elif name == "ipo":
            loss = (cw - rl - 1 / (2 * beta)) ** 2
        elif name == "ipo_mean":
            loss = (cw / nw - rl / nl - 1 / (2 * beta)) ** 2
        elif name == "hinge":
            loss = torch.relu(1 - h)
        elif name == "slic":
            loss = torch.relu(1 - W + L) - W
        elif name == "simpo":
            loss = -ls(2.0 * (W / nw - L / nl) - 0.5)
        elif name == "orpo":
            loss = -pw - 0.1 * ls(torch.log(torch.exp(pw) / (1 - torch.exp(pw))) - torch.log(torch.exp(pl) / (1 - torch.exp(pl))))
        elif name == "kto":
            loss = (1 - s(beta * (cw - kl))) + (1 - s(beta * (kl - rl)))
        elif name == "fidelity":
            loss = 1 - torch.sqrt(s(h))
        elif name == "exo_pair":
            loss = s(h) * (torch.log(s(h)) - math.log(1 - e)) + s(-h) * (torch.log(s(-h)) - math.log(e))
        elif name == "nca_pair":
            loss = -ls(beta * cw) - 0.5 * ls(-beta * cw) - 0.5 * ls(-beta * rl)
        elif name == "bco_pair":
            loss = -ls(beta * cw - running) - ls(-(beta * rl - running))
        elif name == "sppo_hard":
            loss = (cw - 1 / (2 * beta)) ** 2 + (rl + 1 / (2 * beta)) ** 2
        elif name == "apo_zero":
            loss = 1 - s(beta * cw) + s(beta * rl)
        elif name == "apo_down":
            loss = s(beta * cw) + 1 - s(beta * (cw - rl))
        elif name == "discopop":
            m = s(h / 0.05)
            loss = (1 - m) * -ls(h) + m * torch.exp(-h)
        elif name == "sigmoid_norm":
            loss = -ls(beta * (cw / nw - rl / nl))
        elif name == "cpo":
            loss = -ls(beta * (W - L)) - W
        elif name == "rpo":
            loss = -ls(h) - W / nw
        elif name == "dpo_forward_kl":
            loss = -ls(beta * ((1 - torch.exp(-cw)) - (1 - torch.exp(-rl))))
        elif name == "dpo_js":
            loss = -ls(beta * ((math.log(2) + ls(cw)) - (math.log(2) + ls(rl))))
        elif name == "dpo_alpha":
            loss = -ls(beta * ((torch.exp(-0.5 * cw) - 1) / -0.5 - (torch.exp(-0.5 * rl) - 1) / -0.5))
        elif name == "wpo":
            loss = -ls(h) * math.exp(float(c.confidence[0, i])) * math.exp(float(c.confidence[1, i]))
        else:
            raise AssertionError(f"no loop for {name}")
        losses.append(loss)
    return losses


LIKELY = [name for name, row in PREFERENCES.items() if row.margin.reads == "likelihood"]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", LIKELY)
def test_a_row_equals_its_loop(name: str, seed: int) -> None:
    """Value and gradient by every action's log-probability, on answers of unequal length."""
    c = case(seed)
    row = PREFERENCES[name]
    expected = torch.stack(loop(name, c))
    torch.testing.assert_close(row.each(c.pairs()), expected, rtol=0, atol=1e-10)
    found = torch.autograd.grad(row.loss(c.pairs()), c.leaves)
    for ours, theirs in zip(found, torch.autograd.grad(expected.mean(), c.leaves), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)
    assert any(g.abs().max() > 1e-4 for g in found)


def scores(seed: int, n: int = 7) -> Pairs:
    generator = torch.Generator().manual_seed(seed)
    chosen, rejected, margins = (torch.randn(n, dtype=torch.float64, generator=generator) for _ in range(3))
    probability = torch.rand(n, dtype=torch.float64, generator=generator)
    return Pairs.of(chosen.requires_grad_(), rejected.requires_grad_(), margins=margins, probability=probability)


def test_the_reward_model_equals_its_loop() -> None:
    """Margins of each pair, soft labels, smoothing and centring together."""
    pairs = scores(0)
    row = Preference(ScoreMargin(0.3), Logistic(0.1), Centring(0.05))
    loss = torch.zeros((), dtype=torch.float64)
    for i in range(7):
        c, r, p = pairs.chosen.scores[i], pairs.rejected.scores[i], float(pairs.probability[i])
        h, p = c - r - 0.3 - float(pairs.margins[i]), 0.9 * p + 0.1 * (1 - p)
        loss = loss + (-p * ls(h) - (1 - p) * ls(-h) + 0.05 * (c + r) ** 2) / 7
    torch.testing.assert_close(row.loss(pairs), loss, rtol=0, atol=1e-12)
    leaves = (pairs.chosen.scores, pairs.rejected.scores)
    for ours, theirs in zip(torch.autograd.grad(row.loss(pairs), leaves), torch.autograd.grad(loss, leaves), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "name", [n for n in PREFERENCES if not PREFERENCES[n].apart and not PREFERENCES[n].coupled and n != "rm_deepspeed_chat"]
)
def test_a_soft_label_is_the_mean_over_both_orders(name: str) -> None:
    """p times the loss of the label plus 1 - p times that of the other one; fidelity and the divergences take p for their target instead."""
    row = replace(PREFERENCES[name], **BARE)
    pairs = scores(1) if row.margin.reads == "score" else case(1).pairs()
    p = torch.linspace(0, 1, len(pairs.margins), dtype=torch.float64)
    h = row.margin(pairs.chosen) - row.margin(pairs.rejected) - row.margin.offset
    one = torch.ones_like(h)
    mixed = p * row.link(h, one) + (1 - p) * row.link(-h, one)  # type: ignore[operator]
    found = row.each(replace(pairs, probability=p, margins=torch.zeros_like(h)))
    if isinstance(row.link, Fidelity | ReverseKL):
        assert found[-1].item() == pytest.approx(mixed[-1].item()) and found[0].item() == pytest.approx(mixed[0].item())
        target = 0.9 * p + 0.1 * (1 - p) if isinstance(row.link, ReverseKL) else p
        q = s(h)
        expected = (
            q * (q.log() - target.log()) + (1 - q) * ((1 - q).log() - (1 - target).log())
            if isinstance(row.link, ReverseKL)
            else 1 - (q * target).sqrt() - ((1 - q) * (1 - target)).sqrt()
        )
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    else:
        torch.testing.assert_close(found, mixed, rtol=0, atol=1e-12)
    if name == "dpo":
        torch.testing.assert_close(row.each(replace(pairs, probability=0.9 * one)), PREFERENCES["cdpo"].each(pairs), rtol=0, atol=1e-12)


# ------------------------------------------------------------------------------------------------ parts of a batch


SPLITS = [[[3, 0], [1], [5, 2, 4]], [[0], [1], [2], [3], [4], [5]], [[5, 4, 3, 2, 1, 0]]]


@pytest.mark.parametrize("splits", SPLITS)
@pytest.mark.parametrize("name", LIKELY)
def test_parts_give_the_gradient_of_the_batch(name: str, splits: list[list[int]]) -> None:
    c = case(4)
    row, pairs = PREFERENCES[name], c.pairs()
    whole = torch.autograd.grad(row.loss(pairs), c.leaves, retain_graph=True)
    parts = [pairs.take(torch.tensor(part)) for part in splits]
    if row.coupled:
        slopes = row.slopes(pairs.detach())
        loss = sum(pull(part, slopes.take(torch.tensor(numbers))) for part, numbers in zip(parts, splits, strict=True))
    else:
        loss = sum(row.loss(part) for part in parts)
        torch.testing.assert_close(loss, row.loss(pairs), rtol=0, atol=1e-12)
        found = row.metrics(pairs)
        for key, (total, weight) in found.items():
            if key != "preference/baseline":
                assert sum(row.metrics(part)[key][0].item() for part in parts) == pytest.approx(total.item(), abs=1e-12)
                assert sum(row.metrics(part)[key][1].item() for part in parts) == weight == 6
    for ours, theirs in zip(torch.autograd.grad(loss, c.leaves), whole, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    joined = Pairs.join(parts)
    if not row.coupled:
        torch.testing.assert_close(row.loss(joined), row.loss(pairs), rtol=0, atol=1e-12)


def test_parts_of_coupled_rows_on_their_own_are_another_loss() -> None:
    """So the test above can fail: sorting, or a mean, within parts gives other gradients."""
    for name in ("aot", "aot_unpaired", "bco_pair"):
        c = case(4)
        pairs = c.pairs()
        alone = sum(PREFERENCES[name].loss(pairs.take(torch.tensor(part))) for part in SPLITS[0])
        whole = torch.autograd.grad(PREFERENCES[name].loss(pairs), c.leaves, retain_graph=True)
        apart = torch.autograd.grad(alone, c.leaves)
        assert max((a - b).abs().max() for a, b in zip(whole, apart, strict=True)) > 1e-6


def test_slopes_equal_the_gradient_of_rows_that_are_not_coupled_too() -> None:
    for name in ("ld_dpo", "rpo", "kto", "wpo"):
        c = case(5)
        pairs, row = c.pairs(), PREFERENCES[name]
        whole = torch.autograd.grad(row.loss(pairs), c.leaves, retain_graph=True)
        through = torch.autograd.grad(pull(pairs, row.slopes(pairs.detach())), c.leaves)
        for ours, theirs in zip(through, whole, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


def test_slopes_leave_the_statistics_as_they_are_and_pull_adds_up_slope_times_statistic() -> None:
    pairs = case(5).pairs().detach()
    for name in ("dpo", "aot", "bco_pair"):
        slopes = PREFERENCES[name].slopes(pairs)
        assert not pairs.chosen.scores.requires_grad and not pairs.rejected.heads.requires_grad
        sides = ((slopes.chosen, pairs.chosen), (slopes.rejected, pairs.rejected))
        expected = sum(float((slope.scores * side.scores).sum()) for slope, side in sides)
        assert pull(pairs, slopes).item() == pytest.approx(expected, abs=1e-12), "heads, which these rows do not read, add nothing"


def test_statistics_take_the_precision_of_the_scores() -> None:
    made = Answers.of(double(-1, -2), reference=torch.tensor([-1.5, -2.5]), lengths=torch.tensor([3, 4]))
    assert made.reference.dtype == made.lengths.dtype == made.heads.dtype == torch.float64


@pytest.mark.parametrize("name", ["kto", "bco_pair", "nca_pair", "apo_zero", "sppo_hard"])
def test_labelled_answers(name: str) -> None:
    """Good and bad answers of different numbers: the mean over all of them, in any split."""
    c, row = case(6), PREFERENCES[name]
    good, bad = c.answers("chosen"), c.answers("rejected").take(torch.tensor([0, 3, 4]))
    mismatched = Answers.of(double(-3.0, -2.0), reference=double(-3.2, -1.9))
    pairs = Pairs.labelled(good, bad, mismatched=mismatched)
    level = {"kto": 0.1 * 0.05, "bco_pair": torch.cat([row.margin(good), row.margin(bad)]).mean().item()}.get(name, 0.0)
    terms = {
        "kto": (lambda x: 1 - s(x), lambda x: 1 - s(-x)),
        "apo_zero": (lambda x: 1 - s(x), lambda x: s(x)),
        "bco_pair": (lambda x: -ls(x), lambda x: -ls(-x)),
        "nca_pair": (lambda x: -ls(x) - 0.5 * ls(-x), lambda x: -0.5 * ls(-x)),
        "sppo_hard": (lambda x: (x - 5) ** 2, lambda x: (x + 5) ** 2),
    }
    loss = torch.zeros((), dtype=torch.float64)
    beta = 1.0 if name == "sppo_hard" else 0.1
    for answers, term in ((good, terms[name][0]), (bad, terms[name][1])):
        for i in range(len(answers.scores)):
            loss = loss + term(beta * (answers.scores[i] - answers.reference[i]) - level) / 9
    torch.testing.assert_close(row.loss(pairs), loss, rtol=0, atol=1e-12)
    gradient = torch.autograd.grad(loss, c.leaves, retain_graph=True, materialize_grads=True, allow_unused=True)
    parts = [(torch.tensor([0, 2]), torch.tensor([1])), (torch.tensor([1, 3, 4, 5]), torch.tensor([], dtype=torch.long)), (torch.tensor([], dtype=torch.long), torch.tensor([2, 0]))]  # fmt: skip
    slopes = row.slopes(pairs.detach()) if row.coupled else None
    total = sum(row.loss(pairs.take(*part)) if slopes is None else pull(pairs.take(*part), slopes.take(*part)) for part in parts)
    for ours, theirs in zip(torch.autograd.grad(total, c.leaves, allow_unused=True, materialize_grads=True), gradient, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    found = row.metrics(pairs)
    assert found["preference/loss"][1] == 9 == found["preference/accuracy"][1] and "preference/margin" not in found
    assert (found["preference/loss"][0] / 9).item() == pytest.approx(loss.item(), abs=1e-12)
    right = int((row.margin(good) > level).sum() + (row.margin(bad) < level).sum())
    assert found["preference/accuracy"][0].item() == right and found["preference/baseline"][0].item() == pytest.approx(level)


def test_a_running_mean_is_that_of_all_answers_so_far() -> None:
    row, seen = PREFERENCES["bco_pair"], []
    for seed in range(3):
        pairs = case(seed, n=3 + seed).pairs()
        seen += [*row.margin(pairs.chosen).tolist(), *row.margin(pairs.rejected).tolist()]
        mean = sum(seen) / len(seen)
        assert row.metrics(pairs)["preference/baseline"][0].item() == pytest.approx(mean, abs=1e-12)
        row = row.advance(pairs)
        assert row.comparison.mean == pytest.approx(mean, abs=1e-12) and row.comparison.count == len(seen)  # type: ignore[union-attr]
    assert DPO.advance(P) is DPO


def test_the_baseline_of_kto_is_never_below_nothing_and_has_no_gradient() -> None:
    c = case(2)
    below = replace(c.pairs(), mismatched=Answers.of(double(-5.0).requires_grad_(), reference=double(-1.0)))
    row = PREFERENCES["kto"]
    assert row.metrics(below)["preference/baseline"][0].item() == 0
    above = Answers.of(double(-1.0).requires_grad_(), reference=double(-5.0))
    loss = row.loss(replace(c.pairs(), mismatched=above))
    assert torch.autograd.grad(loss, above.scores, allow_unused=True) == (None,)
    assert replace(row, link=Prospect(2.0, 0.5)).loss(P).item() == pytest.approx(
        (2 * (0.491250893 + 0.506249675) + 0.5 * (0.486253465 + 0.508749107)) / 2, abs=2e-9
    )


def test_the_weight_of_wpo_has_no_gradient() -> None:
    confidence = double(0.1, -0.2).requires_grad_()
    loss = PREFERENCES["wpo"].loss(
        replace(P, chosen=replace(P.chosen, scores=P.chosen.scores.clone().requires_grad_(), confidence=confidence))
    )
    assert torch.autograd.grad(loss, confidence, allow_unused=True) == (None,)


def test_statistics_take_the_dtype_of_the_scores_and_carry_no_graph() -> None:
    """Lengths may be whole numbers, margins and probabilities float32; only the scores and head sums given with a graph have one, and none after `detach`."""
    scores = double(-1, -2).requires_grad_()
    answers = Answers.of(scores, lengths=torch.tensor([3, 4]), reference=torch.tensor([-1.0, -2.0]))
    pairs = Pairs.of(
        answers,
        answers,
        margins=torch.tensor([1, 2]),
        probability=torch.tensor([0.5, 1.0]),
        span=Span(scores, 2 * scores, torch.tensor([0, 1])),
    )
    given = {name: value for side in (pairs.chosen, pairs.mismatched) for name, value in vars(side).items()}
    assert all(x.dtype == torch.float64 for x in (*given.values(), pairs.margins, pairs.probability))
    assert pairs.margins.tolist() == [1, 2] and pairs.paired and not Pairs.labelled(answers, answers).paired
    made = (pairs, Pairs.of(scores, scores), Pairs.labelled(answers, answers))
    assert not any(
        x.requires_grad for p in made for x in (p.margins, p.probability, p.weights, p.rejected.weights, p.chosen.lengths, p.chosen.heads)
    )
    quiet = pairs.detach()
    found = [*vars(quiet.chosen).values(), *vars(quiet.rejected).values(), quiet.span.chosen, quiet.span.rejected]
    assert scores.requires_grad and not any(x.requires_grad for x in found) and quiet.span.rejected.tolist() == [-2, -4]


def test_statistics_that_nobody_measured_pull_nothing() -> None:
    """What a row does not read may be NaN, and its slope is 0: the pull stays finite."""
    pairs, row = case(3).pairs(), PREFERENCES["dpo"]
    slopes = row.slopes(pairs.detach())
    unmeasured = replace(pairs, chosen=replace(pairs.chosen, heads=torch.full_like(pairs.chosen.heads, torch.nan)))
    assert pull(unmeasured, slopes).isfinite() and torch.equal(pull(unmeasured, slopes), pull(pairs, slopes))


def test_a_pull_is_the_sum_of_slopes_times_statistics() -> None:
    pairs, row = case(3).pairs(), PREFERENCES["kto"]
    slopes = row.slopes(pairs)
    assert slopes.chosen.heads.tolist() == [0] * 6, "kto reads no head sums"
    assert not slopes.chosen.scores.requires_grad and torch.equal(slopes.chosen.scores, row.slopes(pairs.detach()).chosen.scores)
    total = (slopes.chosen.scores * pairs.chosen.scores + slopes.rejected.scores * pairs.rejected.scores).sum()
    torch.testing.assert_close(pull(pairs, slopes), total, rtol=0, atol=1e-12)


# ------------------------------------------------------------------------------------------------ where rows go


def lowest(loss: Callable[[Tensor], Tensor], low: float = -12, high: float = 12) -> float:
    """The minimiser of a unimodal loss by repeated grids."""
    for _ in range(12):
        grid = torch.linspace(low, high, 201, dtype=torch.float64)
        at = int(loss(grid).argmin())
        low, high = float(grid[max(at - 2, 0)]), float(grid[min(at + 2, 200)])
    return (low + high) / 2


@pytest.mark.parametrize("p", [0.3, 0.6, 0.85])
def test_minimisers_of_links(p: float) -> None:
    """What the cards say: h as a function of the chance p that the answer is the better one, labels drawn from it."""
    logit = math.log(p / (1 - p))
    smoothed = 0.9 * p + 0.1 * (1 - p)
    expected = {
        "dpo": logit, "cdpo": math.log(smoothed / (1 - smoothed)), "ipo": (2 * p - 1) / 0.2, "hinge": math.copysign(1, p - 0.5),
        "fidelity": 2 * logit, "exo_pair": (2 * p - 1) * math.log(9),
    }  # fmt: skip
    for name, h in expected.items():
        link = PREFERENCES[name].link

        def mean(x: Tensor, link: Any = link) -> Tensor:
            return p * link(x, torch.ones_like(x)) + (1 - p) * link(-x, torch.ones_like(x))

        assert lowest(mean) == pytest.approx(h, abs=1e-5), name
    flipped = 0.9 * p + 0.1 * (1 - p)
    robust = Robust(0.1)
    assert lowest(lambda x: robust(x, torch.full_like(x, flipped))) == pytest.approx(logit, abs=1e-5), "labels of which a tenth is wrong"
    assert lowest(lambda x: Logistic()(x, torch.full_like(x, p))) == pytest.approx(logit, abs=1e-5), "soft labels"
    for link, x in ((NoiseContrast(), math.log(2 * p)), (Classifier(), logit)):
        assert lowest(lambda r, v=link: p * v.good(r) + (1 - p) * v.bad(r)) == pytest.approx(x, abs=1e-5)
    rate = PREFERENCES["sppo_hard"].link
    assert lowest(lambda r: p * rate.good(r) + (1 - p) * rate.bad(r)) == pytest.approx((2 * p - 1) / 0.2, abs=1e-5)  # type: ignore[union-attr]


def test_robust_is_the_loss_of_right_labels_in_the_mean() -> None:
    h = torch.linspace(-3, 3, 7, dtype=torch.float64)
    one = torch.ones_like(h)
    mean = 0.8 * Robust(0.2)(h, one) + 0.2 * Robust(0.2)(-h, one)
    torch.testing.assert_close(mean, Logistic()(h, one), rtol=0, atol=1e-12)


def test_conservative_minimum() -> None:
    """(1 - a) ls(x) + a ls(-x) is largest at x = log((1 - a) / a)."""
    x, one = math.log(9), double(1.0)
    link = Logistic(0.1)
    assert link(double(x), one).item() == pytest.approx(0.325083, abs=5e-7)
    assert link(double(x), one) < link(double(x + 1e-3), one) and link(double(x), one) < link(double(x - 1e-3), one)
    half = Logistic(0.5)
    torch.testing.assert_close(half(double(1.3), one), half(double(-1.3), one))
    torch.testing.assert_close(Logistic(1.0)(double(1.3), one), Logistic(0.0)(double(-1.3), one))


def test_discopop_has_a_hollow_below_nought() -> None:
    """At temperature .05 the loss falls from h = 0 to a hollow at -.11857 and rises to a hump at .072; above (1 - log 2) / 3 it only falls."""
    h = torch.linspace(-1, 1, 20001, dtype=torch.float64).requires_grad_()
    for temperature, turns in ((0.05, [-0.11857, 0.072]), (0.1, [-0.11703, 0.0085]), (0.2, [])):
        link = DiscoPop(temperature)
        (slope,) = torch.autograd.grad(link(h, torch.ones_like(h)).sum(), h)
        found = h.detach()[1:][(slope[1:] > 0) != (slope[:-1] > 0)]
        assert found.tolist() == pytest.approx(turns, abs=2e-4)
        assert slope[10000].item() == pytest.approx((1 - math.log(2)) / (4 * temperature) - 0.75, abs=1e-9)
        assert link.uphill == (slope[10000] > 0)
    assert "link.temperature above 0.103" in PREFERENCES["discopop"].notes()[0] and DPO.notes() == []


def test_wrong_pairs_cost_linearly() -> None:
    assert Logistic()(double(-10, -5), double(1, 1)).tolist() == pytest.approx([10.0000454, 5.0067], abs=5e-5)


R, REF, BETA = double(1, 0.5, 0, -0.5, 0.2), double(0.1, 0.3, 0.2, 0.25, 0.15), 0.5
A, B = torch.combinations(torch.arange(5)).unbind(1)


def population(row: Preference, start: Tensor, read: Callable[[Tensor], Tensor], rate: float, steps: int) -> Tensor:
    """Gradient descent on the mean loss over all ten pairs of arms, labels as probabilities of Bradley-Terry."""
    x = start.clone().requires_grad_()
    for _ in range(steps):
        scores = read(x)
        pairs = Pairs.of(
            Answers.of(scores[A], reference=REF.log()[A], lengths=torch.ones(10)), Answers.of(scores[B], reference=REF.log()[B], lengths=torch.ones(10)),
            probability=(R[A] - R[B]).sigmoid(),
        )  # fmt: skip
        (gradient,) = torch.autograd.grad(row.loss(pairs), x)
        x = (x - rate * gradient).detach().requires_grad_()
    return x.detach()


def test_dpo_goes_to_the_boltzmann_policy() -> None:
    """ref exp(r / beta) / Z on Bradley-Terry data, from a policy far away; the population gradient there is 0."""
    boltzmann = double(0.35693617, 0.39392844, 0.09661212, 0.04442701, 0.10809626)
    torch.testing.assert_close((REF.log() + R / BETA).softmax(0), boltzmann, rtol=0, atol=1e-8)
    row = replace(DPO, margin=ImplicitReward(BETA))
    found = population(row, double(-1, 2, 0, 1, 0.5), lambda x: x.log_softmax(0), rate=40, steps=120)
    torch.testing.assert_close(found.softmax(0), (REF.log() + R / BETA).softmax(0), rtol=0, atol=1e-10)


def test_cdpo_goes_elsewhere_and_robust_does_not() -> None:
    """h = logit((1 - e) p + e (1 - p)): with smoothing the gaps shrink."""
    start, reads = REF.log(), lambda x: x.log_softmax(0)
    found = population(replace(DPO, margin=ImplicitReward(BETA), link=Logistic(0.1)), start, reads, rate=40, steps=120)
    assert (found.softmax(0) - (REF.log() + R / BETA).softmax(0)).abs().max() > 0.02
    p = (R[0] - R[1]).sigmoid()
    only = replace(DPO, margin=ImplicitReward(BETA), link=Logistic(0.1))
    pair = Pairs.of(
        Answers.of(REF.log()[:1], reference=REF.log()[:1]), Answers.of(REF.log()[1:2], reference=REF.log()[1:2]), probability=p[None]
    )
    x = lowest(lambda h: only.link(h, pair.probability.expand(len(h))))  # type: ignore[operator]
    assert x == pytest.approx(torch.logit(0.9 * p + 0.1 * (1 - p)).item(), abs=1e-5)


def test_ipo_goes_to_the_policy_tilted_by_the_chance_to_win() -> None:
    """ref exp(w / beta) / Z, w the chance to beat an answer drawn evenly, itself (half a win) included."""
    found = population(PREFERENCES["ipo"], REF.log(), lambda x: x.log_softmax(0), rate=0.8, steps=60)
    wins = (R[:, None] - R[None, :]).sigmoid().mean(1)
    torch.testing.assert_close(found.softmax(0), (REF.log() + wins / 0.1).softmax(0), rtol=0, atol=1e-10)


def test_the_reward_model_recovers_the_reward_up_to_a_constant() -> None:
    found = population(RM, torch.zeros(5).double(), lambda x: x, rate=10, steps=80)
    torch.testing.assert_close(found - found.mean(), R - R.mean(), rtol=0, atol=1e-10)
    shifted = population(RM, torch.full((5,), 3.0).double(), lambda x: x, rate=10, steps=80)
    torch.testing.assert_close(shifted - 3, found, rtol=0, atol=1e-9), "the loss does not see a constant"


# ------------------------------------------------------------------------------------------------ edges


@pytest.mark.parametrize("name", [n for n in PREFERENCES if n != "rm_deepspeed_chat"])
@pytest.mark.parametrize("scale", [1e-6, 30.0, 1000.0])
def test_far_pairs_stay_finite_in_float32(name: str, scale: float) -> None:
    """Answers that the policy finds far likelier, or less likely, than the reference does: no inf - inf, no 0 * inf."""
    row = PREFERENCES[name]
    w, lost = torch.tensor([-1.0, -2.0, -3.0]) * scale, torch.tensor([-3.0, -2.0, -1.0]) * scale
    w, lost = w.requires_grad_(), lost.requires_grad_()
    ref, n = torch.full((3,), -2.0 * min(scale, 40.0)), torch.full((3,), 2.0)
    if name in ("dpo_forward_kl", "dpo_alpha") and scale == 1000:
        return  # exp(-u) of a likelihood ratio e^-960 is beyond float32: the run stops with the loss named
    answers = [Answers.of(x, reference=ref, lengths=n, heads=x / 2, reference_heads=ref / 2, confidence=torch.zeros(3)) for x in (w, lost)]
    pairs = Pairs.of(*answers, mismatched=answers[0])
    loss = row.loss(pairs)
    gradient = torch.autograd.grad(loss, (w, lost))
    assert loss.isfinite() and all(g.isfinite().all() for g in gradient)


@pytest.mark.parametrize("kind", [ImplicitReward, ForwardKL, JensenShannon, AlphaDivergence])
def test_implicit_rewards_agree_where_policy_and_reference_do(kind: Any) -> None:
    """Every divergence: reward 0 at u = 0, with slope beta by u (half of it for Jensen-Shannon); beta is .1 unless said."""
    scores = double(-3.0, -1.0).requires_grad_()
    reward = kind()(Answers.of(scores, reference=double(-3.0, -1.0)))
    (slope,) = torch.autograd.grad(reward.sum(), scores)
    assert reward.tolist() == pytest.approx([0, 0], abs=1e-12) and kind().beta == 0.1
    assert slope.tolist() == pytest.approx([0.05 if kind is JensenShannon else 0.1] * 2, abs=1e-12)


def test_a_certain_answer_has_finite_odds() -> None:
    certain = torch.zeros(1).requires_grad_()
    pairs = Pairs.of(*(Answers.of(x, lengths=torch.ones(1)) for x in (certain, torch.full((1,), -1.0))))
    loss = PREFERENCES["orpo"].loss(pairs)
    assert loss.isfinite() and torch.autograd.grad(loss, certain)[0].isfinite()


def test_identical_answers_cost_log_two_and_pull_nowhere() -> None:
    score = double(0.7).requires_grad_()
    loss = RM.loss(Pairs.of(score, score))
    (gradient,) = torch.autograd.grad(loss, score)
    assert loss.item() == pytest.approx(math.log(2)) and gradient.item() == 0
    assert RM.metrics(Pairs.of(score, score))["preference/accuracy"][0] == 0.5


def test_who_reads_what() -> None:
    """A statistic that nobody asked for is NaN, and loud where it is read all the same."""
    assert RM.needs == frozenset() and DPO.needs == {"reference"} and PREFERENCES["kto"].needs == {"reference", "mismatched"}
    assert PREFERENCES["ld_dpo"].needs == {"reference", "heads"} and PREFERENCES["wpo"].needs == {"reference", "confidence"}
    free = {name for name, row in PREFERENCES.items() if "reference" not in row.needs and row.margin.reads == "likelihood"}
    assert free == {"cpo", "simpo", "orpo", "slic"}
    plain = Pairs.of(double(-1), double(-2))
    assert RM.loss(SCORES).isfinite() and DPO.loss(SCORES).isnan() and PREFERENCES["simpo"].loss(plain).isnan()
    assert {name for name, row in PREFERENCES.items() if row.coupled} == {"aot", "aot_unpaired", "bco_pair"}
    assert {name for name, row in PREFERENCES.items() if row.apart} == {"kto", "bco_pair", "nca_pair", "apo_zero", "sppo_hard"}


def test_metrics() -> None:
    found = {key: (total / weight).item() for key, (total, weight) in DPO.metrics(P).items()}
    assert found["preference/accuracy"] == 0.5
    assert found["preference/margin"] == pytest.approx((0.09 - 0.06) / 2)
    assert found["preference/rewards/chosen"] == pytest.approx(0.01) and found["preference/rewards/rejected"] == pytest.approx(-0.005)
    assert "preference/baseline" not in found


@pytest.mark.parametrize("make, reason", [
    (lambda: Preference(ImplicitReward(), Prospect()), "Prospect judges answers one by one, against a baseline: set comparison to zero"),
    (lambda: Preference(ImplicitReward(), Logistic(), comparison=Zero()), "Logistic judges the margin of two answers: set comparison to pair"),
    (lambda: Preference(ImplicitReward(offset=0.5), Prospect(), comparison=Zero()), "the offset 0.5 of ImplicitReward would do nothing"),
    (lambda: Preference(Likelihood(), Prospect(), comparison=MismatchedKL()), "MismatchedKL compares with the reference, and Likelihood reads none"),
    (lambda: Preference(Likelihood(), comparison=SortedMargins()), "SortedMargins compares with the reference, and Likelihood reads none"),
    (lambda: Preference(ScoreMargin(), regulariser=ChosenNLL()), "reads the likelihood of answers, and ScoreMargin is a reward model's score"),
    (lambda: Preference(ScoreMargin(), weight=Confidence()), "reads the likelihood of answers, and ScoreMargin is a reward model's score"),
    (lambda: Preference(ImplicitReward(), comparison=DivergentSpan()), "DivergentSpan reads a reward model's score at every position"),
    (lambda: Preference(ImplicitReward(tail=0.5), Prospect(), comparison=MismatchedKL()), "set the tail of ImplicitReward to 1"),
    (lambda: Robust(0.5), "smoothing=0.5 must lie in [0, .5): where half of the labels are wrong"),
    (lambda: ReverseKL(0.0), "smoothing=0.0 must lie in (0, .5): KL(q || label) is infinite"),
    (lambda: Logistic(1.1), "smoothing=1.1 must lie in [0, 1]"),
    (lambda: ImplicitReward(beta=0), "beta=0 must be above 0"),
    (lambda: ImplicitReward(tail=1.5), "tail=1.5 must lie in [0, 1]"),
    (lambda: ImplicitReward(mean=True, tail=0.5), "mean and tail both answer the question of length"),
    (lambda: AlphaDivergence(alpha=1), "alpha=1 must lie in [0, 1); 1 is the reverse KL"),
    (lambda: Fidelity(0.5), "target=0.5 must lie in (.5, 1]"),
    (lambda: Hinge(0), "distance=0 must be above 0"),
    (lambda: Prospect(undesirable=0), "undesirable=0 must be above 0"),
    (lambda: Constant(0), "factor=0 must be above 0"),
    (lambda: Confidence(cap=0), "cap=0 must be above 0"),
    (lambda: RunningMean(count=-1), "count=-1 must not be negative"),
    (lambda: ChosenNLL(-1), "coefficient"),
])  # fmt: skip
def test_rows_and_pieces_that_cannot_be(make: Callable[[], object], reason: str) -> None:
    with pytest.raises(UsageError) as caught:
        make()
    assert reason in str(caught.value)


@pytest.mark.parametrize("kind", [ImplicitReward, ForwardKL, JensenShannon, AlphaDivergence, Likelihood, Squared, WinRate])
@pytest.mark.parametrize("beta", [0.0, -0.1, math.inf, math.nan])
def test_a_strength_is_a_number_above_nought(kind: Any, beta: float) -> None:
    with pytest.raises(UsageError, match=f"{kind.__name__}: beta={beta} must be above 0"):
        kind(beta=beta)


@pytest.mark.parametrize("kind, field, inside, outside", [
    (Logistic, "smoothing", [0, 1], [-0.1, 1.1]), (Robust, "smoothing", [0, 0.49], [-0.1, 0.5]), (ReverseKL, "smoothing", [0.01, 0.49], [0, 0.5]),
    (Hinge, "distance", [0.1], [0, -1]), (Fidelity, "target", [0.51, 1], [0.5, 1.1]), (DiscoPop, "temperature", [0.01], [0, -1]),
    (Prospect, "desirable", [0.1], [0, math.inf]), (Prospect, "undesirable", [0.1], [0, math.inf]), (ImplicitReward, "tail", [0, 1], [-0.1, 1.1]),
    (AlphaDivergence, "alpha", [0, 0.99], [-0.1, 1]), (Constant, "factor", [0.1], [0, math.inf]), (Confidence, "cap", [0.1, math.inf], [0, -1]),
    (Centring, "coefficient", [0, 1], [-1]), (ChosenNLL, "coefficient", [0, 1], [-1]), (RunningMean, "count", [0, 1], [-1]),
])  # fmt: skip
def test_limits_of_pieces(kind: Any, field: str, inside: list[float], outside: list[float]) -> None:
    for value in inside:
        assert getattr(kind(**{field: value}), field) == value
    for value in outside:
        with pytest.raises(UsageError, match=field):
            kind(**{field: value})


def test_defaults_are_those_of_the_papers() -> None:
    kinds = (ScoreMargin, ImplicitReward, ForwardKL, JensenShannon, AlphaDivergence, Likelihood, Logistic, Robust, Squared, Hinge, Fidelity, ReverseKL,
             DiscoPop, WinRate, Prospect, Centring, ChosenNLL, Constant, Confidence, RunningMean)  # fmt: skip
    assert " ".join(repr(kind()).replace(", ", ",") for kind in kinds) == (
        "ScoreMargin(offset=0.0) ImplicitReward(beta=0.1,offset=0.0,mean=False,tail=1.0) ForwardKL(beta=0.1,offset=0.0) JensenShannon(beta=0.1,offset=0.0) "
        "AlphaDivergence(beta=0.1,alpha=0.5,offset=0.0) Likelihood(beta=0.1,offset=0.0,mean=False) Logistic(smoothing=0.0) Robust(smoothing=0.1) Squared(beta=0.1) "
        "Hinge(distance=1.0) Fidelity(target=1.0) ReverseKL(smoothing=0.1) DiscoPop(temperature=0.05) WinRate(beta=0.1) Prospect(desirable=1.0,undesirable=1.0) "
        "Centring(coefficient=0.01) ChosenNLL(coefficient=1.0,mean=False) Constant(factor=0.1) Confidence(cap=inf) RunningMean(mean=0.0,count=0)"
    )


def test_check_says_which_data_serve() -> None:
    assert [name for name, row in PREFERENCES.items() if not row.check(paired=False)] == [
        "kto",
        "bco_pair",
        "nca_pair",
        "apo_zero",
        "sppo_hard",
    ]
    assert "labelled answers: use a row such as kto" in DPO.check(paired=False)[0]
    assert "set its tail to 1" in replace(PREFERENCES["apo_zero"], margin=ImplicitReward(tail=0.5)).check(paired=False)[0]
    assert "regulariser and weight" in replace(PREFERENCES["kto"], regulariser=ChosenNLL()).check(paired=False)[0]
    assert "bring margins" in PREFERENCES["kto"].check(margins=True)[0] and "probabilities" in PREFERENCES["aot"].check(probability=True)[0]
    assert "rankings" in PREFERENCES["aot"].check(uneven=True)[0] and DPO.check(uneven=True, margins=True, probability=True) == []


def test_pieces_of_your_own() -> None:
    """A link is a frozen dataclass with __call__(margin, probability); a verdict one with good and bad."""

    @dataclass(frozen=True)
    class Exponential:
        def __call__(self, margin: Tensor, probability: Tensor) -> Tensor:
            return (-margin).exp()

    @dataclass(frozen=True)
    class Linear:
        def good(self, reward: Tensor) -> Tensor:
            return -reward

        def bad(self, reward: Tensor) -> Tensor:
            return reward

    row = replace(DPO, link=Exponential())
    assert not row.apart and row.each(P).tolist() == pytest.approx([math.exp(-0.09), math.exp(0.06)])
    alone = Preference(ImplicitReward(), Linear(), comparison=Zero())
    assert alone.apart and alone.each(P).tolist() == pytest.approx([-0.09, 0.06])
    assert Partner() == row.comparison and isinstance(PREFERENCES["aot_unpaired"].comparison, SortedAnswers)
