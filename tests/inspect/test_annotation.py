"""People compare answers: blind orders, a journal that survives, agreement by its formulas, and rows that other commands read."""

from __future__ import annotations

import json
import math
from collections import Counter

import pytest

from tilt.cli import annotate
from tilt.data import formats, sources
from tilt.errors import DataError, UsageError
from tilt.inspect.annotation import (
    Item,
    Labels,
    agreement,
    beats,
    cohen,
    fleiss,
    kendall,
    krippendorff,
    order_of,
    preferences,
    write_items,
    write_preferences,
)


@pytest.fixture
def folder(tmp_path):
    place = tmp_path / "labels"
    write_items(place, [Item(f"p{i}", (f"good {i}", f"bad {i}")) for i in range(6)] + [Item("same", ("x", "x"))], {"task": "pair"})
    return place


def test_orders_are_blind_steady_and_fair():
    orders = [order_of(i, 2, "ann", 0) for i in range(2000)]
    assert 0.45 < sum(o == [0, 1] for o in orders) / 2000 < 0.55 and orders == [order_of(i, 2, "ann", 0) for i in range(2000)]
    assert orders != [order_of(i, 2, "bob", 0) for i in range(2000)] and orders != [order_of(i, 2, "ann", 1) for i in range(2000)]
    thirds = Counter(tuple(order_of(i, 3, "ann", 0)) for i in range(3000))
    assert len(thirds) == 6 and max(thirds.values()) < 650


def test_equal_answers_are_left_out(folder):
    assert json.loads((folder / "about.json").read_text()) == {"task": "pair", "items": 6, "left_out_same": 1}
    with pytest.raises(DataError, match="no prompt has two different answers"):
        write_items(folder.parent / "x", [Item("a", ("b", "b"))], {})


def test_labels_are_kept_by_the_answers_own_numbers_and_taken_back(folder):
    labels = Labels.open(folder, "ann", "pair")
    for i in range(6):
        labels.say(i, "left" if labels.shown(i)[0] == 0 else "right", 1.5)
    assert set(labels.done.values()) == {0} and labels.next is None
    assert labels.undo() == 5 and labels.next == 5 and labels.undo() == 4 and labels.next == 4
    again = Labels.open(folder, "ann", "pair")
    assert again.done == labels.done and again.next == 4 and again.trail == labels.trail
    lines = [json.loads(line) for line in again.file.read_text().splitlines()]
    assert len(lines) == 8 and lines[0]["seconds"] == 1.5 and lines[0]["order"] == labels.shown(0)


def test_a_torn_line_is_left_out_and_written_behind(folder):
    labels = Labels.open(folder, "ann", "pair")
    labels.say(0, "tie")
    with labels.file.open("ab") as file:
        file.write(b'{"item": 1, "val')
    again = Labels.open(folder, "ann", "pair")
    assert again.done == {0: "tie"}
    again.say(1, "skip")
    assert Labels.open(folder, "ann", "pair").done == {0: "tie", 1: "skip"}


@pytest.mark.parametrize("task, value, reason", [
    ("pair", "up", "left, right, tie or skip"), ("pair", [1, 2], "left, right"), ("rank", [1], "one whole number"), ("rank", [1, 3], "from 1 to 2"), ("score", [0, 5], "from 1 to 5"), ("score", [1.0, 2], "whole number"), ("score", [True, 2], "whole"),
])  # fmt: skip
def test_what_is_no_label_is_refused(folder, task, value, reason):
    with pytest.raises(UsageError, match=reason):
        Labels.open(folder, "ann", task).say(0, value)
    with pytest.raises(UsageError, match="annotator's name"):
        Labels.open(folder, "../x", task)


def test_rankings_and_scores_are_turned_back(folder):
    labels = Labels.open(folder, "ann", "score")
    order = labels.shown(0)
    labels.say(0, [5, 2])
    assert labels.done[0] == ([5, 2] if order == [0, 1] else [2, 5])


# --- agreement: worked examples ---------------------------------------------------------------------------------------------------


