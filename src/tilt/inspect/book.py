"""A run directory as the page reads it: what it is, its curves, its stored steps. No torch, nothing is written, what grows is read on."""

from __future__ import annotations

import json
import re
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from pathlib import Path
from threading import RLock
from typing import Any

import yaml

from tilt.errors import DataError, TiltError
from tilt.inspect.changed import Tokens, changed_of
from tilt.inspect.collapse import collapse_over
from tilt.inspect.tables import Rows, cut, key_of, number
from tilt.runs.listing import status_of

KEPT = 24
"""Steps that stay in memory."""
MOST_FOUND = 2000
STEP = re.compile(r"step_(\d{1,12})\.parquet")
CHANNELS: dict[str, tuple[str, str, str, str]] = {
    "delta_ref": ("Δ reference", "log π − log reference in the update's last pass: above 0 the policy likes the token more than the reference does", "diverging", "nats"),
    "push": ("push", "−∂loss/∂log π, summed over the update's steps: what the update asked of this token; 0 where the clip cuts it", "diverging", "loss/nat"),
    "result": ("result", "log π after the update − before: what came of it", "diverging", "nats"),
    "adv_t": ("advantage", "advantage of the token", "diverging", ""),
    "ratio": ("ratio", "π / π before the batch, in the last pass", "ratio", ""),
    "clip": ("clip", "+1 cut for being too high, −1 too low, 2 outside the range without effect, 0 inside", "clip", ""),
    "entropy": ("entropy", "of the policy's distribution before the token", "sequential", "nats"),
    "kl": ("KL", "k3 estimate of KL(π ‖ reference) at the token", "sequential", "nats"),
    "value": ("value", "what the critic expects from here, or a reward model's score read after the token", "diverging", ""),
    "return": ("return", "what the critic learns to expect", "diverging", ""),
    "token_reward": ("token reward", "reward of the token, the KL's cost included", "diverging", ""),
    "push_value": ("push value", "−∂loss/∂value", "diverging", ""),
    "push_dist": ("push dist", "pull of the entropy bonus or exact KL on the token's own logit", "diverging", ""),
    "new_logprobs": ("log π", "log-probability in the update's last pass", "sequential", "nats"),
    "old_logprobs": ("log π old", "log-probability before the update", "sequential", "nats"),
    "sampler_logprobs": ("log sampler", "log-probability under the sampler", "sequential", "nats"),
    "reference_logprobs": ("log reference", "log-probability under the reference", "sequential", "nats"),
}  # fmt: skip
"""Title, meaning, scale and unit of each channel, in the order of the keys 1 to 9."""


