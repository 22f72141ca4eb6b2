"""The table of shapes that rows come in: the columns that tell each one, and how one row of it is converted."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import takewhile
from typing import Literal

from tilt.data import conversations as talk
from tilt.data.sources import Row
from tilt.errors import DataError

Want = Literal["text", "prompt", "sft", "preference", "unpaired", "judged", "stepwise"]
Kind = Literal["text", "prompt", "prompt_completion", "messages", "preference", "unpaired", "stepwise"]


@dataclass(frozen=True)
class Reader:
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


Convert = Callable[[Row, int, Reader], Row | None]
NO_INPUT = re.compile(r"\s*|\W*no\W*input\W*", re.IGNORECASE)


# --- prompts and answers --------------------------------------------------------------------------------------------------


def _alpaca_prompt(row: Row, number: int, reader: Reader) -> str | list[talk.Message]:
    """Instruction, blank line, input; an empty or `noinput` input adds nothing. A system or history column makes it a conversation."""
    given = row.get("input")
    extra = reader.text(row, "input", number) if given is not None else ""
    if NO_INPUT.fullmatch(extra):
        reader.counts["inputs that say there is none"] += bool(extra.strip())
        extra = ""
    asked = reader.text(row, "instruction", number) + ("\n\n" + extra if extra else "")
    if not row.get("system") and not row.get("history"):
        return asked
    earlier: list[talk.Message] = []
    history = row.get("history") or ()
    for exchange in history if isinstance(history, (list, tuple)) else (history,):
        if not isinstance(exchange, (list, tuple)) or len(exchange) != 2 or not all(isinstance(said, str) for said in exchange):
            raise DataError(f"{reader.where(number)}: history must be a list of pairs [question, answer], got {str(exchange)[:80]}")
        earlier += [{"role": role, "content": said} for role, said in zip(("user", "assistant"), exchange, strict=True)]
    return _with_system(row, [*earlier, {"role": "user", "content": asked}], number, reader)


def _prompt_completion(row: Row, number: int, reader: Reader) -> Row:
    return {"prompt": reader.side(row, "prompt", number), "completion": reader.side(row, "completion", number)}


def _alpaca(row: Row, number: int, reader: Reader) -> Row:
    return {"prompt": _alpaca_prompt(row, number, reader), "completion": reader.text(row, "output", number)}


def _gsm8k(row: Row, number: int, reader: Reader) -> Row:
    """The worked answer is the completion; `gold` is the number after `####`, without thousands commas."""
    answer = reader.text(row, "answer", number)
    return {"prompt": reader.text(row, "question", number), "completion": answer, **gold_of(answer)}


def gold_of(answer: str) -> dict[str, str]:
    """`{gold: "2125"}` for an answer that ends in `#### 2,125`; nothing where there is no mark."""
    _, mark, gold = answer.rpartition("####")
    return {"gold": gold.strip().replace(",", "")} if mark else {}


def _svamp(row: Row, number: int, reader: Reader) -> Row:
    """Body and question as one text; a body without final punctuation gets a full stop. `gold` is the declared answer, 51.0 → 51."""
    body, question = reader.text(row, "Body", number).strip(), reader.text(row, "Question", number).strip()
    stop = "" if body.endswith((".", "?", "!", ",", ";", ":")) or not body else "."
    gold = reader.text(row, "Answer", number)
    return {"prompt": f"{body}{stop} {question}".strip(), "completion": gold, "gold": gold}


def _with_system(row: Row, turns: list[talk.Message], number: int, reader: Reader) -> list[talk.Message]:
    if not row.get("system") or turns[0]["role"] == "system":
        return turns
    return [{"role": "system", "content": reader.text(row, "system", number)}, *turns]


def _conversation(column: str) -> Convert:
    def convert(row: Row, number: int, reader: Reader) -> Row | None:
        """Turns up to the last answer; a row without an answer is left out."""
        turns = _with_system(row, reader.turns(row, column, number), number, reader)
        while turns and turns[-1]["role"] != "assistant":
            turns = turns[:-1]
        if not turns:
            reader.counts["conversations without an answer (left out)"] += 1
            return None
        return {"messages": turns}

    return convert


def _prompt_turns(column: str) -> Convert:
    def convert(row: Row, number: int, reader: Reader) -> Row | None:
        """What comes before the last answer, or the whole where the last word is not the assistant's."""
        turns = _with_system(row, reader.turns(row, column, number), number, reader)
        if turns[-1]["role"] != "assistant":
            return {"prompt": turns}
        if len(turns) == 1:
            reader.counts["conversations without a question (left out)"] += 1
            return None
        return {"prompt": turns[:-1], "completion": turns[-1:]}

    return convert


