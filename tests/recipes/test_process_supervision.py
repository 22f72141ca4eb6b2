"""Learning: a process reward model finds the first wrong step of an answer, and the policy that it judges gets its steps right."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tilt.recipes import process_reward, rl, sft
from tilt.tasks import chains


@pytest.fixture
def given(tmp_path: Path, shared: dict[str, Any]) -> Any:
    """`given("labelled", model, …)`: settings of a run on that file of the task, the same prompts held out in every one."""
    chains.write(tmp_path, chains.Chains())

    def settings(name: str, model: Any, **more: Any) -> dict[str, Any]:
        data = {"source": str(tmp_path / f"{name}.jsonl"), "template": "text", "held_out": 0.15, "max_prompt_tokens": 16}
        return shared | {"model": model, "data": data} | more

    return settings


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_process_reward_model_locates_the_first_wrong_step_and_drives_grpo(given, tmp_path):
    """From an imitation of answers with slips; both claims on held-out prompts, and the second by the program, which the policy never sees."""
    small = {"width": 64, "layers": 2, "heads": 4, "context": 64, "tokenizer": str(tmp_path / "words")}
    slow = {"lr": 3e-3, "schedule": "cosine", "warmup": 20}
    start = sft.run(sft.Config.model_validate(given("demonstrations", small, steps=250, batch=64, optimizer=slow))).checkpoint
    learning = {"steps": 400, "batch": 64, "optimizer": {"lr": 2e-3, "schedule": "linear", "warmup": 20}}
    judge = process_reward.run(process_reward.Config.model_validate(given("labelled", str(start), **learning)))
    assert judge.after["first_wrong"] > 0.9 and judge.after["located"] > 0.9 and judge.before["first_wrong"] < 0.5
    practice = {
        "algorithm": "grpo_process", "reward": {"process": str(judge.checkpoint)}, "measure": chains.step_accuracy,
        "steps": 60, "prompts": 16, "samples": 8, "sampling": {"max_tokens": 48}, "optimizer": {"lr": 3e-4, "schedule": "linear", "warmup": 3},
        "eval": {"samples": 4},
    }  # fmt: skip
    result = rl.run(rl.Config.model_validate(given("prompts", str(start), **practice)))
    truth = "measure/step_accuracy"
    assert result.before[truth] < 0.8 and result.after[truth] > result.before[truth] + 0.1
