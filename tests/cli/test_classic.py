"""`tilt classic`: planning, learning and control from the command line; saved agents are judged alike; bad input is one screen."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tilt.cli.main import main

QUICK = ["steps=400", "length=20", "hidden=[8]", "batch=0"]


def test_value_iteration_shows_values_actions_and_a_walk(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["classic", "frozenlake", "--method", "value-iteration", "--root", str(tmp_path), "--name", "vi", "discount=0.95"]) == 0
    text = capsys.readouterr().out
    assert "discounted: 0.180472" in text and "undiscounted within 100 steps: 0.729766" in text
    assert "↑" in text and "·" in text and "one episode, which" in text
    assert main(["classic", "eval", str(tmp_path / "vi")]) == 0
    again = capsys.readouterr().out
    assert "value-iteration on FrozenLake-v1" in again and "0.180472" in again


def test_q_learning_finds_the_short_path_along_the_cliff(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["classic", "CliffWalking-v1", "--method", "q-learning", "--root", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert "which ended after 13 steps and earned -13" in text


@pytest.mark.parametrize("method", ["policy-iteration", "sarsa", "expected-sarsa", "double-q"])
def test_other_tables(method: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    few = [] if method == "policy-iteration" else ["episodes=30"]
    assert main(["classic", "SuttonBarto-5x5", "--method", method, "--root", str(tmp_path), *few]) == 0
    assert "one episode" in capsys.readouterr().out


def test_control_trains_saves_and_judges_alike(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["classic", "CartPole-v1", "--method", "ppo", "--root", str(tmp_path), "--name", "a", "--episodes", "5"]
    assert main([*words, *QUICK, "seed=3", "surrogate.high=0.1"]) == 0
    text = capsys.readouterr().out
    assert "steps/s" in text and "5 episodes with the likeliest actions" in text and "return of an episode while learning" in text
    told = json.loads((tmp_path / "a" / "agent.json").read_text())
    assert told["settings"]["row"]["surrogate"] == {"clip": {"low": 0.2, "high": 0.1}} and told["seed"] == 3
    assert (tmp_path / "a" / "episodes.csv").read_text().startswith("steps,return,length\n")
    judged = [line for line in text.splitlines() if "likeliest" in line]
    assert main(["classic", "eval", str(tmp_path / "a"), "--episodes", "5", "seed=3"]) == 0
    assert [line for line in capsys.readouterr().out.splitlines() if "likeliest" in line] == judged


@pytest.mark.parametrize("name", ["Pendulum-v1", "Acrobot-v1", "MountainCar-v0", "FrozenLake-v1"])
def test_an_episode_is_drawn(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["classic", name, "--method", "a2c", "--root", str(tmp_path), "--episodes", "2", "--stochastic", *QUICK]) == 0
    text = capsys.readouterr().out
    assert "one episode, which" in text and "2 episodes with the drawn actions" in text


def test_quiet_says_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["classic", "CartPole-v1", "--method", "dqn", "--root", str(tmp_path), "--quiet", "steps=200", "--episodes", "1"]) == 0
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "name an environment"),
        (["CartPole-v1"], "--method is missing"),
        (["CartPole-v1", "--method", "pppo"], "did you mean `ppo`"),
        (["CartPoll-v1", "--method", "ppo"], "did you mean `CartPole-v1`"),
        (["CartPole-v1", "--method", "q-learning"], "finite process"),
        (["Pendulum-v1", "--method", "dqn"], "continuous"),
        (["CartPole-v1", "--method", "ppo", "lrr=1"], "did you mean `lr`"),
        (["CartPole-v1", "--method", "ppo", "lr=-1"], "lr=-1"),
        (["CartPole-v1", "--method", "ppo", "surrogate.hihg=1"], "hihg"),
        (["CartPole-v1", "--method", "dqn", "surrogate.high=1"], "is a choice of a row"),
        (["CartPole-v1", "--method", "ppo", "fast"], "is no setting"),
        (["CartPole-v1", "--method", "ppo", "steps=0"], "steps=0"),
        (["CartPole-v1", "--method", "ppo", "seed=-1"], "seed=-1"),
        (["FrozenLake-v1", "--method", "value-iteration", "alpha=1"], "alpha"),
        (["Taxi-v3", "--method", "value-iteration", "slippery=true"], "no effect on Taxi-v3"),
        (["eval", "nowhere"], "no saved agent"),
        (["eval"], "name the folder"),
    ],
)
def test_bad_input_is_one_screen(words: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["classic", *words, "--root", str(tmp_path)]) in (2, 3)
    told = capsys.readouterr().err
    assert said in told and "Traceback" not in told and len(told.splitlines()) < 12
    assert not list(tmp_path.iterdir())


def test_a_run_is_not_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a").mkdir()
    assert main(["classic", "CartPole-v1", "--method", "ppo", "--root", str(tmp_path), "--name", "a"]) == 2
    assert "nothing is overwritten" in capsys.readouterr().err
