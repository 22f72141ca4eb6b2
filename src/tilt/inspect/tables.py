"""Stored rollouts as the page reads them: summaries of whole steps, and one rollout with every token. No torch: a viewer starts at once."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tilt.errors import DataError

SCHEMA_VERSION = 2
SNIPPET, PROMPT = 120, 200
LISTS = (
    "sampler_logprobs", "old_logprobs", "reference_logprobs", "new_logprobs", "delta_ref", "kl", "adv_t", "value", "return", "token_reward",
    "ratio", "clip", "entropy", "push", "push_dist", "push_value", "result",
)  # fmt: skip
"""Channels: one number a token."""

Floats = np.ndarray[Any, Any]


def number(value: Any) -> Any:
    """A number as JSON can hold it: five significant digits, text where it is not finite, None where there is none."""
    if value is None or isinstance(value, (bool, int)):
        return value
    value = float(value)
    return float(f"{value:.5g}") if math.isfinite(value) else "nan" if math.isnan(value) else "inf" if value > 0 else "-inf"


def key_of(prompt: str) -> str:
    """A short name of a prompt, the same in every step."""
    return blake2b(prompt.encode("utf-8", "replace"), digest_size=6).hexdigest()


def repetition(text: str) -> float:
    """The share of runs of three words (of three characters where there are no blanks) that came before in the text: `a b c a b c` → 0.25."""
    parts: Sequence[str] = text.split() if " " in text.strip() else text
    grams = [tuple(parts[i : i + 3]) for i in range(len(parts) - 2)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


class Rows:
    """The rollouts of one file. Columns may be missing, and unknown ones are not read."""

    def __init__(self, table: pa.Table, step: int) -> None:
        self.table, self.step, self.count = table, step, table.num_rows
        self._lists: dict[str, tuple[Floats, Floats]] = {}
        self._plain: dict[str, list[Any]] = {}
        for name in ("prompt", "completion"):
            if name not in table.column_names or not (pa.types.is_string(table[name].type) or pa.types.is_large_string(table[name].type)):
                raise DataError(f"step {step} is no file of rollouts: it has no column of texts `{name}`")

    @staticmethod
    def read(file: Path, step: int) -> Rows:
        """A stored step, or a sentence that says why it cannot be read."""
        try:
            schema = pq.read_schema(file)
            said = (schema.metadata or {}).get(b"schema_version", b"")
            if said.isdigit() and int(said) > SCHEMA_VERSION:
                raise DataError(f"{file} has schema version {int(said)}; this tilt reads up to {SCHEMA_VERSION}: upgrade it")
            return Rows(pq.read_table(file), step)
        except (pa.ArrowException, OSError, ValueError, MemoryError) as error:
            raise DataError(
                f"{file} is not a readable file of rollouts: {(str(error) or type(error).__name__).splitlines()[0][:200]}"
            ) from None

    # --- columns ----------------------------------------------------------------------------------------------------------

    def has(self, name: str) -> bool:
        return name in self.table.column_names

    def plain(self, name: str) -> list[Any]:
        """A column as plain values; None everywhere where it is missing. Columns of single values are kept, lists of tokens are not."""
        if not self.has(name):
            return [None] * self.count
        if pa.types.is_list(self.table[name].type):
            return list(self.table[name].to_pylist())
        if name not in self._plain:
            self._plain[name] = self.table[name].to_pylist()
        return self._plain[name]

    @property
    def prompts(self) -> list[str]:
        return [text or "" for text in self.plain("prompt")]

    @property
    def completions(self) -> list[str]:
        return [text or "" for text in self.plain("completion")]

    @property
    def groups(self) -> list[int]:
        """Which prompt each answers: the group's number, or where none is stored that of the prompt's text."""
        if self.has("group_id"):
            return [g if isinstance(g, int) else -1 for g in self.plain("group_id")]
        known: dict[str, int] = {}
        return [known.setdefault(prompt, len(known)) for prompt in self.prompts]

    @property
    def channels(self) -> list[str]:
        """The channels that are stored, in the order of the schema."""
        return [name for name in LISTS if self.has(name) and pa.types.is_list(self.table[name].type)]

    def lists(self, name: str) -> tuple[Floats, Floats]:
        """A column of lists: where each row begins [R + 1], and all values in one row, NaN for null."""
        if name not in self._lists:
            column = self.table[name].combine_chunks()
            chunk = column.chunk(0) if isinstance(column, pa.ChunkedArray) and column.num_chunks else column
            if self.count == 0:
                return np.zeros(1, np.int64), np.zeros(0, np.float32)
            lengths = np.asarray(chunk.value_lengths().fill_null(0))
            values = chunk.flatten()
            flat = np.asarray(values.cast(pa.float32()) if not pa.types.is_float16(values.type) else values, np.float32)
            self._lists[name] = (np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64), flat)
        return self._lists[name]

    # --- a step as a list -------------------------------------------------------------------------------------------------

    def per_row(self, name: str, reduce: Callable[[Floats], float]) -> list[float | None]:
        """One number a row from a channel, None where it holds none."""
        if name not in self.channels:
            return [None] * self.count
        starts, values = self.lists(name)
        return [_reduced(values[a:b], reduce) for a, b in zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True)]

    def summary(self) -> dict[str, Any]:
        """Every rollout in a line, as columns."""
        prompts, completions = self.prompts, self.completions
        keys = [key_of(prompt) for prompt in prompts]
        known = {key: i for i, key in enumerate(dict.fromkeys(keys))}
        first = dict(zip(reversed(keys), reversed(prompts), strict=True))
        lengths = self.plain("length") if self.has("length") else [len(text) for text in completions]
        found: dict[str, Any] = {
            "row": list(range(self.count)), "group": self.groups, "key": keys, "prompt": [known[key] for key in keys],
            "prompts": [cut(first[key], PROMPT) for key in known], "completion": [cut(text, SNIPPET) for text in completions],
            "reward": [number(x) for x in self.plain("reward")], "advantage": [number(x) for x in self.plain("advantage")],
            "length": lengths, "truncated": [int(bool(x)) for x in self.plain("truncated")], "finish": self.plain("finish_reason"),
            "dropped": self.plain("dropped_reason"), "role": self.plain("role"), "split": self.plain("split"), "margin": self.margins(),
            "clipped": [None if x is None else int(x) for x in self.per_row("clip", lambda v: float((np.abs(v) == 1).sum()))],
            "kl": [number(x) for x in self.per_row("kl", lambda v: float(v.sum()))],
            "delta_max": [number(x) for x in self.per_row("delta_ref", lambda v: float(np.abs(v).max()))],
            "push": [number(x) for x in self.per_row("push", lambda v: float(np.abs(v).sum()))],
            "entropy": [number(x) for x in self.per_row("entropy", lambda v: float(v.mean()))],
            "repetition": [number(repetition(text)) for text in completions], "parts": self.parts(),
        }  # fmt: skip
        return found | {"odd": suspects(found)}

    @property
    def weights(self) -> dict[str, float]:
        """What each part of the reward counts for; 1 where the file does not say. A part that judged steps counts at its steps, and 0 here."""
        said = _json(((self.table.schema.metadata or {}).get(b"reward_weights") or b"{}").decode("utf-8", "replace"))
        known = said if isinstance(said, dict) else {}
        parts = self.table["rewards"].type if self.has("rewards") else None
        names = [field.name for field in parts] if parts is not None and pa.types.is_struct(parts) else []
        return {name: float(known[name]) if isinstance(known.get(name), (int, float)) else 1.0 for name in names}

    def margins(self) -> list[Any]:
        """Of the two answers of a pair how far the chosen one is ahead of the rejected one; None for all other answers."""
        roles, rewards, groups = self.plain("role"), self.plain("reward"), self.groups
        sides: dict[int, dict[str, Any]] = {}
        for group, role, reward in zip(groups, roles, rewards, strict=True):
            if role in ("chosen", "rejected"):
                sides.setdefault(group, {})[role] = reward
        ahead = {
            group: number(pair["chosen"] - pair["rejected"])
            for group, pair in sides.items() if len(pair) == 2 and None not in pair.values()
        }  # fmt: skip
        return [ahead.get(group) if role in ("chosen", "rejected") else None for group, role in zip(groups, roles, strict=True)]

    def parts(self) -> dict[str, list[Any]]:
        """Every part of the reward as a column, before its weight."""
        parts = self.plain("rewards")
        names = list(dict.fromkeys(name for each in parts if isinstance(each, Mapping) for name in each))
        return {name: [number((each or {}).get(name)) for each in parts] for name in names}

    # --- one rollout ------------------------------------------------------------------------------------------------------

    def detail(self, row: int) -> dict[str, Any]:
        """One rollout with its tokens, channels, alternatives and the reasons of its reward."""
        if not 0 <= row < self.count:
            raise DataError(f"step {self.step} has rows 0 to {self.count - 1}, and no row {row}")
        one = self.table.slice(row, 1).to_pylist()[0]
        prompt, completion = one.get("prompt") or "", one.get("completion") or ""
        ids = _ints(one.get("ids"))
        tokens, hexes = pieces(completion, one.get("text_offsets"), len(ids) if ids else None)
        channels = {name: [number(x) for x in one[name]] for name in self.channels if one.get(name) is not None}
        return {
            "step": self.step, "row": row, "group": self.groups[row], "key": key_of(prompt), "prompt": prompt, "completion": completion,
            "messages": one.get("messages"), "finish": one.get("finish_reason"), "reward": number(one.get("reward")), "role": one.get("role"), "margin": self.margins()[row],
            "parts": {name: number(x) for name, x in (one.get("rewards") or {}).items()}, "weights": self.weights, "checker": _json(one.get("checker")),
            "advantage": number(one.get("advantage")), "group_mean": number(one.get("group_mean")), "group_std": number(one.get("group_std")),
            "length": one.get("length") if one.get("length") is not None else len(completion), "truncated": bool(one.get("truncated")),
            "dropped": one.get("dropped_reason"), "reckoned": reckoned(number(one.get("reward")), {name: number(x) for name, x in (one.get("rewards") or {}).items()}, self.weights), "push_score": number(one.get("push_score")), "tokens": tokens, "bytes": hexes,
            "ids": ids if tokens else [], "mask": _ints(one.get("mask")) if tokens else [],
            "channels": {name: values for name, values in channels.items() if len(values) == len(tokens) and any(v != "nan" for v in values)}, "top": _top(one),
        }  # fmt: skip

    def siblings(self, row: int) -> dict[str, Any]:
        """All answers to the same prompt in this step, this one first, and of each the first token that differs from this one's."""
        group = self.groups
        rows = [row, *(i for i in range(self.count) if group[i] == group[row] and i != row)]
        details = [self.detail(i) for i in rows]
        return {"rows": details, "divergence": [first_difference(details[0], other) for other in details]}


