"""docs/algorithms/ is what docs/make_pages.py writes: a page for every row of both tables, with advice on each."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from scripts import load

from tilt.objectives import ALGORITHMS, PREFERENCES

DOCS = Path(__file__).parents[1] / "docs"


def test_every_row_has_its_page(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(DOCS))
    made = load(DOCS / "make_pages.py")
    sys.modules.pop("make_curve", None)
    told = made.advice()
    assert list(told) and set(told) == {*ALGORITHMS, *PREFERENCES}, (
        "docs/advice.toml says when each row is right, and what goes wrong with it"
    )
    assert all(set(words) == {"when", "traps"} and all(words.values()) for words in told.values())
    files = {path.name: path.read_text(encoding="utf-8") for path in (DOCS / "algorithms").iterdir()}
    assert files == made.pages(), "run `python docs/make_pages.py`"
