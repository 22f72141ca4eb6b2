"""Programs in answers against tests: what counts as a program and as passing, and that no program gets out, stays, or takes the run with it."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from processes import gone, zombies

from tilt.data.rollouts import Prompt, Rollout, Sampling
from tilt.errors import DataError, UsageError
from tilt.isolation import answers, programs
from tilt.isolation.answers import extract, lines
from tilt.rewards import Text, parse
from tilt.rewards.programs import Code, Programs, read_tests
from tilt.rewards.score import Scorer, build

LIMITS = programs.Limits(2.0, 256 << 20, 8, 4 << 20, 64 << 10)
BARE = programs.Room(0, False, False)


@pytest.fixture(params=["apart", "bare"])
def passes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Whether a program passes a test, in all that the system allows, and without any namespace."""
    if request.param == "bare":
        monkeypatch.setattr(answers, "ROOM", BARE)
    elif not programs.room().offline:
        pytest.skip("this system allows no namespaces")
    return lambda program, test, **limits: answers.passes(program, test, replace(LIMITS, **limits))


@pytest.mark.parametrize(
    ("text", "auto", "fenced"),
    [
        ("print(1)\n", "print(1)\n", None),
        ("so:\n```python\nprint(1)\n```\ndone", "print(1)\n", "print(1)\n"),
        ("```\na\n```\nbetter:\n```py\nb\nc\n```", "b\nc\n", "b\nc\n"),
        ("```python\ncut off", "cut off", "cut off"),
        ("````\n```\nx\n```\n````", "```\nx\n```\n", "```\nx\n```\n"),
        ("  ```python\n  x = 1\n  ```", "  x = 1\n", "  x = 1\n"),
        ("```python\n```", "", ""),
        ("", None, None),
        (" \n", None, None),
    ],
)
def test_the_program_in_an_answer(text: str, auto: str | None, fenced: str | None) -> None:
    assert extract(text, "auto") == auto and extract(text, "fenced") == fenced
    assert extract(text, "whole") == (text if text.strip() else None)


def test_outputs_are_compared_by_lines_without_blanks_at_their_ends() -> None:
    assert lines("a  \r\nb\n\n\n") == lines("a\nb") != lines("a\n\nb")
    assert lines(" a") != lines("a") and lines("") == lines("\n \n") == []


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, None),
        ("assert f(1) == 2", ["assert f(1) == 2"]),
        (["assert f(1) == 2", "assert f(2) == 3"], ["assert f(1) == 2", "assert f(2) == 3"]),
        ([{"input": "1\n", "output": "2"}, "assert True"], [["1\n", "2"], "assert True"]),
        ('[{"input": "1", "output": "2"}]', [["1", "2"]]),
        ({"inputs": ["1", "2"], "outputs": ["3", "4"]}, [["1", "3"], ["2", "4"]]),
        ('{"inputs": ["1"], "outputs": ["3"]}', [["1", "3"]]),
        ("[f(1)] == [2] or exit(1)", ["[f(1)] == [2] or exit(1)"]),
    ],
)
def test_every_spelling_of_tests(value: Any, expected: Any) -> None:
    assert read_tests(value, 0, "tests") == expected


@pytest.mark.parametrize(
    "value", [[], "", 3, [1], [{"input": "1"}], [{"input": 1, "output": "2"}], {"inputs": ["1"], "outputs": []}, [""], "[" * 100_000 + "]"]
)
def test_what_is_no_test_is_named_with_its_sample(value: Any) -> None:
    if isinstance(value, str) and len(value) > 10:
        assert read_tests(value, 7, "t") == [value], "text that is no JSON is an assertion"
        return
    with pytest.raises(DataError, match=r"column 't' holds no tests for sample 7"):
        read_tests(value, 7, "t")


GOOD = [
    ("print(int(input()) + 1)", ["3\n", "4"]),
    ("import sys\nfor line in sys.stdin: print(line.strip()[::-1], ' ')", ["ab\ncd\n", "ba\ndc\n"]),
    ("def f(x): return x + 1", "assert f(1) == 2"),
    ("def f(x): return x + 1\nif __name__ == '__main__': input()", "assert f(1) == 2"),
    ("def f(x): return x + 1", "def check(g):\n    assert g(1) == 2\ncheck(f)"),
    ("open('a', 'w').write('x'); print(open('a').read())", ["", "x"]),
    ("import tempfile; print(tempfile.TemporaryFile().write(b'abc'))", ["", "3"]),
    ("print('ünï', end='')", ["", "ünï"]),
    ("import threading; t = threading.Thread(target=print, args=(1,)); t.start(); t.join()", ["", "1"]),
    ("import subprocess; print(subprocess.run(['echo', 'x'], capture_output=True, text=True).stdout)", ["", "x"]),
    ("print(hash('a') == hash('a'), sorted(map(str, {'a', 'b'})))", ["", "True ['a', 'b']"]),
]


@pytest.mark.parametrize(("program", "test"), GOOD)
def test_a_right_program_passes(passes: Any, program: str, test: Any) -> None:
    assert passes(program, test, seconds=10.0)


