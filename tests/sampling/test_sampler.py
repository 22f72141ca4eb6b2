"""The sampler: what its rollouts carry, what it refuses, and that it disturbs nothing."""

from __future__ import annotations

import pytest
import torch
from transformers import PreTrainedModel

from tilt.data.packing import pack
from tilt.data.rollouts import Prompt, Sampling
from tilt.errors import NumericError, UsageError
from tilt.models import compat
from tilt.models.adapters import adapter_off, add_lora, plain_copy
from tilt.models.policy import Policy
from tilt.sampling import forward
from tilt.sampling.sampler import Sampler, greedy

PROMPTS = [Prompt((5, 6), 3), Prompt((7,), 8, {"answer": "x"})]


class Letters:
    """A tokenizer of one letter a token: 0 is a, 1 is b, …"""

    def decode(self, tokens: list[int], **_: object) -> str:
        return "".join(chr(97 + t) for t in tokens)


@pytest.fixture
def lm() -> PreTrainedModel:
    torch.manual_seed(0)
    config = compat.config_for(
        "qwen3", vocab_size=12, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=8,
        max_position_embeddings=32, attention_dropout=0.5, bos_token_id=0, eos_token_id=1, pad_token_id=2,
    )  # fmt: skip
    model = compat.causal_lm_from_config(config)
    compat.use_attention(model, "tilt")
    return model


def test_rollouts_carry_what_the_learner_needs(lm: PreTrainedModel) -> None:
    sampler = Sampler(lm, Letters(), Sampling(0.9, 6, (1,)), seed=5)
    rollouts = sampler.sample(PROMPTS, 3, step=7)
    assert [(r.prompt, r.seed) for r in rollouts] == [(p, (5, 7, p.id, n)) for p in PROMPTS for n in range(3)]
    for r in rollouts:
        assert r.sampling == sampler.sampling and r.version == 0 and all(r.sampled) and all(x < 0 for x in r.logprobs)
        assert r.tokens[-1] == 1 if r.stop == "stop" else len(r.tokens) == 6
        assert 1 not in r.tokens[:-1]
        assert all(type(t) is int for t in r.tokens) and all(type(x) is float for x in r.logprobs)


def test_the_stop_token_is_an_action_and_may_be_the_whole_answer(lm: PreTrainedModel) -> None:
    """Every id stops: one-token answers, which ended and were not cut, even with room for one token only."""
    for room in (1, 9):
        for r in Sampler(lm, Letters(), Sampling(1.0, room, tuple(range(12)))).sample(PROMPTS, 20, step=0):
            assert len(r.tokens) == len(r.logprobs) == 1 and r.stop == "stop"


def test_stop_strings_end_answers(lm: PreTrainedModel) -> None:
    """The completing token is the last; the same answers without the stop string go on from there."""
    strings = ("ab", "h")
    free = Sampler(lm, Letters(), Sampling(1.0, 20)).sample(PROMPTS, 40, step=0)
    stopped = Sampler(lm, Letters(), Sampling(1.0, 20, stop_strings=strings)).sample(PROMPTS, 40, step=0)
    ends = {"stop": 0, "length": 0}
    for whole, r in zip(free, stopped, strict=True):
        text = Letters().decode(list(whole.tokens))
        cuts = [text.find(s) + len(s) for s in strings if s in text]
        assert len(r.tokens) == min(cuts, default=20) and r.tokens == whole.tokens[: len(r.tokens)]
        assert r.stop == ("stop" if cuts else "length")
        ends[r.stop] += 1
    assert min(ends.values()) > 3


def test_evaluation_has_its_own_randomness_and_disturbs_nothing(lm: PreTrainedModel) -> None:
    sampler = Sampler(lm, Letters(), Sampling(1.0, 8), seed=1)
    before, state = sampler.sample(PROMPTS, 4, step=3), torch.get_rng_state()
    evaluated = sampler.evaluate(PROMPTS, 4, step=3)
    assert [r.tokens for r in evaluated] != [r.tokens for r in before]
    assert [r.tokens for r in sampler.evaluate(PROMPTS, 4, step=3)] == [r.tokens for r in evaluated]
    assert sampler.sample(PROMPTS, 4, step=3) == before
    assert torch.equal(state, torch.get_rng_state())


def test_greedy_evaluation_takes_the_likeliest_token(lm: PreTrainedModel) -> None:
    rollouts = Sampler(lm, Letters(), Sampling(1.0, 8)).evaluate(PROMPTS, 2, step=0, sampling=greedy(Sampling(1.0, 8)))
    compat.use_attention(lm.eval(), "eager")
    for r in rollouts:
        text = list(r.prompt.tokens)
        for token in r.tokens:
            assert int(lm(input_ids=torch.tensor([text])).logits[0, -1].argmax()) == token
            text.append(token)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("modules", [False, True])
