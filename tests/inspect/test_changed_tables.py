"""What an update changed, against counts by hand; collapse is found where it begins; reports and the terminal hold the same, inert."""

from __future__ import annotations

import io
import json

import numpy as np
import pyarrow as pa
import pytest
from made_runs import HOSTILE, answers_of, make_run, step_file
from rich.console import Console

from tilt.errors import UsageError
from tilt.inspect.book import Book
from tilt.inspect.changed import Tokens, changed, kind_of, leaving
from tilt.inspect.collapse import WORDS, collapse_over, repeats_from, strays_from
from tilt.inspect.report import LARGEST, collected, embedded, picked, report, spread, thinned, write_report
from tilt.inspect.tables import Rows
from tilt.inspect.terminal import show, spark, visible

TWO = pa.table({
    "prompt": ["p", "p"], "completion": ["so 42", "so =x"], "ids": pa.array([[1, 2, 9], [1, 3, 4]], pa.list_(pa.uint32())), "text_offsets": [[0, 2, 5], [0, 2, 4]], "mask": [[1, 1, 1], [1, 1, 1]], "finish_reason": ["stop", "length"],
    "delta_ref": [[0.5, 1.0, 0.0], [0.25, -2.0, 0.125]], "push": [[0.1, 0.2, 0.0], [-0.1, -0.3, 0.05]], "kl": [[0.1, 0.3, 0.0], [0.1, 1.5, 0.0]], "entropy": [[1.0, 2.0, 0.1], [1.0, 0.5, 0.2]],
    "new_logprobs": [[-0.05, -0.005, -0.0005], [-0.05, -3.0, -0.2]], "result": [[0.01, 0.001, 0.0], [float("nan"), -0.2, 0.1]], "clip": pa.array([[0, 1, 0], [0, -1, 2]], pa.list_(pa.int8())),
})  # fmt: skip


def test_tables_by_hand():
    found = changed(TWO)
    gained = {line["token"]: line for line in found["tokens"]["gained"]}
    assert [line["token"] for line in found["tokens"]["gained"]] == [" 42", "so", "x"] and gained["so"] == {
        "token": "so",
        "class": "connective",
        "count": 2,
        "push": 0.0,
        "delta": 0.75,
        "result": 0.01,
    }
    assert [(line["token"], line["delta"], line["class"]) for line in found["tokens"]["lost"]] == [(" =", -2.0, "operator")] and gained[
        " 42"
    ]["class"] == "number"
    assert [(p["from"], p["count"], p["delta"], p["clipped"]) for p in found["positions"]] == [
        (0, 2, 0.375, 0),
        (1, 2, -0.5, 1.0),
        (2, 2, 0.0625, 0),
    ]
    assert found["entropy"]["top20_share_of_kl"] == pytest.approx(0.5 / 2.0, rel=1e-4) and found["count"] == 6 and not found["missing"]
    by_class = {c["class"]: c for c in found["classes"]}
    assert (
        by_class["operator"]["push"] == pytest.approx(0.3)
        and by_class["number"]["kl"] == pytest.approx(0.3)
        and sum(c["count"] for c in by_class.values()) == 6
    )
    bands = {b["from"]: b for b in found["confident"]["bands"]}
    assert found["confident"]["count"] == 4 and found["confident"]["pushed_further"] == 2
    assert (
        (bands[0.9]["count"], bands[0.9]["pushed_up"], bands[0.9]["pushed_down"]) == (2, 1, 1)
        and bands[0.99]["count"] == 1
        and bands[0.999]["count"] == 1
    )
    assert bands[0.99]["mean_before"] == pytest.approx(np.exp(-0.005), rel=1e-4) and bands[0.99]["mean_after"] == pytest.approx(
        np.exp(-0.004), rel=1e-4
    )
    assert len(found["scatter"]["push"]) == 5 and found["scatter"]["as_asked"] == 1.0
    assert [(f["name"], f["row"]) for f in found["collapse"]] == [("missing stop", 1)]


def test_counts_of_confident_tokens_equal_a_recomputation(tmp_path):
    file = step_file(tmp_path, 3, answers_of(3, 64))
    import pyarrow.parquet as pq

    table = pq.read_table(file)
    found = changed(table)["confident"]
    flat = {name: np.concatenate([np.array(v, np.float32) for v in table[name].to_pylist()]) for name in ("new_logprobs", "push")}
    p = np.exp(flat["new_logprobs"])
    for band in found["bands"]:
        here = (p >= band["from"]) & ((p < band["to"]) if band["to"] < 1 else p <= 1)
        assert (
            band["count"] == here.sum()
            and band["pushed_up"] == (here & (flat["push"] > 0)).sum()
            and band["pushed_down"] == (here & (flat["push"] < 0)).sum()
        )
    assert leaving(0.99, 16) == pytest.approx(0.1485, abs=1e-4) and leaving(0.999, 16) == pytest.approx(0.0159, abs=1e-4)


