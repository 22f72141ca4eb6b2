"""The estimate of a step: what trials of parts say of the whole where the whole is known, and that every kind of row can be tried."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tilt.data.packing import pack
from tilt.data.rollouts import Prompt, Rollout, Sampling
from tilt.data.streams import Stream
from tilt.recipes import estimating, rl
from tilt.recipes.estimating import Decoding, Phase

TINY = {"width": 16, "layers": 1, "heads": 2, "context": 32, "vocabulary": 270}
PREFILL, STEP, ROW, GROWTH, TOKEN, FIXED = 0.5, 0.02, 0.003, 0.0001, 0.004, 0.7


def decoding(lengths: list[int], prompts: int) -> float:
    """Seconds of a machine that is exactly as the estimate supposes, row by row and step by step."""
    total = PREFILL * prompts
    for t in range(1, max(lengths)):
        active = sum(n > t for n in lengths)
        total += STEP + active * ROW + active * GROWTH * t
    return total


class Fake:
    """A sampler whose answers have given lengths, and a clock that is the machine above."""

    def __init__(self, lengths: list[int], slots: int) -> None:
        self.lengths, self.slots, self.sampling, self.spent = lengths, slots, Sampling(max_tokens=40, stop_ids=(0,)), 0.0

    def sample(self, prompts: list[Prompt], samples: int, *, step: int, stream: str) -> list[Rollout]:
        wanted = self.lengths if self.sampling.stop_ids else [40] * len(self.lengths)
        lengths = [min(self.sampling.max_tokens, wanted[i % len(wanted)]) for i in range(len(prompts) * samples)]
        self.spent = decoding(lengths, len(prompts))
        return [Rollout.demonstration(prompts[i // samples], (1,) * n) for i, n in enumerate(lengths)]


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Any:
    def opened(lengths: list[int], prompts: int, slots: int = 512) -> tuple[Any, Any]:
        sampler = Fake(lengths, slots)

        def timed(_: Any, work: Any) -> Phase:
            work()
            return Phase(sampler.spent, 1.0)

        monkeypatch.setattr(estimating, "_timed", timed)
        source = Stream([Prompt((1, 2), i) for i in range(prompts)], 0)
        config = SimpleNamespace(prompts=prompts, samples=4, mask=None)
        return config, SimpleNamespace(parts=SimpleNamespace(sampler=sampler, source=source))

    return opened


@pytest.mark.parametrize("budget", [1e9, 0.0])
def test_generation_is_scaled_from_some_prompts_to_all(monkeypatch: Any, machine: Any, budget: float) -> None:
    """With a budget for one prompt in eight the whole step is foretold, and exactly so on a machine of that kind; likewise the longest step."""
    monkeypatch.setattr(estimating, "DRAWING", budget)
    config, opened = machine([40, 40, 40, 40], 8)
    drawn, found = estimating.generation(config, opened)
    assert len(drawn) == (32 if budget else 4) and opened.parts.sampler.sampling.max_tokens == 40
    whole = decoding([40] * 32, 8)
    assert found(False) == pytest.approx(whole, rel=1e-6) and found(True) == pytest.approx(whole, rel=0.05 if budget else 1e-6)


def test_answers_that_end_early_cost_what_they_take(monkeypatch: Any, machine: Any) -> None:
    monkeypatch.setattr(estimating, "DRAWING", 0.0)
    lengths = [12, 40, 25, 30]
    found = estimating.generation(*machine(lengths, 8))[1]
    assert found(False) == pytest.approx(decoding(lengths * 8, 8), rel=0.01)
    assert found(True) == pytest.approx(decoding([40] * 32, 8), rel=0.01) and found(True) > 1.2 * found(False)


def test_more_answers_than_slots_come_in_turns() -> None:
    found = Decoding(0.0, 1.0, STEP, ROW, GROWTH, 0.0, torch.tensor([5.0]), answers=32, slots=8, longest=5, memory=0.0)
    assert found(False) == pytest.approx(1.0 + 4 * (decoding([5] * 8, 0)))


def test_training_is_scaled_by_tokens_beside_what_an_update_takes_anyway(monkeypatch: Any) -> None:
    """Seconds FIXED + TOKEN a token; the memory of a larger batch grows by what is kept for the backward pass, up to the largest micro-batch."""
    monkeypatch.setattr(estimating, "BUDGET", 0.0)
    monkeypatch.setattr(estimating, "kept", lambda config, opened, batch: (100.0, 1.0))
    tried: list[int] = []

    def update(config: Any, opened: Any, batch: Any) -> tuple[Phase, Phase]:
        tried.append(len(batch.tokens))
        return Phase(0.001 * len(batch.tokens), 7.0), Phase(FIXED + TOKEN * len(batch.tokens), 1000.0 + 100 * len(batch.tokens))

    monkeypatch.setattr(estimating, "_update", update)
    asked = [Prompt((1,) * 10, i) for i in range(8)]
    drawn = [Rollout.demonstration(asked[0], (1,) * 20) for _ in range(4)]
    learner = SimpleNamespace(policy=SimpleNamespace(chunk=100), device=torch.device("cpu"))
    opened: Any = SimpleNamespace(parts=SimpleNamespace(learner=learner))
    whole = pack(estimating.filled(asked, 4, drawn))
    assert len(whole.tokens) == 8 * 90
    for micro, largest in ((10**6, 720), (300, 300)):
        config: Any = SimpleNamespace(samples=4, micro_tokens=micro)
        held, evaluate, found, activations = estimating.training(config, opened, asked, drawn, whole)
        assert tried[-1] == 180 < 720, "two of eight prompts fill a chunk of 100 actions"
        assert evaluate.seconds == pytest.approx(0.72) and activations == 100.0 and held > 0
        assert found.seconds == pytest.approx(FIXED + TOKEN * 720)
        assert found.memory == 1000 + 100 * 180 + 100 * (largest - 180)


@pytest.mark.parametrize(
    "given",
    [
        {"algorithm": "ppo", "passes": 2, "minibatches": 2},
        {"algorithm": "trpo"},
        {"algorithm": "grpo", "lora": {}},
        {"algorithm": "dapo", "sampling": {"max_tokens": 4, "top_k": 5, "keep_sets": True}},
        {"algorithm": "nlpo", "mask": {}, "critic": "shared"},
        {"algorithm": "grpo", "reward": None, "critic": "reward_model"},
        {"algorithm": "grpo", "micro_tokens": 16, "sampling": {"max_tokens": 5, "slots": 3}},
    ],
    ids=lambda given: "-".join(map(str, list(given.values())[:2])),
)
def test_every_kind_of_run_can_be_tried(rows: Path, shared: dict[str, Any], given: dict[str, Any]) -> None:
    plain = {"model": TINY, "data": {"source": str(rows), "template": "text"}, "reward": {"length": 3}, "prompts": 4, "samples": 4}
    config = rl.Config.model_validate(shared | plain | {"sampling": {"max_tokens": 4}} | {k: v for k, v in given.items() if k != "reward"})
    if "reward" in given:
        config = config.model_copy(update={"reward": None})
    found, opened = estimating.estimate(config)
    assert set(found.phases) == {"load", "generate", "reward", "evaluate", "update", "publish"}
    assert all(found.phases[name].seconds > 0 for name in ("load", "generate", "update")) and found.longest > 0
    assert found.memory >= found.held > 2**20 and found.activations > 0 and 1 <= found.length <= config.sampling.max_tokens
    lines = "\n".join(rl.plan(config))
    assert "phases     load" in lines and "\nmemory     about" in lines and ("from the stage before" in lines) == (config.reward is None)
    assert not Path(shared["root"]).exists()
