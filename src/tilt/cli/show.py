"""What `tilt` shows: the table of algorithms, settings, data, runs and the environment."""

from __future__ import annotations

import json as json_text
import os
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from tilt.errors import UsageError
from tilt.runs.text import duration, inert, middle
from tilt.runs.text import number as shown_number


def _print(*what: Any) -> None:
    console = Console(highlight=False, markup=False)
    if not console.is_terminal:
        console.width = 200
    for item in what:
        console.print(item)


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for number, column in enumerate(columns):
        table.add_column(
            column, justify="right" if number in right else "left", overflow="fold", no_wrap=number == 0 and column == "algorithm"
        )
    for row in rows:
        table.add_row(*(Text(inert(cell, newline="\n")) for cell in row))
    return table


def show_settings(command: str) -> None:
    """Every setting of a recipe, its default and its meaning."""
    from tilt.cli.recipes import RECIPES, settings

    usage = f"usage: tilt {command} [RECIPE.yaml …] [key.sub=value | --key.sub value …] [--dry-run] [--quiet] [--overwrite] [--traceback]"
    if command == "run":
        _print(
            Text(usage),
            Text(f"The file says which recipe: `recipe:` is one of {', '.join(RECIPES)}. Their settings: `tilt sft --help` and so on."),
        )
        return
    if command == "label":
        from tilt.cli.annotate import USAGE

        usage = f"usage: {USAGE}\n\n{usage}"
    _print(Text(usage + "\n"), _table(("setting", "default", "meaning"), settings(command)))


def show_algorithms(name: str, words: Sequence[str]) -> None:
    """THE TABLE; the card of one row, changed or your own; or where the cards of two differ (changes are the second's)."""
    from tilt.config import Document, override
    from tilt.objectives import ALGORITHMS, PREFERENCES
    from tilt.objectives.card import card, compared
    from tilt.parity import PAIR_PRESETS, PRESETS, described
    from tilt.recipes import variants

    if not name:
        for table in (ALGORITHMS, PREFERENCES):
            slots = [f.name for f in fields(next(iter(table.values())))]  # type: ignore[arg-type]
            rows = [[key.replace("_", "-"), *(_cell(slot, getattr(row, slot)) for slot in slots)] for key, row in table.items()]
            _print(_table(("algorithm", *slots), rows), Text(""))
        _print(
            Text(
                f"Rows as other libraries compute them, docs/parity.md: {', '.join(name.replace('_', '-') for name in (*PRESETS, *PAIR_PRESETS))}\n"
            )
        )
        _print(Text("`tilt algorithms NAME` shows formulas; `tilt NAME recipe.yaml` trains; `algorithm: file.py:NAME` is one of your own."))
        return
    others, changes = [word for word in words if "=" not in word], [word for word in words if "=" in word]
    if len(others) > 1:
        raise UsageError(f"two cards can be compared, not {len(others) + 1}: name one or two algorithms")
    document = Document()
    override(document, changes)

    def row_of(algorithm: str, changed: bool) -> Any:
        plain = algorithm.replace("-", "_")
        if plain in PRESETS:
            return variants.override(PRESETS[plain].row, document.values if changed else {})
        find = variants.resolve_preference if variants.judges(algorithm) else variants.resolve
        return find(algorithm, document.values if changed else {})[1]

    if others:
        differences = compared(row_of(name, False), row_of(others[0], True))
        _print(_table(("", name, " ".join([others[0], *changes])), differences) if differences else Text("the two cards say the same"))
        return
    row = row_of(name, True)
    preset = name.replace("-", "_")
    more = ["", *described(preset, {})] if preset in PRESETS or preset in PAIR_PRESETS else variants.origin(name).lines(row)[1:]
    _print(Text(card(row)), *(Text(line) for line in more))


def _cell(slot: str, piece: Any) -> str:
    """A piece as configuration spells it; nothing where the slot is empty."""
    from tilt.objectives.words import spelled

    text = spelled(slot, piece)
    return "" if text in ("none", "even") else text


def show_data(source: str, tokenizer: str, want: str, examples: int) -> None:
    """Columns, detected type, counts, lengths and examples; with a tokenizer token by token, with what is trained."""
    from tilt.data import formats, sources

    found = sources.load(source)
    columns = dict.fromkeys(name for row in found.rows for name in row)
    _print(Text(f"{found.name}: {len(found.rows):,} rows from {', '.join(str(f) for f in found.files)}"))
    kinds = [(name, _kinds([row.get(name) for row in found.rows]), _filled([row.get(name) for row in found.rows])) for name in columns]
    _print(_table(("column", "type", "filled"), kinds), Text(""))
    readings = [r for r in formats.readings(found.rows) if not want or r == want]
    if not readings:
        asked: Any = want or "sft"
        formats.read(found.rows, want=asked, source=found.name)
        raise UsageError(f"{found.name} cannot be read as {want}: it can be read as {', '.join(formats.readings(found.rows)) or 'nothing'}")
    dataset = formats.read(found.rows, want=readings[0], source=found.name)
    others = f" (also possible: {', '.join(readings[1:])})" if readings[1:] else ""
    _print(Text(dataset.summary() + others))
    texts = {
        key: [_plain(row[key]) for row in dataset.rows if key in row]
        for key in ("text", "prompt", "messages", "completion", "steps", "chosen", "rejected")
    }
    _print(
        _table(
            ("characters", "min", "median", "max", "histogram"),
            [[key, *_spread([len(v) for v in values])] for key, values in texts.items() if values],
            (1, 2, 3),
        )
    )
    shown = dataset.rows[:examples]
    if tokenizer:
        _print(*(Text(inert(line, newline="\n")) for line in _tokens(shown, dataset, tokenizer)))
        return
    for number, row in enumerate(shown):
        parts = [f"  {key}: {middle(inert(_plain(row[key])), 600)}" for key in texts if key in row]
        _print(Text(f"\nexample {number}\n" + "\n".join(parts)))


