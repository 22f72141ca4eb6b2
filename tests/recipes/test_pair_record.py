"""Batches of judged answers that a run stores: both answers of a pair side by side, with what the step asked of each token."""

from __future__ import annotations

import math

import pytest
import torch

from tilt.runs import rollout_store


def rows_of(result, step):
    return rollout_store.read(rollout_store.path_of(result.directory.rollouts, step))


def test_dpo_stores_pairs_with_the_push_of_every_token(run_dpo, metrics):
    result = run_dpo(steps=12, batch=16, optimizer={"lr": 1e-2}, rollouts_every=5)
    assert rollout_store.stored(result.directory.rollouts) == [0, 5, 10, 11]
    for step in (0, 10):
        rows = rows_of(result, step)
        assert len(rows) == 32 and [row["role"] for row in rows] == ["chosen", "rejected"] * 16
        assert [row["group_id"] for row in rows] == [i // 2 for i in range(32)]
        gaps = []
        for chosen, rejected in zip(rows[::2], rows[1::2], strict=True):
            assert chosen["prompt"] == rejected["prompt"] and chosen["completion"] != rejected["completion"]
            for row in (chosen, rejected):
                assert row["reward"] == pytest.approx(0.1 * sum(row["delta_ref"]), abs=2e-3)
                assert all(math.isfinite(x) for x in row["push"]) and len({round(x, 6) for x in row["push"]}) == 1
            gaps.append(chosen["reward"] - rejected["reward"])
            asked = 0.1 / (1 + math.exp(gaps[-1])) / 16
            assert chosen["push"][0] == pytest.approx(asked, rel=4e-3) and rejected["push"][0] == pytest.approx(-asked, rel=4e-3)
        logged = next(line for line in metrics(result) if line["step"] == step)
        assert logged["margin"] == pytest.approx(sum(gaps) / 16, abs=2e-3)


def test_a_reward_model_stores_the_score_along_each_answer_and_its_push(run_rm, metrics):
    result = run_rm(steps=11, batch=16, optimizer={"lr": 1e-2}, span=0.5)
    rows = rows_of(result, 10)
    assert rollout_store.stored(result.directory.rollouts) == [0, 10] and len(rows) == 32
    for row in rows:
        assert row["reward"] == pytest.approx(row["value"][-1], rel=2e-3, abs=2e-3) and len(row["value"]) == len(row["ids"])
    pushes = torch.tensor([row["push_score"] for row in rows]).view(16, 2)
    assert (pushes[:, 0] > 0).all() and torch.allclose(pushes[:, 0], -pushes[:, 1], atol=1e-6)


@pytest.mark.parametrize("run", ["run_rm", "run_dpo"])
def test_storing_changes_no_bit_of_training(request, metrics, run):
    train = request.getfixturevalue(run)
    kept = [
        [
            {k: v for k, v in line.items() if k not in ("time", "tokens_per_second")}
            for line in metrics(train(steps=6, rollouts_every=every))
        ]
        for every in (0, 1)
    ]
    assert kept[0] == kept[1]


def test_a_tracker_changes_no_bit_of_training(run_dpo, metrics, monkeypatch):
    import sys

    from tilt.runs import trackers

    rows = []

    class Fake:
        init = staticmethod(lambda **how: None)
        log = staticmethod(lambda row, step: rows.append((step, row)))
        finish = staticmethod(lambda: None)

    monkeypatch.setitem(sys.modules, "trackio", Fake)
    monkeypatch.setitem(trackers.NEEDS, "trackio", ("json", "json"))
    kept = [
        [{k: v for k, v in line.items() if k not in ("time", "tokens_per_second")} for line in metrics(run_dpo(steps=4, **more))]
        for more in ({}, {"track": "trackio"})
    ]
    assert kept[0] == kept[1] and [step for step, _ in rows][:4] == [0, 1, 2, 3] and rows[0][1]["loss"] == pytest.approx(kept[0][0]["loss"])
