"""`tilt audit`: what a row's expected gradient is, by exact enumeration, and a verdict; the exit code is 1 where a mistake was found."""

from __future__ import annotations

import json as json_text
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from tilt.cli.recipes import ENDINGS
from tilt.config import Document, gather, hint, override
from tilt.errors import UsageError
from tilt.objectives import ALGORITHMS, PREFERENCES, Objective
from tilt.oracle.audit import SMALL, Audit, audit, plain
from tilt.recipes import variants
from tilt.runs.text import inert


def show_audit(name: str, changes: Sequence[str], json: bool, everything: bool) -> int:
    """Audit one row, or all of THE TABLE; the exit code."""
    if everything == bool(name):
        raise UsageError(
            "name a row, a recipe or file.py:NAME to audit, as in `tilt audit grpo`; `tilt audit --all` audits the whole table"
        )
    if everything:
        found = [audit(row, key) for key, row in ALGORITHMS.items()]
        if json:
            print(json_text.dumps([plain(one) for one in found], ensure_ascii=False))
        else:
            _print(_table(found))
        return 0 if all(one.sound for one in found) else 1
    one = audit(chosen(name, changes), name if ".py:" in name or name.endswith(ENDINGS) else name.replace("-", "_"))
    if json:
        print(json_text.dumps(plain(one), ensure_ascii=False))
    else:
        _print(*(Text(inert(line, newline="\n")) for line in lines(one)))
    return 0 if one.sound else 1


def chosen(name: str, changes: Sequence[str]) -> Objective:
    """The row that a name, a recipe's file or file.py:NAME stands for, with `slot.key=value` applied."""
    if not name.endswith(ENDINGS):
        if name.replace("-", "_") in PREFERENCES:
            raise UsageError(f"{name} is a row on pairs, which draws no answers to enumerate: {hint(name, ALGORITHMS)}")
        document = Document()
        override(document, changes)
        return variants.optimised(name, document.values, {}, 128)[1]
    document = gather([Path(name)], [])
    section = document.values.get("rl", document.values)
    recipe, algorithm = document.values.get("recipe"), section.get("algorithm")
    if algorithm is None and isinstance(recipe, str) and recipe.replace("-", "_") in ALGORITHMS:
        algorithm = recipe
    if not isinstance(algorithm, str):
        raise UsageError(f"{name} names no algorithm: the audit reads `algorithm:` and `objective:` of a recipe of tilt rl or tilt rlhf")
    told = Document(dict(section.get("objective", {})))
    override(told, changes)
    sampling = section.get("sampling", {})
    longest = int(sampling.get("max_tokens", 128)) if isinstance(sampling, dict) else 128
    return variants.optimised(algorithm, told.values, section.get("quirks", {}), longest)[1]


def facts(found: Audit) -> dict[str, str]:
    """What was measured, by name."""
    told = {"expected gradient": found.statement}
    if found.noise == found.noise:
        told["against grad J"] = f"cosine {found.cosine:.4f}, bias {100 * found.error:.1f} % of the gradient, in {SMALL}"
        if found.growth:
            shares = ", ".join(f"{100 * share:.1f} %" for share in found.growth)
            told["as the batch grows"] = f"bias {shares} with 1, 2, 3 groups of one prompt; 0 in the limit, which is computed"
        told["variance"] = f"{found.noise:.3g} per answer over the squared gradient; RLOO {found.noise_rloo:.3g}"
        told["effective samples"] = f"100 answers tell as much as {100 * found.worth:.0f} of RLOO"
    extra = {"critic": found.critic, "penalty, bonus": found.pull, "a step away": found.away}
    return told | {name: text for name, text in extra.items() if text}


def lines(found: Audit) -> list[str]:
    """An audit as a page of text."""
    told = facts(found)
    width = max(map(len, [*told, *(check.name for check in found.checks)])) + 2
    page = [found.name, *(f"  {name:<{width}}{text}" for name, text in told.items()), ""]
    page += [f"  {check.name:<{width}}{'ok    ' if check.passed else 'FAILED'}  {check.seen}" for check in found.checks]
    for mistake in found.mistakes:
        page += ["", f"  MISTAKE: {mistake.name}", f"    {mistake.evidence}", f"    {mistake.mend}"]
    return [*page, "", f"  verdict: {found.verdict}", f"  ({found.seconds:.1f} s)"]


COLUMNS = (
    "row",
    "expected gradient (policy = old)",
    "cosine",
    "bias",
    "variance",
    "of RLOO",
    "penalty, bonus",
    "critic",
    "checks",
    "verdict",
)


def cells(found: Audit) -> tuple[str, ...]:
    """A row of the table of all audits: figures are of small batches, variance is per answer over the squared gradient."""
    passed = sum(check.passed for check in found.checks)
    checks = f"{passed} of {len(found.checks)}" if passed < len(found.checks) else "all"
    return (
        found.name, found.statement, f"{found.cosine:.3f}", f"{100 * found.error:.0f} %", f"{found.noise:.3g}", f"{found.noise / found.noise_rloo:.2f}",
        found.pull, found.critic, checks, found.verdict,
    )  # fmt: skip


def _table(found: Sequence[Audit]) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for column in COLUMNS:
        table.add_column(column, justify="right" if column in COLUMNS[2:6] else "left", overflow="fold")
    for one in found:
        table.add_row(*(Text(inert(cell, newline="\n")) for cell in cells(one)))
    return table


def _print(*what: Text | Table) -> None:
    console = Console(highlight=False, markup=False)
    if not console.is_terminal:
        console.width = 240
    for item in what:
        console.print(item)
