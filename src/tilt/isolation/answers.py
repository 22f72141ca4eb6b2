"""Programs in answers, run against tests: this file is loaded by the worker of a `code` reward."""

from __future__ import annotations

import json
import secrets
import sys
from typing import Any

from tilt.isolation import programs

PYTHON = [sys.executable, "-s", "-P", "-B"]
HARNESS = """
import json, os
def run():
    with os.fdopen(3, "rb") as file:
        given = json.load(file)
    space = {"__name__": "answer", "__builtins__": __builtins__}
    exec(compile(given["program"], "answer.py", "exec"), space)
    exec(compile(given["test"], "test.py", "exec"), space)
    os.write(4, given["proof"].encode())
run()
"""

ROOM: programs.Room | None = None


def room() -> programs.Room:
    global ROOM
    ROOM = ROOM or programs.room()
    return ROOM


def report() -> dict[str, bool]:
    """What the programs are kept from on this machine."""
    found = room()
    return {"offline": found.offline, "read_only": found.read_only}


def score(completions: list[str], tests: list[list[Any] | None], limits: dict[str, Any], program: str, every: bool) -> list[float | None]:
    """The share of its tests that each answer's program passes, with `every` 1 where it passes all and else 0; None where there are no tests."""
    bounds, known = programs.Limits(**limits), dict[tuple[str, str], bool]()

    def passed(text: str, test: Any) -> bool:
        key = (text, json.dumps(test))
        if key not in known:
            known[key] = passes(text, test, bounds)
        return known[key]

    return [
        None if own is None else scored(extract(text, program), own, every, passed) for text, own in zip(completions, tests, strict=True)
    ]


def scored(text: str | None, tests: list[Any], every: bool, passed: Any) -> float:
    if text is None:
        return 0.0
    return float(all(passed(text, test) for test in tests)) if every else sum(passed(text, test) for test in tests) / len(tests)


def extract(text: str, program: str) -> str | None:
    """The program in an answer: the last fenced block, an unclosed one too; `auto` takes the whole answer where there is none, `whole` always."""
    block: list[str] | None = None
    inside, fence = False, ""
    for line in [] if program == "whole" else text.splitlines(keepends=True):
        bare = line.strip()
        if inside and bare == fence:
            inside = False
        elif inside and block is not None:
            block.append(line)
        elif not inside and bare.startswith("```"):
            inside, block, fence = True, [], "`" * (len(bare) - len(bare.lstrip("`")))
    if block is None:
        return None if program == "fenced" or not text.strip() else text
    return "".join(block)


def passes(program: str, test: Any, limits: programs.Limits) -> bool:
    """Whether a program prints what is expected for an input, or survives an assertion; an end before the assertion was reached is no success."""
    source = program.encode("utf-8", "replace")
    if isinstance(test, list):
        ended = programs.run([*PYTHON, "answer.py"], {"answer.py": source}, test[0].encode("utf-8", "replace"), limits, room())
        return ended.code == 0 and lines(ended.output.decode("utf-8", "replace")) == lines(test[1])
    proof = secrets.token_hex(16)
    given = json.dumps({"program": source.decode(), "test": test, "proof": proof}).encode()
    return programs.run([*PYTHON, "-c", HARNESS], {}, b"", limits, room(), given).proof == proof.encode()


def lines(text: str) -> list[str]:
    """The lines of an output without blanks at their ends, and without empty lines at its end."""
    return [line.rstrip() for line in text.rstrip().splitlines()]