def test_cohen_by_hand():
    """10 items, 7 the same; shares .6 .4 and .5 .5 → p_e = .5, κ = .4."""
    a, b = "yyyyyynnnn", "yyyynnnnny"
    assert cohen(a, b) == pytest.approx((0.7 - 0.5) / 0.5) and cohen("ab", "ab") == 1 and math.isnan(cohen("aa", "aa"))


def test_fleiss_by_hand():
    """Three annotators, items 3:0, 2:1, 0:3 → P = (1 + 1/3 + 1) / 3, p_e = (5/9)² + (4/9)²."""
    table = [{"a": 3}, {"a": 2, "b": 1}, {"b": 3}]
    expected = (5 / 9) ** 2 + (4 / 9) ** 2
    assert fleiss(table) == pytest.approx(((1 + 1 / 3 + 1) / 3 - expected) / (1 - expected))


def test_krippendorff_by_the_published_example():
    """The reliability data of Krippendorff (2011), computing Krippendorff's alpha-reliability, part C: nominal .743, ordinal .815."""
    rows = ["1 2 3 3 2 1 4 1 2 . . .", "1 2 3 3 2 2 4 1 2 5 . 3", ". 3 3 3 2 3 4 2 2 5 1 .", "1 2 3 3 2 4 4 1 2 5 1 ."]
    units = [[int(v) for v in column if v != "."] for column in zip(*(row.split() for row in rows), strict=True)]
    assert krippendorff(units) == pytest.approx(0.743, abs=5e-4) and krippendorff(units, ordinal=True) == pytest.approx(0.815, abs=5e-4)
    assert krippendorff([[1, 1], [2, 2]]) == 1 and math.isnan(krippendorff([[1, 1], [1, 1]]))


def test_kendall_by_hand():
    """One pair of six the other way round → (5 − 1) / 6; with a tie in each, τ-b divides by the root of the untied pairs."""
    assert kendall([1, 2, 3, 4], [1, 3, 2, 4]) == pytest.approx(4 / 6) and kendall([1, 2, 3], [3, 2, 1]) == -1
    assert kendall([1, 1, 2], [1, 2, 3]) == pytest.approx(2 / math.sqrt(2 * 3)) and math.isnan(kendall([2, 2], [1, 2]))


def test_agreement_over_rankings_by_hand(tmp_path):
    """Two annotators rank three answers to two prompts: (1 2 3; 2 1 3) and (1 2 3; 1 2 3)."""
    place = tmp_path / "ranked"
    write_items(place, [Item(f"p{i}", ("a", "b", "c")) for i in range(2)], {"task": "rank"})
    said = {"ann": [[1, 2, 3], [2, 1, 3]], "bob": [[1, 2, 3], [1, 2, 3]]}
    for name, values in said.items():
        labels = Labels.open(place, name, "rank")
        for i, value in enumerate(values):
            labels.say(i, [value[k] for k in labels.shown(i)])
    found = agreement(place, "rank")
    both = found["pairs"][0]
    assert both["shared"] == 6 and both["percent"] == pytest.approx(100 * 4 / 6) and both["tau"] == pytest.approx((1 + 1 / 3) / 2)
    # six units; chance: each place a third → κ = (4/6 − 1/3) / (2/3)
    assert both["kappa"] == pytest.approx(0.5)
    # ordinal α by hand: values 1, 2, 3 four times each; δ(1,2)² = δ(2,3)² = 16, δ(1,3)² = 64; two units of (1, 2) differ
    observed, expected = 2 * 2 * 16 / 12, 2 * (16 * 16 + 16 * 16 + 16 * 64) / (12 * 11)
    assert found["alpha"] == pytest.approx(1 - observed / expected)
    rows, left = preferences(place, "rank")
    assert len(rows) == 5 and left["pairs without a winner (ties, or as many votes each way)"] == 1


