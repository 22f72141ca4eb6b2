"""Two checkpoints on the same texts: equal to plain transformers, zeros where nothing changed, and a planted change found first and alone."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from tilt.data.rollouts import Prompt, Rollout
from tilt.data.tokenizers import characters
from tilt.inspect.compared import compare, flips_of, mcnemar
from tilt.models.loading import load, tiny
from tilt.models.policy import Policy

LETTERS = "abcdefghijklmnopqrstuvwxyz +=0123456789"


@pytest.fixture
def tokenizer():
    return characters(LETTERS)


def model(tokenizer, seed=0, **shape):
    return tiny("qwen3", vocabulary=len(tokenizer), width=32, layers=2, heads=4, context=64, seed=seed, **shape)


@pytest.fixture
def given(tokenizer):
    texts = [("two+two=", "four and so on"), ("two+two=", "five"), ("say a word ", "banana split")]
    prompts = {p: Prompt(tuple(tokenizer.encode(p, add_special_tokens=False)), i) for i, (p, _) in enumerate(texts)}
    return [
        Rollout.demonstration(prompts[p], (*tokenizer.encode(c, add_special_tokens=False), tokenizer.eos_token_id)) for p, c in texts
    ], texts


def of(a, b, given, tokenizer, **how):
    return compare(Policy(a).eval(), Policy(b).eval(), given[0], given[1], tokenizer, **how)


def test_the_same_checkpoint_gives_zeros(tokenizer, given):
    lm = model(tokenizer)
    found = of(lm, copy.deepcopy(lm), given, tokenizer)
    assert found["ranked"] == [] and found["summary"]["largest_kl"] == 0 and found["summary"]["top_choice_changed"] == 0
    for text in found["texts"]:
        assert (
            set(text["channels"]["delta"]) == {0.0}
            and set(text["channels"]["kl"]) == {0.0}
            and set(text["channels"]["argmax_changed"]) == {0}
        )
    assert found["changed"]["tokens"]["gained"] == [] == found["changed"]["tokens"]["lost"]


def test_numbers_equal_those_of_plain_transformers(tokenizer, given, tmp_path):
    for name, seed in (("a", 0), ("b", 1), ("r", 2)):
        model(tokenizer, seed).save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    found = of(
        load(str(tmp_path / "a"))[0],
        load(str(tmp_path / "b"))[0],
        given,
        tokenizer,
        reference=("r", Policy(load(str(tmp_path / "r"))[0]).eval()),
    )
    plain = {name: AutoModelForCausalLM.from_pretrained(tmp_path / name).eval() for name in "abr"}
    for rollout, text in zip(given[0], found["texts"], strict=True):
        row = torch.tensor([[*rollout.prompt.tokens, *rollout.tokens]])
        first = len(rollout.prompt.tokens) - 1
        with torch.no_grad():
            logs = {name: lm(row).logits[0, first:-1].log_softmax(-1) for name, lm in plain.items()}
        said = {name: x.gather(1, torch.tensor(rollout.tokens)[:, None])[:, 0] for name, x in logs.items()}
        c = text["channels"]
        assert np.allclose(c["a_logprobs"], said["a"], atol=1e-4) and np.allclose(c["delta"], said["b"] - said["a"], atol=1e-4)
        assert np.allclose(c["delta_reference"], said["b"] - said["r"], atol=1e-4)
        assert np.allclose(c["kl"], (logs["b"].exp() * (logs["b"] - logs["a"])).sum(-1), atol=1e-5) and min(c["kl"]) >= 0
        assert np.allclose(c["b_entropy"], -(logs["b"].exp() * logs["b"]).sum(-1), atol=1e-4)
        assert c["a_rank"] == (logs["a"] > said["a"][:, None]).sum(1).tolist()
        assert c["argmax_changed"] == (logs["a"].argmax(1) != logs["b"].argmax(1)).int().tolist()
        assert sum(c["delta"]) == pytest.approx(float(said["b"].sum() - said["a"].sum()), abs=1e-4)
        assert "".join(text["tokens"][:-1]) == text["completion"] and [t[0][0] for t in text["top"]["b"]] == [
            tokenizer.decode([i]) for i in logs["b"].argmax(1).tolist()
        ]


def test_a_change_planted_in_one_context_is_found_first_and_nothing_else_is(tokenizer, given):
    """b differs where the last token read is `p`, which the texts have once: the next token is made likelier there."""
    a = model(tokenizer)
    b = copy.deepcopy(a)
    p, wanted = (tokenizer.encode(c, add_special_tokens=False)[0] for c in "pl")
    policy, other = Policy(a).eval(), Policy(b).eval()
    plain = other.before_actions
    marks: list[torch.Tensor] = []

    def before(pack):
        marks.append(pack.tokens[pack.predictors] == p)
        return plain(pack)

    head = type(other).head.fget(other)

    class Moved(Policy):
        @property
        def head(self):
            def planted(hidden):
                logits = head(hidden).clone()
                begin = self.read
                here = marks[-1][begin : begin + len(hidden)]
                if len(hidden) > 1 or len(marks[-1]) == 1:
                    self.read += len(hidden)
                    logits[here, wanted] += 3.0
                return logits

            return planted

    other.__class__ = Moved
    other.read = 0
    other.before_actions = before
    found = compare(policy, other, given[0], given[1], tokenizer)
    place = given[1][2][1].index("p") + 1
    assert [(line["text"], line["position"]) for line in found["ranked"]] == [(2, place)]
    assert found["summary"]["unchanged_tokens"] == found["summary"]["tokens"] - 1 and found["texts"][2]["tokens"][place] == "l"
    assert (
        found["changed"]["tokens"]["gained"][0]["token"] == "l"
        and len(found["changed"]["tokens"]["gained"]) == 1
        and not found["changed"]["tokens"]["lost"]
    )


def test_mean_exact_kl_agrees_with_sampled_k1(tokenizer):
    """Answers sampled from b: the mean of log b − log a is an estimate of the mean KL(b ‖ a), within four standard errors."""
    from tilt.data.rollouts import Sampling
    from tilt.sampling.sampler import Sampler

    a, b = model(tokenizer, 0), model(tokenizer, 1)
    prompt = Prompt(tuple(tokenizer.encode("go ", add_special_tokens=False)), 0)
    rollouts = Sampler(b, tokenizer, Sampling(1.0, 24, (tokenizer.eos_token_id,)), seed=3).sample([prompt], 128, step=0)
    texts = [("go ", str(tokenizer.decode(list(r.tokens), skip_special_tokens=True))) for r in rollouts]
    found = compare(Policy(a).eval(), Policy(b).eval(), rollouts, texts, tokenizer)
    k1 = np.concatenate([t["channels"]["delta"] for t in found["texts"]])
    exact = np.concatenate([t["channels"]["kl"] for t in found["texts"]])
    assert abs(k1.mean() - exact.mean()) < 4 * (k1 - exact).std() / math.sqrt(len(k1)) and exact.min() >= 0


@pytest.mark.parametrize("gained, lost, p", [(5, 0, 0.0625), (0, 5, 0.0625), (3, 3, 1.0), (0, 0, 1.0), (1, 9, 0.021484375)])
def test_mcnemar_is_exact(gained, lost, p):
    assert mcnemar(gained, lost) == pytest.approx(p)
    count = gained + lost
    enumerated = sum(math.comb(count, k) / 2**count for k in range(count + 1) if min(k, count - k) <= min(gained, lost))
    assert mcnemar(gained, lost) == pytest.approx(enumerated)


def test_flips_are_told_apart():
    found = flips_of("abcd", [("x", False), ("x", True), ("x", True), ("x", False)], [("y", True), ("y", False), ("y", True), ("y", False)])
    assert (
        [f["prompt"] for f in found["gained"]] == ["a"]
        and [f["prompt"] for f in found["lost"]] == ["b"]
        and (found["both"], found["neither"], found["p"]) == (1, 1, 1.0)
    )
