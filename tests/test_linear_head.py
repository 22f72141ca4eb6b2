"""The tiled vocabulary head: values and gradients equal plain autograd's for every tiling, kept or computed again, trained or frozen."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import Tensor, nn

from tilt import linear_head
from tilt.distributions import Scores, score_actions
from tilt.linear_head import LinearHead, plain

ACTIONS, WIDTH, VOCABULARY = 11, 5, 23


def setup(dtype: torch.dtype = torch.float64, *, layer: bool = True, below: bool = True) -> tuple[Tensor, LinearHead, Tensor, Tensor]:
    """Hidden states, a head, actions, and the slope of the loss along log-probabilities and entropies [2, A]."""
    generator = torch.Generator().manual_seed(0)
    matrix = nn.Linear(WIDTH, VOCABULARY, bias=False, dtype=dtype).requires_grad_(layer)
    with torch.no_grad():
        matrix.weight.copy_(2 * torch.randn(VOCABULARY, WIDTH, generator=generator, dtype=torch.float64))
    hidden = torch.randn(ACTIONS, WIDTH, generator=generator, dtype=torch.float64).to(dtype).requires_grad_(below)
    slopes = torch.randn(2, ACTIONS, generator=generator, dtype=torch.float64).to(dtype)
    return hidden, LinearHead(matrix, 0.7), torch.randint(0, VOCABULARY, (ACTIONS,), generator=generator), slopes


def scored(hidden: Tensor, head: LinearHead, actions: Tensor, *, entropy: bool = True) -> Scores:
    return score_actions(hidden, head, actions, temperature=1.3, entropy=entropy, chunk=4)


def by_hand(hidden: Tensor, head: LinearHead, actions: Tensor) -> tuple[Tensor, Tensor]:
    """log softmax and -Σ p log p, one action at a time."""
    logprobs, entropies = [], []
    for h, a in zip(hidden, actions.tolist(), strict=True):
        scores = (head.layer.weight @ h) * head.scale / 1.3
        p = torch.exp(scores) / torch.exp(scores).sum()
        logprobs.append(torch.log(p[a]))
        entropies.append(-sum(x * torch.log(x) for x in p))
    return torch.stack(logprobs), torch.stack(entropies)


@pytest.mark.parametrize(("rows", "columns", "kept"), product((3, 100), (7, 23, 100), (0, 10**6)))
def test_values_and_gradients_equal_enumeration(monkeypatch: pytest.MonkeyPatch, rows: int, columns: int, kept: int) -> None:
    for name, value in (("ROWS", rows), ("COLUMNS", columns), ("KEPT", kept)):
        monkeypatch.setattr(linear_head, name, value)
    hidden, head, actions, slopes = setup()
    wanted = by_hand(hidden, head, actions)
    truth = torch.autograd.grad((slopes[0] * wanted[0] + slopes[1] * wanted[1]).sum(), (hidden, head.layer.weight))
    found = scored(hidden, head, actions)
    torch.testing.assert_close(found.logprobs, wanted[0], rtol=0, atol=1e-12)
    torch.testing.assert_close(found.entropy, wanted[1], rtol=0, atol=1e-12)
    gradient = torch.autograd.grad((slopes[0] * found.logprobs + slopes[1] * found.entropy).sum(), (hidden, head.layer.weight))
    for one, other in zip(gradient, truth, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-11)


@pytest.mark.parametrize("entropy", [True, False])
def test_a_loss_of_log_probabilities_alone(entropy: bool) -> None:
    """Entropies that are only watched cost no gradient; those not asked for are NaN."""
    hidden, head, actions, slopes = setup()
    found = scored(hidden, head, actions, entropy=entropy)
    assert found.entropy.isnan().all() == (not entropy) and found.entropy.requires_grad == entropy
    (one,) = torch.autograd.grad((slopes[0] * found.logprobs).sum(), hidden)
    (other,) = torch.autograd.grad((slopes[0] * by_hand(hidden, head, actions)[0]).sum(), hidden)
    torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("layer", "below"), [(False, True), (True, False)])
def test_what_is_frozen_gets_no_gradient(layer: bool, below: bool) -> None:
    hidden, head, actions, slopes = setup(layer=layer, below=below)
    (slopes[0] * scored(hidden, head, actions).logprobs).sum().backward()  # type: ignore[no-untyped-call]
    assert (hidden.grad is not None) == below and (head.layer.weight.grad is not None) == layer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_is_as_near_as_the_plain_way(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    """float32 to 1e-6; bfloat16 arithmetic over float32 weights no further from the truth than plain operations under the same autocast."""
    monkeypatch.setattr(linear_head, "COLUMNS", 7)
    exact = scored(*setup()[:3]).logprobs
    hidden, head, actions, slopes = setup(torch.float32)

    def run() -> tuple[Tensor, Tensor]:
        with torch.autocast("cpu", dtype, enabled=dtype == torch.bfloat16):
            found = scored(hidden, head, actions)
        (gradient,) = torch.autograd.grad((slopes[0] * found.logprobs).sum(), head.layer.weight)
        return found.logprobs, gradient

    tiled, slope = run()
    with plain():
        loose, other = run()
    assert tiled.dtype == torch.float32
    bound = 1e-6 if dtype == torch.float32 else 1.5 * float((loose - exact).detach().abs().max())
    assert float((tiled - exact).detach().abs().max()) <= bound
    torch.testing.assert_close(slope, other, rtol=0, atol=1e-5 if dtype == torch.float32 else 0.1)


def test_no_action_and_extreme_scores() -> None:
    """No action gives nothing; scores a thousand apart neither overflow nor lose the likely one."""
    hidden, head, actions, _ = setup()
    assert scored(hidden[:0], head, actions[:0]).logprobs.shape == (0,)
    with torch.no_grad():
        head.layer.weight.mul_(1e4)
    found = scored(hidden, head, actions)
    assert torch.isfinite(found.logprobs).all() and torch.isfinite(found.entropy).all() and (found.entropy >= -1e-9).all()


def test_a_second_derivative_is_refused() -> None:
    """The tiles have one derivative; asking for another is an error, not a wrong number."""
    hidden, head, actions, _ = setup()
    with pytest.raises(RuntimeError, match="differentiate twice"):
        torch.autograd.grad(scored(hidden, head, actions).logprobs.sum(), hidden, create_graph=True)
    with plain():
        (slope,) = torch.autograd.grad(scored(hidden, head, actions).logprobs.sum(), hidden, create_graph=True)
    assert slope.requires_grad


def test_the_same_bits_with_and_without_a_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A policy that is scored before its update and in it has a ratio of exactly 1."""
    hidden, head, actions, _ = setup(torch.float32)
    found = scored(hidden, head, actions)
    with torch.no_grad():
        again = scored(hidden, head, actions)
    monkeypatch.setattr(linear_head, "KEPT", 0)
    anew = scored(hidden, head, actions)
    for other in (again, anew):
        assert torch.equal(found.logprobs, other.logprobs) and torch.equal(found.entropy, other.entropy)
