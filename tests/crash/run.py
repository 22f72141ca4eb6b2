"""The crash matrix: runs killed at points of all phases and inside writes, resumed, and compared with the run that was never killed.

    python tests/crash/run.py                 all kinds and faults, at least 200 kills (`make crash`)
    python tests/crash/run.py --kinds ppo lora --kills 10

Trials fork from a parent that has imported everything and never computed. A trial is killed several times before it may end: at a random call of a
function of a phase (drawing, judging, the learner's passes, publishing), at a random write, rename or sync (half of the content written), or at a
random moment of the clock. In other trials the disk is full or can only be read from some write on, files of the newest checkpoint are torn between
two attempts, the clock jumps, and a second process starts on the same directory while the first holds it.
"""

from __future__ import annotations

import argparse
import errno
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import tilt.recipes.dpo
import tilt.recipes.process_reward
import tilt.recipes.reward_model
import tilt.recipes.rl
import tilt.recipes.sft
from tilt.errors import TiltError
from tilt.learning.learner import Learner
from tilt.objectives import Objective
from tilt.optim.optimizers import Optimizer
from tilt.recipes.taking_up import RESULT, Start
from tilt.rewards.score import Scorer
from tilt.runs.comparison import differences
from tilt.runs.lock import Lock
from tilt.sampling.sampler import Sampler

TINY = {"width": 16, "layers": 1, "heads": 2, "context": 32, "vocabulary": 270}
RL = {
    "prompts": 4, "samples": 4, "sampling": {"max_tokens": 6}, "eval": {"prompts": 4, "every": 3}, "rollouts_every": 2,
    "reward": f"{Path(__file__).parent / 'reward.py'}:variety",
}  # fmt: skip
LORA = {"lora": {"rank": 2}}
KINDS: dict[str, tuple[Any, str, dict[str, Any]]] = {
    "sft": (tilt.recipes.sft, "rows", {"batch": 8, "eval": {"every": 3}}),
    "sft lora": (tilt.recipes.sft, "rows", {"batch": 8} | LORA),
    "rm": (tilt.recipes.reward_model, "pairs", {"batch": 8, "normalise": True, "eval_every": 3}),
    "dpo": (tilt.recipes.dpo, "pairs", {"batch": 8, "eval_every": 3}),
    "dpo lora": (tilt.recipes.dpo, "pairs", {"batch": 8} | LORA),
    "dpo moving reference": (tilt.recipes.dpo, "pairs", {"batch": 8, "reference_update": {"every": 2, "share": 0.5}}),
    "bco": (tilt.recipes.dpo, "pairs", {"batch": 8, "algorithm": "bco_pair"}),
    "grpo": (tilt.recipes.rl, "rows", RL | {"algorithm": "grpo"}),
    "grpo lora": (tilt.recipes.rl, "rows", RL | {"algorithm": "grpo"} | LORA),
    "ppo": (tilt.recipes.rl, "rows", RL | {"algorithm": "ppo", "passes": 2, "minibatches": 2}),
    "ppo four models": (tilt.recipes.rl, "rows", RL | {"algorithm": "ppo", "reward": {"model": "judge"}, "ema": 0.9}),
    "ppo lora": (tilt.recipes.rl, "rows", RL | {"algorithm": "ppo"} | LORA),
    "ppo adaptive KL": (tilt.recipes.rl, "rows", RL | {"algorithm": "ppo_kl", "passes": 2}),
    "grpo EMA reference": (tilt.recipes.rl, "rows", RL | {"algorithm": "grpo", "reference_update": {"every": 1, "share": 0.1}}),
    "ppo running reward": (tilt.recipes.rl, "rows", RL | {"algorithm": "ppo", "reward": {"function": RL["reward"], "normalise": True}}),
    "nlpo mask": (tilt.recipes.rl, "rows", RL | {"algorithm": "nlpo", "mask": {"top_p": 0.9, "refresh": 3}}),
}
"""Kind → recipe, data, settings."""