BAD = {
    "wrong": ("print(5)", ["", "4"]),
    "wrong assertion": ("def f(x): return x", "assert f(1) == 2"),
    "syntax": ("def f(:", ["", ""]),
    "raises after printing": ("print(4); 1 / 0", ["", "4"]),
    "exits before the assertion": ("import sys; sys.exit(0)", "assert False"),
    "exits hard before the assertion": ("import os; os._exit(0)", "assert False"),
    "closes everything": ("import os; os.closerange(0, 64)", "assert True"),
    "loops": ("while True: pass", ["", ""]),
    "loops before the assertion": ("while True: pass", "assert True"),
    "sleeps": ("import time; print(4, flush=True); time.sleep(30)", ["", "4"]),
    "stops itself": ("import os, signal; os.kill(os.getpid(), signal.SIGSTOP)", ["", ""]),
    "floods": ("while True: print('y' * 10**6)", ["", ""]),
    "prints too much and ends": ("print('y' * 100_000)", ["", "y" * 100_000]),
    "allocates": ("bytearray(10 << 30)", ["", ""]),
    "fills the disk": ("f = open('a', 'wb')\nwhile True: f.write(bytes(1 << 20))", ["", ""]),
    "segfaults": ("import ctypes; ctypes.string_at(0)", ["", ""]),
    "recurses": ("def f(): f()\nf()", ["", ""]),
    "reads a null byte": ("print(1)\0", ["", "1"]),
    "lone surrogate": ("print('\ud800')", ["", "x"]),
}


@pytest.mark.parametrize("name", BAD)
def test_a_wrong_program_does_not_pass(passes: Any, name: str) -> None:
    begin = time.monotonic()
    assert not passes(*BAD[name])
    assert time.monotonic() - begin < 10
    assert not zombies()


def test_nothing_that_a_program_started_stays(passes: Any, tmp_path: Path) -> None:
    """Three daemons of their own session, and forty children that stop after half a minute by themselves."""
    mark = f"mark-{os.getpid()}-{tmp_path.name}"
    daemons = "import os, sys\nfor _ in range(3):\n  if os.fork() == 0:\n    os.setsid()\n    os.execv(sys.executable, [sys.executable, '-c', 'import time; time.sleep(30)', MARK])\n"
    program = daemons.replace("MARK", repr(mark))
    assert passes(program + "print(1)", ["", "1"], seconds=10.0)
    gone(mark)
    bomb = f"import os, sys, time\nfor _ in range(40):\n  if os.fork() == 0:\n    os.execv(sys.executable, [sys.executable, '-c', 'import time; time.sleep(30)', {mark!r}])\ntime.sleep(30)"
    begin = time.monotonic()
    assert not passes(bomb, ["", ""], seconds=8.0)
    assert time.monotonic() - begin < 8, "more than 8 processes end it before its time"
    gone(mark)
    assert not zombies()


