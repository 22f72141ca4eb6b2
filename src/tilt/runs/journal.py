"""The journal of a run: metrics.jsonl, log.txt and samples.md on disk, a live panel or plain lines on the terminal."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from tilt.errors import DataError
from tilt.runs.secrets import masked
from tilt.runs.text import duration, fence, inert, middle, number
from tilt.runs.trackers import Trackers

SPARKS = "▁▂▃▄▅▆▇█"
FINISHED = "finished"
HISTORY = 60  # steps behind the little curve of the panel


@dataclass(frozen=True)
class Sample:
    """One row of the sample table: what was asked, what was answered, each reward by name, and the advantage."""

    prompt: str
    completion: str
    rewards: Mapping[str, float] = field(default_factory=dict)
    advantage: float = float("nan")


class Journal:
    """Keeps the record of a run and shows it: a live panel where the terminal is one, one line every `log_every` steps otherwise, nothing when quiet.

    The files are complete in every mode. `important` names the metrics to show, in order.
    """

    def __init__(
        self,
        directory: os.PathLike[str] | str,
        *,
        total: int,
        important: Sequence[str],
        log_every: int = 1,
        quiet: bool = False,
        console: Console | None = None,
    ) -> None:
        path = Path(directory)
        path.mkdir(parents=True, exist_ok=True)
        self.total, self.important, self.log_every, self.quiet = total, tuple(important), log_every, quiet
        self.console = console or Console(highlight=False, soft_wrap=True)
        self._metrics = _open_lines(path / "metrics.jsonl")
        self._log = (path / "log.txt").open("a", encoding="utf-8")
        self._samples = path / "samples.md"
        self._history: dict[str, list[float]] = {}
        self._stage = ""
        self._began: tuple[float, int] | None = None
        self._live: Live | None = None
        self.trackers: Trackers | None = None

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.close(FINISHED if kind is None else f"stopped: {kind.__name__}")

    def header(self, lines: Iterable[str]) -> None:
        """The first lines of the run: where it lies, on what, with how much."""
        for line in lines:
            self.note(line)

    def note(self, text: str) -> None:
        """One line for people: a warning, an event."""
        text = masked(text)
        self._write_log(text)
        self._say(Text(inert(text, newline="\n")))

    def step(self, step: int, metrics: Mapping[str, Any], stage: str = "", *, total: int | None = None) -> None:
        """Append the metrics of a step (any scalars) to metrics.jsonl and show the important ones; `total` is for a stage with a length of its own."""
        values = {name: float(value) for name, value in metrics.items()}
        now = time.time()
        record = {
            "step": step,
            **({"stage": stage} if stage else {}),
            "time": round(now, 3),
            **{name: _json(value) for name, value in values.items()},
        }
        self._metrics.write(json.dumps(record, ensure_ascii=False) + "\n")
        self._metrics.flush()
        if self.trackers is not None:
            self.trackers.log(step, values)
        if stage != self._stage or self._began is None:
            self._stage, self._began, self._history = stage, (now, step), {}
        if total is not None:
            self.total = total
        for name in self._shown(values):
            self._history[name] = [*self._history.get(name, []), values[name]][-HISTORY:]
        line = self._line(step, values, now)
        self._write_log(line)
        if self.quiet:
            return
        if self.console.is_terminal:
            self._panel(step, values, now)
        elif step % self.log_every == 0 or step == self.total:
            self._say(Text(line))

    def samples(self, step: int, rows: Sequence[Sample]) -> None:
        """The sample table: in full to samples.md, cut in the middle on the terminal."""
        with self._samples.open("a", encoding="utf-8") as file:
            file.write(_markdown(step, rows))
        self._say(_table(step, rows, self.console.width))

    def sync(self) -> None:
        """Wait until every step recorded so far is on the disk."""
        os.fsync(self._metrics.fileno())

    def close(self, how: str = FINISHED) -> None:
        """Leave the live panel on the screen, note in the log how the run ended, and close the files; twice does no harm."""
        if self._log.closed:
            return
        if self._live:
            self._live.stop()
            self._live = None
        self._write_log(how)
        self._metrics.close()
        self._log.close()

    def _say(self, what: Any) -> None:
        if not self.quiet:
            (self._live.console if self._live else self.console).print(what, highlight=False)

    def _write_log(self, text: str) -> None:
        self._log.write(f"{time.strftime('%H:%M:%S')}  {inert(text, newline=chr(10))}\n")
        self._log.flush()

    def _shown(self, values: Mapping[str, float]) -> list[str]:
        """The important metrics that this step has; without any, its first eight."""
        return [name for name in self.important if name in values] or list(values)[:8]

    def _progress(self, step: int, now: float) -> str:
        began, first = self._began or (now, step)
        left = (now - began) / (step - first) * (self.total - step) if step > first else 0.0
        eta = f"  {duration(left)} left" if step > first and step < self.total else ""
        return f"{self._stage + ' ' if self._stage else ''}step {step}/{self.total}{eta}"

    def _line(self, step: int, values: Mapping[str, float], now: float) -> str:
        shown = "  ".join(f"{name} {number(values[name])}" for name in self._shown(values))
        return f"{self._progress(step, now)}  {shown}"

    def _panel(self, step: int, values: Mapping[str, float], now: float) -> None:
        """Redraw the live panel: a bar, then each important metric with its value and its recent curve."""
        table = Table.grid(padding=(0, 2))
        for name in self._shown(values):
            table.add_row(Text(name), Text(number(values[name]), justify="right"), Text(sparkline(self._history[name])))
        bar = Table.grid()
        bar.add_row(ProgressBar(total=max(self.total, 1), completed=min(step, self.total), width=40))
        panel = Panel(Group(bar, table), title=Text(self._progress(step, now)), title_align="left")
        if self._live is None:
            self._live = Live(panel, console=self.console, auto_refresh=False)
            self._live.start()
        self._live.update(panel, refresh=True)


def sparkline(values: Sequence[float], width: int = 30) -> str:
    """The last values as a row of blocks from lowest to highest; a value that is not finite is `×`."""
    recent = list(values)[-width:]
    finite = [v for v in recent if math.isfinite(v)]
    low, span = (min(finite), max(finite) - min(finite)) if finite else (0.0, 0.0)
    level = [round((v - low) / span * 7) if span > 0 else 0 for v in finite]
    blocks = iter(SPARKS[i] for i in level)
    return "".join(next(blocks) if math.isfinite(v) else "×" for v in recent)


def _json(value: float) -> float | int | str:
    """JSON has no NaN: what is not finite is written as text and read back as a float."""
    if not math.isfinite(value):
        return str(value)
    return int(value) if value == int(value) and abs(value) < 2**53 else value


def _open_lines(path: Path) -> Any:
    """Open for appending whole lines; a line torn by a crash is cut off first."""
    if path.exists():
        content = path.read_bytes()
        if content and not content.endswith(b"\n"):
            os.truncate(path, content.rfind(b"\n") + 1)
    return path.open("a", encoding="utf-8")


def read_metrics(path: Path | str) -> list[dict[str, Any]]:
    """The steps of a metrics.jsonl; a torn last line is left out, a broken line before it is a DataError."""
    if not Path(path).exists():
        return []
    try:
        lines = Path(path).read_bytes().split(b"\n")
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from None
    return [_record(path, number, line) for number, line in enumerate(lines[:-1], 1) if line.strip()]


def _record(path: Path | str, number: int, line: bytes) -> dict[str, Any]:
    """A line as {name: number or text}, with the step that every line has."""
    try:
        found = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: line {number} is damaged: {str(error)[:200]}\n  the lines before it are whole") from None
    if not isinstance(found, dict) or type(found.get("step")) is not int:
        raise DataError(f"{path}: line {number} is no step of a run: {line[:80]!r}")
    return {name: _number(name, value) for name, value in found.items()}


def recorded_until(path: Path, step: int) -> int:
    """The bytes of a metrics.jsonl that tell of steps before `step`: where it is cut for a run to go on from there."""
    end = 0
    for line in path.read_bytes().split(b"\n")[:-1]:
        if line.strip() and int(json.loads(line)["step"]) >= step:
            break
        end += len(line) + 1
    return end


def _number(name: str, value: Any) -> Any:
    return float(value) if isinstance(value, str) and value in ("nan", "inf", "-inf") and name != "stage" else value


def _markdown(step: int, rows: Sequence[Sample]) -> str:
    """The samples of a step in full, each text in a fence longer than any run of backticks within it."""
    parts = [f"\n## Step {step}\n"]
    for row in rows:
        rewards = ", ".join(f"{inert(name)} {number(value)}" for name, value in row.rewards.items())
        advantage = f", advantage {number(row.advantage)}" if math.isfinite(row.advantage) else ""
        parts.append(f"\n**prompt**\n{fence(row.prompt)}**completion** ({rewards or 'no reward'}{advantage})\n{fence(row.completion)}")
    return "".join(parts)


def _table(step: int, rows: Sequence[Sample], width: int) -> Table:
    """The sample table for a terminal `width` cells wide: two lines' worth of each text, one column per reward."""
    names = list(dict.fromkeys(name for row in rows for name in row.rewards))
    table = Table(title=Text(f"samples at step {step}"), title_justify="left", show_lines=True)
    room = max(16, (width - 12 * (len(names) + 1)) // 2 - 4)
    table.add_column("prompt", max_width=room, overflow="fold")
    table.add_column("completion", max_width=room, overflow="fold")
    for name in [*names, "advantage"]:
        table.add_column(Text(inert(name)), justify="right")
    for row in rows:
        texts = [Text(middle(inert(text), 3 * room)) for text in (row.prompt, row.completion)]
        numbers = [Text(number(row.rewards[name])) if name in row.rewards else Text("·") for name in names]
        table.add_row(*texts, *numbers, Text(number(row.advantage)))
    return table
