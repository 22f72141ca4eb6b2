"""User functions: what they may return, how they may fail, and what the user is told; in a thread and in a worker process."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from processes import gone

from tilt.errors import DataError, UsageError
from tilt.rewards.functions import RewardFunction, load_function
from tilt.rewards.isolate import Isolated

PROMPTS, COMPLETIONS = ["p0", "p1", "p2"], ["c0", "c1\x1b[2J", "c2"]


def scored(call: Callable[..., Any], **settings: Any) -> list[float | None]:
    return RewardFunction("mine", call, **settings)(PROMPTS, COMPLETIONS, {"gold": [1, 2, 3]}).values


def test_a_function_gets_prompts_completions_and_the_columns_it_names() -> None:
    seen: dict[str, Any] = {}

    def everything(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
        seen.update(prompts=prompts, completions=completions, **columns)
        return [0, 1, 2]

    assert scored(everything) == [0.0, 1.0, 2.0]
    assert seen == {"prompts": PROMPTS, "completions": COMPLETIONS, "gold": [1, 2, 3]}
    assert scored(lambda completions, gold: gold) == [1, 2, 3]
    assert scored(lambda gold, extra=7: [extra] * 3) == [7, 7, 7]


def test_an_async_function_is_awaited() -> None:
    async def later(completions: list[str]) -> list[float]:
        return list(await asyncio.gather(*(one(c) for c in completions)))

    async def one(completion: str) -> float:
        await asyncio.sleep(0.01)
        return float(completion[1])

    assert scored(later) == [0, 1, 2]
    with pytest.raises(DataError, match=r"did not answer within 0\.1 s"):
        scored(_forever, seconds=0.1)


async def _forever(completions: list[str]) -> list[float]:
    await asyncio.sleep(30)
    return []


@pytest.mark.parametrize(
    "answer",
    [[1, 0, None], (1.0, 0.0, None), [True, False, None], [Fraction(1), np.float32(0), None], np.array([1.0, 0.0, 2.0]), torch.tensor([1.0, 0.0, 2.0]),
     [torch.tensor(1.0), torch.tensor([0.0]), None]],
    ids=["list", "tuple", "bools", "mixed", "numpy", "torch", "scalars"],
)  # fmt: skip
def test_numbers_of_every_kind_are_read(answer: Any) -> None:
    assert scored(lambda completions: answer)[:2] == [1.0, 0.0]


BAD = {
    "too few": ([1.0, 2.0], "returned 2 values"),
    "too many": ([1.0] * 4, "returned 4 values"),
    "one number": (1.0, "returned float"),
    "nothing": (None, "returned NoneType"),
    "text": ("1.0", "returned str"),
    "a dict": ({"a": 1}, "returned dict"),
    "a scalar tensor": (torch.tensor(1.0), "returned float"),
    "one text": ([1.0, "1.0", 2.0], "value of type str .* for sample 1"),
    "nan": ([1.0, 2.0, float("nan")], "returned nan for sample 2"),
    "infinity": ([1.0, -float("inf"), 2.0], "returned -inf for sample 1"),
    "too large": ([1.0, 10**400, 2.0], "returned inf for sample 1"),
    "lists": ([[1.0], [2.0], [3.0]], "value of type list .* for sample 0"),
    "complex": ([1j, 1.0, 1.0], "value of type complex"),
    "an array": ([np.ones(2), 1.0, 1.0], "array of type ndarray for sample 0"),
    "a matrix": (np.ones((3, 1)), "value of type list .* for sample 0"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_wrong_answer_names_function_sample_and_inputs(name: str) -> None:
    answer, said = BAD[name]
    with pytest.raises(DataError, match=f'(?s)the reward mine .*{said}.*prompt "p.*completion "c.*on_error: zero') as caught:
        scored(lambda completions: answer)
    assert "\x1b" not in str(caught.value)
    assert str(caught.value).count("\n") <= 4


def test_on_error_marks_the_failed_samples_only() -> None:
    part = RewardFunction("mine", lambda completions: [1.0, "x", float("nan")], on_error="skip")
    told = part(PROMPTS, COMPLETIONS, {})
    assert told.values == [1.0, None, None] and told.failures == 2 and "sample 1" in told.message
    assert scored(lambda completions: [1.0, "x", 3], on_error="zero") == [1.0, 0.0, 3.0]
    assert scored(lambda completions: [1.0], on_error="zero") == [0.0, 0.0, 0.0]
    assert scored(lambda completions: 1 / 0, on_error="skip") == [None, None, None]


def test_what_a_function_raises_is_told_with_its_line() -> None:
    def broken(completions: list[str]) -> list[float]:
        raise KeyError("gold \x1b[31m" + "x" * 10_000)

    with pytest.raises(DataError, match=r"mine: raised KeyError: .*test_functions.py, line \d+") as caught:
        scored(broken)
    assert "\x1b" not in str(caught.value) and len(str(caught.value)) < 1000
    assert isinstance(caught.value.__cause__, KeyError)


@pytest.mark.parametrize("leave", [lambda completions: exit(3), lambda completions: (_ for _ in ()).throw(KeyboardInterrupt())])
def test_a_function_cannot_end_the_run(leave: Callable[..., Any]) -> None:
    with pytest.raises(DataError, match="called for the program's end"):
        scored(leave)


def test_a_slow_function_is_left_behind() -> None:
    begin = time.monotonic()
    with pytest.raises(DataError, match=r"did not answer within 0\.2 s.*isolate"):
        scored(lambda completions: time.sleep(5), seconds=0.2)
    assert time.monotonic() - begin < 4
    assert scored(lambda completions: time.sleep(5), seconds=0.1, on_error="zero") == [0, 0, 0]


def test_a_parameter_without_a_column_is_a_usage_error_whatever_on_error_says() -> None:
    with pytest.raises(UsageError, match="mine asks for answer; there are: completions, gold, prompts"):
        scored(lambda completions, answer: [], on_error="zero")


def test_an_empty_batch_is_an_empty_list() -> None:
    assert RewardFunction("mine", lambda completions: [])([], [], {}).values == []


@pytest.mark.parametrize(
    ("reference", "said"),
    [
        ("absent.py:score", "there is no reward file"),
        ("good.py", "write file.py:func"),
        ("good.py:", "write file.py:func"),
        ("good.txt:score", "write file.py:func"),
        ("good.py:scor", "has no function 'scor'; it has: score, other"),
        ("good.py:NUMBER", "names 'NUMBER', which is int"),
        ("broken.py:score", r"cannot be loaded: SyntaxError"),
        ("raising.py:score", r"cannot be loaded: ZeroDivisionError.*raising.py, line 2"),
    ],
)
def test_a_function_that_cannot_be_loaded(tmp_path: Path, reference: str, said: str) -> None:
    (tmp_path / "good.py").write_text("NUMBER = 3\ndef score(completions): return [1.0] * len(completions)\ndef other(completions): ...\n")
    (tmp_path / "broken.py").write_text("def score(:\n")
    (tmp_path / "raising.py").write_text("x = 1\ny = x / 0\n")
    with pytest.raises(UsageError, match=said):
        load_function(reference, tmp_path)


def test_a_function_is_loaded_relative_to_its_base(tmp_path: Path) -> None:
    (tmp_path / "good.py").write_text("def score(completions): return [float(len(c)) for c in completions]\n")
    path, name, call = load_function("good.py:score", tmp_path)
    assert (path, name) == (tmp_path / "good.py", "score")
    assert call(["ab"]) == [2.0]


# --- in a worker process ---------------------------------------------------------------------------------------------------

WORKER = """
import os, sys, time, signal, subprocess

