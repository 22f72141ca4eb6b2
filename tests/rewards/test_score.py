"""From a configuration's `reward:` to Rewards: parsing, weights, None, the penalty for unended answers, clipping, columns, the check before training."""

from __future__ import annotations

import math
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch

from tilt.data.rollouts import Prompt, Rollout, Sampling
from tilt.errors import DataError, UsageError
from tilt.objectives import ALGORITHMS, Layout, Signals
from tilt.rewards import RULES, Scored, Scorer, Text, build, check, parse, read
from tilt.rewards.check import separation
from tilt.rewards.rules import Length, Numeric
from tilt.rewards.score import Part, Running
from tilt.rewards.spec import COMMON, Function, Model, RewardSpec
from tilt.rewards.text import inert


def rollout(number: int, tokens: int = 2, stop: Any = "stop", **columns: Any) -> Rollout:
    return Rollout(Prompt((1, 2), number, columns), (3,) * tokens, (True,) * tokens, (0.0,) * tokens, stop, Sampling())


def part(name: str, weight: float, values: list[float | None]) -> Part:
    return Part(name, weight, lambda rollouts, texts: Scored(values))


TEXTS = [Text("p", c) for c in "abcd"]


def test_the_total_is_the_weighted_sum_of_what_scored() -> None:
    rollouts = [rollout(0), rollout(1, 5), rollout(2, stop="length"), rollout(3)]
    scorer = Scorer([part("x", 2.0, [1.0, None, 0.5, None]), part("y", -0.5, [4.0, 2.0, None, None])], missing_eos_penalty=0.25)
    rewards = scorer(rollouts, TEXTS)
    assert rewards.total.tolist() == [0.0, -1.0, 0.75, 0.0]
    assert rewards.scored.tolist() == [True, True, True, False]
    assert rewards.parts["x"].tolist()[:1] + rewards.parts["x"].tolist()[2:3] == [1.0, 0.5]
    assert rewards.parts["x"].isnan().tolist() == [False, True, False, True]
    assert rewards.steps.shape == (11,) and not rewards.steps.any()


def test_the_sum_is_clipped_before_the_penalty() -> None:
    rewards = Scorer([part("x", 10.0, [1.0, -1.0, 0.2, 1.0])], 1.0, (-5.0, 5.0))(
        [rollout(0), rollout(1), rollout(2), rollout(3, stop="length")], TEXTS
    )
    assert rewards.total.tolist() == [5.0, -5.0, 2.0, 4.0]
    for wrong in (dict(clip=(1.0, 1.0)), dict(clip=(math.nan, 1.0)), dict(missing_eos_penalty=-1.0), dict(missing_eos_penalty=math.nan)):
        with pytest.raises(UsageError):
            Scorer([], **wrong)


def test_a_sum_that_overflows_is_refused() -> None:
    with pytest.raises(DataError, match="overflows"):
        Scorer([part("x", 1e30, [1e30])])([rollout(0)], TEXTS[:1])


def test_columns_lengths_and_stops_reach_functions_by_name(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "def score(completions, gold, lengths, stops, prompts):\n"
        "    assert prompts == ['p', 'p'] and stops == ['stop', 'length'], (prompts, stops)\n"
        "    return [None if g is None else g * n for g, n in zip(gold, lengths)]\n"
    )
    for reward in ("mine.py:score", {"function": {"file": "mine.py:score", "isolate": True}}):
        scorer = build(reward, base=tmp_path)
        rewards = scorer([rollout(0, 3, gold=2.0), rollout(1, 4, "length")], TEXTS[:2])
        scorer.close()
        assert rewards.total.tolist() == [6.0, 0.0] and rewards.scored.tolist() == [True, False]
        assert list(rewards.parts) == ["score"] and scorer.report.seconds["score"] > 0
    with pytest.raises(DataError, match="column named lengths"):
        build("mine.py:score", base=tmp_path)([rollout(0, lengths=3)], TEXTS[:1])


