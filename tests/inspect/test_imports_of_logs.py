"""Logs of other trainers: what is there is mapped exactly, what is missing stays missing, what is broken is counted."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tilt.errors import DataError, UsageError
from tilt.inspect.book import Book
from tilt.inspect.imports import detected, imported

DATA = os.environ.get("TILT_DATA")


def lines(file: Path, rows) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(
        "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), encoding="utf-8", errors="surrogatepass"
    )
    return file


def told(place: Path):
    return json.loads((place / "imported.json").read_text())


def test_trl(tmp_path):
    folder = tmp_path / "completions"
    folder.mkdir()
    for step in (5, 10):
        pq.write_table(pa.table({
            "step": [step] * 4, "prompt": ["a", "a", "b", "b"], "completion": [[{"role": "assistant", "content": "hi"}], [{"role": "assistant", "content": "ho"}]] * 2,
            "accuracy_reward": [1.0, 0.0, 0.5, 0.5], "format_reward": [0.0, 1.0, None, 0.25], "advantage": [0.5, -0.5, 0.0, 0.0],
        }), folder / f"completions_{step:05d}.parquet")  # fmt: skip
    assert detected(tmp_path) == "trl" == detected(folder)
    place = imported(tmp_path, tmp_path / "out")
    book = Book(place)
    assert [s["step"] for s in book.steps()] == [5, 10]
    summary = book.summaries([5])["steps"]["5"]
    assert summary["reward"] == [1.0, 1.0, 0.5, 0.75] and summary["group"] == [0, 0, 1, 1] and summary["advantage"] == [0.5, -0.5, 0, 0]
    assert (
        summary["parts"] == {"accuracy_reward": [1, 0, 0.5, 0.5], "format_reward": [0, 1, None, 0.25]} and summary["completion"][0] == "hi"
    )
    assert (
        book.rows(5).detail(2)["group_mean"] == 0.625
        and book.header()["channels"] == {}
        and book.metrics()["columns"]["reward"] == [0.8125, 0.8125]
    )


def test_prime_rl(tmp_path):
    row = {
        "schema_version": 1, "step": 3, "rank": 0, "env_name": "math", "token_ids": [9, 8, 70000, 6], "loss_mask": [False, False, True, True], "advantages": [0, 0, 0.5, 0.5], "inference_logprobs": [0, 0, -1.0, -2.0],
        "trainer_logprobs": [0, 0, -1.5, None], "entropy": None, "importance_ratio": [1, 1, 0.6, 1.1], "is_masked_high": [False, False, False, True], "is_masked_low": [False] * 4,
    }  # fmt: skip
    top = tmp_path / "token_exports"
    lines(top / "step_3/rank_0.jsonl", [row, {**row, "token_ids": [1]}])
    (top / "step_3/STABLE").touch()
    lines(top / "step_4/rank_0.jsonl", [row])
    assert detected(tmp_path) == "prime-rl"
    place = imported(tmp_path, tmp_path / "out")
    detail = Book(place).rows(3).detail(0)
    assert detail["ids"] == [70000, 6] and detail["tokens"] == ["⟨70000⟩", "⟨6⟩"] and detail["prompt"] == "⟨9⟩ ⟨8⟩"
    assert (
        detail["channels"]["sampler_logprobs"] == [-1, -2]
        and detail["channels"]["new_logprobs"] == [-1.5, "nan"]
        and detail["channels"]["clip"] == [0, 1]
        and "entropy" not in detail["channels"]
    )
    assert told(place)["left_out"] == {"rows without whole lists of tokens": 1, "steps that were still being written": 1}


def test_verl(tmp_path):
    lines(
        tmp_path / "v/7.jsonl",
        [{"input": "q", "output": "a", "gts": "42", "score": "1.0", "step": 7, "acc": 1, "pred": "42"}, {"input": "q", "score": 1}],
    )
    place = imported(tmp_path / "v", tmp_path / "out")
    detail = Book(place).rows(7).detail(0)
    assert (
        detected(tmp_path / "v") == "verl"
        and detail["reward"] == 1
        and detail["parts"]["acc"] == 1
        and detail["checker"]["score"] == {"extracted": "42", "gold": "42", "reason": ""}
    )
    assert told(place)["left_out"] == {"rows without input or output": 1}


def test_tinker(tmp_path):
    row = {
        "split": "train",
        "iteration": 2,
        "group_idx": 1,
        "traj_idx": 0,
        "total_reward": 0.75,
        "trajectory_metrics": {"correct": 1},
        "steps": [{"ac_len": 5}, {"ac_len": 7}],
    }
    lines(tmp_path / "iteration_000002/train_rollout_summaries.jsonl", [row, {**row, "iteration": None}])
    place = imported(tmp_path, tmp_path / "out")
    summary = Book(place).summaries([2])["steps"]["2"]
    assert summary["reward"] == [0.75] and summary["length"] == [12] and summary["parts"] == {"correct": [1]} and summary["group"] == [1]


def test_the_logging_board(tmp_path):
    row = {
        "prompt": "p", "response": "你好<pad>", "response_tokens": ["你", "好", "<pad>"], "logprobs": [-1.0, -2.0], "ref_logprobs": [-1.5, -1.0], "values": [0.1, 0.2], "token_rewards": [0.0, 1.0], "reward": 0.5, "step": 4,
        "ref_response": "他", "ref_reward": 0.25,
    }  # fmt: skip
    lines(tmp_path / "b/rank_0.jsonl", [row, "{broken", "[1]", {"prompt": "p"}])
    place = imported(tmp_path / "b", tmp_path / "out")
    detail = Book(place).rows(4).detail(0)
    assert detected(tmp_path / "b") == "board" and detail["tokens"] == ["你", "好"] and detail["completion"] == "你好"
    gap = np.array([0.5, -1.0], np.float32)
    assert detail["channels"]["delta_ref"] == gap.tolist() and detail["channels"]["kl"] == pytest.approx(
        (np.expm1(-gap) + gap).tolist(), rel=1e-4
    )
    assert detail["channels"]["value"] == [0.1, 0.2] and detail["checker"]["reference's answer"] == {
        "extracted": "他",
        "gold": None,
        "reason": "earned 0.25",
    }
    assert told(place)["left_out"] == {
        "lines that are no JSON": 1,
        "lines that are no objects": 1,
        "rows without prompt, response or step": 1,
        "pad tokens at the end of answers": 1,
    }


def test_plain_lines_and_hostile_ones(tmp_path):
    rows = [
        {"question": "q", "answer": "</script>\ud800\x00", "reward": {"a": 1, "b": "0.5"}, "step": 1.0}, {"question": "q", "answer": ["x"], "step": 1}, {"question": "q", "answer": "ok", "reward": 10**400, "step": "x"},
        {"question": "q", "answer": "nan", "reward": "nan"}, {"question": [{"role": "user", "content": "u"}], "answer": "c", "step": -4},
    ]  # fmt: skip
    place = imported(lines(tmp_path / "x.jsonl", [*rows, "\x00\xff", "9" * 5000, '{"question":' * 100000]), tmp_path / "out")
    found = Book(place).summaries([0, 1])["steps"]
    assert found["1"]["reward"] == [1.5] and "</script>" in found["1"]["completion"][0] and found["0"]["reward"] == [None, "nan", None]
    assert told(place)["left_out"]["rows without a prompt or an answer"] == 1


def test_metrics_with_a_restart(tmp_path):
    (tmp_path / "m.csv").write_text("step,reward_avg,eval_acc,loss\n1,0.1,,nan\n2,0.2,10,1\n3,0.3,,1\n2,0.9,,1,7\n3,0.95,20,\n,1,1,1\n")
    place = imported(tmp_path / "m.csv", tmp_path / "out")
    metrics = Book(place).metrics()
    assert (
        metrics["step"] == [1, 2, 3]
        and metrics["columns"]["reward"] == [0.1, 0.9, 0.95]
        and metrics["columns"]["eval/accuracy"] == [None, None, 20]
    )
    assert any("go back from 3 to 2" in note for note in told(place)["notes"])
    assert told(place)["left_out"] == {
        "lines with more fields than the header": 1,
        "metric rows without a step": 1,
        "metric rows that a later one replaced": 2,
    }
    history = imported(
        lines(tmp_path / "h.jsonl", [{"_step": 0, "train/reward": 1.0, "x": "text"}, {"_step": 1, "train/reward": 2.0}]), tmp_path / "out2"
    )
    assert Book(history).metrics()["columns"]["reward"] == [1, 2]


def test_many_rows_in_any_order_become_whole_steps(tmp_path):
    rows = [{"prompt": f"p{i % 5}", "response": "r" * (i % 9), "reward": i, "step": i % 7} for i in range(20_000)]
    place = imported(lines(tmp_path / "many.jsonl", rows), tmp_path / "out")
    assert told(place)["answers"] == 20_000 and sum(s["rows"] for s in Book(place).steps()) == 20_000 and len(Book(place).steps()) == 7
    assert sorted(p.name for p in place.iterdir()) == ["imported.json", "metrics.jsonl", "rollouts"]


@pytest.mark.parametrize("name, content, reason", [
    ("a.pt", b"x", "pickled"), ("a.txt", b"hello", "no log that is known"), ("a.jsonl", b"", "no log that is known"), ("a.csv", b"x,y\n1,2\n", "no log that is known"), ("a.csv", b"step\n", "holds no answers and no metrics"),
])  # fmt: skip
def test_what_cannot_be_imported_is_a_sentence(tmp_path, name, content, reason):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=reason):
        imported(tmp_path / name, tmp_path / "out")
    with pytest.raises(UsageError, match="no format 'best'"):
        imported(tmp_path / name, tmp_path / "o", "best") if name != "a.pt" else imported(lines(tmp_path / "z.jsonl", [{}]), None, "best")


def test_an_existing_folder_is_kept(tmp_path):
    with pytest.raises(UsageError, match="exists"):
        imported(lines(tmp_path / "a.jsonl", [{"prompt": "p", "response": "r"}]), tmp_path)


@pytest.mark.skipif(not DATA, reason="TILT_DATA names no folder of data")
def test_the_real_logs(tmp_path):
    place = imported(Path(str(DATA)) / "rl-logging-board", tmp_path / "board")
    book = Book(place)
    assert told(place)["answers"] == 3000 and len(book.steps()) == 24 and not told(place)["left_out"]
    rows = [json.loads(line) for line in (Path(str(DATA)) / "rl-logging-board/data.jsonl").open()]
    mean = {}
    for row in rows:
        mean.setdefault(row["step"], []).append(row["reward"])
    metrics = book.metrics()
    assert all(
        math.isclose(v, sum(mean[s]) / len(mean[s]), rel_tol=1e-4)
        for s, v in zip(metrics["step"], metrics["columns"]["reward"], strict=True)
    )
    assert book.search("二十年", [])["found"]
    for file, count in (
        ("7_3_plus_tracking_metrics.csv", 500),
        ("7_4_plus_clip_ratio_metrics.csv", 500),
        ("7_6_plus_format_reward_metrics.csv", 500),
    ):
        assert told(imported(Path(str(DATA)) / "rasbt-grpo-logs" / file, tmp_path / file))["metric_rows"] == count
