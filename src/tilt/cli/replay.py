"""`tilt replay`: steps of a run done again and compared bit by bit."""

from __future__ import annotations

import json as codec
from collections.abc import Iterator
from pathlib import Path

from tilt.errors import UsageError
from tilt.runs.text import inert

MOST = 20  # differences shown of a run


def show_replay(run: str, steps: str, json: bool) -> int:
    """Replay and print; 0 where everything is the same bits, else 1."""
    from tilt.recipes.replaying import replay

    first, last = bounds(steps)
    found = [replay(path, first, last) for path in runs_in(Path(run))]
    if json:
        rows = [{"run": str(r.run), "steps": list(r.steps), "from": r.begun, "differences": list(r.differences)} for r in found]
        print(codec.dumps(rows, indent=1))
    else:
        for one in found:
            span = f"step {one.steps[0]}" if len(one.steps) == 1 else f"{len(one.steps)} steps, {one.steps[0]} to {one.steps[-1]}"
            begun = f"from the checkpoint of step {one.begun}" if one.begun else "from the start"
            print(f"{one.run}: {span}, done again {begun}: {f'{len(one.differences)} differences' if one.differences else 'the same bits'}")
            for line in one.differences[:MOST]:
                print(f"  {inert(line)}")
            if len(one.differences) > MOST:
                print(f"  … and {len(one.differences) - MOST} more")
    return int(any(one.differences for one in found))


def bounds(steps: str) -> tuple[int, int | None]:
    """`120` → (120, 120), `10:20` → (10, 20), `10:` → (10, None), `all` → (0, None)."""
    if steps == "all":
        return 0, None
    first, colon, last = steps.partition(":")
    if (not (first or colon).isdigit() and not (colon and not first)) or (last and not last.isdigit()):
        raise UsageError(f"`{steps}` names no steps: write a number, FIRST:LAST, or all")
    return int(first or 0), int(last) if last else None if colon else int(first)


def runs_in(path: Path) -> Iterator[Path]:
    """The run, or the stages of a pipeline that have steps."""
    stages = sorted(
        p.parent
        for p in path.glob("*/**/env.json")
        if (p.parent / "metrics.jsonl").is_file() and (p.parent / "metrics.jsonl").stat().st_size
    )
    yield from stages or [path]
