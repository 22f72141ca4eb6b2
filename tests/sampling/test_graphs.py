"""Recorded decoding steps, with a stand-in for CUDA's graphs: token for token what is drawn step by step, while rows end and others take their slots."""

from __future__ import annotations

import contextlib
import gc
import random
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from decoders import KINDS, build
from recorder import Recorder
from torch import Tensor
from transformers import PreTrainedModel

from tilt import linear_head
from tilt.data.rollouts import Prompt, Rollout, Sampling
from tilt.sampling import graphs
from tilt.sampling.cache import Decode, Store
from tilt.sampling.forward import Cached, forward_of
from tilt.sampling.graphs import Fixed, Size
from tilt.sampling.sampler import Sampler


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Recorder]]:
    """Steps are recorded on the CPU; the recordings made so far."""
    monkeypatch.setattr(graphs, "RECORDERS", {"cpu": Recorder.maker})
    monkeypatch.setattr(graphs, "refused", {})
    monkeypatch.setattr(Recorder, "made", [])
    yield Recorder.made


def prompts(lengths: tuple[int, ...] = (1, 7, 3, 12, 5, 5, 2)) -> list[Prompt]:
    rng = random.Random(1)
    return [Prompt(tuple(rng.randrange(29) for _ in range(n)), 10 + i) for i, n in enumerate(lengths)]


def drawn(lm: PreTrainedModel, slots: int = 6, samples: int = 4, **settings: Any) -> list[Rollout]:
    made = Sampling(**{"max_tokens": 40, "stop_ids": (3, 4), **settings})
    return Sampler(lm, None, made, seed=4, slots=slots).sample(prompts(), samples, step=0)


@pytest.mark.parametrize("kind", KINDS)
def test_token_for_token(kind: str, recorded: list[Recorder]) -> None:
    """Float64: 28 answers of a few to 40 tokens over 6 slots, windows shorter than the texts; recordings of several sizes, replayed far more often than made."""
    lm = build(kind)
    found = drawn(lm)
    assert len(recorded) >= 3 and sum(r.replays for r in recorded) > 40 and not graphs.refused
    assert max(len(r.tokens) for r in found) > 30 and min(len(r.tokens) for r in found) < 6
    made = len(recorded)
    with graphs.off():
        plain = drawn(lm)
    assert len(recorded) == made
    assert [r.tokens for r in found] == [r.tokens for r in plain]
    assert max(np.abs(np.array(a.logprobs) - b.logprobs).max() for a, b in zip(found, plain, strict=True)) < 1e-9


@pytest.mark.parametrize("slots", [1, 3, 64])
def test_whatever_the_slots(slots: int, recorded: list[Recorder]) -> None:
    lm = build("qwen3")
    found = drawn(lm, slots)
    assert recorded
    with graphs.off():
        assert [r.tokens for r in drawn(lm, 5)] == [r.tokens for r in found]


def test_answers_that_outgrow_a_size(recorded: list[Recorder], monkeypatch: pytest.MonkeyPatch) -> None:
    """More columns than the first size has, so that the stores are made anew and old recordings are never replayed."""
    monkeypatch.setattr(graphs, "LEAST", 8)
    lm = build("qwen3 with windows")
    found = drawn(lm, 64, max_tokens=60, stop_ids=())
    with graphs.off():
        assert [r.tokens for r in drawn(lm, 64, max_tokens=60, stop_ids=())] == [r.tokens for r in found]
    steps = [8, 4, 4, 8, 8, 16, 11]  # of sizes of 8, 12, 16, 24, 32, 48 and 64 columns
    assert [r.replays for r in recorded] == [n - graphs.WARM + 1 for n in steps]  # one twice, for it was checked


def test_sizes_that_come_back(recorded: list[Recorder], monkeypatch: pytest.MonkeyPatch) -> None:
    """Long answers end and short ones go on: a size from before the stores grew is recorded anew, its old recording would write where nobody reads."""
    monkeypatch.setattr(graphs, "LEAST", 4)
    lm = build("qwen3")
    found = drawn(lm, 3, 6)
    lengths = [len(r.tokens) for r in found]
    assert sum(b < a for a, b in pairwise(lengths)) > 10
    with graphs.off():
        assert [r.tokens for r in drawn(lm, 3, 6)] == [r.tokens for r in found]


