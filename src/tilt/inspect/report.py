"""A run as one HTML file that opens without network: the page, its curves, some steps in full, what changed, settings, and what is promised."""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tilt.errors import TiltError
from tilt.inspect.book import Book
from tilt.inspect.server import MODULES, asset
from tilt.runs.files import atomic_write
from tilt.runs.secrets import masked

LARGEST = 10_000_000
ROOM = 7_500_000
"""Bytes for answers; the page, curves and texts take the rest."""
MOST_STEPS, MOST_POINTS, LONGEST = 12, 2000, 200_000
CONTENT_POLICY = "default-src 'none'; script-src 'unsafe-inline' data:; style-src 'unsafe-inline'; img-src data: blob:; base-uri 'none'; form-action 'none'"


def write_report(book: Book, out: Path) -> int:
    """Write the report of a run to a file; its size in bytes, at most 10 MB."""
    data = report(book).encode("utf-8", "replace")
    atomic_write(out, data)
    return len(data)


def report(book: Book, *, room: int = ROOM) -> str:
    """The page with all that it asks for inside it."""
    while True:
        text = page(collected(book, room))
        if len(text.encode("utf-8", "replace")) <= LARGEST or room < 10_000:
            return text
        room //= 2


def collected(book: Book, room: int) -> dict[str, Any]:
    """What the page would ask a server for: every curve, some steps as lists, some answers with their tokens."""
    header = book.header()
    header["config"], header["objective"] = cut(header["config"]), cut(header["objective"])
    steps = book.steps()
    chosen = spread([s["step"] for s in steps if s["channels"]] or [s["step"] for s in steps], MOST_STEPS)
    rows: dict[str, Any] = {}
    rollouts: dict[str, Any] = {}
    changed: dict[str, Any] = {}
    used = 0
    for number, step in enumerate(chosen):
        try:
            summary = book.summaries([step])["steps"][str(step)]
            if summary.get("error"):
                continue
            share = (room - used) // (len(chosen) - number)
            kept = picked(summary)
            details: dict[str, Any] = {}
            size = 0
            for row in kept:
                detail = book.rows(step).detail(row)
                if len(detail["completion"]) > LONGEST or len(detail["prompt"]) > LONGEST:
                    continue
                size += len(json.dumps(detail))
                if size > share:
                    break
                details[f"{step}/{row}"] = detail
            there = sorted(int(key.partition("/")[2]) for key in details)
            if not there:
                continue
            rows[str(step)] = {
                name: [values[i] for i in there] if isinstance(values, list) and name != "prompts" else values
                for name, values in summary.items()
                if name != "parts"
            } | {"parts": {name: [values[i] for i in there] for name, values in summary["parts"].items()}}
            rollouts |= details
            used += size
            changed[str(step)] = book.changed(step)
        except TiltError:
            continue
    listed = [s | {"rows": len(rows[str(s["step"])]["row"])} for s in steps if str(s["step"]) in rows]
    if listed:
        header["notes"] = [*header["notes"], f"This report holds {len(rollouts)} answers of {len(listed)} steps; `tilt view` shows all."]
    found = {
        "runs": {"version": "", "runs": [{"id": 0, "name": header["name"], "path": ""}], "comparisons": []}, "run": {"0": header | {"path": ""}},
        "metrics": {"0": thinned(book.metrics())}, "steps": {"0": listed}, "rows": {"0": {"steps": rows}}, "rollouts": {"0": rollouts},
        "changed": {"0": changed}, "comparisons": {},
        "report": {"before_after": before_after(header.get("result")), "samples": cut(_text(book.path / "samples.md"), 60_000)},
    }  # fmt: skip
    clean = Cleaner()
    return {key: clean(value) for key, value in found.items()}


def spread(steps: Sequence[int], count: int) -> list[int]:
    """At most `count` steps, the first and the last among them, evenly between."""
    if len(steps) <= count:
        return list(steps)
    return [steps[round(i * (len(steps) - 1) / (count - 1))] for i in range(count)]


