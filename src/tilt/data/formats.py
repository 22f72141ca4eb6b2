"""Rows in their many shapes, recognised by their columns and converted to a few canonical ones."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Literal

from tilt.data import conversations as talk
from tilt.data.sources import Row, rename
from tilt.errors import DataError

Want = Literal["text", "prompt", "sft", "preference", "unpaired"]
Kind = Literal["text", "prompt", "prompt_completion", "messages", "preference", "unpaired"]


@dataclass(frozen=True)
class Dataset:
    """Rows of one canonical kind, how they were read, and what was odd about them.

    text: `text`. prompt: `prompt`. prompt_completion: `prompt, completion`. messages: `messages`. preference: `prompt, chosen, rejected`.
    unpaired: `prompt, completion, label`. A prompt or an answer is a string, or a list of {role, content}; other columns are kept.
    """

    kind: Kind
    conversational: bool
    rows: list[Row]
    note: str
    counts: dict[str, int]

    def summary(self) -> str:
        """`1,100 rows, read as preference …; 6 identical pairs, 25 repeated prompts`."""
        odd = ", ".join(f"{n:,} {name}" for name, n in self.counts.items())
        return f"{len(self.rows):,} rows, {self.note}" + (f"; {odd}" if odd else "")


@dataclass(frozen=True)
class _Reader:
    """What a conversion needs beside its row: the words for errors, the table of roles, the tally of oddities."""

    source: str
    roles: Mapping[str, str]
    counts: Counter[str]

    def where(self, number: int) -> str:
        return f"{self.source}: row {number}" if self.source else f"row {number}"

    def text(self, row: Row, column: str, number: int) -> str:
        """A cell as text; whole floats lose their point: 51.0 → 51."""
        value = row[column]
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return str(value)
        if not isinstance(value, str):
            raise DataError(f"{self.where(number)}: column {column!r} is {type(value).__name__}, not text: {str(value)[:80]}")
        return value

    def side(self, row: Row, column: str, number: int) -> str | list[talk.Message]:
        """A prompt or an answer: text, or turns where it is a list or an object."""
        if isinstance(row[column], (list, tuple, Mapping)):
            return self.turns(row, column, number)
        return self.text(row, column, number)

    def turns(self, row: Row, column: str, number: int) -> list[talk.Message]:
        return talk.messages(row[column], f"{self.where(number)}, {column}", self.roles)


Convert = Callable[[Row, int, _Reader], Row | None]
NO_INPUT = re.compile(r"\s*|\W*no\W*input\W*", re.IGNORECASE)
PLACEHOLDER = re.compile(r"\{\{\s*\w+\s*\}\}")


# --- prompts and answers --------------------------------------------------------------------------------------------------


def _alpaca_prompt(row: Row, number: int, reader: _Reader) -> str | list[talk.Message]:
    """Instruction, blank line, input; an empty or `noinput` input adds nothing. A system column makes it a conversation."""
    given = row.get("input")
    extra = reader.text(row, "input", number) if given is not None else ""
    if NO_INPUT.fullmatch(extra):
        reader.counts["inputs that say there is none"] += bool(extra.strip())
        extra = ""
    asked = reader.text(row, "instruction", number) + ("\n\n" + extra if extra else "")
    return [{"role": "system", "content": row["system"]}, {"role": "user", "content": asked}] if row.get("system") else asked


def _prompt_completion(row: Row, number: int, reader: _Reader) -> Row:
    return {"prompt": reader.side(row, "prompt", number), "completion": reader.side(row, "completion", number)}


def _alpaca(row: Row, number: int, reader: _Reader) -> Row:
    return {"prompt": _alpaca_prompt(row, number, reader), "completion": reader.text(row, "output", number)}


def _gsm8k(row: Row, number: int, reader: _Reader) -> Row:
    """The worked answer is the completion; `gold` is the number after `####`, without thousands commas."""
    answer = reader.text(row, "answer", number)
    return {"prompt": reader.text(row, "question", number), "completion": answer, **gold_of(answer)}


def gold_of(answer: str) -> dict[str, str]:
    """`{gold: "2125"}` for an answer that ends in `#### 2,125`; nothing where there is no mark."""
    _, mark, gold = answer.rpartition("####")
    return {"gold": gold.strip().replace(",", "")} if mark else {}


def _svamp(row: Row, number: int, reader: _Reader) -> Row:
    """Body and question as one text; a body without final punctuation gets a full stop. `gold` is the declared answer, 51.0 → 51."""
    body, question = reader.text(row, "Body", number).strip(), reader.text(row, "Question", number).strip()
    stop = "" if body.endswith((".", "?", "!", ",", ";", ":")) or not body else "."
    gold = reader.text(row, "Answer", number)
    return {"prompt": f"{body}{stop} {question}".strip(), "completion": gold, "gold": gold}


def _with_system(row: Row, turns: list[talk.Message]) -> list[talk.Message]:
    return [{"role": "system", "content": row["system"]}, *turns] if row.get("system") and turns[0]["role"] != "system" else turns


def _conversation(column: str) -> Convert:
    def convert(row: Row, number: int, reader: _Reader) -> Row | None:
        """Turns up to the last answer; a row without an answer is left out."""
        turns = _with_system(row, reader.turns(row, column, number))
        while turns and turns[-1]["role"] != "assistant":
            turns = turns[:-1]
        if not turns:
            reader.counts["conversations without an answer (left out)"] += 1
            return None
        return {"messages": turns}

    return convert


def _prompt_turns(column: str) -> Convert:
    def convert(row: Row, number: int, reader: _Reader) -> Row | None:
        """What comes before the last answer, or the whole where the last word is not the assistant's."""
        turns = _with_system(row, reader.turns(row, column, number))
        if turns[-1]["role"] != "assistant":
            return {"prompt": turns}
        if len(turns) == 1:
            reader.counts["conversations without a question (left out)"] += 1
            return None
        return {"prompt": turns[:-1], "completion": turns[-1:]}

    return convert