def test_one_class_that_alone_is_pushed_holds_all_of_it():
    push = [[0.0, 5.0, 0.0], [0.0, 0.0, 0.0]]
    found = changed(TWO.set_column(TWO.column_names.index("push"), "push", pa.array(push)))
    assert {c["class"]: c["push"] for c in found["classes"]} == {"connective": 0, "number": 5, "operator": 0, "other": 0}


def test_classes_are_pluggable_and_missing_channels_are_said():
    found = changed(TWO.drop(["delta_ref", "result"]), classes=lambda token: "digit" if any(c.isdigit() for c in token) else "rest")
    assert (
        {c["class"] for c in found["classes"]} == {"digit", "rest"}
        and found["missing"] == ["Δ reference is not stored", "result is not stored"]
        and found["tokens"]["by"] == "push"
    )
    bare = changed(pa.table({"prompt": ["p"], "completion": ["x"]}))
    assert bare["count"] == 0 and bare["tokens"]["gained"] == [] and bare["positions"] == []


@pytest.mark.parametrize(
    "token, kind",
    [
        (" 12", "number"),
        ("1,000.5%", "number"),
        ("=", "operator"),
        (" +", "operator"),
        ("Therefore", "connective"),
        ("所以", "connective"),
        (" so,", "connective"),
        ("gladly", "other"),
        ("", "other"),
    ],
)
def test_kinds_of_tokens(token, kind):
    assert kind_of(token) == kind


@pytest.mark.parametrize(
    "items, start",
    [
        ("ab" + "c" * 8, 3), ("abababab", 2), ("abcd", None), ("xyzxyzxyzxyz", 3), ("aaaaaaaab", None), ("", None), ("heyhahaha!ha!ha!ha!ha!", 10), ("so it is 10000000", None),
        (["the", " sum", *[" ha"] * 4], 3), (["so"] * 3, None),
    ],
)  # fmt: skip
def test_where_a_tail_begins_to_repeat(items, start):
    assert repeats_from(list(items)) == start


def test_parts_of_the_reward_and_how_they_go_with_length_and_kl():
    rewards = pa.array(
        [{"exact": float(i % 2), "format": 1.0, "long": i / 4} for i in range(8)],
        pa.struct([(n, pa.float64()) for n in ("exact", "format", "long")]),
    )
    total = [float(i % 2) + 0.5 * i / 4 for i in range(8)]
    table = pa.table({
        "prompt": ["p"] * 8, "completion": ["abcdef"[: 1 + i % 6] for i in range(8)], "text_offsets": [[0]] * 8, "rewards": rewards, "reward": total, "length": [10 + 3 * i for i in range(8)],
        "kl": [[0.1 * i] for i in range(8)],
    }).replace_schema_metadata({"reward_weights": json.dumps({"exact": 1, "format": 1, "long": 0.5})})  # fmt: skip
    found = changed(table)["parts"]
    lines = {line["name"]: line for line in found["lines"]}
    assert (
        list(lines) == ["exact", "format", "long", "whole reward", "tokens", "KL, nats"]
        and lines["long"]["weight"] == 0.5
        and lines["tokens"]["weight"] is None
    )
    assert lines["exact"]["mean"] == 0.5 and lines["exact"]["std"] == 0.5 and lines["long"]["known"] == 8
    names = list(lines)
    together = {(a, b): found["together"][i][j] for i, a in enumerate(names) for j, b in enumerate(names)}
    assert (
        together["long", "tokens"] == pytest.approx(1)
        and together["exact", "format"] is None
        and together["tokens", "KL, nats"] == pytest.approx(1, abs=1e-4)
    )
    assert together["exact", "whole reward"] == pytest.approx(np.corrcoef([i % 2 for i in range(8)], total)[0, 1], abs=1e-4)


def test_a_tail_pieced_together_from_what_was_said_is_found_too():
    """No block repeats itself to the end, and yet nothing new is said; long texts that go over the same words with new numbers are none."""
    generator = np.random.default_rng(0)
    head = ["i", "will", "wash", "the", "green", "boat"]
    tail = generator.choice([" gladly", " sure"], 40).tolist()
    start = repeats_from(["i", *(" " + w for w in head[1:]), *tail])
    assert start is not None and 6 <= start <= 16
    assert repeats_from([f" step {i // 4}" if i % 4 == 0 else f" {generator.integers(10**6)}" for i in range(80)]) is None
    assert repeats_from([*head, *tail[:6]]) is None


