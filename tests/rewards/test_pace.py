"""A slow reward is named once, with its share of the time and what can be done; a fast one never."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tilt.data.rollouts import Prompt, Rollout, Sampling
from tilt.rewards import Scored, Scorer, Text, pace, parse, score
from tilt.rewards.pace import LEAST, SHARE, STEPS, Pace, advice
from tilt.rewards.score import Part


class Time:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def walk(seconds: dict[str, float], step: float, steps: int = 3 * STEPS) -> list[tuple[int, str]]:
    """Batches that take so long in steps that take so long: when which part is named."""
    clock, named = Time(), []
    paced = Pace(clock)
    for i in range(steps):
        clock.now += step
        if found := paced.step(seconds):
            named.append((i, str(found)))
    return named


def test_a_slow_part_is_named_once_with_its_share() -> None:
    assert walk({"fast": 0.1, "slow": 4.0}, 10.0) == [(STEPS, "slow takes 4 s a batch, 40% of the time of training.")]


def test_parts_are_named_one_after_the_other_the_slowest_first() -> None:
    assert [(i, said.split()[0]) for i, said in walk({"a": 3.5, "b": 5.0}, 10.0)] == [(STEPS, "b"), (STEPS + 1, "a")]


def test_what_takes_little_is_not_named() -> None:
    assert walk({"a": 10.0 * SHARE * 0.9}, 10.0) == []
    assert walk({"a": LEAST * 0.9}, LEAST) == [], "a share of next to nothing"
    assert walk({"a": 9.0}, 10.0, STEPS) == [], "a few batches tell nothing yet"


def test_training_alone_is_timed_and_the_scores_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Time()
    monkeypatch.setattr(score.time, "perf_counter", clock)

    def slow(rollouts: Any, texts: Any) -> Scored:
        clock.now += 1.0
        return Scored([1.0])

    rollout = Rollout(Prompt((1,), 0), (3,), (True,), (0.0,), "stop", Sampling())
    scorer = Scorer([Part("slow", 1.0, slow, None, "Do this.")], pace=Pace(clock))
    said = []
    for training in [False] * 10 + [True] * (STEPS + 3):
        rewards = scorer([rollout], [Text("p", "c")], training=training)
        assert torch.equal(rewards.total, torch.ones(1))
        said.append(dict(scorer.report.messages))
    told = [(i, text) for i, messages in enumerate(said) for text in messages.values()]
    assert told == [(10 + STEPS, "slow takes 1 s a batch, 100% of the time of training. Do this.")]


@pytest.mark.parametrize(
    ("reward", "said"),
    [
        ("m.py:f", "With `isolate: true`"),
        ({"function": {"file": "m.py:f", "isolate": True}}, "`overlap: true` would let it begin while answers are generated; `workers: 2`"),
        ({"function": {"file": "m.py:f", "isolate": True, "overlap": True, "workers": 2}}, "`workers: 4` would ask more"),
        ({"code": {"workers": 2}}, "`workers: 4`"),
        ({"model": "runs/rm"}, "smaller model"),
        ({"judge": "runs/x"}, "smaller model"),
        ({"process": "m.py:f"}, "steps in this process"),
        (lambda completions: [], "Give it as file.py:func"),
        ({"numeric": {}}, "A rule runs in this process"),
    ],
)
def test_the_advice_fits_what_the_part_is(reward: Any, said: str) -> None:
    (spec,) = parse(reward)
    assert said in advice(spec)
    assert "overlap: true` would" not in advice(spec) or not getattr(spec.source, "overlap", False)


def test_a_run_says_it_once_in_its_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pace, "SHARE", 0.01)  # however slow the machine is with all the rest
    from tilt.recipes import rl

    (tmp_path / "mine.py").write_text(
        "import time\ndef score(completions):\n    time.sleep(0.4)\n    return [float(len(c)) for c in completions]\n"
    )
    (tmp_path / "rows.jsonl").write_text("".join(f'{{"prompt": "say {i}"}}\n' for i in range(12)))
    given = {
        "model": {"width": 16, "layers": 1, "heads": 2, "context": 32, "vocabulary": 270}, "data": {"source": str(tmp_path / "rows.jsonl"), "template": "text"},
        "reward": str(tmp_path / "mine.py:score"), "steps": 8, "prompts": 2, "samples": 2, "sampling": {"max_tokens": 3, "slots": 4}, "threads": 1, "quiet": True,
        "root": tmp_path, "name": "slow", "eval": {"prompts": 2}, "rollouts_every": 0,
    }  # fmt: skip
    result = rl.run(rl.Config.model_validate(given))
    lines = [line for line in (result.directory.path / "log.txt").read_text().splitlines() if "of the time of training" in line]
    assert len(lines) == 1 and "score takes " in lines[0] and "isolate: true" in lines[0]