def _good_half(inner: Convert) -> Convert:
    def convert(row: Row, number: int, reader: _Reader) -> Row | None:
        """Only rows labelled good are demonstrations."""
        if not _label(row, number, reader):
            reader.counts["labelled bad (left out)"] += 1
            return None
        return inner(row, number, reader)

    return convert


def _label(row: Row, number: int, reader: _Reader) -> bool:
    value = row["label"]
    if isinstance(value, str) and value.lower() in ("true", "false", "0", "1"):
        value = value.lower() in ("true", "1")
    if value not in (0, 1):
        raise DataError(f"{reader.where(number)}: label must be true or false, got {value!r}")
    return bool(value)


def _unpaired(inner: Convert) -> Convert:
    def convert(row: Row, number: int, reader: _Reader) -> Row | None:
        made = inner(row, number, reader)
        good = _label(row, number, reader)
        reader.counts["labelled good" if good else "labelled bad"] += 1
        return made and {**made, "label": good}

    return convert


# --- pairs ----------------------------------------------------------------------------------------------------------------


def _explicit(row: Row, number: int, reader: _Reader) -> Row | None:
    """Prompt, chosen, rejected; where the answers are whole conversations the prompt is read from them."""
    prompt, chosen, rejected = (reader.side(row, name, number) for name in ("prompt", "chosen", "rejected"))
    if isinstance(chosen, list) and isinstance(rejected, list) and chosen[0]["role"] != "assistant":
        return _common(chosen, rejected, reader)
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def _implicit(row: Row, number: int, reader: _Reader) -> Row | None:
    """The prompt is the longest common prefix at a turn boundary."""
    sides: list[list[talk.Message]] = []
    for name in ("chosen", "rejected"):
        if isinstance(row[name], str) and not talk.is_hh(row[name]):
            raise DataError(
                f"{reader.where(number)}: {name!r} is plain text without turns, so no prompt can be told from it\n"
                "  add a prompt column, or write turns: messages, or '\\n\\nHuman: …\\n\\nAssistant: …'"
            )
        sides.append(talk.split_hh(row[name]) if isinstance(row[name], str) else reader.turns(row, name, number))
    if talk.is_hh(row["chosen"]):
        merged = [talk.merge_turns(side) for side in sides]
        reader.counts["rows with turns of one role in a row (merged)"] += any(len(a) < len(b) for a, b in zip(merged, sides, strict=True))
        if sides[0][-1]["role"] == sides[1][-1]["role"] == "assistant" and sides[0][:-1] != sides[1][:-1]:
            reader.counts["pairs whose prompts differ (left out)"] += 1
            return None
        sides = merged
    return _common(sides[0], sides[1], reader)