POINTS: dict[str, tuple[Any, str]] = {
    "draw": (Sampler, "sample"), "judge": (Scorer, "__call__"), "evaluate": (Learner, "evaluate"), "prepare": (Objective, "prepare"),
    "update": (Learner, "update"), "optimizer": (Optimizer, "step"), "publish": (Sampler, "load"), "assess": (Sampler, "evaluate"),
}  # fmt: skip


@dataclass
class Fault:
    """What befalls a process: it is killed at the n-th call of a phase or of a write, half of it done, or after so many seconds; or from the n-th write on
    every write fails with `error`."""

    kind: str
    number: int = 0
    seconds: float = 0.0
    error: int = 0

    def __str__(self) -> str:
        return f"after {self.seconds:.2f} s" if self.kind == "clock" else f"{self.kind} {self.number}"


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def armed(fault: Fault | None) -> None:
    """Set the trap in this process."""
    if fault is None:
        return
    if fault.kind == "jump":
        real = time.time
        time.time = lambda: real() + random.uniform(-1e6, 1e6)
        return
    if fault.kind == "clock":
        signal.signal(signal.SIGALRM, lambda *_: kill())
        signal.setitimer(signal.ITIMER_REAL, fault.seconds)
        return
    left = [fault.number]

    def counted(call: Callable[..., Any], before: Callable[..., Any] = lambda *a, **k: None) -> Callable[..., Any]:
        def do(*given: Any, **named: Any) -> Any:
            left[0] -= 1
            if left[0] <= 0 and fault.error:
                raise OSError(fault.error, os.strerror(fault.error))
            if left[0] == 0:
                before(*given, **named)
                kill()
            return call(*given, **named)

        return do

    if fault.kind in POINTS:
        owner, name = POINTS[fault.kind]
        setattr(owner, name, counted(getattr(owner, name)))
        return
    import safetensors.torch
    from pyarrow import parquet

    import tilt.recipes.state
    import tilt.runs.journal

    def half(content: bytes, path: Path) -> None:
        path.write_bytes(content[: len(content) // 2])

    os.fsync = counted(os.fsync)
    os.replace = counted(os.replace)
    os.truncate = counted(os.truncate)
    Path.rename = counted(Path.rename)  # type: ignore[method-assign]
    Path.unlink = counted(Path.unlink)  # type: ignore[method-assign]
    Path.mkdir = counted(Path.mkdir)  # type: ignore[method-assign]
    Path.write_text = counted(Path.write_text, lambda path, text, **_: half(text.encode(), path))  # type: ignore[method-assign]
    Path.write_bytes = counted(Path.write_bytes)  # type: ignore[method-assign]
    tilt.recipes.state.save_file = counted(safetensors.torch.save_file, lambda tensors, path, *_: half(b"x" * 1000, Path(path)))
    parquet.write_table = counted(parquet.write_table, lambda table, path, **_: half(b"PAR1" * 100, Path(path)))
    shutil.rmtree = counted(shutil.rmtree)
    torn = tilt.runs.journal.Journal.step

    def tearing(self: Any, *given: Any, **named: Any) -> None:
        left[0] -= 1
        if left[0] <= 0 and fault.error:
            raise OSError(fault.error, os.strerror(fault.error))
        if left[0] == 0:
            self._metrics.write('{"step": 4, "ti')
            self._metrics.flush()
            kill()
        torn(self, *given, **named)

    tilt.runs.journal.Journal.step = tearing  # type: ignore[method-assign]


def forked(work: Callable[[], None], log: Path, fault: Fault | None = None) -> int:
    """Run in a fork; its exit code, -9 where it was killed. What it says goes to the log."""
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    code = 1
    try:
        target = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(target, 1)
        os.dup2(target, 2)
        armed(fault)
        work()
        code = 0
    except TiltError as error:
        print(f"error: {error}")
        code = error.exit_code
    except KeyboardInterrupt:
        code = 130
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)
    return code


@dataclass
class Matrix:
    """Trials of all kinds in one folder, and what was counted."""

    folder: Path
    random: random.Random
    kills: Counter[str] = field(default_factory=Counter)
    failed: list[str] = field(default_factory=list)
    others: Counter[str] = field(default_factory=Counter)

    def config(self, kind: str, name: str) -> tuple[Any, Any]:
        recipe, data, more = KINDS[kind]
        base = {"threads": 1, "quiet": True, "root": self.folder, "name": name, "model": TINY, "steps": 6, "save_every": 2}
        given = base | {"data": {"source": str(self.folder / f"{data}.jsonl"), "template": "text"}} | more
        if given.get("reward") == {"model": "judge"}:
            given |= {
                "model": str(self.folder / "base" / "checkpoints" / "step_000002"),
                "reward": {"model": str(self.folder / "judge" / "checkpoints" / "step_000002")},
            }
        return recipe, recipe.Config.model_validate(given)

    def prepare(self) -> None:
        """Data, an SFT model and a reward model on it."""
        sums = [{"prompt": f"{a}+{b}=", "completion": str(a + b)} for a in range(10) for b in range(6)]
        pairs = [{"prompt": f"q{i} ", "chosen": "yes" + "!" * (i % 3), "rejected": "no" + "!" * ((i + 1) % 3)} for i in range(48)]
        for name, rows in (("rows", sums), ("pairs", pairs)):
            (self.folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

        def models() -> None:
            shared = {"threads": 1, "quiet": True, "root": self.folder, "steps": 2, "batch": 8}
            rows, pairs = ({"source": str(self.folder / f"{name}.jsonl"), "template": "text"} for name in ("rows", "pairs"))
            sft, rm = tilt.recipes.sft, tilt.recipes.reward_model
            base = sft.run(sft.Config.model_validate(shared | {"name": "base", "model": TINY, "data": rows}))
            rm.run(rm.Config.model_validate(shared | {"name": "judge", "model": str(base.checkpoint), "data": pairs}))

        assert forked(models, self.folder / "prepare.log") == 0, (self.folder / "prepare.log").read_text()

    def whole(self, kind: str) -> float:
        """The run that is never killed; its seconds."""
        recipe, config = self.config(kind, f"{kind.replace(' ', '-')}-whole")
        began = time.monotonic()
        assert forked(lambda: recipe.run(config), self.folder / "whole.log") == 0, (self.folder / "whole.log").read_text()
        return time.monotonic() - began

    def fault(self, seconds: float) -> Fault:
        """A fault at random: two fifths are kills inside writes, a tenth a disk that is full or read-only, a quarter kills in a phase, a quarter by the clock."""
        chosen = self.random.random()
        if chosen < 0.4:
            return Fault("write", self.random.randint(1, 60))
        if chosen < 0.5:
            return Fault("disk", self.random.randint(1, 60), error=self.random.choice([errno.ENOSPC, errno.EROFS]))
        if chosen < 0.75:
            return Fault(self.random.choice(list(POINTS)), self.random.randint(1, 8))
        return Fault("clock", seconds=self.random.uniform(0.05, 1.0) * seconds)

    def trial(self, kind: str, number: int, seconds: float, most: int = 4) -> None:
        """One run, killed up to `most` times, then left to end; it must be the run that was never killed."""
        name = f"{kind.replace(' ', '-')}-{number}"
        recipe, config = self.config(kind, name)
        log, faults = self.folder / f"{name}.log", []
        for attempt in range(most + 1):
            fault = self.fault(seconds) if attempt < most else None
            faults.append(fault)
            code = forked(lambda: recipe.run(config, Start(resume=True)), log, fault)
            if code == -signal.SIGKILL:
                assert fault is not None
                self.kills[fault.kind] += 1
                self.tear(self.folder / name)
                self.second(kind, name, log)
                continue
            if code == 1 and fault is not None and fault.error and "error: " in log.read_text():
                self.others["disk"] += 1
                continue
            if code != 0:
                self.failed.append(f"{name}: ended with {code} at {fault or 'the last attempt'}: {log.read_text()[-2000:]}")
                return
            break
        found = differences(self.folder / f"{kind.replace(' ', '-')}-whole", self.folder / name)
        if found:
            self.failed.append(f"{name} ({', '.join(map(str, faults))}): {'; '.join(found[:5])}")
            return
        shutil.rmtree(self.folder / name)

    def tear(self, run: Path) -> None:
        """Sometimes cut, change or delete a file of the newest checkpoint, or leave half a line in the metrics."""
        saved = sorted((run / "checkpoints").glob("step_*"))
        chosen = self.random.random()
        if chosen < 0.15 and saved:
            file = self.random.choice([f for f in saved[-1].rglob("*") if f.is_file() and f.stat().st_size > 1])
            content = file.read_bytes()
            at = self.random.randrange(len(content))
            torn = [content[:at], content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :], None][self.random.randrange(3)]
            if torn is None:
                file.unlink()
            else:
                file.write_bytes(torn)
            self.others["torn"] += 1
        elif chosen < 0.25 and (run / "metrics.jsonl").exists():
            with (run / "metrics.jsonl").open("a") as lines:
                lines.write('{"step": 99')
            self.others["torn"] += 1

    def second(self, kind: str, name: str, log: Path) -> None:
        """Sometimes hold the directory, as a run that still goes on would: another process is refused, unless it only has to read that the run is finished."""
        if self.random.random() > 0.1 or not (self.folder / name).is_dir():
            return
        lock = Lock(self.folder / name)
        recipe, config = self.config(kind, name)
        code = forked(lambda: recipe.run(config, Start(resume=True)), log)
        lock.release()
        self.others["second process"] += 1
        if code != (0 if (self.folder / name / RESULT).exists() else 2):
            self.failed.append(f"{name}: a second process ended with {code}: {log.read_text()[-500:]}")

    def jumping(self, kind: str) -> None:
        """A run whose clock jumps to and fro is the same run."""
        name = f"{kind.replace(' ', '-')}-jump"
        recipe, config = self.config(kind, name)
        code = forked(lambda: recipe.run(config), self.folder / f"{name}.log", Fault("jump"))
        self.others["clock jumps"] += 1
        found = differences(self.folder / f"{kind.replace(' ', '-')}-whole", self.folder / name) if code == 0 else [f"ended with {code}"]
        self.failed += [f"{name}: {line}" for line in found[:5]]

    def all(self, kinds: list[str], kills: int, minutes: float) -> None:
        self.prepare()
        seconds = {kind: self.whole(kind) for kind in kinds}
        for kind in kinds[::4]:
            self.jumping(kind)
        began, number = time.monotonic(), 0
        while sum(self.kills.values()) < kills and time.monotonic() - began < 60 * minutes:
            for kind in kinds:
                self.trial(kind, number, seconds[kind])
            number += 1
            print(
                f"{number} rounds of {len(kinds)} kinds, {sum(self.kills.values())} kills, {len(self.failed)} failures, {time.monotonic() - began:.0f} s",
                flush=True,
            )


@contextmanager
def place(kept: str) -> Iterator[Path]:
    if kept:
        Path(kept).mkdir(parents=True, exist_ok=True)
        yield Path(kept)
        return
    with tempfile.TemporaryDirectory(prefix="tilt-crash-") as folder:
        yield Path(folder)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="*", default=list(KINDS), choices=list(KINDS))
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--minutes", type=float, default=38.0, help="most minutes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", default="", help="keep everything in this folder")
    given = parser.parse_args()
    with place(given.folder) as folder:
        matrix = Matrix(folder, random.Random(given.seed))
        matrix.all(given.kinds, given.kills, given.minutes)
    for line in matrix.failed:
        print(line)
    counts = ", ".join(f"{kind} {count}" for kind, count in sorted(matrix.kills.items()))
    print("beside them: " + ", ".join(f"{kind} {count}" for kind, count in sorted(matrix.others.items())))
    print(f"{sum(matrix.kills.values())} kills ({counts}) of {len(given.kinds)} kinds of runs, {len(matrix.failed)} failures")
    return int(bool(matrix.failed) or sum(matrix.kills.values()) < given.kills)


if __name__ == "__main__":
    sys.exit(main())