def test_dropout_is_off_inside_and_every_mode_is_restored(
    lm: PreTrainedModel, training: bool, modules: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Straight from the weights, where there is no dropout, and through the modules, which have some."""
    if modules:
        monkeypatch.setattr(forward, "is_common", lambda body: False)
    lm.train(training)
    lm.model.layers[1].train(not training)
    modes = [m.training for m in lm.modules()]
    sampler = Sampler(lm, Letters(), Sampling(1.0, 8))
    once = sampler.sample(PROMPTS, 4, step=0)
    assert [m.training for m in lm.modules()] == modes
    assert sampler.sample(PROMPTS, 4, step=0) == once
    assert all(not p.is_inference() for p in lm.parameters())


def test_load_publishes_the_policy_without_a_copy(lm: PreTrainedModel) -> None:
    sampler, policy = Sampler(lm, Letters(), Sampling(1.0, 8)), Policy(lm)
    before = sampler.sample(PROMPTS, 4, step=0)
    with torch.no_grad():
        for p in policy.parameters():
            p.mul_(3)
    sampler.load(policy)
    after = sampler.sample(PROMPTS, 4, step=0)
    assert sampler.lm is lm and {r.version for r in after} == {1}
    assert [r.tokens for r in after] != [r.tokens for r in before]


def test_bfloat16_is_a_copy_cast_at_each_publish(lm: PreTrainedModel) -> None:
    """The policy keeps its float32 weights; the sampler's log-probabilities are near the learner's, and follow the weights only when published."""
    add_lora(lm, rank=2, alpha=4.0)
    policy, sampler = Policy(lm.eval()), Sampler(lm, Letters(), Sampling(1.0, 8), dtype=torch.bfloat16)
    assert {p.dtype for p in sampler.lm.parameters()} == {torch.bfloat16} and {p.dtype for p in lm.parameters()} == {torch.float32}
    assert all(b.dtype != torch.bfloat16 for b in sampler.lm.buffers())
    first = sampler.sample(PROMPTS, 8, step=0)
    with torch.no_grad():
        for name, p in lm.named_parameters():
            if "lora_B" in name:
                p.normal_()
    assert sampler.sample(PROMPTS, 8, step=0) == first
    sampler.load(policy)
    second = sampler.sample(PROMPTS, 8, step=0)
    assert {r.version for r in second} == {1}
    gaps = []
    for rollouts in (first, second):
        batch = pack(rollouts)
        with torch.no_grad():
            gaps.append(float((policy(batch).logprobs - batch.sampler).abs().max()))
    assert gaps[1] < 0.1 < gaps[0]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"top_k": 5}, "top_k 5 in a training rollout"), ({"top_p": 0.9}, "top_p 0.9 in a training rollout"), ({"temperature": 0.0}, "temperature 0 in a training rollout"),
        ({"temperature": -1.0}, "temperature is -1.0"), ({"temperature": float("nan")}, "temperature is nan"), ({"max_tokens": 0}, "max_tokens is 0"),
        ({"top_p": 0.0}, "top_p is 0.0"), ({"top_k": -2}, "top_k is -2"), ({"stop_ids": (12,)}, "stop_ids"), ({"stop_strings": ("",)}, "stop_strings"),
    ],
)  # fmt: skip
def test_settings_that_cannot_be_trained_on_are_refused(lm: PreTrainedModel, settings: dict[str, object], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        Sampler(lm, Letters(), Sampling(**settings))  # type: ignore[arg-type]


def test_prompts_that_do_not_fit_are_counted(lm: PreTrainedModel) -> None:
    sampler = Sampler(lm, Letters(), Sampling(1.0, 8))
    with pytest.raises(UsageError, match="2 of 3 prompts do not fit the model's context of 32 tokens.*prompt 5, 40 tokens"):
        sampler.sample([Prompt((1,) * 32, 4), Prompt((1,) * 40, 5), Prompt((1,) * 31, 6)], 1, step=0)
    (last,) = sampler.sample([Prompt((1,) * 31, 6)], 1, step=0)
    assert len(last.tokens) == 1
    with pytest.raises(UsageError, match="1 of 2 prompts have no tokens"):
        sampler.sample([Prompt((), 4), Prompt((1,), 5)], 1, step=0)


def test_nothing_asked_is_nothing_sampled(lm: PreTrainedModel) -> None:
    assert Sampler(lm, Letters(), Sampling()).sample([], 4, step=0) == []


def test_diverged_weights_are_named(lm: PreTrainedModel) -> None:
    with torch.no_grad():
        lm.lm_head.weight[3] = float("nan")
    with pytest.raises(NumericError, match="not finite"):
        Sampler(lm, Letters(), Sampling(1.0, 8)).sample(PROMPTS, 2, step=0)


def test_adapters_are_sampled_with(lm: PreTrainedModel) -> None:
    """LoRA: the model with its adapter answers as its merged weights do, and otherwise with the adapter off."""
    add_lora(lm, rank=4, alpha=8.0)
    with torch.no_grad():
        for name, p in lm.named_parameters():
            if "lora_B" in name:
                p.normal_()
    sampler = Sampler(lm, Letters(), Sampling(1.0, 8))
    adapted = sampler.sample(PROMPTS, 6, step=0)
    with adapter_off(lm):
        plain = sampler.sample(PROMPTS, 6, step=0)
    merged = Sampler(plain_copy(lm), Letters(), Sampling(1.0, 8)).sample(PROMPTS, 6, step=0)
    assert [r.tokens for r in adapted] == [r.tokens for r in merged] != [r.tokens for r in plain]