def test_the_known_runaway_solutions_are_found_and_no_good_one(tilt_data):
    """Of 5,276 solutions by models the known loops are found from characters; of 7,473 solutions by people next to none is flagged, read in words."""
    solutions = [json.loads(line) for line in tilt_data("gsm8k/example_model_solutions.jsonl").read_text().splitlines()]
    for number, name in ((5, "175b_finetuning"), (48, "175b_finetuning"), (150, "6b_finetuning")):
        assert repeats_from(list(solutions[number][name]["solution"])) is not None
    loops = [
        (i, name) for i, row in enumerate(solutions) for name, value in row.items()
        if isinstance(value, dict) and repeats_from(WORDS.findall(value["solution"])) is not None
    ]  # fmt: skip
    assert {(5, "175b_finetuning"), (756, "175b_finetuning")} <= set(loops) and len(loops) <= 15
    good = [json.loads(line)["answer"] for line in tilt_data("gsm8k/train.jsonl").read_text().splitlines()]
    assert sum(repeats_from(WORDS.findall(text)) is not None for text in good) <= 3


def test_a_tail_that_the_reference_finds_incredible_is_found():
    likely, odd = [-0.5, -1.0, -0.2, -2.0, -0.7, -0.1], [-9.0, -7.5, -11.0, -0.5, -8.0, -9.5, -12.0, -6.0, -9.0, -10.0]
    reference = np.array(likely + odd)
    assert strays_from(reference, np.where(reference < -5, 6.0, 0.1)) == 6
    assert strays_from(reference, np.zeros(16)) is None, "the policy finds it incredible as well"
    assert strays_from(np.array(likely * 3), np.full(18, 3.0)) is None
    assert strays_from(reference[:12], np.full(12, 6.0)) is None, "six tokens are too few"
    assert strays_from(np.array(odd), np.full(10, 6.0)) == 0 and strays_from(np.array([np.nan] * 20), np.full(20, 6.0)) is None
    infinite = np.array([*likely, *[-np.inf] * 10])
    assert strays_from(infinite, np.full(16, np.inf)) == 6


def test_the_step_and_place_where_a_run_collapses_are_named(tmp_path):
    """Answers that are whole until step 20, and from there on repeat a word after an intact head."""
    import pyarrow.parquet as pq

    tables = []
    for step in range(0, 50, 10):
        answers = answers_of(step, 16, 40)
        if step >= 20:
            answers = [
                a | {"completion": "the sum is forty-two" + " ha" * 30, "token": 3, "finish": "length"} if i % 2 else a
                for i, a in enumerate(answers)
            ]
        tables.append(Tokens(Rows(pq.read_table(step_file(tmp_path, step, answers)), step)))
    found = collapse_over(tables)
    assert (
        found["step"] == 20
        and found["share"] == 0.5
        and found["endless"] == {"step": 20, "share": 0.625}
        and "the sum is forty-two" in found["text"]
    )
    head = len(b"the sum is forty-two") // 3
    assert abs(found["position"] - head) <= 3
    assert collapse_over(tables[:2]) is None
    flags = [f for f in changed(tables[2].rows.table)["collapse"] if f["name"] == "repetition"]
    assert len(flags) == 8 and all(f["position"] is not None for f in flags)


# --- reports --------------------------------------------------------------------------------------------------------------------


def test_a_report_holds_what_the_page_asks_for_within_its_size(tmp_path):
    run = make_run(tmp_path / "run", steps=30, count=64, length=400)
    (run / "samples.md").write_text("a sample with api_key=sk-abcdefghijklmnopqrstuvwxyz123456")
    size = write_report(Book(run), run / "report.html")
    text = (run / "report.html").read_text()
    assert 300_000 < size <= LARGEST and "https://" not in text.split('id="embedded"')[0].replace("data:", "").split("uPlot")[0]
    data = json.loads(text.split('id="embedded">')[1].split("</script>")[0])
    assert len(data["steps"]["0"]) == 12 and data["steps"]["0"][0]["step"] == 0 and data["steps"]["0"][-1]["step"] == 290
    assert data["report"]["before_after"] == [
        {"name": "reward", "before": 0.1, "before_ci": pytest.approx(0.0392), "after": 0.9, "after_ci": pytest.approx(0.0196)}
    ]
    assert "abcdefghijklmnopqrstuvwxyz" not in data["report"]["samples"] and data["changed"]["0"]["0"]["count"] > 0
    for step, rows in data["rows"]["0"]["steps"].items():
        assert all(f"{step}/{row}" in data["rollouts"]["0"] for row in rows["row"]) and len(rows["reward"]) == len(rows["row"]) == len(
            rows["parts"]["exact"]
        )


