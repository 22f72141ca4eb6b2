"""Rewards that hang, crash, fork, fill memory, print without end, lie and kill: each policy ends as it says, in time, and nothing stays behind.

Every deed is limited by itself: should the code under test fail, no test can hurt the machine.
"""

from __future__ import annotations

import math
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from processes import carrying, gone, state, zombies

from tilt.errors import DataError
from tilt.rewards.functions import RewardFunction, Scored
from tilt.rewards.isolate import Isolated

REWARD = """
import ctypes, os, signal, subprocess, sys, time

def score(completions, **columns):
    found = DEEDS.get(completions[0], lambda: None)()
    return [float(len(c)) for c in completions] if found is None else found

def spin():
    while True: pass

def stubborn():
    for number in range(1, 32):
        try: signal.signal(number, signal.SIG_IGN)
        except (OSError, ValueError): pass
    spin()

def sleeper():
    return subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])

def daemons():
    for _ in range(3):
        if os.fork() == 0:
            os.setsid()
            if os.fork() == 0:
                os.environ.clear()
                os.execve(sys.executable, [sys.executable, "-c", "import time; time.sleep(60)", __file__], {})
            os._exit(0)

def fork(most, then=lambda: time.sleep(30)):
    for _ in range(most):
        if os.fork() == 0:
            then()
            os._exit(0)
    time.sleep(30)

def bomb(depth):
    for _ in range(depth):
        os.fork()
    time.sleep(30)

def hold(megabytes):
    held = bytearray(megabytes << 20)
    time.sleep(20)

def flood(descriptor, megabytes):
    for _ in range(megabytes):
        os.write(descriptor, b"y" * (1 << 20))

def down(n=0):
    return down(n + 1) + 1

def deep():
    sys.setrecursionlimit(1 << 30)
    down()

def nest():
    value = []
    for _ in range(100000): value = [value]
    return [value, 1.0, 1.0]

def scribble(what):
    for descriptor in range(3, 20):
        try: os.write(descriptor, what)
        except OSError: pass

def calls():
    calls.n = getattr(calls, "n", 0) + 1
    if calls.n > 1000: raise RuntimeError("the thousand and first")

def stdout():
    sys.stdout = open(os.devnull, "w"); sys.stderr = None
    os.close(1)
    print("nobody hears this")

DEEDS = {
    "spin": spin, "stubborn": stubborn, "sleep": lambda: time.sleep(60), "late": lambda: time.sleep(1.2),
    "allocate": lambda: [len(bytearray(10 << 30))], "segfault": lambda: ctypes.string_at(0), "abort": os.abort,
    "exit 0": lambda: os._exit(0), "exit 3": lambda: sys.exit(3), "raise": lambda: 1 / 0, "interrupt": lambda: (_ for _ in ()).throw(KeyboardInterrupt()),
    "fork": lambda: fork(60), "bomb": lambda: bomb(6), "families": lambda: fork(4, lambda: hold(300)),
    "daemons": daemons, "daemons, then hang": lambda: (daemons(), time.sleep(60)), "children, then exit": lambda: (sleeper(), os._exit(0)),
    "stop a child": lambda: os.kill(sleeper().pid, signal.SIGSTOP), "zombies": lambda: fork(8, lambda: os._exit(0)) if False else [os.fork() or os._exit(0) for _ in range(8)] and None,
    "print": lambda: flood(1, 100), "print errors": lambda: flood(2, 100), "stdout": stdout, "recursion": down, "deep": deep, "nest": nest,
    "close": lambda: os.closerange(3, 64), "close, then hang": lambda: (os.closerange(0, 64), time.sleep(60)),
    "noise": lambda: (scribble(b"\\\\xff" * 64), None)[1], "forged": lambda: (scribble((12).to_bytes(8, "big") + (7).to_bytes(8, "big") + b'{"value": 1}'), None)[1],
    "brackets": lambda: (scribble((60000).to_bytes(8, "big") + (1).to_bytes(8, "big") + b"[" * 60000), None)[1],
    "terminate the parent": lambda: os.kill(os.getppid(), signal.SIGTERM), "stop the parent": lambda: os.kill(os.getppid(), signal.SIGSTOP),
    "kill the parent": lambda: (os.kill(os.getppid(), signal.SIGKILL), time.sleep(0.5))[1], "kill the group": lambda: os.killpg(0, signal.SIGKILL),
    "an object": lambda: [object(), 1.0, 1.0], "nan": lambda: [float("nan"), 1.0, 1.0], "huge": lambda: [10**400, 1.0, 1.0], "vast": lambda: [-(10**100000), 1.0, 1.0],
    "short": lambda: [1.0], "long": lambda: [1.0] * 10**6, "a text": lambda: "1.0", "texts": lambda: ["1" * 10**8, 1.0, 1.0], "a generator": lambda: (x for x in "abc"),
    "nothing": lambda: [None, None, None], "calls": calls,
}
""".replace("\\\\xff", "\\xff")

