"""`make fuzz`: every target for its share of the minutes, in a process of its own; examples a second, and each failure made as small as it gets.

python tests/fuzz/fuzzing.py --minutes 10 [--only WORD] [--seed N]; exit code 1 where a target failed or died.
"""

from __future__ import annotations

import argparse
import faulthandler
import importlib
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
MODULES = sorted(path.stem for path in HERE.glob("fuzz_*.py"))
STUCK = 30
"""Seconds after which an example that nothing can interrupt ends its process, with a trace."""


def targets() -> dict[str, Any]:
    """Every target of the modules beside this one, by name."""
    sys.path[:0] = [str(HERE), str(HERE.parent / "lib")]
    return {target.name: target for module in MODULES for target in importlib.import_module(module).TARGETS}


def folders() -> Iterator[Path]:
    """Empty folders, one after the other; each is gone when the next is asked for."""
    while True:
        with tempfile.TemporaryDirectory() as folder:
            yield Path(folder)


def examine(target: Any, examples: int, seed: int | None, seconds: float = float("inf")) -> int:
    """Feed a target that many examples, or until the time is up; how many it read. `seed` None: always the same ones. A failure is raised at its smallest."""
    import hypothesis
    from hypothesis import HealthCheck, Phase, given, settings

    places, ends, read = folders(), time.monotonic() + seconds, 0

    def one(example: Any) -> None:
        nonlocal read
        if time.monotonic() > ends:
            return
        read += 1
        place = next(places)
        if seed is not None:
            faulthandler.dump_traceback_later(STUCK, exit=True)
        try:
            target.check(example, place)
        finally:
            faulthandler.cancel_dump_traceback_later()

    plan = settings(
        max_examples=examples, deadline=None, derandomize=seed is None, database=None, print_blob=False, report_multiple_bugs=False,
        suppress_health_check=list(HealthCheck), phases=(Phase.generate, Phase.shrink),
    )  # fmt: skip
    test = plan(given(target.examples)(one))
    (test if seed is None else hypothesis.seed(seed)(test))()
    return read


def alone(name: str, minutes: float, seed: int) -> int:
    """One target in this process for so long: prints its examples a second, or how it failed."""
    faulthandler.enable()
    target, began, read = targets()[name], time.monotonic(), 0
    while (left := 60 * minutes - (time.monotonic() - began)) > 0:
        try:
            read += examine(target, 200, seed + read, left)
        except BaseException as error:
            print(f"FAILED  {name} after {time.monotonic() - began:.0f} s, seed {seed + read}: {type(error).__name__}: {str(error)[:500]}")
            traceback.print_exc(limit=-8, file=sys.stdout)
            return 1
    print(f"ok      {name}: {read:,} examples, {read / (time.monotonic() - began):.1f} a second", flush=True)
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--only", default="", help="targets whose name holds this word")
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--alone", default="", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.alone:
        return alone(asked.alone, asked.minutes, asked.seed)
    names = [name for name in targets() if asked.only in name]
    if not names:
        parser.error(f"no target holds {asked.only!r}: {', '.join(targets())}")
    print(f"{len(names)} targets, {asked.minutes:g} minutes in all, seed {asked.seed}", flush=True)
    share, failed = asked.minutes / len(names), []
    for name in names:
        call = [sys.executable, __file__, "--alone", name, "--minutes", f"{share:.4f}", "--seed", str(asked.seed)]
        try:
            code = subprocess.run(call, check=False, timeout=60 * share + 120).returncode
        except subprocess.TimeoutExpired:
            print(f"FAILED  {name}: does not come to an end")
            code = 1
        if code:
            failed.append(name)
            print(f"        {name}: exit code {code}{' (killed by a signal)' if code < 0 else ''}", flush=True)
    print(f"{len(names) - len(failed)} of {len(names)} targets without a failure" + (f"; failed: {', '.join(failed)}" if failed else ""))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
