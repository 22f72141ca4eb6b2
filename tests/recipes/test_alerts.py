"""Alerts: each comes when its limit is passed for long enough, once, and not before; a run that is told to stop at one stops with a checkpoint."""

from __future__ import annotations

import pytest

from tilt.errors import TiltError
from tilt.recipes.alerts import AGAIN, Alerts, Watcher
from tilt.recipes.taking_up import Start
from tilt.runs import checkpoints

HEALTHY = {
    "grad_norm": 1.0, "kl": 1.0, "length/mean": 20.0, "groups/zero_variance": 0.5, "entropy": 2.0, "length/truncated": 0.1, "sampler/probability_gap_mean": 1e-6,
}  # fmt: skip
SICK = {
    "kl": {"kl": 21.0}, "flat": {"groups/zero_variance": 1.0}, "entropy": {"entropy": 0.09}, "truncation": {"length/truncated": 0.51},
    "length": {"length/mean": 61.0}, "drift": {"sampler/probability_gap_mean": 0.021},
}  # fmt: skip
JUST = {
    "kl": {"kl": 20.0}, "flat": {"groups/zero_variance": 0.999}, "entropy": {"entropy": 0.101}, "truncation": {"length/truncated": 0.5},
    "length": {"length/mean": 60.0}, "drift": {"sampler/probability_gap_mean": 0.02}, "spike": {"grad_norm": 10.0},
}  # fmt: skip


def watcher(**limits: object) -> Watcher:
    found = Watcher(Alerts.model_validate(limits))
    for _ in range(10):
        assert found.see(HEALTHY) == {}
    return found


@pytest.mark.parametrize("name", SICK)
def test_three_unhealthy_steps_in_a_row_are_an_alert_once(name: str) -> None:
    found = watcher()
    said = [found.see(HEALTHY | SICK[name]) for _ in range(3 + AGAIN)]
    assert [list(each) for each in said] == [[], [], [name], *[[]] * (AGAIN - 1), [name]]
    assert "healthy" in said[2][name]


@pytest.mark.parametrize("name", SICK)
def test_a_healthy_step_in_between_begins_the_count_anew(name: str) -> None:
    found = watcher()
    for metrics in (SICK[name], SICK[name], {}, SICK[name], SICK[name]):
        assert found.see(HEALTHY | metrics) == {}


@pytest.mark.parametrize("name", JUST)
def test_at_the_limit_there_is_no_alert(name: str) -> None:
    found = watcher()
    assert not any(found.see(HEALTHY | JUST[name]) for _ in range(5))


def test_one_spike_is_enough() -> None:
    found = watcher()
    assert list(found.see(HEALTHY | {"grad_norm": 10.1})) == ["spike"] and found.see(HEALTHY) == {}


def test_a_run_that_is_to_stop_at_an_alert_stops_with_a_checkpoint_and_goes_on_when_it_need_not(run_rl, tmp_path) -> None:  # type: ignore[no-untyped-def]
    settings = {"name": "cut", "steps": 6, "sampling": {"max_tokens": 1}, "save_every": 100}
    with pytest.raises(TiltError, match=r"stopped after step 1 by the alert `truncation`"):
        run_rl(**settings, alerts={"patience": 2, "stop": ["truncation"]})
    run = tmp_path / "runs" / "cut"
    assert checkpoints.saved(run / "checkpoints") == [2] and "alert      truncation, step 1" in (run / "log.txt").read_text()
    assert run_rl(**settings, start=Start(resume=True)).checkpoint.name == "step_000006"