FINE: dict[str, str] = dict.fromkeys(
    ("daemons", "stop a child", "zombies", "print", "print errors", "stdout", "terminate the parent", "stop the parent"), "")  # fmt: skip
FAILS = {
    "spin": "did not answer within 1 s", "stubborn": "did not answer within 1 s", "sleep": "did not answer within 1 s", "late": "did not answer within 1 s",
    "allocate": "raised MemoryError", "segfault": "was ended by SIGSEGV", "abort": "was ended by SIGABRT", "exit 0": "exit code 0", "exit 3": "raised SystemExit",
    "raise": "raised ZeroDivisionError", "interrupt": "raised KeyboardInterrupt", "fork": "more than 20 processes", "bomb": "more than 20 processes",
    "families": "more than 0.5 GiB of memory", "daemons, then hang": "did not answer", "children, then exit": "exit code 0", "recursion": "raised RecursionError",
    "deep": "raised MemoryError|was ended by SIG|raised RecursionError|did not answer|more than 0.5 GiB", "nest": "value of type list", "close": "ended with exit code 1",
    "close, then hang": "closed its answers|did not answer", "noise": "answered nonsense", "forged": "answered nonsense", "brackets": "answered nonsense",
    "kill the group": "was ended by SIGKILL", "an object": "value of type object", "nan": "returned nan", "huge": "returned inf", "vast": "returned -inf",
    "short": "returned 1 values", "long": "returned 1000000 values", "a text": "returned str", "texts": "value of type str", "a generator": "returned generator",
}  # fmt: skip
QUICK = (
    "spin",
    "allocate",
    "segfault",
    "exit 0",
    "fork",
    "daemons, then hang",
    "print",
    "close",
    "forged",
    "stop the parent",
    "texts",
    "daemons",
)
HANGS = ("spin", "stubborn", "sleep", "late", "daemons, then hang", "close, then hang", "deep")
SECONDS = 60.0  # for three policies and what follows them, on a busy machine


@pytest.fixture(params=[True, False], ids=["apart", "watched"])
def tortured(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Callable[..., RewardFunction]]:
    """Makes rewards with workers in namespaces of their own, and with workers that are found as the keeper's descendants; nothing may be left of them."""
    file = tmp_path / "reward.py"
    file.write_text(REWARD)
    started: list[Isolated] = []

    def make(**settings: Any) -> RewardFunction:
        given = {"seconds": 20.0, "memory": 0.5, "processes": 20, "namespaces": request.param}
        started.append(Isolated(file, "score", **given | {k: v for k, v in settings.items() if k in Isolated.__dataclass_fields__}))
        started[-1].start()
        return RewardFunction("tortured", started[-1], **{k: v for k, v in settings.items() if k in ("on_error", "retries")})

    yield make
    for each in started:
        each.stop()
    gone(str(file))
    assert not zombies()


def asked(reward: RewardFunction, deed: str) -> list[float | None]:
    return list(told(reward, deed).values)


def told(reward: RewardFunction, deed: str) -> Scored:
    """What a batch of three gives; the clock is short for what hangs, and long enough for a busy machine otherwise."""
    assert isinstance(reward.call, Isolated)
    reward.call.seconds = 1.0 if deed in HANGS else 20.0
    return reward(["p"] * 3, [deed, "b", "cc"], {})


