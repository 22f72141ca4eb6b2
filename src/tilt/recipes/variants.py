"""From a configuration to an objective: a row of the table by name, or one of your own from `file.py:NAME`, then its slots overridden."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import sys
import traceback
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

from tilt.config import build_piece, hint
from tilt.errors import UsageError
from tilt.objectives import ALGORITHMS, PIECES, PREFERENCES, Objective, Preference
from tilt.parity import PAIR_PRESETS, PRESETS, Quirks

R = TypeVar("R", Objective, Preference)


class VariantError(UsageError, ValueError):
    """A row that cannot be had. A ValueError too, so that a configuration reports it beside its other errors."""


@dataclass(frozen=True)
class Origin:
    """Where a row came from: its name, and for a row of your own the file and its SHA-256."""

    algorithm: str
    source: str = ""
    sha256: str = ""

    def lines(self, objective: object) -> list[str]:
        """The row as it stands in the run's record: name, every choice in full, and the file it was read from."""
        lines = [f"algorithm: {self.algorithm}", f"objective: {objective!r}"]
        return lines if not self.source else [*lines, f"from {self.source} (sha256 {self.sha256})"]


def resolve(algorithm: str, overrides: Mapping[str, Any]) -> tuple[str, Objective]:
    """The name and the row that a run optimises: `ppo`, or `file.py:NAME`, with `overrides` {slot: piece} applied."""
    return _resolve(algorithm, overrides, ALGORITHMS, Objective)


def optimised(algorithm: str, overrides: Mapping[str, Any], quirks: Mapping[str, bool], longest: int) -> tuple[str, Objective]:
    """The name and the row of a run whose answers have at most `longest` tokens: as `resolve`, or a parity preset with its quirks, some switched."""
    name = algorithm.replace("-", "_")
    if name not in PRESETS:
        if quirks:
            raise VariantError(f"`quirks` are of the parity presets {', '.join(PRESETS)}; {algorithm} has none: leave them out")
        return resolve(algorithm, overrides)
    known = [f.name for f in fields(Quirks)]
    wrong = [f"unknown key `quirks.{key}`: {hint(key, known)}" for key in quirks if key not in known]
    if wrong:
        raise VariantError("\n".join(wrong))
    try:
        return name, PRESETS[name].objective(override(PRESETS[name].row, overrides), longest, quirks)
    except VariantError:
        raise
    except UsageError as error:
        raise VariantError(f"`{name}`: {error}") from None


def preset_settings(given: Any) -> Any:
    """Settings of a run with those of the parity preset that they name, if any, laid under them."""
    name = str(given.get("algorithm", "")).replace("-", "_") if isinstance(given, Mapping) else ""
    found = PRESETS.get(name) or PAIR_PRESETS.get(name)
    return given if found is None else _under(found.settings, given)


