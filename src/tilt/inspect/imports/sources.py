"""The logs that are known: TRL, prime-rl, verl, Tinker cookbook, RLLoggingBoard, plain JSON lines, and tables of metrics."""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tilt.errors import DataError
from tilt.inspect.imports.writing import Answer, Log, real, whole

LONGEST_LINE = 64 << 20
MOST_TOKENS = 1 << 20
PROMPTS = ("prompt", "question", "input", "instruction", "query")
ANSWERS = ("completion", "response", "answer", "output", "generation", "text")
REWARDS = ("reward", "score", "rewards", "total_reward")


class Source(Protocol):
    """One kind of log: whether a path holds it, and what it holds."""

    def detects(self, path: Path) -> bool: ...

    def read(self, path: Path) -> Log: ...


# --- lines ----------------------------------------------------------------------------------------------------------------------


def lines(path: Path, log: Log) -> Iterator[dict[str, Any]]:
    """The JSON objects of a file, one a line; what is none is counted."""
    with path.open("rb") as stream:
        while line := stream.readline(LONGEST_LINE):
            if not line.strip():
                continue
            try:
                found = json.loads(line.decode("utf-8", "replace"))
            except (ValueError, RecursionError):
                log.said["lines that are no JSON"] += 1
                continue
            if isinstance(found, dict):
                yield found
            else:
                log.said["lines that are no objects"] += 1


def first_lines(path: Path, count: int = 3) -> list[dict[str, Any]]:
    """The first objects of a file; none of a file that holds something else."""
    if path.suffix not in (".jsonl", ".json", ".ndjson"):
        return []
    return list(islice(lines(path, Log()), count))


def files_of(path: Path, suffix: str) -> list[Path]:
    return [path] if path.is_file() and path.suffix == suffix else sorted(path.glob(f"*{suffix}")) if path.is_dir() else []


def text_of(value: Any) -> str | None:
    """A text, or the turns of a conversation one below the other."""
    if isinstance(value, str):
        return value
    if isinstance(value, list) and all(isinstance(turn, Mapping) for turn in value):
        return (
            "\n".join(f"{turn.get('role', '')}: {turn.get('content', '')}" for turn in value)
            if len(value) != 1
            else str(value[0].get("content", ""))
        )
    return None


def floats(values: Any, count: int) -> list[float] | None:
    """A channel of `count` numbers, NaN for null; None where it is no such list."""
    if not isinstance(values, list) or len(values) != count or count > MOST_TOKENS:
        return None
    found = [real(v) for v in values]
    if all(v is None for v in found):
        return None
    return [math.nan if v is None else v for v in found]


def offsets_of(tokens: list[str]) -> list[int]:
    """Where each token begins in the bytes of the joined text."""
    ends = np.cumsum([len(token.encode("utf-8", "replace")) for token in tokens]).tolist()
    return [0, *ends[:-1]]


def differences(answer: Answer) -> None:
    """Δ against the reference and its k3 estimate, from both log-probabilities, in single precision."""
    new, ref = answer.get("new_logprobs"), answer.get("reference_logprobs")
    if new is not None and ref is not None:
        gap = np.asarray(new, np.float32) - np.asarray(ref, np.float32)
        with np.errstate(over="ignore"):
            answer["delta_ref"], answer["kl"] = gap.tolist(), (np.expm1(-gap) + gap).tolist()


# --- TRL ------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Trl:
    """`completions/completions_00005.parquet`: step, prompt, completion (texts or messages), a column for each reward function, `advantage`."""

    name = re.compile(r"completions_(\d+)\.parquet")

    def files(self, path: Path) -> list[Path]:
        folder = path / "completions" if (path / "completions").is_dir() else path
        return [file for file in files_of(folder, ".parquet") if self.name.fullmatch(file.name)]

    def detects(self, path: Path) -> bool:
        return bool(self.files(path))

    def read(self, path: Path) -> Log:
        log = Log()
        log.answers = self._answers(self.files(path), log)
        return log

    def _answers(self, files: list[Path], log: Log) -> Iterator[Answer]:
        for file in files:
            match = self.name.fullmatch(file.name)
            try:
                rows = pq.read_table(file).to_pylist()
            except (pa.ArrowException, OSError, ValueError):
                log.said["files that are no parquet"] += 1
                continue
            for row in rows:
                prompt, completion = text_of(row.get("prompt")), text_of(row.get("completion"))
                if prompt is None or completion is None:
                    log.said["rows without a prompt or a completion"] += 1
                    continue
                parts = {
                    k: real(v)
                    for k, v in row.items()
                    if k not in ("step", "prompt", "completion", "advantage") and isinstance(v, (int, float)) and not isinstance(v, bool)
                }
                known = [v for v in parts.values() if v is not None and v == v]
                number = whole(row.get("step"))
                found: Answer = {
                    "step": number if number is not None else int(match[1]) if match else 0,
                    "prompt": prompt,
                    "completion": completion,
                    "advantage": real(row.get("advantage")),
                }
                yield found | ({"rewards": parts, "reward": sum(known) if known else None} if parts else {})


