"""Rules against published labels, adversarial answers and hostile lengths."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tilt.errors import DataError, UsageError
from tilt.rewards.rules import RULES, Contains, Exact, Format, Length, NonRepetition, Numeric, Overlong, Regex, answer_text, last_number

MODELS = ("6b_finetuning", "6b_verification", "175b_finetuning", "175b_verification")


def solutions(path: Path) -> tuple[list[str], list[str], list[bool], list[str]]:
    """Completions, true answers, published labels and models of the GSM8K sample solutions."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    cells = [(row[model]["solution"], row["ground_truth"], row[model]["is_correct"], model) for row in rows for model in MODELS]
    texts, golds, labels, models = zip(*cells, strict=True)
    return list(texts), list(golds), list(labels), list(models)


@pytest.mark.parametrize("rule", [Numeric("truth"), Numeric("truth", markers=())], ids=["answer line", "last number"])
def test_numeric_reproduces_every_published_label(rule: Numeric, tilt_data: Callable[[str], Path]) -> None:
    texts, golds, labels, models = solutions(tilt_data("gsm8k/example_model_solutions.jsonl"))
    scores = rule(texts, truth=golds)
    assert len(scores) == 5276
    assert sum(score == label for score, label in zip(scores, labels, strict=True)) == 5276
    right = {m: 100 * sum(s for s, k in zip(scores, models, strict=True) if k == m and s) / 1319 for m in MODELS}
    assert [round(right[m], 2) for m in MODELS] == [21.68, 39.04, 34.72, 56.25]


def test_a_marker_that_no_completion_has_scores_zero_everywhere(tilt_data: Callable[[str], Path]) -> None:
    texts, golds, labels, _ = solutions(tilt_data("gsm8k/example_model_solutions.jsonl"))
    rule = Numeric(markers=("####",), marked=True)
    found = [rule.read(text) for text in texts]
    assert set(found) == {None}
    assert sum(not label for label in labels) == 3275


@pytest.mark.parametrize(
    ("completion", "gold", "score"),
    [
        ("#### 18 dollars", "18", 1),  # units after the number
        ("#### 18\nThat took me 3 steps.", "18", 1),  # a later distractor
        ("She has 3 left.\nA: 18", "3", 0),
        ("#### $1,080.00", "1080", 1),
        ("A: 1080.", "1080", 1),
        ("A: −12", "-12", 1),  # Unicode minus
        ("A: -12", 12, 0),
        ("A: 12", -12, 0),
        ("A: 7\nNo, wait.\nA: 8", 8, 1),  # two answer lines: the last one counts
        ("A: 7\nNo, wait.\nA: 8", 7, 0),
        ("It is 18.\n####", "18", 0),  # an empty answer is no answer
        ("A:", "0", 0),
        ("", "0", 0),
        ("A: 51", 51.0, 1),
        ("A: 51.0", 51, 1),
        ("A: 0.1", 0.1, 1),
        ("A: 0.30000000000000004", 0.3, 0),
        ("A: 1/4", 0.25, 1),
        ("A: 3/4", "1/4", 0),
        ("so 20-8", "-8", 0),  # a dash between numbers is no sign
        ("so 20-8", "8", 1),
        ("x = -8", "-8", 1),
        ("**A: 18**", "18", 1),
        (r"Thus \boxed{1{,}080} after 7 steps", 1080, 1),
        (r"Thus \boxed{\frac{1}{2}} of 9", 0.5, 1),
        ("A: 1e3", 1000, 1),
        ("A: 50%", 50, 1),
        ("the answer is 18", "She ate.\n#### 18", 1),  # gold as GSM8K writes it
        ("A: 9/0", "9", 0),
        ("A: " + "9" * 5000, "9", 0),  # runaway digits
        ("A: nan", "1", 0),
        ("A: __import__('os').getpid()", "1", 0),
    ],
)
def test_numeric_on_adversarial_answers(completion: str, gold: object, score: float) -> None:
    assert Numeric()([completion], answer=[gold]) == [score]


def test_numeric_names_the_sample_whose_gold_holds_no_number() -> None:
    with pytest.raises(DataError, match="sample 1.*twelve"):
        Numeric()(["1", "2"], answer=["1", "twelve"])
    assert Numeric()(["1"], answer=[None]) == [None]
    with pytest.raises(DataError):
        Numeric()(["1"], answer=[float("nan")])
    with pytest.raises(DataError):
        Numeric()(["1"], answer=[True])


def test_a_missing_column_is_named_with_those_there_are() -> None:
    with pytest.raises(UsageError, match="needs the column 'answer'; the data has: gold, kind"):
        Numeric()(["1"], gold=["1"], kind=["sum"])


@given(st.integers(-(10**12), 10**12), st.sampled_from(["{:,}", "{}", "{}.", "{}.0", "${:,}.00", "about {} or so"]))
def test_numbers_survive_their_spelling(number: int, spelling: str) -> None:
    assert last_number("12 then 7 = " + spelling.format(number).replace("$-", "-$")) == number


@given(st.text(max_size=300))
def test_last_number_never_fails(text: str) -> None:
    value = last_number(text)
    assert value is None or isinstance(value, Fraction)