def test_when_a_step_is_recorded_changes_no_bit(recorded: list[Recorder], monkeypatch: pytest.MonkeyPatch) -> None:
    """A resumed run records at other steps than the one that was not interrupted."""
    lm = build("qwen3", torch.float32)
    found = []
    for warm in (1, 2, 10**6):
        monkeypatch.setattr(graphs, "WARM", warm)
        found.append([(r.tokens, r.logprobs) for r in drawn(lm)])
    assert found[0] == found[1] == found[2]


def test_a_mask_and_kept_sets(recorded: list[Recorder]) -> None:
    """Two models over the same rows, each with recordings of its own."""
    lm = build("qwen3")

    def masked() -> list[Rollout]:
        made = Sampler(lm, None, Sampling(max_tokens=20, stop_ids=(3,)), seed=4, slots=6)
        made.mask(0.8)
        return made.sample(prompts(), 3, step=0)

    found = masked()
    assert len(recorded) >= 4
    with graphs.off():
        plain = masked()
    assert [r.tokens for r in found] == [r.tokens for r in plain] and all(a.kept == b.kept for a, b in zip(found, plain, strict=True))


@pytest.mark.parametrize("window", [None, 4, 9])
@pytest.mark.parametrize("kind", ["plain", "softcap", "sinks"])
def test_attention_over_fixed_tensors(window: int | None, kind: str) -> None:
    """Against `Decode`: float64 to 1e-12, in a size larger than what is there, with the stores full of what nobody may see."""
    group, lengths, answered, heads, kv_heads, width = np.array([0, 1, 1, 0, 2]), np.array([2, 7, 5]), np.array([3, 7, 0, 5, 1]), 6, 2, 4
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    softcap, sinks = 0.7 if kind == "softcap" else None, draw(heads) if kind == "sinks" else None
    prompts, answers = Store(4, 9), Store(8, 12)
    prompts.layers[0] = (draw(4, kv_heads, 9, width), draw(4, kv_heads, 9, width))
    answers.layers[0] = (draw(8, kv_heads, 12, width), draw(8, kv_heads, 12, width))
    given = [draw(1, n, 5, width) for n in (heads, kv_heads, kv_heads)]
    plain = Decode(prompts, answers, torch.device("cpu"))
    plain.arrange(group, lengths)
    plain.advance(answered)
    call: dict[str, Any] = {"layer": 0, "scaling": 0.4, "window": window, "softcap": softcap, "sinks": sinks}
    wanted = plain.attend(*given, **call)
    kept = [x[:5].clone() for x in answers.layers[0]]
    for size in (Size(8, 4, 4, 12, 9), Size(5, 3, 2, 8, 7)):
        plan = Fixed(size, prompts, answers, torch.device("cpu"))
        plan.arrange(group, lengths)
        plan.feed(np.arange(5), answered)
        assert plan.begin()[:5].tolist() == (lengths[group] + answered).tolist()
        found = plan.attend(*(torch.cat([x, draw(1, x.shape[1], size.rows - 5, width)], 2) for x in given), **call)
        assert found.shape[1] == size.rows and (found[:, :5] - wanted).abs().max() < 1e-12 and torch.isfinite(found).all()
        assert all(torch.equal(x[:5], k) for x, k in zip(answers.layers[0], kept, strict=True))


def test_the_worked_example() -> None:
    plan = Fixed(Size(4, 2, 2, 8, 8), Store(2, 8), Store(4, 8), torch.device("cpu"))
    plan.arrange(np.array([0, 1, 0]), np.array([3, 5]))
    assert plan.table.tolist() == [0, 2, 1, 0] and plan.place.tolist() == [0, 2, 1, 0] and plan.prompt_length.tolist() == [3, 5, 3, 0]
    assert [graphs.rounded_up(n) for n in (1, 2, 3, 5, 64, 65, 97)] == [1, 2, 3, 6, 64, 96, 128]


