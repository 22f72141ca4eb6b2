"""The quickstart in miniature: every stage runs, and the report says what is in the files."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest

from tilt.recipes import quickstart
from tilt.tasks import arithmetic, manners


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quickstart.arithmetic, "Addition", partial(arithmetic.Addition, limit=15))
    monkeypatch.setattr(manners, "VERBS", manners.VERBS[:3])
    monkeypatch.setattr(manners, "THINGS", manners.THINGS[:4])
    monkeypatch.setitem(quickstart.ADDITION_SFT, "steps", 2)
    monkeypatch.setitem(quickstart.ADDITION_SFT, "batch", 8)
    monkeypatch.setitem(quickstart.ADDITION_SFT, "eval", {"every": 1, "prompts": 8})
    monkeypatch.setitem(quickstart.MANNERS_SFT, "epochs", 0.1)
    monkeypatch.setitem(quickstart.MANNERS_RM, "epochs", 0.05)
    for stage in (quickstart.ADDITION_GRPO, quickstart.MANNERS_PPO):
        for key, value in {
            "steps": 3,
            "prompts": 4,
            "samples": 2,
            "eval": {"every": 0, "prompts": 8, "samples": 2},
            "rollouts_every": 0,
        }.items():
            monkeypatch.setitem(stage, key, value)


def test_both_parts_run_and_are_reported(small: None, tmp_path: Path) -> None:
    found = quickstart.run(quickstart.Config(name="q", root=tmp_path, threads=1, quiet=True))
    assert list(found) == ["addition/sft", "addition/grpo", "manners/sft", "manners/reward_model", "manners/ppo"]
    text = (tmp_path / "q" / "report.md").read_text()
    assert f"{found['manners/reward_model'].after['accuracy']:.3f}" in text
    assert f"{found['manners/ppo'].after['kl']:.2f}" in text
    assert f"{found['addition/grpo'].after['reward']:.3f} ±" in text
    assert "What to try next" in text and "└" in text
    for stage in found:
        assert (tmp_path / "q" / stage / "config.yaml").exists()


def test_the_rate_compares_after_with_before() -> None:
    prompt, kind, rude = "please wash the red cup", "gladly i will wash the red cup my pleasure", "ugh i will wash the red cup now go away"
    assert quickstart.preference_rate([(prompt, rude, kind)]) == 1.0
    assert quickstart.preference_rate([(prompt, kind, rude)]) == 0.0


def test_the_curve_rises_with_its_values() -> None:
    lines = quickstart.curve("t", [0.0, 0.0, 1.0, 1.0], width=2, height=3).splitlines()
    assert lines[0] == "t" and lines[1].endswith("┤ •") and lines[3].endswith("┤• ") and "1.00" in lines[1] and "0.00" in lines[3]
