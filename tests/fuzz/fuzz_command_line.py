"""Words after `tilt`, for the commands that train nothing: an exit code of the documented ones, and never an unknown kind of mistake."""

from __future__ import annotations

import io
import os
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

from hostile import Target, bounded, put, texts
from hypothesis import strategies as st

from tilt.cli.main import main

COMMANDS = [["algorithms"], ["algorithms", "grpo"], ["trace", "grpo"], ["data", "show"], ["data", "show", "rows.jsonl"], ["runs", "--root"], ["sft", "--dry-run"], ["sft", "--help"],
            ["run"], ["ppo"], ["generate", "model", "--prompt"], ["chat"], ["replay"], ["audit"], ["classic"], ["--version"], []]  # fmt: skip
WORDS = [
    "--help",
    "--json",
    "--quiet",
    "--overwrite",
    "--resume",
    "name=../x",
    "data=rows.jsonl",
    "model=.",
    "model=../..",
    "root=/dev/null",
    "surrogate.high=0.3",
    "grpo",
    "step=1",
    "--step",
    "1",
]


def words(example: tuple[list[str], list[str]], folder: Path) -> None:
    command, more = example
    put(folder / "rows.jsonl", '{"prompt": "a", "completion": "b"}\n')
    before, said = Path.cwd(), io.StringIO()
    os.chdir(folder)
    try:
        with bounded(), redirect_stdout(io.StringIO()), redirect_stderr(said):
            code = main([*command, *more])
            assert code in (0, 1, 2, 3, 4) and "not a known kind of mistake" not in said.getvalue(), said.getvalue()
    finally:
        os.chdir(before)


TARGETS = (
    Target(
        "command line: words",
        st.tuples(st.sampled_from(COMMANDS), st.lists(st.one_of(st.sampled_from(WORDS), texts()), max_size=3)),
        words,
        30,
    ),
)
