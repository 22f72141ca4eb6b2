"""What a configuration changes of a run that is resumed: listed key by key, and refused where it would be another run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tilt.config import read_file
from tilt.errors import UsageError

FREE = (
    "name", "root", "log_every", "threads", "device", "quiet", "watchdog", "track", "save", "save_every", "save_minutes", "keep_last", "keep_best",
    "rollouts_every", "channels_mb", "eval", "eval_every", "measure", "stop_at", "stop_rise", "max_kl", "max_mismatch", "guards", "micro_tokens",
    "optimizer", "alerts", "halve_micro", "critic_lr", "steps", "epochs", "sampling.slots", "sampling.cache_gib",
)  # fmt: skip
"""Keys that may change, with all below them. Whatever else is changed makes another run."""
SILENT = ("name", "root", "quiet", "log_every")


def described(before: Path, after: Mapping[str, Any]) -> list[str]:
    """`key: old → new` for every key that differs, in the order of the new file. What may not change is refused, all at once."""
    old = {k: v for k, v in flat(read_file(before).values) if k.partition(".")[0] not in SILENT}
    new = {k: v for k, v in flat(after) if k.partition(".")[0] not in SILENT}
    keys = [key for key in dict.fromkeys([*new, *old]) if old.get(key) != new.get(key)]
    lines = {key: f"{key}: {_shown(old.get(key))} → {_shown(new.get(key))}" for key in keys}
    if wrong := [lines[key] for key in keys if not _free(key)]:
        raise UsageError(
            f"{before.parent} was begun with other settings, and these cannot change in the middle of a run:\n"
            + "\n".join(f"  {line}" for line in wrong)
            + "\n  leave them as they were, or start a new run from its weights: --init-from"
        )
    return list(lines.values())


def flat(values: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    """Nested mappings as (key.with.dots, value)."""
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from flat(value, f"{above}{key}.")
        else:
            yield f"{above}{key}", value


def _free(key: str) -> bool:
    """A setting of the run, or of a pipeline's stage."""
    return any(each == free or each.startswith(f"{free}.") for free in FREE for each in (key, key.partition(".")[2]))


def _shown(value: Any) -> str:
    return "null" if value is None else str(value)
