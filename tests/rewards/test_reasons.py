"""Why rules score as they do: what they read, what was asked for, and a sentence that agrees with the score."""

from __future__ import annotations

import pytest

from tilt.rewards.reasons import reasons
from tilt.rewards.rules import Contains, Exact, Format, Length, NonRepetition, Numeric, Overlong, Regex


@pytest.mark.parametrize("rule, text, gold, length, extracted, wanted, said", [
    (Exact(), " 18 ", "18", 1, "18", "18", "equal"),
    (Exact(), "1é8", "1e8", 1, "1é8", "1e8", "differs from character 1 on"),
    (Exact(), "18", "180", 1, "18", "180", "differs from character 2 on"),
    (Exact(), "18", None, 1, "18", None, "the row has no answer to compare with"),
    (Numeric(), "so 3\n#### 1,080.0 eggs", "#### 1080", 1, "1080", "1080", "the same number"),
    (Numeric(), "nothing", 4, 1, None, "4", "no number in the answer"),
    (Numeric(marked=True), "5", 4, 1, None, "4", "no marked answer"),
    (Numeric(), "5", 4, 1, "5", "4", "another number"),
    (Regex(r"x=(\d)", answer="answer"), "x=1 x=2", "2", 1, "2", "2", "the last occurrence is the answer"),
    (Regex(r"x=(\d)", answer="answer"), "x=1", "2", 1, "1", "2", "the last occurrence is another answer"),
    (Regex(r"x"), "y", None, 1, None, None, "the pattern does not occur"),
    (Regex(r"x."), "xy", None, 1, "xy", None, "the pattern occurs"),
    (Format("<a>.*</a>"), "<a>1</a>", None, 1, None, None, "the answer has the form"),
    (Format("<a>.*</a>"), "<a>1", None, 1, None, None, "the answer ends before the form does"),
    (Format("<a>.*</a>"), "b", None, 1, None, None, "the answer has another form"),
    (Length(5, 2), "a", None, 7, "7 tokens", "2 to 5", "above the range"),
    (Length(5, 2, unit="words"), "a b", None, 7, "2 words", "2 to 5", "within the range"),
    (Overlong(20, 4), "a", None, 17, "17 tokens", "16 free, 20 at most", "in the buffer before the limit"),
    (Contains(("please", "now")), "Please!", None, 1, "please", "please, now", "missing: now"),
    (NonRepetition(2), "a b a b", None, 4, "a b", None, "these 2 words in a row come 2 times"),
    (NonRepetition(2), "a b c", None, 3, None, None, "no 2 words in a row come twice"),
])  # fmt: skip
def test_a_rule_says_what_it_read_and_why(rule, text, gold, length, extracted, wanted, said):
    (found,) = reasons(rule, [text], {"answer": [gold], "lengths": [length]})
    assert found == {"extracted": extracted, "gold": wanted, "reason": said}
    (score,) = rule([text], answer=[gold], lengths=[length])
    good = said.startswith(
        ("equal", "the same", "the last occurrence is the answer", "the pattern occurs", "the answer has the form", "within", "no 2")
    )
    assert score is None or (score == 1 or (score == 0 and isinstance(rule, Length))) == good


def test_what_is_no_rule_of_the_library_does_not_say():
    assert reasons(lambda completions: [1.0], ["a"], {}) is None


def test_a_runaway_answer_is_cut():
    (found,) = reasons(Exact(), ["x" * 10_000], {"answer": ["y"]})
    assert len(found["extracted"]) == 200
