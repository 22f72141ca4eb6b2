"""The natural step of a batch: the same whatever the micro-batches, that of plain closures, inside its limit; and exact penalties against reference and old."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch

from tilt.errors import UsageError
from tilt.kept import Kept
from tilt.learning import natural
from tilt.learning.learner import Learner, NonFinite, Passes
from tilt.models.adapters import add_lora
from tilt.models.policy import Policy
from tilt.objectives import (
    ALGORITHMS,
    GAE,
    EntropyBonus,
    ExactKL,
    GroupRelative,
    Importance,
    NoValue,
    Objective,
    OldKL,
    TokenAverage,
    TokenRatio,
    TrustRegion,
    ValueLoss,
)
from tilt.optim.optimizers import AdamW, Optimizer
from tilt.optim.trust_region import hessian_product, trust_region_step

REGION = TrustRegion(limit=0.02, iterations=4, damping=0.1, backtracks=10, decay=0.7)
PLAIN = Objective(GroupRelative(), TokenRatio(), Importance(), TokenAverage(), REGION)
TRPO = replace(PLAIN, credit=GAE(lam=0.97), value=ValueLoss(0.5))
PPO_KL = replace(PLAIN, penalty=OldKL(2.0))


def update(learner, batch, rewards, row, *, temperature: float = 1.0, **more):
    needs = row.needs if learner.settings.steps > 1 else row.needs - {"old"}
    signals = learner.evaluate(batch, needs, temperature=temperature)
    experience = row.prepare(rewards, replace(signals, final=torch.zeros_like(signals.final)), batch.layout)
    return learner.update(batch, experience, row, temperature=temperature, **more), experience


def at(learner, batch, temperature: float):
    """The batch as if the policy had sampled it at this temperature."""
    with torch.no_grad():
        return replace(batch, sampler=learner.policy(batch, temperature=temperature).logprobs)


def weights(module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in module.parameters()])


def logits(policy, batch, temperature: float) -> torch.Tensor:
    """The scores before each action, [A, V], without chunks."""
    return policy.head(policy.hidden(batch)[batch.predictors]) / temperature


# --- exact penalties -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("penalty", [ExactKL(0.3), OldKL(2.0)])
def test_micro_batches_change_no_exact_penalty(make, batch, rewards, penalty):
    row, found = replace(PLAIN, penalty=penalty), []
    for size in (10_000, 17):
        learner = make(Passes(3, 2, size))
        report, _ = update(learner, batch, rewards, row)
        found.append((weights(learner.policy), report.metrics))
    assert torch.allclose(found[0][0], found[1][0], atol=1e-8)
    for name in ("policy/penalty_avg", f"policy/kl_{penalty.against}", "grad_norm"):
        assert found[0][1][name] == pytest.approx(found[1][1][name], abs=1e-8) and found[0][1][name] > 1e-7


def test_the_gradient_with_a_reference_is_that_of_the_plain_sum(make, gradients, batch, rewards):
    learner, row = make(), replace(PLAIN, penalty=ExactKL(0.3))
    batch = at(learner, batch, 0.7)
    (found, *_), report, experience = gradients(learner, batch, rewards, row, temperature=0.7)
    p = logits(learner.policy, batch, 0.7).log_softmax(-1)
    with learner.reference() as anchor, torch.no_grad():
        q = logits(anchor, batch, 0.7).log_softmax(-1)
    chosen = p[torch.arange(len(p)), batch.actions]
    kl = (p.exp() * (p - q)).sum(-1)
    loss = -(experience.weights * ((chosen - chosen.detach()).exp() * experience.advantages - 0.3 * kl)).sum()
    truth = torch.cat([g.flatten() for g in torch.autograd.grad(loss, learner.optimizer.parameters)])
    assert torch.allclose(found, truth, atol=1e-10) and float(truth.abs().max()) > 1e-3
    counted = experience.weights != 0
    assert report.metrics["policy/kl_reference"] == pytest.approx(float(kl.detach()[counted].mean()), rel=1e-9)


def test_the_second_step_is_pulled_back_to_the_policy_before_the_first(make, batch, rewards):
    """Two steps by hand with torch's own optimizer, KL(old || policy) from whole logits; and the KL after the last step is reported."""
    learner = make(Passes(2))
    twin, batch = Policy(copy.deepcopy(learner.policy.lm)), at(learner, batch, 0.7)
    report, experience = update(learner, batch, rewards, PPO_KL, temperature=0.7)
    optimizer = Optimizer(twin, AdamW(1e-3, clip_norm=0.0), 10)
    old = logits(twin, batch, 0.7).log_softmax(-1).detach()
    chosen = (torch.arange(len(old)), batch.actions)

    def distance():
        return (old.exp() * (old - logits(twin, batch, 0.7).log_softmax(-1))).sum(-1)

    for _ in range(2):
        new = logits(twin, batch, 0.7).log_softmax(-1)
        gain = (new[chosen] - old[chosen]).exp() * experience.advantages - 2.0 * distance()
        (-(experience.weights * gain).sum()).backward()
        optimizer.step()
    assert torch.allclose(weights(learner.policy), weights(twin), atol=1e-10)
    after = float(distance().detach()[experience.weights != 0].mean())
    assert report.metrics["policy/kl_old"] == pytest.approx(after, rel=1e-9) and after > 1e-6
    free = make(Passes(2))
    update(free, batch, rewards, replace(PPO_KL, penalty=OldKL(0.0)), temperature=0.7)
    assert float((weights(free.policy) - weights(twin)).abs().max()) > 1e-6, "the penalty acts"


