"""Trackers: what they get, that a step never waits for them, and that one that fails or is absent is a sentence."""

from __future__ import annotations

import sys
import threading
import time

import pytest

from tilt.errors import UsageError
from tilt.runs import trackers
from tilt.runs.trackers import Trackers, check, flat


class Fake:
    """A module with the calls of Trackio and W&B."""

    def __init__(self, fail: str = "", hold: threading.Event | None = None) -> None:
        self.calls: list[tuple[object, ...]] = []
        self.fail, self.hold = fail, hold

    def _call(self, name, *given):
        if self.hold is not None and name == "log":
            self.hold.wait()
        if name == self.fail:
            raise SystemExit("token=hf_abcdefghijklmnopqrstuvwxyz1234567890")
        self.calls.append((name, *given))

    def init(self, **how):
        self._call("init", how)

    def log(self, row, step):
        self._call("log", step, row)

    def finish(self):
        self._call("finish")


@pytest.fixture
def fake(monkeypatch):
    def use(**how):
        module = Fake(**how)
        monkeypatch.setitem(sys.modules, "trackio", module)
        monkeypatch.setattr(trackers, "check", lambda names: None)
        return module

    return use


def test_a_tracker_gets_settings_and_rows_and_its_end(fake, tmp_path):
    module, notes = fake(), []
    tracked = Trackers(
        ["trackio"], tmp_path / "run", {"lr": 1e-3, "hub": {"token": "hf_abcdefghijklmnopqrstuvwxyz1234567890"}}, notes.append
    )
    tracked.log(0, {"loss": 1.0, "bad": float("nan"), "text": "x"})
    tracked.log(1, {"loss": 0.5})
    tracked.close()
    (kind, how), *rows = module.calls
    assert (
        kind == "init"
        and how["name"] == "run"
        and how["project"] == "tilt"
        and how["config"]["lr"] == 1e-3
        and "abcdefghij" not in how["config"]["hub.token"]
    )
    assert rows == [("log", 0, {"loss": 1.0}), ("log", 1, {"loss": 0.5}), ("finish",)] and notes == []


@pytest.mark.parametrize("fail", ["init", "log", "finish"])
def test_a_tracker_that_fails_is_one_line_and_the_run_goes_on(fake, tmp_path, fail):
    fake(fail=fail)
    notes: list[str] = []
    tracked = Trackers(["trackio"], tmp_path, {}, notes.append)
    for step in range(5):
        tracked.log(step, {"loss": 1.0})
    tracked.close()
    assert len(notes) == 1 and "trackio failed and is left out: SystemExit" in notes[0] and "abcdefghij" not in notes[0]


def test_a_slow_tracker_holds_no_step_up(fake, tmp_path, monkeypatch):
    hold = threading.Event()
    fake(hold=hold)
    monkeypatch.setattr(trackers, "WAITING", 3)
    monkeypatch.setattr(trackers, "PATIENCE", 0.2)
    notes: list[str] = []
    tracked = Trackers(["trackio"], tmp_path, {}, notes.append)
    began = time.perf_counter()
    for step in range(50):
        tracked.log(step, {"loss": 1.0})
    assert time.perf_counter() - began < 1 and tracked.dropped >= 45
    tracked.close()
    hold.set()
    assert any("rows were left out" in note for note in notes)


def test_a_tracker_that_is_not_installed_is_refused(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UsageError, match="pip install wandb"):
        check(["wandb"])
    check([])


def test_settings_become_dotted_names():
    assert flat({"a": {"b": 1, "c": {"d": None}}, "e": "x"}) == {"a.b": 1, "a.c.d": None, "e": "x"}


def test_tensorboard_writes_event_files(tmp_path):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    notes: list[str] = []
    tracked = Trackers(["tensorboard"], tmp_path, {"lr": 1}, notes.append)
    tracked.log(0, {"loss": 1.0})
    tracked.close()
    assert not notes and list((tmp_path / "tensorboard").glob("events*"))
