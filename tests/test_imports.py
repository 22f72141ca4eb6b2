"""The shape of the house: imports point one way, the mathematics knows torch only, the front door loads nothing heavy."""

from __future__ import annotations

import ast
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

import tilt

SOURCE = Path(tilt.__file__).parent

# A room may import rooms of a lower level, and itself. Rooms of one level do not know each other, save where PEERS says so.
LEVELS: tuple[tuple[str, ...], ...] = (
    ("errors", "shapes", "segments", "distributions", "linear_head", "kept", "config", "isolation"),
    ("objectives", "data", "optim"),
    ("models", "rewards", "oracle", "tasks", "parity"),
    ("sampling", "learning", "runs"),
    ("recipes", "inspect", "classic"),
    ("cli",),
)
PEERS = {("shapes", "segments", "distributions", "linear_head", "kept", "errors", "config")} | {
    ("models", "rewards", "oracle"),  # a reward model is a model
    ("sampling", "learning", "runs"),  # the engine's verbs are measured and recorded
    ("recipes", "inspect"),
}
LEVEL = {room: number for number, rooms in enumerate(LEVELS) for room in rooms}
HEAVY = {"torch", "transformers", "peft", "pyarrow", "numpy", "datasets", "vllm", "ray", "wandb", "pydantic"}


def modules() -> list[Path]:
    return sorted(SOURCE.rglob("*.py"))


def room_of(path: Path) -> str:
    """The room of a file: `objectives` for objectives/policy.py, `segments` for segments.py."""
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def imported(path: Path) -> set[str]:
    """Absolute names of every module that a file imports, in functions too; names under TYPE_CHECKING count."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide which room is meant"
            assert node.module
            found |= {f"{node.module}.{alias.name}" if node.module == "tilt" else node.module for alias in node.names}
    return found


def may_import(importer: str, imported_room: str) -> bool:
    if importer == imported_room or imported_room == "__version__":
        return True
    if LEVEL[imported_room] < LEVEL[importer]:
        return True
    return any(importer in group and imported_room in group for group in PEERS)


@pytest.mark.parametrize("path", [p for p in modules() if p != SOURCE / "__init__.py"], ids=lambda p: str(p.relative_to(SOURCE)))
def test_imports_point_one_way(path: Path) -> None:
    room = "cli" if room_of(path) == "__main__" else room_of(path)
    assert room in LEVEL, f"{room} has no level: say in tests/test_imports.py where it stands"
    wrong = sorted({name for name in imported(path) if name.startswith("tilt.") and not may_import(room, name.split(".")[1])})
    assert not wrong, f"{room} stands too low to import {', '.join(wrong)}"


def test_the_test_itself_refuses_an_upward_import() -> None:
    assert not may_import("objectives", "recipes")
    assert not may_import("objectives", "data")
    assert not may_import("data", "models")
    assert may_import("recipes", "objectives")
    assert may_import("rewards", "models")


@pytest.mark.parametrize("path", sorted((SOURCE / "parity").rglob("*.py")), ids=lambda p: p.name)
def test_parity_is_mathematics_only(path: Path) -> None:
    allowed = set(sys.stdlib_module_names) | {"torch", "jaxtyping", "tilt"}
    assert {name.split(".")[0] for name in imported(path)} <= allowed
    assert {name.split(".")[1] for name in imported(path) if name.startswith("tilt.")} <= {"parity", "objectives", *LEVELS[0]}


@pytest.mark.parametrize("path", sorted((SOURCE / "objectives").rglob("*.py")), ids=lambda p: p.name)
def test_objectives_know_torch_only(path: Path) -> None:
    allowed = set(sys.stdlib_module_names) | {"torch", "jaxtyping", "tilt"}
    foreign = {name for name in imported(path) if name.split(".")[0] not in allowed}
    assert not foreign, f"{path.name} imports {foreign}"
    rooms = {name.split(".")[1] for name in imported(path) if name.startswith("tilt.")}
    assert rooms <= {"objectives", *LEVELS[0]}, f"{path.name} imports {rooms}"
    assert "torch.distributed" not in imported(path)


@pytest.mark.parametrize("path", sorted((SOURCE / "classic").rglob("*.py")), ids=lambda p: p.name)
def test_classic_stands_on_the_mathematics_alone(path: Path) -> None:
    """No language model is needed to learn from a table: rooms of the two lowest levels, torch, numpy, safetensors, and gymnasium for the control half."""
    assert {name.split(".")[1] for name in imported(path) if name.startswith("tilt.")} <= {"classic", *LEVELS[0], *LEVELS[1]}
    assert {name.split(".")[0] for name in imported(path)} <= set(sys.stdlib_module_names) | {
        "torch",
        "numpy",
        "safetensors",
        "tilt",
        "gymnasium",
    }


def loaded_by(statement: str) -> set[str]:
    """Which heavy packages a fresh interpreter has loaded after a statement."""
    program = f"{statement}\nimport sys\nprint(*sorted({{m.split('.')[0] for m in sys.modules}}))"
    answer = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    return set(answer.stdout.split()) & HEAVY


def test_import_tilt_loads_nothing_heavy() -> None:
    assert loaded_by("import tilt") == set()
    assert loaded_by("import numpy") == {"numpy"}, "the test can fail"


def test_the_command_line_parser_loads_no_torch() -> None:
    if not (SOURCE / "cli" / "main.py").exists():
        pytest.skip("the command line is not there yet")
    assert not loaded_by("import tilt.cli.main") & {"torch", "transformers", "pyarrow", "numpy", "peft"}


def test_no_module_is_a_drawer() -> None:
    drawers = {"utils", "util", "helpers", "helper", "misc", "common", "tools"}
    assert not [p for p in modules() if p.stem in drawers or p.parent.name in drawers]


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(SOURCE)))
def test_every_file_says_what_it_does(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    if text.strip():
        assert ast.get_docstring(ast.parse(text)), f"{path}: the first line should say what the file does"
        assert text.lstrip().startswith('"""'), f"{path}: the docstring stands first"


def test_files_stay_near_one_idea() -> None:
    long = {str(p.relative_to(SOURCE)): n for p in modules() if (n := len(p.read_text(encoding="utf-8").splitlines())) > 400}
    if long:
        warnings.warn(f"look for the second idea in: {long}", stacklevel=1)
    assert all(n <= 600 for n in long.values()), f"files of more than 600 lines: {long}"