# --- the natural step ------------------------------------------------------------------------------------------------------------


def by_hand(learner, batch, experience, row, temperature: float, bonus: float = 0.0, curved: list[int] | None = None):
    """The same step on a copy of the policy, from closures over whole logits; the curvature on some sequences only where they are named."""
    twin = Policy(copy.deepcopy(learner.policy.lm))
    parameters, rule = [p for p in twin.parameters() if p.requires_grad], row.penalty
    counted, chosen = experience.weights != 0, (torch.arange(len(batch.actions)), batch.actions)
    old = batch.kept.restrict(logits(twin, batch, temperature)).log_softmax(-1).detach()

    def new():
        return batch.kept.restrict(logits(twin, batch, temperature)).log_softmax(-1)

    def surrogate():
        said = new()
        gain = (said[chosen] - old[chosen]).exp() * experience.advantages
        return (experience.weights * (gain - bonus * (said.exp() * said.masked_fill(said.isinf(), 0)).sum(-1))).sum()

    def kl(of=counted):
        gap = old.masked_fill(old.isinf(), 0) - (said := new()).masked_fill(said.isinf(), 0)
        return (old.exp() * gap).sum(-1)[of].mean()

    def measure():
        with torch.no_grad():
            return float(surrogate()), float(kl())

    from tilt.models.attention import twice_differentiable

    gradient = torch.autograd.grad(surrogate(), parameters)
    with twice_differentiable():
        some = counted if curved is None else counted & torch.isin(batch.layout.sequence, torch.tensor(curved))
        product = hessian_product(lambda: kl(some), parameters)
    taken = trust_region_step(parameters, gradient, product, measure, limit=rule.limit, iterations=rule.iterations, damping=rule.damping, backtracks=rule.backtracks, decay=rule.decay)  # fmt: skip
    return twin, taken