def _common(chosen: list[talk.Message], rejected: list[talk.Message], reader: _Reader) -> Row | None:
    """Both sides cut after their longest common prefix; each must go on with an answer and end with one."""
    shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(chosen[:-1], rejected[:-1], strict=False)))
    prompt, sides = chosen[:shared], (chosen[shared:], rejected[shared:])
    if any(side[-1]["role"] != "assistant" for side in sides):
        reader.counts["pairs that do not end with an answer (left out)"] += 1
        return None
    if not prompt or any(side[0]["role"] != "assistant" for side in sides):
        reader.counts["pairs whose prompts differ (left out)"] += 1
        return None
    return {"prompt": prompt, "chosen": sides[0], "rejected": sides[1]}


def _alpaca_pair(row: Row, number: int, reader: _Reader) -> Row:
    return {
        "prompt": _alpaca_prompt(row, number, reader),
        "chosen": reader.side(row, "chosen", number),
        "rejected": reader.side(row, "rejected", number),
    }


def _conversation_pair(column: str) -> Convert:
    def convert(row: Row, number: int, reader: _Reader) -> Row | None:
        prompt = _with_system(row, reader.turns(row, column, number))
        sides = [reader.side(row, name, number) for name in ("chosen", "rejected")]
        turns = [[{"role": "assistant", "content": side}] if isinstance(side, str) else side for side in sides]
        if prompt[-1]["role"] == "assistant":
            reader.counts["pairs whose prompt ends with an answer (left out)"] += 1
            return None
        return {"prompt": prompt, "chosen": turns[0], "rejected": turns[1]}

    return convert


def _persona(row: Row, number: int, reader: _Reader) -> Row:
    names = ("question", "answer_matching_behavior", "answer_not_matching_behavior")
    prompt, chosen, rejected = (reader.text(row, name, number) for name in names)
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def _llmbar(row: Row, number: int, reader: _Reader) -> Row:
    best = reader.text(row, "label", number)
    if best not in ("1", "2"):
        raise DataError(f"{reader.where(number)}: label must be 1 or 2 (which output is better), got {best!r}")
    chosen, rejected = ("output_1", "output_2") if best == "1" else ("output_2", "output_1")
    sides = {"chosen": reader.text(row, chosen, number), "rejected": reader.text(row, rejected, number)}
    return {"prompt": reader.text(row, "input", number), **sides}


def _chosen_only(inner: Convert) -> Convert:
    def convert(row: Row, number: int, reader: _Reader) -> Row | None:
        pair = inner(row, number, reader)
        return pair and {"prompt": pair["prompt"], "completion": pair["chosen"]}

    return convert


def _prompt_only(inner: Convert) -> Convert:
    def convert(row: Row, number: int, reader: _Reader) -> Row | None:
        made = inner(row, number, reader)
        return made and {key: value for key, value in made.items() if key in ("prompt", "gold")}

    return convert


# --- the table ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shape:
    """Columns that identify a shape, the words that announce it, the kind it becomes, and the conversion of one row."""

    needs: tuple[str, ...]
    name: str
    kind: Kind
    convert: Convert


def _text(row: Row, number: int, reader: _Reader) -> Row:
    return {"text": reader.text(row, "text", number)}


def _given_prompt(row: Row, number: int, reader: _Reader) -> Row:
    return {"prompt": reader.side(row, "prompt", number)}


def _question(row: Row, number: int, reader: _Reader) -> Row:
    gold = gold_of(row["answer"]) if isinstance(row.get("answer"), str) else {}
    return {"prompt": reader.text(row, "question", number), **gold}