def _good_half(inner: Convert) -> Convert:
    def convert(row: Row, number: int, reader: Reader) -> Row | None:
        """Only rows labelled good are demonstrations."""
        if not _label(row, number, reader):
            reader.counts["labelled bad (left out)"] += 1
            return None
        return inner(row, number, reader)

    return convert


def _label(row: Row, number: int, reader: Reader) -> bool:
    value = row["label"]
    if isinstance(value, str) and value.lower() in ("true", "false", "0", "1"):
        value = value.lower() in ("true", "1")
    if value not in (0, 1):
        raise DataError(f"{reader.where(number)}: label must be true or false, got {value!r}")
    return bool(value)


def _unpaired(inner: Convert) -> Convert:
    def convert(row: Row, number: int, reader: Reader) -> Row | None:
        made = inner(row, number, reader)
        good = _label(row, number, reader)
        reader.counts["labelled good" if good else "labelled bad"] += 1
        return made and {**made, "label": good}

    return convert


# --- steps ----------------------------------------------------------------------------------------------------------------


def _stepwise(column: str) -> Convert:
    def convert(row: Row, number: int, reader: Reader) -> Row | None:
        """Steps and a label for each: whether it is right, as true or false, or as the chance that it is, in [0, 1]."""
        steps, labels, where = row[column], row["labels"], reader.where(number)
        if not isinstance(steps, (list, tuple)) or not all(isinstance(step, str) and step.strip() for step in steps) or not steps:
            raise DataError(f"{where}: {column!r} must be a list of texts, none of them empty, got {str(steps)[:80]}")
        if not isinstance(labels, (list, tuple)) or len(labels) != len(steps):
            count = f"{len(labels)} of them" if isinstance(labels, (list, tuple)) else type(labels).__name__
            raise DataError(f"{where}: 'labels' must hold one label for each of the {len(steps)} steps, got {count}")
        wrong = [label for label in labels if not isinstance(label, (bool, int, float)) or not 0 <= label <= 1]
        if wrong:
            raise DataError(f"{where}: a step's label must be true, false, or a number from 0 to 1, got {wrong[0]!r}")
        reader.counts["steps"] += len(steps)
        reader.counts["of them right"] += sum(label > 0.5 for label in labels)
        return {"prompt": reader.side(row, "prompt", number), "steps": list(steps), "labels": [float(label) for label in labels]}

    return convert


# --- pairs ----------------------------------------------------------------------------------------------------------------


def _explicit(row: Row, number: int, reader: Reader) -> Row | None:
    """Prompt, chosen, rejected; where the answers are whole conversations the prompt is read from them."""
    prompt, chosen, rejected = (reader.side(row, name, number) for name in ("prompt", "chosen", "rejected"))
    if isinstance(chosen, list) and isinstance(rejected, list) and chosen[0]["role"] != "assistant":
        return _common(chosen, rejected, reader)
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def _implicit(row: Row, number: int, reader: Reader) -> Row | None:
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


def _common(chosen: list[talk.Message], rejected: list[talk.Message], reader: Reader) -> Row | None:
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


def _ranking(row: Row, number: int, reader: Reader) -> Row:
    """Answers from the best to the worst: `ranked` holds them all, and the first and the last are the chosen and the rejected one."""
    given = row["answers"]
    if not isinstance(given, (list, tuple)) or len(given) < 2:
        raise DataError(
            f"{reader.where(number)}: answers must be a list of at least two, from the best to the worst, got {str(given)[:80]}"
        )
    sides = [reader.side({"answers": answer}, "answers", number) for answer in given]
    reader.counts["ranked answers"] += len(sides)
    return {"prompt": reader.side(row, "prompt", number), "chosen": sides[0], "rejected": sides[-1], RANKED: sides}


def _alpaca_pair(row: Row, number: int, reader: Reader) -> Row:
    return {
        "prompt": _alpaca_prompt(row, number, reader),
        "chosen": reader.side(row, "chosen", number),
        "rejected": reader.side(row, "rejected", number),
    }


