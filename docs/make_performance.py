"""Write the tables of docs/performance.md from what the benchmarks kept in docs/performance: `python docs/make_performance.py`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parent
PLACE = DOCS / "performance"
WHAT = {
    "W1": "1 M parameters, prompt 64, 64 new, G = 8, 64 answers",
    "W2": "1 M, prompt 512, 128 new, G = 16, 64 answers",
    "W3": "width 256 × 4, vocabulary 151,936, prompt 128, 64 new, G = 8, 32 answers",
    "W4": "27 M (512 × 8), prompt 256, 24 (median) to 128 new, G = 8, 64 answers",
    "W5": "GRPO on two-digit sums to 0.9 right, 512 answers a step",
    "W6-sft": "SFT on rasbt-instruct, 5 M, 32 rows a step",
    "W6-dpo": "DPO on rasbt-instruct, 5 M, 32 pairs a step",
}
AXES = {
    ("prompt", "each prompt once"): "training half, prompt {a:g} → {b:g}, 64 answers of 64 in 4 groups",
    ("prompt", "padded"): "the same, padded",
    ("group", "seconds"): "whole step, {a:g} → {b:g} answers to each of 8 prompts of 256",
    ("longest", "packed"): "training half, longest of 64 answers {a:g} → {b:g}, the others 16",
    ("longest", "padded"): "the same, padded",
    ("vocabulary", "tiles of logits"): "peak MiB beyond weights, gradients and Adam, vocabulary {a:,.0f} → {b:,.0f}",
    ("vocabulary", "plain"): "the same without tiles, vocabulary {a:,.0f} → {b:,.0f}",
}


def versus(rows: dict[str, Any]) -> str:
    """One line a workload: seconds of both, their ratio with its range over the turns, memory."""
    lines = [
        "| | workload | TRL, s a step | (generation) | Tilt, s a step | (generation) | times | peak MiB, TRL | Tilt | times |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, what in WHAT.items():
        if name not in rows:
            continue
        row = rows[name]
        trl, tilt = row["median"]["trl"], row["median"]["tilt"]
        pairs = sorted(a / b for a, b in zip(row["seconds"]["trl"], row["seconds"]["tilt"], strict=False))
        times = f"**{row['ratio']:.2f}**" + ("" if "wall" in row else f" ({pairs[0]:.2f} – {pairs[-1]:.2f})")
        own = [
            f"{trl['step']:.2f}",
            f"{trl['generate']:.2f}" if "generate" in trl else "—",
            f"{tilt['step']:.2f}",
            f"{tilt['generate']:.2f}" if "generate" in tilt else "—",
        ]
        if "wall" in row:
            own[0] += f"; {row['wall']['trl']:.0f} s in {row['steps']['trl']} steps"
            own[2] += f"; {row['wall']['tilt']:.0f} s in {row['steps']['tilt']} steps"
        lines.append(
            f"| {name} | {what} | "
            + " | ".join([*own, times, f"{trl['peak']:,.0f}", f"{tilt['peak']:,.0f}", f"{row['memory']:.2f}"])
            + " |"
        )
    known = {name: rows[name] for name in WHAT if name in rows}
    tuned = "; ".join(f"{name} {told(row['tuning'])}" for name, row in known.items())
    steps = ", ".join(f"{name} {len(row['seconds']['tilt'])}" for name, row in known.items())
    dates, commits, machines = (", ".join(dict.fromkeys(str(row[key]) for row in known.values())) for key in ("date", "commit", "machine"))
    last = f"Measured {dates} at {commits}: {machines}; medians over steps ({steps}) and the range of the ratios of single steps. TRL ran with: {tuned}."
    return "\n".join([*lines, "", last])


def told(tuning: dict[str, Any]) -> str:
    return f"micro-batches of {tuning['micro']}, {tuning['dtype']}" + (", continuous batching" if tuning["paged"] else "")


def growth(rows: dict[str, Any]) -> str:
    """From the first point of each curve to the last."""
    lines = ["| | from | to | times |", "|---|---|---|---|"]
    for (what, name), title in AXES.items():
        points = rows.get(what, {}).get(name)
        if points:
            (a, first), (b, last) = points[0], points[-1]
            unit = "MiB" if what == "vocabulary" else "s"
            lines.append(f"| {title.format(a=a, b=b)} | {first:.3g} {unit} | {last:.3g} {unit} | {last / first:.2f} |")
    return "\n".join(lines)


def main() -> None:
    """Put both between their marks."""
    page = DOCS / "performance.md"
    text = page.read_text(encoding="utf-8")
    for name, make in (("versus", versus), ("growth", growth)):
        kept = PLACE / f"{name}.json"
        if kept.exists():
            before, _, rest = text.partition(f"<!-- {name} -->\n")
            after = rest.partition(f"<!-- end {name} -->")[2]
            text = f"{before}<!-- {name} -->\n{make(json.loads(kept.read_text(encoding='utf-8')))}\n<!-- end {name} -->{after}"
    page.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
