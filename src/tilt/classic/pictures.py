"""Pictures of finite processes: grids of values and of what a policy does, as text and as SVG, and curves."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from xml.sax.saxutils import escape

from torch import Tensor

from tilt.classic.bellman import greedy
from tilt.classic.mdp import MDP
from tilt.errors import UsageError

COLOURS = ("#2563eb", "#dc2626", "#059669", "#d97706", "#9333ea", "#6b7280")
ARROWS = {"left": "←", "west": "←", "down": "↓", "south": "↓", "right": "→", "east": "→", "up": "↑", "north": "↑"}
Points = Sequence[tuple[float, float]]


def grid_text(mdp: MDP, values: Tensor, digits: int = 2) -> str:
    """A value for each cell, in rows."""
    rows, columns = _grid(mdp)
    return _table([_plain(x, digits) for x in values.tolist()], rows, columns)


def policy_text(mdp: MDP, policy: Tensor) -> str:
    """An arrow for each cell, · where an episode ends: the likeliest action of a stochastic policy."""
    rows, columns = _grid(mdp)
    return _table(_marks(mdp, policy), rows, columns)


def walk_text(mdp: MDP, states: Sequence[int]) -> str:
    """The cells that a walk came through, numbered by the step at which it came last."""
    rows, columns = _grid(mdp)
    last = {s: t for t, s in enumerate(states)}
    return _table([str(last.get(s, "·")) for s in range(mdp.state_count)], rows, columns)


def grid_svg(mdp: MDP, values: Tensor, policy: Tensor | None = None, *, title: str = "", digits: int = 2, side: int = 52) -> str:
    """Cells the bluer the more they are worth, with their values, and the policy's arrows; cells whose value is NaN are grey."""
    rows, columns = _grid(mdp)
    known = values[~values.isnan()]
    low, high = float(known.min()), float(known.max())
    marks = _marks(mdp, policy) if policy is not None else [""] * mdp.state_count
    parts = []
    for s, (value, mark) in enumerate(zip(values.tolist(), marks, strict=True)):
        x, y = s % columns * side, 24 + s // columns * side
        if math.isnan(value):
            parts.append(f'<rect x="{x + 1}" y="{y + 1}" width="{side - 2}" height="{side - 2}" fill="#9ca3af"/>')
            continue
        shade = (value - low) / (high - low) if high > low else 0.0
        parts.append(
            f'<rect x="{x + 1}" y="{y + 1}" width="{side - 2}" height="{side - 2}" fill="{COLOURS[0]}" fill-opacity="{0.05 + 0.5 * shade:.2f}"/>'
        )
        for text, place, size in ((mark, 0.45, 0.36), (_plain(value, digits), 0.82, 0.22)):
            if text:
                parts.append(
                    f'<text x="{x + side / 2:g}" y="{y + side * place:g}" text-anchor="middle" font-size="{side * size:.0f}">{text}</text>'
                )
    return _svg(columns * side, 24 + rows * side, [f'<text x="2" y="15" font-size="13">{escape(title)}</text>', *parts])


def curves_svg(
    curves: Mapping[str, Points],
    *,
    title: str = "",
    x: str = "",
    log: bool = False,
    width: int = 420,
    height: int = 240,
    dots: bool = False,
) -> str:
    """Curves over one pair of axes, drawn to the ranges of the data; `log` draws the powers of ten of what is above 0."""
    left, top, foot = 58, 26, 34 + 15 * math.ceil(len(curves) / 3)
    shown = {name: [(a, math.log10(b) if log else b) for a, b in points if b > 0 or not log] for name, points in curves.items()}
    every = [point for points in shown.values() for point in points]
    if not every:
        raise UsageError("curves_svg: there is nothing to draw")
    (x0, x1), (y0, y1) = ((min(axis), max(axis)) for axis in zip(*every, strict=True))

    def place(a: float, b: float) -> tuple[float, float]:
        return left + (a - x0) / max(x1 - x0, 1e-12) * (width - left - 14), height - foot - (b - y0) / max(y1 - y0, 1e-12) * (
            height - foot - top
        )

    parts = [
        f'<text x="2" y="15" font-size="13">{escape(title)}</text>',
        f'<path d="M{left} {top}V{height - foot}H{width - 14}" fill="none" stroke="#999"/>',
    ]
    for where, anchor, text in (
        ((left - 5, top + 4), "end", _number(y1, log)), ((left - 5, height - foot), "end", _number(y0, log)), ((left, height - foot + 14), "start", f"{x0:g}"),
        ((width - 14, height - foot + 14), "end", f"{x1:g}"), (((left + width) / 2, height - foot + 14), "middle", x),
    ):  # fmt: skip
        parts.append(f'<text x="{where[0]:g}" y="{where[1]:g}" text-anchor="{anchor}" font-size="11" fill="#555">{escape(text)}</text>')
    for number, (name, points) in enumerate(shown.items()):
        colour, at = COLOURS[number % len(COLOURS)], [place(*point) for point in points]
        line = " ".join(f"{a:.1f},{b:.1f}" for a, b in at)
        parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="1.6"/>')
        parts += [f'<circle cx="{a:.1f}" cy="{b:.1f}" r="2.2" fill="{colour}"/>' for a, b in at] if dots else []
        parts.append(
            f'<text x="{left + number % 3 * (width - left) / 3:.0f}" y="{height - foot + 32 + number // 3 * 15}" font-size="11" fill="{colour}">{escape(name)}</text>'
        )
    return _svg(width, height, parts)


def beside(*pictures: str, gap: int = 16) -> str:
    """Pictures in a row, as one."""
    sizes = [tuple(int(n) for n in picture.partition('viewBox="0 0 ')[2].partition('"')[0].split()) for picture in pictures]
    parts, x = [], 0
    for picture, (width, height) in zip(pictures, sizes, strict=True):
        parts.append(f'<svg x="{x}" width="{width}" height="{height}" {picture.partition("<svg ")[2].rstrip()}')
        x += width + gap
    return _svg(x - gap, max(height for _, height in sizes), parts)


def _svg(width: int, height: int, parts: Sequence[str]) -> str:
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" fill="#222">'
    return "\n".join([head, f'<rect width="{width}" height="{height}" fill="white"/>', *parts, "</svg>\n"])


def _marks(mdp: MDP, policy: Tensor) -> list[str]:
    taken = greedy(policy) if policy.is_floating_point() else policy
    names = mdp.actions or tuple(str(a) for a in range(mdp.action_count))
    return ["·" if end else ARROWS.get(names[a], names[a][:1]) for a, end in zip(taken.tolist(), mdp.terminal.tolist(), strict=True)]


def _table(words: Sequence[str], rows: int, columns: int) -> str:
    wide = max(len(word) for word in words)
    return "\n".join(" ".join(word.rjust(wide) for word in words[r * columns : (r + 1) * columns]) for r in range(rows))


def _grid(mdp: MDP) -> tuple[int, int]:
    if mdp.grid is None:
        raise UsageError("a picture of cells needs a process with a grid: MDP.of(…, grid=(rows, columns))")
    return mdp.grid


def _plain(value: float, digits: int) -> str:
    """A number without the sign of a rounded nothing."""
    return f"{round(value, digits) + 0.0:.{digits}f}"


def _number(value: float, log: bool) -> str:
    return f"{10**value:.1e}" if log else f"{value:.3g}"
