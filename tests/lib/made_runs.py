"""Run directories written by hand, for what reads them: curves, rollouts with every channel, hostile texts."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

FLOATS = (
    "sampler_logprobs", "old_logprobs", "reference_logprobs", "new_logprobs", "delta_ref", "kl", "adv_t", "value", "return", "token_reward", "ratio", "entropy", "push", "result",
)  # fmt: skip
HOSTILE = (
    "</script><script>window.hurt=1</script>", "<img src=x onerror=window.hurt=1>", "a\u202eb\u2066c", "nul\x00 here", "\x1b[2J\x1b]0;x\x07", "javascript:alert(1)",
    "x" * 1_000_000, "half \ud800 pair", "你好，世界 🙂", "{{7*7}} ${7*7} `id`", "", "line\u2028next\r\n\ttab",
)  # fmt: skip


def cut_into(text: str, size: int = 3, most: int = 400) -> list[int]:
    """Byte offsets of tokens of a few bytes each, `most` at most, and of a stop token without text."""
    whole = text.encode("utf-8", "replace")
    return [*range(0, max(1, len(whole)), max(size, len(whole) // most + 1)), len(whole)]


def ids_of(text: str, offsets: Sequence[int]) -> list[int]:
    """A number for each token, the same for the same bytes."""
    whole = text.encode("utf-8", "replace")
    return [zlib.crc32(whole[a:b]) % 50_000 for a, b in zip(offsets, [*offsets[1:], len(whole)], strict=True)]


def step_file(folder: Path, step: int, answers: Sequence[Mapping[str, Any]], *, seed: int = 0, channels: bool = True) -> Path:
    """One stored step: `answers` have prompt, completion, reward, and what else is known."""
    generator = np.random.default_rng((seed, step))
    offsets = [cut_into(str(a["completion"]), int(a.get("token", 3)), int(a.get("most", 400))) for a in answers]
    sizes = [len(o) for o in offsets]
    total = sum(sizes)
    starts = pa.array(np.concatenate([[0], np.cumsum(sizes)]).astype(np.int32))

    def lists(values: np.ndarray) -> pa.Array:
        return pa.ListArray.from_arrays(starts, pa.array(values))

    def text(value: Any) -> str:
        return str(value).encode("utf-8", "replace").decode()

    columns: dict[str, Any] = {
        "run": ["made"] * len(answers), "step": pa.array([step] * len(answers), pa.int32()), "split": ["train"] * len(answers),
        "group_id": pa.array([int(a.get("group", i // 4)) for i, a in enumerate(answers)], pa.int64()), "rollout_id": pa.array(range(len(answers)), pa.int32()),
        "prompt": [text(a["prompt"]) for a in answers], "completion": [text(a["completion"]) for a in answers],
        "finish_reason": [str(a.get("finish", "stop")) for a in answers], "reward": pa.array([a.get("reward") for a in answers], pa.float64()),
        "rewards": pa.array([{"exact": None if a.get("reward") is None else a["reward"] + 0.05, "length": -0.1} for a in answers], pa.struct([("exact", pa.float64()), ("length", pa.float64())])),
        "length": pa.array(sizes, pa.int32()), "truncated": [a.get("finish") == "length" for a in answers],
        "advantage": pa.array([float(a.get("advantage", 0.5)) for a in answers], pa.float32()), "group_mean": pa.array([0.5] * len(answers), pa.float32()),
        "group_std": pa.array([0.25] * len(answers), pa.float32()), "dropped_reason": pa.array([a.get("dropped") for a in answers], pa.string()),
        "checker": [json.dumps({"exact": {"extracted": text(a["completion"])[:20], "gold": "42", "reason": "differs from character 0 on"}}) for a in answers],
        "ids": lists(np.array([n for a, o in zip(answers, offsets, strict=True) for n in ids_of(str(a["completion"]), o)], np.uint32)), "mask": lists(np.ones(total, np.uint8)), "text_offsets": lists(np.concatenate(offsets).astype(np.int32)),
    }  # fmt: skip
    if any("role" in a for a in answers):
        columns["role"] = pa.array([a.get("role") for a in answers], pa.string())
    if channels:
        values = {name: generator.normal(0, 1, total).astype(np.float16) for name in FLOATS}
        values["entropy"], values["kl"] = np.abs(values["entropy"]), np.abs(values["kl"])
        values["new_logprobs"] = (-np.abs(values["new_logprobs"])).astype(np.float16)
        columns |= {name: lists(v) for name, v in values.items()}
        columns["clip"] = lists(generator.choice(np.array([0, 0, 0, 1, -1, 2], np.int8), total))
        top = [[[1, 2, 3, 4, 5]] * n if i % 2 == 0 else None for i, n in enumerate(sizes)]
        columns["topk_ids"] = pa.array(top, pa.list_(pa.list_(pa.int32())))
        columns["topk_text"] = pa.array(
            [None if t is None else [["a", "b", "c", " d", "e"]] * len(t) for t in top], pa.list_(pa.list_(pa.string()))
        )
        columns["topk_logp"] = pa.array(
            [None if t is None else [[-0.1, -2.5, -4.0, -5.0, -6.0]] * len(t) for t in top], pa.list_(pa.list_(pa.float32()))
        )
        columns["topk_ref"] = columns["topk_logp"]
    table = pa.table(columns).replace_schema_metadata(
        {"schema_version": "2", "step": str(step), "reward_weights": json.dumps({"exact": 1.0, "length": 0.5})}
    )
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"step_{step:06d}.parquet"
    pq.write_table(table, file, compression="zstd")
    return file


def answers_of(step: int, count: int, length: int = 60) -> list[dict[str, Any]]:
    """Plain answers, four to a prompt."""
    generator = np.random.default_rng((7, step))
    words = ["the", "sum", "is", "42", "so", "therefore", "=", "+", "7", "gladly", "now"]
    made = []
    for i in range(count):
        body = " ".join(generator.choice(words, max(2, length // 4)).tolist())
        made.append({
            "prompt": f"question {i // 4}", "completion": body, "reward": float(np.round(generator.normal(), 3)), "advantage": float(generator.normal()),
            "finish": "length" if i % 7 == 0 else "stop", "dropped": "zero_variance" if i % 9 == 0 else None,
        })  # fmt: skip
    return made


def make_run(
    place: Path, *, steps: int = 4, count: int = 32, length: int = 60, running: bool = False, hostile: bool = False, every: int = 10
) -> Path:
    """A run directory of `steps` stored steps."""
    place.mkdir(parents=True, exist_ok=True)
    (place / "config.yaml").write_text("recipe: rl\nalgorithm: grpo\nmodel: tiny\nseed: 3\nsteps: 100\ndata:\n  source: train.jsonl\n")
    (place / "env.json").write_text(
        json.dumps(
            {"started": "2026-12-01", "process": 1, "host": "elsewhere", "packages": {"torch": "2"}, "git": {"commit": "abcdef123456"}}
        )
    )
    (place / "objective.txt").write_text("objective: made by hand\n")
    log = "10:00:00  alert      entropy, step 20: the entropy fell to a fifth\n10:00:00    healthy: above a third\n"
    (place / "log.txt").write_text(log + ("" if running else "10:00:01  finished\n"))
    for s in range(steps):
        answers = answers_of(s * every, count, length)
        if hostile:
            answers = [
                {"prompt": f"<b>{text[:40]}</b>", "completion": text, "reward": 1.0, "group": i, "token": 9}
                for i, text in enumerate(HOSTILE)
            ]
        step_file(place / "rollouts", s * every, answers)
    write_metrics(place, range(steps * every))
    if not running:
        (place / "result.json").write_text(
            json.dumps({"before": {"reward": 0.1, "reward_se": 0.02}, "after": {"reward": 0.9, "reward_se": 0.01}})
        )
    return place


def write_metrics(place: Path, steps: Sequence[int], mode: str = "a") -> None:
    with (place / "metrics.jsonl").open(mode) as file:
        for step in steps:
            row = {
                "step": step, "time": 1.0 + step, "reward": step / 100, "objective/scores_std": 0.2, "kl": step / 50, "entropy": 2 - step / 100, "length/mean": 40.0, "length/truncated": 0.1,
                "policy/clipfrac_low": 0.01, "policy/clipfrac_high": 0.02, "grad_norm": "nan" if step == 5 else 1.0, "loss": -0.1, "extra/metric": step * 2.0, "reward/exact": step / 100 + 0.05, "reward/length": -0.1,
            }  # fmt: skip
            file.write(json.dumps(row | ({"eval/accuracy": 0.5 + step / 200} if step % 10 == 0 else {})) + "\n")
