"""Several workers for one function, and second tries: the scores are those of one worker, bit for bit, and the first failure is the first by the prompts."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import gone, zombies

from tilt.data.rollouts import Prompt, Rollout, Sampling
from tilt.errors import DataError, UsageError
from tilt.rewards import parse
from tilt.rewards.ahead import Ahead
from tilt.rewards.crew import Crew
from tilt.rewards.functions import RewardFunction
from tilt.rewards.isolate import Died, Isolated
from tilt.rewards.score import Called, Scorer, build
from tilt.rewards.text import Text

REWARD = """
import hashlib, os, time

def score(prompts, completions, gold, **columns):
    assert len(set(prompts)) == 1, "one prompt a call"
    time.sleep(0.02 * (gold[0] % 3))
    if "bad" in completions[0]:
        raise ValueError(f"bad {gold[0]}")
    if "exit" in completions[0]:
        os._exit(9)
    rank = {text: i for i, text in enumerate(sorted(completions))}
    return [int(hashlib.sha256(text.encode()).hexdigest()[:13], 16) / 3**30 + rank[text] for text in completions]

def who(completions, **columns):
    begun = time.monotonic()
    time.sleep(0.3)
    with open(__file__ + ".times", "a") as file:
        file.write(f"{begun} {time.monotonic()} {os.environ['TILT_WORKER']}\\n")
    return [1.0] * len(completions)

def flaky(completions):
    flaky.n = getattr(flaky, "n", 0) + 1
    if flaky.n % 3:
        raise ConnectionError(f"try {flaky.n}")
    return [1.0] * len(completions)

def half(completions):
    half.n = getattr(half, "n", 0) + 1
    return [float("nan") if half.n == 1 else 2.0, 1.0]

def mortal(completions):
    path = __file__ + ".tries"
    open(path, "a").write("x")
    if len(open(path).read()) < 3:
        os._exit(1)
    return [1.0] * len(completions)
