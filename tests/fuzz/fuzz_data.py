"""Data files of every ending, whole and mutated, and rows of every shape: read, recognised, converted and rendered with a tiny tokenizer."""

from __future__ import annotations

import gzip
import io
import json
from contextlib import redirect_stdout
from functools import cache
from pathlib import Path
from typing import Any, get_args

import pyarrow as pa
import pyarrow.parquet as pq
from hostile import Target, bounded, changed, mutated, put, texts, values
from hypothesis import strategies as st

from tilt.cli.show import show_data
from tilt.data.formats import Want, read, readings
from tilt.data.rendering import renderer
from tilt.data.shapes import SHAPES
from tilt.data.sources import load
from tilt.data.steps import stepwise
from tilt.data.tokenizers import train_bpe

COLUMNS = sorted({name for shapes in SHAPES.values() for shape in shapes for name in shape.needs} | {"tools", "system", "history", "prompt_turns", "ranked_answers", "role", "content", "from", "value", "tool_calls", "label"})  # fmt: skip
TURNS = [{"role": "user", "content": "a?"}, {"role": "assistant", "content": "b"}]
GOOD: list[dict[str, Any]] = [
    {"prompt": "a", "completion": "b", "label": True},
    {"prompt": TURNS[:1], "completion": TURNS[1:], "tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}]},
    {"messages": [*TURNS, *TURNS], "label": 1, "system": "s", "tools": "[]"},
    {"conversations": [{"from": "human", "value": "x"}, {"from": "gpt", "value": "y"}], "chosen": {"from": "gpt", "value": "a"}, "rejected": {"from": "gpt", "value": "b"}},
    {"prompt": "a", "chosen": TURNS, "rejected": TURNS},
    {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: c"},
    {"instruction": "a", "input": "b", "output": "c", "history": [["a", "b"]], "system": "s", "chosen": "x", "rejected": "y"},
    {"question": "a", "answer": "b #### 1,000"},
    {"Body": "a", "Question": "b", "Answer": 3.0},
    {"input": "a", "output_1": "b", "output_2": "c", "label": 1},
    {"question": "q", "answer_matching_behavior": "a", "answer_not_matching_behavior": "b"},
    {"prompt": "a", "answers": ["a", TURNS[1:]]},
    {"prompt": "a", "steps": ["x", "y"], "labels": [True, 0.5]},
    {"messages": [{"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}, *TURNS]},
    {"text": "a"},
]  # fmt: skip


def _parquet(table: Any, **how: Any) -> bytes:
    out = io.BytesIO()
    pq.write_table(table, out, **how)
    return out.getvalue()


@cache
def seeds() -> dict[str, list[bytes]]:
    """Good files by their endings."""
    lines = [json.dumps(row, ensure_ascii=False).encode() for row in GOOD]
    plain = pa.table({"prompt": ["a", "é"], "completion": ["b", None], "n": [1.5, 2.0], "when": pa.array([0, 2**40], pa.timestamp("ms"))})
    nested = pa.table({"messages": [TURNS, TURNS], "raw": [b"\xff", b""]})
    found = {
        ".jsonl": [b"\n".join(lines[:2] + lines[:1]), *(line + b"\n" + line for line in lines)],
        ".json": [b"[" + b",".join(lines[:1] * 3) + b"]", *lines, b'{"a": 1, "a": 2}'],
        ".csv": [b'prompt,completion\na,"b, c"\n"d ""q""",e\n', "prompt,completion,label\né,ü,true\n".encode("utf-8-sig")],
        ".txt": [b"a line\nanother\n", "ü\u2028".encode()],
        ".parquet": [_parquet(plain), _parquet(nested), _parquet(plain, compression="zstd", use_dictionary=False)],
    }
    return {**found, **{f"{ending}.gz": [gzip.compress(data) for data in found[ending]] for ending in (".jsonl", ".csv")}}


@cache
def tokenizers() -> tuple[Any, Any]:
    """With a chat template, and without."""
    templated, plain = (train_bpe(["a b c"] * 4, 270) for _ in range(2))
    plain.chat_template = None
    return templated, plain


def file(example: tuple[str, bytes], folder: Path) -> None:
    ending, content = example
    path = put(folder / f"rows{ending}", content)
    with bounded():
        found = load(str(path))
        for want in readings(found.rows):
            with bounded():
                read(found.rows, want=want, source=found.name)
    with bounded(), redirect_stdout(io.StringIO()):
        show_data(str(path), "", "", 3)


def rows(example: tuple[list[dict[str, Any]], bool, str, str], folder: Path) -> None:
    given, chat, trained, over = example
    for want in get_args(Want):
        with bounded():
            found = read(given, want=want, source="rows")
            with bounded():
                _render(found, chat, trained, over)


def _render(found: Any, chat: bool, trained: str, over: str) -> None:
    words = tokenizers()[0 if chat else 1]
    render: Any = renderer(
        words,
        "auto" if chat else "text",
        conversational=found.conversational,
        max_prompt_tokens=20,
        max_tokens=20,
        train_on=trained,
        over_length=over,
    )
    kinds = {
        "prompt": render.prompts, "prompt_completion": render.demonstrations, "messages": render.demonstrations, "text": render.demonstrations,
        "preference": render.judgements, "unpaired": render.judgements,
    }  # fmt: skip
    if found.kind == "stepwise":
        render.each(lambda row, id: stepwise(render, "\n", row, id), found.rows)
    else:
        kinds[found.kind](found.rows)


def spec(example: str, folder: Path) -> None:
    with bounded():
        load(example)


FORMATS = sorted(seeds())
TARGETS = (
    *(Target(f"data: {ending} files", st.tuples(st.just(ending), mutated(seeds()[ending])), file, 40) for ending in FORMATS),
    Target(
        "data: rows of every shape",
        st.tuples(
            st.lists(st.one_of(*(changed(row, values(COLUMNS)).filter(lambda row: isinstance(row, dict)) for row in GOOD), st.dictionaries(st.sampled_from(COLUMNS), values(COLUMNS), max_size=5)), min_size=1, max_size=3),
            st.booleans(), st.sampled_from(["completion", "assistant", "all"]), st.sampled_from(["drop", "truncate"]),
        ),
        rows, 150,
    ),
    Target("data: names of sources", st.one_of(texts(), texts().map("hf:a/b:".__add__), texts().map("hf:".__add__), texts().map("gsm8k/".__add__), texts().map("a/".__add__)), spec, 100),
)  # fmt: skip
