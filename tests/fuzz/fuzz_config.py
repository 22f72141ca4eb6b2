"""Recipe files in YAML, JSON and TOML, and `key.sub=value` words: read, merged and parsed as the settings of a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hostile import NUMBERS, Target, bounded, changed, mutated, put, scalars, texts, values
from hypothesis import strategies as st

from tilt.config import Document, build_piece, dump, gather, override, parse, read_file
from tilt.objectives.pieces import PIECES
from tilt.recipes import dpo, rl_settings, rlhf, sft

ROOT = Path(__file__).parents[2]
CONFIGS: dict[str, Any] = {"rl": rl_settings.Config, "sft": sft.Config, "dpo": dpo.Config, "rlhf": rlhf.Config}
SEEDS = [path.read_bytes() for path in sorted((ROOT / "examples").glob("*.yaml"))] + [
    b"a: &a [1, 2]\nb: *a\nc: {<<: {d: 1}, e: 2}\nf: |\n  text\n  more\n",
    b"steps = 3\n[optimizer]\nlr = 1e-3\n[[more]]\nx = 1979-05-27T07:32:00Z\n[model]\nwidth = 64\n",
    b'{"recipe": "sft", "steps": 3, "data": {"source": "x.jsonl", "columns": {"prompt": "a"}}}',
]
GOOD = {
    "model": {"width": 16, "heads": 2, "layers": 1},
    "data": {"source": "x.jsonl", "columns": {"prompt": "q"}, "held_out": 0.1},
    "steps": 3,
    "optimizer": {"lr": 1e-3, "betas": [0.9, 0.95], "schedule": "linear"},
    "lora": {"rank": 4, "targets": ["q_proj"]},
    "sampling": {"temperature": 1.0, "stop_strings": ["a"], "top_k": 0},
    "reward": [{"exact": {"answer": "gold"}, "weight": 1.0}],
    "objective": {"surrogate": {"clip": {"low": 0.2}}},
    "algorithm": "grpo",
    "name": "a",
}
KEYS = [*GOOD, *rl_settings.Config.model_fields, "optimizer.lr", "data.columns.a.b", "reward.0.weight", "a.b.c"]


def text_of_a_file(example: tuple[str, bytes], folder: Path) -> None:
    ending, content = example
    path = put(folder / f"recipe{ending}", content)
    with bounded():
        found = read_file(path)
        for config in CONFIGS.values():
            with bounded():
                dump(parse(found.values, config, found.origins))


def mapping(example: tuple[str, Any], folder: Path) -> None:
    name, given = example
    with bounded():
        parse(given if isinstance(given, dict) else {"model": given}, CONFIGS[name])


def words(example: list[str], folder: Path) -> None:
    with bounded():
        found = gather([], example)
        parse(found.values, CONFIGS["rl"], found.origins)
    document = Document({"data": "x.jsonl", "reward": [{"exact": {}}], "steps": 1})
    with bounded():
        override(document, example)


def piece(example: tuple[str, Any], folder: Path) -> None:
    slot, value = example
    with bounded():
        build_piece(value, PIECES[slot], where=slot)


PIECE_NAMES = sorted({name for pieces in PIECES.values() for name in pieces})
TARGETS = (
    Target("config: text of a recipe file", st.tuples(st.sampled_from([".yaml", ".json", ".toml"]), mutated(SEEDS)), text_of_a_file, 120),
    Target("config: values of a recipe", st.tuples(st.sampled_from(list(CONFIGS)), changed(GOOD, values(list(GOOD)), 4)), mapping, 120),
    Target(
        "config: words of the command line",
        st.lists(
            st.one_of(
                st.tuples(st.sampled_from(KEYS), st.one_of(texts(), st.sampled_from(NUMBERS).map(str))).map("=".join),
                texts(),
                texts().map(lambda text: f"--{text}"),
            ),
            max_size=6,
        ),
        words,
        120,
    ),
    Target(
        "config: pieces of an objective",
        st.tuples(
            st.sampled_from(list(PIECES)),
            st.one_of(
                st.sampled_from(PIECE_NAMES),
                st.dictionaries(st.sampled_from([*PIECE_NAMES, "low", "high", "beta", "lam"]), st.one_of(scalars(), values(["low", "beta"])), max_size=2),
                values(PIECE_NAMES),
            ),
        ),
        piece,
        200,
    ),
)  # fmt: skip
