"""Rollouts on disk: one parquet file a step, one row a rollout; written whole, then renamed.

What a step can be done again from is kept without loss: tokens, which of them were sampled, the sampler's log-probabilities, every part of the reward.
Token channels for display are kept in half precision. Version 1 had rewards in single precision and no `logprobs`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Real
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from torch import Tensor

from tilt.data.rollouts import Rollout
from tilt.errors import DataError
from tilt.kept import Kept
from tilt.objectives.experience import Rewards
from tilt.rewards.score import earned_by
from tilt.runs.files import atomic_write
from tilt.runs.offsets import Spelling, text_offsets

SCHEMA_VERSION = 2
CHANNELS = ("sampler_logprobs", "old_logprobs", "reference_logprobs", "new_logprobs", "delta_ref", "value", "entropy")
"""Token channels that are read again."""


class Alternatives(NamedTuple):
    """The likeliest tokens before each action, `ids` [A, K], −1 where nobody looked, with log-probabilities under policy and reference [A, K]; NaN = not known."""

    ids: Tensor
    policy: Tensor
    reference: Tensor


@dataclass(frozen=True)
class RolloutTable:
    """What is stored of one step.

    `texts` are (prompt, completion) pairs. `sequences` has one entry per rollout: `advantage`, `group_mean`, `group_std`, `dropped_reason` and
    whatever else. `actions` has float32 channels [A] over the sampled tokens of all rollouts in order, or of those without a
    `dropped_reason`; `clip` among them holds −1, 0, 1, 2. `group` numbers the prompts; by default their ids. With `shown` false the columns that are there
    for display alone, where each token lies in the text, are left out.
    """

    rollouts: Sequence[Rollout]
    texts: Sequence[tuple[str, str]]
    rewards: Rewards
    tokenizer: Any
    sequences: Mapping[str, Tensor | Sequence[Any]] = field(default_factory=dict)
    actions: Mapping[str, Tensor] = field(default_factory=dict)
    group: Sequence[int] = ()
    run: str = ""
    split: str = "train"
    shown: bool = True
    alternatives: Alternatives | None = None


def path_of(directory: Path | str, step: int) -> Path:
    return Path(directory) / f"step_{step:06d}.parquet"


def write(directory: Path | str, step: int, rows: RolloutTable) -> Path:
    """`directory/step_000120.parquet`, zstd, with `schema_version` and the parts' `reward_weights` in the file's metadata; appears whole or not at all."""
    Path(directory).mkdir(parents=True, exist_ok=True)
    count = len(rows.rollouts)
    assert len(rows.texts) == count == len(rows.rewards.total), "one text and one reward per rollout"
    columns = {**_identity(step, rows), **_outcome(rows), **_tokens(rows), **_channels(rows), **_alternatives(rows)}
    weights = {"reward_weights": json.dumps(dict(rows.rewards.weights))} if rows.rewards.parts else {}
    table = pa.table(columns).replace_schema_metadata({"schema_version": str(SCHEMA_VERSION), "step": str(step)} | weights)
    return atomic_write(path_of(directory, step), lambda temporary: pq.write_table(table, temporary, compression="zstd"))


def _identity(step: int, rows: RolloutTable) -> dict[str, pa.Array]:
    rollouts, count = rows.rollouts, len(rows.rollouts)
    return {
        "run": pa.array([rows.run] * count, pa.string()),
        "step": pa.array([step] * count, pa.int32()),
        "split": pa.array([rows.split] * count, pa.string()),
        "group_id": pa.array(list(rows.group) or [r.prompt.id for r in rollouts], pa.int64()),
        "rollout_id": pa.array(range(count), pa.int32()),
        "seed": pa.array([list(r.seed) for r in rollouts], pa.list_(pa.int64())),
        "weight_version": pa.array([r.version for r in rollouts], pa.int32()),
        "prompt": pa.array([_storable(prompt) for prompt, _ in rows.texts], pa.string()),
        "completion": pa.array([_storable(completion) for _, completion in rows.texts], pa.string()),
        "finish_reason": pa.array([r.stop for r in rollouts], pa.string()),
    }


def _outcome(rows: RolloutTable) -> dict[str, pa.Array]:
    """Rewards in double precision, lengths, and the columns per sequence; a rollout that could not be scored has reward null."""
    rewards, lengths = rows.rewards, [len(r.tokens) for r in rows.rollouts]
    scored = rewards.scored.tolist()
    columns = {
        "reward": pa.array(
            [float(v) if ok else None for v, ok in zip(earned_by(rows.rollouts, rewards).tolist(), scored, strict=True)], pa.float64()
        ),
        "length": pa.array(lengths, pa.int32()),
        "truncated": pa.array([r.stop == "length" for r in rows.rollouts], pa.bool_()),
    }
    if rewards.parts:
        parts = {name: values.tolist() for name, values in rewards.parts.items()}
        kind = pa.struct([(name, pa.float64()) for name in parts])
        columns["rewards"] = pa.array([{name: values[i] for name, values in parts.items()} for i in range(len(lengths))], kind)
    for name, values in rows.sequences.items():
        plain = values.detach().tolist() if isinstance(values, Tensor) else list(values)
        assert len(plain) == len(lengths), f"{name}: one value per rollout"
        floats = all(isinstance(v, float) or v is None for v in plain) and any(v is not None for v in plain)
        columns[name] = pa.array(plain, pa.float32() if floats else pa.string() if all(v is None for v in plain) else None)
    columns.setdefault("dropped_reason", pa.nulls(len(lengths), pa.string()))
    return columns


def _tokens(rows: RolloutTable) -> dict[str, pa.Array]:
    said = [np.asarray(r.logprobs, np.float64) for r in rows.rollouts]
    together = np.concatenate([*said, np.zeros(0)])
    single = np.array_equal(together.astype(np.float32), together, equal_nan=True)
    columns = {
        "ids": _lists([np.asarray(r.tokens, np.uint32) for r in rows.rollouts], np.uint32),
        "mask": _lists([np.asarray(r.sampled, np.uint8) for r in rows.rollouts], np.uint8),
        "logprobs": _lists(said, np.float32 if single else np.float64),
        **_kept(rows.rollouts),
    }
    if rows.shown:
        spelling = Spelling(rows.tokenizer)
        offsets = [text_offsets(r.tokens, completion, spelling) for r, (_, completion) in zip(rows.rollouts, rows.texts, strict=True)]
        columns["text_offsets"] = _lists([np.asarray(o, np.int32) for o in offsets], np.int32)
    return columns


def _kept(rollouts: Sequence[Rollout]) -> dict[str, pa.Array]:
    """`kept`: for each token the ids that it was chosen among, an empty list where that is the whole vocabulary; no column where it always is."""
    if all(r.kept is None for r in rollouts):
        return {}
    sizes, ids = [], []
    for r in rollouts:
        each = np.zeros(len(r.tokens), np.int64)
        if r.kept is not None:
            each[np.asarray(r.sampled, bool)] = r.kept.sizes.numpy()
            ids.append(r.kept.ids.numpy().astype(np.uint32))
        sizes.append(each)
    inner = np.concatenate([[0], np.cumsum(np.concatenate(sizes))])
    outer = np.concatenate([[0], np.cumsum([len(each) for each in sizes])])
    sets = pa.LargeListArray.from_arrays(pa.array(inner, pa.int64()), pa.array(np.concatenate(ids)))
    return {"kept": pa.ListArray.from_arrays(pa.array(outer, pa.int32()), sets)}


def kept_of(row: Mapping[str, Any]) -> Kept | None:
    """What each sampled token of a stored row was chosen among, as a rollout carries it."""
    sets = row.get("kept")
    chosen = None if sets is None else [among for among, sampled in zip(sets, row["mask"], strict=True) if sampled]
    return None if not chosen or not any(chosen) else Kept.of(chosen)


def _channels(rows: RolloutTable) -> dict[str, pa.Array]:
    """Each channel as one list per rollout with an entry per completion token: float16, NaN where a token is no action; `clip` is int8, null there."""
    starts, sampled = _ends([len(r.tokens) for r in rows.rollouts]), _sampled(rows.rollouts)
    dropped = list(rows.sequences.get("dropped_reason", [None] * len(rows.rollouts)))
    used = sampled & np.repeat(np.array([reason is None for reason in dropped], bool), np.diff(starts))
    everything, kept = int(sampled.sum()), int(used.sum())
    columns = {}
    for name, values in rows.actions.items():
        given = values.detach().float().cpu().numpy()
        assert len(given) in (everything, kept), f"{name}: {len(given)} values for {everything} actions ({kept} of them not dropped)"
        flat = np.full(len(sampled), np.nan, np.float32)
        flat[sampled if len(given) == everything else used] = given
        if name == "clip":
            nothing = np.isnan(flat)
            column = pa.array(np.where(nothing, 0, flat).astype(np.int8), mask=nothing)
        else:
            with np.errstate(over="ignore"):  # beyond ±65,504 lies ±inf
                column = pa.array(flat.astype(np.float16))
        columns[name] = pa.ListArray.from_arrays(pa.array(starts), column)
    return columns


def _ends(lengths: Sequence[int]) -> np.ndarray:
    """Where each row's list begins, and the last one ends."""
    return np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]).astype(np.int32)


