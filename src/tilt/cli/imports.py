"""`tilt import`: the log of another trainer as a run directory."""

from __future__ import annotations

import json
from pathlib import Path

from tilt.inspect.imports import imported


def bring(source: str, out: str, format: str) -> None:
    """Write it, and say what came and what did not."""
    place = imported(Path(source), Path(out) if out else None, format or None)
    told = json.loads((place / "imported.json").read_text(encoding="utf-8"))
    print(f"{told['answers']:,} answers of {told['steps']} steps, {told['metric_rows']:,} rows of metrics ({told['format']}) in {place}")
    for what, count in told["left_out"].items():
        print(f"  left out: {count:,} {what}")
    for note in told["notes"][:20]:
        print(f"  note: {note}")
    print(f"tilt view {place}")