"""


def answers(words: list[str], samples: int = 3) -> tuple[list[Rollout], list[Text]]:
    prompts = [Prompt((i,), i, {"gold": i}) for i in range(len(words))]
    own = [Rollout(p, (1, k), (True,) * 2, (-1.0,) * 2, "stop", Sampling(), 0, (0, 0, p.id, k)) for p in prompts for k in range(samples)]
    return own, [Text(f"ask {i}", word + "!" * k) for i, word in enumerate(words) for k in range(samples)]


@pytest.fixture
def scorer(tmp_path: Path) -> Iterator[Any]:
    (tmp_path / "mine.py").write_text(REWARD)
    made: list[Scorer] = []

    def build_one(name: str = "score", more: dict[str, Any] | None = None, **settings: Any) -> Scorer:
        made.append(
            build({"function": {"file": f"mine.py:{name}", "isolate": True, **settings}, "timeout": 10, **(more or {})}, base=tmp_path)
        )
        return made[-1]

    yield build_one
    for each in made:
        each.close()
    gone(str(tmp_path / "mine.py"))
    assert not zombies()


def test_scores_do_not_depend_on_how_many_workers_there_are_nor_on_when_they_begin(scorer: Any) -> None:
    rollouts, texts = answers([f"word {i}" for i in range(9)])
    found = {}
    for workers in (1, 2, 3):
        for overlap in (False, True):
            one = scorer(workers=workers, overlap=overlap)
            for i in range(0, len(rollouts), 3) if overlap else ():
                one.begin(rollouts[i : i + 3], texts[i : i + 3])
            found[workers, overlap] = one(rollouts, texts).total
            assert one.overlaps is overlap
    first = found[1, False]
    assert all(torch.equal(first, other) for other in found.values()) and len(set(first.tolist())) == 27


@pytest.mark.parametrize("workers", [1, 3])
def test_a_failure_is_of_its_prompt_whoever_judged_it(scorer: Any, workers: int) -> None:
    rollouts, texts = answers(["a", "b", "bad", "c", "exit", "d", "bad too"])
    told = scorer(workers=workers, more={"on_error": "skip"})
    rewards = told(rollouts, texts)
    assert rewards.scored.tolist() == [i // 3 not in (2, 4, 6) for i in range(21)]
    assert told.report.failures == {"score": 9} and "bad 2" in told.report.messages["score"]
    with pytest.raises(DataError, match="bad 2"):
        scorer(workers=workers)(rollouts, texts)


def test_workers_work_beside_each_other(scorer: Any, tmp_path: Path) -> None:
    """Six calls of 0.3 s by three workers: three different processes, some of them at the same time."""
    rollouts, texts = answers(["a"] * 6, 1)
    assert scorer("who", workers=3)(rollouts, texts).total.tolist() == [1.0] * 6
    calls = sorted(line.split() for line in (tmp_path / "mine.py.times").read_text().splitlines())
    assert len(calls) == 6 and len({worker for _, _, worker in calls}) == 3
    assert any(float(later[0]) < float(earlier[1]) for earlier, later in pairwise(calls))


def test_a_call_that_waits_ends_when_the_workers_are_ended(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("import time\ndef score(completions): time.sleep(60)\n")
    crew = Crew(Isolated(tmp_path / "mine.py", "score"), 2)
    crew.start()
    told: list[str] = []

    def call() -> None:
        try:
            crew({"completions": ["a"]})
        except Died as error:
            told.append(str(error))

    threads = [threading.Thread(target=call) for _ in range(3)]
    for thread in threads:
        thread.start()
    time.sleep(0.2)
    crew.stop()
    for thread in threads:
        thread.join(5)
    assert len(told) == 3 and all("was ended with the run" in text for text in told), "none is started again, the third call neither"
    gone(str(tmp_path / "mine.py"))


def test_a_file_that_fails_is_told_of_once_and_leaves_no_worker(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("1 / 0\n")
    with pytest.raises(UsageError, match="cannot be loaded in a worker"):
        build({"function": {"file": "mine.py:score", "isolate": True, "workers": 3}}, base=tmp_path)
    gone(str(tmp_path / "mine.py"))


def test_a_file_that_breaks_in_the_middle_of_a_run_is_a_failure_of_the_reward(scorer: Any, tmp_path: Path) -> None:
    one = scorer(more={"on_error": "zero"}, workers=1)
    rollouts, texts = answers(["exit"], 2)
    assert one(rollouts, texts).total.tolist() == [0.0, 0.0]
    (tmp_path / "mine.py").write_text("1 / 0\n")
    assert one(rollouts, texts).total.tolist() == [0.0, 0.0] and "cannot be started again" in one.report.messages["score"]


def test_a_second_try_is_made_before_the_policy_is_asked(scorer: Any) -> None:
    rollouts, texts = answers(["a"], 2)
    assert scorer("flaky", more={"retries": 2})(rollouts, texts).total.tolist() == [1.0, 1.0]
    assert scorer("half", more={"retries": 1})(rollouts, texts).total.tolist() == [2.0, 1.0]
    assert scorer("mortal", more={"retries": 2})(rollouts, texts).total.tolist() == [1.0, 1.0]
    with pytest.raises(DataError, match=r"try 2[\s\S]*It was tried 2 times"):
        scorer("flaky", more={"retries": 1})(rollouts, texts)
    short = scorer("flaky", more={"retries": 1, "on_error": "zero"})
    assert short(rollouts, texts).total.tolist() == [0.0, 0.0] and short.report.failures == {"flaky": 2}
    assert "tried 2 times" in short.report.messages["flaky"]


def test_what_the_user_must_mend_is_not_tried_again() -> None:
    calls: list[int] = []

    def wrong(completions: list[str]) -> list[float]:
        calls.append(1)
        raise UsageError("mend me")

    with pytest.raises(UsageError):
        RewardFunction("mine", wrong, retries=3)(["p"], ["c"], {})
    assert len(calls) == 1


@pytest.mark.parametrize(
    ("reward", "said"),
    [
        ({"function": {"file": "m.py:f", "workers": 2}}, "function.workers` is about a worker"),
        ({"function": {"file": "m.py:f", "memory": 2}}, "function.memory` is about a worker"),
        ({"function": {"file": "m.py:f", "processes": 2}}, "function.processes` is about a worker"),
        ({"function": {"file": "m.py:f", "isolate": True, "workers": 0}}, "workers` is 0"),
        ({"function": {"file": "m.py:f", "isolate": True, "file_size": -1.0}}, "file_size` is -1.0"),
        ({"function": {"file": "m.py:f", "isolate": True, "cpu": -1}}, "cpu` is -1"),
        ({"function": "m.py:f", "retries": -1}, "retries` is -1: expected a whole number"),
        ({"function": "m.py:f", "retries": True}, "retries` is True"),
        ({"model": "m", "retries": 1}, "retries` is about functions"),
        ({"process": "m", "retries": 1}, "retries` is about functions"),
        ({"judge": "m", "retries": 1}, "retries` is about functions"),
    ],
)
def test_settings_without_effect_are_refused(reward: Any, said: str) -> None:
    with pytest.raises(UsageError) as error:
        parse(reward)
    assert said in str(error.value)


def test_one_call_for_the_whole_batch_unless_workers_are_asked_for(scorer: Any) -> None:
    assert not isinstance(scorer().parts[0].call, Ahead)
    part = scorer(workers=2, overlap=True).parts[0].call
    assert isinstance(part, Ahead) and isinstance(part.call, Called) and isinstance(part.call.function.call, Crew)
    assert len({member._process.pid for member in part.call.function.call.members if member._process}) == 2
    assert os.getpid() not in {member._process.pid for member in part.call.function.call.members if member._process}
