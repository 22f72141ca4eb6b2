"""README and docs say what is so: the Python example runs and equals the command line, tables are in step, files and commands exist."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from xml.etree import ElementTree

import pytest
import torch
import yaml
from scripts import load

from tilt.cli.main import _known, main
from tilt.config import read_file, read_value
from tilt.data.public import SETS
from tilt.data.shapes import SHAPES
from tilt.objectives import ALGORITHMS, PREFERENCES
from tilt.recipes import rl
from tilt.rewards import parse
from tilt.runs.journal import read_metrics

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCS = {
    name: (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8")
    for name in ("data", "configuration", "runs", "algorithms", "parity", "audit", "rlaif")
}


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def script(name: str) -> ModuleType:
    return load(ROOT / "docs" / f"{name}.py")


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def smaller(code: str, changes: dict[str, str]) -> str:
    for given, tiny in changes.items():
        assert code.count(given) == 1, f"the README example has no single `{given}`"
        code = code.replace(given, tiny)
    return code


def test_the_python_example_does_what_the_command_line_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The example as it stands, on few rows and for few steps; then `tilt run` on the config.yaml that it left gives the same numbers."""
    (code,) = (block for block in blocks(README, "python") if "recipes" in block)
    assert 15 <= len(code.splitlines()) <= 24
    rows = [{"prompt": f"say {word} {i}", "completion": f"{word}, thank you"} for i in range(20) for word in ("red", "green", "blue")]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    tiny = {
        '"rasbt-instruct"': '"rows.jsonl"', '"width": 128, "layers": 2, "context": 512': '"width": 32, "layers": 1, "context": 64, "vocabulary": 300',
        "epochs=5": "steps=2", "steps=50": "threads=1, steps=2", "prompts=16": "prompts=4", "samples=8": "samples=2", '"max_tokens": 64': '"max_tokens": 5',
    }  # fmt: skip
    found: dict[str, object] = {}
    exec(compile(smaller(code, tiny), "README.md", "exec"), found)
    result = found["result"]
    printed = capsys.readouterr().out
    assert str(result.directory.path) in printed and result.answers[0][0] in printed  # type: ignore[attr-defined]
    run = result.directory.path  # type: ignore[attr-defined]
    assert "Clip(low=0.2, high=0.28)" in (run / "objective.txt").read_text()
    assert main(["run", str(run / "config.yaml"), "name=again", "--quiet"]) == 0
    clocks = ("time", "tokens_per_second", "eps", "reward/kind_seconds")
    first, second = ([{k: v for k, v in row.items() if not k.startswith(clocks)} for row in read_metrics(path / "metrics.jsonl")] for path in (run, Path("runs/again")))  # fmt: skip
    assert first == second and len(first) == 3


def test_the_rows_of_the_readme_exist_and_the_page_that_it_names_has_all() -> None:
    table = README.partition("## Algorithms")[2].partition("## From Python")[0]
    named = set(re.findall(r"`(\w+)`", "".join(line.split("|")[1] for line in table.splitlines() if line.startswith("| `"))))
    assert named <= {*ALGORITHMS, *PREFERENCES} and {"ppo", "rloo", "grpo", "gspo", "reinforce_pp", "dapo", "dpo", "reward_model"} <= named
    assert "docs/algorithms.md" in README and all(f"| `{name}` |" in DOCS["algorithms"] for name in [*ALGORITHMS, *PREFERENCES])


def test_every_command_that_is_named_exists() -> None:
    texts = README + "".join(DOCS.values())
    named = {word.replace("-", "_") for word in re.findall(r"(?:^|[`/ ])tilt ([a-z][a-z-]+)", texts, re.MULTILINE)}
    known = {name.replace("-", "_") for name in _known()} | set(ALGORITHMS) | set(PREFERENCES)
    prose = {"trains", "does", "reads", "has", "is", "never", "keeps"}
    assert named - known - prose == set()


def test_every_file_that_is_named_exists() -> None:
    for text in (README, *DOCS.values()):
        for path in re.findall(r"\b((?:docs|examples|tests)/[\w/]+\.(?:md|py|yaml))", text):
            assert (ROOT / path).exists(), path
    for name in re.findall(r"^  ([a-z_]+)/ ", README.partition("src/tilt/\n")[2].partition("```")[0], re.MULTILINE):
        assert (ROOT / "src" / "tilt" / name).is_dir(), name
    assert len(README.splitlines()) <= 200


def test_the_configuration_and_the_rewards_of_the_readme_are_accepted(tmp_path: Path) -> None:
    from tilt.cli.recipes import _recipe
    from tilt.config import parse as parse_config
    from tilt.recipes import rl

    recipe, rewards = blocks(README, "yaml")
    (tmp_path / "recipe.yaml").write_text(recipe)
    document = read_file(tmp_path / "recipe.yaml")
    assert _recipe("run", document, []) == "rl" and document.values["algorithm"] == "grpo"
    parse_config(document.values, rl.Config, document.origins)
    for entry in re.split(r"^(?=reward:)", rewards, flags=re.MULTILINE)[1:]:
        assert parse(yaml.safe_load(entry)["reward"])


# ------------------------------------------------------------------------------------------------ docs


def test_the_judges_of_the_page_are_accepted() -> None:
    from tilt.recipes import labelling

    label, reward = (yaml.safe_load(block) for block in blocks(DOCS["rlaif"], "yaml"))
    assert label.pop("recipe") == "label" and labelling.Config.model_validate(label).judge.verdicts == ("1", "2")
    assert parse(reward["reward"])[0].name == "judge"
    shown = blocks(DOCS["rlaif"], "")[0].splitlines()
    assert [line.split()[:2] for line in shown] == [["tilt", "label"]] * 3 + [["tilt", "rm"]]


