"""Pairs that a judge labels: what is written, what its record says, how it is learned from, and what is refused."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from tilt.cli.main import main
from tilt.data.formats import read
from tilt.data.rendering import renderer
from tilt.errors import DataError
from tilt.models.loading import load
from tilt.models.policy import Policy
from tilt.recipes import labelling, rlhf
from tilt.recipes.labelling import Config, Labelled, Pair
from tilt.rewards.judge import Choices, Opinions

JUDGES = """
def yes(prompts, first, second):  # knows that yes is better, and leans to what stands first
    return [1 / (1 + 2.718281828459045 ** -(1.5 * (a[:1] == "y") - 1.5 * (b[:1] == "y") + 0.5)) for a, b in zip(first, second)]
def first(second): return [0.9] * len(second)
def none(second): return [None] * len(second)
def some(first, second): return [0.5 if len(a) == len(b) else float(len(a) > len(b)) for a, b in zip(first, second)]
def large(second): return [2.0] * len(second)
def slow(second): raise KeyError("gold")
"""
SHORT = "{prompt}\n1 {first}\n2 {second}\n"


@pytest.fixture
def judges(tmp_path: Path) -> str:
    file = tmp_path / "judges.py"
    file.write_text(JUDGES)
    return str(file)


@pytest.fixture
def label(pairs: Path, judges: str, shared: dict[str, Any]) -> Any:
    """`label(judge="yes", margin=0.1)`: the settings over those of a small run on the planted pairs; a judge's name is a function of the file."""

    def run(judge: Any = "yes", **settings: Any) -> Any:
        given = {"judge": f"{judges}:{judge}" if isinstance(judge, str) and "/" not in judge else judge, "data": str(pairs)}
        return labelling.run(Config.model_validate(shared | given | settings))

    return run


def lines_of(result: Any) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (result.directory / "pairs.jsonl").read_text().splitlines()]


def record_of(result: Any) -> dict[str, Any]:
    return json.loads((result.directory / "provenance.json").read_text())  # type: ignore[no-any-return]


def test_both_orders_and_a_soft_label(label: Any, judges: str) -> None:
    """Log-odds 2.0 and -1.0 of the first place: logit p = 1.5, the bias 0.5."""
    result = label()
    (line, *_), record = lines_of(result), record_of(result)
    assert line["chosen"].startswith("yes") and line["rejected"].startswith("no") and line["prompt"] == "q0 "
    assert line["probability"] == pytest.approx(1 / (1 + 2.718281828459045**-1.5), abs=1e-9)
    assert (line["log_odds_chosen_first"], line["log_odds_rejected_first"]) == pytest.approx((2.0, -1.0), abs=1e-6)
    assert (
        (line["chosen_number"], line["rejected_number"]) == (0, 1) and line["judged_by"] == f"{judges}:yes" and line["sampled_from"] is None
    )
    assert result.after == pytest.approx(
        {"pairs": 48, "confidence": 0.8175744761, "position_bias": 0.5, "consistency": 1.0, "agreement": 1.0}
    )
    assert record["judge"]["function"] == f"{judges}:yes" and len(record["judge"]["sha256"]) == 64 and record["counts"] == {"labelled": 48}
    assert (record["orders"], record["combine"], record["pairs"]) == ("both", "log_odds", 48)
    assert record["position_bias"] == pytest.approx(0.5) and record["data"].endswith("pairs.jsonl")


def test_the_likelier_answer_is_the_chosen_one(label: Any, write_flipped: Path) -> None:
    """Data that put the worse answer first: the judge turns them, and says how seldom it agrees."""
    result = label(data=str(write_flipped))
    assert all(line["chosen"].startswith("yes") and line["chosen_number"] == 1 for line in lines_of(result))
    assert lines_of(result)[0]["log_odds_chosen_first"] == pytest.approx(2.0, abs=1e-6) and result.after["agreement"] == 0.0


@pytest.fixture
def write_flipped(pairs: Path) -> Path:
    rows = [json.loads(line) for line in pairs.read_text().splitlines()]
    file = pairs.with_name("flipped.jsonl")
    file.write_text("".join(json.dumps({**row, "chosen": row["rejected"], "rejected": row["chosen"]}) + "\n" for row in rows))
    return file