def _sampled(rollouts: Sequence[Rollout]) -> np.ndarray:
    """Of all tokens in a row, which are actions."""
    return np.fromiter((flag for r in rollouts for flag in r.sampled), bool)


def _alternatives(rows: RolloutTable) -> dict[str, pa.Array]:
    """`topk_ids`, `topk_text`, `topk_logp` and `topk_ref`: of each token a list of alternatives, null where it is no action, and of a rollout that nobody looked at."""
    if rows.alternatives is None:
        return {}
    spelling = Spelling(rows.tokenizer)
    found: dict[str, list[Any]] = {"topk_ids": [], "topk_text": [], "topk_logp": [], "topk_ref": []}
    ids, policy, reference = (x.cpu() for x in rows.alternatives)
    looked, known, at = (ids[:, 0] >= 0).tolist(), not reference.isnan().all(), 0
    for rollout in rows.rollouts:
        first, at = at, at + sum(rollout.sampled)
        if first == at or at > len(looked) or not looked[first]:
            for values in found.values():
                values.append(None)
            continue
        these = {name: values[first:at].tolist() for name, values in (("topk_ids", ids), ("topk_logp", policy), ("topk_ref", reference))}
        these["topk_text"] = [[spelling.shown(token) for token in each] for each in these["topk_ids"]]
        for name, values in found.items():
            each = iter(these[name])
            values.append([next(each) if sampled else None for sampled in rollout.sampled])
    kinds = {"topk_ids": pa.int32(), "topk_text": pa.string(), "topk_logp": pa.float16(), "topk_ref": pa.float16()}
    halves = {"topk_logp", "topk_ref"}
    return {
        name: pa.array(values, pa.list_(pa.list_(pa.float32() if name in halves else kinds[name]))).cast(pa.list_(pa.list_(kinds[name])))
        for name, values in found.items()
        if known or name != "topk_ref"
    }