# --- prime-rl -------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PrimeRl:
    """`token_exports/step_5/rank_0.jsonl`, a step complete once a file STABLE stands beside it: ids, masks, log-probabilities, no text."""

    channels = {
        "advantages": "adv_t", "inference_logprobs": "sampler_logprobs", "trainer_logprobs": "new_logprobs", "entropy": "entropy", "importance_ratio": "ratio",
    }  # fmt: skip

    def folders(self, path: Path) -> list[Path]:
        top = path / "token_exports" if (path / "token_exports").is_dir() else path
        return sorted((f for f in top.glob("step_*") if f.is_dir()), key=lambda f: whole(f.name[5:]) or 0) if top.is_dir() else []

    def detects(self, path: Path) -> bool:
        return any(any(folder.glob("rank_*.jsonl")) for folder in self.folders(path)[:3])

    def read(self, path: Path) -> Log:
        log = Log(notes=["texts need the tokenizer: tokens are shown by their numbers"])
        log.answers = self._answers(path, log)
        return log

    def _answers(self, path: Path, log: Log) -> Iterator[Answer]:
        for folder in self.folders(path):
            if not (folder / "STABLE").exists():
                log.said["steps that were still being written"] += 1
                continue
            for row in (row for file in sorted(folder.glob("rank_*.jsonl")) for row in lines(file, log)):
                ids, mask = row.get("token_ids"), row.get("loss_mask")
                if (
                    not isinstance(ids, list)
                    or not isinstance(mask, list)
                    or len(ids) != len(mask)
                    or not all(isinstance(i, int) and 0 <= i < 2**32 for i in ids)
                ):
                    log.said["rows without whole lists of tokens"] += 1
                    continue
                used = [bool(m) for m in mask]
                first = used.index(True) if True in used else len(used)
                tokens = [f"⟨{i}⟩" for i in ids[first:]]
                step = whole(row.get("step"))
                found: Answer = {
                    "step": step if step is not None else whole(folder.name[5:]) or 0, "prompt": " ".join(f"⟨{i}⟩" for i in ids[:first]), "completion": "".join(tokens), "ids": ids[first:],
                    "mask": [int(u) for u in used[first:]], "text_offsets": offsets_of(tokens), "length": sum(used), "split": row.get("env_name"),
                }  # fmt: skip
                for theirs, ours in self.channels.items():
                    values = floats(row.get(theirs), len(ids))
                    if values is not None:
                        found[ours] = [v if u else math.nan for v, u in zip(values[first:], used[first:], strict=True)]
                high, low = row.get("is_masked_high"), row.get("is_masked_low")
                if isinstance(high, list) and isinstance(low, list) and len(high) == len(low) == len(ids):
                    found["clip"] = [
                        None if not u else 1 if h else -1 if w else 0
                        for u, h, w in zip(used[first:], high[first:], low[first:], strict=True)
                    ]
                yield found


