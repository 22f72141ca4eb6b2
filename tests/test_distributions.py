"""Log-probabilities, entropy, exact KL, its estimators, and the chunked vocabulary head: equal to enumeration, and never all logits at once."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import tilt.distributions as library
from tilt.distributions import Anchor, entropy, k1, k2, k3, kl, logprobs, score_actions
from tilt.errors import UsageError


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_equal_enumeration() -> None:
    p, q = random(5, 7), random(5, 7, seed=1)
    for i in range(5):
        weights = [math.exp(x) for x in p[i].tolist()]
        probability = [w / sum(weights) for w in weights]
        other = [math.exp(x) for x in q[i].tolist()]
        other = [w / sum(other) for w in other]
        assert entropy(p)[i].item() == pytest.approx(-sum(a * math.log(a) for a in probability))
        assert kl(p, q)[i].item() == pytest.approx(sum(a * math.log(a / b) for a, b in zip(probability, other, strict=True)))
        assert logprobs(p, torch.full((5,), 3))[i].item() == pytest.approx(math.log(probability[3]))
        expected = sum(a * (math.log(a / b)) for a, b in zip(probability, other, strict=True))
        u = torch.tensor([math.log(a / b) for a, b in zip(probability, other, strict=True)])
        for estimator in (k1, k3):
            assert (torch.tensor(probability) * estimator(u)).sum().item() == pytest.approx(expected, abs=1e-6), "unbiased in value"


def test_any_shape_before_the_vocabulary() -> None:
    """One state, or a batch of sequences: the last axis is the vocabulary."""
    p, q, actions = random(2, 3, 7), random(2, 3, 7, seed=1), torch.arange(6).view(2, 3)
    for function in (lambda x, y, a: logprobs(x, a), lambda x, y, a: entropy(x), lambda x, y, a: kl(x, y)):
        whole = function(p, q, actions)
        assert whole.shape == (2, 3)
        one = [function(p[i, j], q[i, j], actions[i, j]).item() for i in range(2) for j in range(3)]
        assert whole.flatten().tolist() == pytest.approx(one, abs=1e-14)


def test_estimators_have_the_gradients_of_the_specification() -> None:
    """Under the policy: k1 as a loss pulls nowhere, k2 along KL(policy || reference), k3 along KL(reference || policy)."""
    p, q = random(6).requires_grad_(), random(6, seed=1)
    log_p, log_q = p.log_softmax(0), q.log_softmax(0)

    def expected_gradient(estimator: Callable[[Tensor], Tensor]) -> Tensor:
        return torch.autograd.grad((log_p.exp().detach() * estimator(log_p - log_q)).sum(), p, retain_graph=True)[0]

    forward, backward = torch.autograd.grad(kl(p, q), p)[0], torch.autograd.grad(kl(q, p), p)[0]
    assert expected_gradient(k1).abs().max() < 1e-15
    torch.testing.assert_close(expected_gradient(k2), forward)
    torch.testing.assert_close(expected_gradient(k3), backward)


def test_k3_keeps_small_differences_in_float32() -> None:
    assert k3(torch.tensor(1e-3)).item() == pytest.approx(4.998e-7, rel=1e-3) and (k3(torch.linspace(-3, 3, 101)) >= 0).all()


def test_estimators_never_go_flat() -> None:
    """Where the policy has drifted far their gradient is largest, not cut: k3 at u = -5 pulls with 1 - e^5, k2 with u."""
    u = torch.tensor([-5.0, -30.0, 6.0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.grad(k3(u).sum(), u)[0].tolist() == pytest.approx([1 - math.exp(-x) for x in u.tolist()])
    assert torch.autograd.grad(k2(u).sum(), u)[0].tolist() == u.tolist() and torch.autograd.grad(k1(u).sum(), u)[0].tolist() == [1, 1, 1]


def test_an_excluded_token_contributes_nothing() -> None:
    logits = torch.tensor([0.0, 0.0, -torch.inf]).requires_grad_()
    found = entropy(logits) + kl(logits, torch.tensor([0.0, 0.0, 1.0]))
    assert found.item() == pytest.approx(math.log(2) + math.log((2 + math.e) / 2))
    found.backward()
    assert logits.grad.isfinite().all()
    assert kl(torch.zeros(2), torch.tensor([0.0, -torch.inf])) == torch.inf


@pytest.mark.parametrize("chunk", [1, 4, 10, 64])
@pytest.mark.parametrize("small", [0, 2**24])
def test_chunked_head_equals_the_plain_one(chunk: int, small: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "SMALL", small)
    hidden, weight, actions = random(10, 4).requires_grad_(), random(12, 4, seed=1).requires_grad_(), torch.arange(10)
    seen: list[int] = []

    def head(x: Tensor) -> Tensor:
        seen.append(len(x))
        return x @ weight.T

    scored = score_actions(hidden, head, actions, temperature=0.7, entropy=True, chunk=chunk)
    found = torch.autograd.grad(scored[0].sum() + (scored[1] ** 2).sum(), (hidden, weight))
    assert max(seen) <= chunk
    logits = (hidden @ weight.T / 0.7).double()
    plain = logits.log_softmax(-1)
    chosen, surprise = plain[torch.arange(10), actions], -(plain.exp() * plain).sum(-1)
    expected = torch.autograd.grad(chosen.sum() + (surprise**2).sum(), (hidden, weight))
    torch.testing.assert_close(scored[0], chosen, rtol=0, atol=1e-13)
    torch.testing.assert_close(scored[1], surprise, rtol=0, atol=1e-13)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


@pytest.mark.parametrize("direction", ["to", "from"])
@pytest.mark.parametrize("chunk", [1, 4, 64])
@pytest.mark.parametrize("small", [0, 2**24])
def test_the_chunked_kl_equals_the_sum_over_the_vocabulary(direction: str, chunk: int, small: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Value and gradient; the anchor is of another width and receives no gradient."""
    monkeypatch.setattr(library, "SMALL", small)
    hidden, weight = random(10, 4).requires_grad_(), random(12, 4, seed=1).requires_grad_()
    other, layer = random(10, 3, seed=2).requires_grad_(), random(12, 3, seed=3).requires_grad_()
    seen: list[int] = []

    def head(x: Tensor) -> Tensor:
        seen.append(len(x))
        return x @ layer.T

    scored = score_actions(
        hidden, lambda x: x @ weight.T, torch.arange(10), temperature=0.7, entropy=True, chunk=chunk, against=Anchor(other, head, direction)
    )
    slope = random(10, seed=4)
    found = torch.autograd.grad((slope * scored.kl).sum(), (hidden, weight, other, layer), allow_unused=True)
    assert max(seen) <= chunk and found[2] is None and found[3] is None

    policy, anchor = (hidden @ weight.T / 0.7).softmax(-1), (other @ layer.T / 0.7).softmax(-1).detach()
    p, q = (policy, anchor) if direction == "to" else (anchor, policy)
    loops = []
    for i in range(10):
        total = torch.zeros((), dtype=torch.float64)
        for v in range(12):
            total = total + p[i, v] * (p[i, v].log() - q[i, v].log())
        loops.append(total)
    expected = torch.stack(loops)
    torch.testing.assert_close(scored.kl, expected, rtol=0, atol=1e-12)
    for a, b in zip(found[:2], torch.autograd.grad((slope * expected).sum(), (hidden, weight)), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-11)