def test_failures_are_counted_and_told(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("def score(completions): return [1.0, 'x']\n")
    scorer = build({"function": "mine.py:score", "on_error": "skip", "name": "rude"}, base=tmp_path)
    rewards = scorer([rollout(0), rollout(1)], TEXTS[:2])
    assert rewards.scored.tolist() == [True, False]
    assert scorer.report.failures == {"rude": 1} and "sample 1" in scorer.report.messages["rude"]
    assert {k: float(v / w) for k, (v, w) in scorer.report.metrics().items()}["reward/rude_failed"] == 1.0


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("a/b.py:score", RewardSpec("score", Function("a/b.py:score"))),
        ("numeric", RewardSpec("numeric", Numeric())),
        ({"numeric": {"answer": "gold", "weight": 2}}, RewardSpec("numeric", Numeric("gold"), 2.0)),
        ({"numeric": "gold", "weight": 2}, RewardSpec("numeric", Numeric("gold"), 2.0)),
        ({"length": 64, "name": "short", "weight": 0.1}, RewardSpec("short", Length(64), 0.1)),
        ({"model": "runs/rm", "weight": 1.0}, RewardSpec("model", Model("runs/rm"))),
        ({"model": {"path": "runs/rm", "budget": 64}}, RewardSpec("model", Model("runs/rm", 64))),
        ({"function": "m.py:f", "timeout": 3, "on_error": "zero"}, RewardSpec("f", Function("m.py:f"), 1.0, 3.0, "zero")),
        ({"function": {"file": "m.py:f", "isolate": True, "memory": 2}}, RewardSpec("f", Function("m.py:f", True, 2.0))),
    ],
)
def test_every_spelling_of_one_reward(value: Any, expected: RewardSpec) -> None:
    assert parse(value) == (expected,)
    assert parse([value]) == (expected,)


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ([], "empty list"),
        (3, "expected `rewards.py:score`"),
        ({}, "names no reward"),
        ({"weight": 1}, "names no reward"),
        ({"numerc": {}}, "unknown key `reward.numerc`: did you mean `numeric`"),
        ({"numeric": {"answr": "x"}}, "unknown key `reward.numeric.answr`: did you mean `answer`"),
        ({"numeric": {}, "weigth": 1}, "unknown key `reward.weigth`: did you mean `weight`"),
        ({"numeric": {}, "exact": {}}, "names numeric and exact"),
        ({"numeric": {"weight": 1}, "weight": 1}, "says weight twice"),
        ({"numeric": {}, "weight": True}, "`reward.weight` is True: expected a finite number"),
        ({"numeric": {}, "weight": "1"}, "`reward.weight` is '1'"),
        ({"numeric": {}, "weight": math.inf}, "`reward.weight` is inf"),
        ({"numeric": {}, "timeout": 0}, "`reward.timeout` is 0: expected seconds above 0"),
        ({"numeric": {}, "on_error": "ignore"}, "expected raise, zero or skip"),
        ({"numeric": {}, "on_error": ["raise"]}, "expected raise, zero or skip"),
        ({"length": {}}, "needs `high`"),
        ({"length": True}, "`reward.length.high` is True"),
        ({"format": "("}, "not a regular expression"),
        (["numeric", "numeric"], "two parts named `numeric`"),
        ("numerc", "write file.py:func"),
    ],
)
def test_every_misspelling_is_told(value: Any, said: str) -> None:
    with pytest.raises(UsageError) as caught:
        build(value)
    assert said in str(caught.value)


def test_all_errors_of_a_list_at_once() -> None:
    with pytest.raises(UsageError) as caught:
        parse([{"numerc": {}}, "numeric", {"exact": {"x": 1}, "weight": 2}, {"length": {"high": "long"}}])
    assert [line.split("`")[1] for line in str(caught.value).splitlines()] == [
        "reward.0.numerc",
        "reward.2.exact.x",
        "reward.3.length.high",
    ]


