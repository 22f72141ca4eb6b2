"""Bad input, each through the command line: one screen that names what, where and the mend; its exit code; nothing trained, no run directory left."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tilt.cli.main import main
from tilt.data.tokenizers import characters
from tilt.models import loading, saving

SCREEN = 24
MODEL = ["model.width=16", "model.layers=1", "model.heads=2", "model.vocabulary=280", "model.context=64", "threads=1"]
REWARDS = """
def fine(completions): return [0.0] * len(completions)
def varied(completions): return [float(i) for i in range(len(completions))]
def raises(completions): raise KeyError("gold")
def short(completions): return [0.0]
def nan(completions): return [float("nan")] * len(completions)
def text(completions): return ["1.0"] * len(completions)
def scalar(completions): return 1.0
def asks(completions, gold): return [0.0] * len(completions)
"""

NAN = """
from dataclasses import dataclass, replace
from tilt.objectives import ALGORITHMS

@dataclass(frozen=True)
class Bad:
    def __call__(self, ratio, logprobs, advantages):
        return ratio * float("nan")

ROW = replace(ALGORITHMS["grpo"], surrogate=Bad())
"""


def long_text(seed: int) -> str:
    return "".join(random.Random(seed).choices("abcdefghijklmnopqrstuvwxyz", k=300))


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working directory with good and bad files."""
    rows = {
        "sft": [{"prompt": f"{i}+1=", "completion": f"{i + 1}"} for i in range(40)],
        "pairs": [{"prompt": f"{i}?", "chosen": "yes", "rejected": "no"} for i in range(40)],
        "text": [{"text": f"line {i}"} for i in range(40)],
        "talk": [{"messages": [{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": "yes"}]} for i in range(40)],
        "long": [{"prompt": long_text(i) if i % 2 else f"{i}?", "completion": "y"} for i in range(40)],
        "longest": [{"prompt": long_text(i), "completion": "y"} for i in range(40)],
        "steps": [{"prompt": f"{i}?", "steps": ["a", "b"], "labels": [True, False][: 2 - i]} for i in range(2)],
        "few": [{"prompt": f"{i}", "completion": "y"} for i in range(3)],
        "other": [{"question": f"{i}?", "reply": "yes"} for i in range(40)],
    }
    for name, found in rows.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found))
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "blank.jsonl").write_text("\n \n")
    (tmp_path / "broken.jsonl").write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "a", "completion"\n')
    (tmp_path / "rewards.py").write_text(REWARDS)
    (tmp_path / "variant.py").write_text("from tilt.objectives import ALGORITHMS\nROW = ALGORITHMS['grpo']\nNUMBER = 3\n")
    (tmp_path / "wrong.py").write_text("a = 1\nb = a / 0\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("TILT_DATA", raising=False)
    monkeypatch.setenv("TILT_CACHE", str(tmp_path / "cache"))
    threads = torch.get_num_threads()
    yield tmp_path
    torch.set_num_threads(threads)


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str], place: Path) -> Callable[..., str]:
    """Run `tilt`; it must end with this code, one screen on stderr that holds every part, and leave no run directory."""

    def check(words: list[str], code: int, *parts: str) -> str:
        found = main(words)
        shown = capsys.readouterr()
        assert found == code, shown.err
        assert len(shown.err.splitlines()) <= SCREEN and shown.err.startswith("error: ")
        assert "Traceback" not in shown.err and "not a known kind of mistake" not in shown.err
        missing = [part for part in parts if part not in shown.err]
        assert not missing, f"{missing} not in:\n{shown.err}"
        assert not list(place.rglob("env.json")) and not list(place.glob("runs/*")), "a run directory was left"
        return shown.err

    return check


def sft(data: str, *more: str) -> list[str]:
    return ["sft", *MODEL, f"data={data}", "steps=1", *more]