@pytest.mark.parametrize("small", [0, 2**24])
def test_the_curvature_of_the_kl_at_distance_zero_is_the_fisher_matrix(small: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Second derivatives come through recomputed chunks too."""
    monkeypatch.setattr(library, "SMALL", small)
    hidden, weight = random(6, 4).requires_grad_(), random(5, 4, seed=1)
    anchor = Anchor(hidden.detach().clone(), lambda x: x @ weight.T, "from")
    scored = score_actions(
        hidden, lambda x: x @ weight.T, torch.arange(5).repeat(2)[:6], temperature=1.0, entropy=False, chunk=4, against=anchor
    )
    (slope,) = torch.autograd.grad(scored.kl.sum(), hidden, create_graph=True)
    assert scored.kl.abs().max() < 1e-15 and slope.abs().max() < 1e-15
    direction = random(6, 4, seed=2)
    (found,) = torch.autograd.grad((slope * direction).sum(), hidden)
    p = (hidden @ weight.T).softmax(-1).detach()
    fisher = torch.einsum("iv,vd,ve->ide", p, weight, weight) - torch.einsum("iv,vd,iw,we->ide", p, weight, p, weight)
    torch.testing.assert_close(found, torch.einsum("ide,ie->id", fisher, direction), rtol=0, atol=1e-12)


def test_distributions_of_unequal_size_have_no_kl() -> None:
    anchor = Anchor(random(3, 4), lambda x: x @ torch.zeros(4, 13, dtype=torch.float64), "to")
    with pytest.raises(UsageError, match="12 entries and the other's 13"):
        score_actions(random(3, 4), lambda x: x @ random(4, 12), torch.arange(3), temperature=1.0, entropy=False, chunk=2, against=anchor)


@pytest.mark.parametrize(("small", "kept"), [(0, False), (2**24, True)])
def test_logits_are_not_kept_for_the_backward_pass(small: int, kept: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "SMALL", small)
    hidden, weight = random(10, 4).requires_grad_(), random(12, 4, seed=1).requires_grad_()
    saved: list[tuple[int, ...]] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: (saved.append(tuple(x.shape)), x)[1], lambda x: x):
        anchor = Anchor(random(10, 4, seed=2), lambda x: x @ weight.T, "to")
        score_actions(hidden, lambda x: x @ weight.T, torch.arange(10), temperature=1.0, entropy=True, chunk=5, against=anchor)
    assert any(shape[-1:] == (12,) and len(shape) == 2 and shape[0] == 5 for shape in saved) == kept


def test_bfloat16_is_scored_in_float32_and_float64_stays() -> None:
    hidden, weight, actions = random(3, 4), random(12, 4, seed=1), torch.arange(3)
    for dtype, expected in ((torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64, torch.float64)):
        w = weight.to(dtype)
        found, surprise, apart = score_actions(hidden.to(dtype), lambda x, w=w: x @ w.T, actions, temperature=1.0, entropy=False, chunk=2)
        assert found.dtype == expected and surprise.isnan().all() and apart.isnan().all()
        exact = (hidden.to(dtype) @ w.T).double().log_softmax(-1)[actions, actions]
        torch.testing.assert_close(found.double(), exact, rtol=0, atol=2e-6)


def test_no_actions_no_trouble() -> None:
    found, surprise, _ = score_actions(
        torch.zeros(0, 4), lambda x: x @ torch.zeros(4, 6), torch.zeros(0, dtype=torch.long), temperature=1, entropy=True, chunk=2
    )
    assert found.shape == surprise.shape == (0,)


def test_collision_is_the_chance_that_two_draws_agree() -> None:
    logits = random(3, 7)
    torch.testing.assert_close(library.collision(logits), (logits.softmax(-1) ** 2).sum(-1).log(), rtol=0, atol=1e-12)
    assert library.collision(torch.tensor([1e3, 0.0])).item() == 0 and library.collision(torch.tensor([2.0, -torch.inf])).item() == 0