# --- JSON lines -----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Board:
    """RLLoggingBoard: prompt, response, response_tokens, logprobs, ref_logprobs, values, token_rewards, reward, step; a file for each rank."""

    channels = {"logprobs": "new_logprobs", "ref_logprobs": "reference_logprobs", "values": "value", "token_rewards": "token_reward"}

    def detects(self, path: Path) -> bool:
        return any(
            "response" in row and "step" in row and ("response_tokens" in row or "ref_response" in row or "ref_reward" in row)
            for file in files_of(path, ".jsonl")[:2]
            for row in first_lines(file)
        )

    def read(self, path: Path) -> Log:
        log = Log()
        log.answers = self._answers(files_of(path, ".jsonl"), log)
        return log

    def _answers(self, files: list[Path], log: Log) -> Iterator[Answer]:
        for row in (row for file in files for row in lines(file, log)):
            prompt, response, step = text_of(row.get("prompt")), text_of(row.get("response")), whole(row.get("step"))
            if prompt is None or response is None or step is None:
                log.said["rows without prompt, response or step"] += 1
                continue
            found: Answer = {"step": step, "prompt": prompt, "completion": response, "reward": real(row.get("reward"))}
            if isinstance(row.get("ref_response"), str):
                found["checker"] = json.dumps(
                    {"reference's answer": {"extracted": row["ref_response"], "gold": None, "reason": f"earned {row.get('ref_reward')}"}},
                    ensure_ascii=False,
                )
            tokens = row.get("response_tokens")
            if isinstance(tokens, list) and all(isinstance(t, str) for t in tokens):
                count = min([len(tokens), *(len(row[name]) for name in self.channels if isinstance(row.get(name), list))])
                if len(tokens) - count:
                    log.said["pad tokens at the end of answers"] += len(tokens) - count
                kept = tokens[:count]
                found |= {
                    "completion": "".join(kept),
                    "text_offsets": offsets_of(kept),
                    "length": count,
                    "mask": [1] * count,
                    "ids": [0] * count,
                }
                for theirs, ours in self.channels.items():
                    values = floats((row.get(theirs) or [])[:count] if isinstance(row.get(theirs), list) else None, count)
                    if values is not None:
                        found[ours] = values
                differences(found)
            yield found


@dataclass(frozen=True)
class Verl:
    """verl: `<step>.jsonl` of rollout_data_dir or validation_data_dir: input, output, gts, score, step, and what the reward function added."""

    def detects(self, path: Path) -> bool:
        return any(
            "input" in row and "output" in row and "score" in row for file in files_of(path, ".jsonl")[:2] for row in first_lines(file)
        )

    def read(self, path: Path) -> Log:
        log = Log()
        files = sorted(files_of(path, ".jsonl"), key=lambda f: whole(f.stem) or 0)
        log.answers = self._answers(files, log)
        return log

    def _answers(self, files: list[Path], log: Log) -> Iterator[Answer]:
        for file in files:
            for row in lines(file, log):
                prompt, output = text_of(row.get("input")), text_of(row.get("output"))
                if prompt is None or output is None:
                    log.said["rows without input or output"] += 1
                    continue
                step = whole(row.get("step"))
                extras = {
                    k: real(v) for k, v in row.items() if k not in ("input", "output", "gts", "score", "step") and real(v) is not None
                }
                score = real(row.get("score"))
                found: Answer = {
                    "step": step if step is not None else whole(file.stem) or 0,
                    "prompt": prompt,
                    "completion": output,
                    "reward": score,
                    "rewards": {"score": score, **extras},
                }
                if row.get("gts") is not None:
                    found["checker"] = json.dumps(
                        {
                            "score": {
                                "extracted": str(row.get("pred"))[:200] if "pred" in row else None,
                                "gold": str(row["gts"])[:200],
                                "reason": "",
                            }
                        },
                        ensure_ascii=False,
                    )
                yield found


@dataclass(frozen=True)
class Tinker:
    """Tinker cookbook: `iteration_*/…_rollout_summaries.jsonl`: rewards and lengths of trajectories, no texts."""

    def files(self, path: Path) -> list[Path]:
        return (
            sorted(path.glob("**/*rollout_summaries.jsonl"))
            if path.is_dir()
            else [path]
            if path.name.endswith("rollout_summaries.jsonl")
            else []
        )

    def detects(self, path: Path) -> bool:
        return bool(self.files(path))

    def read(self, path: Path) -> Log:
        log = Log(notes=["these summaries hold no texts: rewards and lengths are shown"])
        log.answers = self._answers(self.files(path), log)
        return log

    def _answers(self, files: list[Path], log: Log) -> Iterator[Answer]:
        for row in (row for file in files for row in lines(file, log)):
            step, group, steps = whole(row.get("iteration")), whole(row.get("group_idx")), row.get("steps")
            if step is None or group is None:
                log.said["rows without iteration or group_idx"] += 1
                continue
            turns = [turn for turn in steps if isinstance(turn, Mapping)] if isinstance(steps, list) else []
            parts = (
                {k: real(v) for k, v in (row.get("trajectory_metrics") or {}).items() if real(v) is not None}
                if isinstance(row.get("trajectory_metrics"), Mapping)
                else {}
            )
            yield {
                "step": step, "group_id": group, "prompt": f"group {group}", "completion": f"trajectory {row.get('traj_idx')} of {len(turns)} turns", "split": row.get("split"),
                "reward": real(row.get("total_reward")), "rewards": parts, "length": sum(whole(turn.get("ac_len")) or 0 for turn in turns),
            }  # fmt: skip


