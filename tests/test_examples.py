"""The examples do what their first lines say."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from tilt.data.rollouts import Prompt, Rollout
from tilt.objectives import Outputs, Rewards, Signals
from tilt.recipes.variants import resolve
from tilt.rewards import Text, build
from tilt.segments import Layout

EXAMPLES = Path(__file__).parent.parent / "examples"


def test_my_variant_is_a_row_in_fifteen_lines() -> None:
    file = EXAMPLES / "my_variant.py"
    assert len(file.read_text().splitlines()) <= 15
    name, row = resolve(f"{file}:MINE", {"penalty": "none"})
    assert name.endswith("my_variant.py:MINE") and "Smooth(width=4.0)" in repr(row)

    layout = Layout.of([2, 1], [0, 0])
    old = torch.tensor([-1.0, -2.0, -0.5], dtype=torch.float64)
    new = (old + torch.tensor([0.3, -0.2, 0.1], dtype=torch.float64)).requires_grad_()
    experience = row.prepare(Rewards.of(torch.tensor([1.0, 0.0], dtype=torch.float64), actions=3), Signals.of(old, sequences=2), layout)
    loss = row.loss(Outputs.of(new, sequences=2), experience)
    loss.backward()

    advantage = 1 / math.sqrt(2)  # (1 - 0.5) / std([1, 0]), divisor n - 1
    expected, slopes = 0.0, []
    for a, change, weight in ((advantage, 0.3, 1 / 4), (advantage, -0.2, 1 / 4), (-advantage, 0.1, 1 / 2)):
        inner = math.tanh(4.0 * (math.exp(change) - 1))
        expected -= weight * inner / 4.0 * a
        slopes.append(-weight * (1 - inner**2) * math.exp(change) * a)
    assert float(loss.detach()) == pytest.approx(expected, abs=1e-12)
    assert new.grad is not None and new.grad.tolist() == pytest.approx(slopes, abs=1e-12)


@pytest.mark.parametrize("name", ["kind", "slow_kind"])
def test_the_example_reward_scores_kindness(name: str) -> None:
    texts = ["Could you please wait?", "Shut up, idiot.", "Water is wet."]
    rollouts = [Rollout.demonstration(Prompt((1,), i), (2,)) for i in range(3)]
    rewards = build(f"kind_reward.py:{name}", base=EXAMPLES)(rollouts, [Text("ask", t) for t in texts])
    assert rewards.total.tolist() == [2.0, -2.0, 0.0]


def test_the_readme_shows_the_example_as_it_is() -> None:
    assert (EXAMPLES / "my_variant.py").read_text() in (EXAMPLES.parent / "README.md").read_text()
