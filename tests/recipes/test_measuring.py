"""What a plan foresees of a run on given rows: exact where the machine is as supposed, and every kind of run can be tried."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from tilt.data.streams import Stream
from tilt.recipes import dpo, measuring, pretrain, process_reward, reward_model, sft
from tilt.recipes.given import evaluations
from tilt.recipes.measuring import Given, Phase, Reading, filled, foresee, read, saved

FIXED, TOKEN, READ, ALONE = 0.7, 0.004, 0.001, 0.5
BASE, WIDE = 100.0, 2.0
ROWS = [10, 25, 7, 40, 18, 33, 5, 21]


@pytest.fixture
def ideal(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """A machine on which work takes seconds and bytes that grow with its tokens, and what was done on it."""
    done: list[tuple[str, int]] = []
    at = SimpleNamespace(peak=BASE)

    def timed(device: torch.device, work: Any) -> Phase:
        work()
        kind, tokens = done[-1]
        at.peak = BASE + 50 + WIDE * tokens
        seconds = {"update": FIXED + TOKEN * tokens, "read": READ * tokens, "answer": ALONE + READ * tokens}[kind]
        return Phase(seconds, at.peak - BASE)

    monkeypatch.setattr(measuring, "timed", timed)
    monkeypatch.setattr(measuring, "machine", SimpleNamespace(trim=lambda: None, resident=lambda device: BASE, peak=lambda device: at.peak))
    return done


def given(done: list[tuple[str, int]], **readings: Reading[int]) -> Given[int]:
    def update(rows: Any) -> Any:
        return lambda: done.append(("update", sum(rows)))

    return Given(nn.Linear(1, 1), torch.device("cpu"), ROWS, lambda row: row, update, readings, 2.5)


def config(micro: int = 10**6) -> Any:
    return SimpleNamespace(seed=3, micro_tokens=micro)


@pytest.mark.parametrize("budget", [1e9, 0.3])
def test_a_step_is_scaled_from_what_was_tried_to_the_mean(monkeypatch: Any, ideal: list[tuple[str, int]], budget: float) -> None:
    """The largest batch is tried where the budget allows, a part of it elsewhere; its memory counts, and the mean of all steps for the time."""
    monkeypatch.setattr(measuring, "BUDGET", budget)
    found = foresee(config(), given(ideal), steps=6, batch=4)
    sizes = [sum(Stream(ROWS, 3).draw(step, 4)) for step in range(6)]
    assert len(set(sizes)) > 1, "steps differ"
    assert found.tokens == pytest.approx(sum(sizes) / 6) and found.largest == max(sizes)
    assert found.phases["update"].seconds == pytest.approx(FIXED + TOKEN * found.tokens)
    tried = ideal[-1][1]
    assert tried == max(sizes) if budget == 1e9 else tried < max(sizes)
    assert found.phases["update"].memory == pytest.approx(50 + WIDE * tried)
    assert found.seconds == pytest.approx(2.5 + 6 * found.phases["update"].seconds)
    assert found.memory == BASE + 50 + WIDE * tried and found.held == BASE


def test_a_forward_pass_is_no_larger_than_it_may_be(monkeypatch: Any, ideal: list[tuple[str, int]]) -> None:
    """What is kept for the backward pass grows to the largest pass, not to the batch."""
    monkeypatch.setattr(measuring, "BUDGET", 0.0)

    monkeypatch.setattr(measuring, "saved", Noted)
    for micro, largest in ((10**6, None), (45, 45)):
        found = foresee(config(micro), given(ideal), steps=6, batch=4)
        tried, whole = ideal[-1][1], max(sum(Stream(ROWS, 3).draw(step, 4)) for step in range(6))
        assert found.largest == (largest or whole)
        assert found.phases["update"].memory == pytest.approx(50 + WIDE * tried + found.activations * (found.largest - min(tried, micro)))
        assert found.activations > 0


class Noted:
    def __init__(self, module: nn.Module) -> None: ...

    def __enter__(self) -> dict[int, float]:
        return {0: 40.0, 1: 20.0}

    def __exit__(self, *error: object) -> None: ...


@pytest.mark.parametrize("able", [1e9, 60.0])
def test_readings_are_scaled_from_a_forward_pass(ideal: list[tuple[str, int]], able: float) -> None:
    reading = Reading(ROWS, lambda rows: ideal.append(("read", sum(rows))), 3, lambda row: row)
    for cut in (10**6, 80):
        found = read(torch.device("cpu"), reading, cut, able)
        assert found.seconds == pytest.approx(READ * sum(ROWS))
        assert ideal[-1][1] == (42 if able == 60.0 or cut == 80 else sum(ROWS)), "as many rows as fit into a pass, and the budget"
        assert found.memory == pytest.approx(50 + WIDE * filled(sum(ROWS), cut))


def test_answers_that_are_drawn_side_by_side_cost_once_what_they_share(ideal: list[tuple[str, int]]) -> None:
    """Of seconds that do not grow with the prompts none are multiplied."""
    reading = Reading(ROWS, lambda rows: ideal.append(("answer", sum(rows))), 1, lambda row: row, together=True)
    assert read(torch.device("cpu"), reading, 10**6, 60.0).seconds == pytest.approx(ALONE + READ * sum(ROWS))


def test_a_reading_like_another_is_not_tried(ideal: list[tuple[str, int]]) -> None:
    def work(rows: Any) -> None:
        ideal.append(("read", sum(rows)))

    def never(rows: Any) -> None:
        raise AssertionError("tried")

    readings = {
        "reference": Reading(ROWS, work, 1, lambda row: row),
        "evaluate": Reading(ROWS[:3], never, 4, lambda row: row, like="reference"),
    }
    found = foresee(config(), given(ideal, **readings), steps=2, batch=4)
    assert found.phases["evaluate"].seconds == pytest.approx(READ * sum(ROWS[:3]))
    assert found.phases["evaluate"].memory < found.phases["reference"].memory
    assert found.seconds == pytest.approx(2.5 + READ * sum(ROWS) + 4 * READ * sum(ROWS[:3]) + 2 * found.phases["update"].seconds)


def test_what_is_kept_for_the_backward_pass_is_counted_once() -> None:
    """Of sigmoid(W x) the input and the result; the weight is the module's own."""
    layer, x = nn.Linear(4, 8, bias=False), torch.randn(16, 4)
    with saved(layer) as found:
        y = torch.sigmoid(layer(x))
        (y * y).sum().backward()
    assert sorted(found.values()) == [16 * 4 * 4, 16 * 8 * 4] and layer.weight.grad is not None