PAIRS = (
    Shape(("prompt", "chosen", "rejected"), "prompt explicit", "preference", _explicit),
    Shape(("instruction", "chosen", "rejected"), "Alpaca", "preference", _alpaca_pair),
    Shape(("conversations", "chosen", "rejected"), "ShareGPT", "preference", _conversation_pair("conversations")),
    Shape(("messages", "chosen", "rejected"), "messages", "preference", _conversation_pair("messages")),
    Shape(("question", "answer_matching_behavior", "answer_not_matching_behavior"), "persona", "preference", _persona),
    Shape(("input", "output_1", "output_2", "label"), "LLMBar", "preference", _llmbar),
    Shape(("chosen", "rejected"), "prompt implicit (longest common prefix)", "preference", _implicit),
)
LABELLED = (
    Shape(("prompt", "completion", "label"), "labelled answers", "unpaired", _unpaired(_prompt_completion)),
    Shape(("messages", "label"), "labelled messages", "unpaired", _unpaired(_prompt_turns("messages"))),
    Shape(("conversations", "label"), "labelled ShareGPT", "unpaired", _unpaired(_prompt_turns("conversations"))),
)
ANSWERS = (
    Shape(("prompt", "completion"), "prompt and completion", "prompt_completion", _prompt_completion),
    Shape(("instruction", "output"), "Alpaca", "prompt_completion", _alpaca),
    Shape(("question", "answer"), "question and answer", "prompt_completion", _gsm8k),
    Shape(("Body", "Question", "Answer"), "SVAMP", "prompt_completion", _svamp),
)
SHAPES: dict[Want, tuple[Shape, ...]] = {
    "text": (Shape(("text",), "plain text", "text", _text),),
    "prompt": (
        Shape(("prompt",), "prompts", "prompt", _given_prompt),
        Shape(("instruction",), "Alpaca instructions", "prompt", lambda row, n, reader: {"prompt": _alpaca_prompt(row, n, reader)}),
        Shape(("question",), "questions", "prompt", _question),
        Shape(("Body", "Question", "Answer"), "SVAMP", "prompt", _prompt_only(_svamp)),
        Shape(("messages",), "messages", "prompt", _prompt_turns("messages")),
        Shape(("conversations",), "ShareGPT", "prompt", _prompt_turns("conversations")),
        Shape(("input", "output_1", "output_2", "label"), "LLMBar", "prompt", _prompt_only(_llmbar)),
        Shape(("chosen", "rejected"), "prompts of pairs (longest common prefix)", "prompt", _prompt_only(_implicit)),
    ),
    "sft": (
        Shape(("prompt", "completion", "label"), "the good half of labelled answers", "prompt_completion", _good_half(_prompt_completion)),
        *ANSWERS,
        Shape(("messages", "label"), "the good half of labelled messages", "messages", _good_half(_conversation("messages"))),
        *(
            Shape(pair.needs, f"the chosen half of pairs, {pair.name}", "prompt_completion", _chosen_only(pair.convert))
            for pair in PAIRS
        ),
        Shape(("messages",), "messages", "messages", _conversation("messages")),
        Shape(("conversations",), "ShareGPT", "messages", _conversation("conversations")),
        Shape(("text",), "plain text", "text", _text),
    ),
    "preference": PAIRS,
    "unpaired": LABELLED,
}
NEEDED: dict[Want, tuple[str, ...]] = {
    "text": ("text",),
    "prompt": ("prompt",),
    "sft": ("prompt", "completion"),
    "preference": ("prompt", "chosen", "rejected"),
    "unpaired": ("prompt", "completion", "label"),
}


