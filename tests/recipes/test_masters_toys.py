"""Learning: from rewards alone, every row masters a toy that a policy cannot do before: at least 0.9 of the way from its start to the optimum."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tilt.data.tokenizers import characters
from tilt.objectives import ALGORITHMS, Imitate, ProcessRelative, Teacher
from tilt.recipes import rl, sft
from tilt.tasks.echo import LETTERS, Echo

SETTINGS = {
    "ppo": {"passes": 2, "critic_lr": 1e-2},
    "ppo_sequence": {"passes": 2, "critic_lr": 1e-2},
    "ppo_dual_clip": {"passes": 2, "critic_lr": 1e-2},
    "ppo_kl": {"passes": 3, "critic_lr": 1e-2, "optimizer": {"lr": 3e-3, "schedule": "linear"}},
    "trpo": {"objective": {"penalty": {"limit": 0.04, "damping": 0.01, "iterations": 4}}, "critic_lr": 1e-2},
    "a2c": {"critic_lr": 1e-2},
    "nlpo": {"critic_lr": 1e-2, "mask": {"refresh": 10}},
    "dapo within kept sets": {"algorithm": "dapo", "sampling": {"max_tokens": 1, "top_p": 0.9, "min_p": 0.05, "keep_sets": True}},
    "dapo of mixed groups": {"algorithm": "dapo", "keep": {"mixed": True}},
    "grpo, reference reset": {"algorithm": "grpo", "reference_update": {"every": 10, "share": 1.0}},
    "grpo on parts": {"algorithm": "grpo", "objective": {"credit": "parts_relative"}, "reward": [Echo().reward, {"length": {"high": 1}}]},
    "reinforce_baseline": {"critic_lr": 1e-2},
    "gspo": {"minibatches": 2},
    "luspo": {"minibatches": 2},
    "high_entropy": {"steps": 160},  # a fifth of the answers is trained on
}
QUICK = ("grpo", "rloo", "ppo", "reinforce_pp", "gspo", "cispo", "trpo")
"""The representative rows of the quick tests; the others are slow."""
ROWS = [name for name in SETTINGS if name not in ALGORITHMS] + [
    name for name, row in ALGORITHMS.items() if not isinstance(row.credit, ProcessRelative | Teacher) and row.credit != Imitate()
]


@pytest.fixture
def toy(shared, tmp_path):
    """Settings of a tiny model from scratch on the echo task."""
    characters(LETTERS).save_pretrained(tmp_path / "words")
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in Echo().rows()))
    return shared | {
        "model": {"width": 32, "layers": 2, "heads": 2, "context": 8, "tokenizer": str(tmp_path / "words")},
        "data": {"source": str(rows), "template": "text", "held_out": 0.1},
    }


def practice(toy, name, **settings):
    """A run of `name` on the toy, and the mean reward of its training answers by step."""
    config = rl.Config.model_validate(
        toy
        | {
            "algorithm": name, "reward": Echo().reward, "steps": 80, "prompts": 24, "samples": 8, "sampling": {"max_tokens": 1},
            "optimizer": {"lr": 5e-3, "warmup": 3, "schedule": "linear"}, "eval": {"samples": 8}, "rollouts_every": 0, "save": False,
        }
        | SETTINGS.get(name, {}) | settings
    )  # fmt: skip
    result = rl.run(config)
    lines = [json.loads(line) for line in result.directory.metrics.read_text().splitlines()]
    return result, [line["reward"] for line in lines if "reward" in line]


def risen(rewards: list[float]) -> float:
    """How much of the way from the first step to the optimum, 1, the last eight steps have gone."""
    return (sum(rewards[-8:]) / 8 - rewards[0]) / (1 - rewards[0])


@pytest.mark.parametrize("name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in ROWS])
def test_a_row_learns_to_echo(name, toy):
    result, rewards = practice(toy, name)
    assert result.before["reward"] < 0.3 and rewards[0] < 0.3
    assert risen(rewards) > 0.9, rewards[::10]


@pytest.mark.slow
def test_sft_learns_its_demonstrations(toy):
    assert surety(imitation(toy, steps=160)).mean() > 0.9


@pytest.mark.slow
def test_dft_makes_sure_of_what_was_likely(toy):
    """It goes on from a short sft: its gradient is that of p, not of log p, so most become all but certain and a few are given up."""
    start = imitation(toy, steps=75)
    before = surety(start)
    after = surety(imitation(toy, steps=160, algorithm="dft", model=str(start.checkpoint), optimizer={"lr": 1e-3}))
    assert before.median() < 0.97 and after.median() > 0.99 and after.mean() > before.mean() + 0.02


def imitation(toy, **settings):
    """A run of sft on the demonstrations of the task, all of them."""
    given = {"batch": 24, "optimizer": {"lr": 5e-3, "warmup": 3, "schedule": "linear"}, "data": toy["data"] | {"held_out": 0}}
    return sft.run(sft.Config.model_validate(toy | given | settings))


def surety(result) -> torch.Tensor:
    """Probability of the right letter for every prompt under a checkpoint, by plain transformers."""
    lm, words = AutoModelForCausalLM.from_pretrained(result.checkpoint), AutoTokenizer.from_pretrained(result.checkpoint)
    rows = Echo().rows()
    asked = torch.tensor([words.encode(row["prompt"], add_special_tokens=False) for row in rows])
    right = torch.tensor([words.encode(row["answer"], add_special_tokens=False)[0] for row in rows])
    return lm(asked).logits[:, -1].softmax(-1)[torch.arange(len(rows)), right].detach()


@pytest.mark.slow
def test_a_student_learns_to_echo_from_its_teacher_alone(toy):
    """The teacher is a policy that has mastered the toy; the student's answers are scored, and their scores never read."""
    teacher, _ = practice(toy, "dapo", save=True)
    _, rewards = practice(toy, "distill", reference=str(teacher.checkpoint), seed=1)
    assert rewards[0] < 0.3 and risen(rewards) > 0.9, rewards[::10]
