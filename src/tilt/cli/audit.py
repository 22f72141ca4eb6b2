"""`tilt audit`: what a row's expected gradient is, by exact enumeration, and a verdict; the exit code is 1 where a mistake was found."""

from __future__ import annotations

import json as json_text
from collections.abc import Iterable, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from tilt.cli.recipes import ENDINGS
from tilt.config import Document, gather, override
from tilt.errors import UsageError
from tilt.objectives import ALGORITHMS, PREFERENCES, Objective, Preference
from tilt.oracle.audit import SMALL, Audit, audit, plain
from tilt.oracle.pairs import PairAudit, audit_pairs
from tilt.oracle.pairs import plain as plain_pairs
from tilt.recipes import variants
from tilt.runs.text import inert


def show_audit(name: str, changes: Sequence[str], json: bool, everything: bool) -> int:
    """Audit one row, or all of both tables; the exit code."""
    if everything == bool(name):
        raise UsageError("name a row, a recipe or file.py:NAME to audit, as in `tilt audit grpo`; `tilt audit --all` audits every row")
    if everything:
        found = [audit(row, key) for key, row in ALGORITHMS.items()]
        judged = [audit_pairs(row, key) for key, row in PREFERENCES.items()]
        if json:
            print(json_text.dumps([*map(plain, found), *map(plain_pairs, judged)], ensure_ascii=False))
        else:
            _print(
                _table(COLUMNS, map(cells, found), right=(2, 3, 4, 5)), Text(""), _table(PAIR_COLUMNS, map(pair_cells, judged), right=(2,))
            )
        return 0 if all(one.sound for one in found) and all(one.sound for one in judged) else 1
    title = name if ".py:" in name or name.endswith(ENDINGS) else name.replace("-", "_")
    row = chosen(name, changes)
    one = audit(row, title) if isinstance(row, Objective) else audit_pairs(row, title)
    if json:
        print(json_text.dumps(plain(one) if isinstance(one, Audit) else plain_pairs(one), ensure_ascii=False))
    else:
        _print(*(Text(inert(line, newline="\n")) for line in lines(one)))
    return 0 if one.sound else 1


def chosen(name: str, changes: Sequence[str]) -> Objective | Preference:
    """The row that a name, a recipe's file or file.py:NAME stands for, with `slot.key=value` applied."""
    if not name.endswith(ENDINGS):
        document = Document()
        override(document, changes)
        if name.replace("-", "_") in PREFERENCES or (".py:" in name and isinstance(_imported(name), Preference)):
            return variants.resolve_preference(name, document.values)[1]
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


def _imported(name: str) -> object:
    """What file.py:NAME is; None where there is no such thing, which is told where it is resolved."""
    path, _, attribute = name.rpartition(":")
    return getattr(variants.import_file(Path(path)), attribute, None)


def facts(found: Audit | PairAudit) -> dict[str, str]:
    """What was measured, by name."""
    if isinstance(found, PairAudit):
        aim = "the rewards" if "reward," in found.statement or "true reward" in found.statement else "grad E[R]"
        return {"mean loss over all labels": found.statement, "first step": f"cosine {found.cosine:.4f} with {aim}"}
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


def lines(found: Audit | PairAudit) -> list[str]:
    """An audit as a page of text."""
    told = facts(found)
    width = max(map(len, [*told, *(check.name for check in found.checks)])) + 2
    page = [found.name, *(f"  {name:<{width}}{text}" for name, text in told.items()), ""]
    page += [f"  {check.name:<{width}}{'ok    ' if check.passed else 'FAILED'}  {check.seen}" for check in found.checks]
    for name, evidence, mend in mistakes(found):
        page += ["", f"  MISTAKE: {name}", f"    {evidence}", f"    {mend}"]
    return [*page, "", f"  verdict: {found.verdict}", f"  ({found.seconds:.1f} s)"]


def mistakes(found: Audit | PairAudit) -> list[tuple[str, str, str]]:
    """Name, evidence and mend of each mistake."""
    if isinstance(found, PairAudit):
        return [(check.mistake, check.seen, check.mend) for check in found.mistakes]
    return [(mistake.name, mistake.evidence, mistake.mend) for mistake in found.mistakes]


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
    return (
        found.name, found.statement, f"{found.cosine:.3f}", f"{100 * found.error:.0f} %", f"{found.noise:.3g}", f"{found.noise / found.noise_rloo:.2f}",
        found.pull, found.critic, passed(found), found.verdict,
    )  # fmt: skip


PAIR_COLUMNS = ("row", "mean loss over all labels", "first step", "checks", "verdict")


def pair_cells(found: PairAudit) -> tuple[str, ...]:
    """A row of the table of audits of the second table."""
    return (found.name, found.statement, f"{found.cosine:.3f}", passed(found), found.verdict)


def passed(found: Audit | PairAudit) -> str:
    """How many checks passed: `7 of 9`, or `all`."""
    count = sum(check.passed for check in found.checks)
    return f"{count} of {len(found.checks)}" if count < len(found.checks) else "all"


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]], right: Sequence[int]) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number in right else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(inert(cell, newline="\n")) for cell in row))
    return table


def _print(*what: Text | Table) -> None:
    console = Console(highlight=False, markup=False)
    if not console.is_terminal:
        console.width = 240
    for item in what:
        console.print(item)
