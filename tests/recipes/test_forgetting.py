"""Pretraining beside reinforcement learning keeps what reinforcement learning alone forgets, at equal reward."""

from __future__ import annotations

import json
from itertools import product

import pytest

from tilt.data.tokenizers import characters
from tilt.recipes import pretrain, rl
from tilt.tasks.echo import LETTERS, Echo


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 2])
def test_ppo_with_pretraining_texts_forgets_nothing_at_equal_reward(shared, tmp_path, seed):
    """A model of sums and letters learns to echo letters. Perplexity of held-out sums 3.3 before; after PPO alone above 1000, beside the sums still 3.3."""
    characters(LETTERS + "0123456789+=").save_pretrained(tmp_path / "words")

    def write(name, rows):
        file = tmp_path / name
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(file)

    sums = [{"text": f"{a}+{b}={a + b}"} for a, b in product(range(30), repeat=2)]
    corpus = write("corpus.jsonl", sums + [{"text": "".join(three)} for three in product(LETTERS, repeat=3)] * 2)
    model = {"width": 32, "layers": 2, "heads": 2, "context": 16, "tokenizer": str(tmp_path / "words")}
    given = {"model": model, "data": {"source": corpus, "template": "text"}, "steps": 150, "batch": 64}
    base = pretrain.run(pretrain.Config.model_validate(shared | given | {"optimizer": {"lr": 5e-3, "schedule": "linear", "warmup": 5}}))

    def practice(coefficient):
        config = {
            "algorithm": "ppo", "model": str(base.checkpoint), "data": {"source": write("echo.jsonl", Echo().rows()), "template": "text"},
            "reward": Echo().reward, "steps": 60, "prompts": 24, "samples": 8, "passes": 2, "critic": "policy", "critic_lr": 1e-2,
            "sampling": {"max_tokens": 1}, "optimizer": {"lr": 5e-3, "warmup": 3, "schedule": "linear"}, "eval": {"samples": 8}, "seed": seed,
            "rollouts_every": 0, "save": False, "pretrain_data": {"source": write("sums.jsonl", sums)}, "pretrain_coefficient": coefficient,
        }  # fmt: skip
        return rl.run(rl.Config.model_validate(shared | config))

    alone, beside = practice(1e-12), practice(0.3)
    assert beside.after["reward"] >= alone.after["reward"] > 0.9 > alone.before["reward"]
    before, forgot, kept = (found["pretrain_perplexity"] for found in (alone.before, alone.after, beside.after))
    assert before < 4 and forgot > 100 and kept < 1.1 * before