def test_one_order_is_drawn_by_the_seed_and_keeps_the_bias(label: Any) -> None:
    result = label(orders="one")
    shown = [line["log_odds_chosen_first"] is not None for line in lines_of(result)]
    assert 10 < sum(shown) < 38 and {"position_bias", "consistency"}.isdisjoint(result.after) and record_of(result)["combine"] is None
    assert all((line["log_odds_rejected_first"] is None) == seen for line, seen in zip(lines_of(result), shown, strict=True))
    assert lines_of(label(orders="one")) == lines_of(result) != lines_of(label(orders="one", seed=1))
    logits = sorted({round(float(torch.logit(torch.tensor(line["probability"], dtype=torch.float64))), 6) for line in lines_of(result)})
    assert logits == [1.0, 2.0], "1.5 less and more the bias"
    leaning = lines_of(label("first", orders="one"))
    assert 10 < sum(line["chosen_number"] == 0 for line in leaning) < 38, "a judge that knows nothing does not repeat the data"


def test_margins_ties_and_hard_labels(label: Any, judges: str, pairs: Path) -> None:
    """Every sixth pair is as long on both sides."""
    result = label("some")
    soft = [line["probability"] for line in lines_of(result)]
    ties = sum(p == 0.5 for p in soft)
    assert ties > 0 and len(soft) == 48 and {round(p, 6) for p in soft} == {0.5, 1 - 1e-6}
    hard = label("some", hard=True)
    assert record_of(hard)["counts"] == {"labelled": 48 - ties, "ties": ties} and {line["probability"] for line in lines_of(hard)} == {1.0}
    assert record_of(label("some", margin=0.2))["counts"] == {"labelled": 48 - ties, "within the margin": ties}
    twice = pairs.with_name("twice.jsonl")
    twice.write_text(pairs.read_text() + '{"prompt": "q", "chosen": "a", "rejected": "a"}\n')
    assert record_of(label("some", data=str(twice)))["counts"] == {"labelled": 48, "the same answer twice": 1}
    with pytest.raises(DataError, match="of 48 pairs none is left: {'within the margin': 48}"):
        label("first", margin=0.01)
    with pytest.raises(DataError, match="of 48 pairs none is left: {'not judged': 48}"):
        label({"function": {"file": f"{judges}:none"}})
    assert label({"function": {"file": f"{judges}:yes", "isolate": True}}).after["pairs"] == 48


def test_labels_from_a_language_model_are_what_it_says(run_sft: Any, label: Any, pairs: Path) -> None:
    """The pairs in the file against the judge asked by hand, with its fingerprint and the template in the record; the same again, from the run's own file."""
    judge = str(run_sft(steps=2, model={"width": 16, "layers": 1, "heads": 2, "context": 64, "vocabulary": 270}).checkpoint)
    asked = {"model": judge, "template": SHORT, "verdicts": ["1", "2"], "rendering": "text", "budget": 100}
    result = label(asked, prompts=7)
    lm, words = load(judge)
    choices, plain = Choices(Policy(lm), tuple(tuple(words.encode(x, add_special_tokens=False)) for x in "12")), renderer(words, "text")
    for line in lines_of(result)[:3]:
        sides = (line["chosen"].strip(), line["rejected"].strip())
        texts = [SHORT.format(prompt=line["prompt"].strip(), first=a, second=b) for a, b in (sides, sides[::-1])]
        said = choices([plain.prompt({"prompt": text}, 0).tokens for text in texts])
        assert (line["log_odds_chosen_first"], line["log_odds_rejected_first"]) == pytest.approx(
            (said[:, 0] - said[:, 1]).tolist(), abs=1e-5
        )
    record = record_of(result)
    assert record["judge"]["template"] == SHORT and record["judge"]["sha256"][:12] in lines_of(result)[0]["judged_by"]
    assert 0.9 < result.after["outside"] < 1, "a model that was never asked for a verdict says something else"
    assert main(["run", str(result.directory / "config.yaml"), "name=again", "--quiet"]) == 0
    assert (result.directory.path.parent / "again" / "pairs.jsonl").read_text() == (result.directory / "pairs.jsonl").read_text()


