"""Numbers that other libraries print, against the pieces that train language models: rlax's GAE and clipped surrogate (classic.md C1)."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tilt.objectives import GAE, Clip, NoRatio, Objective, Outputs, PerBudget, Rewards, Score, Signals, TokenAverage, TokenRatio
from tilt.segments import Layout


def advantages(lam: float, gamma: float, rewards: list[float], values: list[float], lengths: list[int], final: list[float]) -> Tensor:
    layout, said = Layout.of(lengths), torch.zeros(len(rewards), dtype=torch.float64)
    signals = Signals.of(said, values=torch.tensor(values, dtype=torch.float64), final=torch.tensor(final, dtype=torch.float64))
    row = Objective(GAE(gamma, lam, whitened=False), NoRatio(), Score(), PerBudget(1))
    paid = Rewards.of(torch.zeros(len(lengths), dtype=torch.float64), steps=torch.tensor(rewards, dtype=torch.float64))
    return row.prepare(paid, signals, layout).advantages


@pytest.mark.parametrize(
    ("lam", "printed"), [(1.0, [-1.451188, -4.455746, 2.539651, 0.5249, -0.49]), (0.7, [-0.676979, -5.248167, 2.484608, 0.67043, -0.49])]
)
def test_gae_of_one_piece(lam: float, printed: list[float]) -> None:
    """gamma .99, r = 0 0 1 0 -.5, V = 1 4 -3 -2 -1 and -1 after the last step, where the piece was cut."""
    found = advantages(lam, 0.99, [0, 0, 1, 0, -0.5], [1, 4, -3, -2, -1], [5], [-1])
    assert found.tolist() == pytest.approx(printed, abs=5e-7)


@pytest.mark.parametrize(("lam", "printed"), [(1.0, [3, 2, 1, 0, -4.9]), (0.7, [2.2899, 1.73, 1, 0, -4.9])])
def test_gae_over_an_end(lam: float, printed: list[float]) -> None:
    """Discounts .9 .9 .9 0 .9: an episode ends after the fourth step, and another is cut after one step, where V = -1."""
    found = advantages(lam, 0.9, [0, 0, 0, 0, 1], [-3, -2, -1, 0, 5], [4, 1], [0, -1])
    assert found.tolist() == pytest.approx(printed, abs=1e-12)


@pytest.mark.parametrize(("sign", "printed"), [(1.0, -0.171177842775), (-1.0, 0.193333333333)])
def test_the_clipped_surrogate(sign: float, printed: float) -> None:
    """Loss, eps .2, of three states with three actions each, A = .3 .2 .1 or its negative."""
    logits = torch.tensor([[1.0, 1, 1], [2, 0, 0], [-1, -2, -3]], dtype=torch.float64)
    before = torch.tensor([[1.0, 1, 1], [2, 0, 0], [-3, -2, -1]], dtype=torch.float64)
    taken, good = torch.arange(3), sign * torch.tensor([0.3, 0.2, 0.1], dtype=torch.float64)
    new, old = (x.log_softmax(-1)[taken, taken] for x in (logits, before))
    gain = Clip(0.2, 0.2)((new - old).exp(), new, good)
    assert -gain.mean().item() == pytest.approx(printed, abs=5e-13)
    row = Objective(Given(good), TokenRatio(), Clip(0.2, 0.2), TokenAverage())
    layout = Layout.of([3])
    experience = row.prepare(Rewards.of(torch.zeros(1, dtype=torch.float64), actions=3), Signals.of(old, sequences=1), layout)
    assert row.loss(Outputs.of(new), experience).item() == pytest.approx(printed, abs=5e-13)


class Given:
    """Advantages that are given."""

    needs: frozenset[str] = frozenset()
    compares = False

    def __init__(self, advantages: Tensor) -> None:
        self.advantages = advantages

    def __call__(self, rewards: Rewards, signals: Signals, layout: Layout):  # type: ignore[no-untyped-def]
        from tilt.objectives import Credited

        return Credited(self.advantages, torch.full_like(self.advantages, torch.nan), rewards.scored)


def test_a_constant_critic_by_hand_recursion() -> None:
    """V = 0 and V = 1 everywhere, lam in {1, .9}, gamma in {1, .99}: A_t = delta_t + gamma lam A_(t+1) (Stable-Baselines3's test)."""
    rewards = [1.0, -0.5, 0.25, 2.0, 0.0, 1.0]
    for value in (0.0, 1.0):
        for lam in (1.0, 0.9):
            for gamma in (1.0, 0.99):
                found, last = [], 0.0
                for r, after in zip(reversed(rewards), [0.0] + [value] * 5):
                    last = r + gamma * after - value + gamma * lam * last
                    found.append(last)
                assert advantages(lam, gamma, rewards, [value] * 6, [6], [0.0]).tolist() == pytest.approx(found[::-1], abs=1e-12)
