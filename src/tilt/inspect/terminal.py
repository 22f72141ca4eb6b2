"""The page's twin on a terminal: curves as sparks, answers with coloured tokens, nothing that could move a cursor."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.text import Text

from tilt.errors import UsageError
from tilt.inspect.book import CHANNELS, Book
from tilt.inspect.tables import cut

SORTS = {
    "kl": "kl",
    "reward": "reward",
    "adv": "advantage",
    "push": "push",
    "length": "length",
    "delta": "delta_max",
    "entropy": "entropy",
    "clipped": "clipped",
}
UP, DOWN = (223, 216, 215, 208), (153, 111, 75, 33)
"""Of the 256 colours, from faint to strong."""
CURVES = ("reward", "eval/reward", "eval/accuracy", "accuracy", "kl", "entropy", "length/mean", "loss", "eval/nll", "grad_norm")
SPARKS = "▁▂▃▄▅▆▇█"
MARKS = {"\n": "↵", "\t": "⇥", "\r": "␍"}
LONGEST_TOKEN = 400


def show(
    book: Book, console: Console, *, step: int | None = None, sort: str = "", channel: str = "", rows: int = 8, search: str = "", rising: bool = False
) -> None:  # fmt: skip
    """The run's head, its curves, and some answers of a stored step."""
    if sort and sort not in SORTS:
        raise UsageError(f"no sort {sort!r}: one of {', '.join(SORTS)}")
    if channel and channel not in CHANNELS:
        raise UsageError(f"no channel {channel!r}: one of {', '.join(CHANNELS)}")
    header = book.header()
    console.print(
        Text(
            visible(
                " · ".join(
                    str(x)
                    for x in (header["name"], header["algorithm"], header["model"], header["status"], f"step {header['step']}")
                    if x is not None
                )
            )
        ),
        style="bold",
    )
    for line in curves(book.metrics(), max(10, min(60, console.width - 40))):
        console.print(Text(line))
    for alert in header["alerts"][-5:]:
        console.print(Text(visible(f"⚑ step {alert['step']} {alert['name']}: {alert['text']}")), style="bold")
    steps = book.steps()
    if not steps:
        console.print(Text("no answers are stored"))
        return
    stored = [s["step"] for s in steps]
    full = [s["step"] for s in steps if s["channels"]]
    chosen = step if step is not None else (full or stored)[-1]
    if chosen not in stored:
        raise UsageError(f"step {chosen} is not stored: {', '.join(map(str, stored[:20]))}{' …' if len(stored) > 20 else ''}")
    summary = book.summaries([chosen])["steps"][str(chosen)]
    if summary.get("error"):
        raise UsageError(summary["error"])
    found = set(map(tuple, book.search(search, [chosen])["found"])) if search else None
    order = [i for i in range(len(summary["row"])) if found is None or (chosen, i) in found]
    if sort:
        values = summary[SORTS[sort]]
        order.sort(key=lambda i: ((values[i] if isinstance(values[i], (int, float)) else -math.inf) * (1 if rising else -1), i))
    for i in order[:rows]:
        answer(book.rows(chosen).detail(i), console, channel, header["channels"])
    if len(order) > rows:
        console.print(Text(f"{len(order) - rows} more answers of step {chosen}: --rows N"), style="dim")


def curves(metrics: Mapping[str, Any], width: int) -> list[str]:
    """One line a curve: name, first and last value, and its course."""
    lines = []
    for name in CURVES:
        values = [v for v in metrics["columns"].get(name, []) if isinstance(v, (int, float))]
        if len(values) > 1:
            lines.append(f"{name:<16}{values[0]:>10.4g} → {values[-1]:<10.4g} {spark(values, width)}")
    return lines


def spark(values: Sequence[float], width: int) -> str:
    """A course in blocks: the mean of every stretch between the least and the greatest."""
    count = min(width, len(values))
    means = [sum(part) / len(part) for i in range(count) if (part := values[i * len(values) // count : (i + 1) * len(values) // count])]
    low, high = min(means), max(means)
    return "".join(SPARKS[round((v - low) / (high - low) * 7) if high > low else 0] for v in means)


def answer(r: Mapping[str, Any], console: Console, channel: str, known: Mapping[str, Any]) -> None:
    """One answer: what it earned, and its tokens by a channel, sign by underline and, without colours, by marks."""
    channels = r["channels"]
    name = (
        channel
        if channel in channels
        else next((n for n in ("delta_ref", *known) if n in channels and any(isinstance(v, float) for v in channels[n])), "")
    )
    facts = [
        f"step {r['step']} answer {r['row']}",
        f"reward {shown(r['reward'])} {visible(r['reckoned'])}".strip(),
        f"A {shown(r['advantage'])}",
        f"{r['length']} tokens",
        str(r["finish"] or ""),
    ]
    console.print()
    console.print(Text("  ".join(fact for fact in facts if fact)), style="bold")
    console.print(Text(visible(cut(r["prompt"], 400))), style="dim")
    line = Text()
    if not r["tokens"]:
        line.append(visible(cut(r["completion"], 4000)))
    values = channels.get(name) or [None] * len(r["tokens"])
    largest = max((abs(v) for v in values if isinstance(v, (int, float))), default=0.0) or 1.0
    for text, raw, value in zip(r["tokens"], r["bytes"], values, strict=True):
        word = f"⟨{raw}⟩" if text is None else visible(cut(text, LONGEST_TOKEN)) or "∅"
        strength = (
            min(3, int(4 * math.log1p(20 * abs(value) / largest) / math.log(21))) if isinstance(value, (int, float)) and value else -1
        )
        if strength < 0 or abs(value) / largest < 0.01:
            line.append(word)
        elif console.color_system is None or console.no_color:
            line.append(f"[{'+' if value > 0 else '−'}{word}]" if strength >= 1 else word)
        else:
            colour = (UP if value > 0 else DOWN)[strength]
            line.append(word, style=f"color(16) on color({colour}){' underline' if value > 0 else ' underline2'}")
    console.print(line, soft_wrap=True)
    if name:
        title = CHANNELS[name][0] if name in CHANNELS else name
        peaks = sorted(((v, t) for t, v in enumerate(values) if isinstance(v, (int, float))), key=lambda pair: -abs(pair[0]))[:3]
        console.print(
            Text(f"{title}: " + ", ".join(f"{visible(r['tokens'][t] or '⟨' + str(r['bytes'][t]) + '⟩')} {shown(v)}" for v, t in peaks)),
            style="dim",
        )


def shown(value: Any) -> str:
    return "–" if value is None else value if isinstance(value, str) else f"{value:.3g}"


def visible(text: str) -> str:
    """Text on one line whose controls, direction marks and half characters are written out: ESC → ⟨1B⟩."""
    return "".join(
        MARKS.get(c)
        or (f"⟨{ord(c):X}⟩" if unicodedata.category(c) in ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp") and c not in "\u200d\ufe0f" else c)
        for c in text
    )