def _conversation_pair(column: str) -> Convert:
    def convert(row: Row, number: int, reader: Reader) -> Row | None:
        prompt = _with_system(row, reader.turns(row, column, number), number, reader)
        sides = [reader.side(row, name, number) for name in ("chosen", "rejected")]
        turns = [[{"role": "assistant", "content": side}] if isinstance(side, str) else side for side in sides]
        if prompt[-1]["role"] == "assistant":
            reader.counts["pairs whose prompt ends with an answer (left out)"] += 1
            return None
        return {"prompt": prompt, "chosen": turns[0], "rejected": turns[1]}

    return convert


def _persona(row: Row, number: int, reader: Reader) -> Row:
    names = ("question", "answer_matching_behavior", "answer_not_matching_behavior")
    prompt, chosen, rejected = (reader.text(row, name, number) for name in names)
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def _llmbar(row: Row, number: int, reader: Reader) -> Row:
    best = reader.text(row, "label", number)
    if best not in ("1", "2"):
        raise DataError(f"{reader.where(number)}: label must be 1 or 2 (which output is better), got {best!r}")
    chosen, rejected = ("output_1", "output_2") if best == "1" else ("output_2", "output_1")
    sides = {"chosen": reader.text(row, chosen, number), "rejected": reader.text(row, rejected, number)}
    return {"prompt": reader.text(row, "input", number), **sides}


def _chosen_only(inner: Convert) -> Convert:
    def convert(row: Row, number: int, reader: Reader) -> Row | None:
        pair = inner(row, number, reader)
        return pair and {"prompt": pair["prompt"], "completion": pair["chosen"]}

    return convert


def _prompt_only(inner: Convert) -> Convert:
    def convert(row: Row, number: int, reader: Reader) -> Row | None:
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


def _text(row: Row, number: int, reader: Reader) -> Row:
    return {"text": reader.text(row, "text", number)}


def _given_prompt(row: Row, number: int, reader: Reader) -> Row:
    return {"prompt": reader.side(row, "prompt", number)}


def _question(row: Row, number: int, reader: Reader) -> Row:
    gold = gold_of(row["answer"]) if isinstance(row.get("answer"), str) else {}
    return {"prompt": reader.text(row, "question", number), **gold}


RANKED = "ranked_answers"
"""The column that holds all answers of a ranking, best first."""
TURNS = "prompt_turns"
"""The column that holds a conversational prompt turn by turn; `prompt` beside it is the same as one text."""

PAIRS = (
    Shape(("prompt", "chosen", "rejected"), "prompt explicit", "preference", _explicit),
    Shape(("instruction", "chosen", "rejected"), "Alpaca", "preference", _alpaca_pair),
    Shape(("conversations", "chosen", "rejected"), "ShareGPT", "preference", _conversation_pair("conversations")),
    Shape(("messages", "chosen", "rejected"), "messages", "preference", _conversation_pair("messages")),
    Shape(("question", "answer_matching_behavior", "answer_not_matching_behavior"), "persona", "preference", _persona),
    Shape(("input", "output_1", "output_2", "label"), "LLMBar", "preference", _llmbar),
    Shape(("chosen", "rejected"), "prompt implicit (longest common prefix)", "preference", _implicit),
    Shape(("prompt", "answers"), "rankings, best first", "preference", _ranking),
)
LABELLED = (
    Shape(("prompt", "completion", "label"), "labelled answers", "unpaired", _unpaired(_prompt_completion)),
    Shape(("messages", "label"), "labelled messages", "unpaired", _unpaired(_prompt_turns("messages"))),
    Shape(("conversations", "label"), "labelled ShareGPT", "unpaired", _unpaired(_prompt_turns("conversations"))),
)
STEPWISE = (
    Shape(("prompt", "steps", "labels"), "labelled steps", "stepwise", _stepwise("steps")),
    Shape(("prompt", "completions", "labels"), "labelled steps", "stepwise", _stepwise("completions")),
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
        *(Shape(pair.needs, f"the chosen half of pairs, {pair.name}", "prompt_completion", _chosen_only(pair.convert)) for pair in PAIRS),
        Shape(("messages",), "messages", "messages", _conversation("messages")),
        Shape(("conversations",), "ShareGPT", "messages", _conversation("conversations")),
        Shape(("text",), "plain text", "text", _text),
    ),
    "preference": PAIRS,
    "unpaired": LABELLED,
    "judged": (*PAIRS, *LABELLED),
    "stepwise": STEPWISE,
}
