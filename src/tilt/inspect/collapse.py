"""Where answers come apart: they repeat themselves, say what the reference never would, find no end; and since when a run's answers do. No torch."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from tilt.inspect.tables import Floats, Rows, cut, number

if TYPE_CHECKING:
    from tilt.inspect.changed import Tokens


def repeats_from(items: Sequence[str], *, times: int = 4) -> int | None:
    """Where the tail of an answer begins to repeat itself, the first time not counted; None where nothing repeats so.

    The first item of the earliest run of at least `times` equal blocks (of 1 to 8 items, 8 characters in all) that goes on to the end: `ha ha! x! x! x! x!` → 3;
    or where `echoes_from` finds earlier that the tail is pieced together from what was said before.
    """
    count, best = len(items), None
    for width in range(1, 9):
        if count < width * times:
            break
        same = 0
        while same + width < count and items[count - 1 - same] == items[count - 1 - same - width]:
            same += 1
        if same >= width * (times - 1) and sum(map(len, items[count - same - width :])) >= 8:
            start = count - same
            best = start if best is None or start < best else best
    loose = echoes_from(items)
    return loose if best is None else best if loose is None else min(best, loose)


ECHO, SURPLUS, SPAN = 0.6, 5.0, 9


def echoes_from(items: Sequence[str]) -> int | None:
    """Where an answer's tail begins to be nothing but echoes of the answer itself, loosely: the start of the tail in which runs of items (three, or as many as
    make nine characters on average) that came before exceed 60 % by most, where the excess is five items or more (a tail of 13 that repeats itself throughout,
    of 50 with 70 %)."""
    if not items:
        return None
    width = max(3, math.ceil(SPAN * len(items) / max(1, sum(map(len, items)))))
    seen: set[tuple[str, ...]] = set()
    echoes = []
    for i in range(len(items)):
        run = tuple(items[max(0, i - width + 1) : i + 1])
        echoes.append(len(run) == width and run in seen)
        seen.add(run)
    excess, most, start = 0.0, 0.0, 0
    for i in range(len(items) - 1, -1, -1):
        excess += echoes[i] - ECHO
        if excess > most:
            most, start = excess, i
    return max(0, start - width + 1) if most >= SURPLUS else None


WORDS = re.compile(r"\s?[^\W_]+|\s?[^\w\s]|\s|_")

FLAGS = 200
APART = ("repetition", "away from the reference")
FEWEST, UNLIKELY, AWAY = 8, -4.0, 2.0


def strays_from(reference: Floats, delta: Floats) -> int | None:
    """Where the tail of an answer leaves the reference: the place that parts likely from unlikely tokens best (largest sum of squares between the two means of
    log π_ref), where 8 tokens or more follow, on average at most e⁻⁴ likely to the reference and e² times likelier to the policy. −1 −1 −9 … −9 → 2."""
    count = len(reference)
    if count < FEWEST or np.isnan(reference).any() or np.isnan(delta).any():
        return None
    reference = np.maximum(reference.astype(np.float64), -50.0)
    head = np.arange(count)
    before = np.concatenate([[0.0], np.cumsum(reference)])
    tail = (before[-1] - before[:-1]) / (count - head)
    front = before[:-1] / np.maximum(head, 1)
    start = int(np.argmax(np.where(front > tail, head * (count - head) * (front - tail) ** 2, 0.0)))
    start = 0 if front[start] <= UNLIKELY else start  # nothing is likely before it either
    return start if count - start >= FEWEST and tail[start] <= UNLIKELY and float(np.minimum(delta[start:], 50.0).mean()) >= AWAY else None


def _strays(tokens: Tokens) -> dict[int, int]:
    """By row the place where it leaves the reference, for the rows that do."""
    reference, delta = tokens.channel("reference_logprobs"), tokens.channel("delta_ref")
    if reference is None or delta is None or not tokens.count:
        return {}
    edges = np.flatnonzero(np.diff(tokens.row)) + 1
    found = {}
    for a, b in zip([0, *edges.tolist()], [*edges.tolist(), tokens.count], strict=True):
        if (start := strays_from(reference[a:b], delta[a:b])) is not None:
            found[int(tokens.row[a])] = start
    return found


def collapses(rows: Rows, tokens: Tokens) -> list[dict[str, Any]]:
    """Answers that have come apart: the token from which the tail repeats itself, or is nothing the reference would say, no stop, and texts that are no text."""
    found: list[dict[str, Any]] = []
    by_row: dict[int, list[str]] = {}
    places: dict[int, list[int]] = {}
    for text, row, place in zip(tokens.text, tokens.row.tolist(), tokens.place.tolist(), strict=True):
        by_row.setdefault(row, []).append(text)
        places.setdefault(row, []).append(place)
    strays = _strays(tokens)
    finish = rows.plain("finish_reason")
    for i, completion in enumerate(rows.completions):
        items = by_row.get(i) or WORDS.findall(completion)
        if finish[i] == "stop" and items and by_row.get(i):
            items = items[:-1] if items[-1].startswith("#") or items[-1] == "" else items
        starts = (repeats_from(items[: len(items) - k]) for k in range(3))  # an answer may be cut inside its last repetition
        start = next((place for place in starts if place is not None), None)
        if start is not None:
            head = "".join(items[:start])
            found.append(
                {
                    "name": "repetition",
                    "row": i,
                    "position": places[i][start] if by_row.get(i) else None,
                    "text": f"repeats itself from here on; before it: {cut(head, 120)!r}",
                }
            )
        elif i in strays:
            found.append(
                {
                    "name": "away from the reference",
                    "row": i,
                    "position": places[i][strays[i]],
                    "text": f"from here on the reference finds it incredible; before it: {cut(''.join(by_row[i][: strays[i]]), 120)!r}",
                }
            )
        elif finish[i] == "length":
            found.append(
                {"name": "missing stop", "row": i, "position": None, "text": "cut at the longest length allowed, without a stop token"}
            )
        if completion.count("\ufffd") > max(1, len(completion) // 20):
            found.append(
                {
                    "name": "invalid text",
                    "row": i,
                    "position": None,
                    "text": f"{completion.count(chr(0xFFFD))} characters are no valid text",
                }
            )
    return found


def collapse_over(steps: Iterable[Tokens], *, share: float = 0.25) -> dict[str, Any] | None:
    """Where a run's answers begin to come apart: the first stored step in which a quarter of the answers repeat themselves or leave the reference (and keep doing so
    in the next), the median token at which they do, and the intact head of one that is like the others; and since when as many find no end (`endless`), where they
    did at first. None where nothing comes apart and answers end."""
    seen: list[tuple[int, float, float, list[dict[str, Any]]]] = []
    for tokens in steps:
        rows = tokens.rows
        flags = [flag for flag in collapses(rows, tokens) if flag["name"] != "invalid text"]
        bad, size = [flag for flag in flags if flag["name"] in APART], max(1, rows.count)
        cut_off = sum(reason == "length" for reason in rows.plain("finish_reason"))
        seen.append((rows.step, len(bad) / size, cut_off / size, bad))

    def first(shares: Sequence[float]) -> int | None:
        return next((k for k, part in enumerate(shares) if part >= share and shares[min(k + 1, len(shares) - 1)] >= share), None)

    begins, endless = first([line[1] for line in seen]), first([line[2] for line in seen])
    found = {} if not endless else {"endless": {"step": seen[endless][0], "share": number(seen[endless][2])}}
    if begins is None:
        return {"step": None} | found if found else None
    step, part, _, bad = seen[begins]
    placed = [flag for flag in bad if flag["position"] is not None]
    middle = int(np.median([flag["position"] for flag in placed])) if placed else None
    typical = min(placed, key=lambda flag: abs(flag["position"] - middle)) if middle is not None else bad[0]
    return {"step": step, "share": number(part), "position": middle, "row": typical["row"], "text": typical["text"]} | found
