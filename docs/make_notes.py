"""Write docs/notes.md and docs/notes.zh.md from docs/notes.toml: `python docs/make_notes.py`; a test keeps the three in step."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parent
PAGES = {"en": DOCS / "notes.md", "zh": DOCS / "notes.zh.md"}
WORDS = {
    "en": {
        "title": "# The study notes, row by row",
        "intro": (
            "Five study notes on reinforcement learning of language models are numbered 000 to 004 and cited by line: 000:153. Every formula, step and metric\n"
            "in them has a row: its right form, the function that computes it, the test that shows it, and a correction where the note errs (E1 to E40).\n"
            "`tilt trace NAME` prints one step of a row with every number of these formulas. [中文](notes.zh.md)"
        ),
        "head": "| lines | formula, step or metric | right form | function | test | correction |",
        "inspect": "`tilt.inspect` (not yet built)",
        "proof": "an identity: the test alone",
    },
    "zh": {
        "title": "# 学习笔记逐条对照",
        "intro": (
            "五份关于语言模型强化学习的学习笔记编号为 000 至 004，按行号引用，如 000:153。其中每个公式、步骤与指标占一行：\n"
            "正确形式、计算它的函数、验证它的测试，以及笔记有误之处的更正（E1 至 E40）。\n"
            "`tilt trace NAME` 打印某算法一步更新中这些公式的全部数值。[English](notes.md)"
        ),
        "head": "| 行号 | 公式、步骤或指标 | 正确形式 | 函数 | 测试 | 更正 |",
        "inspect": "`tilt.inspect`（尚未实现）",
        "proof": "恒等式：仅由测试验证",
    },
}
ELSEWHERE = {"tilt.inspect (not yet built)": "inspect", "the test alone": "proof"}


def sections() -> list[dict[str, Any]]:
    """The sections of docs/notes.toml, each with its rows."""
    with (DOCS / "notes.toml").open("rb") as file:
        found: list[dict[str, Any]] = tomllib.load(file)["section"]
    return found


def code(text: str) -> str:
    return f"`{text}`".replace("|", "\\|")


def line(row: dict[str, Any], language: str) -> str:
    """A row of the table."""
    function = row["function"]
    told = WORDS[language][ELSEWHERE[function]] if function in ELSEWHERE else code(function)
    mended = f"**{', '.join(row['errata'])}** {row['correction_' + language]}" if "errata" in row else ""
    cells = [row["lines"], row[language], code(row["formula"]), told, code(row["test"]) if row["test"] else "", mended.replace("|", "\\|")]
    return "| " + " | ".join(cells) + " |"


def page(language: str) -> str:
    words = WORDS[language]
    parts = [words["title"], "", words["intro"]]
    for section in sections():
        parts += ["", f"## {section[language]}", "", words["head"], "|---" * 6 + "|", *(line(row, language) for row in section["row"])]
    return "\n".join([*parts, ""])


if __name__ == "__main__":
    for language, path in PAGES.items():
        path.write_text(page(language), encoding="utf-8")