print("loading prints this")

def fine(completions, gold):
    print("noise on stdout")
    return [len(c) + g for c, g in zip(completions, gold)]

async def later(completions, **columns):
    return [float(len(columns))] * len(completions)

def hang(completions):
    time.sleep(60)

def spin(completions):
    while True: pass

def leave(completions):
    os._exit(0)

def polite(completions):
    sys.exit(3)

def crash(completions):
    sys.stderr.write("about to fall\\n"); sys.stderr.flush()
    os.kill(os.getpid(), signal.SIGSEGV)

def greedy(completions):
    return [len(bytearray(8 << 30))] * len(completions)

def forks(completions, gold):
    os.fork()
    return gold

def orphan(completions):
    subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)", __file__])
    time.sleep(60)

def secret(completions):
    return [float("HF_TOKEN" in os.environ)] * len(completions)

def nan(completions):
    return [float("nan")] * len(completions)

def thing(completions):
    return [object()] * len(completions)

def lies(completions):
    for fd in range(3, 10):
        try: os.write(fd, b"\\xff" * 64)
        except OSError: pass
    time.sleep(60)

def hidden(completions):
    raise ValueError("\\x1b[2J" + "y" * 100000)

def states(completions):
    states.n = getattr(states, "n", 0) + 1
    return [float(states.n)] * len(completions)
