"""Out of memory: the update in smaller pieces is the same update, and without that the run ends with its sizes and what to try."""

from __future__ import annotations

import pytest
import torch

from tilt.errors import TiltError
from tilt.learning.learner import Learner


def short(monkeypatch: pytest.MonkeyPatch, most: int, error: Exception) -> list[int]:
    """Passes over packs of more than `most` tokens run out of memory, after their backward pass: some of the gradient is there already."""
    plain, seen = Learner._backward, []

    def backward(self, small, *given):  # type: ignore[no-untyped-def]
        loss = plain(self, small, *given)
        seen.append(len(small.tokens))
        if len(small.tokens) > most:
            raise error
        return loss

    monkeypatch.setattr(Learner, "_backward", backward)
    return seen


@pytest.mark.parametrize("algorithm", ["grpo", "ppo"])
def test_an_update_in_half_the_micro_batches_is_the_same_update(run_rl, metrics, monkeypatch, algorithm) -> None:  # type: ignore[no-untyped-def]
    settings = {"algorithm": algorithm, "steps": 3, "passes": 2, "optimizer": {"lr": 1e-3}}
    whole = metrics(run_rl(**settings))
    seen = short(monkeypatch, 60, torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"))
    halved = metrics(run_rl(**settings, micro_tokens=128, halve_micro=True))
    assert max(seen) > 60 and [row["micro_tokens"] for row in halved if "micro_tokens" in row] == [32.0 if max(seen[1:]) > 64 else 64.0] * 3
    for a, b in zip(whole, halved, strict=True):
        for name in ("loss", "grad_norm", "reward", "policy/entropy_avg", "loss/policy_avg"):
            if name in a:
                assert b[name] == pytest.approx(a[name], rel=1e-5, abs=1e-6), name


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
        MemoryError(),
    ],
)
def test_without_it_the_run_ends_with_its_sizes_and_three_things_to_try(run_rl, monkeypatch, error) -> None:  # type: ignore[no-untyped-def]
    short(monkeypatch, 0, error)
    with pytest.raises(TiltError) as caught:
        run_rl(micro_tokens=256)
    text = str(caught.value)
    assert "out of memory in `update` of step 0" in text and "micro_tokens 256, prompts × samples 4 × 4" in text
    assert [line.strip()[:2] for line in text.splitlines()[2:]] == ["1.", "2.", "3."] and "micro_tokens=128" in text.splitlines()[2]


def test_another_error_stays_what_it_is(run_rl, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    short(monkeypatch, 0, RuntimeError("shapes differ"))
    with pytest.raises(RuntimeError, match="shapes differ"):
        run_rl(halve_micro=True)