def try_all(make: Callable[..., RewardFunction], deed: str) -> None:
    """The deed under each policy; whatever it did, the next batch is scored as if nothing had been."""
    begin, before = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for policy, value in (("raise", math.nan), ("zero", 0.0), ("skip", None)):
        reward = make(on_error=policy)
        if deed in FINE:
            assert asked(reward, deed) == [len(deed), 1.0, 2.0]
        elif policy == "raise":
            with pytest.raises(DataError, match=f"(?s)the reward tortured.*({FAILS[deed]})") as error:
                asked(reward, deed)
            assert len(str(error.value)) < 2000
        else:
            found = told(reward, deed)
            assert list(found.values) in ([value] * 3, [value, 1.0, 1.0]) and found.failures == sum(v == value for v in found.values)
            assert found.message
        assert asked(reward, "fine") == [4.0, 1.0, 2.0]
        assert isinstance(reward.call, Isolated)
        reward.call.stop()
    assert time.monotonic() - begin < SECONDS
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 100_000, f"{grown} KiB more were held"


@pytest.mark.parametrize("deed", QUICK)
def test_a_reward_ends_as_its_policy_says_and_leaves_nothing(tortured: Callable[..., RewardFunction], deed: str) -> None:
    try_all(tortured, deed)


@pytest.mark.slow
@pytest.mark.parametrize("deed", sorted({*FINE, *FAILS} - {*QUICK}))
def test_every_other_deed(tortured: Callable[..., RewardFunction], deed: str) -> None:
    try_all(tortured, deed)


def test_nothing_is_an_answer(tortured: Callable[..., RewardFunction]) -> None:
    reward = tortured()
    assert asked(reward, "nothing") == [None] * 3 and not told(reward, "nothing").failures


def test_who_kills_the_parent_kills_no_more_than_the_worker(tortured: Callable[..., RewardFunction]) -> None:
    """In a namespace the parent cannot be killed from within; elsewhere the worker dies with it."""
    reward = tortured(on_error="zero")
    assert isinstance(reward.call, Isolated)
    said = asked(reward, "kill the parent")
    assert said == ([15.0, 1.0, 2.0] if reward.call.told["apart"] else [0.0] * 3)
    assert asked(reward, "fine") == [4.0, 1.0, 2.0]


def test_an_exception_after_a_thousand_calls(tortured: Callable[..., RewardFunction]) -> None:
    reward = tortured(on_error="skip")
    for _ in range(1000):
        assert asked(reward, "calls") == [5.0, 1.0, 2.0]
    found = told(reward, "calls")
    assert found.values == [None] * 3 and "the thousand and first" in found.message
    assert asked(reward, "fine") == [4.0, 1.0, 2.0]


def test_an_answer_that_comes_too_late_is_not_the_next_ones(tortured: Callable[..., RewardFunction]) -> None:
    reward = tortured(on_error="zero")
    for _ in range(2):
        assert asked(reward, "late") == [0.0] * 3
        assert asked(reward, "fine") == [4.0, 1.0, 2.0]


def test_what_is_printed_is_held_nowhere(tortured: Callable[..., RewardFunction], tmp_path: Path) -> None:
    """Of 100 MB the last line's worth is kept; no file grows."""
    reward = tortured()
    asked(reward, "print")
    assert isinstance(reward.call, Isolated) and len(reward.call._said) <= 2000
    assert sum(f.stat().st_size for f in tmp_path.rglob("*") if f.is_file()) < 100_000


