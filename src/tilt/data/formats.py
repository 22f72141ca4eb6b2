"""Rows in their many shapes, recognised by their columns and converted to a few canonical ones."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tilt.data import conversations as talk
from tilt.data.shapes import RANKED, SHAPES, TURNS, Kind, Reader, Shape, Want
from tilt.data.sources import Row, rename
from tilt.errors import DataError

__all__ = ["Dataset", "Kind", "Want", "oddities", "prompt_text", "read", "readings", "recognise"]

PLACEHOLDER = re.compile(r"\{\{\s*\w+\s*\}\}")


@dataclass(frozen=True)
class Dataset:
    """Rows of one canonical kind, how they were read, and what was odd about them.

    text: `text`. prompt: `prompt`. prompt_completion: `prompt, completion`. messages: `messages`. preference: `prompt, chosen, rejected`
    (and of a ranking `ranked_answers`, best first). unpaired: `prompt, completion, label`. stepwise: `prompt, steps, labels`.
    A prompt or an answer is a string, or a list of {role, content}; other columns are kept.
    """

    kind: Kind
    conversational: bool
    rows: list[Row]
    note: str
    counts: dict[str, int]

    def summary(self) -> str:
        """`1,100 rows, read as preference …; 6 identical pairs, 25 repeated prompts`."""
        odd = ", ".join(f"{n:,} {name}" for name, n in self.counts.items())
        return f"{len(self.rows):,} rows, {self.note}" + (f"; {odd}" if odd else "")


NEEDED: dict[Want, tuple[str, ...]] = {
    "text": ("text",),
    "prompt": ("prompt",),
    "sft": ("prompt", "completion"),
    "preference": ("prompt", "chosen", "rejected"),
    "unpaired": ("prompt", "completion", "label"),
    "judged": ("prompt", "chosen", "rejected"),
    "stepwise": ("prompt", "steps", "labels"),
}


def read(
    rows: Sequence[Row], *, want: Want, columns: Mapping[str, str] | None = None, source: str = "", roles: Mapping[str, str] | None = None
) -> Dataset:
    """Recognise the shape of rows by their columns and convert them to what a recipe wants.

    `columns` {canonical: found} overrides recognition; `roles` {spelling: system|user|assistant|tool} extends the table of roles.
    """
    if not rows:
        raise DataError(f"{source or 'the data'} has no rows")
    rows = rename(rows, columns or {}, source or "the data")
    if own := next((name for name in (RANKED, TURNS) if any(name in row for row in rows)), None):
        raise DataError(f"{source or 'the data'} has a column {own!r}, which is a name that Tilt gives itself\n  call it something else")
    shape = recognise(rows, want, source)
    reader = Reader(source, {**talk.ROLES, **(roles or {})}, Counter())
    dropped = {"messages", "conversations", "tools", *(("prompt", "completion") if shape.kind == "messages" else ())}
    made: list[Row] = []
    for number, row in enumerate(rows):
        absent = next((name for name in shape.needs if row.get(name) is None), None)
        if absent:
            raise DataError(f"{reader.where(number)} has no {absent!r}; other rows have it\n  the row: {str(row)[:120]}")
        converted = shape.convert(row, number, reader)
        if converted is not None:
            kept = {key: value for key, value in row.items() if key not in dropped}
            made.append({**kept, **_tools(row, reader.where(number)), **converted})
    if not made:
        raise DataError(f"{source or 'the data'}: none of {len(rows)} rows can be used: {dict(reader.counts)}")
    talking = any(isinstance(row.get(key), list) for row in made for key in ("prompt", "messages", "completion", "chosen"))
    counts = {name: n for name, n in (*reader.counts.items(), *oddities(made, shape.kind).items()) if n}
    said = f"read as {shape.kind.replace('_', ' and ')}, {'conversational' if talking else 'plain text'}"
    note = f"{said}; {shape.name}" if shape.name not in said else said
    return Dataset(shape.kind, talking, made, note, counts)


def recognise(rows: Sequence[Row], want: Want, source: str = "") -> Shape:
    """The first shape whose columns the rows have; otherwise an error that shows how to map columns."""
    found = list(dict.fromkeys(name for row in rows for name in row))
    for shape in SHAPES[want]:
        if set(shape.needs) <= set(found):
            return shape
    needs = NEEDED[want]
    example = ", ".join(f"{name}: {found[i] if i < len(found) else '…'}" for i, name in enumerate(needs))
    missing = [name for name in needs if name not in found]
    shapes = dict.fromkeys(", ".join(shape.needs) for shape in SHAPES[want])
    raise DataError(
        f"{source or 'the data'} cannot be read as {want}: missing {', '.join(missing)}\n"
        f"  columns found: {', '.join(found)}\n"
        f"  columns that serve: {'; '.join(shapes)}\n"
        f"  map yours, for example:  columns: {{{example}}}"
    )


def readings(rows: Sequence[Row]) -> list[Want]:
    """Everything that these rows can be read as, the fullest first: pairs, labelled steps, labelled answers, answers, prompts, text."""
    found = {name for row in rows for name in row}
    order: tuple[Want, ...] = ("preference", "stepwise", "unpaired", "sft", "prompt", "text")
    return [want for want in order if any(set(shape.needs) <= found for shape in SHAPES[want])]


def _tools(row: Row, where: str) -> Row:
    """The `tools` column as a list; it may be a JSON string, and an empty list means none."""
    tools = row.get("tools")
    if isinstance(tools, str):
        tools = talk.from_json(tools, "tools", where) if tools.strip() else None
    if tools and (not isinstance(tools, (list, tuple)) or not all(isinstance(tool, Mapping) for tool in tools)):
        raise DataError(f"{where}: tools must be a list of objects, got {str(tools)[:80]}")
    return {"tools": tools} if tools else {}


def prompt_text(row: Row) -> str:
    """What a canonical row asks, as one string: equal prompts give equal strings."""
    if "prompt" in row:
        return talk.plain_text(row["prompt"])
    if "messages" in row:
        return talk.plain_text(row["messages"][:-1] or row["messages"])
    return str(row["text"])


def oddities(rows: Sequence[Row], kind: Kind) -> dict[str, int]:
    """Counts of what a user should know before training: empty and identical answers, repeats, unfilled placeholders."""
    answers = {"prompt_completion": ("completion",), "unpaired": ("completion",), "preference": ("chosen", "rejected")}.get(kind, ())
    said = [tuple(talk.plain_text(row[name]) for name in answers) for row in rows]
    if kind == "messages":
        said = [(row["messages"][-1]["content"],) for row in rows]
    if kind == "stepwise":
        said = [tuple(row["steps"]) for row in rows]
    asked = [prompt_text(row) for row in rows]
    whole = set(zip(asked, said, strict=True))
    return {
        "empty prompts": sum(not text.strip() for text in asked),
        "empty answers": sum(not text.strip() for texts in said for text in texts),
        "identical pairs": sum(texts[0] == texts[1] for texts in said) if kind == "preference" else 0,
        "duplicate rows": len(rows) - len(whole) if kind != "prompt" else 0,
        "repeated prompts": len(rows) - len(set(asked)) if kind != "text" else 0,
        "rows with {{placeholders}}": sum(any(map(PLACEHOLDER.search, (text, *texts))) for text, texts in zip(asked, said, strict=True)),
    }