def _lists(values: Sequence[np.ndarray], kind: type) -> pa.Array:
    """A list column from one array per row; float32 beyond ±65,504 becomes ±inf in float16."""
    starts = _ends([len(v) for v in values])
    with np.errstate(over="ignore"):
        flat: np.ndarray = np.concatenate([*values, np.zeros(0, kind)]).astype(kind)
    return pa.ListArray.from_arrays(pa.array(starts), pa.array(flat))


def _storable(text: str) -> str:
    """Text as UTF-8 can hold it: a lone surrogate becomes `?`."""
    return text.encode("utf-8", "replace").decode("utf-8")


def read(path: Path | str) -> list[dict[str, Any]]:
    """The rows of a stored step as plain values; a file of a later schema is refused, columns that are missing or unknown are not."""
    file = Path(path)
    if not file.is_file():
        raise DataError(f"no rollouts at {file}")
    try:
        _check_version(file, pq.read_schema(file).metadata)
        rows = [dict(row) for row in pq.read_table(file).to_pylist()]
    except (
        pa.ArrowException,
        OSError,
        ValueError,
        OverflowError,
        MemoryError,
    ) as error:  # of damaged pages, and of texts that are not UTF-8
        raise DataError(f"{file} is not a readable parquet file: {(str(error) or type(error).__name__).splitlines()[0][:200]}") from None
    for number, row in enumerate(rows):
        _check_row(file, number, row)
    return rows


def _check_version(file: Path, metadata: Mapping[bytes, bytes] | None) -> None:
    """Refuse a file of a later schema, or one that does not say which it has."""
    said = (metadata or {}).get(b"schema_version")
    if said is None or not said.isdigit() or len(said) > 9:
        raise DataError(f"{file} is no file of rollouts: its metadata name no schema_version")
    if int(said) > SCHEMA_VERSION:
        raise DataError(f"{file} has schema version {int(said)}; this tilt reads up to {SCHEMA_VERSION}: upgrade it")


def _check_row(file: Path, number: int, row: Mapping[str, Any]) -> None:
    """Every row has its tokens, which of them were sampled, and lists of one length for them."""
    where = f"{file}: row {number}"
    ids, mask = row.get("ids"), row.get("mask")
    if not isinstance(ids, list) or not isinstance(mask, list) or len(ids) != len(mask) or not set(mask) <= {0, 1}:
        raise DataError(f"{where} is no rollout: `ids` and `mask` must be lists of one length, the mask of 0 and 1")
    if (
        type(row.get("group_id")) is not int
        or not isinstance(row.get("completion"), str)
        or not isinstance(row.get("reward", ""), Real | None)
    ):
        raise DataError(f"{where} is no rollout: it needs a whole number `group_id`, a text `completion`, and a number or null `reward`")
    for name in CHANNELS:
        values = row.get(name)
        if values is not None and (
            not isinstance(values, list) or len(values) != len(mask) or not all(v is None or isinstance(v, Real) for v in values)
        ):
            raise DataError(f"{where}: `{name}` must hold one number for each of its {len(mask)} tokens")


def has_channels(path: Path | str) -> bool:
    """Whether a stored step has its token channels, or only what it can be done again from."""
    try:
        return "old_logprobs" in pq.read_schema(path).names
    except (pa.ArrowException, OSError, ValueError):
        return True  # reading it says what is wrong with it


def stored(directory: Path | str) -> list[int]:
    """The steps that have a file, in order."""
    return sorted(
        int(p.stem.removeprefix("step_")) for p in Path(directory).glob("step_*.parquet") if re.fullmatch(r"step_\d{6,18}", p.stem)
    )