def _tokens(rows: Sequence[dict[str, Any]], dataset: Any, tokenizer: str) -> list[str]:
    from tilt.data.rendering import renderer, show
    from tilt.data.steps import SEPARATOR, stepwise
    from tilt.models import compat, loading

    compat.quiet()
    name = loading.located(tokenizer)
    words = loading.reading(name, lambda: compat.read_tokenizer(name))
    render = renderer(words, "auto", conversational=dataset.conversational)
    lines = []
    for number, row in enumerate(rows):
        if dataset.kind == "stepwise":
            lines.append(f"\nexample {number}: {show(stepwise(render, SEPARATOR, row, number).marked, words)}")
            continue
        if dataset.kind == "preference":
            pair = [{**row, "completion": row[side]} for side in ("chosen", "rejected")]
        else:
            pair = [row]
        for answered in pair:
            trained = any(key in answered for key in ("completion", "messages", "text"))
            lines.append(
                f"\nexample {number}: "
                + (show(render.demonstration(answered, number), words) if trained else _asked(render.prompt(answered, number), words))
            )
    return lines


def _asked(prompt: Any, words: Any) -> str:
    return f"{len(prompt.tokens)} tokens, a prompt\n" + str(words.decode(list(prompt.tokens)))


def _plain(value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        return "\n".join(f"{m.get('role', '?')}: {m.get('content', '')}" if isinstance(m, dict) else str(m) for m in value)
    return str(value)


def _kinds(values: Sequence[Any]) -> str:
    counts = Counter(type(v).__name__ for v in values if v is not None)
    return " | ".join(f"{kind}" + (f" ({n})" if len(counts) > 1 else "") for kind, n in counts.most_common()) or "null"


def _filled(values: Sequence[Any]) -> str:
    filled = sum(v is not None and v != "" and v != [] for v in values)
    return "all" if filled == len(values) else f"{filled:,} of {len(values):,}"


def _spread(lengths: Sequence[int], bins: int = 24) -> tuple[str, str, str, str]:
    """Least, median, greatest, and the counts of equal bins between as blocks."""
    ordered = sorted(lengths)
    width = max(1, (ordered[-1] - ordered[0]) // bins + 1)
    counts = Counter((n - ordered[0]) // width for n in ordered)
    top = max(counts.values())
    bars = "".join(" ▁▂▃▄▅▆▇█"[-(-8 * counts.get(i, 0) // top)] for i in range((ordered[-1] - ordered[0]) // width + 1))
    return f"{ordered[0]:,}", f"{ordered[len(ordered) // 2]:,}", f"{ordered[-1]:,}", f"|{bars}|"


def get_data(name: str) -> None:
    """Fetch a public set; without a name list them."""
    from tilt.data import public

    if not name:
        _print(_table(("name", "licence", "for"), [(s.name, s.licence, s.purpose) for s in public.SETS.values()]))
        return
    folder = public.get(name)
    print(f"{folder}\n`data: {name}` in a recipe reads it; `tilt data show {name}` shows it")


def show_runs(root: str, json: bool) -> None:
    """The runs under `root`, the newest first."""
    from tilt.runs.listing import listed

    found = listed(Path(root))
    if json:
        print(json_text.dumps([{**asdict(run), "age_seconds": round(run.age_seconds, 1)} for run in found], indent=2))
        return
    if not found:
        print(f"no runs in {root}/")
        return
    rows = [
        (
            r.name,
            r.status,
            r.recipe,
            r.model,
            "–" if r.step is None else str(r.step),
            "–" if r.reward is None else shown_number(r.reward),
            duration(r.age_seconds),
        )
        for r in found
    ]
    _print(_table(("run", "status", "algorithm", "model", "step", "reward", "age"), rows, (4, 5, 6)))


def show_environment() -> None:
    """Versions, devices, memory, threads and writable caches."""
    import torch

    from tilt.data.public import cache_directory
    from tilt.runs.directory import environment

    found = environment()
    print(f"tilt {found['tilt']}, python {found['python']}, {found['platform']}")
    print(", ".join(f"{name} {version or 'missing'}" for name, version in found["packages"].items()))
    devices = [
        f"{torch.cuda.get_device_name(i)} ({torch.cuda.get_device_properties(i).total_memory / 2**30:.0f} GiB)"
        for i in range(torch.cuda.device_count())
    ]
    print(f"devices: {', '.join(devices) or 'cpu only'}; processors {found['processors']}, threads {found['threads']}")
    print(f"memory: {_memory()}; disk here: {shutil.disk_usage('.').free / 2**30:.1f} GiB free")
    hub = Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface")
    for name, folder in (("data cache", cache_directory()), ("hub cache", hub)):
        print(f"{name}: {folder} ({'writable' if _writable(folder) else 'NOT writable'})")
    print(f"TILT_DATA: {os.environ.get('TILT_DATA') or 'not set'}; HF_HUB_OFFLINE: {os.environ.get('HF_HUB_OFFLINE') or 'not set'}")
    print(f"git: {found['git']['commit'][:12] if found['git'] else 'no repository here'}")


def _memory() -> str:
    try:
        lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        return f"{int(lines['MemTotal'].split()[0]) / 2**20:.1f} GiB, {int(lines['MemAvailable'].split()[0]) / 2**20:.1f} GiB free"
    except (OSError, KeyError, ValueError):
        return "unknown"


def _writable(folder: Path) -> bool:
    """Whether the folder, or the nearest one above it that exists, can be written."""
    while not folder.exists():
        folder = folder.parent
    return os.access(folder, os.W_OK)
