"""`tilt trace`: one step with every number beside its formula, the function that computed it and its source; several algorithms side by side."""

from __future__ import annotations

import json as json_text
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from tilt.config import Document, override
from tilt.errors import UsageError
from tilt.inspect.entries import STAGES, Entry
from tilt.inspect.fixtures import Batch, fixture_f, fixture_p
from tilt.inspect.pair_trace import trace_pairs
from tilt.inspect.stored import check_readable, stored_batch
from tilt.inspect.trace import batch_entries, examples, trace
from tilt.objectives import PREFERENCES, Layout, Objective, Preference
from tilt.recipes import variants
from tilt.runs.text import inert, middle

Traced = dict[str, list[Entry]]
SHOWN = 16
"""Numbers of an answer on a line; the others are in --json."""


def show_trace(words: Sequence[str], run: str, step: int | None, group: int, json: bool) -> None:
    """Print one step of each algorithm named: on fixture F, of rows on pairs on fixture P, or on a stored batch of a run."""
    rows, changes = named(words)
    if not run and (step is not None or group):
        raise UsageError("--step and --group choose from a run: name it with --run")
    batch, where = fixture_f(), "fixture F: one prompt, four answers"
    if run:
        batch, number = stored_batch(Path(run), step)
        where = f"step {number} of {run}"
    traced: Traced = {}
    for name, row in rows.items():
        if isinstance(row, Preference):
            if run:
                raise UsageError(f"{name} learns from pairs, and a run of `tilt rl` stores answers: leave --run out")
            traced[name], where = trace_pairs(row, fixture_p(), name), "fixture P: two pairs"
            continue
        check_readable(row, batch, name, where)
        traced[name] = trace(row, batch) + batch_entries(row, batch) + ([] if run else examples())
    if json:
        print(
            json_text.dumps(
                {"batch": where, "changes": changes, "trace": {k: _plain(v, batch.layout) for k, v in traced.items()}}, ensure_ascii=False
            )
        )
        return
    shown = _answers(batch.layout, group)
    console = Console(highlight=False, markup=False)
    if not console.is_terminal:
        console.width = 200
    for part in [*_head(rows, where, batch, shown), *_stages(traced, batch.layout, shown, 6 if run else 10)]:
        console.print(part)


def named(words: Sequence[str]) -> tuple[dict[str, Objective | Preference], list[str]]:
    """The rows that the words name, with every `slot.key=value` among them applied to all; of one table, since a batch holds answers or pairs."""
    changes = [word for word in words if "=" in word and ".py:" not in word]
    names = list(dict.fromkeys(word for word in words if word not in changes))
    if not names:
        raise UsageError("nothing is named: `tilt trace ppo`, or several side by side: `tilt trace grpo gspo`")
    document = Document()
    override(document, changes)
    found: dict[str, Objective | Preference] = {}
    for name in names:
        find = variants.resolve_preference if name.replace("-", "_") in PREFERENCES else variants.resolve
        plain, row = find(name, document.values)
        found[plain] = row
    if len({type(row) for row in found.values()}) > 1:
        raise UsageError(f"{' and '.join(found)} do not read the same batch: rows on answers and rows on pairs are traced apart")
    return found, changes


def _answers(layout: Layout, group: int) -> list[int]:
    """The answers of one prompt."""
    if not 0 <= group < layout.prompts:
        raise UsageError(f"--group {group}: the batch has {layout.prompts} prompts, 0 to {layout.prompts - 1}")
    return [i for i, prompt in enumerate(layout.prompt.tolist()) if prompt == group]


