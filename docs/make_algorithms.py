"""Rewrite the generated parts of docs/algorithms.md: the two tables, the pieces, what each row is unbiased for, and the glossary."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path
from typing import Any

from tilt.objectives import ALGORITHMS, GLOSSARY, PIECES, PREFERENCES
from tilt.objectives.card import clip_level, kl_place, models, unbiased_for, words
from tilt.objectives.preference_card import consistent_for
from tilt.objectives.sources import SOURCES
from tilt.objectives.words import spelled

PAGE = Path(__file__).with_name("algorithms.md")
SLOTS = ("credit", "ratio", "surrogate", "average", "penalty", "value")
EXTRA = ("corrections", "bonus", "control")


def further(row: Any) -> str:
    """The slots that few rows fill, by name."""
    found = ((slot, spelled(slot, getattr(row, slot))) for slot in EXTRA)
    return "; ".join(f"{slot}: {text}" for slot, text in found if text not in ("", "none")) or "none"


def algorithm(name: str) -> str:
    row = ALGORITHMS[name]
    cells = [spelled(slot, getattr(row, slot)) for slot in SLOTS] + [further(row), "any" if row.passes is None else str(row.passes)]
    return f"| `{name}` | " + " | ".join(cells) + f" | {len(models(row))} | {clip_level(row)} | {kl_place(row)} | {SOURCES[name]} |"


def preference(name: str) -> str:
    row = PREFERENCES[name]
    return f"| `{name}` | " + " | ".join(spelled(f.name, getattr(row, f.name)) for f in fields(row)) + f" | {SOURCES[name]} |"


def sections() -> dict[str, list[str]]:
    """The generated lines under each heading."""
    return {
        "## THE TABLE": [
            "| name | credit | ratio | surrogate | average | penalty | value | further | passes | models | clip | KL in | from |",
            "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
            *map(algorithm, ALGORITHMS),
        ],
        "## Preference rows": [
            "| name | " + " | ".join(f.name for f in fields(next(iter(PREFERENCES.values())))) + " | from |",
            "|---|" + "---|" * (len(fields(next(iter(PREFERENCES.values())))) + 1),
            *map(preference, PREFERENCES),
        ],
        "## Pieces": [
            "| slot | name | formula |",
            "|---|---|---|",
            *(f"| {slot} | `{name}` | `{words(kind())}` |" for slot, names in PIECES.items() for name, kind in names.items()),
        ],
        "## What each row is unbiased for": [f"- `{name}`: {unbiased_for(row)}" for name, row in ALGORITHMS.items()],
        "## What each preference row is consistent for": [f"- `{name}`: {consistent_for(row)}" for name, row in PREFERENCES.items()],
        "## Glossary": [f"- `{key}`: {text}" for key, text in GLOSSARY.items()],
    }


def rewritten(page: str) -> str:
    """The page with every generated block (the run of table or list lines under its heading) replaced."""
    for heading, lines in sections().items():
        first = "| " if lines[0].startswith("|") else "- `"
        pattern = re.compile(rf"({re.escape(heading)}\n(?:(?!## |{re.escape(first)}).*\n)*)(?:{re.escape(first[0])}.*\n?)+")
        page, count = pattern.subn(lambda m, lines=lines: m.group(1) + "\n".join(lines) + "\n", page, count=1)
        assert count == 1, heading
    return page


if __name__ == "__main__":
    PAGE.write_text(rewritten(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