def test_every_rule_has_a_name_and_no_setting_that_is_common() -> None:
    for name, rule in RULES.items():
        assert rule.name == name
        assert not COMMON.keys() & {f.name for f in fields(rule)}


def test_python_functions_and_rules_stand_for_themselves() -> None:
    def size(completions: list[str]) -> list[float]:
        return [float(len(c)) for c in completions]

    scorer = build([size, {"function": size, "weight": 2, "name": "twice"}, Numeric("gold")])
    rewards = scorer([rollout(0, gold="7")], [Text("p", "7")])
    assert list(rewards.parts) == ["size", "twice", "numeric"] and rewards.total.tolist() == [4.0]
    with pytest.raises(UsageError, match="two parts named `size`"):
        build([size, size])


def test_a_model_needs_a_loader() -> None:
    with pytest.raises(UsageError, match="cannot be loaded here"):
        build({"model": "runs/rm"})
    scorer = build(
        {"model": "runs/rm", "weight": 3}, load_model=lambda spec: lambda rollouts, texts: Scored([float(len(r.tokens)) for r in rollouts])
    )
    assert scorer([rollout(0, 2), rollout(1, 5)], TEXTS[:2]).total.tolist() == [6.0, 15.0]


def test_read_decodes_a_shared_prompt_once() -> None:
    calls: list[list[int]] = []

    def decode(tokens: Any) -> str:
        calls.append(list(tokens))
        return " ".join(map(str, tokens))

    assert read([rollout(0, 1), rollout(0, 2)], decode) == [("1 2", "3"), ("1 2", "3 3")]
    assert calls == [[1, 2], [3], [3, 3]]


def test_inert_text_is_short_and_obeys_nothing() -> None:
    hostile = "\x1b[2J\u202eevil\r\n\ud800\u2028" + "x" * 10**6 + "\0end"
    shown = inert(hostile, 60)
    assert len(shown) < 200 and shown.isprintable() and "…" in shown and "end" in shown
    assert inert('say "hi"') == '"say \\"hi\\""'
    shown.encode("utf-8")


ROWS = [
    {"prompt": "1+1", "completion": "2", "answer": "2", "label": True},
    {"prompt": "1+1", "completion": "3", "answer": "2", "label": False},
]


def encode(text: str) -> list[int]:
    return list(text.encode())


def test_check_tells_good_from_bad() -> None:
    told = check(build("numeric"), ROWS, encode)
    assert told.verdicts[0].separation == 1.0 and told.warnings == ()
    assert "100.0%" in str(told)


@pytest.mark.parametrize(
    ("reward", "said"),
    [
        ({"numeric": {"markers": ["####"], "marked": True}}, 'gave every answer 0: nothing can be learned'),
        ([{"numeric": {}, "weight": -1}, {"length": 50}], "total puts bad answers above good ones"),
        ({"exact": {"answer": "absent"}}, "scored none of 2 answers"),
    ],
)  # fmt: skip
def test_check_shouts(reward: Any, said: str) -> None:
    told = check(build(reward), [{**row, "absent": None} for row in ROWS], encode)
    assert said in str(told) and "WARNING" in str(told)


def test_check_needs_answers() -> None:
    with pytest.raises(DataError, match="no answers"):
        check(build("numeric"), [], encode)
    with pytest.raises(DataError, match="row 1 has no text under completion; it has: prompt"):
        check(build("numeric"), [ROWS[0], {"prompt": "x"}], encode)


def test_separation_is_the_probability_of_the_right_order() -> None:
    high, low = torch.randint(0, 6, (30,)).tolist(), torch.randint(0, 6, (20,)).tolist()
    pairs = [(a > b) + 0.5 * (a == b) for a in high for b in low]
    assert separation(high, low) == pytest.approx(sum(pairs) / len(pairs))
    assert separation([1, 2], [0, 1]) == 0.875


# --- normalised parts and the penalty as a part ------------------------------------------------------------------------------------


