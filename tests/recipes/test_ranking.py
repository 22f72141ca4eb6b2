"""Ranked answers: which pairs are made, what their record says, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tilt.data.formats import read
from tilt.data.rollouts import Prompt
from tilt.errors import DataError
from tilt.objectives import Rewards
from tilt.recipes import ranking, rlhf
from tilt.rewards.text import Text

FIXED = {"model": "m", "data": "d", "reward": {"length": 3}, "samples": 3}


def pairs_of(completions, totals, scored=None, **settings):
    config = ranking.Config.model_validate(FIXED | settings)
    prompt = Prompt((1, 2), 0, {"prompt": "ask"})
    texts = [Text("rendered", c) for c in [*["x"] * config.samples, *completions]]  # the second prompt of its batch
    rewards = Rewards.of(
        torch.tensor([9.0] * config.samples + totals), scored=None if scored is None else torch.tensor([True] * config.samples + scored)
    )
    return list(ranking.ranked(config, prompt, 1, texts, rewards, "m@0"))


def test_the_best_is_held_against_the_worst():
    (pair,) = pairs_of(["b", "a", "c"], [2.0, 3.0, 1.0])
    assert pair == ranking.Ranked("ask", "a", "c", 3.0, 1.0, 1, 2, "m@0")


def test_all_pairs_of_different_rewards_and_texts():
    found = [(p.chosen, p.rejected) for p in pairs_of(["a", "b", "c"], [3.0, 1.0, 2.0], pairs="all")]
    assert sorted(found) == [("a", "b"), ("a", "c"), ("c", "b")]
    assert [(p.chosen, p.rejected) for p in pairs_of(["a", "b", "a"], [3.0, 1.0, 1.0], pairs="all")] == [("a", "b")]
    assert [(p.chosen, p.rejected) for p in pairs_of(["a", "b", "c"], [3.0, 1.0, 2.8], pairs="all", gap=1.0)] == [("a", "b"), ("c", "b")]


def test_ties_and_answers_that_could_not_be_scored_make_no_pair():
    assert pairs_of(["a", "b", "c"], [1.0, 1.0, 1.0]) == []
    (pair,) = pairs_of(["a", "b", "c"], [1.0, 5.0, 3.0], [True, False, True])
    assert (pair.chosen, pair.rejected) == ("c", "a")
    assert pairs_of(["a", "b", "c"], [1.0, 5.0, 3.0], [True, False, False]) == []


def test_what_is_written_is_preference_data(run_sft, rows, shared):
    start = run_sft(steps=2).checkpoint
    given = {
        "model": str(start),
        "data": {"source": str(rows), "template": "text"},
        "reward": {"length": 3},
        "sampling": {"max_tokens": 6},
        "prompts": 25,
    }
    result = ranking.run(ranking.Config.model_validate(shared | given))
    lines = [json.loads(line) for line in (result.directory / "pairs.jsonl").read_text().splitlines()]
    assert len(lines) == result.after["pairs"] and len({line["prompt"] for line in lines}) == len(lines)
    dataset = read(lines, want="preference", source="pairs")
    assert dataset.kind == "preference" and not dataset.conversational and dataset.rows[0]["chosen"] == lines[0]["chosen"]
    again = ranking.run(ranking.Config.model_validate(shared | given))
    assert (again.directory / "pairs.jsonl").read_text() == (result.directory / "pairs.jsonl").read_text()
    with pytest.raises(DataError, match="no prompt has two answers of different rewards"):
        ranking.run(ranking.Config.model_validate(shared | given | {"gap": 1e9}))


def test_turns_stay_turns(run_sft, shared, tmp_path):
    talk = [{"messages": [{"role": "user", "content": f"say {i}"}, {"role": "assistant", "content": str(i) * 3}]} for i in range(20)]
    file = tmp_path / "talk.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in talk))
    start = run_sft(
        data={"source": str(file), "template": "tilt"},
        model={"width": 16, "layers": 1, "heads": 2, "context": 64, "vocabulary": 300},
        steps=2,
    ).checkpoint
    given = {"model": str(start), "data": {"source": str(file), "template": "tilt"}, "reward": {"length": 3}, "sampling": {"max_tokens": 8}}
    result = ranking.run(ranking.Config.model_validate(shared | given))
    lines = [json.loads(line) for line in (result.directory / "pairs.jsonl").read_text().splitlines()]
    assert lines[0]["prompt"] == [{"role": "user", "content": lines[0]["prompt"][0]["content"]}]
    assert read(lines, want="preference", source="pairs").conversational


def test_a_pipeline_with_ranked_answers_can_be_planned(pairs: Path, shared):
    config = {
        **shared, "model": {"width": 16, "layers": 1, "heads": 2, "context": 32, "vocabulary": 270}, "data": {"source": str(pairs), "template": "text"},
        "sft": {"steps": 1}, "reward_model": {"steps": 1}, "rl": {"algorithm": "ppo", "steps": 1, "prompts": 4, "sampling": {"max_tokens": 4}},
        "rank": {"reward": {"length": 3}, "sampling": {"max_tokens": 4}},
    }  # fmt: skip
    lines = rlhf.plan(rlhf.Config.model_validate(config))
    assert any("── rank" in line for line in lines) and any("answers    4 to each of 48 prompts" in line for line in lines)


@pytest.mark.parametrize(
    "given, message", [({"samples": 1}, "samples"), ({"reward": {"lenth": 3}}, "lenth"), ({"gap": -1.0}, "gap"), ({"lora": {}}, "lora")]
)
def test_bad_input(given, message):
    with pytest.raises(ValueError, match=message):
        ranking.Config.model_validate(FIXED | given)
