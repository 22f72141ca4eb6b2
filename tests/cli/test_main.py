"""The command line: exit codes, errors of one screen, what a recipe receives, and what loads nothing heavy."""

from __future__ import annotations

import json
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import pytest
from pydantic import Field

from tilt import __version__
from tilt.cli import recipes
from tilt.cli.main import main
from tilt.config import Section
from tilt.errors import DataError, NumericError
from tilt.runs.directory import create


class Inner(Section):
    lr: Annotated[float, Field(gt=0, description="how fast")] = 1e-3


class ToyConfig(Section):
    name: str | None = None
    root: Path = Path("runs")
    quiet: bool = False
    algorithm: str = "grpo"
    objective: dict[str, Any] = {}
    steps: Annotated[int, Field(ge=1, description="how many")] = 1
    optimizer: Inner = Inner(lr=1e-4)


ToyConfig.__module__ = "tilt.recipes.rl"


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[list[Any]]:
    """`tilt rl` runs a recipe that only notes what it was given; errors and results can be put into it."""
    seen: list[Any] = []
    module = types.ModuleType("tilt.recipes.rl")
    module.Config, module.plan, module.run = ToyConfig, lambda config: [f"{config.steps} steps"], seen.append  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "tilt.recipes.rl", module)
    monkeypatch.setattr("tilt.recipes.rl", module, raising=False)
    monkeypatch.chdir(tmp_path)
    yield seen