def read(
    rows: Sequence[Row],
    *,
    want: Want,
    columns: Mapping[str, str] | None = None,
    source: str = "",
    roles: Mapping[str, str] | None = None,
) -> Dataset:
    """Recognise the shape of rows by their columns and convert them to what a recipe wants.

    `columns` {canonical: found} overrides recognition; `roles` {spelling: system|user|assistant|tool} extends the table of roles.
    """
    if not rows:
        raise DataError(f"{source or 'the data'} has no rows")
    rows = rename(rows, columns or {}, source or "the data")
    shape = recognise(rows, want, source)
    reader = _Reader(source, {**talk.ROLES, **(roles or {})}, Counter())
    made: list[Row] = []
    for number, row in enumerate(rows):
        absent = next((name for name in shape.needs if row.get(name) is None), None)
        if absent:
            raise DataError(f"{reader.where(number)} has no {absent!r}; other rows have it\n  the row: {str(row)[:120]}")
        converted = shape.convert(row, number, reader)
        if converted is not None:
            kept = {key: value for key, value in row.items() if key not in ("messages", "conversations", "tools")}
            made.append({**kept, **_tools(row, reader.where(number)), **converted})
    if not made:
        raise DataError(f"{source or 'the data'}: none of {len(rows)} rows can be used: {dict(reader.counts)}")
    talking = any(isinstance(row.get(key), list) for row in made for key in ("prompt", "messages"))
    counts = {name: n for name, n in (*reader.counts.items(), *oddities(made, shape.kind).items()) if n}
    said = f"read as {shape.kind.replace('_', ' and ')}, {'conversational' if talking else 'plain text'}"
    note = f"{said}; {shape.name}" if shape.name not in said else said
    return Dataset(shape.kind, talking, made, note, counts)


def recognise(rows: Sequence[Row], want: Want, source: str = "") -> Shape:
    """The first shape whose columns the rows have; otherwise an error that shows how to map columns."""
    found = list(dict.fromkeys(name for row in rows for name in row))
    for shape in SHAPES[want]:
        if set(shape.needs) <= set(found):
            return shape
    needs = NEEDED[want]
    example = ", ".join(f"{name}: {found[i] if i < len(found) else '…'}" for i, name in enumerate(needs))
    missing = [name for name in needs if name not in found]
    shapes = dict.fromkeys(", ".join(shape.needs) for shape in SHAPES[want])
    raise DataError(
        f"{source or 'the data'} cannot be read as {want}: missing {', '.join(missing)}\n"
        f"  columns found: {', '.join(found)}\n"
        f"  columns that serve: {'; '.join(shapes)}\n"
        f"  map yours, for example:  columns: {{{example}}}"
    )


def _tools(row: Row, where: str) -> Row:
    """The `tools` column as a list; it may be a JSON string, and an empty list means none."""
    tools = row.get("tools")
    if isinstance(tools, str) and tools.strip():
        try:
            tools = json.loads(tools)
        except json.JSONDecodeError as error:
            raise DataError(f"{where}: broken JSON in tools: {error.msg} at character {error.pos}") from None
    return {"tools": tools} if tools else {}


def prompt_text(row: Row) -> str:
    """What a canonical row asks, as one string: equal prompts give equal strings."""
    if "prompt" in row:
        return talk.plain_text(row["prompt"])
    if "messages" in row:
        return talk.plain_text(row["messages"][:-1] or row["messages"])
    return str(row["text"])


def oddities(rows: Sequence[Row], kind: Kind) -> dict[str, int]:
    """Counts of what a user should know before training: empty and identical answers, repeats, unfilled placeholders."""
    answers = {"prompt_completion": ("completion",), "unpaired": ("completion",), "preference": ("chosen", "rejected")}.get(kind, ())
    said = [tuple(talk.plain_text(row[name]) for name in answers) for row in rows]
    if kind == "messages":
        said = [(row["messages"][-1]["content"],) for row in rows]
    asked = [prompt_text(row) for row in rows]
    whole = set(zip(asked, said, strict=True))
    return {
        "empty prompts": sum(not text.strip() for text in asked),
        "empty answers": sum(not text.strip() for texts in said for text in texts),
        "identical pairs": sum(len(texts) == 2 and texts[0] == texts[1] for texts in said),
        "duplicate rows": len(rows) - len(whole) if kind != "prompt" else 0,
        "repeated prompts": len(rows) - len(set(asked)) if kind != "text" else 0,
        "rows with {{placeholders}}": sum(any(map(PLACEHOLDER.search, (text, *texts))) for text, texts in zip(asked, said, strict=True)),
    }
