"""docs/classic: its cells print what stands below them, its lines stand in the source beside their formulas, and its figures show the numbers."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from types import ModuleType
from xml.etree import ElementTree

import pytest
from scripts import load

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "docs" / "classic"
PAGES = sorted(FOLDER.glob("*.md"))
HEAD = "| formula | line | in |\n|---|---|---|\n"


@cache
def made() -> ModuleType:
    return load(ROOT / "docs" / "make_classic.py")


@pytest.mark.parametrize("path", PAGES, ids=lambda p: p.stem)
def test_cells_print_what_stands_below_them(path: Path) -> None:
    page = path.read_text(encoding="utf-8")
    assert made().rewritten(page) == page, "run `python docs/make_classic.py`"


def test_a_cell_that_prints_something_else_is_noticed() -> None:
    page = "```python\nprint(1 + 1)\n```\n\n```text\n3\n```\n\nand on\n\n```python\nx = 1\n```\n"
    assert made().rewritten(page) == page.replace("3\n```", "2\n```")
    assert made().rewritten("```python\nprint(1 + 1)\n```\n") == "```python\nprint(1 + 1)\n```\n\n```text\n2\n```\n"


@pytest.mark.parametrize("path", [p for p in PAGES if HEAD in p.read_text(encoding="utf-8")], ids=lambda p: p.stem)
def test_every_line_stands_in_the_source(path: Path) -> None:
    table = path.read_text(encoding="utf-8").partition(HEAD)[2].partition("\n\n")[0]
    rows = [[cell.strip().replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", row)[1:-1]] for row in table.splitlines()]
    assert len(rows) >= 3
    for formula, line, name in rows:
        source = (ROOT / "src" / "tilt" / "classic" / name).read_text(encoding="utf-8")
        assert formula and re.fullmatch("`[^`]+`", line) and line.strip("`") in source, (path.name, line, name)


def test_the_index_names_every_page_and_every_figure_is_shown_once() -> None:
    index = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert sorted(re.findall(r"\]\((\w+\.md)\)", index)) == [p.name for p in PAGES if p.stem != "README"]
    shown = [name for path in PAGES for name in re.findall(r"!\[[^\]]+\]\((\w+)\.svg\)", path.read_text(encoding="utf-8"))]
    assert sorted(shown) == sorted(p.stem for p in FOLDER.glob("*.svg")) and {draw.__name__ for draw in made().FIGURES} <= set(shown)
    assert sum(HEAD in path.read_text(encoding="utf-8") for path in PAGES) >= 6
    for path in FOLDER.glob("*.svg"):
        assert ElementTree.fromstring(path.read_text(encoding="utf-8")).tag.endswith("svg") and path.stat().st_size < 30_000


@pytest.mark.parametrize("name", ["values_of_a_grid", "sweeps", "time_left", "bounds"])
def test_figures_show_the_numbers(name: str) -> None:
    """What is drawn now has the same words and, to a fifth of a pixel, the same places as the file."""
    now, kept = getattr(made(), name)(), (FOLDER / f"{name}.svg").read_text(encoding="utf-8")
    number = re.compile(r"-?\d+(?:\.\d+)?(?:e[+-]\d+)?")
    assert number.sub("#", now) == number.sub("#", kept), "run `python docs/make_classic.py`"
    assert [float(x) for x in number.findall(now)] == pytest.approx([float(x) for x in number.findall(kept)], abs=0.21)
