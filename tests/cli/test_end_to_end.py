"""Every recipe from the command line on a micro model: it runs, leaves what it should, runs again to the same numbers, and takes rows of your own."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tilt.cli.main import main
from tilt.objectives import ALGORITHMS
from tilt.recipes import rlhf
from tilt.runs.journal import read_metrics

MODEL = {"width": 32, "layers": 1, "heads": 2, "vocabulary": 300, "context": 64}
SHARED = ["threads=1", "log_every=1", "data.held_out=0.2", "data.max_prompt_tokens=32", "data.max_tokens=16"]
SCRATCH = [f"model={json.dumps(MODEL)}", *SHARED]
VARIANT = Path(__file__).parents[2] / "examples" / "my_variant.py"
REWARD = "def vowels(completions): return [float(sum(c in 'aeiou ' for c in text)) for text in completions]\n"
TIMES = ("time", "tokens_per_second", "eps")


@pytest.fixture(scope="module", autouse=True)
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A working directory with rows of every kind, and an SFT model to start from."""
    root = tmp_path_factory.mktemp("work")
    words = ["red", "green", "blue", "black"]
    pairs = [{"prompt": f"say {w} {i}", "chosen": f"{w}, gladly", "rejected": f"no {w}"} for i in range(15) for w in words]
    (root / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    (root / "sft.jsonl").write_text("".join(json.dumps({"prompt": r["prompt"], "completion": r["chosen"]}) + "\n" for r in pairs))
    labelled = [{"prompt": r["prompt"], "completion": r[side], "label": side == "chosen"} for r in pairs for side in ("chosen", "rejected")]
    (root / "labelled.jsonl").write_text("".join(json.dumps(row) + "\n" for row in labelled))
    ranked = [{"prompt": r["prompt"], "answers": [r["chosen"], "well", r["rejected"]]} for r in pairs]
    (root / "ranked.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ranked))
    (root / "text.jsonl").write_text("".join(json.dumps({"text": f"{r['prompt']}: {r['chosen']}"}) + "\n" for r in pairs))
    (root / "rewards.py").write_text(REWARD)
    shutil.copy(VARIANT, root / "my_variant.py")
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        assert main(["sft", *SCRATCH, "data.source=sft.jsonl", "steps=2", "name=base", "--quiet"]) == 0
        yield root
    torch.set_num_threads(threads)


BASE = ["model=runs/base/checkpoints/step_000002", *SHARED]
RL = [*BASE, "data.source=sft.jsonl", "reward=rewards.py:vowels", "steps=2", "prompts=4", "samples=2", "sampling.max_tokens=5", "rollouts_every=1", "eval.prompts=4"]  # fmt: skip


def numbers(run: Path) -> list[dict[str, Any]]:
    """The metrics of a run without its clocks."""
    return [
        {k: v for k, v in row.items() if not k.startswith(TIMES) and not k.endswith("_seconds")}
        for row in read_metrics(run / "metrics.jsonl")
    ]


def opens(folder: Path) -> None:
    """What a run saves opens with plain transformers and scores without NaN."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    words = AutoTokenizer.from_pretrained(folder)
    found = AutoModelForCausalLM.from_pretrained(folder)(torch.tensor([words("say red")["input_ids"]])).logits
    assert found.isfinite().all()


@pytest.mark.parametrize("command, words", [
    ("pretrain", [*SCRATCH, "data.source=text.jsonl", "steps=2"]),
    ("sft", [*SCRATCH, "data.source=sft.jsonl", "steps=2", "lora.rank=2"]),
    ("rm", [*BASE, "data.source=pairs.jsonl", "steps=2"]),
    ("dpo", [*BASE, "data.source=pairs.jsonl", "steps=2"]),
    ("kto", [*BASE, "data.source=labelled.jsonl", "steps=2"]),
    ("rm-deepspeed-chat", [*BASE, "data.source=ranked.jsonl", "steps=2", "batch=4"]),
    ("rl", [*RL, "algorithm=reinforce"]),
    *((name.replace("_", "-"), RL) for name in ("ppo", "grpo", "rloo", "gspo", "reinforce_pp", "dapo")),
])  # fmt: skip
def test_every_command_trains_plans_and_runs_again(place: Path, capsys: pytest.CaptureFixture[str], command: str, words: list[str]) -> None:
    """Twice two steps: the second from the first one's config.yaml, to the same numbers; before it a dry run that writes nothing."""
    before = sorted(p.name for p in (place / "runs").iterdir())
    assert main([command, *words, f"name={command}", "--dry-run"]) == 0
    shown = capsys.readouterr().out
    for line in (
        f"run        runs/{command}",
        "model      ",
        "data       ",
        "example 0  ",
        "example 1  ",
        "memory     about",
        "steps      2 of",
        "time       ",
    ):
        assert any(found.startswith(line) for found in shown.splitlines()), (line, shown)
    assert sorted(p.name for p in (place / "runs").iterdir()) == before
    if command in ("rl", "ppo"):
        assert "objective  " in shown and "unbiased for" in shown and "reward     " in shown

    assert main([command, *words, f"name={command}"]) == 0
    run = place / "runs" / command
    assert "step 2/2" in capsys.readouterr().out
    assert {p.name for p in run.iterdir()} >= {"config.yaml", "env.json", "metrics.jsonl", "log.txt", "rollouts", "checkpoints"}
    if not command.startswith("rm"):
        opens(run / "checkpoints" / "step_000002")
    assert main(["run", str(run / "config.yaml"), f"name={command}-again", "--quiet"]) == 0
    assert numbers(run) == numbers(place / "runs" / f"{command}-again") and len(numbers(run)) == 3
    assert capsys.readouterr().out == ""


def test_the_pipeline(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """SFT → reward model → RL in one directory, with another algorithm by an override, and each stage runs again from its own file."""
    stages = {
        "sft": {"steps": 2}, "reward_model": {"steps": 2}, "judge": {"steps": 1}, "pretrain": {"steps": 1},
        "rl": {"steps": 2, "prompts": 4, "samples": 2, "sampling": {"max_tokens": 5}, "eval": {"prompts": 4}},
    }  # fmt: skip
    data = {"source": "pairs.jsonl", "held_out": 0.2, "max_prompt_tokens": 32, "max_tokens": 16}
    (place / "all.yaml").write_text(yaml.safe_dump({"recipe": "rlhf", "threads": 1, "model": MODEL, "data": data, **stages}))
    assert main(["rlhf", "all.yaml", "rl.algorithm=rloo", "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert all(f"── {stage} ─" in shown for stage in stages) and "leave_one_out" not in shown.split("── rl ─")[0]
    assert "objective  rloo" in shown and not (place / "runs" / "all").exists()
    assert main(["rlhf", "all.yaml", "rl.algorithm=rloo", "name=all"]) == 0
    shown = capsys.readouterr().out
    run = place / "runs" / "all"
    for stage in stages:
        assert (run / stage / "metrics.jsonl").exists() and (run / stage / "config.yaml").read_text().startswith("recipe: ")
    assert "rloo" in (run / "rl" / "objective.txt").read_text() and "before" in (run / "report.md").read_text()
    assert main(["run", str(run / "rl" / "config.yaml"), "name=alone", "root=again", "--quiet"]) == 0
    assert numbers(run / "rl") == numbers(place / "again" / "alone")


def test_a_stage_of_the_pipeline_keeps_a_tokenizer_of_its_own() -> None:
    """The pipeline's goes with the pipeline's model; a stage that names a model of its own reads that model's, or what it names itself."""
    model = {"model": "base", "tokenizer": "words"}
    config = rlhf.Config.model_validate({**model, "data": "pairs", "reward_model": {"model": "other"}, "judge": {"tokenizer": "own"}})
    stages = {"sft": config.sft, "reward_model": config.reward_model, "judge": config.judge, "rl": config.rl}
    assert {name: rlhf.words(config, stage) for name, stage in stages.items()} == {
        "sft": "words", "reward_model": None, "judge": "own", "rl": "words",
    }  # fmt: skip


# ------------------------------------------------------------------------------------------------ a row of your own


def test_a_row_of_your_own_from_yaml_command_line_and_python(place: Path) -> None:
    """The same row three ways, to the same numbers, and on the record each time."""
    from tilt.recipes import rl

    algorithm = "my_variant.py:MINE"
    assert main(["rl", *RL, f"algorithm={algorithm}", "name=mine-cli", "--quiet"]) == 0
    config = yaml.safe_load((place / "runs/mine-cli/config.yaml").read_text())
    assert config["algorithm"] == algorithm
    (place / "mine.yaml").write_text(yaml.safe_dump(config | {"name": "mine-yaml"}))
    assert main(["run", "mine.yaml"]) == 0
    plain = {key: value for key, value in config.items() if key != "recipe"} | {"name": "mine-python"}
    rl.run(rl.Config.model_validate(plain))
    for way in ("cli", "yaml", "python"):
        run = place / "runs" / f"mine-{way}"
        assert numbers(run) == numbers(place / "runs/mine-cli")
        assert "Smooth(width=4.0)" in (run / "objective.txt").read_text() and "Smooth(width=4.0)" in (run / "log.txt").read_text()
        assert algorithm in (run / "config.yaml").read_text()
    assert "sha256" in (place / "runs/mine-cli/objective.txt").read_text()


def test_a_slot_of_a_row_is_changed_from_the_command_line(place: Path) -> None:
    assert main(["grpo", *RL, "objective.surrogate.high=0.3", "objective.penalty=none", "name=slot", "--quiet"]) == 0
    assert "Clip(low=0.2, high=0.3)" in (place / "runs/slot/objective.txt").read_text()
    assert ALGORITHMS["grpo"].surrogate.high == 0.2  # type: ignore[attr-defined]


def test_evaluating_more_often_changes_nothing(place: Path) -> None:
    for name, every in (("seldom", 0), ("often", 1)):
        assert main(["ppo", *RL, f"eval.every={every}", f"rollouts_every={every}", f"name={name}", "--quiet"]) == 0
    seldom, often = ([{k: v for k, v in row.items() if not k.startswith("eval/")} for row in numbers(place / "runs" / name)] for name in ("seldom", "often"))  # fmt: skip
    assert seldom == often and any("eval/reward" in row for row in numbers(place / "runs/often")[1:2])


# ------------------------------------------------------------------------------------------------ looking at runs


def test_runs_are_listed_and_asked(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["runs", "--json"]) == 0
    found = {run["name"]: run for run in json.loads(capsys.readouterr().out)}
    assert (found["base"]["status"], found["base"]["recipe"], found["base"]["step"]) == ("finished", "sft", 2)
    assert main(["runs"]) == 0 and "base" in capsys.readouterr().out
    for name, model in (
        ("folder", "runs/base"),
        ("checkpoint", BASE[0].partition("=")[2]),
    ):  # a run's directory stands for its last checkpoint
        assert main(["sft", *SHARED, f"model={model}", "data.source=sft.jsonl", "steps=1", "save=false", f"name={name}", "--quiet"]) == 0
    assert numbers(place / "runs/folder") == numbers(place / "runs/checkpoint")
    capsys.readouterr()
    assert main(["rm", *BASE, "data.source=pairs.jsonl", "steps=1", "save=false", "name=named", "--quiet"]) == 0
    assert main(["runs", "--json"]) == 0
    assert {run["name"]: run["model"] for run in json.loads(capsys.readouterr().out)}["named"] == "base"
    assert main(["generate", "runs/base", "--prompt", "say red 1", "--max-tokens", "4", "-n", "2", "--json"]) == 0
    answers = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(answers) == 2 and all(1 <= answer["tokens"] <= 4 for answer in answers)


def test_data_are_shown_with_the_trained_tokens(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "show", "sft.jsonl", "--tokenizer", "runs/base/checkpoints/step_000002", "--examples", "1"]) == 0
    shown = capsys.readouterr().out
    assert "60 rows" in shown and "trained (in brackets)" in shown and "⟦<|end|>⟧" in shown and "⟦say" not in shown
