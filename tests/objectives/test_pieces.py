"""Single pieces: clip slopes, generalised advantage estimation, value loss, whitening, refused values, and fixture T."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from dataclasses import fields, is_dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

import tilt.objectives as library
from tilt.errors import UsageError
from tilt.objectives import (
    ALGORITHMS,
    GAE,
    K1,
    K2,
    K3,
    PIECES,
    PREFERENCES,
    CappedScore,
    Clip,
    Doubling,
    EntropyBonus,
    EntropyTarget,
    GeometricRatio,
    GroupRelative,
    HighEntropy,
    Imitate,
    Importance,
    Layout,
    NoPenalty,
    NoRatio,
    NoValue,
    Objective,
    OldKL,
    Outputs,
    PerBudget,
    Proportional,
    Return,
    ReturnToGo,
    Rewards,
    Score,
    SequenceAverage,
    SequenceMask,
    Signals,
    SoftGate,
    TokenAverage,
    TokenRatio,
    TruncatedImportance,
    TrustRegion,
    TwoSided,
    ValueLoss,
    batch_metrics,
)


def double(*numbers: float) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


def slope(surrogate: Any, ratio: float, advantage: float) -> tuple[float, float]:
    """Value of the gain and its derivative by the ratio."""
    rho = double(ratio).requires_grad_()
    gain = surrogate(rho, torch.zeros_like(rho), double(advantage))
    gain.sum().backward()
    return gain.item(), rho.grad.item()


@pytest.mark.parametrize(
    ("ratio", "advantage", "value", "derivative"),
    [(0.5, 1, 0.5, 1), (1, 1, 1, 1), (1.5, 1, 1.2, 0), (0.5, -1, -0.8, 0), (1, -1, -1, -1), (1.5, -1, -1.5, -1)],
)
def test_clip_slopes(ratio: float, advantage: float, value: float, derivative: float) -> None:
    assert slope(Clip(0.2, 0.2), ratio, advantage) == pytest.approx((value, derivative))
    low, high = Clip(0.2, 0.2).clipped(double(ratio), double(advantage))
    assert (low | high).item() == (derivative == 0)
    assert value <= ratio * advantage, "the clipped objective is pessimistic"


@pytest.mark.parametrize(("ratio", "derivative"), [(0.5, 0), (1.0, -1), (2.9, -1), (3.1, 0)])
def test_two_sided_bounds_bad_actions_too(ratio: float, derivative: float) -> None:
    assert slope(TwoSided(0.2, 0.2, 3.0), ratio, -1) == pytest.approx((max(min(ratio, 3.0), 0.8) * -1, derivative))
    assert slope(TwoSided(0.2, 0.2, 3.0), ratio, 1) == slope(Clip(0.2, 0.2), ratio, 1)
    low, high = TwoSided(0.2, 0.2, 3.0).clipped(double(ratio), double(-1))
    assert (low | high).item() == (derivative == 0)


@pytest.mark.parametrize("surrogate", [Importance(), Clip(), Clip(0.2, 0.28), TwoSided(), SoftGate()])
@pytest.mark.parametrize("advantage", [2.0, -0.7])
def test_every_gate_has_slope_one_at_ratio_one(surrogate: Any, advantage: float) -> None:
    assert slope(surrogate, 1.0, advantage)[1] == pytest.approx(advantage)


def test_capped_score_keeps_every_gradient() -> None:
    logprobs = double(-1, -1, -1).requires_grad_()
    CappedScore(1.28)(double(0.5, 1.2, 4), logprobs, double(1, 1, -2)).sum().backward()
    assert logprobs.grad.tolist() == pytest.approx([0.5, 1.2, -2.56])


@pytest.mark.parametrize(
    ("gamma", "lam", "expected"),
    [(1, 0.95, [0.62695, 0.881, 0.38]), (1, 0, [-0.21, 0.52, 0.38]), (1, 1, [0.69, 0.9, 0.38]), (0.9, 0.8, [0.308192, 0.7336, 0.38])],
)
def test_gae_numbers(gamma: float, lam: float, expected: list[float]) -> None:
    credit = GAE(gamma, lam, whitened=False)
    signals = Signals.of(double(0, 0, 0), values=double(0.3, 0.1, 0.6))
    rewards = Rewards.of(double(0), double(-0.01, 0.02, 0.98))
    row = replace(ALGORITHMS["ppo"], credit=credit)
    experience = row.prepare(rewards, signals, Layout.of([3]))
    assert experience.advantages.tolist() == pytest.approx(expected, abs=1e-12)
    assert experience.returns.tolist() == pytest.approx([a + v for a, v in zip(expected, [0.3, 0.1, 0.6], strict=True)], abs=1e-12)


@pytest.mark.parametrize("seed", range(4))
def test_gae_is_the_mixture_of_n_step_advantages(seed: int) -> None:
    """(1 - lam) sum lam^(k-1) A^(k), the last weight lam^(T-t-1), with a value after the end."""
    generator = torch.Generator().manual_seed(seed)
    lengths, gamma, lam = [5, 1, 8], 0.9, 0.7
    layout = Layout.of(lengths)
    reward, value = torch.randn(14, dtype=torch.float64, generator=generator), torch.randn(14, dtype=torch.float64, generator=generator)
    final = torch.randn(3, dtype=torch.float64, generator=generator)
    row = replace(ALGORITHMS["ppo"], credit=GAE(gamma, lam, whitened=False))
    found = row.prepare(
        Rewards.of(torch.zeros(3).double(), reward), Signals.of(torch.zeros(14).double(), values=value, final=final), layout
    )
    for i, n in enumerate(lengths):
        r, v = reward[layout.sequence == i].tolist(), value[layout.sequence == i].tolist() + [final[i].item()]
        for t in range(n):
            mixture = 0.0
            for k in range(1, n - t + 1):
                step = sum(gamma**b * r[t + b] for b in range(k)) + gamma**k * v[t + k] - v[t]
                mixture += step * (lam ** (k - 1) * (1 - lam) if k < n - t else lam ** (k - 1))
            assert found.advantages[layout.starts[i] + t].item() == pytest.approx(mixture, abs=1e-12)


def test_final_value_of_a_cut_answer_is_its_bootstrap() -> None:
    """Without a final value the answer ended by itself: V = 0 after it. A final value that was asked for and is NaN is loud."""
    row, layout = replace(ALGORITHMS["ppo"], credit=GAE(1, 1, whitened=False)), Layout.of([2, 1])
    rewards, values = Rewards.of(double(1, 0)), double(0.5, 0.25, 0.125)
    ended = row.prepare(rewards, Signals.of(double(0, 0, 0), values=values), layout)
    cut = row.prepare(rewards, Signals.of(double(0, 0, 0), values=values, final=double(0, 3)), layout)
    assert ended.advantages.tolist() == [0.5, 0.75, -0.125]
    assert cut.advantages.tolist() == [0.5, 0.75, 2.875]
    loud = row.prepare(rewards, Signals.of(double(0, 0, 0), values=values, sequences=2), layout)
    assert loud.advantages.isnan().all()


def test_clip_reward_clamps_the_score_and_not_the_kl() -> None:
    signals = Signals.of(double(-1, -1), reference=double(-101, -101), values=double(0, 0))
    row = replace(ALGORITHMS["ppo"], credit=GAE(1, 1, kl=0.1, clip_reward=5, whitened=False))
    assert row.prepare(Rewards.of(double(7, -9)), signals, Layout.of([1, 1])).advantages.tolist() == [-5, -15]


def test_value_loss_numbers(f: Any) -> None:
    new, old, returns = double(0.5, 1, -0.2), double(0.1, 0.9, 0.4), double(1, 0.2, 0.3)
    assert ValueLoss(1, 0.2)(new, old, returns).mean().item() == pytest.approx(0.23)
    assert ValueLoss(1)(new, old, returns).mean().item() == pytest.approx((0.25 + 0.64 + 0.25) / 6)
    row = ALGORITHMS["ppo"]
    metrics = row.metrics(f.outputs(), row.prepare(f.rewards, f.signals, f.layout))
    assert (metrics["loss/value_avg"][0] / metrics["loss/value_avg"][1]).item() == pytest.approx(0.102342052811, abs=1e-12)
    assert (metrics["val/clipfrac_avg"][0] / metrics["val/clipfrac_avg"][1]).item() == pytest.approx(0.2)


# ------------------------------------------------------------------------------------------------ fixture T


def test_fixture_t_corrected_advantages(t: Any) -> None:
    plain = replace(ALGORITHMS["ppo"], credit=GAE(kl=0.05, whitened=False)).prepare(t.rewards, t.signals, t.layout)
    expected = double(0.63448125, 0.867875, 0.3925, -0.57072569, -0.37971125, -0.931275, -0.8645, -0.61)
    torch.testing.assert_close(plain.advantages, expected, rtol=0, atol=5e-9)
    torch.testing.assert_close(plain.returns, plain.advantages + t.signals.values)
    white = ALGORITHMS["ppo"].prepare(t.rewards, t.signals, t.layout).advantages
    expected = double(1.15570379, 1.48579472, 0.81346747, -0.5488315, -0.27867802, -1.05875972, -0.96431922, -0.60437752)
    torch.testing.assert_close(white, expected, rtol=0, atol=5e-9)


def read(metrics: Mapping[str, tuple[Tensor, Tensor]]) -> dict[str, float]:
    return {key: (total / weight).item() for key, (total, weight) in metrics.items()}


def test_fixture_t_corrected_metrics(t: Any) -> None:
    row = replace(ALGORITHMS["ppo"], value=NoValue())
    outputs, experience = t.outputs(), row.prepare(t.rewards, t.signals, t.layout)
    found = read(row.metrics(outputs, experience)) | read(batch_metrics(t.rewards, t.signals, t.layout, kl=0.05))
    expected = {
        "loss/policy_avg": 0.009604981678, "policy/clipfrac_avg": 0.375, "policy/approxkl_avg": 0.04203125, "val/ratio": 1.008496616064,
        "objective/kl": 0.125, "objective/entropy": 3.375, "objective/non_score_reward": -0.00625, "objective/scores": 0.25,
        "objective/rlhf_reward": 0.24375,
    }  # fmt: skip
    for key, value in expected.items():
        assert found[key] == pytest.approx(value, abs=1e-12), key
    assert row.loss(outputs, experience).item() == pytest.approx(0.009604981678, abs=1e-12)


def test_fixture_t_rloo(t: Any) -> None:
    row = ALGORITHMS["rloo_clip"]
    outputs, experience = t.outputs(), row.prepare(t.rewards, t.signals, t.layout)
    torch.testing.assert_close(experience.returns[t.layout.last], double(0.9975, -0.51))
    torch.testing.assert_close(experience.advantages[t.layout.last], double(1.5075, -1.5075))
    ratio = row.ratio(outputs.logprobs, t.signals.old, t.layout, torch.zeros_like(t.signals.old))[t.layout.last]
    torch.testing.assert_close(ratio.detach(), double(1.1618342427, 0.6703200460), rtol=0, atol=5.1e-11)
    assert row.loss(outputs, experience).item() == pytest.approx(-0.272732560456, abs=1e-12)
    assert read(row.metrics(outputs, experience))["policy/clipfrac_avg"] == 0.5


def test_clip_fraction_and_approxkl_on_fixture_f(f: Any) -> None:
    def of(name: str) -> dict[str, float]:
        row = ALGORITHMS[name]
        return read(row.metrics(f.outputs(), row.prepare(f.rewards, f.signals, f.layout)))

    assert of("grpo")["policy/clipfrac_avg"] == pytest.approx(0.3) and of("grpo")["policy/approxkl_avg"] == pytest.approx(0.03825)
    assert of("ppo")["policy/clipfrac_avg"] == pytest.approx(0.2)
    assert of("gspo")["policy/clipfrac_avg"] == pytest.approx(0.5), "of four answers, not of ten actions"
    ratios = (f.outputs().logprobs - f.signals.old).exp()
    assert of("grpo")["val/ratio_spread"] == pytest.approx(((ratios - 1) ** 2).mean().item())


# ------------------------------------------------------------------------------------------------- the table


def test_pieces_hold_every_piece_that_a_row_uses() -> None:
    for slot in ("credit", "ratio", "surrogate", "average", "penalty", "value"):
        for row in ALGORITHMS.values():
            assert type(getattr(row, slot)) in PIECES[slot].values()
    for slot in ("margin", "link", "regulariser", "comparison", "weight"):
        for preference in PREFERENCES.values():
            assert type(getattr(preference, slot)) in PIECES[slot].values()


@pytest.mark.parametrize("row", [*ALGORITHMS.values(), *PREFERENCES.values()], ids=[*ALGORITHMS, *PREFERENCES])
def test_a_row_is_its_own_record(row: Any) -> None:
    """repr builds it again, it pickles, it compares, it cannot be changed."""
    names = {name: getattr(library, name) for name in library.__all__} | {"inf": float("inf")}
    assert eval(repr(row), names) == row
    assert pickle.loads(pickle.dumps(row)) == row and hash(row) == hash(pickle.loads(pickle.dumps(row)))
    with pytest.raises(AttributeError):
        setattr(row, fields(row)[0].name, None)


def test_pieces_are_frozen_dataclasses_that_stand_without_arguments() -> None:
    for names in PIECES.values():
        for piece in names.values():
            assert is_dataclass(piece) and piece() == piece()


@pytest.mark.parametrize("table", [ALGORITHMS, PREFERENCES, PIECES])
def test_the_tables_cannot_be_changed(table: Any) -> None:
    with pytest.raises(TypeError):
        table["mine"] = 1


@pytest.mark.parametrize(
    ("piece", "keys"),
    [
        (Clip, {"low": -0.1}), (TwoSided, {"delta": 1.1}), (CappedScore, {"cap": 0.2}), (SoftGate, {"positive": 0}), (PerBudget, {"length": 0}),
        (GAE, {"lam": 1.5}), (GAE, {"kl": -1}), (GAE, {"clip_reward": float("nan")}), (ReturnToGo, {"gamma": -0.1}), (GroupRelative, {"eps": -1}),
        (ValueLoss, {"coefficient": 0}), (ValueLoss, {"clip": -1}), (K1, {"beta": -1}), (K2, {"beta": -1}), (K3, {"beta": -1}),
        (K3, {"beta": -1}), (library.Logistic, {"smoothing": 1.1}), (library.ImplicitReward, {"beta": 0}), (library.Centring, {"coefficient": -1}),
    ],
)  # fmt: skip
def test_impossible_numbers_are_refused_by_name(piece: Any, keys: dict[str, float]) -> None:
    with pytest.raises(UsageError, match=next(iter(keys))):
        piece(**keys)


def test_passes() -> None:
    """One pass for a plain score or ratio over fresh samples; any number where a clip, a bounded ratio, a penalty to `old` or a demonstration holds the policy."""
    one = {"reinforce", "reinforce_rtg", "reinforce_baseline", "a2c", "trpo", "rloo", "cispo", "distill"}
    many = {"sft", "raft", "dft", "rloo_clip", "ppo", "nlpo", "ppo_kl", "reinforce_pp", "grpo", "dapo", "gspo", "gmpo", "sapo", "vespo"}
    assert {ALGORITHMS[name].passes for name in one} == {1} and {ALGORITHMS[name].passes for name in many} == {None}
    held = Objective(GroupRelative(), TokenRatio(), Importance(), TokenAverage())
    assert held.passes == 1 and replace(held, penalty=OldKL()).passes is None and replace(held, penalty=TrustRegion()).passes == 1


@pytest.mark.parametrize(
    ("name", "needs"),
    [
        ("sft", ""), ("raft", ""), ("reinforce", ""), ("reinforce_baseline", "values"), ("rloo", "old reference"), ("ppo", "old reference values"),
        ("grpo", "old reference"), ("dr_grpo", "old"), ("dapo", "old"), ("grpo_tis", "old sampler"), ("high_entropy", "entropy old"),
        ("distill", "old reference"), ("trpo", "old values"), ("ppo_kl", "old reference values"), ("grpo_unbiased_kl", "old reference"),
    ],
)  # fmt: skip
def test_needs(name: str, needs: str) -> None:
    assert " ".join(sorted(ALGORITHMS[name].needs)) == needs
    assert ALGORITHMS["grpo"].credit.needs == frozenset() and ALGORITHMS["ppo"].credit.needs == {"old", "reference", "values"}


def test_rows_that_cannot_mean_what_they_say_are_refused() -> None:
    grpo = ALGORITHMS["grpo"]
    for change, words in [
        ({"ratio": NoRatio()}, "moves the policy through the ratio"),
        ({"surrogate": Score()}, "does not read the ratio"),
        ({"control": Proportional(), "penalty": NoPenalty()}, "KL divergence"),
        ({"control": EntropyTarget()}, "no entropy bonus"),
        ({"control": Doubling()}, "old_kl"),
        ({"control": Doubling(), "surrogate": Importance(), "penalty": OldKL(0.0)}, "beta above 0"),
        ({"control": Proportional(), "surrogate": Importance(), "penalty": OldKL(1.0)}, "KL divergence"),
    ]:
        with pytest.raises(UsageError, match=words):
            replace(grpo, **change)


# ------------------------------------------------------------------------------- corrections, bonus and control


def test_step_rewards_are_normalised_over_the_group_and_summed_to_come() -> None:
    """Steps (2, .5), (5, 1.0) on 5 actions and (3, -.5) on 4; a step that earns 0 counts where `ends` says so."""
    layout, row = Layout.of([5, 4], [0, 0]), replace(ALGORITHMS["grpo_process"], penalty=NoPenalty())
    steps = double(0, 0.5, 0, 0, 1.0, 0, 0, -0.5, 0)
    found = row.prepare(Rewards.of(double(9, -9), steps), Signals.of(torch.zeros(9).double()), layout).advantages
    assert found[:5].tolist() == pytest.approx([1.0910894512] * 2 + [0.8728715609] * 3, abs=1e-10)
    assert found[5:].tolist() == pytest.approx([-1.0910894512] * 3 + [0], abs=1e-10)
    ends = torch.tensor([0, 1, 0, 0, 1, 0, 0, 1, 1], dtype=torch.bool)
    more = row.prepare(Rewards.of(double(9, -9), steps, ends=ends), Signals.of(torch.zeros(9).double()), layout).advantages
    spread = ((0.25**2 + 0.75**2 + 0.75**2 + 0.25**2) / 3) ** 0.5
    assert more.tolist() == pytest.approx([x / spread for x in [1.0, 1.0, 0.75, 0.75, 0.75, -1.0, -1.0, -1.0, -0.25]])
    flat = Rewards.of(double(0, 0), double(0, 0.3, 0, 0, 0.3, 0, 0, 0.3, 0))
    assert (row.prepare(flat, Signals.of(torch.zeros(9).double()), layout).advantages == 0).all()


def test_sequence_mask_leaves_out_bad_answers_that_the_policy_has_left(f: Any) -> None:
    """mean_t (sampler - policy): -.0667, -.0250, -.0250, 0 on F; only answers with a negative advantage can be left out."""
    row = replace(ALGORITHMS["dapo"], corrections=(SequenceMask(0.0),))
    outputs = f.outputs()
    outputs = replace(outputs, logprobs=(outputs.logprobs.detach() - double(0, 0, 0, 0.5, 0.5, 1, 1, 1, 1, 0)).requires_grad_())
    row.loss(outputs, row.prepare(f.rewards, f.signals, f.layout)).backward()
    moved = outputs.logprobs.grad != 0
    assert not moved[3:5].any() and moved[9], "bad and left behind; bad and not left behind"
    assert moved[5:9].all(), "the third answer is good, so it stays although the policy has left it"


def test_high_entropy_keeps_its_share_and_the_denominators(f: Any) -> None:
    row = replace(ALGORITHMS["dapo"], corrections=(HighEntropy(0.3),))
    experience = row.prepare(f.rewards, f.signals, f.layout)
    kept = f.signals.entropy >= f.signals.entropy.sort().values[7]
    assert experience.factors.tolist() == kept.to(torch.float64).tolist() and kept.sum() == 3
    assert experience.weights.sum() == pytest.approx(1), "denominators count every action"


def test_factors_leave_the_value_term_alone(f: Any) -> None:
    ppo = ALGORITHMS["ppo"]
    plain, masked = f.outputs(), f.outputs()
    ppo.loss(plain, ppo.prepare(f.rewards, f.signals, f.layout)).backward()
    row = replace(ppo, corrections=(HighEntropy(0.3), TruncatedImportance(1.05)))
    row.loss(masked, row.prepare(f.rewards, f.signals, f.layout)).backward()
    assert torch.equal(plain.values.grad, masked.values.grad) and not torch.equal(plain.logprobs.grad, masked.logprobs.grad)


@pytest.mark.parametrize(
    ("penalty", "slope", "metric"),
    [(library.ExactKL(0.3), 0.3, "policy/kl_reference"), (OldKL(2.0), 2.0, "policy/kl_old"), (TrustRegion(), 0.0, "")],
)
def test_exact_penalties_take_beta_kl_off_every_action(f: Any, penalty: Any, slope: float, metric: str) -> None:
    """On fixture F with the token average: the loss grows by beta times the mean KL; a trust region takes nothing."""
    plain = Objective(GroupRelative(), TokenRatio(), Importance(), TokenAverage())
    row, outputs = replace(plain, penalty=penalty), f.outputs()
    experience = row.prepare(f.rewards, f.signals, f.layout)
    loss = row.loss(outputs, experience)
    before = plain.loss(outputs, experience).detach()
    mean = sum(k for line in f.kl for k in line) / 10
    assert float(loss.detach() - before) == pytest.approx(slope * mean, abs=1e-14)
    loss.backward()
    assert (outputs.kl.grad is None and not slope) or outputs.kl.grad.tolist() == pytest.approx([slope / 10] * 10)
    found = row.metrics(outputs, experience)
    assert ("policy/penalty_avg" in found) == bool(metric)
    if metric:
        total, count = found[metric]
        assert float(total / count) == pytest.approx(mean) and float(found["policy/penalty_avg"][0]) == pytest.approx(10 * slope * mean)


def test_entropy_bonus_raises_entropy(f: Any) -> None:
    row = replace(ALGORITHMS["dapo"], bonus=EntropyBonus(0.25))
    outputs = replace(f.outputs(), entropy=f.outputs().entropy.clone().requires_grad_())
    row.loss(outputs, row.prepare(f.rewards, f.signals, f.layout)).backward()
    assert outputs.entropy.grad.tolist() == pytest.approx([-0.25 / 10] * 10)


@pytest.mark.parametrize(("kl", "expected"), [(0.0, 0.5), (0.0066, 0.5), (0.0067, 1.0), (0.0149, 1.0), (0.0151, 2.0), (1.0, 2.0)])
def test_doubling(kl: float, expected: float) -> None:
    row = Objective(GroupRelative(), TokenRatio(), Importance(), TokenAverage(), OldKL(1.0), control=Doubling(0.01))
    assert row.control(row, {"policy/kl_old": kl}) == replace(row, penalty=OldKL(expected))


@pytest.mark.parametrize(
    ("kl", "answers", "expected"),
    [(6.0, 64, 0.2), (60.0, 64, 0.2 * (1 + 0.2 * 64 / 10000)), (0.0, 64, 0.2 * (1 - 0.2 * 64 / 10000)), (6.6, 500, 0.2 * 1.005)],
)
def test_proportional(kl: float, answers: int, expected: float) -> None:
    row = replace(ALGORITHMS["ppo"], credit=GAE(kl=0.2), control=Proportional())
    found = row.control(row, {"objective/kl": kl, "sequences": answers})
    assert found.credit.kl == pytest.approx(expected, rel=1e-12) and replace(found, credit=row.credit) == row


def test_a_controller_can_come_back_from_anywhere() -> None:
    """Coefficients stay between 1e-10 and 1e10: a thousand steps below the target, or one of more answers than the horizon, switch nothing off."""
    row = Objective(GroupRelative(), TokenRatio(), Importance(), TokenAverage(), OldKL(1.0), control=Doubling(0.01))
    low = high = row
    for _ in range(1100):
        low, high = low.control(low, {"policy/kl_old": 0.0}), high.control(high, {"policy/kl_old": 1.0})
    assert low.penalty.beta == 1e-10 and high.penalty.beta == 1e10
    assert low.control(low, {"policy/kl_old": 1.0}).penalty.beta == 2e-10 and high.control(high, {"policy/kl_old": 0.0}).penalty.beta == 5e9
    slow = replace(ALGORITHMS["ppo"], credit=GAE(kl=0.2), control=Proportional(horizon=100))
    assert slow.control(slow, {"objective/kl": 0.0, "sequences": 512}).credit.kl == 1e-10


def test_a_step_that_measured_nothing_keeps_the_row() -> None:
    row = ALGORITHMS["ppo_kl"]
    still = replace(row, control=library.NoControl())
    assert row.following({"reward": 1.0}) == row and still.following({"policy/kl_old": 9.0}) == still
    moved = row.following({"policy/kl_old": 9.0})
    assert moved == replace(row, penalty=OldKL(2.0)) and moved.credit.kl == 0.05, "the KL in the reward stays"
    assert row.controlled == {"kl_coefficient": 1.0} and ALGORITHMS["ppo"].controlled == {}
    assert ALGORITHMS["skywork"].controlled == {"entropy_coefficient": 0.005}


def test_entropy_target() -> None:
    row = ALGORITHMS["skywork"]
    assert row.control(row, {"policy/entropy_avg": 0.1}).bonus.coefficient == pytest.approx(0.01)
    lower = row.control(row, {"policy/entropy_avg": 0.3})
    assert lower.bonus.coefficient == 0 and lower.control(lower, {"policy/entropy_avg": 0.3}).bonus.coefficient == 0
    assert lower.control(lower, {"policy/entropy_avg": 0.1}).bonus.coefficient == pytest.approx(0.005), "it can come back from 0"


def test_check_says_what_cannot_run() -> None:
    assert ALGORITHMS["grpo"].check(samples=8, passes=4) == [] == ALGORITHMS["sft"].check(samples=1, passes=9)
    assert "samples=1" in ALGORITHMS["grpo"].check(samples=1, passes=1)[0] and "samples=1" in ALGORITHMS["rloo"].check(1, 1)[0]
    assert "samples=1" in ALGORITHMS["raft"].check(1, 1)[0]
    assert "passes=2" in ALGORITHMS["cispo"].check(samples=8, passes=2)[0]
    assert len(ALGORITHMS["rloo"].check(samples=1, passes=2)) == 2
    assert "nothing trains" in replace(ALGORITHMS["ppo"], value=NoValue()).check(8, 1)[0]
    assert "never reads" in replace(ALGORITHMS["grpo"], value=ValueLoss()).check(8, 1)[0]


def test_gspo_with_the_token_average_is_labelled() -> None:
    assert ALGORITHMS["gspo"].notes() == []
    assert "not GSPO" in replace(ALGORITHMS["gspo"], average=TokenAverage()).notes()[0]


def test_a_surrogate_of_your_own(f: Any) -> None:
    """A frozen dataclass with __call__ is a piece."""
    from dataclasses import dataclass

    @dataclass(frozen=True)
    class Cubic:
        power: float = 3.0

        def __call__(self, ratio: Tensor, logprobs: Tensor, advantages: Tensor) -> Tensor:
            return advantages * ratio**self.power

    row = Objective(GroupRelative(), TokenRatio(), Cubic(2.0), SequenceAverage())
    outputs, experience = f.outputs(), row.prepare(f.rewards, f.signals, f.layout)
    row.loss(outputs, experience).backward()
    assert row.passes is None and outputs.logprobs.grad.abs().sum() > 0 and "policy/clipfrac_avg" in row.metrics(outputs, experience)
    assert "Cubic" in library.card(row)


def test_raft_keeps_the_first_best_answer(f: Any) -> None:
    layout = Layout.of([1, 2, 1, 1], [0, 0, 0, 1])
    rewards = Rewards.of(double(1, 2, 2, -5))
    experience = ALGORITHMS["raft"].prepare(rewards, Signals.of(torch.zeros(5).double()), layout)
    assert experience.weights.tolist() == pytest.approx([0, 1 / 3, 1 / 3, 0, 1 / 3])
    assert Imitate("best").compares and not Return().compares and Score().passes == 1 and GeometricRatio().per_sequence


def test_outputs_without_values_are_enough_for_rows_without_a_critic(f: Any) -> None:
    row = ALGORITHMS["grpo"]
    loss = row.loss(Outputs.of(f.outputs().logprobs), row.prepare(f.rewards, f.signals, f.layout))
    assert loss.isfinite()


def test_a_credit_may_give_the_critic_a_target_after_the_last_action(f: Any) -> None:
    """That state weighs what the last action weighs; a sequence without a target (NaN) has none, and parts of the batch add up."""
    from dataclasses import dataclass

    @dataclass(frozen=True)
    class Further(library.GAE):
        def __call__(self, rewards: Rewards, signals: Signals, layout: Layout) -> library.Credited:
            return super().__call__(rewards, signals, layout)._replace(final=double(0.5, torch.nan, -0.5, 1.0))

    row = replace(ALGORITHMS["ppo"], credit=Further(kl=0.05), average=SequenceAverage(), value=ValueLoss(0.3, 0.2))
    plain = replace(row, credit=library.GAE(kl=0.05))
    signals = replace(f.signals, final=double(0.1, 0.2, 0.3, 0.4))
    old, new, goal = [0.1, 0.2, 0.3, 0.4], [0.6, 0.2, -0.3, 0.5], [0.5, None, -0.5, 1.0]
    expected = 0.0
    for i, n in enumerate((3, 2, 4, 1)):
        if goal[i] is not None:
            near = min(max(new[i], old[i] - 0.2), old[i] + 0.2)
            expected += 0.5 * max((new[i] - goal[i]) ** 2, (near - goal[i]) ** 2) / (4 * n)
    experience, bare = row.prepare(f.rewards, signals, f.layout), plain.prepare(f.rewards, signals, f.layout)
    final = double(*new).requires_grad_()
    outputs = replace(f.outputs(), final=final)
    more = row.loss(outputs, experience) - plain.loss(outputs, bare)
    assert more.item() == pytest.approx(0.3 * expected, abs=1e-12)
    more.backward()
    assert final.grad is not None and final.grad[1] == 0 and final.grad[3] != 0
    total, weight = row.metrics(outputs, experience)["loss/value_avg"]
    assert (total / weight).item() == pytest.approx(plain.metrics(outputs, bare)["loss/value_avg"][0].item() + expected, abs=1e-12)
    parts = 0.0
    for sequences in (torch.tensor([2, 0]), torch.tensor([1, 3])):
        actions = f.layout.actions_of(sequences)
        part = Outputs.of(outputs.logprobs[actions], values=outputs.values[actions], final=final[sequences])
        parts += row.loss(part, experience.take(sequences)).item()
    assert parts == pytest.approx(row.loss(outputs, experience).item(), abs=1e-12)
    unscored = replace(f.rewards, scored=torch.tensor([True, True, False, True]))
    assert row.prepare(unscored, signals, f.layout).final.isnan().tolist() == [False, True, True, False]