"""


@pytest.fixture
def worker(tmp_path: Path) -> Iterator[Callable[..., RewardFunction]]:
    file = tmp_path / "mine.py"
    file.write_text(WORKER)
    started: list[Isolated] = []

    def make(name: str, **settings: Any) -> RewardFunction:
        started.append(Isolated(file, name, **({"seconds": 10.0} | settings)))
        return RewardFunction(name, started[-1], started[-1].seconds)

    yield make
    for one in started:
        one.stop()


def test_a_worker_answers_batch_after_batch(worker: Callable[..., RewardFunction], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "a secret")
    fine = worker("fine")
    assert fine(PROMPTS, ["a", "bb", "c" * 10**6], {"gold": [1, 2, 3]}).values == [2, 4, 10**6 + 3]
    counted = worker("states")
    assert [counted(PROMPTS, COMPLETIONS, {}).values[0] for _ in range(3)] == [1, 2, 3]
    assert worker("later")(PROMPTS, COMPLETIONS, {"gold": [1, 2, 3]}).values == [2, 2, 2]
    assert worker("secret")(PROMPTS, COMPLETIONS, {}).values == [0, 0, 0]
    forks = worker("forks")
    for n in range(4):
        assert forks(PROMPTS, COMPLETIONS, {"gold": [n] * 3}).values == [n] * 3, "a forked copy must not answer"


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("hang", r"did not answer within 1 s"),
        ("spin", r"did not answer within 1 s"),
        ("leave", "ended with exit code 0 before it answered"),
        ("crash", 'was ended by SIGSEGV; it last wrote "about to fall"'),
        ("lies", "answered nonsense"),
        ("polite", "raised SystemExit: 3"),
        ("greedy", "raised MemoryError"),
        ("hidden", r"raised ValueError: \\x1b"),
        ("nan", "returned nan for sample 0"),
        ("thing", "value of type object for sample 0"),
    ],
)
def test_a_worker_that_hangs_or_dies_is_named_and_the_next_batch_gets_a_new_one(
    worker: Callable[..., RewardFunction], name: str, said: str
) -> None:
    part = worker(name, seconds=1.0, memory=1.0)
    for _ in range(2):
        with pytest.raises(DataError, match=f"(?s)the reward {name}.*{said}") as caught:
            part(PROMPTS, COMPLETIONS, {})
        assert "\x1b" not in str(caught.value) and len(str(caught.value)) < 1500
    assert part.call.restarts == (2 if name in ("hang", "spin", "leave", "crash", "lies") else 0)


def test_the_children_of_a_killed_worker_die_with_it(worker: Callable[..., RewardFunction], tmp_path: Path) -> None:
    with pytest.raises(DataError, match="did not answer"):
        worker("orphan", seconds=2.0)(PROMPTS, COMPLETIONS, {})
    gone(str(tmp_path / "mine.py"))


def test_a_worker_with_a_processor_limit(worker: Callable[..., RewardFunction]) -> None:
    with pytest.raises(DataError, match="was ended by SIG"):
        worker("spin", seconds=20.0, cpu=1)(PROMPTS, COMPLETIONS, {})


def test_a_file_that_does_not_load_in_a_worker(tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text("1 / 0\n")
    with pytest.raises(UsageError, match="cannot be loaded in a worker .*ZeroDivisionError"):
        Isolated(tmp_path / "broken.py", "score").start()
    with pytest.raises(UsageError, match="no attribute 'absent'"):
        (tmp_path / "fine.py").write_text("x = 1\n")
        Isolated(tmp_path / "fine.py", "absent").start()


def test_columns_that_cannot_travel_are_refused(worker: Callable[..., RewardFunction]) -> None:
    with pytest.raises(UsageError, match="columns cannot be sent to the worker of mine.py:fine"):
        worker("fine")(PROMPTS, COMPLETIONS, {"gold": [lambda: 1] * 3})