class Book:
    """A run, a stage of one, or an import in a run's format."""

    def __init__(self, path: Path, name: str = "") -> None:
        self.path, self.name = path, name or path.name
        self._kept: OrderedDict[tuple[int, int, int], Rows] = OrderedDict()
        self._summaries: dict[int, tuple[tuple[int, int], dict[str, Any]]] = {}
        self._lock = RLock()

    # --- what the run is --------------------------------------------------------------------------------------------------

    def header(self) -> dict[str, Any]:
        """Name, settings, versions, where the run stands, alerts, and what its numbers are not."""
        config_text = self._text("config.yaml")
        config, env = _mapping(config_text), _json(self._text("env.json"))
        last = self._last_step()
        result = _json(self._text("result.json"))
        steps = self.steps()
        target = config.get("steps") if isinstance(config.get("steps"), int) else None
        stored = sorted(
            {name for file in self._files().values() for name in self._columns(file)} & CHANNELS.keys(), key=list(CHANNELS).index
        )
        return {
            "name": self.name, "path": str(self.path), "algorithm": str(config.get("algorithm") or config.get("recipe") or "import"),
            "kind": str(config.get("recipe") or "import"), "model": _short(config.get("model")), "task": _short((config.get("data") or {}).get("source") if isinstance(config.get("data"), dict) else config.get("data")),
            "seed": config.get("seed"), "commit": str((env.get("git") or {}).get("commit") or "")[:12] if isinstance(env.get("git"), dict) else "",
            "started": env.get("started"), "status": self.status(), "step": last, "steps": target,
            "objective": self._text("objective.txt"), "config": config_text, "versions": env.get("packages") or {}, "alerts": self.alerts(),
            "result": result or None, "parts": self._weights(), "notes": self.notes(steps, stored), "imported": _json(self._text("imported.json")) or None,
            "channels": {name: dict(zip(("title", "about", "kind", "unit"), CHANNELS[name], strict=True)) for name in stored},
        }  # fmt: skip

    def status(self) -> str:
        """running, finished, stopped or dead, as `tilt runs` has it; an import is finished."""
        if (self.path / "imported.json").exists() or not (self.path / "log.txt").exists():
            return "finished"
        return status_of(self.path, _json(self._text("env.json")))

    def alerts(self) -> list[dict[str, Any]]:
        """What the run warned of, with the advice that stood below."""
        found: list[dict[str, Any]] = []
        for line in self._text("log.txt").splitlines():
            match = re.match(r"(?:\S+  )?alert +([\w ]{1,40}), step (\d{1,12}): (.*)", line)
            if match:
                found.append({"step": int(match[2]), "name": match[1], "text": cut(match[3], 400)})
            elif found and (advice := re.match(r"(?:[\d:]{8})?\s+(healthy: .*)", line)) and len(found[-1]["text"]) < 800:
                found[-1]["text"] += "; " + cut(advice[1], 300)
        return found[-500:]

    def notes(self, steps: Sequence[dict[str, Any]], stored: Sequence[str]) -> list[str]:
        """What the page does not show, and how exact its numbers are."""
        full = [entry["step"] for entry in steps if entry["channels"]]
        found = [
            "Channels are stored in half precision: numbers are good to about three digits; differences were taken before they were stored.",
            "Sampled tokens only: nothing is known of tokens that were not drawn, but for the alternatives at some answers.",
            "Bits repeat on the same machine, threads and versions, and not across them.",
        ]
        if full and len(full) < len(steps):
            found.append(
                f"{len(full)} of {len(steps)} stored steps have token channels: {', '.join(map(str, full[:40]))}{' …' if len(full) > 40 else ''}"
            )
        if steps and not full:
            found.append("No stored step has token channels; texts, rewards and lengths are shown.")
        if "push" in stored:
            found.append(
                "push leaves out terms that read the whole distribution (entropy bonus, exact KL): their pull on the token's own logit is push dist."
            )
        if "result" in stored:
            found.append("result and alternatives are known for a share of the answers.")
        return found

    # --- curves -----------------------------------------------------------------------------------------------------------

    def metrics(self, after: int = 0) -> dict[str, Any]:
        """The curves as columns from byte `after` of metrics.jsonl on; a line that is still being written waits."""
        file = self.path / "metrics.jsonl"
        try:
            size = file.stat().st_size
        except OSError:
            return {"next": 0, "step": [], "time": [], "columns": {}}
        reset = after > size or after < 0
        with file.open("rb") as stream:
            stream.seek(0 if reset else after)
            data = stream.read(64 << 20)
        data = data[: data.rfind(b"\n") + 1]
        rows = [row for row in map(_json, data.decode("utf-8", "replace").splitlines()) if isinstance(row.get("step"), int)]
        names = list(dict.fromkeys(name for row in rows for name in row if name not in ("step", "time")))
        columns = {name: [_value(row.get(name)) for row in rows] for name in names}
        found: dict[str, Any] = {"next": (0 if reset else after) + len(data), "step": [row["step"] for row in rows], "time": [row.get("time") for row in rows], "columns": columns}  # fmt: skip
        return found | ({"reset": True} if reset else {})

    def _last_step(self) -> int | None:
        try:
            with (self.path / "metrics.jsonl").open("rb") as stream:
                stream.seek(0, 2)
                stream.seek(max(0, stream.tell() - (1 << 17)))
                lines = stream.read().decode("utf-8", "replace").split("\n")[:-1]
        except OSError:
            return None
        steps = [row["step"] for row in map(_json, lines) if isinstance(row.get("step"), int)]
        return steps[-1] if steps else None

    # --- stored steps -----------------------------------------------------------------------------------------------------

    def _files(self) -> dict[int, Path]:
        folder = self.path / "rollouts"
        names = [(STEP.fullmatch(entry.name), entry) for entry in folder.iterdir()] if folder.is_dir() else []
        return {int(match[1]): entry for match, entry in sorted(names, key=lambda pair: pair[1].name) if match is not None}

    def steps(self) -> list[dict[str, Any]]:
        """The stored steps with their number of rollouts, and whether tokens have channels."""
        import pyarrow.parquet as pq

        found = []
        for step, file in sorted(self._files().items()):
            try:
                found.append(
                    {"step": step, "rows": pq.read_metadata(file).num_rows, "channels": bool(self._columns(file) & CHANNELS.keys())}
                )
            except Exception:  # a file that cannot be read is shown as empty, and says why when it is opened
                found.append({"step": step, "rows": 0, "channels": False})
        return found

    def _columns(self, file: Path) -> set[str]:
        import pyarrow.parquet as pq

        stat = file.stat()
        key = (str(file), stat.st_mtime_ns, stat.st_size)
        with self._lock:
            known = self.__dict__.setdefault("_schemas", {})
        if key not in known:
            try:
                known[key] = set(pq.read_schema(file).names)
            except Exception:
                known[key] = set()
        return set(known[key])

    def _weights(self) -> dict[str, float]:
        """The parts of the reward with their weights, as the last stored step has them."""
        import pyarrow.parquet as pq

        files = self._files()
        if not files:
            return {}
        try:
            return Rows(pq.read_schema(files[max(files)]).empty_table(), max(files)).weights
        except (TiltError, OSError, ValueError):
            return {}

    def rows(self, step: int) -> Rows:
        """One stored step."""
        file = self._files().get(step)
        if file is None:
            raise DataError(f"{self.name} holds no rollouts of step {step}")
        stat = file.stat()
        key = (step, stat.st_mtime_ns, stat.st_size)
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
                return self._kept[key]
        read = Rows.read(file, step)
        with self._lock:
            self._kept[key] = read
            while len(self._kept) > KEPT:
                self._kept.popitem(last=False)
        return read

    def summaries(self, steps: Sequence[int]) -> dict[str, Any]:
        """Every rollout of these steps in a line; a step that cannot be read has an `error` instead."""
        found = {}
        for step in steps:
            try:
                found[str(step)] = self._summary(step)
            except TiltError as error:
                found[str(step)] = {"error": str(error), "row": []}
        return {"steps": found}

    def _summary(self, step: int) -> dict[str, Any]:
        file = self._files().get(step)
        if file is None:
            raise DataError(f"{self.name} holds no rollouts of step {step}")
        stat = file.stat()
        key = (stat.st_mtime_ns, stat.st_size)
        with self._lock:
            if step in self._summaries and self._summaries[step][0] == key:
                return self._summaries[step][1]
        made = Rows.read(file, step).summary() if len(self._files()) > KEPT else self.rows(step).summary()
        with self._lock:
            self._summaries[step] = (key, made)
        return made

    def same(self, step: int, row: int) -> dict[str, Any]:
        """Answers to the same prompt over all stored steps."""
        wanted = key_of(self.rows(step).prompts[row])
        found = []
        for other in sorted(self._files()):
            try:
                summary = self._summary(other)
            except TiltError:
                continue
            for i, key in enumerate(summary["key"]):
                if key == wanted:
                    found.append(
                        {"step": other, "row": i, **{name: summary[name][i] for name in ("reward", "advantage", "length", "completion")}}
                    )
        return {"rows": found}

    def search(self, text: str, steps: Sequence[int]) -> dict[str, Any]:
        """Rollouts whose prompt or completion holds a text, upper and lower case alike."""
        wanted = text.casefold()
        found: list[list[int]] = []
        for step in steps or sorted(self._files()):
            try:
                rows = self.rows(step)
            except TiltError:
                continue
            for i, (prompt, completion) in enumerate(zip(rows.prompts, rows.completions, strict=True)):
                if wanted in completion.casefold() or wanted in prompt.casefold():
                    found.append([step, i])
                    if len(found) >= MOST_FOUND:
                        return {"found": found, "more": True}
        return {"found": found, "more": False}

    def changed(self, step: int) -> dict[str, Any]:
        """What this step's update changed, by token, position and class."""
        return changed_of(Tokens(self.rows(step))) | {"begins": self.collapse()}

    def collapse(self) -> dict[str, Any] | None:
        """The step and the token at which this run's answers begin to come apart, None where they do not; read from 40 stored steps, and then from those
        between the last whole one and the first that is not."""
        steps = [entry["step"] for entry in self.steps() if entry["channels"]]
        picked = [steps[round(i * (len(steps) - 1) / 39)] for i in range(40)] if len(steps) > 40 else steps
        key = (tuple(picked), self.status())
        with self._lock:
            known = self.__dict__.setdefault("_collapses", {})
        if key not in known:
            known.clear()
            known[key] = self._collapse(picked, steps)
        found: dict[str, Any] | None = known[key]
        return found

    def _collapse(self, picked: Sequence[int], steps: Sequence[int]) -> dict[str, Any] | None:
        found = self._collapse_over(picked)
        if not found or len(picked) == len(steps):
            return found
        looked = {}
        for name, at in (("begins", found["step"]), ("endless", (found.get("endless") or {}).get("step"))):
            place = picked.index(at) if at is not None else 0
            if place:
                between = [step for step in steps if picked[place - 1] <= step <= picked[min(place + 1, len(picked) - 1)]]
                looked[name] = self._collapse_over(between[:200]) or {}
        if looked.get("begins", {}).get("step") is not None:
            found |= {name: value for name, value in looked["begins"].items() if name != "endless"}
        if "endless" in looked.get("endless", {}):
            found["endless"] = looked["endless"]["endless"]
        return found

    def _collapse_over(self, steps: Sequence[int]) -> dict[str, Any] | None:
        return collapse_over(Tokens(self.rows(step)) for step in steps)

    def _text(self, name: str) -> str:
        try:
            with (self.path / name).open("rb") as stream:
                return stream.read(4 << 20).decode("utf-8", "replace")
        except OSError:
            return ""


