"""Model text made safe and short for people: control characters shown, not obeyed; cut in the middle by display width."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

from rich.cells import cell_len


def inert(text: str, *, newline: str = "↵") -> str:
    """Text that a terminal cannot obey: control, direction and other invisible characters become `\\x1b`, `\\u202e` …; newlines become `newline`."""
    return "".join(_visible(c, newline) for c in text)


def _visible(character: str, newline: str) -> str:
    if character == "\n":
        return newline
    if unicodedata.category(character) in ("Cc", "Cf", "Cs", "Zl", "Zp") and character != "\u200d":
        code = ord(character)
        return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}" if code < 65536 else f"\\U{code:08x}"
    return character


def middle(text: str, width: int) -> str:
    """At most `width` terminal cells, cut in the middle: 12 cells of `abcdefghijklmnop` → `abcdef…lmnop`; a CJK character is two cells."""
    if cell_len(text) <= width:
        return text
    if width < 3:
        return "…"[:width]
    room = width - 1
    return _head(text, room - room // 2) + "…" + _head(text[::-1], room // 2)[::-1]


def _head(text: str, width: int) -> str:
    used = 0
    for index, character in enumerate(text):
        used += cell_len(character)
        if used > width:
            return text[:index]
    return text


def number(value: float) -> str:
    """Four significant digits, fit for a column: 0.01234, 1234, 1.2e-06."""
    if value != value or value in (float("inf"), float("-inf")):
        return str(value)
    if value == int(value) and abs(value) < 1e6:
        return str(int(value))
    return f"{value:.4g}"


def size(count: float) -> str:
    """Bytes for people: 812 B, 12.3 MiB, 4.0 GiB."""
    units = ["B", "KiB", "MiB", "GiB", "TiB"]
    while count >= 1024 and len(units) > 1:
        count /= 1024
        units.pop(0)
    unit = units[0]
    return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"


def duration(seconds: float) -> str:
    """`42 s`, `3 min 20 s`, `2 h 05 min`, `3 d`."""
    whole = max(0, int(seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min" if whole < 172800 else f"{whole // 86400} d"


def fence(text: str) -> str:
    """Text as a Markdown block under a fence longer than any run of backticks within it."""
    ticks = "`" * max(3, 1 + max((len(run) for run in re.findall(r"`+", text)), default=0))
    return f"{ticks}text\n{inert(text, newline=chr(10))}\n{ticks}\n"


def curve(title: str, values: Sequence[float], width: int = 72, height: int = 8) -> str:
    """Values as a plot in characters: means of equal stretches of steps, one column each."""
    columns = min(width, len(values))
    means = [
        sum(part) / len(part) for part in (values[i * len(values) // columns : (i + 1) * len(values) // columns] for i in range(columns))
    ]
    low, high = min(means), max(means)
    levels = [round((mean - low) / max(high - low, 1e-9) * (height - 1)) for mean in means]
    rows = ["".join("•" if level == row else " " for level in levels) for row in range(height - 1, -1, -1)]
    marks = [f"{high:8.2f} ┤", *["         │"] * (height - 2), f"{low:8.2f} ┤"]
    return "\n".join(
        [title, *(mark + row for mark, row in zip(marks, rows, strict=True)), "         └" + "─" * columns + f" {len(values)}", ""]
    )
