"""What is secret is hidden wherever a run writes or speaks; what only sounds so is not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from tilt.cli.main import main
from tilt.errors import UsageError
from tilt.runs.directory import create
from tilt.runs.journal import Journal
from tilt.runs.secrets import masked

HF, SK = "hf_" + "AbCdEfGh" * 4, "sk-proj-" + "0a1B2c3D" * 4


@pytest.mark.parametrize("text, shown", [
    ("tilt rl token=abc123 steps=3", "tilt rl token=<hidden> steps=3"),
    ("--token abc123 --steps 3", "--token <hidden> --steps 3"),
    ("--judge.api_key abc", "--judge.api_key <hidden>"),
    ("--token --quiet", "--token --quiet"),
    ("password: 'hunter2 '", "password: '<hidden> '"),
    ('{"api_key": "abc", "n": 1}', '{"api_key": "<hidden>", "n": 1}'),
    ("OPENAI_API_KEY=abc", "OPENAI_API_KEY=<hidden>"),
    ("https://me:word@host/x?a=1", "https://<hidden>@host/x?a=1"),
    ("https://host/x?token=abc&a=1", "https://host/x?token=<hidden>&a=1"),
    ("Authorization: Bearer abcdefgh12345", "Authorization: Bearer <hidden>"),
    (f"model {HF}: no such", "model <hidden>: no such"),
    (f"'{SK}'", "'<hidden>'"),
    ("ghp_" + "a1" * 18, "<hidden>"),
    ("AKIA" + "A1B2" * 4, "<hidden>"),
    ("the value is s3cr3t-v4lue!", "the value is <hidden>!"),
])  # fmt: skip
def test_secrets_are_hidden(text: str, shown: str) -> None:
    assert masked(text, {"MY_TOKEN": "s3cr3t-v4lue", "PATH": "/usr/bin", "A_TOKEN": "is"}) == shown


@pytest.mark.parametrize("text", [
    "sampling.max_tokens=64 micro_tokens=4096 data.max_prompt_tokens=12", "tokenizer: some/folder", "eos_token: <|end|>", "pad_token=abc",
    "the token 12 of answer 3", "128 tokens, 4 trained", "tok/s 1200", "Qwen/Qwen3-0.6B", "secret: null", "mail me@host",
    "https://host:8000/v1", "task-skating-is-fun-and-more-so", "key=value", "password: <hidden>",
])  # fmt: skip
def test_words_that_only_sound_so_stay(text: str) -> None:
    assert masked(text, {"HF_TOKEN": "", "PATH": "/usr/bin"}) == text


def test_nothing_secret_reaches_the_files_of_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef")
    config = f"recipe: rl\nreward: {{url: 'https://me:word99@host', token: {SK}}}\nnote: 0123456789abcdef\n"
    run = create(tmp_path, "a", config_yaml=config, command=["tilt", "rl", f"reward.token={SK}", "--hub.token", HF])
    with Journal(run, total=1, important=["x"], quiet=True) as journal:
        journal.note(f"reading https://me:word99@host with {HF}")
    for file in ("config.yaml", "env.json", "log.txt"):
        text = (run / file).read_text()
        assert not [secret for secret in ("word99", SK, HF, "0123456789abcdef") if secret in text], text
        assert "<hidden>" in text
    assert yaml.safe_load((run / "config.yaml").read_text())["reward"]["token"] == "<hidden>"
    assert json.loads((run / "env.json").read_text())["command"].startswith("tilt rl reward.token=<hidden>")


def test_errors_hide_secrets_with_their_traces_too(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def fails(*_: object) -> None:
        raise UsageError(f"cannot reach https://me:word99@host with token={SK}")

    monkeypatch.setattr("tilt.cli.main._dispatch", fails)
    assert main(["runs"]) == 2 and main(["runs", "--traceback"]) == 2
    shown = capsys.readouterr().err
    assert "word99" not in shown and SK not in shown and shown.count("token=<hidden>") >= 3
