"""The inverse of the cumulative distribution, and truncation, against loops."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from tilt.data.rollouts import Sampling
from tilt.sampling import drawing
from tilt.sampling.drawing import draw, invert, truncate


def rows(number: int, vocabulary: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(number, vocabulary, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2


@pytest.mark.parametrize("temperature", [1.0, 0.5, 1.7])
def test_draw_equals_a_loop_over_the_cumulative_sum(temperature: float) -> None:
    logits, u = rows(200, 11), torch.rand(200, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    tokens, logprobs = draw(logits, u, Sampling(temperature))
    for i in range(200):
        weights = [math.exp(x / temperature) for x in logits[i].tolist()]
        total, token = weights[0], 0
        while total <= u[i] * sum(weights):
            token += 1
            total += weights[token]
        assert int(tokens[i]) == token
        assert abs(float(logprobs[i]) - math.log(weights[token] / sum(weights))) < 1e-12


def test_probability_zero_is_never_drawn() -> None:
    """At u = 0 and at the largest u, with impossible tokens first and last."""
    mass = torch.tensor([[0.0, 0.0, 0.25, 0.0, 0.75, 0.0]], dtype=torch.float64).repeat(4, 1)
    assert invert(mass, torch.tensor([0.0, 0.2499, 0.25, 1 - 2.0**-52], dtype=torch.float64)).tolist() == [2, 2, 4, 4]
    long = torch.zeros(5, 10_001)
    long[:, [700, 5_000, 9_999]] = torch.tensor([0.25, 0.5, 0.25])
    assert invert(long, torch.tensor([0.0, 0.2499, 0.25, 0.75, 1 - 2.0**-52], dtype=torch.float64)).tolist() == [
        700,
        700,
        5_000,
        9_999,
        9_999,
    ]


@pytest.mark.parametrize("vocabulary", [4_097, 4_608, 20_011])
def test_the_search_in_two_steps_is_the_search_in_one(vocabulary: int) -> None:
    """Against a plain cumulative sum, at ordinary uniforms and just beside the edges of blocks and tokens; the same in any company."""
    mass = rows(300, vocabulary).float().mul(3).softmax(-1)
    cumulative = mass.double().cumsum(-1)
    u = torch.rand(300, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    edges = torch.arange(100) * vocabulary // 100 // 512 * 512
    u[:100] = (cumulative / cumulative[:, -1:])[torch.arange(100), edges] + 1e-9
    found = invert(mass, u)
    target = u * cumulative[:, -1]
    assert torch.equal(found, torch.searchsorted(cumulative, target[:, None], right=True)[:, 0])
    assert len(found.unique()) > 150
    assert torch.equal(invert(mass[7:9], u[7:9]), found[7:9])


def test_a_large_vocabulary_keeps_its_rare_tokens() -> None:
    """100,000 equal tokens in float32: every uniform lands on its own token, give or take one."""
    u = torch.linspace(0, 0.99999, 40, dtype=torch.float64)
    tokens, _ = draw(torch.zeros(40, 100_000), u, Sampling())
    assert (tokens - (u * 100_000).long()).abs().max() <= 1


def test_tokens_rarer_than_a_float32_step_have_their_turn() -> None:
    """A thousand tokens of 1e-9 behind one of nearly 1, in float32: the uniforms between 1 - 1e-6 and 1 reach each of them."""
    logits = torch.cat([torch.zeros(1), torch.full((1000,), math.log(1e-9))])[None].repeat(9, 1)
    u = 1 - torch.linspace(0.95e-6, 0.05e-6, 9, dtype=torch.float64)
    tokens, _ = draw(logits, u, Sampling())
    assert (tokens - torch.linspace(50, 950, 9)).abs().max() <= 3


def test_rows_drawn_in_parts_are_the_same_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, u = rows(23, 11), torch.rand(23, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    whole = drawing.choose(lambda h: h, hidden, 11, u, Sampling())
    monkeypatch.setattr(drawing, "SCORES", 50)
    parts = drawing.choose(lambda h: h, hidden, 11, u, Sampling())
    assert torch.equal(whole[0], parts[0]) and torch.equal(whole[1], parts[1])


def test_greedy_takes_the_likeliest_and_reports_it_at_temperature_one() -> None:
    logits = rows(50, 9)
    tokens, logprobs = draw(logits, torch.zeros(50, dtype=torch.float64), Sampling(temperature=0.0))
    assert torch.equal(tokens, logits.argmax(-1))
    torch.testing.assert_close(logprobs, logits.log_softmax(-1).max(-1).values)


@pytest.mark.parametrize(("top_k", "top_p"), [(1, 1.0), (3, 1.0), (0, 0.7), (4, 0.5), (0, 1e-9), (50, 0.999999)])
def test_truncation_keeps_the_smallest_set(top_k: int, top_p: float) -> None:
    """Against sorting in Python; draws stay inside the set, in proportion, and log-probabilities remain those of the whole distribution."""
    logits = rows(30, 12, seed=3)
    kept = truncate(logits.log_softmax(-1), top_k, top_p)
    for i in range(30):
        probs = logits[i].softmax(-1).tolist()
        order = sorted(range(12), key=lambda t: -probs[t])[: top_k or None]
        mass, chosen = 0.0, []
        for token in order:
            if mass >= top_p * sum(probs[t] for t in order):
                break
            chosen.append(token)
            mass += probs[token]
        assert sorted(chosen) == torch.isfinite(kept[i]).nonzero()[:, 0].tolist()
    u = torch.rand(30, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    tokens, logprobs = draw(logits, u, Sampling(top_k=top_k, top_p=top_p))
    assert torch.isfinite(kept.gather(1, tokens[:, None])).all()
    torch.testing.assert_close(logprobs, logits.log_softmax(-1).gather(1, tokens[:, None])[:, 0])
    narrowed, _ = draw(kept, u, Sampling())
    assert torch.equal(tokens, narrowed)


def test_scores_that_are_not_finite_are_passed_on() -> None:
    logits = torch.zeros(2, 4)
    logits[1, 2] = float("nan")
    tokens, logprobs = draw(logits, torch.tensor([0.5, 0.5], dtype=torch.float64), Sampling())
    assert np.isfinite(float(logprobs[0])) and not np.isfinite(float(logprobs[1]))
    assert int(tokens.max()) < 4
