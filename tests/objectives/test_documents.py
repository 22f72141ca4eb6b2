"""docs/algorithms.md, the glossary and the objective cards say what the code does."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from scripts import load

from tilt.objectives import ALGORITHMS, GLOSSARY, PREFERENCES, Outputs, Pairs, batch_metrics, card
from tilt.objectives.card import WORDS, name_of, words
from tilt.objectives.sources import SOURCES

DOCS = Path(__file__).parents[2] / "docs"


def test_the_page_is_what_the_code_says() -> None:
    """`python docs/make_algorithms.py` would change nothing: tables, pieces, what each row is unbiased for, and the glossary."""
    made = load(DOCS / "make_algorithms.py")
    page = (DOCS / "algorithms.md").read_text(encoding="utf-8")
    assert made.rewritten(page) == page
    changed = page.replace("clip(high=0.28)", "clip(high=0.3)")
    assert changed != page and made.rewritten(changed) == page
    named = [m.group(1) for line in page.splitlines() if (m := re.match(r"\| `(\w+)` \| ", line))]
    assert sorted(named) == sorted([*ALGORITHMS, *PREFERENCES]) == sorted(SOURCES)


def test_every_metric_is_in_the_glossary(f: Any) -> None:
    found = set(batch_metrics(f.rewards, f.signals, f.layout, kl=0.05))
    for row in ALGORITHMS.values():
        found |= set(row.metrics(f.outputs(), row.prepare(f.rewards, f.signals, f.layout)))
    for preference in PREFERENCES.values():
        found |= set(preference.metrics(Pairs.of(torch.zeros(2), torch.ones(2))))
        found |= set(preference.metrics(Pairs.labelled(torch.zeros(2), torch.ones(3)))) if preference.apart else set()
    assert found <= set(GLOSSARY), found - set(GLOSSARY)
    learner = [
        "loss",
        "grad_norm",
        "lr",
        "kl",
        "entropy",
        "length/mean",
        "length/truncated",
        "time/generate",
        "time/reward",
        "time/evaluate",
        "time/update",
        "time/publish",
    ]
    assert set(learner) | {
        "tokens_per_second",
        "skipped",
        "groups/zero_variance",
        "sampler/logprob_gap_mean",
        "sampler/logprob_gap_max",
    } <= set(GLOSSARY)


@pytest.mark.parametrize("row", [*ALGORITHMS.values(), *PREFERENCES.values()], ids=[*ALGORITHMS, *PREFERENCES])
def test_card_says_what_the_row_computes(row: Any) -> None:
    text = card(row)
    assert text.splitlines()[0] == name_of(row) != "custom" and "PROBLEM" not in text
    for f in fields(row):
        piece = getattr(row, f.name)
        assert all(type(each) in WORDS for each in (piece if isinstance(piece, tuple) else (piece,)))
        assert words(piece) in text or f.name in ("corrections", "bonus", "control", "measures")


def test_card_counts_models_and_shows_run_numbers() -> None:
    held = {name: re.search(r"models held +(\d)", card(row)).group(1) for name, row in {**ALGORITHMS, **PREFERENCES}.items()}
    counts = {"ppo": "4", "rloo": "3", "grpo": "3", "dpo": "2", "sft": "1", "kto": "2", "simpo": "1", "reward_model": "1"}
    assert {k: held[k] for k in counts} == counts
    text = card(ALGORITHMS["grpo"], samples=1, prompts=64)
    assert "samples 1, prompts 64" in text and "PROBLEM" in text and "divisor n - 1" in text and "KL(reference || policy)" in text


def test_metrics_of_nothing_asked_weigh_nothing(f: Any) -> None:
    """A signal that is NaN gives a pair of weight 0, not a NaN; unscored answers are in no mean of rewards."""
    nan = torch.full((10,), float("nan"), dtype=torch.float64)
    found = batch_metrics(f.rewards, type(f.signals).of(nan), f.layout, kl=0.0)
    assert found["objective/kl"] == (0, 0) and found["objective/entropy"] == (0, 0) and found["objective/scores"][1] == 4
    row = ALGORITHMS["sft"]
    outputs = Outputs.of(f.outputs().logprobs)
    assert row.metrics(outputs, row.prepare(f.rewards, f.signals, f.layout))["policy/entropy_avg"] == (0, 0)


def test_batch_metrics_leave_out_unscored_answers(f: Any) -> None:
    from tilt.objectives import Rewards

    total = torch.tensor([1.0, float("nan"), 1.0, 3.0], dtype=torch.float64)
    rewards = Rewards.of(total, scored=~total.isnan(), parts={"exact": total})
    layout = type(f.layout).of([3, 2, 4, 1], [0, 0, 0, 1])
    found = {k: (a / b).item() for k, (a, b) in batch_metrics(rewards, f.signals, layout, kl=0.05).items()}
    assert found["objective/scores"] == pytest.approx(5 / 3) and found["reward/exact"] == pytest.approx(5 / 3)
    assert found["objective/scores_std"] == pytest.approx((8 / 9) ** 0.5) == found["reward/exact_std"]
    assert found["objective/unscored"] == 0.25 and found["length/mean"] == 2.5
    assert found["groups/zero_variance"] == 1, "of the one group with two scored answers; a group of one is not counted"