def test_answers_of_a_model_are_paired_labelled_and_learned_from(run_sft: Any, run_rm: Any, run_dpo: Any, label: Any, rows: Path) -> None:
    start = str(run_sft(steps=2).checkpoint)
    given = {"model": start, "samples": 3, "data": {"source": str(rows), "template": "text"}, "sampling": {"max_tokens": 6}, "prompts": 25}
    result = label("some", **given)
    lines, record = lines_of(result), record_of(result)
    assert len(lines) > 150 and {(line["chosen_number"], line["rejected_number"]) for line in lines} == {
        (i, j) for i in range(3) for j in range(3) if i != j
    }
    assert all(line["chosen"] != line["rejected"] and line["sampled_from"] == f"{start}@{record['sha256'][:12]}" for line in lines)
    assert (record["samples"], record["prompts"]) == (3, 60) and "agreement" not in record
    assert sum(record["counts"].values()) == 3 * 60 and record["counts"]["labelled"] == len(lines)
    assert lines_of(label("some", **given)) == lines
    dataset = read(lines, want="preference", source="pairs")
    assert dataset.kind == "preference" and dataset.rows[0]["probability"] == lines[0]["probability"]
    for run in (run_rm, run_dpo):
        learned = run(model=start, data={"source": str(result.directory / "pairs.jsonl"), "template": "text"}, steps=1, save=False)
        assert "column `probability`, the chance that the chosen answer is the better one" in learned.directory.log.read_text()


def test_turns_stay_turns(run_sft: Any, label: Any, tmp_path: Path) -> None:
    talk = [{"messages": [{"role": "user", "content": f"say {i}"}, {"role": "assistant", "content": str(i) * 3}]} for i in range(20)]
    file = tmp_path / "talk.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in talk))
    data = {"source": str(file), "template": "tilt"}
    start = run_sft(data=data, model={"width": 16, "layers": 1, "heads": 2, "context": 64, "vocabulary": 300}, steps=2).checkpoint
    lines = lines_of(label("some", model=str(start), data=data, sampling={"max_tokens": 8}))
    assert lines[0]["prompt"] == [{"role": "user", "content": lines[0]["prompt"][0]["content"]}]
    assert read(lines, want="preference", source="pairs").conversational


