"""Learning: the whole road of RLAIF on the bundled preference task comes as far as the same road on the program's own labels."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from scripts import load

from tilt.recipes import rl
from tilt.tasks import manners


@pytest.fixture
def example() -> ModuleType:
    return load(Path(__file__).parents[2] / "examples" / "rlaif.py")


def test_the_road_in_miniature(example: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every stage of the example runs, on few prompts and for few steps, and both sources of labels are learned from."""
    monkeypatch.setattr(manners, "VERBS", manners.VERBS[:3])
    monkeypatch.setattr(manners, "THINGS", manners.THINGS[:4])
    monkeypatch.setattr(example, "JUDGE", example.JUDGE | {"steps": 2})
    monkeypatch.setattr(example, "EACH", 2)
    monkeypatch.setitem(example.quickstart.MANNERS_SFT, "epochs", 0.5)
    monkeypatch.setitem(example.quickstart.MANNERS_RM, "epochs", 0.5)
    small = {"steps": 1, "prompts": 4, "samples": 2, "eval": {"every": 0, "prompts": 8}, "rollouts_every": 0}
    for key, value in small.items():
        monkeypatch.setitem(example.PPO, key, value)
    found = example.road(tmp_path, seed=1)
    assert list(found) == ["judge", "labels by the judge", "labels by the program"]
    assert 0 <= found["judge"]["right"] <= 1 and found["judge"]["pairs"] > 100
    assert {path.name for path in tmp_path.iterdir() if (path / "config.yaml").exists()} == {
        "sft", "judge", "label", "reward-judge", "reward-program", "ppo-judge", "ppo-program",
    }  # fmt: skip


def test_grades_are_a_reward_of_a_run(run_sft: Any, run_rl: Any, rows: Path, shared: dict[str, Any], metrics: Any) -> None:
    """d-RLAIF: the judge is held, planned for, and graded with in every step; grades lie in [-1, 1]."""
    judge = str(run_sft(steps=2, model={"width": 16, "layers": 1, "heads": 2, "context": 64, "vocabulary": 300}).checkpoint)
    reward = {"judge": {"model": judge, "template": "{prompt}{answer}\n", "rendering": "text", "scores": 10}}
    result = run_rl(reward=reward, model=judge)
    for line in metrics(result):
        assert -1 <= line["eval/reward"] <= 1 if "eval/reward" in line else "reward/judge_seconds" in line
    assert -1 <= metrics(result)[0]["reward"] <= 1
    planned = {
        "model": judge,
        "data": {"source": str(rows), "template": "text"},
        "reward": reward,
        "prompts": 4,
        "sampling": {"max_tokens": 6},
    }
    lines = rl.plan(rl.Config.model_validate(shared | planned))
    assert any("judge judge" in line for line in lines) and any("short answers of the model as it is get" in line for line in lines)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_judge_that_leans_labels_as_well_as_the_program(example: ModuleType, tmp_path: Path) -> None:
    """The judge prefers the first place by its upbringing; asked in both orders it teaches as much as the truth does, within 0.05 of the preference rate."""
    found: dict[str, Any] = example.road(tmp_path, seed=0)
    judge, taught, truth = (found[key] for key in ("judge", "labels by the judge", "labels by the program"))
    assert judge["position_bias"] > 0.3 and judge["right"] > 0.8
    assert truth["preferred"] > 0.85 and abs(taught["preferred"] - truth["preferred"]) <= 0.05