def reckoned(reward: Any, parts: Mapping[str, Any], weights: Mapping[str, float]) -> str:
    """How a reward came about: `= 1 correct + 0.5 × 0.2 format`, with ← instead of = where the parts do not add up to it (a part that failed, a limit, normalised
    parts); empty without parts."""
    if not parts:
        return ""
    known = {name: value for name, value in parts.items() if isinstance(value, (int, float))}
    total = sum(weights.get(name, 1.0) * value for name, value in known.items())
    adds = isinstance(reward, (int, float)) and abs(total - reward) <= 1e-3 * max(1.0, abs(reward))
    terms = [(f"{weights[name]:g} × " if weights.get(name, 1.0) != 1 else "") + f"{value:.4g} {name}" for name, value in known.items()]
    failed = [f"nothing from {name}" for name in parts if name not in known]
    return ("= " if adds else "← ") + " + ".join([*terms, *failed])


def _reduced(values: Floats, reduce: Callable[[Floats], float]) -> float | None:
    values = values[~np.isnan(values)]
    return reduce(values) if len(values) else None


def _ints(values: Any) -> list[int]:
    return [int(v or 0) for v in values] if isinstance(values, list) else []


def _json(text: Any) -> Any:
    try:
        return json.loads(text) if isinstance(text, str) else {}
    except ValueError:
        return {}


