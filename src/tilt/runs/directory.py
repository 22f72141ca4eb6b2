"""The directory of a run: its name, what lies in it, and the record of the environment it started in."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import secrets
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import tilt
from tilt.errors import UsageError
from tilt.runs.files import atomic_write, flush, vacant
from tilt.runs.secrets import masked

SCHEMA_VERSION = 1
"""Of a run's directory as a whole; rollouts and checkpoints have versions of their own."""

PACKAGES = ("torch", "transformers", "peft", "safetensors", "tokenizers", "numpy", "pyarrow", "pydantic")


@dataclass(frozen=True)
class RunDirectory:
    """`runs/<name>/` and the places in it; usable wherever a path is."""

    path: Path

    def __fspath__(self) -> str:
        return str(self.path)

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def environment(self) -> Path:
        return self.path / "env.json"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def rollouts(self) -> Path:
        return self.path / "rollouts"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def samples(self) -> Path:
        return self.path / "samples.md"

    @property
    def log(self) -> Path:
        return self.path / "log.txt"

    @property
    def report(self) -> Path:
        return self.path / "report.html"


def auto_name(recipe: str, model: str) -> str:
    """`<recipe>-<model>-<short id>`, readable and new: rl, "Qwen/Qwen3-0.6B" → `rl-qwen3-0.6b-4f09a1`."""
    last = model.rstrip("/").rpartition("/")[2]
    slug = re.sub(r"[^a-z0-9.]+", "-", last.lower()).strip("-.")[:32] or "model"
    return f"{recipe.replace('_', '-')}-{slug}-{secrets.token_hex(3)}"


def create(root: Path | str, name: str, *, config_yaml: str, command: Sequence[str] | str) -> RunDirectory:
    """Make `root/name/` with config.yaml, env.json and log.txt; it appears complete or not at all. An existing directory is refused."""
    check_name(name)
    path = Path(root) / name
    refuse_existing(path)
    line = masked(command if isinstance(command, str) else " ".join(command))
    making = vacant(path)
    making.mkdir(parents=True)
    try:
        (making / "config.yaml").write_text(masked(config_yaml), encoding="utf-8")
        started = {"schema_version": SCHEMA_VERSION} | environment(command=line)
        (making / "env.json").write_text(json.dumps(started, indent=2) + "\n", encoding="utf-8")
        (making / "log.txt").write_text(f"{line}\n", encoding="utf-8")
        for folder in ("rollouts", "checkpoints"):
            (making / folder).mkdir()
        for file in making.iterdir():
            flush(file)
        making.rename(path)
    except BaseException:
        shutil.rmtree(making, ignore_errors=True)
        raise
    return RunDirectory(path)


def taken_up(directory: RunDirectory, command: Sequence[str] | str) -> None:
    """Note in env.json that a process goes on with this run, in which environment; a directory of a later schema is refused."""
    try:
        record = dict(json.loads(directory.environment.read_text(encoding="utf-8")))
        version = int(record.get("schema_version", 0))
    except (OSError, ValueError, TypeError) as error:
        raise UsageError(f"{directory.path} is not the directory of a run: its env.json cannot be read ({error})") from None
    if version > SCHEMA_VERSION:
        raise UsageError(f"{directory.path} has schema version {version}; this tilt reads up to {SCHEMA_VERSION}: upgrade it")
    now = environment(masked(command if isinstance(command, str) else " ".join(command)))
    record |= {"process": now["process"], "host": now["host"], "resumed": [*record.get("resumed", []), now]}
    atomic_write(directory.environment, json.dumps(record, indent=2) + "\n")


def check_name(name: str) -> None:
    """Refuse a name that is not one plain folder below the root."""
    if not re.fullmatch(r"[A-Za-z0-9_][\w.+-]*", name) or len(name) > 200:
        raise UsageError(f"`{name[:200]}` cannot name a run: use letters, digits, `_`, `-` and `.`, starting with a letter or digit")


def refuse_existing(path: Path) -> None:
    """An existing directory is refused, with the three ways out."""
    if path.exists() or path.is_symlink():
        ways = "--resume (the old run goes on)", "another name (name=…), or none (one is made up)", "--overwrite (the old run is deleted)"
        raise UsageError(
            f"{path} exists already, and nothing is overwritten. Three ways out:\n"
            + "\n".join(f"  {i}. {way}" for i, way in enumerate(ways, 1))
        )


@contextmanager
def replacing(path: Path) -> Iterator[None]:
    """Let a new run take the place of an old one: the old directory is put aside, and deleted once the new one exists, else put back."""
    if not path.exists():
        yield
        return
    if path.is_symlink() or not ((path / "config.yaml").is_file() and (path / "env.json").is_file()):
        raise UsageError(
            f"{path} exists and is not the directory of a run (no config.yaml and env.json): it is not deleted; choose another name"
        )
    aside = vacant(path)
    path.rename(aside)
    try:
        yield
    finally:
        if path.exists():
            shutil.rmtree(aside)
        else:
            aside.rename(path)


def environment(command: str = "") -> dict[str, Any]:
    """Versions, machine, threads, device and source of this process; what is not installed is null."""
    torch = sys.modules.get("torch")
    cuda = bool(torch and torch.cuda.is_available())
    return {
        "command": command,
        "process": os.getpid(),
        "host": platform.node(),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "directory": os.getcwd(),
        "tilt": tilt.__version__,
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "platform": platform.platform(),
        "processors": os.cpu_count(),
        "threads": torch.get_num_threads() if torch else None,
        "device": torch.cuda.get_device_name() if torch and cuda else "cpu",
        "git": _git(Path.cwd()),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _git(directory: Path) -> dict[str, Any] | None:
    """The commit of the working directory and a hash of what differs from it; null outside a repository."""

    def ask(*arguments: str) -> bytes:
        return subprocess.run(["git", "-C", str(directory), *arguments], capture_output=True, check=True, timeout=10).stdout

    try:
        commit, difference = ask("rev-parse", "HEAD").decode().strip(), ask("diff", "HEAD")
    except (OSError, subprocess.SubprocessError):
        return None
    return {
        "commit": commit,
        "diff_sha256": hashlib.sha256(difference).hexdigest() if difference else None,
        "diff_lines": difference.count(b"\n"),
    }
