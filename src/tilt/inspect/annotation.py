"""People compare answers: items, a journal of labels for each annotator, agreement, and the preference data that comes of it."""

from __future__ import annotations

import json
import math
import os
import random
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from itertools import combinations
from pathlib import Path
from typing import Any, Literal

from tilt.errors import DataError, UsageError
from tilt.runs.files import atomic_write

Task = Literal["pair", "rank", "score"]
TASKS: tuple[Task, ...] = ("pair", "rank", "score")
SCORES = (1, 5)


@dataclass(frozen=True)
class Item:
    """Answers to one prompt, as they were made; people see them in another order."""

    prompt: str
    answers: tuple[str, ...]


def order_of(item: int, count: int, annotator: str, seed: int) -> list[int]:
    """The order in which an annotator sees the answers of an item: a permutation from a hash, the same at every start, unlike for each annotator."""
    digest = blake2b(f"{seed}/{annotator}/{item}".encode(), digest_size=8).digest()
    order = list(range(count))
    random.Random(int.from_bytes(digest)).shuffle(order)
    return order


@dataclass
class Labels:
    """One annotator's labels in a folder: `items.jsonl` that all share, `labels-NAME.jsonl` that only grows, each line on disk before it counts."""

    folder: Path
    annotator: str
    task: Task
    seed: int = 0
    items: list[Item] = field(default_factory=list)
    done: dict[int, Any] = field(default_factory=dict)
    trail: list[int] = field(default_factory=list)

    @staticmethod
    def open(folder: Path, annotator: str, task: Task, seed: int = 0) -> Labels:
        """The folder's items, and what this annotator said of them so far; a torn last line is left out."""
        if not annotator or not all(c.isalnum() or c in "-_" for c in annotator) or len(annotator) > 60:
            raise UsageError(f"the annotator's name {annotator[:60]!r} becomes part of a file's name: letters, digits, - and _")
        found = Labels(folder, annotator, task, seed, read_items(folder))
        for line in journal(folder, annotator):
            found._take(line)
        return found

    @property
    def file(self) -> Path:
        return self.folder / f"labels-{self.annotator}.jsonl"

    def _take(self, line: Mapping[str, Any]) -> None:
        item = line.get("item")
        if not isinstance(item, int) or not 0 <= item < len(self.items):
            return
        if line.get("undo"):
            self.done.pop(item, None)
            self.trail = [i for i in self.trail if i != item]
            return
        self.done[item] = line.get("value")
        self.trail = [*(i for i in self.trail if i != item), item]

    @property
    def next(self) -> int | None:
        """The first item without a label, None when all have one."""
        return next((i for i in range(len(self.items)) if i not in self.done), None)

    def shown(self, item: int) -> list[int]:
        """The numbers of the answers in the order in which they are shown."""
        return order_of(item, len(self.items[item].answers), self.annotator, self.seed)

    def say(self, item: int, value: Any, seconds: float | None = None) -> None:
        """Store what was said of the answers as they were shown, by their own numbers: `left`, `right`, `tie` or `skip` of a pair; places of a ranking, 1 the
        best; scores."""
        if not 0 <= item < len(self.items):
            raise UsageError(f"there is no item {item}")
        kept = self._checked(item, value)
        line = {
            "item": item,
            "annotator": self.annotator,
            "task": self.task,
            "value": kept,
            "order": self.shown(item),
            "seconds": seconds,
            "time": round(time.time(), 3),
        }
        self._write(line)

    def undo(self) -> int | None:
        """Take the latest label back; the item that is without one again."""
        if not self.trail:
            return None
        item = self.trail[-1]
        self._write({"item": item, "annotator": self.annotator, "undo": True, "time": round(time.time(), 3)})
        return item

    def _write(self, line: Mapping[str, Any]) -> None:
        with self.file.open("ab") as file:
            if file.tell() and not _ends_whole(self.file):
                file.write(b"\n")
            file.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        self._take(line)

    def _checked(self, item: int, value: Any) -> Any:
        """The label by the answers' own numbers, or a sentence that says what is expected."""
        order = self.shown(item)
        if value == "skip":
            return "skip"
        if self.task == "pair":
            sides = {"left": order[0], "right": order[1], "tie": "tie"}
            if not isinstance(value, str) or value not in sides:
                raise UsageError(f"a pair is labelled left, right, tie or skip, not {str(value)[:40]!r}")
            return sides[value]
        low, high = (1, len(order)) if self.task == "rank" else SCORES
        if not isinstance(value, list) or len(value) != len(order) or not all(type(v) is int and low <= v <= high for v in value):
            raise UsageError(
                f"one whole number from {low} to {high} for each of the {len(order)} answers is expected, not {str(value)[:60]!r}"
            )
        kept = [0] * len(order)
        for place, own in enumerate(order):
            kept[own] = value[place]
        return kept


def _ends_whole(file: Path) -> bool:
    with file.open("rb") as stream:
        stream.seek(-1, 2)
        return stream.read(1) == b"\n"