def _top(one: Mapping[str, Any]) -> dict[str, Any] | None:
    """The alternatives at each token, [[text, log-probability], …] under policy and reference; None where nobody looked."""
    ids, texts = one.get("topk_ids"), one.get("topk_text")
    if ids is None:
        return None

    def of(name: str) -> list[Any] | None:
        logs = one.get(name)
        if logs is None:
            return None
        return [
            None if some is None else [
                [(texts[t][k] if texts is not None and texts[t] is not None else f"#{ids[t][k]}"), number(log)] for k, log in enumerate(some)
            ]
            for t, some in enumerate(logs)
        ]  # fmt: skip

    return {"policy": of("topk_logp"), "reference": of("topk_ref")}


def cut(text: str, limit: int) -> str:
    """The beginning of a text, with … where it was cut."""
    return text if len(text) <= limit else text[: limit - 1] + "…"


def pieces(text: str, offsets: Any, count: int | None) -> tuple[list[str | None], list[str | None]]:
    """The text of each token, and where a token ends inside a character its bytes instead; nothing where offsets are missing or do not fit the text.

    `aé` at 0 1 2 → a, None, None and None, c3, a9.
    """
    whole = text.encode("utf-8", "replace")
    if not isinstance(offsets, list) or (count is not None and len(offsets) != count) or not all(isinstance(o, int) for o in offsets):
        return [], []
    ends = [*offsets[1:], len(whole)]
    if any(not 0 <= a <= b <= len(whole) for a, b in zip(offsets, ends, strict=True)) or (offsets and offsets[0] != 0):
        return [], []
    texts: list[str | None] = []
    hexes: list[str | None] = []
    for a, b in zip(offsets, ends, strict=True):
        try:
            texts.append(whole[a:b].decode())
            hexes.append(None)
        except UnicodeDecodeError:
            texts.append(None)
            hexes.append(whole[a:b].hex())
    return texts, hexes


