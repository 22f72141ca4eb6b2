"""Learning: from rewards alone, rows master a toy that a policy cannot do before."""

from __future__ import annotations

import json

import pytest

from tilt.data.tokenizers import characters
from tilt.recipes import rl


def echo(completions: list[str], answer: list[str], **columns: object) -> list[float]:
    """1 for an answer whose first letter is the one asked for."""
    return [float(text[:1] == sought) for text, sought in zip(completions, answer, strict=True)]


SETTINGS = {
    "grpo": {"objective": {"penalty": "none"}},
    "rloo": {"objective": {"credit": {"kl": 0.0}}},
    "ppo": {"objective": {"credit": {"kl": 0.0}}, "passes": 2, "critic_lr": 1e-2},
    "reinforce_pp": {"objective": {"credit": {"kl": 0.0}}},
    "gspo": {"minibatches": 2},
    "cispo": {},
    "a2c": {"objective": {"credit": {"kl": 0.0}}, "critic_lr": 1e-2},
    "dapo within kept sets": {"algorithm": "dapo", "sampling": {"max_tokens": 1, "top_p": 0.9, "min_p": 0.05, "keep_sets": True}},
    "nlpo": {"objective": {"credit": {"kl": 0.0}}, "critic_lr": 1e-2, "mask": {"refresh": 10}},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_a_row_learns_to_echo(name, shared, tmp_path, metrics):
    letters = "abcdef"
    characters(letters).save_pretrained(tmp_path / "words")
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": a + b, "answer": b}) + "\n" for a in letters for b in letters))
    config = rl.Config.model_validate(
        shared
        | {
            "algorithm": name, "model": {"width": 32, "layers": 2, "heads": 2, "context": 8, "tokenizer": str(tmp_path / "words")},
            "data": {"source": str(rows), "template": "text", "held_out": 0.1}, "reward": echo, "steps": 80, "prompts": 24, "samples": 8,
            "sampling": {"max_tokens": 1}, "optimizer": {"lr": 5e-3, "warmup": 3, "schedule": "linear"}, "eval": {"samples": 8}, "rollouts_every": 0, "save": False,
        }
        | SETTINGS[name]
    )  # fmt: skip
    result = rl.run(config)
    trained = [line["reward"] for line in metrics(result) if "reward" in line]
    assert result.before["reward"] < 0.3 and trained[0] < 0.3
    assert trained[-1] > 0.9, trained[::10]
