"""What answers are drawn in: the policy's own weights on a CPU unless asked, and what bfloat16 would bring is only told."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tilt.models.loading import tiny
from tilt.recipes import estimating, opening
from tilt.recipes.rl_settings import Config
from tilt.sampling.probe import halving
from tilt.sampling.sampler import Sampler


@pytest.fixture
def settings(tmp_path: Path) -> Callable[..., Config]:
    """The configuration of a run that is never opened."""
    (tmp_path / "r.py").write_text("def r(completions): return [0.0]")
    return lambda **more: Config(model="m", data="d", reward=f"{tmp_path}/r.py:r", **more)


@pytest.mark.parametrize(
    ("computing", "wanted", "device", "dtype"),
    [
        ("auto", "auto", "cpu", None),
        ("bfloat16", "auto", "cpu", None),
        ("auto", "bfloat16", "cpu", torch.bfloat16),
        ("auto", "float32", "cuda", torch.float32),
        ("auto", "auto", "cuda", torch.bfloat16),
        ("float32", "auto", "cuda", None),
    ],
)
def test_the_dtype_that_draws(settings, computing: str, wanted: str, device: str, dtype: torch.dtype | None) -> None:
    run = settings(dtype=computing)
    assert opening.drawing_dtype(run, wanted, torch.device(device)) == dtype


def test_a_run_draws_in_bfloat16_where_asked(run_rl, metrics, monkeypatch) -> None:
    """The learner stays in float32; what was sampled differs from it by rounding, and the guards allow for that."""
    dtypes: list[tuple[torch.dtype, torch.dtype]] = []
    load = Sampler.load

    def watched(self: Sampler, policy: torch.nn.Module) -> None:
        load(self, policy)
        dtypes.append((next(self.lm.parameters()).dtype, next(policy.parameters()).dtype))

    monkeypatch.setattr(Sampler, "load", watched)
    result = run_rl(algorithm="grpo", sampling={"max_tokens": 5, "dtype": "bfloat16"})
    assert dtypes and set(dtypes) == {(torch.bfloat16, torch.float32)}
    assert all(math.isfinite(v) for line in metrics(result) for v in line.values())


def test_the_gain_is_measured_and_told_only_where_it_is_worth_it(settings, monkeypatch: pytest.MonkeyPatch) -> None:
    lm = tiny("qwen3", vocabulary=64, width=32, layers=2)
    assert 0.01 < halving(lm, 4) < 100
    assert 0.1 < halving(lm.bfloat16(), 4) < 10
    policy = estimating.Policy(tiny("qwen3", vocabulary=64, width=32, layers=1))
    config = settings()
    for gain, lines in ((1.1, 0), (1.9, 1)):
        monkeypatch.setattr(estimating, "halving", lambda lm, rows, gain=gain: gain)
        assert len(estimating.halved(config, policy)) == lines
    chosen = config.model_copy(update={"sampling": config.sampling.model_copy(update={"dtype": "float32"})})
    assert estimating.halved(chosen, policy) == []


def test_where_nothing_is_trained_on_samples_the_dtype_is_refused(run_sft) -> None:
    with pytest.raises(ValueError, match=r"sampling\.dtype: without effect"):
        run_sft(sampling={"dtype": "bfloat16"}, reward="exact")
