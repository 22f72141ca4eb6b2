"""Learning: a process reward model finds the first wrong step of an answer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tilt.data.tokenizers import characters
from tilt.recipes import process_reward, sft
from tilt.tasks import chains


@pytest.fixture
def task(tmp_path: Path) -> dict[str, Any]:
    """Files of the task, and data settings for each."""
    made = chains.Chains()
    characters(chains.ALPHABET).save_pretrained(tmp_path / "words")
    found = {}
    for name, rows in {"demonstrations": made.demonstrations, "labelled": made.labelled}.items():
        for part in (False, True):
            (tmp_path / f"{name}_{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows(held_out=part)))
        found[name] = {"source": str(tmp_path / f"{name}_False.jsonl"), "eval": str(tmp_path / f"{name}_True.jsonl"), "template": "text"}
    return found


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_process_reward_model_locates_the_first_wrong_step(task, shared, tmp_path):
    """From the body of an imitation of answers with slips, on held-out answers."""
    start = sft.run(
        sft.Config.model_validate(
            shared
            | {
                "model": {"width": 64, "layers": 2, "heads": 4, "context": 64, "tokenizer": str(tmp_path / "words")},
                "data": task["demonstrations"], "steps": 150, "batch": 64, "optimizer": {"lr": 3e-3, "schedule": "cosine", "warmup": 20},
            }
        )
    )  # fmt: skip
    judge = process_reward.run(
        process_reward.Config.model_validate(
            shared
            | {
                "model": str(start.checkpoint), "data": task["labelled"], "steps": 400, "batch": 64,
                "optimizer": {"lr": 2e-3, "schedule": "linear", "warmup": 20},
            }
        )
    )  # fmt: skip
    assert judge.after["first_wrong"] > 0.9 and judge.after["located"] > 0.9 and judge.before["first_wrong"] < 0.5
