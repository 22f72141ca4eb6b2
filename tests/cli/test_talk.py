"""generate and chat on a tiny model from a folder."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tilt.cli import talk
from tilt.cli.main import main
from tilt.data.tokenizers import train_bpe
from tilt.models import loading, saving


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose last checkpoint is a tiny model with random weights."""
    tokenizer = train_bpe(["the cat sat on the mat, 你好 🙂"] * 4, 300)
    run = tmp_path_factory.mktemp("run")
    place = run / "checkpoints" / "step_000007"
    place.mkdir(parents=True)
    saving.save(loading.tiny(vocabulary=len(tokenizer), width=32, layers=1, heads=2, context=64), tokenizer, place)
    return run


def typed(*lines: str) -> Callable[[str], str]:
    rest: Iterator[str] = iter(lines)

    def ask(_: str) -> str:
        line = next(rest, None)
        if line is None:
            raise EOFError
        return line

    return ask


def test_generate_answers_each_prompt(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["generate", str(folder), "--prompt", "the cat", "--prompt", "mat", "-n", "2", "--max-tokens", "5", "--json"]
    assert main(words) == 0
    first = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["prompt"] for row in first] == ["the cat", "the cat", "mat", "mat"] and all(1 <= row["tokens"] <= 5 for row in first)
    assert first[0]["completion"] != first[1]["completion"]
    assert main(words) == 0 and [json.loads(line) for line in capsys.readouterr().out.splitlines()] == first
    assert main([*words, "--seed", "1"]) == 0 and [json.loads(line) for line in capsys.readouterr().out.splitlines()] != first


def test_greedy_answers_agree(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", str(folder), "--prompt", "the", "-n", "2", "--temperature", "0", "--max-tokens", "4", "--json"]) == 0
    a, b = (json.loads(line)["completion"] for line in capsys.readouterr().out.splitlines())
    assert a == b


@pytest.mark.parametrize("words, code", [(["nowhere/at/all"], 2), (["--temperature", "-1"], 2), (["--max-tokens", "0"], 2)])
def test_bad_requests(folder: Path, capsys: pytest.CaptureFixture[str], words: list[str], code: int) -> None:
    model = words if not words[0].startswith("-") else [str(folder), *words]
    assert main(["generate", *model, "--prompt", "x"]) == code and capsys.readouterr().err.startswith("error: ")


def test_a_prompt_longer_than_the_context(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", str(folder), "--prompt", "z" * 200]) == 2 and "context of 64" in capsys.readouterr().err


def test_chat_prints_exactly_the_answer_as_it_grows(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    talk.chat(str(folder), 1.0, 12, 0, typed("the cat", "/temp 0", "/temp x", "/what", "", "/reset", "mat", "/quit", "never"))
    shown = capsys.readouterr().out
    assert "temperature 0" in shown and "/temp takes a number" in shown and "no command /what" in shown
    assert shown.splitlines()[0].startswith(str(folder)) and "never" not in shown


def test_the_stream_is_the_text(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = talk.speaker(str(folder), 1.0, 20)
    prompt = found.render.prompt({"prompt": "你好"}, 0)
    text = talk._answer(found, prompt, 0, 0)
    shown = capsys.readouterr().out
    from tilt.runs.text import inert

    assert shown.removesuffix("\n").removesuffix("  [cut: max_tokens]") == inert(text, newline="\n")
