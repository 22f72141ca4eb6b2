"""Guards before the first update: each planted fault stops the run at its first step, and the diagnosis names it."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from tilt.errors import NumericError
from tilt.learning import learner as learning
from tilt.models import attention
from tilt.models.policy import Policy
from tilt.recipes import rl
from tilt.sampling import cache, drawing

LR = {"lr": 1e-2}


@pytest.fixture
def start(run_sft) -> str:
    """A model that has learned something, so that faults show."""
    return str(run_sft(steps=12, optimizer=LR).checkpoint)


@pytest.fixture
def stops(run_rl, shared, start):
    """Run, and give the message with which the run stopped before anything was learned."""

    def run(**settings: object) -> str:
        with pytest.raises(NumericError) as caught:
            run_rl(**{"model": start, "name": "stopped", **settings})
        steps = (Path(shared["root"]) / "stopped" / "metrics.jsonl").read_text()
        assert steps == "" and caught.value.exit_code == 4, "nothing was trained"
        assert "stopped: Mismatch" in (Path(shared["root"]) / "stopped" / "log.txt").read_text()
        return str(caught.value)

    return run


def planted(monkeypatch, plant) -> None:
    """Plant a fault once the parts of the loop are opened: a model that is loaded with a faulty attention is found out there."""
    found = rl.train

    def train(config, parts, *more):
        plant(parts)
        return found(config, parts, *more)

    monkeypatch.setattr(rl, "train", train)


@pytest.mark.parametrize("algorithm", ["grpo", "dapo", "ppo", "gspo", "rloo"])
@pytest.mark.parametrize(
    "more", [{}, {"sampling": {"max_tokens": 6, "temperature": 0.6}}, {"lora": {"rank": 2, "alpha": 4.0}}], ids=["full", "warm", "lora"]
)
def test_a_run_without_a_fault_keeps_every_guard(run_rl, metrics, start, algorithm, more):
    lines = metrics(run_rl(model=start, algorithm=algorithm, passes=1 if algorithm == "rloo" else 2, optimizer=LR, **more))
    assert lines[0]["sampler/probability_gap_mean"] < 1e-6 and lines[0].get("val/first_gap", 0.0) < 1e-6
    assert ("val/reference_gap" in lines[0]) == (algorithm in ("grpo", "ppo", "rloo")) and "val/reference_gap" not in lines[1]


def test_temperature_that_the_learner_forgets(stops, monkeypatch):
    found = Policy.forward
    monkeypatch.setattr(Policy, "forward", lambda self, pack, **more: found(self, pack, **(more | {"temperature": 1.0})))
    said = stops(sampling={"max_tokens": 6, "temperature": 0.5})
    assert (
        "diagnosis  temperature: the answers were sampled at 0.5, and the learner scores them at 1;" in said
        and "guards.sampler 0.0001" in said
    )


def test_temperature_with_kept_sets(stops, monkeypatch):
    found = Policy.forward
    monkeypatch.setattr(Policy, "forward", lambda self, pack, **more: found(self, pack, **(more | {"temperature": 1.0})))
    said = stops(sampling={"max_tokens": 6, "temperature": 0.5, "top_k": 8, "keep_sets": True})
    assert "diagnosis  temperature: the answers were sampled at 0.5, and the learner scores them at 1;" in said


def test_temperature_that_the_sampler_forgets(stops, monkeypatch):
    found = drawing.draw
    monkeypatch.setattr(drawing, "draw", lambda logits, uniforms, sampling: found(logits, uniforms, replace(sampling, temperature=1.0)))
    said = stops(sampling={"max_tokens": 6, "temperature": 2.0})
    assert "diagnosis  temperature: the answers were sampled at 1, and the learner scores them at 2; sampling.temperature is 2" in said


def test_temperature_under_which_old_was_scored(stops, monkeypatch):
    found = learning.Learner.evaluate
    monkeypatch.setattr(learning.Learner, "evaluate", lambda self, batch, needs, *, temperature: found(self, batch, needs, temperature=3.0))
    said = stops(algorithm="dapo", passes=2)
    assert (
        "diagnosis  temperature: the answers were scored under old at 3, and the learner scores them at 1;" in said
        and "guards.old 1e-05" in said
    )


@pytest.mark.parametrize("passes", [1, 2])
def test_dropout(stops, run_sft, monkeypatch, passes):
    gpt2 = run_sft(model={"kind": "gpt2", "width": 16, "layers": 1, "heads": 2, "context": 32, "vocabulary": 270}, steps=12, optimizer=LR)

    def active(parts):
        parts.learner.policy.train()
        for name, module in parts.learner.policy.named_modules():
            if isinstance(module, nn.Dropout) and "attn_dropout" not in name:  # which packed rows refuse by themselves
                module.p = 0.3

    planted(monkeypatch, active)
    said = stops(model=str(gpt2.checkpoint), passes=passes)
    assert (
        "diagnosis  dropout: two forward passes of the learner over the same answers differ" in said
        and "3 dropout layers are active (lm." in said
    )


def perturbed(lm):
    other = copy.deepcopy(lm)
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(2.0)
    return other


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_stale_weights_in_the_sampler(stops, monkeypatch, dtype):
    planted(monkeypatch, lambda parts: setattr(parts.sampler, "lm", perturbed(parts.sampler.lm)))
    said = stops(dtype=dtype)
    assert "diagnosis  stale weights: the sampler and the learner hold different weights" in said and "were not published" in said


def test_a_reference_that_is_no_copy(stops, monkeypatch):
    def changed(parts):
        with parts.learner.reference() as anchor:
            anchor.lm = perturbed(anchor.lm)

    planted(monkeypatch, changed)
    said = stops()
    assert (
        "guards.reference" in said and "diagnosis  stale weights: the reference (a copy of the policy as it starts) and the learner" in said
    )


def test_attention_across_texts(stops, monkeypatch):
    found = attention.PackedAttention.of

    def whole(segments):
        """One text: everything sees what stands before it in the row."""
        zero = torch.zeros(1, dtype=torch.long)
        return found(type(segments)(zero, segments.length.sum()[None], zero - 1))

    def everywhere(segments):
        return whole(segments), torch.arange(int(segments.length.sum()))

    def changed(parts):
        monkeypatch.setattr(attention.PackedAttention, "of", staticmethod(whole))
        monkeypatch.setattr(attention.PackedAttention, "closing", staticmethod(everywhere))

    planted(monkeypatch, changed)
    assert (
        "diagnosis  attention mask: in the learner's packed forward pass an action's score changes with the tokens of other texts"
        in stops()
    )


def test_attention_to_what_follows(stops, monkeypatch):
    found = attention.Bunch._shared
    sighted = lambda self, window: torch.ones_like(found(self, window))
    planted(monkeypatch, lambda parts: monkeypatch.setattr(attention.Bunch, "_shared", sighted))
    assert "diagnosis  attention mask: in the learner's packed forward pass an action's score changes with the tokens after it" in stops()


def test_answers_that_do_not_see_their_prompt(stops, monkeypatch):
    found = attention.Bunch._shared

    def blind(self, window):
        mask = found(self, window).clone()
        mask[..., : self.keys.shape[1] - self.queries.shape[1]] = False
        return mask

    planted(monkeypatch, lambda parts: monkeypatch.setattr(attention.Bunch, "_shared", blind))
    said = stops()
    assert "diagnosis  attention mask" in said and "does not change with its prompt" in said


def test_positions_that_do_not_start_anew(stops, monkeypatch):
    found = Policy.hidden
    monkeypatch.setattr(
        Policy, "hidden", lambda self, pack, at=None: found(self, replace(pack, positions=torch.arange(len(pack.tokens))), at)
    )
    assert "diagnosis  positions: tokens are numbered along the whole row, not from 0 in each text" in stops()


def test_positions_that_the_batch_numbers_wrongly(stops, monkeypatch):
    found = rl.pack
    monkeypatch.setattr(rl, "pack", lambda rollouts: replace(batch := found(rollouts), positions=torch.arange(len(batch.tokens))))
    assert "diagnosis  positions: the batch does not number the tokens of each text from 0 on" in stops()


def test_positions_of_no_known_kind_are_found_by_what_they_are_not(stops, monkeypatch):
    found = Policy.hidden
    monkeypatch.setattr(Policy, "hidden", lambda self, pack, at=None: found(self, replace(pack, positions=pack.positions * 3), at))
    assert "diagnosis  positions: every action sees all of its own text and nothing else" in stops()


def test_positions_in_the_sampler(stops, monkeypatch):
    found = cache.Decode.advance
    monkeypatch.setattr(cache.Decode, "advance", lambda self, answered: found(self, answered) + 1)
    assert "diagnosis  positions: in the sampler the tokens of answers stand one too far" in stops()


def test_answers_that_were_changed_after_they_were_sampled(stops, monkeypatch):
    found = rl.Sampler.sample

    def retokenised(self, *given, **more):
        return [replace(r, tokens=tuple((t + 1) % 200 for t in r.tokens)) for r in found(self, *given, **more)]

    monkeypatch.setattr(rl.Sampler, "sample", retokenised)
    assert "diagnosis  sampler: its scores are not those of its own weights over these tokens" in stops()


def test_a_clip_narrower_than_rounding(run_rl, stops, start, monkeypatch):
    found = learning.Learner.evaluate

    def rounded(self, batch, needs, *, temperature):
        signals = found(self, batch, needs, temperature=temperature)
        return replace(signals, old=signals.old + 5e-6 * torch.tensor([1.0, -1.0]).repeat(len(signals.old))[: len(signals.old)])

    monkeypatch.setattr(learning.Learner, "evaluate", rounded)
    narrow = {"algorithm": "dapo", "objective": {"surrogate": {"clip": {"low": 1e-6, "high": 1e-6}}}, "passes": 2}
    said = stops(**narrow)
    assert "before anything was learned, above guards.clipped 0: Clip(low=1e-06" in said
    run_rl(model=start, guards={"clipped": 1.0}, **narrow)
    run_rl(model=start, **narrow | {"objective": {}})


def test_a_guard_can_be_loosened_and_a_later_step_is_looked_at_by_max_mismatch_alone(run_rl, start, monkeypatch):
    found = Policy.forward
    monkeypatch.setattr(Policy, "forward", lambda self, pack, **more: found(self, pack, **(more | {"temperature": 1.05})))
    with pytest.raises(NumericError, match="guards.sampler"):
        run_rl(model=start)
    run_rl(model=start, guards={"sampler": 1.0})
    with pytest.raises(NumericError, match=r"(?s)above max_mismatch 1e-05.*diagnosis  temperature"):
        run_rl(model=start, guards={"sampler": 1.0}, max_mismatch=1e-5)


def test_a_difference_that_nothing_explains_is_rounding_where_it_is_small(run_rl, stops, start, monkeypatch):
    found = learning.Learner.evaluate

    def off(by):
        def evaluate(self, batch, needs, *, temperature):
            signals = found(self, batch, needs, temperature=temperature)
            return replace(signals, old=signals.old + by * torch.linspace(-1, 1, len(signals.old)))

        return evaluate

    monkeypatch.setattr(learning.Learner, "evaluate", off(4e-5))
    log = run_rl(model=start, algorithm="dapo", passes=2).directory.log.read_text()
    assert "guards     the learner and the policy of a moment ago (`old`) disagree" in log and "it is taken for rounding" in log
    monkeypatch.setattr(learning.Learner, "evaluate", off(1e-2))
    assert "diagnosis  old: it was scored by other weights or settings than it has now" in stops(algorithm="dapo", passes=2)