def test_passes_are_of_like_size() -> None:
    assert filled(50, 20) == pytest.approx(50 / 3) and filled(20, 20) == 20 and filled(7, 20) == 7


def test_evaluations_are_counted_as_the_loop_takes_them() -> None:
    assert evaluations([1], 6, 0) == 2 and evaluations([1], 6, 2) == 4 and evaluations([1], 7, 2) == 5 and evaluations([], 6, 2) == 0


MODEL = {"width": 16, "layers": 1, "heads": 2, "context": 64, "vocabulary": 280}
PAIRS = [{"prompt": f"say {i}", "chosen": "yes " * (1 + i % 3), "rejected": "no"} for i in range(24)]
STEPWISE = [{"prompt": f"count {i}", "completions": ["one", "two", "three"], "labels": [True, i % 2 == 0, False]} for i in range(24)]
SCORED = {"prompts": 4, "samples": 2}
RUNS: dict[str, tuple[Any, dict[str, Any], list[dict[str, Any]], str]] = {
    "pretrain": (pretrain, {}, [{"text": "words and words " * (1 + i % 4)} for i in range(24)], "evaluate"),
    "sft": (sft, {}, [{"prompt": row["prompt"], "completion": row["chosen"]} for row in PAIRS], "evaluate"),
    "sft scored": (sft, {"reward": {"length": 3}, "eval": SCORED, "sampling": {"max_tokens": 5}, "lora": {"rank": 2}},
                   [{"prompt": row["prompt"], "completion": row["chosen"]} for row in PAIRS], "answer"),
    "dpo": (dpo, {}, PAIRS, "reference"),
    "dpo moving": (dpo, {"reference_update": {"every": 2}}, PAIRS, "evaluate"),
    "simpo": (dpo, {"algorithm": "simpo"}, PAIRS, "evaluate"),
    "kto": (dpo, {"algorithm": "kto"}, [{"prompt": r["prompt"], "completion": r[s], "label": s == "chosen"} for r in PAIRS for s in ("chosen", "rejected")], "reference"),
    "reward model": (reward_model, {}, PAIRS, "evaluate"),
    "span": (reward_model, {"span": 0.5}, PAIRS, "evaluate"),
    "process reward model": (process_reward, {}, STEPWISE, "evaluate"),
    "nothing held out": (dpo, {"data": {"held_out": 0.0}}, PAIRS, "reference"),
}  # fmt: skip


@pytest.mark.parametrize("name", RUNS)
def test_every_kind_of_run_is_foreseen(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Phases with seconds and bytes, the whole run, and nothing written."""
    monkeypatch.setattr(measuring, "BUDGET", 0.1)
    recipe, settings, rows, phase = RUNS[name]
    source = tmp_path / "rows.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    data = {"source": str(source), "held_out": 0.25, "template": "text"} | settings.get("data", {})
    shared = {"model": MODEL, "batch": 8, "steps": 3, "threads": 1, "root": str(tmp_path / "runs")}
    lines = recipe.plan(recipe.Config.model_validate(shared | settings | {"data": data}))
    (phases,) = [line for line in lines if line.startswith("phases     ")]
    (time,) = [line for line in lines if line.startswith("time       about ")]
    for part in ("load", phase, "update"):
        assert f"{part} " in phases and f"{part} " in time, lines
    assert ("evaluate" in phases) == (data["held_out"] > 0) and "update 3 × " in time
    assert any(line.startswith("memory     about ") for line in lines) and any(line.startswith("steps      3 of 8 ") for line in lines)
    assert ("reference" in phases) == (name in ("dpo", "kto", "nothing held out"))
    assert not (tmp_path / "runs").exists()