def test_running_figures_are_those_of_everything_seen() -> None:
    running, every = Running(), []
    generator = torch.Generator().manual_seed(0)
    for n in (5, 1, 0, 7):
        batch = 1e3 + torch.randn(n, generator=generator)
        running.see(torch.cat([batch, torch.tensor([math.nan])]))
        every.append(batch)
    seen = torch.cat(every).double()
    assert running.mean == pytest.approx(float(seen.mean()), abs=1e-9) and running.deviation == pytest.approx(
        float(seen.std(correction=0)), abs=1e-6
    )
    assert running(torch.tensor([running.mean, math.nan])).isnan().tolist() == [False, True]
    same = Running()
    same.see(torch.tensor([2.0, 2.0]))
    assert same(torch.tensor([2.0, 5.0, math.nan])).tolist()[:2] == [0.0, 0.0]


def test_a_normalised_part_is_normalised_in_training_alone() -> None:
    values = [[1.0, 3.0], [5.0, 7.0], [5.0, 7.0]]
    scorer = Scorer([Part("x", 2.0, lambda rollouts, texts: Scored(values.pop(0)), Running()), part("y", 1.0, [10.0, 20.0])])
    two = [rollout(0), rollout(1)]
    texts = [Text("p", "c")] * 2
    first = scorer(two, texts, training=True)
    assert (
        first.total.tolist() == [2 * -1 + 10, 2 * 1 + 20]
        and first.parts["x"].tolist() == [1, 3]
        and scorer.report.running == {"x": (2.0, 1.0)}
    )
    second = scorer(two, texts, training=True)
    deviation = math.sqrt(5)  # of 1 3 5 7, whose mean is 4
    assert second.total.tolist() == pytest.approx([2 * 1 / deviation + 10, 2 * 3 / deviation + 20])
    assert scorer.report.metrics()["reward/x_running_std"][0] == pytest.approx(deviation)
    plain = scorer(two, texts)
    assert plain.total.tolist() == [20, 34] and scorer.report.running == {}


def test_the_penalty_is_a_part_of_its_own() -> None:
    scorer = Scorer([part("x", 2.0, [1.0, None])], missing_eos_penalty=0.25)
    found = scorer([rollout(0, stop="length"), rollout(1)], [Text("p", "c")] * 2)
    assert found.parts["missing_stop"].tolist() == [-1, 0] and found.weights == {"x": 2.0, "missing_stop": 0.25}
    assert found.total.tolist() == [1.75, 0] and found.scored.tolist() == [True, False]
    assert "missing_stop" not in Scorer([part("x", 2.0, [1.0])])([rollout(0)], [Text("p", "c")]).parts
    with pytest.raises(UsageError, match="a part named missing_stop"):
        Scorer([part("missing_stop", 1.0, [1.0])])


def test_normalise_is_a_setting_of_every_kind_of_reward() -> None:
    specs = parse([{"length": {"high": 3, "normalise": True}}, {"model": "runs/rm", "normalise": True}, {"exact": {}}])
    assert [spec.normalise for spec in specs] == [True, True, False]
    assert build([{"length": {"high": 3, "normalise": True}}]).parts[0].running == Running()
    with pytest.raises(UsageError, match="expected true or false"):
        parse({"length": 3, "normalise": 1})


def test_the_penalty_comes_before_statistics_of_the_group() -> None:
    """Scores 1 1 0, the first cut, penalty 2: R = -1 1 0, so the group's mean is 0 and its deviation 1."""
    scorer = Scorer([part("x", 1.0, [1.0, 1.0, 0.0])], missing_eos_penalty=2.0)
    rewards = scorer([rollout(0, stop="length"), rollout(0), rollout(0)], TEXTS[:3])
    layout = Layout.of([2, 2, 2], [0, 0, 0])
    found = ALGORITHMS["grpo"].prepare(rewards, Signals.of(torch.zeros(6), reference=torch.zeros(6)), layout)
    assert found.advantages[layout.starts].tolist() == [-1.0, 1.0, 0.0]
