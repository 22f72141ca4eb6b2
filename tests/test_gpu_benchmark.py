"""The benchmark for GPUs, on the CPU and tiny shapes: its checks pass, see what is planted, and stand before any timing; whole steps and the comparison have a row a run."""

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
PARTS = ("gpu_parts", "gpu_parts.checks", "gpu_parts.against", "versus_trl", "workloads")
CHECKS = 12

PRETENDS = """
import json, pathlib, sys
sys.path.insert(0, {versus!r})
import workloads as shared
folder, options = pathlib.Path(sys.argv[2]), json.loads(sys.argv[3])
work = shared.recorded(json.loads((folder / "workload.json").read_text()))
race = isinstance(work, shared.Race)
shared.say(ready=True)
while sys.stdin.readline():
    shared.say(step=2.0 + options["paged"], peak=100.0 + options["micro"], **({{"reward": 1.0}} if race else {{}}))
"""


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    from importlib.util import module_from_spec, spec_from_file_location

    path = list(sys.path)
    spec = spec_from_file_location("gpu_benchmark", ROOT / "benchmarks" / "gpu.py")
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "gpu_benchmark", module)  # dataclasses look their module up
    spec.loader.exec_module(module)
    threads = torch.get_num_threads()
    yield module
    torch.set_num_threads(threads)
    sys.path[:] = path
    for name in PARTS:
        sys.modules.pop(name, None)


@pytest.fixture
def pretender(tmp_path: Path) -> str:
    """A program in the place of a Python that has TRL: it answers as TRL's side does, and computes nothing."""
    script, program = tmp_path / "pretends.py", tmp_path / "python"
    script.write_text(PRETENDS.format(versus=str(ROOT / "benchmarks" / "versus")))
    program.write_text(f'#!/bin/sh\nexec {sys.executable} {script} "$@"\n')
    program.chmod(0o755)
    return str(program)


@pytest.fixture
def quick(gpu: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The machine's peaks are not measured, and workloads are written elsewhere."""
    can = gpu.bench.machine.Machine("cpu", 1, "float32", 1e9, 1e9)
    monkeypatch.setattr(gpu.bench.machine, "measure", lambda device, dtype: can)
    monkeypatch.setattr(gpu.against.versus, "ROOT", tmp_path)
    monkeypatch.setenv("TILT_DATA", str(tmp_path / "data"))
    rows = [{"instruction": f"Say {i}.", "input": "", "chosen": f"It is {i}, and no other.", "rejected": f"No {i}."} for i in range(60)]
    (tmp_path / "data" / "rasbt-instruct").mkdir(parents=True)
    (tmp_path / "data" / "rasbt-instruct" / "instruction-data-with-preference.json").write_text(json.dumps(rows))


@pytest.mark.timeout(600)
@pytest.mark.usefixtures("quick")
def test_the_same_code_runs_on_the_cpu(gpu: Any, capsys: pytest.CaptureFixture[str], pretender: str, tmp_path: Path) -> None:
    """Everything: checks, whole steps of both algorithms, and the comparison, ours by the real program."""
    asked = ["--device", "cpu", "--tiny", "--steps", "1", "--json", str(tmp_path / "found.json"), "--trl", pretender]
    assert gpu.main(asked) == 0
    shown = capsys.readouterr().out
    assert shown.count("agrees ") == CHECKS and "DIFFERS" not in shown
    assert "attention  padded bunches\ndecoding   step by step\n" in shown
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in shown.splitlines() if line.startswith("| tiny")]
    assert [row[1] for row in rows[:2]] == ["GRPO, all weights", "PPO, four models by LoRA"]
    assert [row[:3] for row in rows[2:]] == [
        ["tiny", "transformers generation", "4"], ["tiny", "continuous batching", "4"], ["tiny-sft", "transformers generation", "4"],
        ["tiny-sums", "transformers generation", "16"], ["tiny-sums", "continuous batching", "16"],
    ]  # fmt: skip
    assert [row[3] for row in rows[2:]] == ["2.000", "3.000", "2.000", "2.000", "3.000"] and rows[2][6] == "104"
    assert re.search(r"cpu, \d{4}-\d\d-\d\d, commit \w+, torch ", shown)
    found = json.loads((tmp_path / "found.json").read_text())
    assert len(found["checks"]) == CHECKS and found["found"]["tiny"]["ppo"]["workload"]["algorithm"] == "ppo"
    assert found["trl"]["tiny"]["continuous"]["tuning"] == {"micro": 4, "paged": True}
    assert found["trl"]["tiny"]["generate"]["ratio"] == 2 / found["trl"]["tiny"]["generate"]["median"]["tilt"]["step"]