@pytest.mark.parametrize("size", [10_000, 60, 17])
@pytest.mark.parametrize("bonus", [0.0, 0.1])
def test_the_step_is_that_of_plain_closures_under_every_split(make, batch, rewards, size, bonus):
    learner, row = make(Passes(1, 1, size)), replace(PLAIN, bonus=EntropyBonus(bonus))
    before, batch = copy.deepcopy(learner), at(learner, batch, 0.7)
    report, experience = update(learner, batch, rewards, row, temperature=0.7)
    twin, taken = by_hand(before, batch, experience, row, 0.7, bonus)
    assert taken.accepted and torch.allclose(weights(learner.policy), weights(twin), atol=1e-7)
    moved = float((weights(learner.policy) - weights(before.policy)).norm())
    assert moved > 1e-2
    found = {name: report.metrics[f"trpo/{name}"] for name in ("kl", "improvement", "backtracks", "cg_residual")}
    expected = {"kl": taken.kl, "improvement": taken.improvement, "backtracks": taken.tried - 1, "cg_residual": taken.residual}
    assert found == pytest.approx(expected, rel=1e-5)
    assert 0 < found["kl"] <= 0.02 and found["improvement"] > 0 and found["cg_residual"] < 1
    assert "lr" not in report.metrics and report.metrics["grad_norm"] > 0 and learner.optimizer.steps == 1 and learner.version == 1
    assert all(p.grad is None for p in learner.policy.parameters())


@pytest.mark.parametrize(("share", "chosen"), [(0.4, [0, 2, 5, 7]), (0.25, [0, 4, 8]), (0.01, [0])])
@pytest.mark.parametrize("size", [10_000, 60])
def test_the_curvature_of_a_share_of_the_answers(make, batch, rewards, size, share, chosen):
    """Eleven of the twelve answers count. The KL and the surrogate of the line search are still those of all."""
    learner, row = make(Passes(1, 1, size)), replace(PLAIN, penalty=replace(REGION, share=share))
    before = copy.deepcopy(learner)
    report, experience = update(learner, batch, rewards, row)
    twin, taken = by_hand(before, batch, experience, row, 1.0, curved=chosen)
    assert torch.allclose(weights(learner.policy), weights(twin), atol=1e-7)
    assert report.metrics["trpo/kl"] == pytest.approx(taken.kl, rel=1e-5) and 0 < taken.kl <= 0.02


def test_the_step_stays_within_kept_sets(make, batch, rewards):
    learner = make()
    sets = [sorted({int(action), 3, 7, (int(action) + 5) % 20}) if i % 3 else [] for i, action in enumerate(batch.actions)]
    narrow = replace(batch, kept=Kept.of(sets))
    with torch.no_grad():
        narrow = replace(narrow, sampler=learner.policy(narrow).logprobs)
    before = copy.deepcopy(learner)
    report, experience = update(learner, narrow, rewards, PLAIN)
    twin, taken = by_hand(before, narrow, experience, PLAIN, 1.0)
    assert taken.accepted and torch.allclose(weights(learner.policy), weights(twin), atol=1e-7) and report.metrics["trpo/kl"] > 0


def test_an_old_that_was_evaluated_gives_the_same_step(make, batch, rewards):
    found = []
    for needs in (PLAIN.needs, frozenset()):
        learner = make()
        experience = PLAIN.prepare(rewards, learner.evaluate(batch, needs), batch.layout)
        learner.update(batch, experience, PLAIN)
        found.append(weights(learner.policy))
    assert torch.allclose(*found, atol=1e-9)


@pytest.mark.parametrize("planted", ["outside", "worse", "nan"])
def test_a_line_search_that_fails_leaves_every_bit_and_the_critic_learns(make, batch, rewards, planted, monkeypatch):
    learner = make(critic=True)
    before, critic = weights(learner.policy), weights(learner.critic)
    seen = []

    def measure(ground):
        seen.append(weights(ground.policy))
        return (0.0, 0.0) if len(seen) == 1 else {"outside": (1.0, 0.03), "worse": (-1.0, 0.0), "nan": (float("nan"), 0.0)}[planted]

    monkeypatch.setattr(natural.Ground, "measure", measure)
    report, _ = update(learner, batch, rewards, TRPO)
    assert torch.equal(weights(learner.policy), before) and not torch.equal(weights(learner.critic), critic)
    assert report.metrics["trpo/backtracks"] == 10 and report.metrics["trpo/kl"] == 0 == report.metrics["trpo/improvement"]
    assert len(seen) == 11 and all(not torch.equal(tried, before) for tried in seen[1:])