def read_items(folder: Path) -> list[Item]:
    """The items of a folder."""
    try:
        lines = (folder / "items.jsonl").read_text(encoding="utf-8").splitlines()
        return [Item(str(row["prompt"]), tuple(map(str, row["answers"]))) for row in map(json.loads, lines)]
    except OSError:
        raise DataError(f"{folder} holds no items.jsonl: make one with `tilt label MODEL PROMPTS --out {folder}`") from None
    except (ValueError, KeyError, TypeError):
        raise DataError(f"{folder / 'items.jsonl'} is damaged: every line holds a prompt and a list of answers") from None


def write_items(folder: Path, given: Sequence[Item], about: Mapping[str, Any]) -> tuple[int, int]:
    """Write the items that can be compared, and what they are; how many were kept, and how many left out because all their answers are the same."""
    kept = [Item(item.prompt, distinct) for item in given if len(distinct := tuple(dict.fromkeys(item.answers))) > 1]
    folder.mkdir(parents=True, exist_ok=True)
    rows = [json.dumps({"prompt": item.prompt, "answers": list(item.answers)}, ensure_ascii=False) for item in kept]
    atomic_write(folder / "items.jsonl", "".join(row + "\n" for row in rows).encode("utf-8", "replace"))
    atomic_write(
        folder / "about.json", json.dumps(dict(about) | {"items": len(kept), "left_out_same": len(given) - len(kept)}, indent=1).encode()
    )
    if not kept:
        raise DataError("no prompt has two different answers: ask for more --answers, or a higher --temperature")
    return len(kept), len(given) - len(kept)


def journal(folder: Path, annotator: str) -> list[dict[str, Any]]:
    """The whole lines of an annotator's journal."""
    try:
        text = (folder / f"labels-{annotator}.jsonl").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    found = []
    for line in text.splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict):
            found.append(row)
    return found


def annotators(folder: Path) -> list[str]:
    return sorted(file.name[7:-6] for file in folder.glob("labels-*.jsonl"))


def every_label(folder: Path, task: Task) -> dict[str, dict[int, Any]]:
    """By annotator what each said of each item, skipped ones left out."""
    found = {name: Labels.open(folder, name, task).done for name in annotators(folder)}
    return {name: {i: v for i, v in done.items() if v != "skip"} for name, done in found.items()}


# --- agreement ------------------------------------------------------------------------------------------------------------------


def cohen(a: Sequence[Any], b: Sequence[Any]) -> float:
    """Cohen's κ = (p_o − p_e) / (1 − p_e) of two annotators on the same items, p_e from each one's own shares (Cohen 1960); nan where p_e is 1."""
    count = len(a)
    observed = sum(x == y for x, y in zip(a, b, strict=True)) / count
    first, second = Counter(a), Counter(b)
    expected = sum(first[k] * second[k] for k in first) / count**2
    return (observed - expected) / (1 - expected) if expected < 1 else math.nan


def fleiss(table: Sequence[Mapping[Any, int]]) -> float:
    """Fleiss' κ of items that were each labelled equally often: `table` counts the labels of each (Fleiss 1971)."""
    n = sum(table[0].values())
    assert n > 1 and all(sum(row.values()) == n for row in table), "each item is labelled equally often, twice or more"
    observed = sum(sum(c * c for c in row.values()) - n for row in table) / (len(table) * n * (n - 1))
    whole: Counter[Any] = Counter()
    for row in table:
        whole.update(row)
    expected = sum((c / (len(table) * n)) ** 2 for c in whole.values())
    return (observed - expected) / (1 - expected) if expected < 1 else math.nan


def krippendorff(units: Sequence[Sequence[Any]], *, ordinal: bool = False) -> float:
    """Krippendorff's α = 1 − D_o / D_e over units labelled by any number of annotators (units with one label count nowhere); nominal, or ordinal with
    δ²(c, k) = (Σ_{g=c..k} n_g − (n_c + n_k) / 2)² (Krippendorff 2004, ch. 11)."""
    units = [u for u in units if len(u) > 1]
    values = sorted({v for u in units for v in u}, key=lambda v: (str(type(v)), v))
    together: Counter[tuple[Any, Any]] = Counter()
    for unit in units:
        for i, x in enumerate(unit):
            for j, y in enumerate(unit):
                if i != j:
                    together[x, y] += 1 / (len(unit) - 1)  # type: ignore[assignment]
    sizes = {v: sum(together[v, w] for w in values) for v in values}
    count = sum(sizes.values())

    def apart(c: Any, k: Any) -> float:
        if c == k:
            return 0.0
        if not ordinal:
            return 1.0
        low, high = sorted((values.index(c), values.index(k)))
        return float(sum(sizes[v] for v in values[low : high + 1]) - (sizes[c] + sizes[k]) / 2) ** 2

    observed = sum(together[c, k] * apart(c, k) for c in values for k in values) / count if count else math.nan
    expected = sum(sizes[c] * sizes[k] * apart(c, k) for c in values for k in values) / (count * (count - 1)) if count > 1 else math.nan
    return 1 - observed / expected if expected and expected > 0 else math.nan