def first_difference(a: Mapping[str, Any], b: Mapping[str, Any]) -> int | None:
    """The first token at which two answers differ, None where they are the same: 5 6 7, 5 8 → 1."""
    mine, other = (
        (a["ids"], b["ids"]) if a["ids"] and b["ids"] else (a["tokens"] or list(a["completion"]), b["tokens"] or list(b["completion"]))
    )
    if mine == other:
        return None
    return next((i for i, (x, y) in enumerate(zip(mine, other, strict=False)) if x != y), min(len(mine), len(other)))


def suspects(found: Mapping[str, Any]) -> list[int]:
    """1 for a rollout of the best tenth of its step that is also odd: far from the reference, repetitive, cut off, or much shorter than the others."""
    rewards = np.array([x if isinstance(x, float) else np.nan for x in found["reward"]], np.float64)
    lengths = np.array([x or 0 for x in found["length"]], np.float64)
    kls = np.array([x if isinstance(x, float) else np.nan for x in found["kl"]], np.float64)
    if not (~np.isnan(rewards)).any() or np.nanmax(rewards) == np.nanmin(rewards):
        return [0] * len(rewards)
    best = rewards >= np.nanquantile(rewards, 0.9)
    far = kls >= np.nanquantile(kls, 0.95) if (~np.isnan(kls)).any() and np.nanmax(kls) > 0 else np.zeros(len(kls), bool)
    odd = far | (np.array(found["repetition"]) >= 0.3) | (np.array(found["truncated"]) == 1) | (lengths <= np.median(lengths) / 4)
    return [int(x) for x in best & odd]