def test_the_settings_are_in_step() -> None:
    assert script("make_configuration").page() == DOCS["configuration"], "run `python docs/make_configuration.py`"


def test_the_parity_page_is_in_step(capsys: pytest.CaptureFixture[str]) -> None:
    assert script("make_parity").rewritten(DOCS["parity"]) == DOCS["parity"], "run `python docs/make_parity.py`"
    (code,) = blocks(DOCS["parity"], "python")
    exec(compile(code, "docs/parity.md", "exec"), {})
    assert capsys.readouterr().out.count("tensor(") == 4


def test_the_error_that_the_docs_show_is_the_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (shown,) = (block for block in blocks(DOCS["configuration"], "") if block.startswith("$ tilt rl mine.yaml"))
    (tmp_path / "mine.yaml").write_text("recipe: rl\nmodel: m\ndata: d.jsonl\nreward: exact\noptimizer: {lr: 3}\n")
    monkeypatch.chdir(tmp_path)
    assert main(["rl", "mine.yaml", "stepz=10"]) == 2
    assert sorted(capsys.readouterr().err.splitlines()) == sorted(shown.splitlines()[1:])


def test_the_shapes_of_rows_are_in_step() -> None:
    table = DOCS["data"].partition("<!-- shapes -->")[2].partition("<!-- end of shapes -->")[0]
    rows = dict(re.findall(r"^\| `(\w+)`[^|]*\| (.*) \|$", table, re.MULTILINE))
    assert rows == {want: "; ".join(dict.fromkeys(f"`{', '.join(shape.needs)}`" for shape in shapes)) for want, shapes in SHAPES.items()}
    assert all(name in SETS for name in re.findall(r"`(rasbt-instruct|gsm8k)", DOCS["data"]))


def test_the_columns_of_rollouts_are_in_step() -> None:
    """Every column that the store writes for a PPO step, beside those that a row may add, has a line in the page."""
    import inspect

    from tilt.learning import channels
    from tilt.recipes import reporting
    from tilt.runs import rollout_store

    table = DOCS["runs"].partition("## Rollouts")[2].partition("## Looking")[0]
    documented = {name.strip() for row in re.findall(r"^\| `([^`]+)`", table, re.MULTILINE) for name in row.split(",")}
    source = (
        inspect.getsource(rollout_store)
        + inspect.getsource(reporting.keep_rollouts)
        + inspect.getsource(reporting.token_channels)
        + inspect.getsource(reporting.groups)
        + inspect.getsource(reporting.Looked)
        + " ".join(f'"{name}"' for name in channels.SHOWN)
    )
    assert all(f'"{name}"' in source for name in documented)
    written = set(re.findall(r'"(\w+)": (?:pa\.array|signals|new|torch\.expm1|experience|shaped|_lists)', source))
    assert written <= documented


def test_the_exit_codes_are_in_step() -> None:
    from tilt import errors

    table = dict(re.findall(r"^\| (\d+) \| (\w[\w ]*)", DOCS["runs"].partition("## Exit codes")[2], re.MULTILINE))
    codes = {str(kind.exit_code): kind.__name__ for kind in (errors.UsageError, errors.DataError, errors.NumericError)}
    assert codes == {"2": "UsageError", "3": "DataError", "4": "NumericError"}
    assert (
        table["2"] == "usage" and table["3"] == "data" and table["4"] == "not a number" and set(table) == {"0", "1", "2", "3", "4", "130"}
    )


def test_a_curve_is_drawn_from_what_a_run_recorded(tmp_path: Path) -> None:
    file = tmp_path / "run" / "metrics.jsonl"
    file.parent.mkdir()
    file.write_text(
        "".join(json.dumps({"step": i, **({"eval/reward": i / 4} if i % 2 == 0 else {"loss": "nan"})}) + "\n" for i in range(5))
    )
    draw = script("make_curve")
    draw.main([str(file), "eval/reward", str(tmp_path / "c.svg")])
    (line,) = ElementTree.parse(tmp_path / "c.svg").getroot().iter("{http://www.w3.org/2000/svg}polyline")
    places = [tuple(map(float, point.split(","))) for point in line.attrib["points"].split()]
    assert len(places) == 3 and [x for x, _ in places] == sorted(x for x, _ in places) and places[0][1] > places[1][1] > places[2][1]
    with pytest.raises(SystemExit, match="no run has recorded reward"):
        draw.main([str(file), "reward", str(tmp_path / "d.svg")])


def test_the_modifiers_of_the_page_are_settings_that_change_a_run() -> None:
    """Every row of the table of modifiers can be set as it stands, and differs from what a run does without it."""
    page = DOCS["algorithms"]
    table = [
        line.split(" | ") for line in page[page.index("## Modifiers") : page.index("## Pieces")].splitlines() if line.startswith("| ")
    ][1:]
    plain = {"model": "m", "data": "d", "reward": "exact"}
    for name, shown, _ in (row[:3] for row in table):
        given = {}
        for text in re.findall(r"`(\w+: [^`]*)`", shown):
            given |= read_value(text)
        algorithm = "ppo" if "gae" in shown else "grpo"
        assert given, name
        changed, before = (rl.Config.model_validate(plain | {"algorithm": algorithm} | more) for more in (given, {}))
        assert changed != before or "guards" in given, name
    assert len(table) == 13
