"""What the recipes on judged answers share: a row with its short settings, the examples, and the lines that say what was read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tilt.data.formats import Want
from tilt.data.rendering import Renderer
from tilt.errors import UsageError
from tilt.learning.judged import Judged, judged, with_mismatched
from tilt.objectives import Preference, card
from tilt.parity import PAIR_PRESETS, described
from tilt.recipes import opening
from tilt.recipes.variants import VariantError, origin, override, resolve_preference
from tilt.runs.directory import RunDirectory
from tilt.runs.files import atomic_write

PLACES: Mapping[str, Sequence[tuple[str, str]]] = {
    "beta": (("link", "beta"), ("margin", "beta")),
    "label_smoothing": (("link", "smoothing"),),
    "margin": (("margin", "offset"),),
}
"""Short settings, and the slots and numbers of a row that they may mean; the first one that the row has."""


def row_of(algorithm: str, changes: Mapping[str, Any], *, reads: str, **short: float | None) -> tuple[str, Preference]:
    """The row that a run optimises: by name, its slots changed, its short settings (those that are not None) put where they belong."""
    name, row = resolve_preference(algorithm, changes)
    if row.margin.reads != reads:
        other, what = ("rm", "a reward model's score") if row.margin.reads == "score" else ("dpo", "a policy's likelihoods")
        raise VariantError(f"`algorithm` is {algorithm}, whose margin reads {what}: use `tilt {other}`")
    for key, value in short.items():
        if value is None:
            continue
        slot, number = next(((s, n) for s, n in PLACES[key] if hasattr(getattr(row, s), n)), ("", ""))
        if not slot:
            raise VariantError(
                f"`{key}` {value:g} has no effect: {row!r} has no such number; set one of its slots, as in objective.link, or drop it"
            )
        given = changes.get(slot)
        if isinstance(given, Mapping) and (number in given or any(isinstance(x, Mapping) and number in x for x in given.values())):
            raise VariantError(f"`{key}` and `objective.{slot}.{number}` say the same thing twice: drop one")
        row = override(row, {slot: {number: float(value)}}, where=key)
    return name, row


def want(row: Preference) -> Want:
    """What rows of data are read as: pairs, or where answers are judged one by one also labelled answers."""
    return "judged" if row.apart else "preference"


@dataclass(frozen=True)
class Examples:
    """Examples to train on and held out, and what they bring besides their answers."""

    train: list[Judged]
    held: list[Judged]
    notes: list[str]

    @staticmethod
    def of(render: Renderer, rows: opening.Rows, row: Preference) -> Examples:
        """The rows as examples of this preference row; what it cannot learn from is refused."""
        train = judged(render.judgements(rows.train))
        held = judged(render.judgements(rows.held_out)) if rows.held_out else []
        problems = [problem for part in (train, held) if part for problem in row.check(**_facts(part))]
        if problems:
            raise UsageError("\n".join(dict.fromkeys(problems)))
        notes = [line for line in (_described(train, "margin", 0.0), _described(train, "probability", 1.0)) if line]
        if "mismatched" in row.needs:
            train, held = with_mismatched(train), with_mismatched(held, train)
        return Examples(train, held, notes)


def _facts(examples: Sequence[Judged]) -> dict[str, bool]:
    return {
        "paired": examples[0].paired, "uneven": len({len(e.answers) for e in examples}) > 1,
        "margins": any(e.margin != 0 for e in examples), "probability": any(e.probability != 1 for e in examples),
    }  # fmt: skip


def _described(examples: Sequence[Judged], name: str, plain: float) -> str:
    """The line that says that a column of numbers is used."""
    values = [getattr(example, name) for example in examples]
    if all(value == plain for value in values):
        return ""
    what = "by how much the chosen answer should win" if name == "margin" else "the chance that the chosen answer is the better one"
    return f"           column `{name}`, {what}: mean {sum(values) / len(values):.3f}"


def tokens_of(examples: Sequence[Judged]) -> int:
    """Tokens of these examples, each prompt once an example."""
    return sum(example.cost for example in examples)


def stem(name: str) -> str:
    """The name of a row fit for a directory: `dpo`, or of file.py:NAME the file's."""
    return Path(name.rpartition(":")[0] or name).stem


def describe(directory: RunDirectory, algorithm: str, name: str, row: Preference) -> None:
    """objective.txt: the row in full, where it came from, and its card."""
    parity = ["", *described(name, {})] if name in PAIR_PRESETS else []
    text = "\n".join([*origin(algorithm).lines(row), "", card(row, name=name), *parity])
    atomic_write(directory.path / "objective.txt", text + "\n")


def unit(examples: Sequence[Judged]) -> str:
    """What the examples are, in the plural."""
    return "labelled answers" if not examples[0].paired else "pairs" if all(len(e.answers) == 2 for e in examples) else "rankings"
