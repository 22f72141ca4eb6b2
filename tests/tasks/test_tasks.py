"""The bundled tasks: held-out prompts never leak, and the truth is the program that the text says it is."""

from __future__ import annotations

from itertools import islice

import pytest

from tilt.tasks.arithmetic import ALPHABET, Addition, correct
from tilt.tasks.manners import Manners, merit, preference_rate


def test_sums_are_right_and_split_by_the_problem() -> None:
    task = Addition()
    train, held = task.rows(held_out=False), task.rows(held_out=True)
    assert len(train) + len(held) == 10_000
    assert {r["prompt"] for r in train}.isdisjoint(r["prompt"] for r in held)
    assert 800 < len(held) < 1_200
    for row in train[::97] + held[::97]:
        a, b = row["prompt"].rstrip("=").split("+")
        assert int(row["completion"]) == int(a) + int(b) == int(row["answer"])
        assert set(row["prompt"] + row["completion"]) <= set(ALPHABET)


def test_correct_is_exact() -> None:
    assert correct(["", "", ""], ["052", "52", "0520"], answer=["052"] * 3) == [1.0, 0.0, 0.0]


def test_manners_are_split_by_the_prompt() -> None:
    task = Manners()
    assert set(task.prompts(held_out=True)).isdisjoint(task.prompts(held_out=False))
    assert len(task.prompts(held_out=True)) + len(task.prompts(held_out=False)) == 480
    assert {r["prompt"] for r in task.demonstrations(held_out=False)} == set(task.prompts(held_out=False))


@pytest.mark.parametrize(
    ("answer", "worth"),
    [
        ("gladly i will wash the red cup my pleasure", 2 + 2 + 9),
        ("ugh i will wash the red cup now go away", -1 - 1 + 9),
        ("gladly i will wash the blue cup my pleasure", 4 + 3),
        ("gladly gladly gladly gladly gladly i will wash the red cup my pleasure", 4 + 9 - 2),
        ("", -7),
    ],
)
def test_merit_adds_kindness_and_details(answer: str, worth: float) -> None:
    assert merit("please wash the red cup", answer) == worth


def test_pairs_hold_the_better_answer_first() -> None:
    for row in Manners().pairs(held_out=True):
        assert merit(row["prompt"], row["chosen"]) > merit(row["prompt"], row["rejected"])


@pytest.mark.parametrize("first", [0.0, 0.5, 0.8])
def test_verdicts_name_the_better_answer_wherever_it_stands(first: float) -> None:
    rows = Manners().verdicts("{prompt}|{first}|{second}", held_out=True, each=10, first=first, says=("A", "B"))
    for row in rows:
        prompt, one, other = row["prompt"].split("|")
        assert (merit(prompt, one) > merit(prompt, other)) == (row["completion"] == "A") and merit(prompt, one) != merit(prompt, other)
    share = sum(row["completion"] == "A" for row in rows) / len(rows)
    assert abs(share - first) <= 4 * (first * (1 - first) / len(rows)) ** 0.5 and len(rows) == 10 * len(Manners().prompts(held_out=True))


def test_answers_depend_on_prompt_and_seed_alone() -> None:
    task, prompt = Manners(), "please wash the red cup"
    assert list(islice(task.answers(prompt, 3), 5)) == list(islice(task.answers(prompt, 3), 5))
    assert list(islice(task.answers(prompt, 3), 5)) != list(islice(task.answers(prompt, 4), 5))


def test_the_preference_rate_counts_ties_half() -> None:
    prompt, kind, rude = "please wash the red cup", "gladly i will wash the red cup my pleasure", "ugh i will wash the red cup now go away"
    assert preference_rate([prompt] * 3, [kind, rude, kind], [rude, kind, kind]) == 0.5
