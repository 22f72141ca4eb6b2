"""docs/notes.md and docs/notes.zh.md: both are what docs/notes.toml says, every function and test in them exists, and every erratum is mended once."""

from __future__ import annotations

import ast
import importlib
import math
import re
from collections import Counter
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from scripts import load

ROOT = Path(__file__).parents[1]
FIELDS = {"id", "lines", "formula", "en", "zh", "function", "test"}
MENDED = FIELDS | {"errata", "correction_en", "correction_zh"}


@cache
def make_notes() -> ModuleType:
    return load(ROOT / "docs" / "make_notes.py")


@cache
def rows() -> list[dict[str, Any]]:
    return [row for section in make_notes().sections() for row in section["row"]]


@cache
def written_in(path: str) -> frozenset[str]:
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    return frozenset(node.name for node in tree.body if isinstance(node, ast.FunctionDef))


@pytest.mark.parametrize("language", ["en", "zh"])
def test_the_pages_are_in_step(language: str) -> None:
    made = make_notes()
    assert made.PAGES[language].read_text(encoding="utf-8") == made.page(language), "run `python docs/make_notes.py`"


def test_every_row_is_whole() -> None:
    for row in rows():
        assert set(row) in (FIELDS, MENDED), row["id"]
        assert all(row[key] for key in row if key != "test"), row["id"]
        for cited in row["lines"].replace("(", "").replace(")", "").replace(", ", " ").split():
            assert re.fullmatch(r"00[0-4]:\d+(-\d+)?", cited), (row["id"], cited)
            first, _, last = cited[4:].partition("-")
            assert int(first) < int(last or 10**9) and int(last or first) <= (333, 51, 651, 290, 347)[int(cited[:3])], cited
        chinese = row["zh"] + row.get("correction_zh", "")
        assert re.search(r"[\u4e00-\u9fff]", row["zh"]) and not re.search(r"[\u4e00-\u9fff]", row["en"]), row["id"]
        assert "\n" not in chinese + row["en"] + row["formula"], row["id"]
    assert [name for name, count in Counter(row["id"] for row in rows()).items() if count > 1] == []


def test_every_function_exists() -> None:
    for row in rows():
        if row["function"] in make_notes().ELSEWHERE:
            continue
        module, _, name = row["function"].partition(":")
        found: Any = importlib.import_module(module)
        for part in name.split("."):
            assert hasattr(found, part), (row["id"], row["function"])
            found = getattr(found, part)
        assert callable(found) and found.__module__ == module, (row["id"], row["function"], "named where it is written")


def test_every_test_exists() -> None:
    for row in rows():
        if row["function"] == "tilt.inspect (not yet built)":
            assert row["test"] == "", row["id"]
            continue
        path, _, name = row["test"].partition("::")
        assert name.startswith("test_") and name in written_in(path), (row["id"], row["test"])


def test_what_is_not_built_is_said_of_nothing_else() -> None:
    """What training changed, token by token, is `tilt.inspect`."""
    named = {row["id"] for row in rows() if row["function"] == "tilt.inspect (not yet built)"}
    assert named == {row["id"] for row in rows() if row["id"].startswith("changed-")}
    assert not (named and (ROOT / "src" / "tilt" / "inspect" / "what_changed.py").exists()), (
        "tilt.inspect.what_changed is there: name its functions"
    )


def test_every_erratum_is_mended_once() -> None:
    found = Counter(name for row in rows() for name in row.get("errata", []))
    assert found == Counter(f"E{i}" for i in range(1, 41))


def test_every_metric_of_the_notes_has_a_row() -> None:
    from tilt.parity.metrics import ROLLOUT_METRICS, UPDATE_METRICS

    metrics = [row for row in rows() if row["id"].startswith("metric-")]
    named = [re.match(r"[a-z]+/[a-z_]+", row["formula"]) for row in metrics]
    assert sorted(m.group() for m in named if m) == sorted({*ROLLOUT_METRICS, *UPDATE_METRICS}) and len(metrics) == 14


def test_numbers_that_the_notes_print() -> None:
    """003:134 and 003:231, which no function of the library computes."""
    formula = {row["id"]: row["formula"] for row in rows()}
    tiers = [math.exp(x) for x in (-1, 0.2, 1)]
    shares = ", ".join(f"{x / sum(tiers):.4f}"[1:] for x in tiers)
    assert formula["three-tier-reward"].endswith(f"({shares})")
    for p in (0.99, 0.999):
        assert f"{1 - p**16:.4f}"[1:] in formula["changed-confidence"]
