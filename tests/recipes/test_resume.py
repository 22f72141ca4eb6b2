"""A run that ends anywhere goes on as if it had not: metrics, rollouts and weights are the same bits."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tilt.cli.main import main
from tilt.errors import UsageError
from tilt.recipes import dpo, reward_model, rl, sft
from tilt.recipes.replaying import replay
from tilt.recipes.taking_up import Start
from tilt.runs import checkpoints, rollout_store
from tilt.runs.comparison import differences, differing
from tilt.runs.journal import Journal

from .conftest import TINY, variety


class Killed(BaseException):
    """The process is gone."""


@pytest.fixture
def killed(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """`killed(4)`: the next run dies when it is about to record step 4, once."""

    def at(step: int) -> None:
        plain = Journal.step

        def dying(self: Journal, number: int, *given: Any, **named: Any) -> None:
            if number == step:
                monkeypatch.setattr(Journal, "step", plain)
                raise Killed
            plain(self, number, *given, **named)

        monkeypatch.setattr(Journal, "step", dying)

    return at


def settings(tmp_path: Path, name: str, rows: Path, **more: Any) -> dict[str, Any]:
    base = {
        "threads": 1,
        "quiet": True,
        "root": tmp_path / "runs",
        "name": name,
        "model": TINY,
        "data": {"source": str(rows), "template": "text"},
    }
    return base | {"steps": 6, "save_every": 2} | more


RL = {"prompts": 4, "samples": 4, "sampling": {"max_tokens": 6}, "eval": {"prompts": 4, "every": 2}, "rollouts_every": 1, "reward": variety}
KINDS: dict[str, tuple[Any, str, dict[str, Any]]] = {
    "sft": (sft, "rows", {"batch": 8, "eval": {"every": 2}}),
    "rm": (reward_model, "pairs", {"batch": 8, "normalise": True, "eval_every": 2}),
    "dpo": (dpo, "pairs", {"batch": 8, "reference_update": {"every": 2, "share": 0.5}}),
    "bco": (dpo, "pairs", {"batch": 8, "algorithm": "bco_pair"}),
    "dpo lora": (dpo, "pairs", {"batch": 8, "lora": {"rank": 2}}),
    "grpo": (rl, "rows", RL | {"algorithm": "grpo"}),
    "ppo": (rl, "rows", RL | {"algorithm": "ppo", "passes": 2, "minibatches": 2, "ema": 0.9}),
    "ppo shared": (rl, "rows", RL | {"algorithm": "ppo", "critic": "shared"}),
    "ppo lora": (rl, "rows", RL | {"algorithm": "ppo", "lora": {"rank": 2}}),
    "adaptive": (rl, "rows", RL | {"algorithm": "ppo_kl", "passes": 2}),
    "moving": (rl, "rows", RL | {"algorithm": "grpo", "reference_update": {"every": 2, "share": 0.5}}),
    "mask": (rl, "rows", RL | {"algorithm": "nlpo", "mask": {"top_p": 0.9, "refresh": 3}}),
    "trpo": (rl, "rows", RL | {"algorithm": "trpo"}),
    "running reward": (rl, "rows", RL | {"algorithm": "grpo", "reward": {"function": variety, "normalise": True}}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_that_dies_between_two_checkpoints_goes_on_to_the_same_bits(
    kind: str, tmp_path: Path, rows: Path, pairs: Path, killed: Callable[[int], None]
) -> None:
    recipe, data, more = KINDS[kind]
    source = {"rows": rows, "pairs": pairs}[data]

    def config(name: str) -> Any:
        return recipe.Config.model_validate(settings(tmp_path, name, source, **more))

    recipe.run(config("whole"))
    killed(5)
    with pytest.raises(Killed):
        recipe.run(config("torn"))
    assert checkpoints.saved(tmp_path / "runs" / "torn" / "checkpoints") == [2, 4]
    recipe.run(config("torn"), Start(resume=True))
    assert differences(tmp_path / "runs" / "whole", tmp_path / "runs" / "torn") == []
    assert (tmp_path / "runs" / "torn" / "samples.md").exists() == (recipe is rl)
    if recipe is rl:
        assert (tmp_path / "runs" / "whole" / "samples.md").read_bytes() == (tmp_path / "runs" / "torn" / "samples.md").read_bytes()


@pytest.mark.parametrize("kind", ["sft", "dpo", "ppo lora", "adaptive", "running reward"])
def test_a_replay_agrees_on_every_step_and_finds_a_flipped_bit(kind: str, tmp_path: Path, rows: Path, pairs: Path) -> None:
    recipe, data, more = KINDS[kind]
    if recipe is rl:
        (tmp_path / "rewards.py").write_text(
            "def variety(completions, **columns):\n    return [float(len(set(text))) for text in completions]\n"
        )
        again = {
            "reward": {"function": f"{tmp_path}/rewards.py:variety", "normalise": True}
            if kind == "running reward"
            else f"{tmp_path}/rewards.py:variety"
        }
        more = more | again
    config = recipe.Config.model_validate(settings(tmp_path, "run", {"rows": rows, "pairs": pairs}[data], **more))
    run = recipe.run(config).directory
    found = replay(run.path)
    assert found.steps == (0, 1, 2, 3, 4, 5) and found.begun == 0 and found.differences == ()
    assert replay(run.path, 5, 5).begun == 4 and replay(run.path, 4).differences == ()
    if recipe is not rl:
        lines = run.metrics.read_text().splitlines(keepends=True)
        row = json.loads(lines[3])
        run.metrics.write_text("".join([*lines[:3], json.dumps(row | {"loss": row["loss"] * (1 + 2**-50)}) + "\n", *lines[4:]]))
        assert [line.partition(":")[0] for line in replay(run.path).differences] == ["step 3"]
        return
    (tmp_path / "rewards.py").unlink()
    path = rollout_store.path_of(run.rollouts, 3)
    table = pq.read_table(path)
    said = np.array(table["logprobs"].combine_chunks().values)
    said.view(np.uint32)[7] ^= 1
    column = pa.ListArray.from_arrays(table["logprobs"].combine_chunks().offsets, pa.array(said))
    pq.write_table(table.set_column(table.column_names.index("logprobs"), "logprobs", column), path)
    (tmp_path / "rewards.py").write_text("def variety(completions, **columns):\n    return [9.0 for text in completions]\n")
    assert [line.rpartition(" first")[0] for line in replay(run.path).differences] == ["rollouts, step 3: logprobs differs"]


def test_the_last_checkpoints_and_the_best_are_kept(run_sft, metrics) -> None:  # type: ignore[no-untyped-def]
    found = run_sft(steps=9, save_every=1, keep_last=2, keep_best="eval/ends", eval={"every": 1})
    ends = {row["step"]: row["eval/ends"] for row in metrics(found) if 0 < row["step"] < 9}
    kept = checkpoints.saved(found.directory.checkpoints)
    best = max(ends, key=lambda step: (ends[step], step))
    assert kept == sorted({8, 9, best}) or kept == sorted({8, 9, max(ends, key=lambda step: (ends[step] if step < 8 else -1, step))})
    assert checkpoints.saved(run_sft(steps=4, save_every=1, keep_last=0).directory.checkpoints) == [1, 2, 3, 4]
    found = run_sft(steps=2, keep_best="eval/beauty")
    assert "no step recorded `eval/beauty`" in found.directory.log.read_text()


def test_a_torn_checkpoint_is_skipped_with_its_name_and_the_run_is_the_same(
    tmp_path: Path, rows: Path, killed: Callable[[int], None]
) -> None:
    def config(name: str) -> Any:
        return sft.Config.model_validate(settings(tmp_path, name, rows, batch=8))

    sft.run(config("whole"))
    killed(5)
    with pytest.raises(Killed):
        sft.run(config("torn"))
    run = tmp_path / "runs" / "torn"
    weights = run / "checkpoints" / "step_000004" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    sft.run(config("torn"), Start(resume=True))
    log = (run / "log.txt").read_text()
    assert "torn       step_000004: model.safetensors has" in log and "resumed    from step_000002" in log
    assert differences(tmp_path / "runs" / "whole", run) == []


def test_what_changes_is_listed_and_what_would_be_another_run_is_refused(tmp_path: Path, rows: Path) -> None:
    def config(**more: Any) -> Any:
        return sft.Config.model_validate(settings(tmp_path, "run", rows, batch=8) | more)

    first = sft.run(config(steps=3))
    with pytest.raises(UsageError, match=r"(?s)cannot change.*seed: 0 → 1.*batch: 8 → 4.*--init-from"):
        sft.run(config(steps=3, batch=4, seed=1), Start(resume=True))
    again = sft.run(config(steps=3), Start(resume=True))
    assert again.after == first.after and again.checkpoint == first.checkpoint and "resumed" not in first.directory.log.read_text()
    more = sft.run(config(steps=5), Start(resume=True))
    log = more.directory.log.read_text()
    assert "changed    steps: 3 → 5" in log and "resumed    from step_000003" in log and more.checkpoint.name == "step_000005"
    assert (more.directory.path / "config.before_1.yaml").exists() and "steps: 5" in more.directory.config.read_text()
    data = rows.read_text().splitlines(keepends=True)
    rows.write_text("".join(data[:-1]))
    with pytest.raises(UsageError, match="the data changed since the run began"):
        sft.run(config(steps=6), Start(resume=True))


def test_the_command_line_resumes_by_folder_by_name_and_by_step(tmp_path: Path, rows: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [
        "sft", f"root={tmp_path}/runs", "name=cli", f"data.source={rows}", "data.template=text", "model={width: 16, layers: 1, heads: 2, context: 32, vocabulary: 270}",
        "steps=4", "batch=8", "save_every=2", "threads=1", "--quiet",
    ]  # fmt: skip
    run = tmp_path / "runs" / "cli"
    assert main([*words, "--resume"]) == 0 and "nothing to resume" in capsys.readouterr().out
    whole = (run / "metrics.jsonl").read_text()
    assert main(["run", str(run), "quiet=false", "--resume"]) == 0 and "finished already" in capsys.readouterr().out
    assert main(["run", str(run), "--resume", "step=2"]) == 0
    assert "resumed    from step_000002" in (run / "log.txt").read_text()
    lines = [[json.loads(line) for line in text.splitlines()] for text in (whole, (run / "metrics.jsonl").read_text())]
    assert [differing(a, b) for a, b in zip(*lines, strict=True)] == [[]] * 5
    assert main(["run", str(run), "--resume", "step=3"]) == 2 and "no checkpoint of step 3: it has 2, 4" in capsys.readouterr().err
    assert main(["run", str(run), "--resume", "step=x"]) == 2 and main(["sft", "--resume", *words[1:2], *words[3:]]) == 2
    assert main([*words, "name=other", "--init-from", str(run), "--resume"]) == 2
    capsys.readouterr()
    others = [word for word in words if not word.startswith(("model=", "name="))]
    assert main([*others, "name=other", "--init-from", str(run)]) == 0
    assert "checkpoints/step_000004" in (tmp_path / "runs" / "other" / "config.yaml").read_text()
    assert main(["replay", str(run)]) == 0 and "the same bits" in capsys.readouterr().out
    assert main(["replay", str(run), "9"]) == 2 and main(["replay", str(run), "a"]) == 2 and main(["replay", str(tmp_path / "none")]) == 2
