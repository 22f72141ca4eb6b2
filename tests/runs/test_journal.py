"""The journal: numbers that come back, torn lines that do no harm, text that a terminal cannot obey."""

from __future__ import annotations

import io
import json
import math
import os
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.console import Console

from tilt.runs.directory import create
from tilt.runs.journal import Journal, Sample, read_metrics, sparkline
from tilt.runs.listing import listed
from tilt.runs.text import duration, inert, middle, number


def screen(terminal: bool = False, width: int = 80) -> Console:
    return Console(file=io.StringIO(), force_terminal=terminal, width=width, highlight=False, soft_wrap=True)


def journal(path: Path, console: Console, **settings: object) -> Journal:
    return Journal(path, **{"total": 10, "important": ["reward", "kl"], "console": console, **settings})  # type: ignore[arg-type]


def shown(console: Console) -> str:
    return console.file.getvalue()  # type: ignore[attr-defined,no-any-return]


# ------------------------------------------------------------------------------------------------ metrics


def test_every_number_comes_back(tmp_path: Path) -> None:
    values = {
        "a": 0.1 + 0.2,
        "b": float("nan"),
        "c": float("inf"),
        "d": -float("inf"),
        "e": torch.tensor(2.5),
        "f": 3,
        "g": 1e-300,
        "h": True,
    }
    before = time.time()
    with journal(tmp_path, screen()) as book:
        book.step(1, values, stage="rl")
    (row,) = read_metrics(tmp_path / "metrics.jsonl")
    assert row["step"] == 1 and row["stage"] == "rl"
    assert before - 0.001 <= row["time"] <= time.time() + 0.001  # stamped to the millisecond
    assert row["a"] == 0.1 + 0.2 and math.isnan(row["b"]) and row["c"] == math.inf and row["d"] == -math.inf
    assert (row["e"], row["f"], row["g"], row["h"]) == (2.5, 3, 1e-300, 1)


def test_each_line_is_json_that_others_read(tmp_path: Path) -> None:
    with journal(tmp_path, screen()) as book:
        book.step(1, {"x": float("nan")})

    def refuse(name: str) -> None:
        raise ValueError(name)

    line = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(line, parse_constant=refuse)["x"] == "nan" and line.count("\n") == 1


def test_a_step_is_on_disk_before_the_next_begins(tmp_path: Path) -> None:
    book = journal(tmp_path, screen())
    for step in range(3):
        book.step(step, {"x": step})
        assert [row["x"] for row in read_metrics(tmp_path / "metrics.jsonl")] == list(range(step + 1))
    book.close()


@pytest.mark.parametrize("torn", ['{"step": 2, "x"', '{"step": 2, "x": 1}', "{", ""])
def test_a_torn_last_line_is_left_out_and_then_cut_off(tmp_path: Path, torn: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "x": 5}\n' + torn)
    assert [row["step"] for row in read_metrics(path)] == [1]
    with journal(tmp_path, screen()) as book:
        book.step(2, {"x": 6})
    assert [row["x"] for row in read_metrics(path)] == [5, 6]


def test_no_metrics_yet(tmp_path: Path) -> None:
    assert read_metrics(tmp_path / "none.jsonl") == []
    (tmp_path / "torn.jsonl").write_text('{"ste')
    assert read_metrics(tmp_path / "torn.jsonl") == []


# ------------------------------------------------------------------------------------------------ the terminal


def test_one_line_every_log_every_and_the_last(tmp_path: Path) -> None:
    console = screen()
    with journal(tmp_path, console, log_every=4) as book:
        for step in range(1, 11):
            book.step(step, {"reward": step / 10, "kl": 0.01234567, "other": 1})
    lines = shown(console).splitlines()
    assert [line.split()[1] for line in lines] == ["4/10", "8/10", "10/10"]
    assert "reward 0.4" in lines[0] and "kl 0.01235" in lines[0] and "other" not in lines[0]


def test_the_panel_on_a_terminal(tmp_path: Path) -> None:
    console = screen(terminal=True)
    with journal(tmp_path, console) as book:
        for step in range(1, 4):
            book.step(step, {"reward": step, "kl": 0.5})
        book.note("a warning")
    assert "step 3/10" in shown(console) and "reward" in shown(console) and "▁▅█" in shown(console) and "a warning" in shown(console)


def test_quiet_says_nothing_and_writes_everything(tmp_path: Path) -> None:
    console = screen()
    with journal(tmp_path, console, quiet=True) as book:
        book.header(["run        here"])
        book.step(1, {"reward": 1})
        book.samples(1, [Sample("p", "c", {"exact": 1.0}, 0.5)])
    assert shown(console) == ""
    log = (tmp_path / "log.txt").read_text()
    assert (
        "run        here" in log
        and "step 1/10" in log
        and (tmp_path / "samples.md").read_text().count("**prompt**") == 1
        and len(read_metrics(tmp_path / "metrics.jsonl")) == 1
    )


def test_a_stage_may_have_a_length_of_its_own(tmp_path: Path) -> None:
    console = screen()
    with journal(tmp_path, console) as book:
        book.step(1, {"reward": 1}, "sft", total=3)
        book.step(1, {"reward": 1}, "rl", total=7)
    assert [line.split("  ")[0] for line in shown(console).splitlines()] == ["sft step 1/3", "rl step 1/7"]


