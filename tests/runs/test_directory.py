"""Run directories, checkpoints and atomic writes: complete or absent, never overwritten."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from tilt.errors import UsageError
from tilt.runs import checkpoints
from tilt.runs.directory import auto_name, create, replacing
from tilt.runs.files import atomic_write


class Killed(BaseException):
    """What a process sees of `kill -9`: nothing after this line happens."""


def kill(*_: object, **__: object) -> None:
    raise Killed


# ------------------------------------------------------------------------------------------------ atomic writes


@pytest.mark.parametrize("content", [b"new", "new", lambda path: path.write_text("new")])
def test_a_write_replaces_the_whole_file(tmp_path: Path, content: object) -> None:
    path = tmp_path / "a"
    path.write_text("old, and longer")
    atomic_write(path, content)  # type: ignore[arg-type]
    assert path.read_bytes() == b"new" and os.listdir(tmp_path) == ["a"]


def test_killed_between_write_and_rename_the_old_file_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a"
    path.write_text("old")
    monkeypatch.setattr(os, "replace", kill)
    monkeypatch.setattr(Path, "unlink", kill)  # a killed process cleans nothing up
    with pytest.raises(Killed):
        atomic_write(path, "new")
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir() if not p.name.startswith(".")] == ["a"]


def test_a_writer_that_fails_leaves_no_trace(tmp_path: Path) -> None:
    def half(path: Path) -> None:
        path.write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        atomic_write(tmp_path / "a", half)
    assert os.listdir(tmp_path) == []


# ------------------------------------------------------------------------------------------------ directories


def test_what_a_new_run_holds(tmp_path: Path) -> None:
    run = create(tmp_path / "runs", "first", config_yaml="recipe: sft\n", command=["tilt", "sft"])
    assert run.config.read_text() == "recipe: sft\n" and run.log.read_text() == "tilt sft\n"
    found = json.loads(run.environment.read_text())
    assert (
        found["command"] == "tilt sft"
        and found["process"] == os.getpid()
        and set(found) >= {"tilt", "python", "packages", "git", "threads", "device"}
    )
    assert sorted(os.listdir(run)) == ["checkpoints", "config.yaml", "env.json", "log.txt", "rollouts"]
    assert os.listdir(tmp_path / "runs") == ["first"]


def test_the_commit_and_what_differs_from_it_are_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import subprocess

    from tilt.runs.directory import environment

    monkeypatch.chdir(tmp_path)
    assert environment()["git"] is None
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b.example"]
    for command in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "x"]):
        subprocess.run([*git, *command], check=True)
    clean = environment()["git"]
    assert len(clean["commit"]) == 40 and clean["diff_sha256"] is None
    (tmp_path / "a").write_text("1\n")
    subprocess.run(["git", "add", "a"], check=True)
    changed = environment()["git"]
    assert changed["commit"] == clean["commit"] and len(changed["diff_sha256"]) == 64


def test_an_existing_directory_is_refused_with_three_ways_out(tmp_path: Path) -> None:
    create(tmp_path, "a", config_yaml="x: 1\n", command="")
    with pytest.raises(UsageError) as caught:
        create(tmp_path, "a", config_yaml="x: 2\n", command="")
    text = str(caught.value)
    assert "Three ways out" in text and "name=…" in text and "or none" in text and "--overwrite" in text
    assert (tmp_path / "a" / "config.yaml").read_text() == "x: 1\n"


def test_an_existing_file_is_refused_too(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("precious")
    with pytest.raises(UsageError, match="exists already"):
        create(tmp_path, "a", config_yaml="", command="")


@pytest.mark.parametrize("name", ["", ".", "..", "../a", "a/b", ".hidden", "-a", "a b", "a\n", "ü/"])
def test_names_that_are_no_names(tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match="cannot name a run"):
        create(tmp_path, name, config_yaml="", command="")


def test_killed_while_making_a_directory_no_run_appears(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "rename", kill)
    with pytest.raises(Killed):
        create(tmp_path, "a", config_yaml="", command="")
    assert not (tmp_path / "a").exists()


def test_automatic_names_are_readable_and_new() -> None:
    names = {auto_name("reward_model", "Qwen/Qwen3-0.6B") for _ in range(50)}
    assert len(names) == 50 and all(
        n.startswith("reward-model-qwen3-0.6b-") and len(n) == len("reward-model-qwen3-0.6b-") + 6 for n in names
    )
    assert auto_name("rl", "runs/a/checkpoints/step_000010/").startswith("rl-step-000010-")
    assert auto_name("rl", "模型").startswith("rl-model-")


def test_replacing_deletes_the_old_run_once_the_new_one_stands(tmp_path: Path) -> None:
    create(tmp_path, "a", config_yaml="x: 1\n", command="")
    with replacing(tmp_path / "a"):
        create(tmp_path, "a", config_yaml="x: 2\n", command="")
    assert (tmp_path / "a" / "config.yaml").read_text() == "x: 2\n" and os.listdir(tmp_path) == ["a"]


def test_replacing_puts_the_old_run_back_when_the_new_one_never_came(tmp_path: Path) -> None:
    create(tmp_path, "a", config_yaml="x: 1\n", command="")
    with pytest.raises(UsageError), replacing(tmp_path / "a"):
        raise UsageError("bad data")
    assert (tmp_path / "a" / "config.yaml").read_text() == "x: 1\n" and os.listdir(tmp_path) == ["a"]


def test_replacing_touches_runs_only(tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("years of work")
    with pytest.raises(UsageError, match="not the directory of a run"), replacing(tmp_path / "thesis"):
        pass
    assert (tmp_path / "thesis" / "chapter.tex").exists()


# ------------------------------------------------------------------------------------------------ checkpoints


def write(text: str = "weights"):  # type: ignore[no-untyped-def]
    def writer(path: Path) -> None:
        (path / "part").mkdir()
        (path / "part" / "w").write_text(text)

    return writer


def test_all_checkpoints_are_kept_and_the_last_is_found(tmp_path: Path) -> None:
    for step in range(5):
        checkpoints.save(tmp_path, step, write())
    assert checkpoints.saved(tmp_path) == [0, 1, 2, 3, 4]


def test_a_writer_that_fails_leaves_no_checkpoint_and_no_older_one_goes(tmp_path: Path) -> None:
    checkpoints.save(tmp_path, 1, write())

    def failing(path: Path) -> None:
        (path / "half").write_text("")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        checkpoints.save(tmp_path, 2, failing)
    assert os.listdir(tmp_path) == ["step_000001"]


def test_killed_before_the_rename_there_is_no_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints.save(tmp_path, 1, write())
    monkeypatch.setattr(Path, "rename", kill)
    monkeypatch.setattr("shutil.rmtree", lambda *a, **k: None)
    with pytest.raises(Killed):
        checkpoints.save(tmp_path, 2, write())
    assert checkpoints.saved(tmp_path) == [1]


def test_a_checkpoint_is_never_overwritten(tmp_path: Path) -> None:
    checkpoints.save(tmp_path, 1, write("a"))
    with pytest.raises(UsageError, match="never overwritten"):
        checkpoints.save(tmp_path, 1, write("b"))
    assert (tmp_path / "step_000001" / "part" / "w").read_text() == "a"


def test_no_checkpoint_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no checkpoint in"):
        checkpoints.latest(tmp_path / "none")
