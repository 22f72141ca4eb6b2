"""`tilt label MODEL PROMPTS`: people compare answers, on a page or on the terminal."""

from __future__ import annotations

import argparse
import getpass
import json
import math
import re
import sys
import time
import webbrowser
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tilt.data import sources
from tilt.errors import DataError, UsageError
from tilt.inspect.annotation import TASKS, Item, Labels, agreement, read_items, write_items, write_preferences
from tilt.inspect.annotation_server import Desk, LabelServer
from tilt.inspect.terminal import visible

USAGE = """tilt label MODEL PROMPTS [options]   answers of a model to prompts, compared by people
       tilt label FILE [options]           answers that a file holds already (prompt, answers | chosen, rejected | several rows a prompt)
       tilt label FOLDER [options]         go on where an annotator stopped, or with another annotator
       tilt label [RECIPE.yaml] key=value  labelled by a judge instead: `tilt label --help`"""


def for_people(words: Sequence[str]) -> bool:
    """Whether words name a model, a file or a folder rather than settings of the recipe that asks a judge."""
    return any(re.match(r"--(agreement|export)\b", w) for w in words) or any(
        not w.startswith("-") and "=" not in w and not w.endswith((".yaml", ".yml")) for w in words[:1]
    )


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(prog="tilt label", usage=USAGE, add_help=False, allow_abbrev=False, exit_on_error=False)
    found.error = _refuse  # type: ignore[method-assign, assignment]
    found.add_argument("paths", nargs="*")
    found.add_argument("--answers", type=int, default=2)
    found.add_argument("--task", choices=TASKS, default=None)
    found.add_argument("--out", default="")
    found.add_argument("--annotator", default="")
    found.add_argument("--seed", type=int, default=0)
    found.add_argument("--n", type=int, default=100)
    found.add_argument("--max-tokens", type=int, default=128)
    found.add_argument("--temperature", type=float, default=1.0)
    found.add_argument("--guide", default="")
    found.add_argument("--text", action="store_true")
    found.add_argument("--port", type=int, default=0)
    found.add_argument("--no-browser", action="store_true")
    found.add_argument("--agreement", default="")
    found.add_argument("--export", default="")
    return found


def _refuse(message: str) -> None:
    raise UsageError(f"{message}\n{USAGE}")


def run(words: Sequence[str]) -> None:
    """Make the items where they are not there yet, and let a person label."""
    try:
        given = parser().parse_args(list(words))
    except argparse.ArgumentError as error:
        raise UsageError(f"{error}\n{USAGE}") from None
    if given.agreement or given.export:
        _summary(Path(given.agreement or given.export), export=bool(given.export))
        return
    folder, task = prepared(given)
    labels = Labels.open(folder, given.annotator or re.sub(r"[^\w-]", "", _user()) or "me", task, given.seed)
    guide = _guide(given.guide)
    if given.text:
        on_terminal(labels, guide)
    else:
        on_page(labels, guide, given.port, browser=not given.no_browser)
    _told(folder, task)


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return "me"


def _guide(file: str) -> str:
    if not file:
        return ""
    try:
        return Path(file).read_text(encoding="utf-8", errors="replace")[:100_000]
    except OSError as error:
        raise DataError(f"the guide {file} cannot be read: {error.strerror}") from None


def prepared(given: argparse.Namespace) -> tuple[Path, Any]:
    """The folder with items, and the task; new items are made from a file, or sampled from a model once and kept."""
    if not 1 <= len(given.paths) <= 2 or given.answers < 2 or given.n < 1:
        raise UsageError(f"name a model and prompts, a file of answers, or a folder; --answers is at least 2, --n at least 1\n{USAGE}")
    first = Path(given.paths[0])
    if len(given.paths) == 1 and (first / "items.jsonl").is_file():
        about = _about(first)
        return first, given.task or about.get("task") or "pair"
    task = given.task or ("rank" if given.answers > 2 else "pair")
    if task == "pair" and given.answers != 2:
        raise UsageError(f"a pair has two answers, and --answers is {given.answers}: choose --task rank or score")
    folder = Path(given.out or f"labels/{(Path(given.paths[-1]).stem or 'labels')}")
    if (folder / "items.jsonl").exists():
        read_items(folder)
        return folder, given.task or _about(folder).get("task") or task
    items = from_file(first, given.n) if len(given.paths) == 1 else sampled(given)
    if task == "pair":
        items = [Item(item.prompt, tuple(dict.fromkeys(item.answers))[:2]) for item in items]
    count, same = write_items(
        folder,
        items,
        {"task": task, "source": given.paths, "seed": given.seed, "temperature": given.temperature, "max_tokens": given.max_tokens},
    )
    print(f"{count} items in {folder}" + (f"; {same} left out, whose answers are all the same" if same else ""))
    return folder, task


def _about(folder: Path) -> dict[str, Any]:
    try:
        found = json.loads((folder / "about.json").read_text(encoding="utf-8"))
        return found if isinstance(found, dict) else {}
    except (OSError, ValueError):
        return {}


