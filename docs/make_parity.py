"""Rewrite the generated tables of docs/parity.md: the presets, their quirks, and what a run corrects on purpose."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

from tilt.parity import MEANING, PAIR_PRESETS, PRESETS, Quirks
from tilt.parity.described import flat

EVERY = {**PRESETS, **PAIR_PRESETS}
PAGE = Path(__file__).with_name("parity.md")


def tables() -> dict[str, list[str]]:
    """The generated lines, by the name of their block."""
    return {
        "presets": [
            "| preset | what it is parity with | defaults, under what you set |",
            "|---|---|---|",
            *(f"| `{name}` | {preset.source} | {', '.join(f'`{key}={value}`' for key, value in flat(preset.settings))} |" for name, preset in EVERY.items()),
        ],
        "quirks": [
            "| quirk | what the padded code does | what the corrected mode does | " + " | ".join(f"`{name}`" for name in PRESETS) + " |",
            "|---|---|---|" + "---|" * len(PRESETS),
            *(
                f"| `{f.name}` | {MEANING[f.name][0]} | {MEANING[f.name][1]} | "
                + " | ".join("on" if getattr(preset.quirks, f.name) else "" for preset in PRESETS.values())
                + " |"
                for f in fields(Quirks)
            ),
        ],
        "corrections": [
            "| preset | what the library does | what a run does |",
            "|---|---|---|",
            *(f"| `{name}` | {does} | {right} |" for name, preset in EVERY.items() for does, right in preset.corrections),
        ],
    }  # fmt: skip


def rewritten(page: str) -> str:
    """The page with every generated block replaced."""
    for name, lines in tables().items():
        pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end of {name} -->)", re.DOTALL)
        page, count = pattern.subn(lambda m, lines=lines: m.group(1) + "\n".join(lines) + "\n" + m.group(2), page)
        assert count == 1, name
    return page


if __name__ == "__main__":
    PAGE.write_text(rewritten(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