def rl(*more: str, data: str = "sft.jsonl", reward: str = "rewards.py:fine") -> list[str]:
    given = dict(word.split("=", 1) for word in more)
    own = {"steps": "1", "prompts": "4", "samples": "2", "sampling.max_tokens": "3", "reward": reward, "data": data}
    return ["rl", *MODEL, *(f"{key}={value}" for key, value in (own | given).items())]


# ------------------------------------------------------------------------------------------------ files and columns


@pytest.mark.parametrize("words, parts", [
    (sft("nowhere.jsonl"), ["no such file: nowhere.jsonl"]),
    (sft("stf.jsonl"), ["no such file: stf.jsonl", "sft.jsonl"]),
    (sft("no/folder/x.jsonl"), ["the folder no does not exist"]),
    (sft("empty.jsonl"), ["empty.jsonl is empty"]),
    (sft("blank.jsonl"), ["blank.jsonl is empty"]),
    (sft("broken.jsonl"), ["broken.jsonl: broken JSON at line 2", "^"]),
    (sft("other.jsonl"), ["other.jsonl cannot be read as sft: missing prompt, completion", "columns found: question, reply", "columns: {prompt: question, completion: reply}"]),
    (["rm", *MODEL, "data=sft.jsonl"], ["cannot be read as preference: missing chosen, rejected", "columns found: prompt, completion"]),
    (["dpo", *MODEL, "data=text.jsonl"], ["cannot be read as preference"]),
    (["prm", *MODEL, "data=sft.jsonl"], ["cannot be read as stepwise: missing steps, labels", "columns that serve: prompt, steps, labels; prompt, completions, labels"]),
    (["prm", *MODEL, "data=steps.jsonl"], ["steps.jsonl: row 1: 'labels' must hold one label for each of the 2 steps, got 1 of them"]),
    (["pretrain", *MODEL, "data=pairs.jsonl"], ["cannot be read as text: missing text"]),
    (rl(data="text.jsonl"), ["cannot be read as prompt: missing prompt", "columns found: text"]),
    (sft("sft.jsonl", "data.columns={prompt: qestion}"), ["no column 'qestion'", "it has: prompt, completion"]),
    (sft("rasbt-instruct"), ["rasbt-instruct", "not on this machine", "tilt data get rasbt-instruct", "TILT_DATA"]),
    (sft("rasbt-instrct"), ["no data set is called 'rasbt-instrct'", "did you mean 'rasbt-instruct'?"]),
    (sft("sft.jsonl", "data.held_out=0.999"), ["sft.jsonl: a split of 40 rows", "leaves an empty part", "data.held_out", "0 holds nothing out"]),
])  # fmt: skip
def test_data(refused: Callable[..., str], words: list[str], parts: list[str]) -> None:
    refused(words, 3, *parts)


