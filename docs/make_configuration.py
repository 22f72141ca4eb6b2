"""Writes the tables of docs/configuration.md from the settings themselves: `python docs/make_configuration.py`; a test keeps them in step."""

from __future__ import annotations

from pathlib import Path

from tilt.cli.recipes import RECIPES, settings

PAGE = Path(__file__).with_name("configuration.md")
MARK = "<!-- below: written by docs/make_configuration.py -->\n"


def tables() -> str:
    """One table for what all training recipes share, then one for each recipe with what is its own."""
    found = {command: settings(command) for command in RECIPES}
    trainers = [command for command in RECIPES if command not in ("rank", "label", "rlhf", "quickstart")]
    shared = [row for row in found["sft"] if all(row in found[command] for command in trainers)]
    parts = ["## Settings of every training recipe (`pretrain sft rm prm dpo rl`)\n", table(shared)]
    for command, rows in found.items():
        note = "" if command in trainers else " The settings of a run, `data` and `model` mean what they mean above."
        common = {row[:2] for row in shared}
        own = [row for row in rows if (row not in shared if command in trainers else row[:2] not in common)]
        parts += [f"## `tilt {command}`\n", *([note.strip() + "\n"] if note else []), table(own)]
    return "\n".join(parts)


def table(rows: list[tuple[str, str, str]]) -> str:
    cells = [tuple(cell.replace("|", "\\|").replace("<", "&lt;") for cell in row) for row in rows]
    return (
        "\n".join(
            [
                "| setting | default | meaning |",
                "|---|---|---|",
                *(f"| `{key}` | `{default}` | {meaning} |" for key, default, meaning in cells),
            ]
        )
        + "\n"
    )


def page() -> str:
    """The page with fresh tables under its text."""
    return PAGE.read_text(encoding="utf-8").partition(MARK)[0] + MARK + "\n" + tables()


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
