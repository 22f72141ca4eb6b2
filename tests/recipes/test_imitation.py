"""Supervised recipes end to end: pretrain and sft, what they count, when they stop, what they leave."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from tilt.data.rollouts import Prompt, Rollout, Sampling
from tilt.errors import DataError, NumericError, UsageError
from tilt.learning.evaluation import Assessment, distinct, likelihood, standard_error
from tilt.learning.learner import Learner
from tilt.models.loading import load, tiny
from tilt.models.policy import Policy
from tilt.objectives import Rewards
from tilt.recipes import sft
from tilt.rewards.text import Text


def test_sft_lowers_the_held_out_likelihood_and_reports_how_answers_end(run_sft, metrics):
    result = run_sft(steps=60, batch=16, optimizer={"lr": 2e-2}, eval={"every": 30})
    lines = metrics(result)
    assert result.after["nll"] < 0.7 * result.before["nll"] and result.after["perplexity"] == pytest.approx(math.exp(result.after["nll"]))
    assert result.before["ends"] < 0.5 < result.after["ends"] <= 1.0
    assert [line["step"] for line in lines if "eval/nll" in line] == [0, 30, 60]
    assert lines[0]["lr"] == pytest.approx(2e-3) and lines[59]["lr"] < 1e-3


def test_ends_counts_the_likeliest_token_after_an_answer():
    """By hand on a model whose next token is its last token plus one: of 1 2 3, 7 8 3, 1 2 (cut) and 7 8 4 (cut), stop id 3, one of two ends."""
    lm = tiny("gpt2", vocabulary=10, width=16, layers=1, heads=2, context=16)

    class Counting(Policy):
        def hidden(self, pack, at=None):
            tokens = pack.tokens if at is None else pack.tokens[at]
            return torch.nn.functional.one_hot((tokens + 1) % 10, 16).float() * 20

        def head(self, hidden):
            return hidden[:, :10]

    given = [Rollout.demonstration(Prompt((0,), i), answer) for i, answer in enumerate([(1, 2, 3), (7, 8, 3), (1, 2), (7, 8, 4)])]
    found = likelihood(Counting(lm), given, 100, stop_ids=(3, 9))
    assert found["ends"] == 1.0  # after 7 8 the likeliest is 9, another stop token
    assert likelihood(Counting(lm), given, 100, stop_ids=(3,))["ends"] == 0.5
    assert likelihood(Counting(lm), given, 2, stop_ids=(3,))["ends"] == 0.5
    assert "ends" not in likelihood(Counting(lm), given, 100)
    assert found["nll"] == pytest.approx(4 * 20 / 11, abs=1e-3)  # 4 of 11 tokens were not predicted, at 20 nats each


def test_a_run_stops_at_the_first_evaluation_that_is_good_enough(run_sft):
    result = run_sft(
        steps=50,
        eval={"every": 2, "prompts": 4},
        sampling={"max_tokens": 3},
        reward=lambda completions: [1.0] * len(completions),
        stop_at=0.5,
    )
    assert result.checkpoint.name == "step_000000" and result.after["reward"] == 1.0
    for settings in ({"stop_at": 0.5}, {"stop_at": 0.5, "reward": "exact"}):
        with pytest.raises(ValueError, match="stop_at needs a reward"):
            run_sft(**settings)
    with pytest.raises(ValueError, match="sampling, eval.samples: without effect"):
        run_sft(sampling={"max_tokens": 3}, eval={"every": 2, "samples": 2})
    with pytest.raises(ValueError, match="reward scores answers to held-out prompts"):
        run_sft(reward="exact", data={"source": "any", "held_out": 0.0})


def test_evaluation_does_not_touch_supervised_training(run_sft, metrics):
    def losses(**settings):
        return [line["loss"] for line in metrics(run_sft(steps=4, reward="exact", **settings)) if "loss" in line]

    assert losses(eval={"every": 1, "prompts": 3}) == losses(eval={"every": 0})


def test_the_order_of_the_data_is_the_seeds_alone(run_sft, metrics):
    def losses(seed):
        return [line["loss"] for line in metrics(run_sft(steps=4, seed=seed)) if "loss" in line]

    assert losses(1) == losses(1) != losses(2)


def test_rows_that_are_too_long_are_counted(run_sft, rows):
    with rows.open("a") as file:
        file.write(json.dumps({"prompt": "long", "completion": "word " * 40, "answer": ""}) + "\n")
    result = run_sft(data={"source": str(rows), "template": "text", "max_tokens": 8, "held_out": 0.2})
    assert "answers longer than 8 tokens (left out)" in result.directory.log.read_text()


def test_several_turns_train_what_the_assistant_says(shared, tmp_path, metrics):
    file = tmp_path / "talk.jsonl"
    talks = [
        {
            "messages": [
                {"role": "user", "content": f"hi {i}"},
                {"role": "assistant", "content": "yes"},
                {"role": "user", "content": "and"},
                {"role": "assistant", "content": "no"},
            ]
        }
        for i in range(12)
    ]
    file.write_text("".join(json.dumps(t) + "\n" for t in talks))
    seen = []
    model = {"width": 16, "layers": 1, "heads": 2, "context": 128, "vocabulary": 280}
    for train_on in ("assistant", "completion", "all"):
        config = sft.Config.model_validate(
            shared
            | {
                "model": model,
                "data": {"source": str(file), "template": "tilt", "train_on": train_on, "held_out": 0.2},
                "steps": 2,
                "batch": 4,
            }
        )
        result = sft.run(config)
        assert math.isfinite(result.after["nll"]) and ("ends" in result.after) == (train_on == "completion")
        seen.append(result)
    assert len({round(r.before["nll"], 6) for r in seen}) == 3


def test_pretrain_reads_texts_and_pairs(run_pretrain, rows, pairs, metrics):
    result = run_pretrain(steps=20, batch=8, optimizer={"lr": 1e-2})
    assert result.after["nll"] < result.before["nll"] and "ends" not in result.after
    assert run_pretrain(data={"source": str(pairs), "template": "text"}, read_as="preference").after
    text = Path(rows).with_name("texts.jsonl")
    text.write_text("".join(json.dumps({"text": f"line {i} of a text"}) + "\n" for i in range(30)))
    assert run_pretrain(data=str(text), read_as="text", length=8).after


def test_nothing_to_train_on_is_said(run_sft, run_pretrain, rows, tmp_path):
    with pytest.raises(DataError, match="no row is left to train on: all ask what is held out"):
        run_sft(data={"source": str(rows), "template": "text", "eval": str(rows)})
    with pytest.raises(UsageError, match="no such folder"):
        run_sft(model=str(tmp_path / "nowhere"))


def test_with_an_adapter_the_base_stays_and_what_is_saved_is_merged(run_sft):
    start = run_sft().checkpoint
    tuned = run_sft(model=str(start), lora={"rank": 2, "alpha": 4.0}, optimizer={"lr": 1e-1})
    base, merged = load(start)[0].state_dict(), load(tuned.checkpoint)[0].state_dict()
    changed = {name for name in base if not torch.equal(base[name], merged[name])}
    assert changed and all("_proj" in name for name in changed)
    assert tuned.after["nll"] == pytest.approx(run_sft(model=str(tuned.checkpoint)).before["nll"], abs=1e-4)


def test_a_batch_that_breaks_is_kept(run_sft, shared, monkeypatch):
    found = Learner._forward

    def broken(self, *given):
        said = found(self, *given)
        return type(said)(**{**vars(said), "logprobs": said.logprobs * torch.inf}) if self.version == 2 else said

    monkeypatch.setattr(Learner, "_forward", broken)
    with pytest.raises(NumericError, match="step 2: the policy's log-probabilities"):
        run_sft(name="broken")
    kept = torch.load(shared["root"] / "broken" / "bad_batch_step_000002.pt", weights_only=True)
    assert kept["term"] == "the policy's log-probabilities" and len(kept["batch"]["tokens"]) > 0


def test_distinct_does_not_fall_with_the_number_of_answers():
    """Two rounds of answers to two prompts: the mean of the rounds' shares, 4 / 4 and 2 / 4, not the share of all together, 5 / 8."""
    prompts = [Prompt((1,), number) for number in range(2)]
    answers = ["a b c", "d e f", "a b a", "a b a"]
    rollouts = [Rollout(prompts[i % 2], (2,), (True,), (-1.0,), "stop", Sampling()) for i in range(4)]
    texts = [Text("p", answer) for answer in answers]
    found = Assessment(rollouts, texts, Rewards.of(torch.zeros(4), actions=4)).metrics
    assert found["distinct_2"] == (4 / 4 + 2 / 4) / 2


def test_distinct_and_standard_error_by_hand():
    assert distinct(["a b a b", "a b"], 2) == 2 / 4 and distinct(["one"], 2) == 0.0
    rollouts = [Rollout.demonstration(Prompt((1,), i // 2), (2,)) for i in range(6)]
    rewards = Rewards.of(torch.tensor([1.0, 3, 0, 0, 5, 9]), scored=torch.tensor([True] * 5 + [False]), actions=6)
    means = torch.tensor([2.0, 0.0, 5.0])
    assert standard_error(rollouts, rewards) == pytest.approx(float(means.std() / 3**0.5))