@pytest.mark.parametrize(
    "text",
    ["9" * 10**6, "1 " * 500_000, "1," * 500_000, "-" * 10**6, "$-" * 500_000, "#### " * 200_000, "\\boxed{" * 140_000, "\n" * 10**6],
)
@pytest.mark.parametrize("rule", [Numeric(), Exact(), Length(10, unit="words"), NonRepetition(3), Contains(("a",))], ids=lambda r: r.name)
def test_a_million_characters_are_no_trouble(rule: Callable[..., list[float | None]], text: str) -> None:
    begin = time.process_time()
    (score,) = rule([text], answer=["12"])
    assert score is not None
    assert time.process_time() - begin < 20, "linear, or this would be hours"


def test_answer_text_prefers_the_last_marked_line() -> None:
    assert answer_text("A: 1\n#### 2 eggs\nbye", ("####", "A:")) == " 2 eggs"
    assert answer_text("so A: 1", ("A:",)) is None
    assert answer_text(r"\boxed{a{b}c} x", ("A:",)) == "a{b}c"
    assert answer_text(r"\boxed{never closed", ("A:",)) is None


def test_exact() -> None:
    assert Exact()([" yes\n", "Yes", "no"], answer=["yes", "yes", None]) == [1, 0, None]
    assert Exact(ignore_case=True)(["YES"], answer=["yes"]) == [1]
    assert Exact("gold")(["3"], gold=[3]) == [1]


def test_regex_and_format() -> None:
    assert Regex("colou?r")(["my color", "nothing"]) == [1, 0]
    assert Regex(r"<answer>(.*?)</answer>", answer="gold")(["<answer> 1 </answer><answer>2</answer>", "2", "x"], gold=["2", "2", None]) == [
        1,
        0,
        None,
    ]
    think = Format(r"<think>.*</think>\s*<answer>.*</answer>")
    assert think(["<think>a\nb</think>\n<answer>1</answer>", "<answer>1</answer>", "<think></think><answer></answer>!"]) == [1, 0, 0]


@pytest.mark.parametrize(
    "rule", [Regex(r"^(a|aa)+$", seconds=0.1), Format(r"(a|aa)+b?c", seconds=0.1), Regex(r"^(a|aa)+(!)$", answer="answer", seconds=0.1)]
)
def test_a_pattern_that_backtracks_is_an_error_not_a_hang(rule: Regex | Format) -> None:
    with pytest.raises(DataError, match="completion 1 .*\n.*nested quantifiers"):
        rule(["ok", "a" * 60 + "?"], answer=["", ""])


def test_patterns_are_checked_when_built() -> None:
    with pytest.raises(UsageError, match="not a regular expression"):
        Format("(")
    with pytest.raises(UsageError, match="no group"):
        Regex("a", answer="gold")


def test_length_is_a_target_or_a_soft_limit() -> None:
    target = Length(high=10, low=10, unit="characters")
    assert target(["x" * n for n in (10, 5, 15, 0, 99)]) == [0, -0.5, -0.5, -1, -1]
    overlong = Length(high=80, ramp=20)  # DAPO: limit 100, margin 20
    assert overlong([""] * 4, lengths=[80, 85, 100, 500]) == [0, -0.25, -1, -1]
    assert Length(2, unit="words")(["a b", "a b c"]) == [0, -0.5]
    with pytest.raises(UsageError, match="lengths"):
        overlong(["a"])
    for wrong in (dict(high=1, low=2), dict(high=-1), dict(high=1, ramp=-1), dict(high=1, unit="bytes")):
        with pytest.raises(UsageError, match="length"):
            Length(**wrong)


def test_overlong_is_the_table_of_dapo() -> None:
    rule = Overlong(20, 4)
    assert rule([""] * 8, lengths=[1, 15, 16, 17, 18, 19, 20, 21]) == [0, 0, 0, -0.25, -0.5, -0.75, -1, -1]
    assert Overlong(20480, 4096)([""] * 3, lengths=[16384, 18432, 20481]) == [0, -0.5, -1]
    for limit, buffer in ((20, 0), (20, -1), (20, 21), (0, 0)):
        with pytest.raises(UsageError, match="0 < buffer <= limit"):
            Overlong(limit, buffer)
    with pytest.raises(UsageError, match="needs the column 'lengths'"):
        rule(["a"])


def test_contains_and_non_repetition() -> None:
    assert Contains(("please", "thank you"))(["Please!", "thank you, please", ""]) == [0.5, 1, 0]
    assert Contains(answer="word")(["a cat", "a dog", "?"], word=["cat", "cat", None]) == [1, 0, None]
    with pytest.raises(UsageError):
        Contains()
    assert NonRepetition(2)(["a b a b a", "a b c", "a", ""]) == [0.5, 1, 1, 1]
    with pytest.raises(UsageError):
        NonRepetition(0)


def test_rules_are_plain_values() -> None:
    assert Numeric() == Numeric() and hash(Numeric()) == hash(Numeric())
    assert eval(repr(Length(5)), {"Length": Length}) == Length(5)
    assert set(RULES) == {"exact", "numeric", "regex", "format", "length", "overlong", "contains", "non_repetition"}
