"""`tilt plot`: the main curves of runs as a small picture."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tilt.cli.view import opened
from tilt.errors import DataError, UsageError

MAIN = ("reward", "eval/reward", "eval/accuracy", "kl", "entropy", "length/mean", "accuracy", "margin", "loss")
INK = ("#24508f", "#b85a00", "#3b7d4f", "#8a5a9c", "#5f646d")


def plot(paths: Sequence[str], out: str, metrics: Sequence[str]) -> Path:
    """Draw them, one panel a metric and one line a run, alerts marked."""
    try:
        importlib.import_module("matplotlib").use("Agg")
        pyplot: Any = importlib.import_module("matplotlib.pyplot")
    except ImportError:
        raise UsageError("tilt plot needs matplotlib: pip install tilt-rl[plot]") from None
    runs, _ = opened(paths)
    curves = [(book.name, book.metrics(), book.alerts()) for book in runs]
    known = list(
        dict.fromkeys(
            name
            for _, found, _ in curves
            for name, values in found["columns"].items()
            if sum(isinstance(v, (int, float)) for v in values) > 1
        )
    )
    names = list(metrics) or [name for name in MAIN if name in known][:6]
    if missing := [name for name in names if name not in known]:
        raise UsageError(f"no curve {', '.join(missing)}: there are {', '.join(known[:40])}")
    if not names:
        raise DataError("these runs have recorded no curve")
    wide = min(3, len(names))
    tall = -(-len(names) // wide)
    figure, axes = pyplot.subplots(tall, wide, figsize=(3.4 * wide, 2.3 * tall), squeeze=False, dpi=110)
    for place, axis in enumerate(axes.flat):
        if place >= len(names):
            axis.axis("off")
            continue
        for number, (name, found, alerts) in enumerate(curves):
            points = [
                (s, v) for s, v in zip(found["step"], found["columns"].get(names[place], []), strict=False) if isinstance(v, (int, float))
            ]
            axis.plot(
                [s for s, _ in points],
                [v for _, v in points],
                color=INK[number % len(INK)],
                linewidth=1.3,
                label=name,
                marker="." if len(points) < 12 else None,
            )
            for alert in alerts:
                axis.axvline(alert["step"], color="#a8324a", linewidth=0.7, linestyle=":")
        axis.set_title(names[place], fontsize=9, loc="left")
        axis.tick_params(labelsize=7)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    if len(curves) > 1:
        axes[0][0].legend(fontsize=7, frameon=False)
    figure.tight_layout()
    place_ = Path(out or "curves.png")
    figure.savefig(place_, facecolor="white")
    pyplot.close(figure)
    return place_
