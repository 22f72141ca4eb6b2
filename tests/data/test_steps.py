"""Answers in steps: where steps end among the tokens, and labelled rows as tokens."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tilt.data.formats import read, readings
from tilt.data.rendering import TooLong, renderer
from tilt.data.steps import check_separator, decoder, step_ends, stepwise
from tilt.data.tokenizers import characters, train_bpe
from tilt.errors import DataError, UsageError

LETTERS = characters("ab=12\n ")
PIECES = {0: "a=1", 1: "\n", 2: "b", 3: "2\n", 4: "\n\n", 5: " ", 6: ""}  # 6 is a stop token: no text


def spell(tokens: object) -> str:
    return "".join(PIECES[i] for i in tokens)  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("tokens", "ends"),
    [
        ([0, 1, 2, 3, 0, 6], [1, 3, 5]),  # the token that completes a separator, and the answer's last token
        ([0, 1, 2], [1, 2]),
        ([0, 1, 6], [2]),  # a separator at the end makes no step of its own
        ([0, 1, 5, 1, 2, 6], [1, 5]),  # a blank step is none
        ([0, 4, 2, 4, 6], [1, 4]),  # two separators in one token
        ([1, 0, 1, 2, 6], [2, 4]),  # a separator at the beginning
        ([1, 5, 6], [2]),  # blank throughout
        ([6], [0]),
    ],
)
def test_a_step_ends_with_its_separator(tokens: list[int], ends: list[int]) -> None:
    assert step_ends(tokens, "\n", spell) == ends


@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from(sorted(PIECES)), min_size=1, max_size=12))
def test_the_ends_are_those_of_reading_token_by_token(tokens: list[int]) -> None:
    """An independent reader: it walks over the text and closes a step at every separator after something that is not blank."""
    expected, pending = [], ""
    for place, token in enumerate(tokens):
        for letter in PIECES[token]:
            if letter == "\n":
                if pending.strip():
                    expected.append(place)
                pending = ""
            else:
                pending += letter
    if pending.strip() or not expected:
        expected.append(len(tokens) - 1)
    expected[-1] = len(tokens) - 1
    assert step_ends(tokens, "\n", spell) == expected


def test_a_labelled_row_as_tokens() -> None:
    row = read([{"prompt": "ab=", "steps": ["a=1", "b=2"], "labels": [True, 0]}], want="stepwise").rows[0]
    made = stepwise(renderer(LETTERS, "text"), "\n", row, 3)
    assert LETTERS.decode(made.rollout.tokens, skip_special_tokens=True) == "a=1\nb=2" and made.rollout.prompt.id == 3
    assert made.ends == (3, 7) and made.labels == (1.0, 0.0)
    assert made.rollout.tokens[7] == LETTERS.eos_token_id and [i for i, x in enumerate(made.marked.sampled) if x] == [3, 7]


def test_byte_pairs_find_the_same_steps() -> None:
    steps = ["add 4 and 7", "that is 11, naïve", "answer: 11"]
    words = train_bpe(["\n\n".join(steps)] * 5, 300)
    made = stepwise(renderer(words, "text"), "\n\n", {"prompt": "4+7", "steps": steps, "labels": [1.0, 1.0, 0.5]}, 0)
    texts = [decoder(words)(made.rollout.tokens[: end + 1]) for end in made.ends]
    assert texts == ["add 4 and 7\n\n", "add 4 and 7\n\nthat is 11, naïve\n\n", "\n\n".join(steps)]


def test_what_is_cut_keeps_the_labels_of_whole_steps() -> None:
    row = {"prompt": "ab=", "steps": ["a=1", "b=2", "a=2"], "labels": [1.0, 0.0, 1.0]}
    cut = renderer(LETTERS, "text", max_tokens=9, over_length="truncate")
    made = stepwise(cut, "\n", row, 0)
    assert made.ends == (3, 7) and made.labels == (1.0, 0.0) and len(made.rollout.tokens) == 9
    short = renderer(LETTERS, "text", max_tokens=3, over_length="truncate")
    with pytest.raises(TooLong, match="no step ends within 3 tokens"):
        stepwise(short, "\n", row, 0)


def test_both_spellings_are_recognised_and_counted() -> None:
    rows = [{"prompt": "p", "completions": ["a", "b"], "labels": [True, False]}, {"prompt": "q", "completions": ["a"], "labels": [0.75]}]
    found = read(rows, want="stepwise")
    assert found.kind == "stepwise" and found.rows[1]["steps"] == ["a"] and found.rows[1]["labels"] == [0.75]
    assert found.summary() == "2 rows, read as stepwise, plain text; labelled steps; 3 steps, 2 of them right"
    assert readings(rows)[0] == "stepwise" and read(rows, want="prompt").kind == "prompt"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"steps": "a", "labels": [True]}, "'steps' must be a list of texts, none of them empty"),
        ({"steps": ["a", " "], "labels": [True, True]}, "'steps' must be a list of texts, none of them empty"),
        ({"steps": [], "labels": []}, "'steps' must be a list of texts"),
        ({"steps": ["a", "b"], "labels": [True]}, "one label for each of the 2 steps, got 1 of them"),
        ({"steps": ["a"], "labels": "yes"}, "one label for each of the 1 steps, got str"),
        ({"steps": ["a"], "labels": [2]}, "true, false, or a number from 0 to 1, got 2"),
        ({"steps": ["a"], "labels": ["good"]}, "true, false, or a number from 0 to 1, got 'good'"),
        ({"steps": ["a"], "labels": [float("nan")]}, "from 0 to 1, got nan"),
    ],
)
def test_bad_rows_are_refused(row: dict[str, object], message: str) -> None:
    with pytest.raises(DataError, match="row 0: .*") as caught:
        read([{"prompt": "p", **row}], want="stepwise")
    assert message in str(caught.value)


def test_separators_that_cannot_tell_steps_are_refused() -> None:
    with pytest.raises(DataError, match="step 1 holds the separator"):
        stepwise(renderer(LETTERS, "text"), "\n", {"prompt": "a", "steps": ["a", "b\na"], "labels": [1.0, 1.0]}, 0)
    check_separator("\n", LETTERS)
    for separator in (";", "", "<|end|>"):
        with pytest.raises(UsageError, match="the tokenizer does not spell it as text"):
            check_separator(separator, LETTERS)
