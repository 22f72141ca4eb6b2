"""Toy rows, tiny models, and each recipe in one call."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tilt.recipes import dpo, pretrain, reward_model, rl, sft
from tilt.recipes.taking_up import NEW, Start

TINY = {"width": 16, "layers": 1, "heads": 2, "context": 32, "vocabulary": 270}


def variety(completions: list[str], **columns: object) -> list[float]:
    """How many different characters an answer has."""
    return [float(len(set(text))) for text in completions]


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """Sixty sums of one-digit numbers with their answers."""
    file = tmp_path / "sums.jsonl"
    sums = [{"prompt": f"{a}+{b}=", "completion": str(a + b), "answer": str(a + b)} for a in range(10) for b in range(6)]
    file.write_text("".join(json.dumps(row) + "\n" for row in sums))
    return file


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    """A planted preference: the better answer says yes."""
    file = tmp_path / "pairs.jsonl"
    made = [{"prompt": f"q{i} ", "chosen": "yes" + "!" * (i % 3), "rejected": "no" + "!" * ((i + 1) % 3)} for i in range(48)]
    file.write_text("".join(json.dumps(row) + "\n" for row in made))
    return file


@pytest.fixture
def shared(tmp_path: Path) -> dict[str, Any]:
    return {"threads": 1, "quiet": True, "root": tmp_path / "runs"}


@pytest.fixture
def run_rl(rows, shared):
    """`run_rl(algorithm="ppo", steps=3)`: the settings over those of a small run."""

    def run(start: Start = NEW, **settings: Any):
        given = {
            "algorithm": "grpo", "model": TINY, "data": {"source": str(rows), "template": "text"}, "reward": variety, "steps": 2, "prompts": 4,
            "samples": 4, "sampling": {"max_tokens": 6}, "eval": {"prompts": 4}, "rollouts_every": 1,
        }  # fmt: skip
        return rl.run(rl.Config.model_validate(shared | given | settings), start)

    return run


@pytest.fixture
def run_sft(rows, shared):
    def run(**settings: Any):
        given = {"model": TINY, "data": {"source": str(rows), "template": "text"}, "steps": 3, "batch": 8}
        return sft.run(sft.Config.model_validate(shared | given | settings))

    return run


@pytest.fixture
def run_rm(pairs, shared):
    def run(**settings: Any):
        given = {"model": TINY, "data": {"source": str(pairs), "template": "text"}, "steps": 3, "batch": 8}
        return reward_model.run(reward_model.Config.model_validate(shared | given | settings))

    return run


@pytest.fixture
def run_dpo(pairs, shared):
    def run(**settings: Any):
        given = {"model": TINY, "data": {"source": str(pairs), "template": "text"}, "steps": 3, "batch": 8}
        return dpo.run(dpo.Config.model_validate(shared | given | settings))

    return run


@pytest.fixture
def run_pretrain(rows, shared):
    def run(**settings: Any):
        given = {"model": TINY, "data": {"source": str(rows), "template": "text"}, "read_as": "sft", "steps": 3, "batch": 8}
        return pretrain.run(pretrain.Config.model_validate(shared | given | settings))

    return run


@pytest.fixture
def metrics():
    """The lines of a run's metrics.jsonl."""

    def read(result) -> list[dict[str, Any]]:
        return [json.loads(line) for line in result.directory.metrics.read_text().splitlines()]

    return read