def test_agreement_of_a_folder_is_that_of_its_formulas(folder):
    said = {"ann": [0, 0, 0, 1, 1, "tie"], "bob": [0, 0, 1, 1, 1, 1], "cat": [0, 1, 1, 1, "skip", 1]}
    for name, values in said.items():
        labels = Labels.open(folder, name, "pair")
        for i, value in enumerate(values):
            labels.say(i, value if value in ("tie", "skip") else "left" if labels.shown(i)[0] == value else "right")
    found = agreement(folder, "pair")
    assert found["annotators"] == {"ann": 6, "bob": 6, "cat": 5}
    both = next(p for p in found["pairs"] if p["annotators"] == ["ann", "bob"])
    assert (
        both["shared"] == 6
        and both["percent"] == pytest.approx(400 / 6)
        and both["kappa"] == pytest.approx(cohen(said["ann"], said["bob"]))
    )
    assert found["fleiss"] == pytest.approx(fleiss([Counter(said[n][i] for n in said) for i in (0, 1, 2, 3, 5)]))
    assert found["alpha"] == pytest.approx(krippendorff([[said[n][i] for n in said if said[n][i] != "skip"] for i in range(6)]))
    rows, left = preferences(folder, "pair")
    assert [(r["prompt"], r["chosen"], r["votes"], r["votes_against"]) for r in rows] == [
        ("p0", "good 0", 3, 0),
        ("p1", "good 1", 2, 1),
        ("p2", "bad 2", 2, 1),
        ("p3", "bad 3", 3, 0),
        ("p4", "bad 4", 2, 0),
        ("p5", "bad 5", 2, 0),
    ] and not left


def test_votes_of_rankings_and_scores():
    assert (
        set(beats([2, 1, 2], 3, "rank")) == {(1, 0), (1, 2)}
        and set(beats([5, 1, 5], 3, "score")) == {(0, 1), (2, 1)}
        and beats("tie", 2, "pair") == []
    )


def test_what_is_written_is_read_as_preferences(folder):
    labels = Labels.open(folder, "ann", "pair")
    for i in range(4):
        labels.say(i, "left")
    place, count, left = write_preferences(folder, "pair")
    read = formats.read(sources.load(str(place)).rows, want="preference")
    assert (
        count == 4 == len(read.rows)
        and left == {"items without a label": 2}
        and {r["chosen"] for r in read.rows} == {r["chosen"] for r in sources.load(str(place)).rows}
    )


# --- the commands ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words, people",
    [
        (["model", "p.jsonl"], True),
        (["file.jsonl"], True),
        (["--agreement", "x"], True),
        (["judge.model=x"], False),
        (["recipe.yaml"], False),
        (["recipe.yaml", "a=b"], False),
        (["--quiet"], False),
    ],
)
def test_plain_words_are_for_people_and_settings_for_a_judge(words, people):
    assert annotate.for_people(words) == people


def test_labelling_on_the_terminal(tmp_path, capsys):
    file = tmp_path / "answers.jsonl"
    file.write_text("".join(json.dumps({"prompt": f"p{i}", "chosen": f"a{i}\x1b[2J", "rejected": f"b{i}"}) + "\n" for i in range(4)))
    folder, task = annotate.prepared(annotate.parser().parse_args([str(file), "--out", str(tmp_path / "out")]))
    labels = Labels.open(folder, "me", task)
    answers = iter(["1", "9", "u", "2", "0", "s", "1"])
    annotate.on_terminal(labels, "choose\nwell", lambda prompt: next(answers))
    assert len(labels.done) == 4 and list(labels.done.values())[1:3] == ["tie", "skip"]
    shown = capsys.readouterr().out
    assert "\x1b" not in shown and "⟨1B⟩[2J" in shown and "left, right, tie or skip" in shown and "choose\nwell" in shown
    again, _ = annotate.prepared(annotate.parser().parse_args([str(folder)]))
    assert again == folder and Labels.open(again, "me", task).next is None
    annotate.run(["--agreement", str(folder)])
    annotate.run(["--export", str(folder)])
    assert "4 labels" not in capsys.readouterr().out.split("\n")[0]


@pytest.mark.parametrize("words, reason", [(["a", "b", "c"], "name a model"), (["a", "b", "--answers", "1"], "at least 2"), (["a", "b", "--task", "best"], "invalid choice"), (["a", "b", "--answers", "3", "--task", "pair"], "two answers"),
    (["a", "b", "--bogus", "3"], "unrecognized"), (["--agreement", "nowhere"], "no items.jsonl"), (["nowhere.jsonl"], "nowhere.jsonl")])  # fmt: skip
def test_wrong_words_are_a_sentence(words, reason, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises((UsageError, DataError), match=reason):
        annotate.run(words)
