"""Chained additions: the truth of steps, planted slips, held-out prompts."""

from __future__ import annotations

import json

import pytest
from transformers import AutoTokenizer

from tilt.data.tokenizers import characters
from tilt.tasks.chains import ALPHABET, SEPARATOR, Chains, accuracy, outcome, read, right, step_accuracy, truth, write


@pytest.mark.parametrize(
    ("steps", "labels"),
    [
        (["a8+2=0", "b0+1=1", "c1+1=2"], [True, True, True]),
        (["a8+2=1", "b1+1=2", "c2+1=4"], [False, True, False]),
        (["a8+1=9", "b9+1=0", "c0+1=1"], [False, True, True]),  # not the number asked for
        (["a8+2=0", "b1+1=2"], [True, False]),  # does not go on from what was stated
        (["a8+2=0", "b0+1=1", "c1+1=2", "d2+1=3"], [True, True, True, False]),
        (["a8+2", "b2+1=3", ""], [False, False, False]),
        (["8+2=0"], [False]),
    ],
)
def test_the_truth_of_steps(steps: list[str], labels: list[bool]) -> None:
    assert right("8a2b1c1=", steps) == labels


def test_the_last_step_of_an_answer_that_stops_early_is_wrong() -> None:
    assert right("8a2b1c1=", ["a8+2=0", "b0+1=1"], ended=True) == [True, False]
    assert right("8a2b1c1=", ["a8+2=0", "b0+1=1", "c1+1=2"], ended=True) == [True, True, True]
    so_far = ["a8+2=0", "a8+2=0\nb0+1=1", "a8+2=0\nb0+1=1\nc1+1=3"]
    assert truth(["8a2b1c1="] * 3, so_far, [False, False, True]) == [1.0, 1.0, 0.0]
    assert truth(["8a2b1c1="] * 3, so_far, [False, True, False]) == [1.0, 0.0, 0.0]
    assert outcome(["8a2b1c1="] * 3, ["c9+3=2", so_far[2], ""]) == [1.0, 0.0, 0.0]


def test_accuracy_counts_steps_that_are_missing_or_too_many() -> None:
    assert accuracy("8a2b1c1=", "a8+2=0") == pytest.approx(1 / 3)
    assert accuracy("8a2b1c1=", "a8+2=0\nb0+1=1\nc1+1=2\nd2+1=3") == 0.75
    assert step_accuracy(["8a2b1c1=", "8a2b1c1="], ["", "a8+2=0\nb0+1=1\nc1+1=2"]) == [0.0, 1.0]


def test_labels_are_the_truth_and_slips_are_as_many_as_said() -> None:
    task = Chains()
    rows = task.labelled(held_out=False)
    assert all(row["labels"] == right(row["prompt"], row["steps"], ended=True) for row in rows)
    labels = [label for row in rows for label in row["labels"]]
    assert abs(sum(labels) / len(labels) - 0.5) < 4 * 0.5 / len(labels) ** 0.5  # four standard errors
    shown = [label for row in task.demonstrations(held_out=False) for label in right(row["prompt"], row["completion"].split(SEPARATOR))]
    assert abs(sum(shown) / len(shown) - 0.7) < 4 * (0.21 / len(shown)) ** 0.5
    assert {len(row["steps"]) for row in rows} == {3, 4, 5} and {c for row in rows for c in row["prompt"]} <= set(ALPHABET)


def test_held_out_prompts_are_in_no_training_row() -> None:
    task = Chains(count=300)
    train, held = set(task.prompts(held_out=False)), set(task.prompts(held_out=True))
    assert not train & held and 0.08 < len(held) / len(train | held) < 0.25
    assert {row["prompt"] for row in task.labelled(held_out=True)} == held and {
        row["prompt"] for row in task.demonstrations(held_out=False)
    } == train
    assert read("8a2b1c1=") == (8, [2, 1, 1]) and task.labelled(held_out=True) == task.labelled(held_out=True)


def test_the_task_is_written_with_its_tokenizer(tmp_path) -> None:
    task = Chains(count=40)
    write(tmp_path, task)
    both = {*task.prompts(held_out=False), *task.prompts(held_out=True)}
    for name, each in {"demonstrations": 8, "labelled": 8, "prompts": 1}.items():
        rows = [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
        assert {row["prompt"] for row in rows} == both and len(rows) == each * len(both)
    assert len(characters(ALPHABET)) == len(AutoTokenizer.from_pretrained(tmp_path / "words"))