def test_without_the_important_ones_the_first_eight_are_shown(tmp_path: Path) -> None:
    console = screen(width=200)
    with journal(tmp_path, console) as book:
        book.step(1, {f"m{i}": i for i in range(12)})
    assert "m7 7" in shown(console) and "m8" not in shown(console)


HOSTILE = "</script>\x1b[31m\x1b]0;owned\x07[bold]x[/bold]\u202e\x00\x9b2J"


def test_hostile_text_is_inert_everywhere(tmp_path: Path) -> None:
    console = screen(width=200)
    with journal(tmp_path, console) as book:
        book.note(HOSTILE)
        book.samples(1, [Sample(HOSTILE, "```\n" + HOSTILE, {"[red]r": 1.0}, 0.0)])
    for text in (shown(console), (tmp_path / "log.txt").read_text(), (tmp_path / "samples.md").read_text()):
        assert not set(text) & {"\x1b", "\x07", "\x00", "\x9b", "\u202e"} and "[bold]x[/bold]" in text and "\\x1b[31m" in text
    assert "[red]r" in shown(console)
    assert "````text\n```\n" in (tmp_path / "samples.md").read_text()


def test_the_sample_table_fits_and_the_file_is_complete(tmp_path: Path) -> None:
    console = screen(width=80)
    text = "你好" * 500
    with journal(tmp_path, console) as book:
        book.samples(7, [Sample("p" * 1000, text, {"exact": 1.0, "length": -0.5}, 1.25), Sample("a", "b", {"exact": 0.0})])
    assert max(cell_len(line) for line in shown(console).splitlines()) <= 80
    assert "…" in shown(console) and "1.25" in shown(console) and "·" in shown(console)
    assert text in (tmp_path / "samples.md").read_text() and "## Step 7" in (tmp_path / "samples.md").read_text()


# ------------------------------------------------------------------------------------------------ text


@given(st.text(max_size=60), st.integers(3, 30))
def test_middle_never_exceeds_its_width_and_keeps_both_ends(text: str, width: int) -> None:
    text = inert(text)
    cut = middle(text, width)
    assert cell_len(cut) <= width
    if cell_len(text) <= width:
        assert cut == text
    else:
        head, _, tail = cut.partition("…")
        assert (text.startswith(head) and text.endswith(tail)) or "…" in text


@pytest.mark.parametrize("text, width, expected", [
    ("abcdefghijklmnop", 12, "abcdef…lmnop"), ("abc", 3, "abc"), ("abcd", 3, "a…d"), ("你好世界", 7, "你…界"), ("你好世界", 8, "你好世界"), ("abcd", 1, "…"),
])  # fmt: skip
def test_middle(text: str, width: int, expected: str) -> None:
    assert middle(text, width) == expected


@pytest.mark.parametrize(
    "value, expected",
    [(0.012345678, "0.01235"), (1234, "1234"), (1e-6, "1e-06"), (float("nan"), "nan"), (2.0, "2"), (-0.5, "-0.5"), (1e9, "1e+09")],
)
def test_number(value: float, expected: str) -> None:
    assert number(value) == expected


@pytest.mark.parametrize(
    "seconds, expected", [(0, "0 s"), (59.9, "59 s"), (200, "3 min 20 s"), (7500, "2 h 05 min"), (260000, "3 d"), (-1, "0 s")]
)
def test_duration(seconds: float, expected: str) -> None:
    assert duration(seconds) == expected


def test_sparkline() -> None:
    assert sparkline([0, 1, 2]) == "▁▅█" and sparkline([1, 1]) == "▁▁" and sparkline([0, float("nan"), 1]) == "▁×█" and sparkline([]) == ""


# ------------------------------------------------------------------------------------------------ the list of runs


def test_runs_are_listed_with_their_state(tmp_path: Path) -> None:
    def run(name: str, config: str) -> Path:
        return create(tmp_path, name, config_yaml=config, command="tilt").path

    for name, error in (("done", None), ("failed", ValueError), ("going", None)):
        path = run(name, "recipe: rl\nalgorithm: grpo\nmodel: some/where/tiny\n")
        book = journal(path, screen())
        book.step(3, {"reward": 0.5})
        if name == "done":
            book.close()
        if error:
            book.__exit__(error)
    dead = run("dead", "recipe: sft\nmodel: {kind: qwen3, layers: 4, width: 128}\n")
    environment = json.loads((dead / "env.json").read_text())
    (dead / "env.json").write_text(json.dumps({**environment, "process": 2**22 + 1}))
    (tmp_path / "not-a-run").mkdir()
    (tmp_path / "file").write_text("")
    os.utime(dead / "log.txt", (0, 0))
    os.utime(dead / "env.json", (0, 0))
    found = {one.name: one for one in listed(tmp_path)}
    assert {name: one.status for name, one in found.items()} == {
        "done": "finished",
        "failed": "stopped",
        "going": "running",
        "dead": "dead",
    }
    assert (found["done"].recipe, found["done"].model, found["done"].step, found["done"].reward) == ("grpo", "tiny", 3, 0.5)
    assert (found["dead"].recipe, found["dead"].model, found["dead"].step, found["dead"].reward) == ("sft", "qwen3-4-128", None, None)
    assert listed(tmp_path)[-1].name == "dead" and listed(tmp_path / "none") == []