def raising(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def run(_: object) -> None:
        raise error

    monkeypatch.setattr(sys.modules["tilt.recipes.rl"], "run", run)


# ------------------------------------------------------------------------------------------------ light and quick


@pytest.mark.parametrize("words, loaded", [(["--help"], False), (["--version"], False), (["grop"], True)])
def test_torch_stays_out_of_the_front_door(words: list[str], loaded: bool) -> None:
    """In a process of its own; an unknown command looks into the table of algorithms, which is torch, and shows that this test can fail."""
    code = f"import sys; from tilt.cli.main import main; main({words!r}); print('torch' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.splitlines()[-1] == str(loaded)


def test_help_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0 and capsys.readouterr().out == f"tilt {__version__}\n"
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    for name in (
        "quickstart",
        "run",
        "pretrain",
        "sft",
        "rm",
        "dpo",
        "rl",
        "rlhf",
        "algorithms",
        "data",
        "runs",
        "env",
        "chat",
        "generate",
    ):
        assert f"\n  {name} " in shown
    assert main([]) == 0 and "Commands:" in capsys.readouterr().out


@pytest.mark.parametrize("words, expected", [
    (["grop"], "tilt has no command `grop`: did you mean `grpo`?"),
    (["algoritms"], "did you mean `algorithms`?"),
    (["reinforcepp"], "did you mean `reinforce-pp`?"),
    (["--foo"], "No such option: --foo"),
    (["generate"], "Missing argument"),
    (["data", "shwo"], "No such command 'shwo'"),
    (["run"], "nothing says which recipe to run: add a line `recipe: rl`"),
])  # fmt: skip
def test_wrong_commands(capsys: pytest.CaptureFixture[str], words: list[str], expected: str) -> None:
    assert main(words) == 2
    found = capsys.readouterr()
    assert found.out == "" and expected in found.err and found.err.startswith("error: ") and "Traceback" not in found.err


# ------------------------------------------------------------------------------------------------ what a recipe receives


def test_files_then_overrides(ran: list[Any], tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("recipe: rl\nsteps: 2\noptimizer: {lr: 1e-6}\n")
    (tmp_path / "b.toml").write_text("steps = 3\n")
    assert main(["rl", "a.yaml", "b.toml", "--name", "x", "objective.surrogate.high=0.28"]) == 0
    assert ran == [ToyConfig(steps=3, optimizer=Inner(lr=1e-6), name="x", objective={"surrogate": {"high": 0.28}})]


def test_run_takes_the_recipe_from_the_file(ran: list[Any], tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("recipe: rl\nsteps: 2\n")
    assert main(["run", "a.yaml", "steps=4"]) == 0 and ran == [ToyConfig(steps=4)]


@pytest.mark.parametrize(
    "command, name",
    [
        ("ppo", "ppo"),
        ("grpo", "grpo"),
        ("rloo", "rloo"),
        ("gspo", "gspo"),
        ("reinforce-pp", "reinforce_pp"),
        ("reinforce_pp", "reinforce_pp"),
    ],
)
def test_an_algorithm_is_a_command(ran: list[Any], command: str, name: str) -> None:
    assert main([command, "--steps", "5", "--quiet"]) == 0 and ran == [ToyConfig(algorithm=name, steps=5, quiet=True)]


@pytest.mark.parametrize(
    "algorithm, command", [("grpo", "rl"), ("kto", "dpo"), ("sigmoid_norm", "dpo"), ("rm_deepspeed_chat", "rm"), ("dop", "")]
)
def test_every_row_has_a_command_that_trains_it(algorithm: str, command: str) -> None:
    assert recipes.trainer(algorithm) == command


def test_a_recipe_may_be_named_for_its_algorithm(ran: list[Any], tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("recipe: ppo\n")
    assert main(["run", "a.yaml"]) == 0 and ran == [ToyConfig(algorithm="ppo")]


def test_dry_run_plans_and_does_not_run(ran: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["rl", "--dry-run", "steps=7"]) == 0 and ran == [] and capsys.readouterr().out == "7 steps\n"
    assert main(["ppo", "steps=8", "--dry-run"]) == 0 and ran == [] and capsys.readouterr().out == "8 steps\n"


def test_quiet_reaches_the_recipe(ran: list[Any]) -> None:
    assert main(["rl", "--quiet"]) == 0 and ran == [ToyConfig(quiet=True)]


def test_words_that_begin_like_switches_are_settings(ran: list[Any]) -> None:
    assert main(["rl", "--optimizer.lr", "2", "--steps=3"]) == 0 and ran == [ToyConfig(optimizer=Inner(lr=2.0), steps=3)]


@pytest.mark.parametrize("words, expected", [
    (["rl", "steps=0", "stepz=3", "--optimizer.lr", "true"], ["3 problems in the configuration of `rl`", "`steps` is 0", "did you mean `steps`?", "`optimizer.lr` is true"]),
    (["rl", "a.yml"], ["no such file: a.yml", "did you mean a.yaml?"]),
    (["rl", "sft.yaml"], ["`recipe` is 'sft' (sft.yaml:1), but the command is `tilt rl`"]),
    (["run", "typo.yaml"], ["unknown recipe `rlfh` (typo.yaml:1): did you mean `rlhf`?"]),
    (["run", "bare.yaml"], ["bare.yaml does not say which recipe to run"]),
    (["ppo", "algorithm=grpo"], ["the command says algorithm=ppo, but `algorithm` is 'grpo' (given as algorithm=grpo): drop one"]),
    (["rl", "steps"], ["`steps` has no value"]),
    (["rl", "--steps"], ["`--steps` has no value"]),
    (["rl", "broken.yaml"], ["broken.yaml:2:1: not valid YAML"]),
])  # fmt: skip
def test_bad_input_is_a_usage_error(
    ran: list[Any], tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], expected: list[str]
) -> None:
    for name, text in (
        ("a.yaml", ""),
        ("sft.yaml", "recipe: sft\n"),
        ("typo.yaml", "recipe: rlfh\n"),
        ("bare.yaml", "steps: 1\n"),
        ("broken.yaml", "a: [\n"),
    ):
        (tmp_path / name).write_text(text)
    assert main(words) == 2 and ran == []
    shown = capsys.readouterr().err
    assert all(part in shown for part in expected) and "Traceback" not in shown


# ------------------------------------------------------------------------------------------------ exit codes


@pytest.mark.parametrize("error, code, expected", [
    (DataError("row 3 has no prompt"), 3, "error: row 3 has no prompt\n"),
    (NumericError("loss is nan"), 4, "error: loss is nan\n"),
    (KeyboardInterrupt(), 130, "interrupted"),
    (RuntimeError("boom"), 1, "error: RuntimeError: boom\n  at "),
])  # fmt: skip
def test_exit_codes(
    ran: list[Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: BaseException, code: int, expected: str
) -> None:
    raising(monkeypatch, error)
    assert main(["rl"]) == code
    shown = capsys.readouterr().err
    assert expected in shown and "Traceback" not in shown


@pytest.mark.parametrize("words", [["rl", "--traceback"], ["--traceback", "rl"]])
def test_traceback_shows_all(ran: list[Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: list[str]) -> None:
    raising(monkeypatch, DataError("row 3"))
    assert main(words) == 3
    assert "Traceback (most recent call last)" in capsys.readouterr().err


def test_an_error_fits_one_screen(ran: list[Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    raising(monkeypatch, DataError("\n".join(f"line {i}" for i in range(100))))
    assert main(["rl"]) == 3
    shown = capsys.readouterr().err.splitlines()
    assert len(shown) == 39 and shown[-1] == "… and 62 more lines"


@pytest.mark.parametrize("body, code", [
    ("from tilt.errors import UsageError as E; E_ = E('x')", 2),
    ("from tilt.errors import DataError as E; E_ = E('x')", 3),
    ("from tilt.errors import NumericError as E; E_ = E('x')", 4),
    ("E_ = KeyboardInterrupt()", 130),
    ("E_ = RuntimeError()", 1),
])  # fmt: skip
def test_exit_codes_of_the_process(body: str, code: int) -> None:
    program = f"{body}\nimport sys\nimport tilt.cli.main as m\ndef fail(words): raise E_\nm._dispatch = fail\nsys.exit(m.main(['x']))"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, check=False).returncode == code


def test_overwrite_replaces_a_run_and_keeps_it_when_the_new_one_fails(
    ran: list[Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def run(config: ToyConfig) -> None:
        assert config.name is not None
        create(config.root, config.name, config_yaml=f"steps: {config.steps}\n", command="")

    monkeypatch.setattr(sys.modules["tilt.recipes.rl"], "run", run)
    config = tmp_path / "runs" / "a" / "config.yaml"
    assert main(["rl", "name=a", "steps=1"]) == 0
    assert main(["rl", "name=a", "steps=2"]) == 2 and config.read_text() == "steps: 1\n"
    assert main(["rl", "name=a", "steps=3", "--overwrite"]) == 0 and config.read_text() == "steps: 3\n"
    raising(monkeypatch, DataError("x"))
    assert main(["rl", "name=a", "steps=4", "--overwrite"]) == 3 and config.read_text() == "steps: 3\n"


# ------------------------------------------------------------------------------------------------ what is shown


def test_settings_are_listed(ran: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["rl", "--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.split() == ["optimizer.lr", "0.0001", "how", "fast;", ">", "0"] for line in lines) and any(
        line.split() == ["steps", "1", "how", "many;", "≥", "1"] for line in lines
    )


def test_the_table_of_algorithms(capsys: pytest.CaptureFixture[str]) -> None:
    from tilt.objectives import ALGORITHMS, PREFERENCES

    assert main(["algorithms"]) == 0
    shown = [line.split(" ")[0] for line in capsys.readouterr().out.splitlines()]
    assert all(name.replace("_", "-") in shown for name in [*ALGORITHMS, *PREFERENCES])


def test_a_card_with_a_changed_slot(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["algorithms", "reinforce-pp", "surrogate.high=0.28"]) == 0
    shown = capsys.readouterr().out
    assert "1.28" in shown and "Clip(low=0.2, high=0.28)" in shown
    assert main(["algorithms", "dpo"]) == 0
    assert main(["algorithms", "dop"]) == 2


def test_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    create(tmp_path, "a", config_yaml="recipe: rl\nalgorithm: ppo\nmodel: m\n", command="")
    assert main(["runs", "--root", str(tmp_path), "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)
    assert (found["name"], found["recipe"], found["status"], found["step"]) == ("a", "ppo", "running", None)
    assert main(["runs", "--root", str(tmp_path)]) == 0
    assert capsys.readouterr().out.splitlines()[1].split()[:4] == ["a", "running", "ppo", "m"]
    assert main(["runs", "--root", str(tmp_path / "none")]) == 0 and "no runs" in capsys.readouterr().out


def test_two_cards_are_compared(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["algorithms", "grpo", "gspo"]) == 0
    shown = capsys.readouterr().out
    assert "rho = exp(mean_t" in shown and "clip(rho, 0.9997, 1.0004)" in shown and "credit" not in shown, "what is equal is not shown"
    assert main(["algorithms", "grpo", "grpo", "surrogate.high=0.28"]) == 0
    assert "clip(rho, 0.8, 1.28)" in capsys.readouterr().out
    assert main(["algorithms", "grpo", "grpo"]) == 0 and "say the same" in capsys.readouterr().out
    assert main(["algorithms", "grpo", "gspo", "dapo"]) == 2 and "two cards" in capsys.readouterr().err


def test_a_row_that_imitates_is_trained_by_sft(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "a", "completion": "b"}\n' * 4)
    given = [
        f"data.source={rows}",
        "model={width: 16, layers: 1, heads: 2, context: 32, vocabulary: 270}",
        "data.template=text",
        "data.held_out=0",
    ]
    assert main(["dft", *given, "--dry-run"]) == 0
    capsys.readouterr()
    assert main(["sft", *given, "algorithm=grpo", "--dry-run"]) == 2 and "learns from rewards" in capsys.readouterr().err
    assert main(["sft", *given, "objective.penalty=k3", "--dry-run"]) == 2 and "reads reference" in capsys.readouterr().err
    assert main(["rl", *given, "algorithm=sft", "reward={length: {high: 3}}", "prompts=1", "--dry-run"]) == 2
    assert "imitates given answers" in capsys.readouterr().err


def test_env(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["env"]) == 0
    shown = capsys.readouterr().out
    assert f"tilt {__version__}" in shown and "torch 2" in shown and "memory: " in shown and "data cache: " in shown


def test_data_show(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "d.jsonl"
    file.write_text(
        "\n".join(json.dumps({"prompt": f"q{i}\x1b[31m", "chosen": "good", "rejected": "b" * i, "n": i or None}) for i in range(5))
    )
    assert main(["data", "show", str(file)]) == 0
    shown = capsys.readouterr().out
    assert "5 rows" in shown and "read as preference" in shown and "4 of 5" in shown and "example 2" in shown and "example 3" not in shown
    assert "\x1b" not in shown and "q0\\x1b[31m" in shown
    assert main(["data", "show", str(file), "--as", "prompt", "--examples", "1"]) == 0 and "example 1" not in capsys.readouterr().out


def test_names_in_data_move_no_cursor(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Neither in a table nor in an error."""
    file = tmp_path / "d.jsonl"
    file.write_text(json.dumps({"prompt": "q", "completion": "a", "\x1b[2Jevil": 1}))
    assert main(["data", "show", str(file)]) == 0
    assert main(["data", "show", str(file), "--as", "text"]) == 3
    said = capsys.readouterr()
    assert "\x1b" not in said.out + said.err and "\\x1b[2Jevil" in said.out and "\\x1b[2Jevil" in said.err


@pytest.mark.parametrize("text, name, code, expected", [
    ("", "d.jsonl", 3, "empty"), ('{"a": 1}\n{"a"\n', "d.jsonl", 3, "line 2"), ('{"a": 1}\n', "d.jsonl", 3, "columns found: a"), (None, "none.jsonl", 3, "no such file"),
])  # fmt: skip
def test_bad_data_is_a_data_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str | None, name: str, code: int, expected: str
) -> None:
    if text is not None:
        (tmp_path / name).write_text(text)
    assert main(["data", "show", str(tmp_path / name)]) == code and expected in capsys.readouterr().err


def test_data_get_names_the_sets(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "get"]) == 0 and "rasbt-instruct" in capsys.readouterr().out
    assert main(["data", "get", "rasbt-instrct"]) == 3 and "rasbt-instruct" in capsys.readouterr().err


def test_every_recipe_command_has_a_module_name() -> None:
    assert set(recipes.RECIPES) == {"quickstart", "pretrain", "sft", "rm", "prm", "dpo", "rl", "rank", "label", "rlhf"}