def picked(summary: Mapping[str, Any], count: int = 24) -> list[int]:
    """Answers worth keeping of a step, in order of worth: a whole group, the best and the worst, suspects, the farthest from the reference, the longest."""

    def ends(name: str, how_many: int) -> list[int]:
        known = [i for i, value in enumerate(summary[name]) if isinstance(value, (int, float))]
        ordered = sorted(known, key=lambda i: summary[name][i])
        return [*reversed(ordered[-how_many:]), *ordered[:how_many]]

    group = summary["group"][0] if summary["group"] else None
    worth = [
        *[i for i, g in enumerate(summary["group"]) if g == group][:8], *ends("reward", 4), *[i for i, odd in enumerate(summary["odd"]) if odd][:4],
        *ends("delta_max", 4)[:4], *ends("length", 2)[:2], *range(len(summary["row"])),
    ]  # fmt: skip
    return list(dict.fromkeys(worth))[:count]


def thinned(metrics: dict[str, Any]) -> dict[str, Any]:
    """Curves of at most 2,000 points, evenly chosen; values that are rare (evaluations) are all kept."""
    count = len(metrics["step"])
    if count <= MOST_POINTS:
        return metrics
    every = math.ceil(count / MOST_POINTS)
    rare = {
        i
        for values in metrics["columns"].values()
        if sum(v is not None for v in values) < count / 10
        for i, v in enumerate(values)
        if v is not None
    }
    kept = [i for i in range(count) if i % every == 0 or i == count - 1 or i in rare]
    columns = {name: [values[i] for i in kept] for name, values in metrics["columns"].items()}
    return metrics | {"step": [metrics["step"][i] for i in kept], "time": [metrics["time"][i] for i in kept], "columns": columns}


def before_after(result: Any) -> list[dict[str, Any]]:
    """The held-out measures before and after, with 95 % intervals where a standard error is known."""
    before, after = (result or {}).get("before"), (result or {}).get("after")
    if not isinstance(before, Mapping) or not isinstance(after, Mapping):
        return []

    def half(measures: Mapping[str, Any], name: str) -> float | None:
        error = measures.get(f"{name}_se")
        return 1.96 * error if isinstance(error, (int, float)) else None

    names = [n for n in after if isinstance(after[n], (int, float)) and not n.endswith(("_se", "_std"))]
    return [
        {"name": n, "before": before.get(n), "before_ci": half(before, n), "after": after[n], "after_ci": half(after, n)} for n in names if isinstance(before.get(n), (int, float))
    ]  # fmt: skip


def cut(text: str, limit: int = LONGEST) -> str:
    return text if len(text) <= limit else text[:limit] + "\n…"


class Cleaner:
    """Gives a value with secrets masked in every text, and numbers that JSON cannot hold as texts. Texts that come again are masked once."""

    def __init__(self) -> None:
        self.texts: dict[str, str] = {}

    def __call__(self, value: Any) -> Any:
        if isinstance(value, str):
            if value not in self.texts:
                self.texts[value] = masked(value)
            return self.texts[value]
        if isinstance(value, Mapping):
            return {str(key): self(each) for key, each in value.items()}
        if isinstance(value, (list, tuple)):
            return [self(each) for each in value]
        if isinstance(value, float) and not math.isfinite(value):
            return "nan" if value != value else "inf" if value > 0 else "-inf"
        return value


def embedded(data: Any) -> str:
    """JSON that may stand inside a script element: nothing in it can end the element or begin another."""
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode("utf-8", "replace").decode()
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def page(data: Any) -> str:
    """index.html with styles written in, modules as data: addresses under their names, and the data."""
    text = asset("index.html").decode()
    names = {f"tilt/{name}": f"{name}.js" for name in MODULES} | {"uplot": "vendor/uPlot.js"}
    modules = {name: "data:text/javascript;base64," + base64.b64encode(asset(file)).decode() for name, file in names.items()}
    start, end = text.index('<script type="importmap">'), text.index("</script>", text.index('<script type="importmap">'))
    text = f'{text[:start]}<script type="importmap">{json.dumps({"imports": modules})}{text[end:]}'
    styles = "".join(f"<style>{asset(name).decode()}</style>" for name in ("vendor/uPlot.css", "style.css"))
    text = text.replace('<link rel="stylesheet" href="/page/uPlot.css">\n<link rel="stylesheet" href="/page/style.css">', styles)
    text = text.replace(
        '<meta charset="utf-8">', f'<meta charset="utf-8">\n<meta http-equiv="Content-Security-Policy" content="{CONTENT_POLICY}">', 1
    )
    return text.replace(
        '<script type="module">', f'<script type="application/json" id="embedded">{embedded(data)}</script>\n<script type="module">', 1
    )


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