def _head(rows: dict[str, Objective | Preference], where: str, batch: Batch, shown: Sequence[int]) -> list[Text]:
    lines = [f"{' | '.join(rows)} on {where}"]
    lines += [f"  {name}: {row!r}" for name, row in rows.items()]
    lines += [f"  note: {said}" for said in batch.stored]
    if len(shown) < batch.layout.sequences:
        lines.append(
            f"  computed on all {batch.layout.sequences} answers, shown for the {len(shown)} to one prompt; --group shows another, --json all"
        )
    lines += [f"  answer {i}: {middle(inert(batch.texts[i]), 160)}" for i in shown if batch.texts]
    return [Text(line) for line in lines]


def _stages(traced: Traced, layout: Layout, shown: Sequence[int], digits: int) -> list[Any]:
    """The stages in their order; in each the numbers by name: once where all algorithms agree, else side by side."""
    parts: list[Any] = []
    for stage, title in STAGES.items():
        known = {name: {e.name: e for e in entries if e.stage == stage} for name, entries in traced.items()}
        order = _merged([list(entries) for entries in known.values()])
        if order:
            parts.append(Text(f"\n── {title}", style="bold"))
        for number in order:
            entries = {name: known[name].get(number) for name in traced}
            present = [e for e in entries.values() if e is not None]
            if len(present) == len(traced) and all(e.same_as(present[0]) for e in present):
                parts.append(_block(present[0], layout, shown, digits))
                continue
            if len(present) == 1:
                only = next(name for name, e in entries.items() if e is not None)
                parts += [Text(f"  {only} alone:", style="italic"), _block(present[0], layout, shown, digits)]
                continue
            table = Table(box=None, padding=(0, 3, 0, 0), show_header=False, expand=True)
            for _ in traced:
                table.add_column(overflow="fold", ratio=1)
            table.add_row(*(Text(f"  {name}:", style="italic") for name in traced))
            table.add_row(*(Text("") if e is None else _block(e, layout, shown, digits) for e in entries.values()))
            parts.append(table)
    return parts


def _merged(lists: Sequence[Sequence[str]]) -> list[str]:
    """One order that keeps each list's: a b d and a c d → a b c d."""
    merged: list[str] = []
    for names in lists:
        place = 0
        for name in names:
            if name in merged:
                place = merged.index(name) + 1
            else:
                merged.insert(place, name)
                place += 1
    return merged


def _block(entry: Entry, layout: Layout, shown: Sequence[int], digits: int) -> Text:
    """Name and formula, function and source, and the numbers."""
    text = Text(f"  {entry.name}:", style="bold")
    text.append(f"  {entry.formula}\n", style="not bold")
    text.append(f"      {entry.computed_by}  {entry.place}  · {entry.source}\n", style="dim not bold")
    rows = entry.rows(layout)
    if entry.axis == "action":
        lines = [f"answer {i}  " + _numbers(rows[i], digits) for i in shown]
    elif entry.axis == "answer" and entry.value.numel() == layout.sequences:
        lines = [_numbers([rows[0][i] for i in shown], digits)]
    elif entry.axis == "prompt":
        lines = [_numbers([rows[0][int(layout.prompt[shown[0]])]], digits)]
    else:
        lines = [_numbers(rows[0], digits if entry.axis != "batch" else digits + 2)]
    text.append("\n".join(f"      {line}" for line in lines), style="not bold")
    return text


def _numbers(row: Sequence[float], digits: int) -> str:
    cells = [f"{x + 0.0:.{digits}f}".rstrip("0").rstrip(".") for x in row[:SHOWN]]
    return "  ".join("0" if cell == "-0" else cell for cell in cells) + (f"  … {len(row) - SHOWN} more" if len(row) > SHOWN else "")


def _plain(entries: Sequence[Entry], layout: Layout) -> list[dict[str, Any]]:
    return [
        {
            "stage": e.stage, "name": e.name, "formula": e.formula, "function": e.computed_by, "place": e.place, "source": e.source, "axis": e.axis,
            "value": e.rows(layout) if e.axis == "action" else e.rows(layout)[0][0] if e.axis == "batch" else e.rows(layout)[0],
        }
        for e in entries
    ]  # fmt: skip
