"""The learner: no split changes a gradient, what cannot move the weights is left out exactly, and what is wrong stops the update."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch

from tilt.data.packing import pack
from tilt.data.rollouts import Prompt, Rollout
from tilt.data.streams import Stream
from tilt.learning import learner as module
from tilt.learning.channels import clip_marks
from tilt.learning.ema import Ema
from tilt.learning.guards import Guards, Mismatch
from tilt.learning.learner import NonFinite, Passes, movable
from tilt.learning.pretraining import Pretraining
from tilt.objectives import ALGORITHMS, Clip, Experience, Layout, NoPenalty, Objective, Outputs, Rewards, Signals, TokenRatio

ROWS = ["grpo", "dapo", "gspo", "gspo_token", "rloo", "rloo_clip", "ppo", "reinforce_pp", "dr_grpo", "cispo", "raft"]


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("minibatches", [1, 3])
def test_micro_batches_change_nothing(make, gradients, batch, rewards, name, minibatches):
    row = ALGORITHMS[name]
    whole, one, _ = gradients(make(Passes(1, minibatches, 10_000), critic=name == "ppo"), batch, rewards, row)
    parts, many, _ = gradients(make(Passes(1, minibatches, 17), critic=name == "ppo"), batch, rewards, row)
    assert len(whole) == len(parts) > 0
    assert max(float((a - b).abs().max()) for a, b in zip(whole, parts, strict=True)) < 1e-10
    assert max(float(g.abs().max()) for g in whole) > 1e-6
    for metric in ("loss", "val/ratio", "policy/entropy_avg", "sampler/probability_gap_mean"):
        assert one.metrics.get(metric, 0.0) == pytest.approx(many.metrics.get(metric, 0.0), abs=1e-9)
    for channel in ("first", "new", "push", "ratio"):
        assert torch.allclose(one.channels[channel], many.channels[channel], atol=1e-9, equal_nan=True)


@pytest.mark.parametrize("name", ["dapo", "gspo", "rloo_clip", "dr_grpo", "cispo"])
@pytest.mark.parametrize("minibatches", [1, 2, 5])
def test_sequences_left_out_change_no_gradient(make, gradients, batch, rewards, monkeypatch, name, minibatches):
    row = ALGORITHMS[name]
    row = replace(row, credit=replace(row.credit, kl=0.0))
    settings = Passes(1, minibatches, 10_000)
    some, report, experience = gradients(make(settings), batch, rewards, row)
    live = movable(experience, row)
    assert live.tolist() == [False] * 3 + [True] * 2 + [bool(experience.advantages[experience.layout.starts[5]])] + [False] * 3 + [
        True
    ] * 2 + [False]
    assert torch.equal(report.trained, live) and report.metrics["sequences/trained"] == int(live.sum())
    monkeypatch.setattr(module, "movable", lambda experience, objective: torch.ones(experience.layout.sequences, dtype=torch.bool))
    every, _, _ = gradients(make(settings), batch, rewards, row)
    every = [g for g in every if g.any()]
    assert len(some) == len(every) > 0
    assert max(float((a - b).abs().max()) for a, b in zip(some, every, strict=True)) < 1e-10


@pytest.mark.parametrize("name", ["grpo", "dapo", "gspo", "ppo"])
def test_minibatches_add_up_to_the_batch(make, gradients, batch, rewards, name):
    """With the weights held still, the mean of the minibatches' gradients, each by its share of the sequences, is the batch's."""
    row = ALGORITHMS[name]
    shared = name == "ppo"
    (whole, *_), _, _ = gradients(make(Passes(2, 1), shared=shared), batch, rewards, row)
    parts, _, _ = gradients(make(Passes(1, 4), shared=shared), batch, rewards, row)
    assert len(parts) <= 4  # a minibatch without a live sequence takes no step and adds nothing
    assert torch.allclose(sum(parts) / 4, whole, atol=1e-10)


def test_minibatches_deal_out_every_sequence_once_a_pass(make):
    learner = make(Passes(2, 5))
    live = torch.ones(12, dtype=torch.bool)
    parts = list(learner._minibatches(live, step=3))
    assert [len(p) for p, _ in parts] == [3, 3, 2, 2, 2] * 2
    assert [s for _, s in parts] == [12 / len(p) for p, _ in parts]
    for k in (0, 5):
        assert sorted(torch.cat([p for p, _ in parts[k : k + 5]]).tolist()) == list(range(12))
    assert not torch.equal(parts[0][0], parts[5][0])
    assert all(torch.equal(a, b) for (a, _), (b, _) in zip(parts, learner._minibatches(live, step=3), strict=True))
    live[6:] = False
    assert sorted(torch.cat([p for p, _ in list(learner._minibatches(live, step=3))[:5]]).tolist()) == list(range(6))


def test_a_first_update_has_ratio_one_with_and_without_an_evaluated_old(make, gradients, batch, rewards):
    _, fresh, _ = gradients(make(), batch, rewards, ALGORITHMS["dapo"])
    assert fresh.metrics["val/ratio"] == 1.0 and fresh.metrics["val/first_gap"] == 0.0 and fresh.metrics["policy/approxkl_avg"] == 0.0
    _, twice, _ = gradients(make(Passes(2)), batch, rewards, ALGORITHMS["dapo"])
    assert twice.metrics["val/first_gap"] < 1e-12


def test_a_batch_that_cannot_move_the_weights_is_skipped_and_the_schedule_goes_on(make, batch, rewards):
    learner = make(Passes(2, 2), schedule="linear", steps=8)
    flat = replace(rewards, total=torch.ones(12))
    before = {k: v.clone() for k, v in learner.policy.state_dict().items()}
    row = ALGORITHMS["dapo"]
    experience = row.prepare(flat, learner.evaluate(batch, row.needs), batch.layout)
    report = learner.update(batch, experience, row)
    assert report.skipped and report.metrics["skipped"] == 1.0 and "grad_norm" not in report.metrics
    assert all(torch.equal(v, before[k]) for k, v in learner.policy.state_dict().items())
    assert learner.optimizer.steps == 4 and learner.optimizer.lr == pytest.approx(5e-4)
    assert report.metrics["lr"] == pytest.approx(1e-3)
    report = learner.update(batch, row.prepare(rewards, learner.evaluate(batch, row.needs), batch.layout), row)
    assert not report.skipped and learner.optimizer.steps == 8 and report.metrics["lr"] == pytest.approx(5e-4)


@dataclass(frozen=True)
class Restless:
    """A surrogate that pushes even where the advantage is 0."""

    def __call__(self, ratio, logprobs, advantages):
        return ratio * advantages + 0.1 * logprobs


@dataclass(frozen=True)
class Curiosity:
    """A penalty that reads no signal but moves the weights: minus the entropy."""

    needs = frozenset()

    def __call__(self, outputs, signals, layout):
        return -0.1 * outputs.entropy


@pytest.mark.parametrize("changed", [{"surrogate": Restless()}, {"penalty": Curiosity()}])
def test_a_row_of_ones_own_that_moves_at_advantage_zero_loses_no_sequence(make, gradients, batch, rewards, changed):
    row = replace(ALGORITHMS["dapo"], **changed)
    found, report, _ = gradients(make(), batch, replace(rewards, total=torch.ones(12)), row)
    assert not report.skipped and torch.equal(report.trained, rewards.scored) and float(found[0].abs().max()) > 1e-6


def test_a_shared_critic_gives_values_and_learns(make, gradients, batch, rewards):
    learner = make(shared=True)
    with torch.no_grad():
        learner.policy.value_head.weight.normal_(generator=torch.Generator().manual_seed(0))
    row = ALGORITHMS["ppo"]
    signals = learner.evaluate(batch, row.needs)
    assert torch.isfinite(signals.values).all() and signals.values.std() > 0.1 and torch.isfinite(signals.final).all()
    gradients(learner, batch, rewards, row)
    learner.optimizer.step = type(learner.optimizer).step.__get__(learner.optimizer)
    before = learner.policy.value_head.weight.clone()
    report = learner.update(batch, row.prepare(rewards, signals, batch.layout), row)
    assert not torch.equal(learner.policy.value_head.weight, before) and report.metrics["loss/value_avg"] > 0


def test_while_only_the_critic_learns_the_policy_rests(make, batch, rewards):
    learner, row = make(critic=True), ALGORITHMS["ppo"]
    policy, critic = ({k: v.clone() for k, v in m.state_dict().items()} for m in (learner.policy, learner.critic))
    report = learner.update(batch, row.prepare(rewards, learner.evaluate(batch, row.needs), batch.layout), row, only_critic=True)
    assert all(torch.equal(v, policy[k]) for k, v in learner.policy.state_dict().items()) and learner.optimizer.steps == 0
    assert any(not torch.equal(v, critic[k]) for k, v in learner.critic.state_dict().items())
    assert (
        all(p.grad is None for p in learner.policy.parameters())
        and "grad_norm" not in report.metrics
        and report.metrics["critic/grad_norm"] > 0
    )


def test_one_pass_is_one_step_by_hand(make, batch, rewards):
    """The gradient equals that of -sum w A logprobs computed from the whole batch, and push is w A."""
    learner, row = make(), ALGORITHMS["dapo"]
    experience = row.prepare(rewards, learner.evaluate(batch, frozenset()), batch.layout)
    loss = -(experience.weights * experience.advantages * learner.policy(batch).logprobs).sum()
    truth = torch.cat([g.flatten() for g in torch.autograd.grad(loss, learner.optimizer.parameters)])
    found = []
    learner.optimizer.step = lambda: (found.append(torch.cat([p.grad.flatten() for p in learner.optimizer.parameters])), torch.ones(()))[1]
    report = learner.update(batch, experience, row, watch=True)
    assert torch.allclose(found[0], truth, atol=1e-12)
    push = report.channels["push"]
    assert torch.allclose(push[~push.isnan()], (experience.weights * experience.advantages)[~push.isnan()], atol=1e-12)
    assert push.isnan().sum() == (experience.advantages == 0).sum()


def test_clip_marks_tell_which_side_and_what_does_not_bind():
    row = Objective(ALGORITHMS["dapo"].credit, TokenRatio(), Clip(0.2, 0.3), ALGORITHMS["dapo"].average, NoPenalty())
    ratio = torch.tensor([1.5, 1.5, 0.5, 0.5, 1.1, 0.9, 1.5])
    advantages = torch.tensor([1.0, -1, -1, 1, 1, -1, 0])
    ones = torch.ones(7)
    share = Experience(Layout.of([7]), Signals.of(torch.zeros(7)), advantages, ones, ones, ones)
    said = Outputs.of(ratio.log())
    assert clip_marks(row, said, share).tolist() == [1, 2, -1, 2, 0, 0, 2]
    assert not clip_marks(ALGORITHMS["rloo"], said, share).any()
    gmpo = clip_marks(ALGORITHMS["gmpo"], Outputs.of(torch.tensor([0.5, 0.5, -0.5, -0.5, 0.3, -0.3, 0.5])), share)
    assert gmpo.tolist() == [1, 2, -1, 2, 0, 0, 2], "a ratio that clips by itself"


# --- what stops an update -------------------------------------------------------------------------------------------------------


def test_a_loss_that_is_not_finite_names_its_term_and_leaves_the_weights(make, batch, rewards):
    learner, row = make(), ALGORITHMS["grpo"]
    before = {k: v.clone() for k, v in learner.policy.state_dict().items()}
    signals = learner.evaluate(batch, row.needs)
    bad = Signals(**{**vars(signals), "reference": torch.full_like(signals.reference, torch.nan)})
    with pytest.raises(NonFinite, match="the reference's log-probabilities") as caught:
        learner.update(batch, row.prepare(rewards, bad, batch.layout), row)
    assert (
        caught.value.exit_code == 4
        and caught.value.batch.layout.sequences == int(rewards.scored.sum())
        and caught.value.experience is not None
    )
    assert all(torch.equal(v, before[k]) for k, v in learner.policy.state_dict().items())


@pytest.mark.parametrize(("who", "term"), [("policy", "the gradient of the policy"), ("critic", "the gradient of the critic")])
def test_a_gradient_that_is_not_finite_moves_neither_model(make, batch, rewards, who, term):
    learner, row = make(critic=True), ALGORITHMS["ppo"]
    experience = row.prepare(rewards, learner.evaluate(batch, row.needs), batch.layout)
    models = {"policy": learner.policy, "critic": learner.critic}
    next(models[who].parameters()).register_hook(lambda grad: grad * torch.inf)
    before = {name: [p.clone() for p in m.parameters()] for name, m in models.items()}
    with pytest.raises(NonFinite, match=term):
        learner.update(batch, experience, row)
    for name in ("policy",) if who == "policy" else ("policy", "critic"):
        assert all(torch.equal(a, b) for a, b in zip(before[name], models[name].parameters(), strict=True))


def test_weights_that_broke_are_named(make, batch, rewards):
    learner, row = make(), ALGORITHMS["dapo"]
    with torch.no_grad():
        next(learner.policy.parameters()).fill_(torch.nan)
    with pytest.raises(NonFinite, match="the policy's log-probabilities"):
        learner.update(batch, row.prepare(rewards, learner.evaluate(batch, frozenset()), batch.layout), row)


def test_answers_of_another_policy_stop_the_run(make, batch, rewards):
    learner, row = make(Passes(max_gap=0.05)), ALGORITHMS["dapo"]
    before = next(learner.policy.parameters()).clone()
    shifted = replace(batch, sampler=(batch.sampler.exp() * 0.5 + 0.3).log())
    with pytest.raises(Mismatch, match="the sampler disagree"):
        learner.update(shifted, row.prepare(rewards, learner.evaluate(shifted, frozenset()), batch.layout), row)
    assert torch.equal(next(learner.policy.parameters()), before)
    signals = replace(learner.evaluate(batch, row.needs), old=shifted.sampler)
    with pytest.raises(Mismatch, match="old"):
        make(Passes(2)).update(batch, row.prepare(rewards, signals, batch.layout), row)


def test_another_temperature_is_seen_as_a_mismatch(make, batch, rewards):
    learner, row = make(Passes(max_gap=1e-3)), ALGORITHMS["dapo"]
    learner.update(batch, row.prepare(rewards, learner.evaluate(batch, frozenset()), batch.layout), row)
    with pytest.raises(Mismatch):
        make(Passes(max_gap=1e-3)).update(
            batch, row.prepare(rewards, learner.evaluate(batch, frozenset()), batch.layout), row, temperature=2.0
        )


def test_unscored_answers_reach_neither_loss_nor_gradient(make, gradients, batch):
    total = torch.tensor([1.0, 0, 2, 0, 1, 0.5, 0, 3, 0, 2, 3, 0])
    scored = torch.ones(12, dtype=torch.bool)
    scored[[1, 5]] = False
    found = []
    for junk in (0.0, 1e6):
        given = torch.where(scored, total, junk)
        found.append(gradients(make(), batch, Rewards.of(given, scored=scored, actions=batch.layout.actions), ALGORITHMS["grpo"])[0][0])
    assert torch.equal(*found)


def test_a_batch_that_nobody_scored_moves_nothing(make, batch):
    """Not even what Adam remembers of earlier steps."""
    learner, row = make(), ALGORITHMS["grpo"]
    none = Rewards.of(torch.ones(12), scored=torch.zeros(12, dtype=torch.bool), actions=batch.layout.actions)
    report = learner.update(batch, row.prepare(none, learner.evaluate(batch, row.needs), batch.layout), row)
    assert report.skipped and "grad_norm" not in report.metrics and learner.version == 0


def test_channels_keep_the_first_visit_and_the_last(make, batch, rewards):
    learner, row = make(Passes(3)), ALGORITHMS["dapo"]
    with torch.no_grad():
        before = learner.policy(batch).logprobs
    signals = learner.evaluate(batch, row.needs)
    channels = learner.update(batch, row.prepare(rewards, signals, batch.layout), row, watch=True).channels
    seen = ~channels["new"].isnan()
    assert torch.allclose(channels["first"][seen], before[seen], atol=1e-12) and not torch.allclose(
        channels["new"][seen], before[seen], atol=1e-6
    )
    assert torch.allclose(channels["ratio"][seen], (channels["new"] - before).exp()[seen], atol=1e-9)
    assert set(learner.update(batch, row.prepare(rewards, signals, batch.layout), row).channels) == {"first", "clip"}


# --- pretraining beside, and the average of the weights ---------------------------------------------------------------------------


def texts(count: int = 7) -> list[Rollout]:
    """Texts of 2 to 8 tokens, every token but the first trained."""
    generator = torch.Generator().manual_seed(3)
    lengths = [2 + i * 3 % 7 for i in range(count)]
    return [
        Rollout.demonstration(Prompt((), i), tuple(torch.randint(0, 20, (n,), generator=generator).tolist()), (False,) + (True,) * (n - 1))
        for i, n in enumerate(lengths)
    ]


@pytest.mark.parametrize("micro_tokens", [10_000, 9])
def test_pretraining_adds_its_own_gradient_to_every_step(make, gradients, batch, rewards, micro_tokens):
    """The gradient of each optimizer step is the policy's plus 27.8 times that of the texts' mean negative log-likelihood a token."""
    row, settings = ALGORITHMS["dapo"], Passes(2, 1, micro_tokens)
    alone, _, _ = gradients(make(settings), batch, rewards, row)
    learner = make(settings)
    learner.pretraining = Pretraining(Stream(texts(), 5), 3, 27.8)
    beside, report, _ = gradients(learner, batch, rewards, row, temperature=1.0)
    assert len(alone) == len(beside) == 2
    given = learner.pretraining.texts.draw(0, 3)  # the spy counts no step
    nll = -sum(learner.policy(pack([text])).logprobs.sum() for text in given) / sum(sum(text.sampled) for text in given)
    truth = torch.cat([g.flatten() for g in torch.autograd.grad(nll, learner.optimizer.parameters)])
    for plain, both in zip(alone, beside, strict=True):
        assert torch.allclose(both - plain, 27.8 * truth, rtol=0, atol=1e-12 * 27.8) and float(truth.abs().max()) > 1e-3
    assert report.metrics["pretrain/nll"] == pytest.approx(float(nll.detach()), abs=1e-12)


def test_pretraining_reads_other_texts_each_step_at_temperature_one_and_rests_with_the_policy(make, batch, rewards):
    row = ALGORITHMS["ppo"]
    learner = make(Passes(2, 2), critic=True)
    learner.pretraining, learner.guards = Pretraining(Stream(texts(), 5), 3, 0.1), Guards(sampler=10.0)
    seen = []
    forward = learner.policy.forward

    def spy(small, **settings):
        if "entropy" not in settings:
            seen.append((small.tokens.tolist(), settings.get("temperature", 1.0)))
        return forward(small, **settings)

    experience = row.prepare(rewards, learner.evaluate(batch, row.needs, temperature=2.0), batch.layout)
    learner.policy.forward = spy
    learner.update(batch, experience, row, temperature=2.0, only_critic=True)
    assert seen == []
    learner.update(batch, experience, row, temperature=2.0)
    assert [tokens for tokens, _ in seen] == [pack(Stream(texts(), 5).draw(k, 3)).tokens.tolist() for k in range(4)]
    assert {temperature for _, temperature in seen} == {1.0}


def test_a_pretraining_loss_that_is_not_finite_stops_the_update(make, batch, rewards, monkeypatch):
    learner, row = make(), ALGORITHMS["dapo"]
    learner.pretraining = Pretraining(Stream(texts(), 5), 3, 0.1)
    monkeypatch.setattr(Pretraining, "nll", lambda *given: torch.tensor(torch.nan))
    before = next(learner.policy.parameters()).clone()
    with pytest.raises(NonFinite, match="the likelihood of the pretraining texts"):
        learner.update(batch, row.prepare(rewards, learner.evaluate(batch, frozenset()), batch.layout), row)
    assert torch.equal(next(learner.policy.parameters()), before)


def test_the_average_of_the_weights_is_its_recursion(make, batch, rewards):
    learner, row = make(Passes(2, 2, max_gap=1.0)), ALGORITHMS["dapo"]
    learner.ema = Ema(learner.policy.lm, 0.9)
    truth = [p.detach().clone() for p in learner.policy.parameters()]
    step = learner.optimizer.step

    def counted():
        norm = step()
        for kept, weight in zip(truth, learner.policy.parameters(), strict=True):
            kept.copy_(0.9 * kept + 0.1 * weight.detach())
        return norm

    learner.optimizer.step = counted
    for _ in range(3):
        learner.update(batch, row.prepare(rewards, learner.evaluate(batch, row.needs), batch.layout), row)
    assert learner.optimizer.steps == 12
    assert all(torch.allclose(kept, average, rtol=0, atol=1e-15) for kept, average in zip(truth, learner.ema.weights, strict=True))
    assert any(not torch.allclose(a, p) for a, p in zip(learner.ema.weights, learner.policy.parameters(), strict=True))
    own = [p.detach().clone() for p in learner.policy.parameters()]
    with learner.ema.applied():
        assert all(torch.equal(a, p) for a, p in zip(learner.ema.weights, learner.policy.parameters(), strict=True))
    assert all(torch.equal(a, p) for a, p in zip(own, learner.policy.parameters(), strict=True))


@dataclass(frozen=True)
class Visits:
    """A measure that counts the micro-batches of an update and their sequences."""

    def batch(self, rewards, signals, layout):
        return {}

    def part(self, outputs, experience):
        return experience.layout.sequences

    def update(self, parts):
        return {"visits": torch.tensor(float(len(parts))), "sequences": torch.tensor(float(sum(parts)))}


def test_a_measure_sees_every_micro_batch_and_moves_nothing(make, gradients, batch, rewards):
    row = replace(ALGORITHMS["dapo"], measures=(Visits(),))
    found, report, _ = gradients(make(Passes(2, 1, 17)), batch, rewards, row)
    plain, bare, _ = gradients(make(Passes(2, 1, 17)), batch, rewards, ALGORITHMS["dapo"])
    assert report.metrics["sequences"] == 2 * 11 and report.metrics["visits"] > 2  # every scored answer, on both passes
    assert "visits" not in bare.metrics and all(torch.allclose(a, b, atol=1e-12) for a, b in zip(found, plain, strict=True))
