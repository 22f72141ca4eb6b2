"""The bench: operations and bytes counted as by hand, peaks that are measured, and one run of the real loop on a tiny shape."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tilt.cli.main import main
from tilt.data.packing import pack
from tilt.data.rollouts import Prompt, Rollout
from tilt.models import compat, loading
from tilt.models.adapters import add_lora
from tilt.models.work import decode_bytes, pairs, pass_flops
from tilt.recipes import bench
from tilt.runs import machine

TINY = ["--width", "16", "--layers", "1", "--heads", "2", "--kv-heads", "1", "--inner", "24", "--vocabulary", "40"]
SMALL = ["--prompt", "6", "--new", "4", "--samples", "2", "--answers", "4"]


@pytest.fixture(autouse=True)
def _threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def model():
    settings = {"num_key_value_heads": 1, "intermediate_size": 24, "tie_word_embeddings": True}
    return loading.tiny("qwen3", vocabulary=40, width=16, layers=2, heads=2, context=32, **settings)


def rollouts() -> list[Rollout]:
    one, two = Prompt((1, 2, 3, 4, 5), 0), Prompt((6, 7), 1)
    return [Rollout.demonstration(one, (1, 2, 3)), Rollout.demonstration(one, (4,)), Rollout.demonstration(two, (5, 6))]


def test_pairs_are_those_that_a_loop_counts() -> None:
    assert pairs(pack(rollouts())) == sum(range(1, 6)) + (6 + 7 + 8) + 6 + (1 + 2) + (3 + 4)


def test_operations_are_those_of_the_layers() -> None:
    """Against torch's own count of every matrix product that runs, once the attention is written out as products."""
    from torch.utils.flop_counter import FlopCounterMode

    lm, batch = model(), pack(rollouts())
    linear = [m for m in lm.model.modules() if isinstance(m, torch.nn.Linear)]
    weights, tokens, actions = sum(m.weight.numel() for m in linear), len(batch.tokens), len(batch.actions)
    attention = 2 * 2 * 2 * 2 * 8 * pairs(batch)  # layers · heads · (scores, values) · width, 2 an operation pair
    assert pass_flops(lm, batch, backward=False) == 2 * weights * tokens + attention + 2 * 16 * 40 * actions
    assert pass_flops(lm, batch, backward=True) == 3 * pass_flops(lm, batch, backward=False)
    assert pass_flops(lm, batch, backward=False, head=False) == 2 * weights * tokens + attention
    lm.requires_grad_(True)
    with FlopCounterMode(display=False) as counted:
        for layer in linear:
            layer(torch.ones(tokens, layer.in_features, requires_grad=True)).sum().backward()
    assert counted.get_total_flops() == 3 * 2 * weights * tokens


def test_a_frozen_weight_has_no_gradient_to_compute() -> None:
    lm, batch = model(), pack(rollouts())
    full = pass_flops(lm, batch, backward=True, head=False)
    adapted = add_lora(model(), 1, 1.0)
    assert pass_flops(adapted, batch, backward=False, head=False) < full / 2 < pass_flops(adapted, batch, backward=True, head=False) < full


def test_bytes_of_decoding_are_those_of_a_loop() -> None:
    lm = model()
    weights = sum(m.weight.numel() for m in lm.model.modules() if isinstance(m, torch.nn.Linear)) + compat.head_of(lm).weight.numel()
    token = 2 * 2 * 1 * 8  # keys and values, layers, heads of keys, width
    read = 0
    for answered in range(1, 6):  # the first of 6 tokens comes from the prompt's pass
        read += 2 * weights + 3 * 7 * token + 12 * answered * token  # 12 answers in two waves
    assert decode_bytes(lm, prompts=3, prompt=7, samples=4, new=6, slots=8) == 4 * read


def test_a_peak_forgets_and_sees_what_was_held_since() -> None:
    machine.forget_peak()
    before = machine.peak()
    held = torch.ones(2**24)
    assert machine.peak() - before > 0.9 * held.nbytes
    del held
    if machine.CLEAR.exists():
        machine.forget_peak()
        assert machine.peak() < before + 2**25


def test_the_machine_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    found = machine.measure(torch.device("cpu"), torch.float32, seconds=0.01)
    assert found.flops > 1e9 and found.bandwidth > 1e8 and found.dtype == "float32" and found.threads == torch.get_num_threads()
    clock = iter([0.0, 0.5, 1.0, 1.25])  # two runs: half a second, a quarter
    monkeypatch.setattr(machine, "perf_counter", lambda: next(clock))
    assert machine._best(lambda: None, torch.device("cpu"), 0.6) == 0.25


def test_a_tiny_shape_as_json(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(bench.machine, "measure", lambda device, dtype: machine.Machine("cpu", 1, "float32", 1e9, 1e9))
    assert main(["bench", *TINY, *SMALL, "--steps", "2", "--threads", "1", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["steps"] == 2 and found["workload"]["prompt"] == 6 and found["workload"]["new"] == 4
    assert set(found["phases"]) == {*bench.PHASES, "rest"} and abs(sum(found["phases"].values()) - found["step"]) < 1e-9
    assert found["peak"] >= found["loaded"] > 0
    for half, tokens in (("prefill", 2 * 6), ("decode", 4 * 3), ("training", 2 * 6 + 4 * 4)):
        assert found[half]["tokens_per_second"] == pytest.approx(tokens / found[half]["seconds"])
        assert found[half]["share"] > 0
    assert list(tmp_path.iterdir()) == [], "a bench leaves nothing behind"


def test_a_recipe_and_a_table(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(bench.machine, "measure", lambda device, dtype: machine.Machine("cpu", 1, "float32", 1e9, 1e9))
    rows = [json.dumps({"prompt": f"say {i}"}) for i in range(8)]
    Path("rows.jsonl").write_text("\n".join(rows) + "\n")
    Path("r.yaml").write_text(
        "recipe: ppo\nmodel: {width: 16, layers: 1, heads: 2, vocabulary: 300, context: 32}\ndata: {source: rows.jsonl, held_out: 0}\n"
        "reward: {length: {high: 3, ramp: 2}}\nprompts: 2\nsamples: 2\nthreads: 1\ncritic_warmup: 5\n"
    )
    assert main(["bench", "r.yaml", "sampling.max_tokens=4", "--steps", "1"]) == 0
    shown = capsys.readouterr().out
    assert "ppo: 2 prompts" in shown and "answers of 4" in shown
    for name in ("prefill", "decode", "training", *bench.PHASES, "whole step", "memory", "machine"):
        assert f"\n{name} " in shown


@pytest.mark.parametrize(
    "words, why",
    [
        (["r.yaml", "--width", "32"], "--width has no effect: r.yaml says"),
        (["some/model", "--kv-heads", "2"], "--kv-heads has no effect: some/model has the shape"),
        (["--answers", "9", *TINY], "answers 9 is not a multiple of samples 8"),
        (["--heads", "3"], "heads must divide width"),
        (["sft.yaml"], "sft.yaml is of the recipe sft"),
        (["--steps", "0"], "greater than or equal to 1"),
        (["stepz=3", *TINY, *SMALL], "did you mean `steps`"),
    ],
)
def test_what_has_no_effect_is_refused(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, words: list[str], why: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("r.yaml").write_text("recipe: rl\n")
    Path("sft.yaml").write_text("recipe: sft\n")
    assert main(["bench", *words]) == 2
    assert why in capsys.readouterr().err