def test_a_report_of_huge_answers_stays_within_its_size(tmp_path):
    run = make_run(tmp_path / "run", steps=1, hostile=True)
    text = report(Book(run))
    assert len(text.encode()) <= LARGEST and "</script><script>window.hurt" not in text and text.count("<script") == 3


def test_the_thinning_of_curves_keeps_what_is_rare():
    metrics = {
        "next": 0,
        "step": list(range(9000)),
        "time": [0] * 9000,
        "columns": {"loss": [1.0] * 9000, "eval/x": [1.0 if i % 997 == 0 else None for i in range(9000)]},
    }
    found = thinned(metrics)
    assert len(found["step"]) <= 2000 + 12 and sum(v is not None for v in found["columns"]["eval/x"]) == 10 and found["step"][-1] == 8999


def test_steps_and_rows_are_chosen_evenly_and_by_worth(tmp_path):
    assert spread(range(100), 3) == [0, 50, 99] and spread([4], 12) == [4]
    summary = Book(make_run(tmp_path / "r", steps=1, count=64)).summaries([0])["steps"]["0"]
    kept = picked(summary)
    assert (
        len(kept) == 24
        and {0, 1, 2, 3} <= set(kept)
        and summary["reward"].index(max(summary["reward"])) in kept
        and summary["reward"].index(min(summary["reward"])) in kept
    )
    assert embedded({"a": "</script><!--\u2028"}) == '{"a":"\\u003c/script\\u003e\\u003c!--\\u2028"}'
    assert collected(Book(tmp_path / "r"), 1)["steps"]["0"] == []


# --- the terminal ---------------------------------------------------------------------------------------------------------------


def printed(run, colour=False, **how):
    stream = io.StringIO()
    console = Console(
        file=stream,
        width=120,
        force_terminal=colour,
        color_system="256" if colour else None,
        no_color=not colour,
        highlight=False,
        markup=False,
    )
    show(Book(run), console, **how)
    return stream.getvalue()


def test_the_terminal_shows_the_run_and_its_answers_in_order(tmp_path):
    run = make_run(tmp_path / "run")
    text = printed(run, step=10, sort="kl", rows=3)
    summary = Book(run).summaries([10])["steps"]["10"]
    best = sorted(range(32), key=lambda i: -summary["kl"][i])[:3]
    assert (
        [int(line.split()[3]) for line in text.splitlines() if line.startswith("step 10 answer")] == best
        and "⚑ step 20 entropy" in text
        and "\x1b" not in text
    )
    assert "reward" in text and "▁" in text and "[+" in text and "[−" in text and "29 more answers" in text
    assert printed(run, step=10, sort="kl", rows=1, rising=True) != printed(run, step=10, sort="kl", rows=1)
    assert "answer 12" in printed(run, step=10, search="question 3", rows=9)
    coloured = printed(run, colour=True, step=10, rows=1, channel="push")
    assert "\x1b[" in coloured and "38;5" in coloured.replace("48;5", "38;5") and "push: " in coloured


def test_hostile_answers_are_inert_on_the_terminal(tmp_path):
    run = make_run(tmp_path / "run", steps=1, hostile=True)
    text = printed(run, rows=len(HOSTILE))
    for letter in ("\x1b", "\x00", "\u202e", "\u2066", "\u2028", "\r"):
        assert letter not in text
    assert "⟨1B⟩[2J" in text and "你好，世界 🙂" in text.replace("[+", "").replace("[−", "").replace("]", "") and len(text) < 200_000


@pytest.mark.parametrize(
    "how, reason", [({"sort": "best"}, "no sort 'best'"), ({"channel": "x"}, "no channel 'x'"), ({"step": 7}, "step 7 is not stored")]
)
def test_wrong_choices_are_sentences(tmp_path, how, reason):
    with pytest.raises(UsageError, match=reason):
        printed(make_run(tmp_path / "run", steps=1, count=4), **how)


def test_sparks_and_visible_text():
    assert spark([0, 1, 2, 3], 4) == "▁▃▆█" and spark([5, 5], 9) == "▁▁" and visible("a\nb\tc\x07\ud800") == "a↵b⇥c⟨7⟩⟨D800⟩"
