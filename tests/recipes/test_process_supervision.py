"""Learning: a process reward model finds the first wrong step, and what it says of steps teaches a policy to take them rightly."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tilt.data.tokenizers import characters
from tilt.recipes import process_reward, rl, sft
from tilt.tasks import chains


@pytest.fixture
def task(tmp_path: Path) -> dict[str, Any]:
    """Files of the task, and data settings for each."""
    made = chains.Chains()
    characters(chains.ALPHABET).save_pretrained(tmp_path / "words")
    found = {}
    for name, rows in {
        "demonstrations": made.demonstrations,
        "labelled": made.labelled,
        "prompts": lambda held_out: [{"prompt": p} for p in made.prompts(held_out=held_out)],
    }.items():
        for part in (False, True):
            (tmp_path / f"{name}_{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows(held_out=part)))  # type: ignore[operator]
        found[name] = {"source": str(tmp_path / f"{name}_False.jsonl"), "eval": str(tmp_path / f"{name}_True.jsonl"), "template": "text"}
    return found


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_process_supervision_teaches_right_steps(task, shared, tmp_path):
    """From an imitation of answers with slips; the truth, a program, is measured on held-out prompts and never trained on."""
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
    learned = rl.run(
        rl.Config.model_validate(
            shared
            | {
                "algorithm": "grpo_process", "model": str(start.checkpoint), "data": task["prompts"], "reward": {"process": str(judge.checkpoint)},
                "measure": {"function": chains.step_accuracy, "name": "truth"}, "steps": 40, "prompts": 32, "samples": 8, "sampling": {"max_tokens": 44},
                "optimizer": {"lr": 1e-3, "warmup": 3}, "eval": {"samples": 4}, "rollouts_every": 0, "save": False,
            }
        )
    )  # fmt: skip
    print({name: (learned.before[name], learned.after[name]) for name in ("measure/truth", "reward/process", "kl", "length")}, judge.after)
    assert learned.after["measure/truth"] > learned.before["measure/truth"] + 0.2
    assert learned.after["reward/process"] > learned.before["reward/process"]