def from_file(path: Path, count: int) -> list[Item]:
    """Answers that a file holds: a list `answers`, the two of a pair, or several rows with one prompt."""
    rows = sources.load(str(path)).rows
    groups: dict[str, list[str]] = {}
    for row in rows:
        prompt = row.get("prompt")
        if not isinstance(prompt, str):
            raise DataError(f"{path} has no texts under `prompt`; a model's answers are asked for with `tilt label MODEL {path}`")
        held: Any = row.get("answers")
        texts = [row[name] for name in ("chosen", "rejected", "completion") if isinstance(row.get(name), str)]
        answers = held if isinstance(held, list) else texts
        groups.setdefault(prompt, []).extend(str(a) for a in answers)
    items = [Item(prompt, tuple(answers)) for prompt, answers in groups.items() if len(answers) > 1]
    if not items:
        raise DataError(f"no prompt of {path} has two answers: to have a model answer them, `tilt label MODEL {path}`")
    return items[:count]


def sampled(given: argparse.Namespace) -> list[Item]:
    """Answers of a model, sampled once."""
    from dataclasses import replace

    from tilt.cli.talk import speaker
    from tilt.sampling.sampler import Sampler

    rows = sources.load(given.paths[1], limit=given.n).rows
    prompts = [row.get("prompt") if isinstance(row.get("prompt"), str) else row.get("text") for row in rows]
    if not all(isinstance(prompt, str) for prompt in prompts):
        raise DataError(f"{given.paths[1]} has rows without a text under `prompt`")
    found = speaker(given.paths[0], given.temperature, given.max_tokens)
    asked = [found.render.prompt({"prompt": text}, number) for number, text in enumerate(prompts)]
    sampler = Sampler(found.lm, found.tokenizer, replace(found.sampling, temperature=1.0), seed=given.seed)
    answers: list[list[str]] = [[] for _ in prompts]
    for rollout in sampler.evaluate(asked, given.answers, step=0, sampling=found.sampling, stream="label"):
        answers[rollout.prompt.id].append(found.text(rollout.tokens))
    return [Item(str(prompt), tuple(texts)) for prompt, texts in zip(prompts, answers, strict=True)]


def on_page(labels: Labels, guide: str, port: int, *, browser: bool) -> None:
    """Serve the desk until it is interrupted."""
    try:
        server = LabelServer(Desk(labels, guide), port)
    except OSError as error:
        raise UsageError(f"cannot listen on port {port}: {error}") from None
    print(
        f"{server.url}   ({len(labels.items) - len(labels.done)} of {len(labels.items)} to label as {labels.annotator}; Ctrl-C ends, labels are kept)",
        flush=True,
    )
    if browser and sys.stdout.isatty():
        webbrowser.open(server.url)
    try:
        server.serve_forever(poll_interval=0.2)
    except KeyboardInterrupt:
        print()
    finally:
        server.server_close()


def on_terminal(labels: Labels, guide: str, ask: Callable[[str], str] = input) -> None:
    """One item after the other, answered by a line."""
    if guide:
        print(visible(guide).replace("↵", "\n"))
    low, high = (1, 0) if labels.task == "pair" else (1, len(labels.items[0].answers)) if labels.task == "rank" else (1, 5)
    help_ = (
        "1 | 2 | 0 tie | s skip | u undo | q quit"
        if labels.task == "pair"
        else f"{'places' if labels.task == 'rank' else 'scores'} {low} to {high}, one for each answer | s skip | u undo | q quit"
    )
    while (item := labels.next) is not None:
        shown = [labels.items[item].answers[k] for k in labels.shown(item)]
        print(f"\n--- {len(labels.done) + 1} of {len(labels.items)}\n{visible(labels.items[item].prompt).replace('↵', chr(10))}")
        for k, text in enumerate(shown):
            print(f"\n[{k + 1}] {visible(text).replace('↵', chr(10))}")
        began = time.monotonic()
        try:
            said = ask(f"{help_} > ").strip()
        except EOFError:
            return
        if said == "q":
            return
        if said == "u":
            labels.undo()
            continue
        pair: dict[str, Any] = {"1": "left", "2": "right", "0": "tie", "s": "skip"}
        numbers = said.replace(",", " ").split()
        value = (
            "skip" if said == "s" else pair.get(said, said) if labels.task == "pair" else [int(n) if n.isdigit() else -1 for n in numbers]
        )
        try:
            labels.say(item, value, round(time.monotonic() - began, 2))
        except UsageError as error:
            print(error)


def _told(folder: Path, task: Any) -> None:
    place, count, left = write_preferences(folder, task)
    print(f"{count} preferences in {place}" + "".join(f"; {n} {what}" for what, n in left.items()))
    if count:
        print(f"tilt rm model=… data.source={place}")


def _summary(folder: Path, *, export: bool) -> None:
    """The agreement of a folder's annotators; with `export` the preferences are written anew."""
    read_items(folder)
    task: Any = _about(folder).get("task") or "pair"
    if export:
        _told(folder, task)
        return
    found = agreement(folder, task)
    for name, count in found["annotators"].items():
        print(f"{name:<24}{count:>6} labels")
    shown: Callable[[float | None], str] = lambda x: "–" if x is None or math.isnan(x) else f"{x:.3f}"
    for pair in found["pairs"]:
        names, further = " and ".join(pair["annotators"]), "" if task == "pair" else f"  mean Kendall's τ {shown(pair['tau'])}"
        print(f"{names:<36}{pair['shared']:>6} shared  {pair['percent']:5.1f} % the same  Cohen's κ {shown(pair['kappa'])}{further}")
    if found["fleiss"] is not None:
        print(f"Fleiss' κ {shown(found['fleiss'])}")
    print(f"Krippendorff's α {shown(found['alpha'])} ({'nominal' if task == 'pair' else 'ordinal'})")
