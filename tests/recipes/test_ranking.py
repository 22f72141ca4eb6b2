"""Ranked answers: which pairs are made, what their record says, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tilt.data.formats import read
from tilt.data.rollouts import Prompt, Rollout, Sampling
from tilt.errors import DataError
from tilt.objectives import Rewards
from tilt.recipes import process_reward, ranking, rlhf, sft
from tilt.rewards.text import Text
from tilt.tasks import chains

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


TRUTH = f"{chains.__file__}:truth"
STEPS = FIXED | {"reward": {"process": TRUTH}, "rows": "steps"}


def answer(text: str, stop: str = "stop") -> Rollout:
    """One token a character, and the end token where it ended by itself."""
    n = len(text) + (stop == "stop")
    return Rollout(Prompt((1,), 0, {"prompt": "ask"}), (2,) * n, (True,) * n, (-1.0,) * n, stop, Sampling())  # type: ignore[arg-type]


def labelled(answers: list[tuple[str, str, list[float | None]]]) -> list[ranking.Labelled]:
    rollouts, steps, ends = [answer(text, stop) for text, stop, _ in answers], [], []
    for rollout, (text, _, labels) in zip(rollouts, answers, strict=True):
        last = [i for i, letter in enumerate(text) if letter == ";"] + [len(rollout.tokens) - 1]
        own = dict(zip(last, labels, strict=True))
        steps += [own.get(i) or 0.0 for i in range(len(rollout.tokens))]
        ends += [own.get(i) is not None for i in range(len(rollout.tokens))]
    texts = [Text("rendered", text) for text, _, _ in answers]
    rewards = Rewards.of(torch.zeros(len(answers)), torch.tensor(steps), ends=torch.tensor(ends))
    return list(ranking.labelled(ranking.Config.model_validate(STEPS), rollouts, texts, rewards, ";", "m@0"))


def test_every_answer_is_written_with_what_the_judge_says_of_its_steps():
    found = labelled([("ab;c", "stop", [1.0, 0.0]), ("d", "stop", [0.25]), ("e;f;g", "length", [0.0, 1.0, 1.0]), ("h", "length", [1.0])])
    assert found == [
        ranking.Labelled("ask", ["ab", "c"], [1.0, 0.0], 0, "m@0"),
        ranking.Labelled("ask", ["d"], [0.25], 1, "m@0"),
        ranking.Labelled("ask", ["e", "f"], [0.0, 1.0], 2, "m@0"),  # what was cut is no step
    ]


def test_an_answer_with_a_step_that_could_not_be_judged_is_left_out():
    assert [found.steps for found in labelled([("a;b", "stop", [1.0, None]), ("c;d", "stop", [0.0, 0.0])])] == [["c", "d"]]
    with pytest.raises(DataError, match="0 to 1"):
        labelled([("a", "stop", [1.5])])


def test_labelled_steps_are_what_a_process_reward_model_learns_from(shared, tmp_path):
    chains.write(tmp_path / "chains", chains.Chains(count=40))
    given = {"source": str(tmp_path / "chains" / "demonstrations.jsonl"), "template": "text"}
    small = {"width": 16, "layers": 1, "heads": 2, "context": 64, "tokenizer": str(tmp_path / "chains" / "words")}
    start = sft.run(sft.Config.model_validate(shared | {"model": small, "data": given, "steps": 3, "batch": 8})).checkpoint
    settings = {"model": str(start), "data": given | {"source": str(tmp_path / "chains" / "prompts.jsonl")}, "sampling": {"max_tokens": 40}}
    made = ranking.run(ranking.Config.model_validate(shared | settings | {"rows": "steps", "reward": {"process": TRUTH}}))
    rows = [json.loads(line) for line in (made.directory / "steps.jsonl").read_text().splitlines()]
    assert len(rows) == made.after["answers"] == json.loads((made.directory / "provenance.json").read_text())["answers"]
    assert all(row["labels"] == chains.right(row["prompt"], row["steps"]) for row in rows)
    again = shared | {"model": str(start), "data": given | {"source": str(made.directory / "steps.jsonl")}, "steps": 1, "batch": 8}
    process_reward.run(process_reward.Config.model_validate(again))


@pytest.mark.parametrize(
    "given, message", [({"samples": 1}, "samples"), ({"reward": {"lenth": 3}}, "lenth"), ({"gap": -1.0}, "gap"), ({"lora": {}}, "lora")]
)
def test_bad_input(given, message):
    with pytest.raises(ValueError, match=message):
        ranking.Config.model_validate(FIXED | given)


@pytest.mark.parametrize(
    "given, message",
    [
        ({"pairs": "all"}, "pairs: without effect"), ({"gap": 0.5}, "gap: without effect"), ({"reward": {"length": 3}}, "one judge of steps"),
        ({"reward": [{"process": TRUTH}, {"length": 3}]}, "one judge of steps"), ({"reward": {"process": TRUTH, "weight": 2.0}}, "of weight 1"),
    ],
)  # fmt: skip
def test_labelled_steps_need_a_judge_of_steps_and_make_no_pairs(given, message):
    with pytest.raises(ValueError, match=message):
        ranking.Config.model_validate(STEPS | given)
