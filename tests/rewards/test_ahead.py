"""Rewards that begin while answers are still generated: the same calls, scores and errors as afterwards, and truly before the last answer has ended."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from tilt.data.rollouts import Prompt, Rollout, Sampling
from tilt.errors import DataError, UsageError
from tilt.models import loading
from tilt.recipes import rl
from tilt.recipes.scoring import Scoring
from tilt.rewards import parse
from tilt.rewards.ahead import Ahead
from tilt.rewards.functions import Scored
from tilt.rewards.score import Scorer, build
from tilt.rewards.text import Text
from tilt.sampling.sampler import Sampler

REWARD = """
import os, time
calls = []

def score(prompts, completions, gold, lengths, **columns):
    calls.append(len(completions))
    if "bad" in completions[0]:
        raise ValueError("bad one")
    if "slow" in completions[0]:
        time.sleep(30)
    return [len(text) + g + n + 100 * len(calls) for text, g, n in zip(completions, gold, lengths)]
"""


def answers(words: Sequence[str], samples: int = 2) -> tuple[list[Rollout], list[Text]]:
    prompts = [Prompt((i,), i, {"gold": i}) for i in range(len(words))]
    own = [
        Rollout(p, (1,) * (k + 1), (True,) * (k + 1), (-1.0,) * (k + 1), "stop", Sampling(), 0, (0, 0, p.id, k))
        for p in prompts
        for k in range(samples)
    ]
    return own, [Text("ask", word + "!" * k) for word in words for k in range(samples)]


@pytest.fixture
def scorer(tmp_path: Path) -> Iterator[Any]:
    (tmp_path / "mine.py").write_text(REWARD)
    made: list[Scorer] = []

    def build_one(**settings: Any) -> Scorer:
        function = {"file": "mine.py:score", "isolate": True, "overlap": True}
        made.append(build({"function": function, "timeout": 10, **settings}, base=tmp_path))
        return made[-1]

    yield build_one
    for each in made:
        each.close()


def test_scores_are_those_of_the_same_calls_afterwards(scorer: Any) -> None:
    rollouts, texts = answers(["a", "bb", "ccc"])
    early, late = scorer(), scorer()
    for i in (0, 2, 4):
        early.begin(rollouts[i : i + 2], texts[i : i + 2])
    first, second = early(rollouts, texts).total, late(rollouts, texts).total
    assert torch.equal(first, second)
    assert first.tolist() == [102, 104, 204, 206, 306, 308], "one call a prompt, in the order of the prompts, in one worker"
    assert early(rollouts, texts).total[0] == 402, "what was begun is used once"


@pytest.mark.parametrize(
    "on_error, expected", [("raise", None), ("zero", [102, 104, 0, 0, 306, 308]), ("skip", [102, 104, None, None, 306, 308])]
)
def test_a_failure_is_of_its_group_and_the_same_early_or_late(scorer: Any, on_error: str, expected: list[Any] | None) -> None:
    rollouts, texts = answers(["a", "bad", "ccc"])
    early, late = scorer(on_error=on_error), scorer(on_error=on_error)
    for i in (0, 2, 4):
        early.begin(rollouts[i : i + 2], texts[i : i + 2])
    said = []
    for each in (early, late):
        if expected is None:
            with pytest.raises(DataError, match="bad one") as error:
                each(rollouts, texts)
            said.append(str(error.value))
            continue
        found = each(rollouts, texts)
        assert [v if s else None for v, s in zip(found.total.tolist(), found.scored.tolist(), strict=True)] == expected
        assert each.report.failures == {"score": 2}
        said.append(each.report.messages["score"])
    assert said[0] == said[1]


def test_the_clock_is_of_each_call(scorer: Any) -> None:
    rollouts, texts = answers(["a", "slow", "ccc"])
    early = scorer(timeout=0.5, on_error="zero")
    early.begin(rollouts[:2], texts[:2])
    early.begin(rollouts[2:4], texts[2:4])
    found = early(rollouts, texts)
    assert found.total.tolist() == [102, 104, 0, 0, 106, 108], "the worker is started anew after the one that hung"
    assert "did not answer within 0.5 s" in early.report.messages["score"]


def test_nothing_goes_on_after_the_end() -> None:
    gate, calls = threading.Event(), []

    def call(rollouts: Sequence[Rollout], texts: Sequence[Text]) -> Scored:
        calls.append(texts[0].completion)
        gate.wait(5)
        return Scored([0.0] * len(texts))

    ahead, (rollouts, texts) = Ahead(call), answers(["a", "b", "c"])
    for i in (0, 2, 4):
        ahead.begin(rollouts[i : i + 2], texts[i : i + 2])
    ahead.close()
    gate.set()
    ahead.pool.shutdown(wait=True)
    assert calls in (["a"], []), "calls that had not begun never do"


def test_the_worker_judges_before_the_last_answer_has_ended() -> None:
    """The judge of the first prompt is called while the sampler still decodes: the sampler waits for it there, and would wait in vain otherwise."""
    lm = loading.tiny("qwen3", vocabulary=40, width=16, layers=1, heads=2, context=64)
    judged, seen = threading.Event(), []

    class Words:
        def decode(self, tokens: Sequence[int], **_: Any) -> str:
            return " ".join(map(str, tokens))

    def call(rollouts: Sequence[Rollout], texts: Sequence[Text]) -> Scored:
        judged.set()
        return Scored([float(len(t.completion)) for t in texts])

    ahead = Ahead(call)
    sampler = Sampler(lm, Words(), Sampling(max_tokens=6), slots=2)  # two answers at a time: the second prompt waits for the first
    prompts = [Prompt((1, 2, i), i) for i in range(3)]

    def finished(rollouts: list[Rollout]) -> None:
        seen.append(rollouts)
        ahead.begin(rollouts, [Text("", str(r.tokens)) for r in rollouts])
        if len(seen) == 1:
            assert judged.wait(10), "the reward was not asked while answers were generated"

    drawn = sampler.sample(prompts, 2, step=0, finished=finished)
    assert [r for group in seen for r in group] == drawn == sampler.sample(prompts, 2, step=0)
    assert len(ahead(drawn, [Text("", str(r.tokens)) for r in drawn]).values) == 6
    ahead.close()


@pytest.mark.parametrize("slots", [3, 7, 64])
def test_answers_are_told_of_in_order_and_once(slots: int) -> None:
    """Stop tokens end answers anywhere; a prompt is told of when it and all before it have ended."""
    lm = loading.tiny("qwen3", vocabulary=12, width=16, layers=1, heads=2, context=64)
    sampler = Sampler(lm, None, Sampling(max_tokens=20, stop_ids=(3,)), slots=slots)
    told: list[list[Rollout]] = []
    drawn = sampler.sample([Prompt((1, i), i) for i in range(6)], 3, step=0, finished=told.append)
    assert len(told) == 6 and [r for group in told for r in group] == drawn and len({len(r.tokens) for r in drawn}) > 2


def test_a_run_is_the_same_with_and_without_a_head_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tilt.runs.journal import read_metrics

    (tmp_path / "mine.py").write_text("def score(prompts, completions, **columns):\n    return [float(len(set(t))) for t in completions]\n")
    (tmp_path / "rows.jsonl").write_text("".join(f'{{"prompt": "say {i}"}}\n' for i in range(12)))
    function = {"file": str(tmp_path / "mine.py:score"), "isolate": True, "overlap": True}
    given = {
        "model": {"width": 16, "layers": 1, "heads": 2, "context": 32, "vocabulary": 270}, "data": {"source": str(tmp_path / "rows.jsonl"), "template": "text"},
        "reward": {"function": function}, "steps": 2, "prompts": 4, "samples": 3, "sampling": {"max_tokens": 5, "slots": 5}, "threads": 1, "quiet": True,
        "root": tmp_path, "eval": {"prompts": 2},
    }  # fmt: skip
    begun: list[int] = []
    plain = Scorer.begin
    monkeypatch.setattr(Scorer, "begin", lambda self, rollouts, texts: (begun.append(len(rollouts)), plain(self, rollouts, texts)))
    runs = [rl.run(rl.Config.model_validate(given | {"name": "with"}))]
    assert begun == [3] * 8
    monkeypatch.setattr(Scoring, "begin", None)
    runs.append(rl.run(rl.Config.model_validate(given | {"name": "without"})))
    clocks = ("time", "tokens_per_second", "eps", "reward/score_seconds")
    first, second = (
        [{k: v for k, v in row.items() if not k.startswith(clocks)} for row in read_metrics(run.directory.metrics)] for run in runs
    )
    assert first == second and len(first) == 3 and begun == [3] * 8


def test_overlap_needs_a_worker(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="set isolate: true"):
        parse({"function": {"file": "mine.py:score", "overlap": True}})
