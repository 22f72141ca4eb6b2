"""A preset in words: the quirks it has, those that were switched, its library's defaults, and what a run does differently on purpose."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

from tilt.parity.presets import PAIR_PRESETS, PRESETS
from tilt.parity.quirks import MEANING, Quirks


def described(name: str, switched: Mapping[str, bool]) -> list[str]:
    """Lines for the card of a preset: every quirk, on or off, with what is done and what would be right."""
    if name in PAIR_PRESETS:
        pairs = PAIR_PRESETS[name]
        return [f"parity with {pairs.source}", _defaults(pairs.settings), *_corrected(pairs.corrections)]
    preset = PRESETS[name]
    quirks = replace(preset.quirks, **switched)
    lines = [f"parity with {preset.source}"]
    for f in fields(Quirks):
        if getattr(preset.quirks, f.name) or f.name in switched:
            does, right = MEANING[f.name]
            state = "on " if getattr(quirks, f.name) else "off"
            lines.append(f"  {state} {f.name}: {does}; corrected: {right}")
    return [*lines, _defaults(preset.settings), *_corrected(preset.corrections)]


def _defaults(settings: Mapping[str, Any]) -> str:
    return "  defaults: " + ", ".join(f"{key}={value:g}" if isinstance(value, float) else f"{key}={value}" for key, value in flat(settings))


def _corrected(corrections: Sequence[tuple[str, str]]) -> list[str]:
    return [f"  corrected on purpose: {does} → {right}" for does, right in corrections]


def flat(settings: Mapping[str, Any], above: str = "") -> list[tuple[str, Any]]:
    """Settings as (key.sub, value)."""
    found = []
    for key, value in settings.items():
        found += flat(value, f"{above}{key}.") if isinstance(value, Mapping) else [(above + key, value)]
    return found