def test_only_adapters_move(lm, batch, rewards):
    model = add_lora(copy.deepcopy(lm), 2, 4.0)
    policy = Policy(model)
    learner = Learner(policy, Optimizer(policy, AdamW(1e-3), 10))
    before = {name: p.detach().clone() for name, p in policy.named_parameters()}
    report, experience = update(learner, batch, rewards, replace(PLAIN, penalty=replace(REGION, damping=1e-3)))
    changed = {name for name, p in policy.named_parameters() if not torch.equal(p, before[name])}
    assert changed and all("lora_" in name for name in changed) and 0 < report.metrics["trpo/kl"] <= 0.02
    first = update(learner, batch, rewards, replace(PLAIN, penalty=replace(REGION, damping=1e-3)))[0]
    assert first.metrics["trpo/kl"] > 0, "and A moves too once B is not 0"


def test_the_critic_is_trained_by_its_own_optimizer(make, gradients, batch, rewards):
    """With a step for the policy or none, the critic gets the gradient of the value loss."""
    learner = make(critic=True)
    policy, critic = weights(learner.policy), weights(learner.critic)
    report, _ = update(learner, batch, rewards, TRPO)
    assert not torch.equal(weights(learner.policy), policy) and not torch.equal(weights(learner.critic), critic)
    assert report.metrics["critic/grad_norm"] > 0 and report.metrics["loss/value_avg"] > 0
    rested = make(critic=True)
    update(rested, batch, rewards, TRPO, only_critic=True)
    assert torch.equal(weights(rested.policy), policy) and rested.optimizer.steps == 0
    assert torch.allclose(weights(rested.critic), weights(learner.critic), atol=1e-14)


def test_what_cannot_be_combined_is_refused(make, batch, rewards):
    for learner, row, words in (
        (make(Passes(2)), PLAIN, "passes and minibatches"),
        (make(Passes(1, 2)), PLAIN, "passes and minibatches"),
        (make(shared=True), TRPO, "not shared"),
    ):
        with pytest.raises(UsageError, match=words):
            update(learner, batch, rewards, row)
    learner = make()
    learner.pretraining = object()
    with pytest.raises(UsageError, match="pretrain"):
        update(learner, batch, rewards, PLAIN)


def test_a_gradient_that_is_not_finite_moves_nothing(make, batch, rewards):
    learner = make()
    next(learner.policy.parameters()).register_hook(lambda grad: grad * torch.inf)
    before = weights(learner.policy)
    with pytest.raises(NonFinite, match="the gradient of the policy"):
        update(learner, batch, rewards, PLAIN)
    assert torch.equal(weights(learner.policy), before)


def test_a_batch_that_counts_for_nothing_is_skipped(make, batch, rewards):
    learner = make()
    report, _ = update(learner, batch, replace(rewards, scored=torch.zeros(12, dtype=torch.bool)), PLAIN)
    assert report.skipped and "trpo/kl" not in report.metrics and learner.optimizer.steps == 1


def test_a_flat_surrogate_moves_nothing(make, batch, rewards):
    """Every answer earned the same: the gradient is 0, and so is the step."""
    learner = make()
    before = weights(learner.policy)
    report, _ = update(learner, batch, replace(rewards, total=torch.ones(12)), PLAIN)
    assert torch.equal(weights(learner.policy), before) and report.metrics["trpo/kl"] == 0 == report.metrics["trpo/backtracks"]


def test_rows_in_the_table():
    assert ALGORITHMS["trpo"].penalty == TrustRegion(0.01) and ALGORITHMS["trpo"].passes == 1
    assert ALGORITHMS["ppo_kl"].passes is None and not isinstance(ALGORITHMS["trpo"].value, NoValue)
