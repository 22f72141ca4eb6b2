"""The benchmark for GPUs, on the CPU and tiny shapes: its checks pass, see what is planted, and stand before any timing; its table has a row a run."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parent.parent


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    from importlib.util import module_from_spec, spec_from_file_location

    spec = spec_from_file_location("gpu_benchmark", ROOT / "benchmarks" / "gpu.py")
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "gpu_benchmark", module)  # dataclasses look their module up
    spec.loader.exec_module(module)
    threads = torch.get_num_threads()
    yield module
    torch.set_num_threads(threads)


def test_the_same_code_runs_on_the_cpu(gpu: Any, capsys: pytest.CaptureFixture[str], monkeypatch: Any, tmp_path: Path) -> None:
    can = gpu.bench.machine.Machine("cpu", 1, "float32", 1e9, 1e9)
    monkeypatch.setattr(gpu.bench.machine, "measure", lambda device, dtype: can)
    assert gpu.main(["--device", "cpu", "--tiny", "--steps", "1", "--json", str(tmp_path / "found.json")]) == 0
    shown = capsys.readouterr().out
    assert shown.count("agrees ") == 8 and "DIFFERS" not in shown
    rows = [line for line in shown.splitlines() if line.startswith("| tiny")]
    assert [row.split("|")[2].strip() for row in rows] == ["GRPO, all weights", "PPO, four models by LoRA"]
    assert re.search(r"cpu, \d{4}-\d\d-\d\d, commit \w+, torch ", shown)
    found = json.loads((tmp_path / "found.json").read_text())
    assert len(found["checks"]) == 8 and found["found"]["tiny"]["ppo"]["workload"]["algorithm"] == "ppo"


@pytest.mark.parametrize("fault", ["padded", "cpu", "sampler", "update"])
def test_what_differs_is_seen_and_nothing_is_timed(gpu: Any, capsys: Any, monkeypatch: Any, fault: str) -> None:
    plain, calls = gpu._scores, [0]

    def scores(policy: Any, batch: Any) -> Any:
        calls[0] += 1
        found, gradient = plain(policy, batch)
        wrong = calls[0] == {"padded": 2, "cpu": 3}.get(fault)
        return (found + 1e-3, gradient * 1.001) if wrong else (found, gradient)

    monkeypatch.setattr(gpu, "_scores", scores)
    if fault == "sampler":
        told = gpu.Sampler.sample
        monkeypatch.setattr(gpu.Sampler, "sample", lambda self, *a, **k: [gpu.replace(r, logprobs=(r.logprobs[0] - 1e-2, *r.logprobs[1:])) for r in told(self, *a, **k)])  # fmt: skip
        monkeypatch.setattr(gpu, "_moved", lambda policy, batch: torch.ones(1))
    if fault == "update":
        moved = iter((torch.ones(2), torch.tensor([1.0, 1.1])))
        monkeypatch.setattr(gpu, "_moved", lambda policy, batch: next(moved))
    monkeypatch.setattr(gpu, "measured", lambda *a: pytest.fail("timed although something differs"))
    assert gpu.main(["--device", "cpu", "--tiny"]) == 1
    assert capsys.readouterr().out.count("DIFFERS") == {"padded": 2, "cpu": 2, "sampler": 1, "update": 1}[fault]


def test_without_a_gpu_it_says_so(gpu: Any, capsys: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main([]) == 0 and "not yet measured: no GPU is visible" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        gpu.main(["W9"])