def test_a_program_inherits_no_secret_and_no_descriptor(passes: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_TOKEN", "a secret")
    with (tmp_path / "open").open("w") as file:
        os.set_inheritable(file.fileno(), True)
        assert passes("import os; print('HF_TOKEN' in os.environ, 'PYTHONPATH' in os.environ)", ["", "False False"], seconds=10.0)
        look = "import os\nfor d in range(5, 256):\n  try: os.fstat(d); print(d)\n  except OSError: pass"
        assert passes(look, ["", ""], seconds=10.0)
    assert passes("import os; print(os.path.basename(os.getcwd())[:13], os.listdir())", ["", "tilt-program- ['answer.py']"], seconds=10.0)
    assert not list(Path(programs.tempfile.gettempdir()).glob("tilt-program-*/answer.py"))


def test_apart_there_is_no_network_no_other_process_and_nothing_to_write(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    room = programs.room()
    if not (room.offline and room.read_only):
        pytest.skip("this system allows no namespaces")
    listening = socket.create_server(("127.0.0.1", 0))
    call = f"import socket; socket.create_connection(('127.0.0.1', {listening.getsockname()[1]}), 2); print('there')"
    assert not answers.passes(call, ["", "there"], LIMITS)
    listening.close()
    (tmp_path / "kept").write_text("x")
    assert not answers.passes(f"import os; os.remove({str(tmp_path / 'kept')!r}); print(1)", ["", "1"], LIMITS)
    assert not answers.passes(f"open({str(tmp_path / 'new')!r}, 'w'); print(1)", ["", "1"], LIMITS)
    assert sorted(f.name for f in tmp_path.iterdir()) == ["kept"]
    assert answers.passes(f"import os\ntry: os.kill({os.getpid()}, 0)\nexcept ProcessLookupError: print(1)", ["", "1"], LIMITS)
    assert answers.passes("print([l for l in open('/proc/self/status') if l.startswith('CapEff')][0].split()[1])", ["", "0" * 16], LIMITS)
    monkeypatch.setattr(answers, "ROOM", BARE)
    assert answers.passes(f"import os; os.remove({str(tmp_path / 'kept')!r}); print(1)", ["", "1"], LIMITS), (
        "bare it could: the notes say so"
    )


def test_the_room_is_what_is_left_to_try(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without namespaces the run says what programs can do; with all, that they cannot."""
    reward = Programs(Code(), None)  # type: ignore[arg-type]
    for told, said in (
        ({"offline": True, "read_only": True}, "no network"),
        ({"offline": True}, "can write this user's files"),
        ({}, "can reach the network and write"),
    ):
        reward.crew = type("Told", (), {"told": told})()  # type: ignore[assignment]
        assert said in reward.note


# --- as a reward ---------------------------------------------------------------------------------------------------------------

TESTS = [{"input": "2\n", "output": "4"}, {"input": "3\n", "output": "9"}, "assert True", "assert square(4) == 16"]
RIGHT = "Like this:\n```python\ndef square(x):\n    return x * x\nif __name__ == '__main__':\n    print(square(int(input())))\n```\n"
HALF = "```python\ndef square(x):\n    return 16\nif __name__ == '__main__':\n    print(4)\n```"


def batch(rows: list[tuple[str, Any]]) -> tuple[list[Rollout], list[Text]]:
    own = [
        Rollout(Prompt((1,), i, {"tests": tests}), (3,), (True,), (0.0,), "stop", Sampling(), seed=(0, 0, i, 0))
        for i, (_, tests) in enumerate(rows)
    ]
    return own, [Text("square it", text) for text, _ in rows]


@pytest.fixture
def scorer() -> Iterator[Any]:
    made: list[Scorer] = []

    def build_one(reward: Any) -> Scorer:
        made.append(build(reward))
        return made[-1]

    yield build_one
    for each in made:
        each.close()
    gone(answers.__file__)
    assert not zombies()


def test_the_share_of_the_tests_or_all_or_nothing(scorer: Any) -> None:
    rows = [(RIGHT, TESTS), (HALF, json.dumps(TESTS)), ("I cannot.", TESTS), ("", TESTS), (RIGHT, None), (RIGHT, TESTS[:1])]
    share = scorer({"code": {"seconds": 20.0}})(*batch(rows))
    assert share.total.tolist() == [1.0, 0.75, 0.0, 0.0, 0.0, 1.0] and share.scored.tolist() == [True] * 4 + [False, True]
    assert list(share.parts) == ["code"]
    one = scorer({"code": {"seconds": 20.0, "every": True, "workers": 2, "overlap": True}})
    rollouts, texts = batch(rows)
    one.begin(rollouts[:1], texts[:1])
    assert one(rollouts, texts).total.tolist() == [1.0, 0.0, 0.0, 0.0, 0.0, 1.0]


def test_hostile_answers_cost_their_own_score_only(scorer: Any) -> None:
    hostile = [
        "while True: pass",
        "import os\nos.kill(os.getppid(), 9)",
        "import os\nos.killpg(0, 9)",
        "print('y' * 10**8)",
        "bytearray(10 << 30)",
    ]
    told = scorer({"code": {"seconds": 3.0, "program": "whole"}})
    test = [{"input": "", "output": "1"}]
    rewards = told(*batch([*((text, test) for text in hostile), ("print(1)", test)]))
    assert rewards.total.tolist() == [0.0] * 5 + [1.0] and rewards.scored.all() and not sum(told.report.failures.values())


def test_columns_and_settings_are_checked(scorer: Any) -> None:
    one = scorer({"code": {"tests": "checks"}})
    with pytest.raises(UsageError, match="needs the column 'checks'"):
        one(*batch([(RIGHT, TESTS)]))
    with pytest.raises(DataError, match="holds no tests for sample 0"):
        scorer("code")(*batch([(RIGHT, [])]))
    for reward, said in (
        ({"code": {"seconds": 0.0}}, "code.seconds` is 0.0"), ({"code": {"memory": 8}}, "in which Python does not start"), ({"code": {"workers": 0}}, "code.workers` is 0"),
        ({"code": {}, "timeout": 3}, "`reward.timeout` is about functions"), ({"code": {"program": "some"}}, "program"), ({"code": {"sconds": 1}}, "did you mean `seconds`"),
    ):  # fmt: skip
        with pytest.raises(UsageError) as error:
            parse(reward)
        assert said in str(error.value)


def test_the_time_of_a_call_is_that_of_its_programs() -> None:
    """No common clock that many tests would exceed: 30 s, and for each test its seconds and one more."""
    asked: list[float] = []

    class Crew:
        def __call__(self, arguments: Any, seconds: float) -> list[float]:
            asked.append(seconds)
            assert arguments["limits"] == {"seconds": 5.0, "memory": 512 << 20, "processes": 16, "file_size": 16 << 20, "output": 64 << 10}
            return [1.0] * len(arguments["completions"])

    Programs(Code(), Crew())({"prompts": ["p"] * 2, "completions": ["a", "b"], "tests": [["assert 1"] * 10, None]})  # type: ignore[arg-type]
    assert asked == [90.0]
