"""What is saved opens with the plain transformers classes and scores the same; roles start where they should."""

from __future__ import annotations

import json

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, PreTrainedTokenizerFast

from tilt.data.packing import pack
from tilt.data.rollouts import Rollout
from tilt.errors import UsageError
from tilt.models import adapters, compat
from tilt.models.heads import hidden_states
from tilt.models.loading import load, load_reward_model, padded_tokenizer
from tilt.models.policy import Critic, Policy, RewardModel
from tilt.models.saving import fingerprint, save

KINDS = ["qwen3", "qwen2", "llama", "gpt2", "gemma3_text", "mistral"]


def shake(module, seed=5):
    """Every trainable weight moved, as training would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            if p.requires_grad:
                p.add_(torch.randn(p.shape, generator=generator).to(p) * 0.1)


def plain_scores(classifier, rollouts):
    return torch.cat([classifier(input_ids=torch.tensor([[*r.prompt.tokens, *r.tokens]])).logits[:, 0] for r in rollouts])


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("kind", KINDS)
def test_causal_lm(kind, lora, make, rollouts, alone, words_for, tmp_path):
    lm, words = make(kind), words_for(kind)
    if lora:
        adapters.add_lora(lm, 4, 8)
        shake(lm)
    ours = Policy(lm)(pack(rollouts)).logprobs
    save(lm, words, tmp_path)
    assert compat.is_packed(lm), "saving leaves the model as it was"
    plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert plain.dtype == torch.float32 and compat.attention_of(plain) != "tilt"
    torch.testing.assert_close(alone(plain, rollouts), ours, atol=1e-5, rtol=0)
    again, tokens = load(tmp_path)
    torch.testing.assert_close(Policy(again)(pack(rollouts)).logprobs, ours, atol=1e-5, rtol=0)
    assert tokens.pad_token_id == 49
    if not lora:
        assert fingerprint(again) == fingerprint(lm)


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("kind", KINDS)
def test_reward_model(kind, lora, make, rollouts, words_for, tmp_path):
    words = words_for(kind)
    rm = RewardModel.from_policy(Policy(make(kind)), padding=words.pad_token_id)
    if lora:
        adapters.add_lora(rm.model, 4, 8)
        assert compat.score_of(rm.model).weight.requires_grad
    shake(rm)
    ours = rm(pack(rollouts))
    assert ours.std() > 0.1
    save(rm.model, words, tmp_path)
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert plain.config.num_labels == 1 and plain.config.pad_token_id == 49
    torch.testing.assert_close(plain_scores(plain, rollouts), ours, atol=1e-5, rtol=1e-5)
    again, tokens = load_reward_model(tmp_path)
    assert tokens("w3 w4")["input_ids"] == words("w3 w4")["input_ids"]
    torch.testing.assert_close(again(pack(rollouts)), ours, atol=1e-5, rtol=1e-5)


def test_a_padded_architecture_saves_too(make, rollouts, alone, words, tmp_path):
    lm = make("mamba")
    ours = Policy(lm)(pack(rollouts)).logprobs
    save(lm, words, tmp_path)
    torch.testing.assert_close(alone(AutoModelForCausalLM.from_pretrained(tmp_path), rollouts), ours, atol=1e-5, rtol=0)


def test_bfloat16_is_asked_for_and_never_inherited(make, words, tmp_path):
    save(make("qwen3").bfloat16(), words, tmp_path)
    assert load(tmp_path)[0].dtype == torch.float32
    assert load(tmp_path, dtype=torch.bfloat16)[0].dtype == torch.bfloat16


def test_folder_carries_template_and_separate_ends(make, words, tmp_path):
    save(make("llama"), words, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert "tilt" not in (tmp_path / "config.json").read_text() and config["eos_token_id"] == 48
    generation = json.loads((tmp_path / "generation_config.json").read_text())
    assert generation["eos_token_id"] == 48 and generation["pad_token_id"] == 49
    tokens = AutoTokenizer.from_pretrained(tmp_path)
    assert compat.render_chat(tokens, [{"role": "user", "content": "w3 w4"}], answer_next=True) == [3, 4, 7]


def tight(lm_rows: int):
    """Forty-nine words, the last one both end and padding: no token is free."""
    vocabulary = {f"w{i}": i for i in range(lm_rows - 1)} | {"<eos>": lm_rows - 1}
    plain = Tokenizer(models.WordLevel(vocabulary, unk_token="<eos>"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=plain, eos_token="<eos>", pad_token="<eos>", unk_token="<eos>", bos_token="<eos>")


def test_base_model_whose_padding_is_its_end(make, rollouts, tmp_path):
    """As GPT-2: the policy keeps its vocabulary and saves no padding; a reward model gets a token and a row of its own, and scores the end token."""
    lm, words = make("gpt2", vocab_size=49), tight(49)
    save(lm, words, tmp_path / "base")
    lm, words = load(tmp_path / "base")
    assert words.pad_token_id is None and len(words) == lm.get_input_embeddings().weight.shape[0] == 49
    generation = json.loads((tmp_path / "base" / "generation_config.json").read_text())
    assert generation["eos_token_id"] == 48 and generation.get("pad_token_id") is None
    theirs = padded_tokenizer(words)
    assert theirs.pad_token_id == 49 and words.pad_token_id is None and len(words) == 49
    rm = RewardModel.from_policy(Policy(lm), padding=theirs.pad_token_id)
    save(rm.model, theirs, tmp_path / "rm")
    ended = [Rollout.demonstration(r.prompt, (*r.tokens, 48)) for r in rollouts if r.prompt.tokens]
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "rm")
    torch.testing.assert_close(plain_scores(plain, ended), rm(pack(ended)), atol=1e-5, rtol=1e-5)
    rows = [[*r.prompt.tokens, *r.tokens] for r in ended]
    width = max(map(len, rows))
    padded, mask = (
        torch.tensor([row + [fill] * (width - len(row)) for row in part]) for part, fill in ((rows, 49), ([[1] * len(r) for r in rows], 0))
    )
    torch.testing.assert_close(plain(input_ids=padded, attention_mask=mask).logits[:, 0], rm(pack(ended)), atol=1e-5, rtol=1e-5)


def test_padding_takes_a_reserved_token_before_a_meaningful_one(make, words, tmp_path):
    words.add_special_tokens({"additional_special_tokens": ["<|turn|>", "<|reserved_0|>"]})
    words.pad_token = "<eos>"
    save(make("llama", vocab_size=52), words, tmp_path)
    assert load(tmp_path)[1].pad_token == "<pad>", "the token that is called padding"


def test_a_tokenizer_that_would_be_opened_as_another_is_refused(make, words, tmp_path):
    """AutoTokenizer opens every qwen2 folder as Qwen2Tokenizer, whatever its tokenizer_config says."""
    with pytest.raises(UsageError, match="qwen2 model with this tokenizer"):
        save(make("qwen2"), words, tmp_path)


def test_critic_starts_from_the_reward_model(make, batch, words):
    rm = RewardModel.from_policy(Policy(make("gemma3_text")), padding=49).requires_grad_(False)
    before = fingerprint(rm)
    critic = Critic.from_reward_model(rm)
    assert torch.equal(hidden_states(critic.body, batch), hidden_states(rm.model, batch))
    values, final = critic(batch)
    torch.testing.assert_close(final, rm(batch))
    assert values.shape == batch.actions.shape and all(p.requires_grad for p in critic.parameters())
    (values.sum() + final.sum()).backward()
    shake(critic)
    assert fingerprint(rm) == before and not torch.allclose(critic(batch)[1], final)


def test_critic_values_the_state_before_each_action(make, rollouts):
    """V of the text so far: the first answer's values are the scores of its prefixes."""
    rm = RewardModel.from_policy(Policy(make("qwen3")), padding=49)
    critic, first = Critic.from_reward_model(rm), rollouts[0]
    text = [*first.prompt.tokens, *first.tokens]
    prefixes = [text[: len(first.prompt.tokens) + i] for i in range(len(first.tokens))]
    model = rm.model
    compat.use_attention(model, "eager")
    want = torch.cat([model(input_ids=torch.tensor([p])).logits[:, 0] for p in prefixes])
    torch.testing.assert_close(critic(pack(rollouts))[0][: len(first.tokens)], want, atol=1e-5, rtol=1e-5)


def test_critic_from_policy_and_shared(make, batch):
    lm = make("llama")
    adapters.add_lora(lm, 2, 4)
    shake(lm)
    policy = Policy(lm, value_head=True)
    critic = Critic.from_policy(policy)
    assert not adapters.has_adapters(critic) and all(p.requires_grad for p in critic.parameters())
    assert (critic(batch)[0] == 0).all() and (critic(batch)[1] == 0).all()
    torch.testing.assert_close(hidden_states(critic.body, batch), policy.hidden(batch), atol=1e-5, rtol=1e-5)
    shake(policy.value_head)
    said, every = policy(batch, values=True), policy.value_head(policy.hidden(batch))[:, 0]
    torch.testing.assert_close(said.values, every[batch.predictors], atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(said.final, every[batch.last_tokens], atol=1e-6, rtol=1e-6)


def test_fingerprint_sees_one_weight(make):
    lm = make("qwen3")
    before = fingerprint(lm)
    assert fingerprint(lm) == before
    with torch.no_grad():
        lm.model.layers[0].mlp.up_proj.weight[0, 0] += 1e-6
    assert fingerprint(lm) != before
