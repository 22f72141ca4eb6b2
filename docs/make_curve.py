"""Draws one metric of one or more runs as an SVG: `python docs/make_curve.py runs/a/metrics.jsonl [runs/b/metrics.jsonl …] eval/reward curve.svg`."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from xml.sax.saxutils import escape

from tilt.runs.journal import read_metrics

WIDTH, HEIGHT, LEFT, BOTTOM, TOP = 640, 260, 56, 36, 24
COLOURS = ("#2563eb", "#dc2626", "#059669", "#9333ea", "#d97706")
Points = Sequence[tuple[float, float]]


def points(path: Path, metric: str) -> Points:
    """The steps that recorded the metric, and its values."""
    found = [(float(row["step"]), float(row[metric])) for row in read_metrics(path) if metric in row]
    return [(step, value) for step, value in found if math.isfinite(value)]


def svg(curves: Mapping[str, Points], metric: str) -> str:
    """The curves over one pair of axes, drawn to the ranges of the data."""
    every = [point for curve in curves.values() for point in curve]
    if not every:
        raise SystemExit(f"no run has recorded {metric}")
    (left, right), (low, high) = ((min(axis), max(axis)) for axis in zip(*every, strict=True))

    def place(step: float, value: float) -> str:
        x = LEFT + (step - left) / max(right - left, 1e-9) * (WIDTH - LEFT - 12)
        y = HEIGHT - BOTTOM - (value - low) / max(high - low, 1e-9) * (HEIGHT - BOTTOM - TOP)
        return f"{x:.1f},{y:.1f}"

    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" font-size="12">']
    parts.append(f'<path d="M{LEFT} {TOP}V{HEIGHT - BOTTOM}H{WIDTH - 12}" fill="none" stroke="#888"/>')
    for x, y, anchor, text in (
        (LEFT - 6, TOP + 4, "end", f"{high:.3g}"), (LEFT - 6, HEIGHT - BOTTOM, "end", f"{low:.3g}"), (LEFT, HEIGHT - 18, "start", f"step {left:g}"),
        (WIDTH - 12, HEIGHT - 18, "end", f"step {right:g}"), (LEFT, 14, "start", metric),
    ):  # fmt: skip
        parts.append(f'<text x="{x}" y="{y}" text-anchor="{anchor}" fill="#888">{escape(text)}</text>')
    for number, (name, curve) in enumerate(curves.items()):
        colour = COLOURS[number % len(COLOURS)]
        parts.append(f'<polyline points="{" ".join(place(*point) for point in curve)}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts.append(f'<text x="{LEFT + 8 + 120 * number}" y="{HEIGHT - 4}" fill="{colour}">{escape(name)}</text>')
    return "\n".join([*parts, "</svg>\n"])


def main(words: Sequence[str]) -> None:
    if len(words) < 3 or not words[-1].endswith(".svg"):
        raise SystemExit("usage: python docs/make_curve.py METRICS.jsonl … METRIC OUT.svg")
    *files, metric, out = words
    Path(out).write_text(svg({Path(file).parent.name: points(Path(file), metric) for file in files}, metric), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