def test_only_lean_decoding_without_a_limit_is_recorded(recorded: list[Recorder]) -> None:
    lm = build("qwen3")

    def records(*, lean: bool = True, places: int | None = None) -> bool:
        made = forward_of(lm, 4, places, lean=lean)
        assert isinstance(made, Cached)
        return made.graphs is not None

    assert records() and not records(lean=False) and not records(places=500)
    for switch in (graphs.off, linear_head.plain):
        with switch():
            assert not records()
    assert graphs.recorder(torch.device("meta")) is None


def test_on_a_cpu_nothing_is_recorded() -> None:
    assert set(graphs.RECORDERS) == {"cuda"} and graphs.recorder(torch.device("cpu")) is None


@pytest.mark.parametrize("fault", ["numbers", "nan", "recording", "replaying"])
def test_what_differs_or_fails_is_not_used_and_said(fault: str, recorded: list[Recorder], monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing wrong is ever drawn: the step that finds it out is taken plainly, and so are all others."""
    plain: Callable[..., Any] = Recorder.replay

    def replay(self: Recorder) -> None:
        plain(self)
        if fault == "replaying":
            raise RuntimeError("no memory for graphs\nmore")
        self.out.mul_(1.001 if fault == "numbers" else float("nan"))

    monkeypatch.setattr(Recorder, "replay", replay)
    if fault == "recording":
        monkeypatch.setattr(Recorder, "record", lambda self, step: (_ for _ in ()).throw(RuntimeError("no memory for graphs\nmore")))
    lm = build("qwen3")
    with pytest.warns(UserWarning, match="decoding is not recorded on cpu: " + ("no memory for graphs$" if "ing" in fault else "hidden states differ by")):  # fmt: skip
        found = drawn(lm)
    made = len(recorded)
    assert made == 1 and graphs.refused and [r.tokens for r in drawn(lm)] == [r.tokens for r in found] and len(recorded) == 1
    with graphs.off():
        assert [r.tokens for r in drawn(lm)] == [r.tokens for r in found]


@pytest.mark.parametrize("fails", [False, True])
def test_what_is_asked_of_cuda(fails: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """One run before the capture, both on the recorder's own stream, which waits for the other and is waited for; a capture ends whatever happens in it."""
    done: list[str] = []

    class Stream:
        def __init__(self, name: str = "own") -> None:
            self.name = name

        def wait_stream(self, other: Stream) -> None:
            done.append(f"{self.name} waits for {other.name}")

    class Graph:
        def capture_begin(self, pool: Any, capture_error_mode: str) -> None:
            done.append(f"begin {pool} {capture_error_mode}")

        def capture_end(self) -> None:
            done.append("end")

        def replay(self) -> None:
            done.append("replay")

    def step() -> Tensor:
        assert not gc.isenabled()
        done.append("step")
        if fails and done[-2].startswith("begin"):
            raise RuntimeError("not allowed in a capture")
        return torch.ones(1)

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: "pool")
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: Stream("main"))
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext(done.append(f"on {stream.name}")))
    recording = graphs.CudaGraph.maker()()
    expected = ["own waits for main", "on own", "step", "begin pool thread_local", "step", "end"]
    if fails:
        with pytest.raises(RuntimeError, match="not allowed"):
            recording.record(step)
    else:
        assert recording.record(step) == torch.ones(1)
        recording.replay()
        expected += ["main waits for own", "replay"]
    assert done == expected and gc.isenabled()


def test_a_full_memory_is_not_hidden(recorded: list[Recorder], monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Recorder, step: Any) -> Tensor:
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(Recorder, "record", full)
    with pytest.raises(torch.OutOfMemoryError):
        drawn(build("qwen3"))
    assert not graphs.refused


def test_weights_changed_in_place_between_two_generations(recorded: list[Recorder]) -> None:
    lm = build("qwen2")
    before = drawn(lm)
    for parameter in lm.parameters():
        parameter.data.mul_(1.3)
    after = drawn(lm)
    with graphs.off():
        assert [r.tokens for r in drawn(lm)] == [r.tokens for r in after] != [r.tokens for r in before]