def test_parts_one_after_the_other_and_no_longer_than_asked(gpu: Any, capsys: Any, monkeypatch: Any, tmp_path: Path) -> None:
    """A later run adds to the file; what there is no time for is named; each workload of the comparison is planned."""
    taken: list[tuple[str, str]] = []
    monkeypatch.setattr(gpu, "checks", lambda *a: iter(()))
    monkeypatch.setattr(gpu, "asdict", lambda found: found if isinstance(found, dict) else {"width": 1, "layers": 1, "heads": 1, "kv_heads": 1, "inner": 1, "vocabulary": 1})  # fmt: skip

    def measured(which: str, *_: Any) -> dict[str, Any]:
        taken.append(("speed", which))
        speed = {"tokens_per_second": 1.0, "share": 0.5}
        return {"step": 1.0, "workload": {"parameters": 1}, "prefill": speed, "decode": speed, "training": speed, "peak": 0, "machine": {"flops": 1.0, "bandwidth": 1.0, "dtype": "float32"}}  # fmt: skip

    monkeypatch.setattr(gpu, "measured", measured)
    path = tmp_path / "found.json"
    asked = ["--device", "cpu", "--tiny", "--json", str(path), "--part", "speed"]
    assert gpu.main([*asked, "--only", "ppo"]) == 0 and taken == [("speed", "ppo")]
    assert gpu.main([*asked, "--only", "grpo"]) == 0
    assert set(json.loads(path.read_text())["found"]["tiny"]) == {"grpo", "ppo"}
    capsys.readouterr()
    assert gpu.main([*asked, "--minutes", "0"]) == 0 and len(taken) == 2
    assert capsys.readouterr().out.count("left out, the time is up: speed tiny") == 2
    given = gpu.argparse.Namespace(workloads=[], part=["trl"], only=None, way=None)
    planned = {(name, way) for _, name, way in gpu.planned(given, gpu.WORKLOADS)}
    for name in ("W1", "W2", "W3", "W4", "W5", "0.5B", "1.7B"):
        assert {(name, "generate"), (name, "continuous")} <= planned
    assert {(name, way) for name, way in planned if name.startswith("W6")} == {("W6-sft", "generate"), ("W6-dpo", "generate")}
    given = gpu.argparse.Namespace(workloads=["0.5B"], part=None, only="ppo", way="continuous")
    assert list(gpu.planned(given, gpu.WORKLOADS)) == [("speed", "0.5B", "ppo"), ("trl", "0.5B", "continuous")]


def test_where_trl_cannot_be_installed_it_says_so(gpu: Any, capsys: Any, monkeypatch: Any) -> None:
    def installed() -> Path:
        raise gpu.subprocess.CalledProcessError(1, "pip")

    monkeypatch.setattr(gpu, "checks", lambda *a: iter(()))
    monkeypatch.setattr(gpu.against.versus, "installed", installed)
    monkeypatch.setattr(gpu.against, "compared", lambda *a: pytest.fail("compared without TRL"))
    assert gpu.main(["--device", "cpu", "--tiny", "--part", "trl"]) == 0
    assert "not compared: TRL cannot be installed" in capsys.readouterr().out


def test_micro_batches_that_trl_can_hold(gpu: Any, monkeypatch: Any) -> None:
    """The largest that run, then weights in bfloat16 where they are faster: tried by a table in the place of TRL."""
    against, tried = gpu.against, list[dict[str, Any]]()
    work, device = against.versus.KNOWN["0.5B"], torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: type("Card", (), {"total_memory": 140 * 2**30}))
    assert against.largest(256, work, device) == 32

    def seconds(folder: Any, python: Any, options: dict[str, Any], fastest: float) -> float | None:
        tried.append(options)
        return None if options["micro"] > 8 else (3.0 if "weights" in options else 4.0)

    monkeypatch.setattr(against.versus, "tried", seconds)
    found = against.fitting(Path("."), Path("."), {"paged": False}, work, device)
    assert found == {"micro": 8, "paged": False, "weights": "bfloat16"} and [o["micro"] for o in tried] == [32, 16, 8, 8]
    monkeypatch.setattr(against.versus, "tried", lambda *a: None)
    with pytest.raises(SystemExit, match="TRL does not run"):
        against.fitting(Path("."), Path("."), {"paged": False}, work, device)


@pytest.mark.parametrize("fault", ["padded", "bunches", "cpu", "sampler", "recorded", "update"])
def test_what_differs_is_seen_and_nothing_is_timed(gpu: Any, capsys: Any, monkeypatch: Any, fault: str) -> None:
    from gpu_parts import checks  # type: ignore[import-not-found]

    plain, calls = checks.scores, [0]

    def scores(policy: Any, batch: Any) -> Any:
        calls[0] += 1
        found, gradient = plain(policy, batch)
        wrong = calls[0] == {"bunches": 2, "padded": 3, "cpu": 4}.get(fault)
        return (found + 1e-3, gradient * 1.001) if wrong else (found, gradient)

    monkeypatch.setattr(checks, "scores", scores)
    told, drawn = checks.Sampler.sample, [0]

    def sample(self: Any, *given: Any, **named: Any) -> Any:
        drawn[0] += 1
        found = told(self, *given, **named)
        if fault == "recorded" and drawn[0] == 2:
            return [checks.replace(r, tokens=(r.tokens[0] ^ 1, *r.tokens[1:])) for r in found]
        return [checks.replace(r, logprobs=(r.logprobs[0] - 1e-2, *r.logprobs[1:])) for r in found] if fault == "sampler" else found

    monkeypatch.setattr(checks.Sampler, "sample", sample)
    moved = iter((torch.ones(2), torch.tensor([1.0, 1.1 if fault == "update" else 1.0])))
    monkeypatch.setattr(checks, "moved", lambda policy, batch: next(moved))
    monkeypatch.setattr(gpu, "measured", lambda *a: pytest.fail("timed although something differs"))
    assert gpu.main(["--device", "cpu", "--tiny"]) == 1
    wanted = {"padded": 2, "bunches": 2, "cpu": 2, "sampler": 1, "recorded": 1, "update": 1}
    assert capsys.readouterr().out.count("DIFFERS") == wanted[fault]


def test_without_a_gpu_it_says_so(gpu: Any, capsys: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main([]) == 0 and "not yet measured: no GPU is visible" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        gpu.main(["W9"])
