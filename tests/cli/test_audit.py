"""`tilt audit`: what it accepts, its exit codes, its JSON."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tilt.cli import audit as page
from tilt.cli.main import main
from tilt.objectives import ALGORITHMS, PREFERENCES

FLIPPED = """
from dataclasses import dataclass
from tilt.objectives import ALGORITHMS, Objective
from dataclasses import replace

@dataclass(frozen=True)
class Flipped:
    passes = 1
    def __call__(self, ratio, logprobs, advantages):
        return -logprobs * advantages

MINE = replace(ALGORITHMS["rloo"], surrogate=Flipped())
"""


def test_a_sound_row_exits_with_0(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["audit", "rloo"]) == 0
    out = capsys.readouterr().out
    assert "grad J; J = E[R] - 0.05 KL(policy || reference)" in out and "verdict: sound: it raises J" in out and "FAILED" not in out


def test_slots_can_be_changed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["audit", "rloo", "credit.centre=mean", "credit.kl=0", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["statement"] == "(1 - 1/G) grad J; J = E[R]" and told["sound"] is True and told["mistakes"] == []
    assert {check["name"] for check in told["checks"]} >= {"stop token", "baseline"} and 0 < told["seconds"] < 60


def test_a_row_of_ones_own_with_a_mistake_exits_with_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine.py").write_text(FLIPPED)
    assert main(["audit", f"{tmp_path / 'mine.py'}:MINE"]) == 1
    out = capsys.readouterr().out
    assert "MISTAKE: sign flipped" in out and "verdict: do not train with it: sign flipped" in out


@pytest.mark.parametrize(
    "text",
    [
        "recipe: rl\nalgorithm: rloo\nobjective: {credit: {kl: 0.2}}\nmodel: m\ndata: d.jsonl\nreward: exact\n",
        "recipe: rloo\nobjective: {credit: {kl: 0.2}}\n",
        "recipe: rlhf\nrl: {algorithm: rloo, objective: {credit: {kl: 0.2}}}\n",
    ],
)
def test_a_recipe_is_audited_with_its_own_numbers(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "r.yaml").write_text(text)
    assert main(["audit", str(tmp_path / "r.yaml")]) == 0
    assert "grad J; J = E[R] - 0.2 KL(policy || reference)" in capsys.readouterr().out


def test_what_cannot_be_audited_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text.yaml").write_text("recipe: pretrain\nmodel: m\n")
    for words, said in (
        ([], "tilt audit --all"),
        (["grpo", "--all"], "tilt audit --all"),
        (["gropo"], "grpo"),
        ([str(tmp_path / "text.yaml")], "names no algorithm"),
        (["rloo", "credit.cl=1"], "kl"),
    ):
        assert main(["audit", *words]) == 2
        assert said in capsys.readouterr().err


def test_all_rows_in_one_table(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(page, "ALGORITHMS", {name: ALGORITHMS[name] for name in ("reinforce", "rloo")})
    monkeypatch.setattr(page, "PREFERENCES", {name: PREFERENCES[name] for name in ("dpo", "kto")})
    assert main(["audit", "--all"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines if line[:1].strip()] == ["row", "reinforce", "rloo", "row", "dpo", "kto"]
    assert main(["audit", "--all", "--json"]) == 0
    assert [one["name"] for one in json.loads(capsys.readouterr().out)] == ["reinforce", "rloo", "dpo", "kto"]


def test_a_row_on_judged_answers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["audit", "dpo", "margin.beta=0.3"]) == 0
    out = capsys.readouterr().out
    assert "stationary at the tilted policy, reference * exp(reward / 0.3) / Z" in out and "verdict: sound" in out
    text = "from dataclasses import replace\nfrom tilt.objectives import PREFERENCES, Logistic\nMINE = replace(PREFERENCES['dpo'], link=Logistic(1.0))\n"
    (tmp_path / "mine.py").write_text(text)
    assert main(["audit", f"{tmp_path / 'mine.py'}:MINE", "--json"]) == 1
    assert [one["mistake"] for one in json.loads(capsys.readouterr().out)["mistakes"]] == ["sign flipped"]


def test_a_preset_with_a_known_fault_shows_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["audit", "grpo_trl_fork"]) == 1
    assert "MISTAKE: it trains on rounding noise" in capsys.readouterr().out
