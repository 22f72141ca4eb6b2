"""Conversations in their many spellings, as lists of {role, content}: messages, ShareGPT turns, HH strings."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from tilt.errors import DataError

Message = dict[str, Any]

ROLES: dict[str, str] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "tool_call": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "tool_response": "tool",
}


def message(value: Any, where: str, roles: Mapping[str, str] = ROLES) -> Message:
    """One turn as {role, content}: {from: gpt, value: Hi} → {role: assistant, content: Hi}. `where` names the row in errors."""
    if not isinstance(value, Mapping):
        raise DataError(f"{where}: a turn is {type(value).__name__}, not an object with role and content: {str(value)[:80]!r}")
    spelled = value.get("role", value.get("from"))
    content = value.get("content", value.get("value"))
    if spelled is None or ("content" not in value and "value" not in value and "tool_calls" not in value):
        raise DataError(f"{where}: a turn needs role and content (or from and value), it has {', '.join(map(str, value))}")
    role = roles.get(str(spelled), roles.get(str(spelled).lower()))
    if role is None:
        raise DataError(
            f"{where}: unknown role {spelled!r}\n  known roles: {', '.join(sorted(roles))}\n  name yours: roles: {{{spelled}: assistant}}"
        )
    if isinstance(content, list):
        content = "".join(_part(part, where) for part in content)
    if not content and value.get("tool_calls"):
        content = "\n".join(_call(call, where) for call in _listed(value["tool_calls"], "tool_calls", where))
    if not isinstance(content, str):
        raise DataError(f"{where}: the content of a {spelled} turn is {type(content).__name__}, not text: {str(content)[:80]}")
    return {"role": role, "content": content}


def _part(part: Any, where: str) -> str:
    if isinstance(part, str):
        return part
    if isinstance(part, Mapping) and isinstance(part.get("text"), str):
        return str(part["text"])
    kind = part.get("type", "?") if isinstance(part, Mapping) else type(part).__name__
    raise DataError(f"{where}: a turn has a part of type {kind!r}; only text is read")


def _call(call: Any, where: str) -> str:
    """A tool call as JSON: what its `function` says, or the whole."""
    if not isinstance(call, Mapping):
        raise DataError(f"{where}: a tool call is {type(call).__name__}, not an object: {str(call)[:80]!r}")
    try:
        return json.dumps(call.get("function", call), ensure_ascii=False)
    except (TypeError, ValueError) as error:
        raise DataError(f"{where}: a tool call cannot be written as JSON: {error}") from None


def _listed(value: Any, name: str, where: str) -> Sequence[Any]:
    if not isinstance(value, (list, tuple)):
        raise DataError(f"{where}: {name} is {type(value).__name__}, not a list: {str(value)[:80]!r}")
    return value


def from_json(text: str, what: str, where: str) -> Any:
    """What a cell spells in JSON (as in csv files)."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: broken JSON in {what}: {error.msg} at character {error.pos}") from None
    except (ValueError, RecursionError):
        raise DataError(f"{where}: JSON in {what} with thousands of digits or of brackets: {text[:80]!r}") from None


def messages(value: Any, where: str, roles: Mapping[str, str] = ROLES) -> list[Message]:
    """A list of turns; a JSON string of one (as in csv files) and a single turn serve too."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        value = from_json(value, "a conversation", where)
    if isinstance(value, Mapping):
        value = [value]
    if not isinstance(value, (list, tuple)) or not value:
        raise DataError(f"{where}: expected a list of turns with role and content, got {str(value)[:80]!r}")
    return [message(turn, where, roles) for turn in value]


_TURN = re.compile(r"\n\n(Human|Assistant):")


def is_hh(value: Any) -> bool:
    """Whether this is a dialogue in one string: blank line, `Human:` or `Assistant:`, text, and so on."""
    return isinstance(value, str) and ("\n\n" + value.lstrip("\n")).startswith(("\n\nHuman:", "\n\nAssistant:"))


def split_hh(text: str) -> list[Message]:
    """The turns of a dialogue string; one blank after the colon belongs to the mark, not to the turn.

    Worked example: "\\n\\nHuman: Hi\\n\\nAssistant: Hello" → user Hi, assistant Hello.
    """
    pieces = _TURN.split("\n\n" + text.lstrip("\n"))[1:]
    return [
        {"role": "user" if mark == "Human" else "assistant", "content": said.removeprefix(" ")}
        for mark, said in zip(pieces[::2], pieces[1::2], strict=True)
    ]


def merge_turns(turns: Sequence[Message]) -> list[Message]:
    """Neighbouring turns of one role become one turn, joined by a blank line."""
    merged: list[Message] = []
    for turn in turns:
        if merged and merged[-1]["role"] == turn["role"]:
            merged[-1] = {**merged[-1], "content": merged[-1]["content"] + "\n\n" + turn["content"]}
        else:
            merged.append(dict(turn))
    return merged


def plain_text(value: Any) -> str:
    """A prompt or an answer as one readable string, whatever its form: `role: content` lines where there are several turns."""
    if isinstance(value, str):
        return value
    if len(value) == 1:
        return str(value[0]["content"])
    return "\n".join(f"{turn['role']}: {turn['content']}" for turn in value)