def kendall(a: Sequence[int], b: Sequence[int]) -> float:
    """Kendall's τ-b of two rankings or scores of the same answers: pairs in the same order less pairs in opposite orders, over the root of the pairs that neither
    ties in a and those that neither ties in b (Kendall 1945); nan where one ties all. 1 2 3 4, 1 3 2 4 → 4/6."""
    signs = [((x > y) - (x < y), (u > v) - (u < v)) for (x, u), (y, v) in combinations(zip(a, b, strict=True), 2)]
    first, second = sum(s != 0 for s, _ in signs), sum(t != 0 for _, t in signs)
    return sum(s * t for s, t in signs) / math.sqrt(first * second) if first and second else math.nan


def _tau(one: Mapping[int, Any], other: Mapping[int, Any]) -> float | None:
    """The mean τ over the items that both ranked or scored; None where none can be compared."""
    known = [t for i in one.keys() & other.keys() if not math.isnan(t := kendall(one[i], other[i]))]
    return sum(known) / len(known) if known else None


def agreement(folder: Path, task: Task) -> dict[str, Any]:
    """How far annotators agree on what several of them labelled: percent and Cohen's κ of each pair of them, Fleiss' κ where every one labelled the same items,
    Krippendorff's α over all. Rankings and scores are compared answer by answer, ordinally for α, and item by item by Kendall's τ."""
    said = every_label(folder, task)
    flat = {
        name: {(i, k): v for i, value in done.items() for k, v in (enumerate(value) if isinstance(value, list) else [(0, value)])}
        for name, done in said.items()
    }
    pairs = []
    for one, other in combinations(sorted(flat), 2):
        shared = sorted(flat[one].keys() & flat[other].keys())
        if shared:
            a, b = [flat[one][k] for k in shared], [flat[other][k] for k in shared]
            pairs.append(
                {
                    "annotators": [one, other],
                    "shared": len(shared),
                    "percent": 100 * sum(x == y for x, y in zip(a, b, strict=True)) / len(a),
                    "kappa": cohen(a, b),
                    "tau": None if task == "pair" else _tau(said[one], said[other]),
                }
            )
    units: dict[Any, list[Any]] = {}
    for labels in flat.values():
        for key, value in labels.items():
            units.setdefault(key, []).append(value)
    several = [u for u in units.values() if len(u) > 1]
    full = [Counter(u) for u in several if len(u) == len(flat)]
    return {
        "annotators": {name: len(done) for name, done in said.items()}, "pairs": pairs, "fleiss": fleiss(full) if len(flat) > 2 and full else None,
        "alpha": krippendorff(several, ordinal=task != "pair") if several else None,
    }  # fmt: skip


# --- what comes of it -----------------------------------------------------------------------------------------------------------


def preferences(folder: Path, task: Task) -> tuple[list[dict[str, Any]], Counter[str]]:
    """Rows that `tilt rm` and `tilt dpo` read, and what was left out: of each two answers the one that more annotators prefer, the votes beside it."""
    items, said = read_items(folder), every_label(folder, task)
    rows, left = [], Counter[str]()
    for i, item in enumerate(items):
        votes: Counter[tuple[int, int]] = Counter()
        any_label = False
        for done in said.values():
            if i in done:
                any_label = True
                votes.update(beats(done[i], len(item.answers), task))
        if not any_label:
            left["items without a label"] += 1
            continue
        for a, b in combinations(range(len(item.answers)), 2):
            forward, back = votes[a, b], votes[b, a]
            if forward == back:
                left["pairs without a winner (ties, or as many votes each way)"] += 1
                continue
            winner, loser = (a, b) if forward > back else (b, a)
            rows.append(
                {
                    "prompt": item.prompt,
                    "chosen": item.answers[winner],
                    "rejected": item.answers[loser],
                    "votes": max(forward, back),
                    "votes_against": min(forward, back),
                }
            )
    return rows, left


def beats(value: Any, count: int, task: Task) -> list[tuple[int, int]]:
    """Which answer beat which: of a pair the winner, of a ranking every lower place, of scores every higher number."""
    if task == "pair":
        return [] if value == "tie" else [(value, 1 - value)]
    better = (lambda x, y: x < y) if task == "rank" else (lambda x, y: x > y)
    return [(a, b) for a in range(count) for b in range(count) if better(value[a], value[b])]


def write_preferences(folder: Path, task: Task) -> tuple[Path, int, Counter[str]]:
    """preferences.jsonl in the folder; its place, rows, and what was left out."""
    rows, left = preferences(folder, task)
    place = folder / "preferences.jsonl"
    atomic_write(place, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode("utf-8", "replace"))
    return place, len(rows), left
