"""Does a test notice? Planted faults, each by the test that is named for it, and small mechanical changes of the mathematics, by any.

    python tests/mutants/run.py [--planted-only | --mechanical-only] [--file NAME] [--sample N] [--all] [--again FILE] [--workers N] [--json FILE]

Exits 1 when a planted fault goes unseen, when fewer than 95 % of the mechanical mutants are killed, or when a survivor is not explained in survivors.toml.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import tomllib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import forking
import mutate
from forking import Job, Outcome
from mutate import Mutant
from planted import FAULTS, Fault

ENOUGH = 0.95
PAIRS = ("tests/objectives/test_preference.py",)
FIRST = tuple(f"tests/objectives/test_{name}.py" for name in ("rows", "pieces"))
ROWS = (*FIRST, *sorted(str(p.relative_to(forking.ROOT)) for p in forking.ROOT.glob("tests/objectives/test_*.py") if str(p.relative_to(forking.ROOT)) not in FIRST + PAIRS))  # fmt: skip
TESTS: dict[str, tuple[str, ...]] = {
    "segments.py": ("tests/test_segments.py", *ROWS),
    "distributions.py": ("tests/test_distributions.py", "tests/test_kept.py", *ROWS),
    "data/packing.py": ("tests/data/test_packing.py", "tests/sampling/test_kept_sets.py::test_packs_carry_the_sets_raggedly"),
    "objectives/experience.py": ROWS,
    "objectives/credit.py": (*ROWS, *PAIRS),
} | {f"objectives/{name}.py": PAIRS for name in ("comparisons", "links", "margins", "pairs", "preference", "preferences", "regularisers")}
"""The tests of each mutated file, the quickest first; those of all others are the tests of rows."""


def suite_of(file: str) -> tuple[str, ...]:
    return TESTS.get(file, ROWS)


def module_of(file: str) -> str:
    return "tilt." + file.removesuffix(".py").replace("/", ".")


def explanations() -> dict[str, str]:
    """Why each mutant that nothing kills is no error, by its key."""
    found = tomllib.loads(Path(__file__).with_name("survivors.toml").read_text(encoding="utf-8"))
    return {key: why for section in found.values() for key, why in section.items()}


# ------------------------------------------------------------------------------------------------ planted faults


def planted(faults: Sequence[Fault], workers: int) -> tuple[bool, list[dict[str, object]]]:
    """Whether every fault is found by its test, which passes on the code as it is."""
    names = tuple(sorted({fault.test for fault in faults}))
    clean = forking.run([Job("the code as it is", None, "", names, seconds=900, everything=True)], 1, lambda _: None)[0]
    if clean.verdict != "passed":
        print(f"planted: the named tests must pass on the code as it is, and {clean.verdict}: {clean.by}")
        return False, []
    jobs = [Job(fault.name, module_of(fault.file), fault.wrong(), (fault.test,)) for fault in faults]

    def tell(outcome: Outcome) -> None:
        print(
            f"  {'found' if outcome.verdict == 'failed' else 'UNSEEN (' + outcome.verdict + ')':8} {outcome.seconds:5.1f} s  {outcome.job.name}",
            flush=True,
        )

    found = {outcome.job.name: outcome for outcome in forking.run(jobs, workers, tell)}
    slots = Counter(fault.slot for fault in faults)
    caught = Counter(fault.slot for fault in faults if found[fault.name].verdict == "failed")
    print("\nplanted faults found by the test named for each")
    for slot, count in slots.items():
        print(f"  {slot:12} {caught[slot]:3} of {count:3}")
    print(f"  {'all':12} {caught.total():3} of {slots.total():3}\n")
    records = [{"slot": f.slot, "name": f.name, "source": f.source, "file": f.file, "test": f.test, "verdict": found[f.name].verdict, "by": found[f.name].by} for f in faults]  # fmt: skip
    return caught == slots, records


# ------------------------------------------------------------------------------------------------ mechanical mutants


def chosen(files: Sequence[str], sample: int | None, everything: bool) -> list[Mutant]:
    """The mutants of a run, always the same ones; a sample holds the first of each operator in turn."""
    found = [m for file in files for m in mutate.mutants(file) if everything or m.chosen]
    if sample is None or sample >= len(found):
        return found
    turn: Counter[tuple[str, str]] = Counter()
    ranked = []
    for m in sorted(found, key=lambda m: m.chance):
        turn[m.file, m.operator] += 1
        ranked.append((turn[m.file, m.operator], m.chance, m))
    return [m for _, _, m in sorted(ranked, key=lambda r: r[:2])[:sample]]


def mechanical(mutants: Sequence[Mutant], workers: int) -> tuple[bool, list[dict[str, object]]]:
    """Whether enough mutants are killed, and every survivor is explained."""
    groups = {suite_of(m.file) for m in mutants}
    clean = forking.run([Job("the code as it is", None, "", tests, seconds=900) for tests in groups], workers, lambda _: None)
    for outcome in clean:
        if outcome.verdict != "passed":
            print(f"mechanical: the tests must pass on the code as it is, and {outcome.verdict}: {outcome.by}")
            return False, []
    limit = 60 + 6 * max(outcome.seconds for outcome in clean)
    jobs = [Job(m.key, module_of(m.file), m.source, suite_of(m.file), limit) for m in mutants]
    known, done = explanations(), 0

    def tell(outcome: Outcome) -> None:
        nonlocal done
        done += 1
        if outcome.verdict == "passed":
            print(f"  {done}/{len(jobs)} survived{'' if outcome.job.name in known else ', UNEXPLAINED'}: {outcome.job.name}", flush=True)
        elif done % 25 == 0:
            print(f"  {done}/{len(jobs)}", flush=True)

    found = {outcome.job.name: outcome for outcome in forking.run(jobs, workers, tell)}
    alive = [m for m in mutants if found[m.key].verdict == "passed"]
    table(mutants, alive)
    unexplained = [m for m in alive if m.key not in known]
    for m in unexplained:
        print(f"unexplained survivor, {m.file}:{m.line}: {m.key}")
    rate = 1 - len(alive) / max(1, len(mutants))
    print(
        f"\n{len(mutants) - len(alive)} of {len(mutants)} mechanical mutants killed: {rate:.1%} (at least {ENOUGH:.0%}); {len(alive) - len(unexplained)} of {len(alive)} survivors explained"
    )
    records = [{"file": m.file, "line": m.line, "operator": m.operator, "key": m.key, "verdict": found[m.key].verdict, "by": found[m.key].by, "seconds": round(found[m.key].seconds, 2), "why": known.get(m.key, "")} for m in mutants]  # fmt: skip
    return rate >= ENOUGH and not unexplained, records


def table(mutants: Sequence[Mutant], alive: Sequence[Mutant]) -> None:
    """Killed of tried, by file and operator."""
    operators = [name for name in mutate.SHARES if any(m.operator == name for m in mutants)]
    tried, left = (Counter((m.file, m.operator) for m in ms) for ms in (mutants, alive))
    heads = ["file", *operators, "all"]
    lines = []
    for file in dict.fromkeys(m.file for m in mutants):
        cells = [(tried[file, o], left[file, o]) for o in operators]
        cells.append((sum(t for t, _ in cells), sum(s for _, s in cells)))
        lines.append([file, *("" if not t else f"{t - s}/{t}" for t, s in cells)])
    sums = [(sum(t for (_, o), t in tried.items() if o == name), sum(s for (_, o), s in left.items() if o == name)) for name in operators]
    lines.append(["all", *(f"{t - s}/{t}" for t, s in sums), f"{len(mutants) - len(alive)}/{len(mutants)}"])
    widths = [max(len(row[i]) for row in [heads, *lines]) for i in range(len(heads))]
    print("\nmechanical mutants, killed of tried")
    for row in [heads, *lines]:
        print("  " + row[0].ljust(widths[0]) + "  " + "  ".join(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True)))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--planted-only", action="store_true")
    parser.add_argument("--mechanical-only", action="store_true")
    parser.add_argument("--file", action="append", help="only faults and mutants of files whose path contains this")
    parser.add_argument("--sample", type=int, help="so many mechanical mutants")
    parser.add_argument("--again", type=Path, help="only the survivors in this record of an earlier run")
    parser.add_argument("--all", action="store_true", help="every mechanical mutant there is")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--json", type=Path, default=forking.ROOT / "build" / "mutants.json")
    asked = parser.parse_args()
    begun = time.monotonic()
    forking.prepare()

    def wanted(file: str) -> bool:
        return not asked.file or any(part in file for part in asked.file)

    good, record = True, {}
    if not asked.mechanical_only and (faults := [fault for fault in FAULTS if wanted(fault.file)]):
        well, record["planted"] = planted(faults, asked.workers)
        good = good and well
    if not asked.planted_only and (mutants := chosen([f for f in mutate.targets() if wanted(f)], asked.sample, asked.all)):
        if asked.again is not None:
            before = {r["key"] for r in json.loads(asked.again.read_text(encoding="utf-8"))["mechanical"] if r["verdict"] == "passed"}
            mutants = [m for m in mutants if m.key in before]
        well, record["mechanical"] = mechanical(mutants, asked.workers)
        good = good and well
    asked.json.parent.mkdir(parents=True, exist_ok=True)
    asked.json.write_text(json.dumps(record, indent=1, ensure_ascii=False), encoding="utf-8")
    print(f"{asked.json}, {time.monotonic() - begun:.0f} s")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