def test_a_prompt_longer_than_the_context_is_counted_and_the_policy_stated(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(sft("long.jsonl", "name=a")) == 0
    assert "prompts longer than 32 tokens (left out)" in (shown := capsys.readouterr().out) and "rows left out" in shown
    assert main(sft("long.jsonl", "name=b", "data.over_length=truncate")) == 0
    assert "prompts longer than 32 tokens (cut)" in capsys.readouterr().out
    assert main(sft("long.jsonl", "name=c", "--dry-run")) == 0
    assert "prompts longer than 32 tokens (left out)" in capsys.readouterr().out


def test_no_prompt_fits(refused: Callable[..., str]) -> None:
    refused(sft("longest.jsonl"), 3, "rows fits", "longer than 32 tokens (left out)", "max_prompt_tokens", "over_length: truncate")
    refused(rl(data="longest.jsonl"), 3, "rows fits", "over_length: truncate")


def test_not_enough_rows_for_a_batch(refused: Callable[..., str]) -> None:
    refused(rl("prompts=37"), 2, "prompts 37", "training prompts", "set prompts to at most that")
    refused(rl("prompts=8", "data={source: few.jsonl, held_out: 0}"), 2, "prompts 8", "set prompts to at most")


# ------------------------------------------------------------------------------------------------ settings


def test_unknown_keys_name_the_nearest_with_file_and_line(refused: Callable[..., str], place: Path) -> None:
    (place / "a.yaml").write_text("recipe: sft\nmodel: {width: 16, heads: 2}\ndata: sft.jsonl\noptimizer:\n  learning_rat: 0.1\nstepz: 3\n")
    refused(
        ["run", "a.yaml"], 2, "2 problems", "unknown key `stepz` (a.yaml:6): did you mean `steps`?", "`optimizer.learning_rat` (a.yaml:5)"
    )


def test_everything_wrong_at_once(refused: Callable[..., str], place: Path) -> None:
    (place / "a.yaml").write_text("recipe: rl\nmodel: {width: 16, heads: 3}\ndata: sft.jsonl\nreward: rewards.py:fine\nsteps: 0\n")
    shown = refused(["run", "a.yaml", "optimizer.lr=-1", "sampels=4", "lora.rank=none", "sampling.temperature=true"], 2, "6 problems")
    for part in ("width 16 is not a multiple of heads 3", "`steps` is 0 (a.yaml:5): expected ≥ 1", "`optimizer.lr` is -1", "did you mean `samples`?",
                 "`lora.rank` is 'none' (text)", "`sampling.temperature` is true"):  # fmt: skip
        assert part in shown


@pytest.mark.parametrize("words, parts", [
    (sft("sft.jsonl", "optimizer.lr=2"), ["`optimizer.lr` is 2", "expected ≤ 1"]),
    (rl("optimizer.final=0.1"), ["`optimizer`", "schedule is constant: set it to linear or cosine"]),
    (sft("sft.jsonl", "data.held_out=1.5"), ["`data.held_out` is 1.5", "expected < 1"]),
    (sft("sft.jsonl", "batch=0"), ["`batch` is 0"]),
    (sft("sft.jsonl", "seed=-1"), ["`seed` is -1"]),
    (rl("samples=1", "algorithm=grpo"), ["compares the answers to one prompt", "set samples to 2 or more"]),
    (rl("samples=1", "algorithm=rloo"), ["compares the answers to one prompt"]),
    (rl("sampling.top_k=50"), ["`sampling`", "top_k in training answers", "cannot be scored again", "Set sampling.keep_sets: true, or narrow by the temperature alone"]),
    (rl("sampling.top_p=0.9", "sampling.min_p=0.1"), ["top_p and min_p in training answers", "sampling.keep_sets: true"]),
    (rl("sampling.keep_sets=true"), ["keep_sets has no sets to keep", "set top_k, top_p or min_p"]),
    (sft("sft.jsonl", "sampling.keep_sets=true", "sampling.top_k=5", "reward=rewards.py:fine"), ["sampling.keep_sets", "nothing is trained on sampled answers"]),
    (rl("sampling.temperature=0"), ["`sampling.temperature` is 0"]),
    (rl("algorithm=gpro"), ["unknown algorithm `gpro`: did you mean `grpo`?", "tilt algorithms"]),
    (["gpro", *MODEL], ["tilt has no command `gpro`: did you mean `grpo`?"]),
    (rl("objective.surrogate.hihg=0.3"), ["`objective.surrogate.hihg`: did you mean `high`?"]),
    (rl("algorithm=reinforce", "passes=2"), ["passes"]),
    (rl("algorithm=nowhere.py:ROW"), ["no such file: nowhere.py"]),
    (rl("algorithm=variant.py:RWO"), ["variant.py has no `RWO`: did you mean `ROW`?"]),
    (rl("algorithm=variant.py:NUMBER"), ["`NUMBER` in variant.py is int, not a row of this table"]),
    (rl("algorithm=wrong.py:ROW"), ["wrong.py:2: ZeroDivisionError: division by zero"]),
    (rl("algorithm=ppo", "critic=reward_model"), ["critic reward_model", "set critic to policy, shared or auto"]),
    (["sft", "model=nowhere/model", "data=sft.jsonl"], ["model nowhere/model"]),
    (["sft", "model=./nowhere", "data=sft.jsonl"], ["model ./nowhere: there is no such folder"]),
    (["sft", "model=.", "data=sft.jsonl"], ["no config.json"]),
    (sft("sft.jsonl", "model.tokenizer=./nowhere"), ["tokenizer nowhere", "Check the name"]),
    (sft("sft.jsonl", "device=cuda"), ["device cuda: no GPU is visible"]),
    (sft("sft.jsonl", "data.template=chatlm"), ["there is no template 'chatlm'"]),
    (sft("sft.jsonl", "name=a/b"), ["`a/b` cannot name a run"]),
    (["sft", "data=sft.jsonl"], ["`model` is required"]),
    (["rl", *MODEL, "data=sft.jsonl"], ["`reward` is required"]),
    (["run", "nowhere.yaml"], ["no such file: nowhere.yaml"]),
])  # fmt: skip
def test_settings(refused: Callable[..., str], words: list[str], parts: list[str]) -> None:
    if "device=cuda" in words and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    refused(words, 2, *parts)


def test_an_existing_run_is_refused_with_three_ways_out(capsys: pytest.CaptureFixture[str], place: Path) -> None:
    assert main(sft("sft.jsonl", "name=a", "--quiet")) == 0
    before = (place / "runs/a/metrics.jsonl").read_bytes()
    for more in ([], ["--dry-run"]):
        assert main(sft("sft.jsonl", "name=a", *more)) == 2
        shown = capsys.readouterr().err
        assert "runs/a exists already, and nothing is overwritten. Three ways out:" in shown and "3. --overwrite" in shown
    assert (place / "runs/a/metrics.jsonl").read_bytes() == before and [p.name for p in (place / "runs").iterdir()] == ["a"]


# ------------------------------------------------------------------------------------------------ models and tokenizers


def saved(place: Path, *, template: bool = True, change: Callable[[Any], None] = lambda words: None) -> str:
    """A tiny checkpoint in `place`."""
    words = characters("0123456789+=? abcdefghijklmnopqrstuvwxyz")
    if not template:
        words.chat_template = None
    lm = loading.tiny(vocabulary=len(words) + 4, width=16, layers=1, heads=2, context=64)
    place.mkdir()
    saving.save(lm, words, place)
    change(words)
    words.save_pretrained(place)
    return f"model={place}"


def test_a_base_model_without_a_template_on_conversations(refused: Callable[..., str], place: Path) -> None:
    model = saved(place / "base", template=False)
    parts = ["conversations", "no chat template (a base model?)", "template: tilt", "template: chatml", "template: plain"]
    refused(["sft", model, "data=talk.jsonl", "steps=1"], 2, *parts)
    assert main(["sft", model, "data={source: talk.jsonl, template: plain, max_tokens: 8}", "steps=1", "--quiet"]) == 0


def test_no_end_token(refused: Callable[..., str], place: Path) -> None:
    def without(words: Any) -> None:
        words.eos_token = None

    refused(
        ["sft", saved(place / "m", template=False, change=without), "data=sft.jsonl", "steps=1"], 2, "no end token (eos_token)", "set one"
    )


def test_padding_that_is_the_end_token_is_told_apart(place: Path) -> None:
    """The stop token is trained all the same, and what is saved does not confuse the two."""
    from transformers import AutoTokenizer

    def same(words: Any) -> None:
        words.pad_token = words.eos_token

    assert main(["sft", saved(place / "m", change=same), "data=sft.jsonl", "steps=1", "name=a", "--quiet"]) == 0
    words = AutoTokenizer.from_pretrained(place / "runs/a/checkpoints/step_000001")
    assert words.pad_token_id != words.eos_token_id


def test_a_checkpoint_without_a_language_model(refused: Callable[..., str], place: Path) -> None:
    assert main(["rm", *MODEL, "data=pairs.jsonl", "steps=1", "name=rm", "root=elsewhere", "--quiet"]) == 0
    (place / "elsewhere/rm/env.json").unlink()
    refused(
        ["sft", "model=elsewhere/rm/checkpoints/step_000001", "data=sft.jsonl"],
        2,
        "lacks weights of a causal LM",
        "Give a causal language model",
    )
    model = saved(place / "lm")
    refused(rl(reward=f"{{model: {model.removeprefix('model=')}}}"), 2, "reward model", "tilt rm")


# ------------------------------------------------------------------------------------------------ rewards


@pytest.mark.parametrize("reward, code, parts", [
    ("rewards.py:raises", 3, ["the reward raises: raised KeyError", "rewards.py, line 4", "on_error"]),
    ("rewards.py:short", 3, ["the reward short returned 1 values; expected a list with one number or None for each of the 4 completions", "sample 0: prompt"]),
    ("rewards.py:nan", 3, ["the reward nan returned nan for sample 0; expected a finite number or None"]),
    ("rewards.py:text", 3, ["the reward text returned a value of type str", "for sample 0"]),
    ("rewards.py:scalar", 3, ["the reward scalar returned float"]),
    ("rewards.py:asks", 2, ["the reward asks asks for gold; there are: ", "completion", "columns:"]),
    ("rewards.py:fin", 2, ["rewards.py has no function 'fin'; it has: fine"]),
    ("reward.py:fine", 2, ["there is no reward file"]),
    ("wrong.py:fine", 2, ["cannot be loaded: ZeroDivisionError", "wrong.py, line 2"]),
    ("fine", 2, ["does not name a reward function: write file.py:func"]),
    ("{numerc: {answer: x}}", 2, ["unknown key `reward.numerc`: did you mean `numeric`?"]),
    ("{numeric: {answer: gold}}", 2, ["needs the column 'gold'; the data has: completion", "Name another one"]),
    ("{model: ./nowhere}", 2, ["model ./nowhere: there is no such folder"]),
    ("[]", 2, ["`reward` is an empty list"]),
])  # fmt: skip
def test_rewards(refused: Callable[..., str], reward: str, code: int, parts: list[str]) -> None:
    refused(rl(reward=reward), code, *parts)
    refused([*rl(reward=reward), "--dry-run"], code, *parts)


def test_a_measure_is_rehearsed_too(refused: Callable[..., str]) -> None:
    refused(rl("measure=rewards.py:nan"), 3, "the reward nan returned nan")


# ------------------------------------------------------------------------------------------------ numbers


def test_a_loss_that_is_not_a_number_stops_and_keeps_the_batch(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A surrogate that gives NaN: the run stops at its first step, names the term, and keeps the micro-batch on disk."""
    (place / "bad.py").write_text(NAN)
    assert main([*rl("algorithm=bad.py:ROW", "name=a", reward="rewards.py:varied"), "--quiet"]) == 4
    shown = capsys.readouterr().err
    assert "step 0: the loss is not finite; the update was not applied" in shown and len(shown.splitlines()) <= SCREEN
    assert "runs/a/bad_batch_step_000000.pt" in shown and torch.load(place / "runs/a/bad_batch_step_000000.pt")["term"] == "the loss"


# ------------------------------------------------------------------------------------------------ the process


@pytest.mark.parametrize("words, code", [(sft("sft.jsonl", "stepz=1"), 2), (sft("nowhere.jsonl"), 3)])
def test_exit_codes_of_the_process(words: list[str], code: int) -> None:
    found = subprocess.run([sys.executable, "-m", "tilt.cli.main", *words], capture_output=True, text=True, check=False)
    assert found.returncode == code and found.stderr.startswith("error: ") and found.stdout == ""