RUN = """
import os, signal, sys, threading, time
from pathlib import Path
from tilt.rewards.isolate import Isolated

workers = [Isolated(Path(sys.argv[1]), "score", seconds=60, namespaces=apart) for apart in (True, False)]
for worker in workers:
    worker.start()
    for deed in ("daemons", "stop a child"):
        worker({"completions": [deed]})
    threading.Thread(target=worker, args=({"completions": [sys.argv[2]]},), daemon=True).start()
time.sleep(0.3)
print("ready", flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("deed", ["sleep", pytest.param("stubborn", marks=pytest.mark.slow)])
def test_a_run_that_is_killed_takes_its_workers_along(tmp_path: Path, deed: str) -> None:
    """SIGKILL lets nothing clean up: the keepers see it, and end workers, their daemons and their stopped children."""
    file = tmp_path / "reward.py"
    file.write_text(REWARD)
    run = subprocess.Popen([sys.executable, "-c", RUN, str(file), deed], stdout=subprocess.PIPE, text=True)
    assert run.stdout is not None and run.stdout.readline() == "ready\n"
    assert run.wait(30) == -signal.SIGKILL
    run.stdout.close()
    gone(str(file))


def test_the_processes_of_a_worker_are_seen_by_the_tests(tortured: Callable[..., RewardFunction], tmp_path: Path) -> None:
    """What `gone` would miss it could not show: a worker with three daemons is its keeper and itself, its namespace's first process, and the daemons."""
    reward = tortured()
    asked(reward, "daemons")
    assert isinstance(reward.call, Isolated)
    deadline, found, many = time.monotonic() + 5, {}, 6 if reward.call.told["apart"] else 5
    while len(found) < many and time.monotonic() < deadline:
        found = carrying(str(tmp_path / "reward.py"))
    assert len(found) == many, found
    reward.call.stop()
    assert all(state(pid) in ("", "Z") for pid in found)


WILD = """
import hashlib, os, random, signal, subprocess, sys, time

def score(prompts, completions, **columns):
    deed = random.choice(["fine", "fine", "fine", "exit", "segfault", "raise", "hang", "print", "nan", "short", "fork", "stop", "noise"])
    with open(os.path.join(os.path.dirname(__file__), "deeds"), "a") as file:
        file.write(deed + "\\n")
    if deed == "exit": os._exit(0)
    if deed == "segfault": os.kill(os.getpid(), signal.SIGSEGV)
    if deed == "raise": raise KeyError(completions[0])
    if deed == "hang": time.sleep(60)
    if deed == "print": os.write(1, b"z" * (8 << 20))
    if deed == "nan": return [float("nan")] * len(completions)
    if deed == "short": return [1.0]
    if deed == "fork":
        for _ in range(6):
            subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)", __file__], start_new_session=True)
    if deed == "stop": os.kill(os.getppid(), signal.SIGTERM)
    if deed == "noise":
        for descriptor in range(3, 12):
            try: os.write(descriptor, b"noise" * 9)
            except OSError: pass
    return [float(len(set(text))) for text in completions]
"""


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("policy", ["zero", "skip"])
def test_a_run_whose_reward_does_anything_ends_as_it_should(tmp_path: Path, policy: str) -> None:
    """Six steps with two workers, called while answers are generated: every failure is counted, the run is whole, nothing is left of it."""
    from tilt.recipes import rl
    from tilt.runs.journal import read_metrics

    file = tmp_path / "wild.py"
    file.write_text(WILD)
    (tmp_path / "rows.jsonl").write_text("".join(f'{{"prompt": "say {i}"}}\n' for i in range(12)))
    function = {"file": f"{file}:score", "isolate": True, "workers": 2, "overlap": True, "memory": 1.0, "processes": 20}
    given = {
        "model": {"width": 16, "layers": 1, "heads": 2, "context": 32, "vocabulary": 270}, "data": {"source": str(tmp_path / "rows.jsonl"), "template": "text"},
        "reward": {"function": function, "timeout": 1.0, "on_error": policy}, "steps": 6, "prompts": 4, "samples": 3, "sampling": {"max_tokens": 5, "slots": 5},
        "threads": 1, "quiet": True, "root": tmp_path, "name": policy, "eval": {"prompts": 2},
    }  # fmt: skip
    result = rl.run(rl.Config.model_validate(given))
    rows = read_metrics(result.directory.metrics)
    deeds = (tmp_path / "deeds").read_text().split()
    assert [row["step"] for row in rows] == list(range(7)) and len(deeds) > 24 and len(set(deeds)) > 5
    failed = sum(row.get("reward/score_failed", 0) for row in rows)
    assert failed % 3 == 0 and failed > 0, "a failure is of a prompt's answers"
    assert "reward     the reward score" in (result.directory.path / "log.txt").read_text()
    gone(str(file))
    assert not zombies()
