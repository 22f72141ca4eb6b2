"""Write one page a row into docs/algorithms/ from the code, docs/advice.toml and the figures of docs/data: `python docs/make_pages.py`."""

from __future__ import annotations

import json
import tomllib
from dataclasses import fields
from pathlib import Path
from typing import Any

from make_curve import svg

from tilt.objectives import ALGORITHMS, PREFERENCES, Objective, card
from tilt.objectives.sources import SOURCES
from tilt.objectives.words import spelled

DOCS = Path(__file__).parent
FOLDER = DOCS / "algorithms"


def data(name: str) -> dict[str, Any]:
    """A file of docs/data, empty where it has not been measured."""
    path = DOCS / "data" / name
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def advice() -> dict[str, dict[str, str]]:
    with (DOCS / "advice.toml").open("rb") as file:
        return tomllib.load(file)


def configured(row: Any) -> list[str]:
    """The row as configuration spells it, a slot a line; empty slots left out."""
    told = ((f.name, spelled(f.name, getattr(row, f.name))) for f in fields(row))
    return [f"{slot:<12} {text}" for slot, text in told if text not in ("", "none", "even")]


def audited(name: str, found: dict[str, Any]) -> list[str]:
    """What `tilt audit` measured of the row by enumeration."""
    if name not in found:
        return []
    lines = [f"- {key}: {value}" for key, value in found[name].items()]
    return ["", "`tilt audit` by exact enumeration:", "", *lines]


def learned(name: str, curves: dict[str, list[list[float]]]) -> list[str]:
    """How the row learned the echo task on three seeds."""
    if name not in curves:
        return []
    ends = ", ".join(f"{sum(curve[-8:]) / len(curve[-8:]):.3f}" for curve in curves[name])
    return [
        "",
        "## Learning",
        "",
        f"The echo task on three seeds (`docs/measure_toys.py`): ends at {ends}.",
        "",
        f"![reward by step, three seeds]({name}.svg)",
    ]


def page(name: str, row: Any, told: dict[str, str], audits: dict[str, Any], curves: dict[str, list[list[float]]]) -> str:
    command = name.replace("_", "-")
    trains = f"`tilt {command} recipe.yaml`" if isinstance(row, Objective) else f"`tilt run recipe.yaml` with `algorithm: {name}`"
    lines = [
        f"# {name}", "", f"{SOURCES[name]}. {trains} trains it; `tilt algorithms {command}` prints its card.", "",
        "## Row", "", "```", *configured(row), "```", "", "## What it computes", "", "```", card(row), "```", *audited(name, audits), *learned(name, curves), "",
        "## When", "", told["when"], "", "## Traps", "", told["traps"], "",
    ]  # fmt: skip
    return "\n".join(lines)


def pages() -> dict[str, str]:
    """Every file of docs/algorithms/ and its text."""
    told, audits, curves = advice(), data("audit.json"), data("toys.json")
    rows: dict[str, Any] = {**ALGORITHMS, **PREFERENCES}
    made = {f"{name}.md": page(name, row, told[name], audits, curves) for name, row in rows.items()}
    for name in rows:
        if name in curves:
            drawn = {f"seed {seed}": [(float(step), value) for step, value in enumerate(curve)] for seed, curve in enumerate(curves[name])}
            made[f"{name}.svg"] = svg(drawn, "mean reward")
    index = [f"| [{name}]({name}.md) | {told[name]['when']} |" for name in rows]
    return made | {"README.md": "\n".join(["# One page a row", "", "| row | when |", "|---|---|", *index, ""])}


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    made = pages()
    for stale in {path.name for path in FOLDER.iterdir()} - set(made):
        (FOLDER / stale).unlink()
    for name, text in made.items():
        (FOLDER / name).write_text(text, encoding="utf-8")
