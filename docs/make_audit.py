"""Write docs/audit.md and docs/data/audit.json from audits of every row of both tables: `python docs/make_audit.py`, some minutes."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from tilt.cli.audit import COLUMNS, PAIR_COLUMNS, cells, facts, pair_cells
from tilt.objectives import ALGORITHMS, PREFERENCES
from tilt.oracle.audit import Audit, audit
from tilt.oracle.pairs import PairAudit, audit_pairs

DOCS = Path(__file__).parent


def recorded(found: Audit | PairAudit) -> dict[str, str]:
    """What docs/data/audit.json keeps of a row, and its page shows."""
    passed = sum(check.passed for check in found.checks)
    return facts(found) | {"checks": f"{passed} of {len(found.checks)} pass", "verdict": found.verdict}


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of docs/audit.md, names in its first column."""
    lines = [columns, ("---",) * len(columns), *([f"`{row[0]}`", *row[1:]] for row in rows)]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def placed(page: str, name: str, text: str) -> str:
    """The page with a table between its marks."""
    start, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
    return f"{page.partition(start)[0]}{start}\n{text}\n{end}{page.partition(end)[2]}"


def main() -> None:
    found = [audit(row, name) for name, row in ALGORITHMS.items()]
    judged = [audit_pairs(row, name) for name, row in PREFERENCES.items()]
    figures = {one.name: recorded(one) for one in [*found, *judged]}
    (DOCS / "data" / "audit.json").write_text(json.dumps(figures, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    page = placed((DOCS / "audit.md").read_text(encoding="utf-8"), "table", table(COLUMNS, map(cells, found)))
    page = placed(page, "second table", table(PAIR_COLUMNS, map(pair_cells, judged)))
    (DOCS / "audit.md").write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