def _under(below: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """The given settings over others: nested ones key by key."""
    nested = {
        key: _under(below[key], value) for key, value in given.items() if isinstance(below.get(key), Mapping) and isinstance(value, Mapping)
    }
    return {**below, **given, **nested}


def judges(algorithm: str) -> bool:
    """Whether a name, or NAME in `file.py:NAME`, is a row of the second table, on judged answers."""
    path, _, name = algorithm.rpartition(":")
    if not path.endswith(".py"):
        return algorithm.replace("-", "_") in {*PREFERENCES, *PAIR_PRESETS}
    return isinstance(getattr(import_file(Path(path)), name, None), Preference)


def resolve_preference(algorithm: str, overrides: Mapping[str, Any]) -> tuple[str, Preference]:
    """The same for rows on pairs: `reward_model`, `dpo`, a parity preset, or `file.py:NAME`."""
    name = algorithm.replace("-", "_")
    if name in PAIR_PRESETS:
        return name, override(PAIR_PRESETS[name].row, overrides)
    return _resolve(algorithm, overrides, PREFERENCES, Preference)


def _resolve(algorithm: str, overrides: Mapping[str, Any], table: Mapping[str, R], kind: type[R]) -> tuple[str, R]:
    if ".py:" in algorithm or algorithm.endswith(".py"):
        return algorithm, override(import_row(algorithm, kind), overrides)
    name = algorithm.replace("-", "_")
    if name in table:
        return name, override(table[name], overrides)
    other = next((recipe for recipe, rows in (("rl", ALGORITHMS), ("dpo or rm", PREFERENCES)) if name in rows), None)
    why = f"it is a row of `tilt {other}`" if other else hint(algorithm, [*table, *(PRESETS if kind is Objective else PAIR_PRESETS)])
    raise VariantError(f"unknown algorithm `{algorithm}`: {why}\n`tilt algorithms` shows the table; `file.py:NAME` names a row of your own")


def origin(algorithm: str) -> Origin:
    """Where `algorithm` comes from, for the run's record."""
    path, _, name = algorithm.rpartition(":")
    if not path:
        return Origin(algorithm)
    source = Path(os.path.expanduser(path)).resolve()
    return Origin(name, str(source), hashlib.sha256(source.read_bytes()).hexdigest())


def override(row: R, overrides: Mapping[str, Any], where: str = "objective") -> R:
    """The row with these slots changed; everything that is wrong at once."""
    slots = [f.name for f in fields(row) if f.name in PIECES]
    changed, problems = {}, []
    for slot, value in overrides.items():
        if slot not in slots:
            problems.append(f"unknown key `{where}.{slot}`: {hint(str(slot), slots)}")
            continue
        try:
            changed[slot] = _slot(value, PIECES[slot], getattr(row, slot), f"{where}.{slot}")
        except UsageError as error:
            problems.append(str(error))
    if problems:
        raise VariantError("\n".join(problems))
    try:
        return replace(row, **changed)
    except UsageError as error:
        raise VariantError(f"`{where}`: {error}") from None


def _slot(value: Any, registry: Mapping[str, type], own: Any, where: str) -> Any:
    """The piece of a slot, or the tuple of pieces where the slot holds several: a list, or one alone; [] empties it."""
    if not isinstance(own, tuple):
        return build_piece(value, registry, own, where)
    if isinstance(value, str) and value == "none":
        return ()
    given = list(value) if isinstance(value, list | tuple) else [value]
    return tuple(build_piece(each, registry, None, f"{where}.{i}" if len(given) > 1 else where) for i, each in enumerate(given))


def import_row(algorithm: str, kind: type[R]) -> R:
    """The row called NAME in the Python file of `file.py:NAME`; the file is run."""
    path, _, name = algorithm.rpartition(":")
    if not path or not name.isidentifier():
        raise VariantError(f"`{algorithm}`: a row of your own is named `file.py:NAME`, as in `my_variant.py:SOFT`")
    module = import_file(Path(path))
    if not hasattr(module, name):
        rows = [key for key, value in vars(module).items() if isinstance(value, kind)]
        raise VariantError(f"{path} has no `{name}`: " + (hint(name, rows) if rows else f"it defines no {kind.__name__}"))
    row = getattr(module, name)
    if not isinstance(row, kind):
        example = ", ".join(f"{f.name}=…" for f in fields(kind))
        raise VariantError(f"`{name}` in {path} is {_kind(row)}, not a row of this table: write `{name} = {kind.__name__}({example})`")
    return row


def _kind(value: object) -> str:
    return f"the class {value.__name__}" if isinstance(value, type) else type(value).__name__


def import_file(path: Path) -> ModuleType:
    """A Python file as a module; one that is missing or fails is a UsageError with its line."""
    file = Path(os.path.expanduser(path)).resolve()
    if not file.is_file():
        raise VariantError(f"no such file: {path}")
    name = f"tilt_file_{file.stem}_{hashlib.sha256(str(file).encode()).hexdigest()[:8]}"
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise VariantError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their annotations up here
    try:
        spec.loader.exec_module(module)
    except SyntaxError as error:
        raise VariantError(f"{path}:{error.lineno}: {error.msg}") from None
    except Exception as error:
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(file)]
        raise VariantError(f"{path}:{lines[-1] if lines else '?'}: {type(error).__name__}: {error}") from None
    return module