def test_the_dry_run_shows_what_the_judge_reads(run_sft: Any, pairs: Path, judges: str, rows: Path, capsys: Any) -> None:
    judge = str(run_sft(steps=1, model={"width": 16, "layers": 1, "heads": 2, "context": 300, "vocabulary": 270}).checkpoint)
    assert main(["label", f"judge={judge}", f"data={pairs}", "threads=1", "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "<|user|>Request: q0↵↵Answer 1: yes↵↵Answer 2: no!↵" in said and "1 batches of 64 pairs" in said and "in both orders" in said
    words = [
        "label",
        f"judge={judges}:yes",
        f"model={judge}",
        f"data={rows}",
        "data.template=text",
        "threads=1",
        "--dry-run",
        "--orders",
        "one",
    ]
    assert main(words) == 0
    said = capsys.readouterr().out
    assert re.search(r"yes\(\['\d\+\d='\], \['", said) and "2 answers of at most 64 tokens" in said and "in one order each" in said


def test_a_pipeline_whose_reward_model_learns_from_a_judge(pairs: Path, judges: str, shared: dict[str, Any], capsys: Any) -> None:
    """The plan, the run, and that the reward model reads the labels of the SFT model's answers."""
    config = {
        **shared, "model": {"width": 16, "layers": 1, "heads": 2, "context": 32, "vocabulary": 270}, "data": {"source": str(pairs), "template": "text"},
        "sft": {"steps": 1}, "reward_model": {"steps": 1}, "rl": {"algorithm": "ppo", "steps": 1, "prompts": 4, "sampling": {"max_tokens": 4}},
        "label": {"judge": f"{judges}:some", "sampling": {"max_tokens": 4}}, "name": "road",
    }  # fmt: skip
    lines = rlhf.plan(rlhf.Config.model_validate(config))
    assert any("── label" in line for line in lines) and any("labels     1 batches of 64 prompts, 2 answers" in line for line in lines)
    result = rlhf.run(rlhf.Config.model_validate(config))
    place = result.directory.path
    assert "labelled pairs" in (place / "report.md").read_text() and "of the first place" in (place / "report.md").read_text()
    assert f"{place / 'label' / 'pairs.jsonl'}" in (place / "reward_model" / "log.txt").read_text()
    assert "column `probability`" in (place / "reward_model" / "log.txt").read_text()
    with pytest.raises(ValueError, match="rank and label both make the pairs"):
        rlhf.Config.model_validate(config | {"rank": {"reward": {"length": 3}}})


def test_labels_of_opinions_by_hand() -> None:
    config = Config.model_validate({"judge": "m", "data": "d", "margin": 0.2})
    pairs = [Pair("p", "a", "b", (0, 2)), Pair("p", "c", "d", (1, 2)), Pair("p", "e", "f", (0, 1))]
    first, swapped = (torch.tensor(x, dtype=torch.float64) for x in ([-1.0, 1.0, 3.0], [3.0, 0.0, float("nan")]))
    counts: Counter[str] = Counter()
    found = list(labelling.labelled(config, pairs, Opinions(first, swapped, first, "both", "log_odds"), "j", None, counts))
    assert found == [Labelled("p", "b", "a", pytest.approx(0.8807970779778823), 3.0, -1.0, 2, 0, "j", None)]
    assert counts == {"labelled": 1, "within the margin": 1, "not judged": 1}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"judge": {"model": "m", "template": "{prompt} {first}"}}, r"`judge.template` has no \{second\}"),
        ({"judge": {"model": "m", "verdicts": ["A", "B"]}}, "names the verdicts 1 and 2, and judge.verdicts has others: give a template"),
        ({"judge": {"model": "m", "verdicts": ["1"]}}, "verdicts"),
        ({"judge": {"model": "m", "tempalte": "x"}}, "tempalte"),
        ({"judge": {}}, "exactly one of judge.model and judge.function"),
        ({"judge": {"model": "m", "function": "JUDGES:yes"}}, "exactly one of judge.model and judge.function"),
        ({"judge": {"function": "JUDGES:yes", "rendering": "text"}}, "judge.rendering is about a model, and the judge is a function"),
        ({"judge": "none.py:judge"}, "there is no reward file"),
        ({"judge": {"function": {"file": "JUDGES:yes", "on_error": "zero"}}}, "zero would label a pair where the function failed"),
        ({"judge": {"function": {"file": "JUDGES:yes", "weight": 2.0}}}, "`judge.function.weight` is about rewards"),
        ({"judge": {"function": {"file": "JUDGES:yes", "memry": 2}}}, "memry"),
        ({"orders": "one", "combine": "mean"}, "combine mean has two orders to combine"),
        ({"orders": "three"}, "orders"),
        ({"margin": 0.5}, "margin"),
        ({"samples": 4}, "samples is about answers that are sampled, and there is no model"),
        ({"sampling": {"temperature": 0.7}}, "sampling is about answers that are sampled"),
        ({"data": {"source": "d", "template": "tilt"}}, "data.template is about a model that reads the data, and there is none"),
        ({"model": "m", "samples": 1}, "samples"),
        ({"lora": {}}, "lora"),
    ],
)
def test_bad_input(given: dict[str, Any], message: str, judges: str) -> None:
    filled = json.loads(json.dumps({"judge": "m", "data": "d"} | given).replace("JUDGES", judges))
    with pytest.raises(ValueError, match=message):
        Config.model_validate(filled)


def test_mistakes_that_only_the_judge_can_show(label: Any, run_sft: Any, tmp_path: Path, shared: dict[str, Any]) -> None:
    """Before there is a directory."""
    for name, message in (("large", "returned 2.0 for pair 0"), ("slow", "raised KeyError"), ("absent", "has no function 'absent'")):
        with pytest.raises(Exception, match=message):
            label(name)
    judge = str(run_sft(steps=1).checkpoint)
    with pytest.raises(Exception, match="`judge.verdicts`: .* begin alike"):
        label({"model": judge, "template": SHORT, "verdicts": ["1", "1."]})
    same = tmp_path / "same.jsonl"
    same.write_text('{"prompt": "p", "chosen": "a", "rejected": "a"}\n' * 3)
    with pytest.raises(DataError, match="the two answers of every row are the same"):
        label(data={"source": str(same), "held_out": 0.0})
    assert [path.name for path in Path(shared["root"]).iterdir() if path.name.startswith("label")] == []
