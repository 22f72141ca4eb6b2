"""Write docs/audit.md and docs/data/audit.json from audits of every row of THE TABLE: `python docs/make_audit.py`, some minutes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from tilt.cli.audit import COLUMNS, cells, facts
from tilt.objectives import ALGORITHMS
from tilt.oracle.audit import Audit, audit

DOCS = Path(__file__).parent
START, END = "<!-- table -->", "<!-- end of table -->"


def recorded(found: Audit) -> dict[str, str]:
    """What docs/data/audit.json keeps of a row, and its page shows."""
    passed = sum(check.passed for check in found.checks)
    return facts(found) | {"checks": f"{passed} of {len(found.checks)} pass", "verdict": found.verdict}


def table(found: Sequence[Audit]) -> str:
    """The table of docs/audit.md."""
    rows = [COLUMNS, ("---",) * len(COLUMNS), *([f"`{one.name}`", *cells(one)[1:]] for one in found)]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows)


def main() -> None:
    found = [audit(row, name) for name, row in ALGORITHMS.items()]
    figures = {one.name: recorded(one) for one in found}
    (DOCS / "data" / "audit.json").write_text(json.dumps(figures, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    page = (DOCS / "audit.md").read_text(encoding="utf-8")
    before, after = page.partition(START)[0], page.partition(END)[2]
    (DOCS / "audit.md").write_text(f"{before}{START}\n{table(found)}\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