def books(place: Path) -> list[Book]:
    """The runs at a path: itself, or those in its folders, two deep (a quickstart's stages)."""
    if not place.is_dir():
        raise DataError(f"no run at {place}: name a run directory, or a folder that holds some")

    def found(folder: Path, depth: int) -> Iterator[Path]:
        if ((folder / "rollouts").is_dir() and any((folder / "rollouts").iterdir())) or (
            (folder / "metrics.jsonl").is_file() and not _staged(folder)
        ):
            yield folder
        if depth:
            for inner in sorted(folder.iterdir()):
                if inner.is_dir() and inner.name not in ("rollouts", "checkpoints", "tokenizer") and not inner.is_symlink():
                    yield from found(inner, depth - 1)

    paths = list(found(place, 3))
    if not paths:
        raise DataError(f"{place} holds no run: there is no metrics.jsonl and no rollouts/ in it or in its folders")
    return [Book(path, str(path.relative_to(place.parent)) if path != place else place.name) for path in paths]


def _staged(folder: Path) -> bool:
    """Whether a folder's own metrics are empty: a directory of stages."""
    return (folder / "metrics.jsonl").stat().st_size == 0


def _value(x: Any) -> Any:
    return x if isinstance(x, str) and x in ("nan", "inf", "-inf") else number(x) if isinstance(x, (int, float)) else None


def _json(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _mapping(text: str) -> dict[str, Any]:
    try:
        found = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _short(value: Any) -> str | None:
    """A model or data set in a word or two."""
    if value is None:
        return None
    if isinstance(value, dict):
        return "from scratch"
    parts = Path(str(value)).parts
    return "/".join(parts[-3:]) if len(parts) > 3 else str(value)