@dataclass(frozen=True)
class Plain:
    """JSON lines with a prompt and an answer under usual names, perhaps a reward and a step."""

    def detects(self, path: Path) -> bool:
        return any(_named(row, ANSWERS) and _named(row, PROMPTS) for file in files_of(path, ".jsonl")[:2] for row in first_lines(file))

    def read(self, path: Path) -> Log:
        log = Log()
        log.answers = self._answers(files_of(path, ".jsonl"), log)
        return log

    def _answers(self, files: list[Path], log: Log) -> Iterator[Answer]:
        for row in (row for file in files for row in lines(file, log)):
            prompts, answers = _named(row, PROMPTS), _named(row, ANSWERS)
            prompt, answer = text_of(row.get(prompts)) if prompts else None, text_of(row.get(answers)) if answers else None
            if prompt is None or answer is None:
                log.said["rows without a prompt or an answer"] += 1
                continue
            rewards = _named(row, REWARDS)
            given = row.get(rewards) if rewards else None
            parts = {str(k): real(v) for k, v in given.items()} if isinstance(given, Mapping) else {}
            known = [v for v in parts.values() if v is not None]
            found: Answer = {
                "step": whole(row.get("step")) or 0,
                "prompt": prompt,
                "completion": answer,
                "reward": sum(known) if known else real(given),
                "advantage": real(row.get("advantage")),
            }
            yield found | ({"rewards": parts} if parts else {})


def _named(row: Mapping[str, Any], names: tuple[str, ...]) -> str | None:
    return next((name for name in names if name in row), None)


# --- curves ---------------------------------------------------------------------------------------------------------------------

RENAMED = {
    "reward_avg": "reward", "avg_response_len": "length/mean", "entropy_avg": "entropy", "eval_acc": "eval/accuracy", "kl_loss": "kl", "adv_std": "advantage_std",
    "train/reward": "reward", "train/loss": "loss", "train/kl": "kl", "train/entropy": "entropy", "train/grad_norm": "grad_norm",
}  # fmt: skip
STEPS = ("step", "_step", "global_step", "train/global_step", "iteration")


@dataclass(frozen=True)
class Curves:
    """Metrics: CSV or JSON lines with a column of steps (a `_step` of W&B's history too)."""

    def detects(self, path: Path) -> bool:
        if path.is_file() and path.suffix == ".csv":
            with path.open(encoding="utf-8", errors="replace", newline="") as stream:
                return any(name in STEPS for name in next(csv.reader(stream), []))
        rows = first_lines(path) if path.is_file() else []
        return any(
            any(name in row for name in STEPS) and any(isinstance(v, (int, float)) for k, v in row.items() if k not in STEPS)
            for row in rows
        )

    def read(self, path: Path) -> Log:
        log = Log()
        log.metrics = self._rows(path, log)
        return log

    def _rows(self, path: Path, log: Log) -> Iterator[Mapping[str, Any]]:
        given = self._csv(path, log) if path.suffix == ".csv" else lines(path, log)
        for row in given:
            name = next((n for n in STEPS if row.get(n) not in (None, "")), None)
            numbers = {
                RENAMED.get(str(k), str(k)): v
                for k, each in row.items()
                if k not in STEPS and (v := real(each) if each != "" else None) is not None and math.isfinite(v)
            }
            yield {"step": row.get(name) if name else None, **numbers}

    def _csv(self, path: Path, log: Log) -> Iterator[dict[str, Any]]:
        csv.field_size_limit(LONGEST_LINE)
        with path.open(encoding="utf-8", errors="replace", newline="") as stream:
            try:
                for row in csv.DictReader(line.replace("\0", "") for line in stream):
                    if None in row:
                        log.said["lines with more fields than the header"] += 1
                        row.pop(None)
                    yield row
            except csv.Error as error:
                raise DataError(f"{path} is no CSV: {error}") from None


SOURCES: Mapping[str, Source] = {
    "trl": Trl(), "prime-rl": PrimeRl(), "tinker": Tinker(), "board": Board(), "verl": Verl(), "jsonl": Plain(), "metrics": Curves(),
}  # fmt: skip
"""By name, in the order in which they are tried."""
