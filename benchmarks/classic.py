"""Control on whole training runs: every method's preset on every environment, several seeds; results in docs/classic/control.jsonl, the table in docs/classic/control.md.

python benchmarks/classic.py                              all of PLAN that control.jsonl does not hold yet
python benchmarks/classic.py ppo:CartPole-v1 --seeds 2    these alone
python benchmarks/classic.py --table                      the table again, nothing is trained
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import torch

from tilt.classic.agents import evaluate
from tilt.classic.environments import environments
from tilt.classic.presets import preset, train
from tilt.errors import UsageError

DOCS = Path(__file__).parent.parent / "docs" / "classic"
PLAN = (
    "ppo:CartPole-v1", "dqn:CartPole-v1", "trpo:CartPole-v1", "ppo:Pendulum-v1", "trpo:Pendulum-v1", "ppo-kl:CartPole-v1", "ppo:Acrobot-v1", "dqn:Acrobot-v1",
    "trpo:Acrobot-v1", "reinforce:CartPole-v1", "a2c:CartPole-v1", "ppo:LunarLander-v3",
)  # fmt: skip
BARS = {"CartPole-v1": 475, "Acrobot-v1": -100, "Pendulum-v1": -250, "LunarLander-v3": 200, "MountainCar-v0": -110}
ZOO = {
    ("CartPole-v1", "ppo"): "500 ± 0 (100k)", ("CartPole-v1", "trpo"): "500 ± 0 (100k)", ("CartPole-v1", "dqn"): "500 ± 0 (50k)",
    ("CartPole-v1", "a2c"): "500 ± 0 (500k)", ("Acrobot-v1", "ppo"): "−73.5 ± 18.2 (1M)", ("Acrobot-v1", "trpo"): "−83.1 ± 18.6 (100k)",
    ("Acrobot-v1", "dqn"): "−76.6 ± 11.8 (100k)", ("Pendulum-v1", "ppo"): "−172.2 ± 104.2 (100k)", ("Pendulum-v1", "trpo"): "−174.6 ± 127.6 (100k)",
    ("LunarLander-v3", "ppo"): "242.1 ± 31.8 (1M, v2)",
}  # fmt: skip
CLEANRL = {
    ("CartPole-v1", "ppo"): "490.0 ± 6.1 (500k)", ("Acrobot-v1", "ppo"): "−86.4 ± 1.3 (500k)", ("CartPole-v1", "dqn"): "488.7 ± 16.1 (500k)",
    ("Acrobot-v1", "dqn"): "−91.5 ± 7.2 (500k)",
}  # fmt: skip
STUDENT = {1: 12.71, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}
"""97.5 % quantiles of Student's t by degrees of freedom."""


def one(method: str, name: str, seed: int) -> dict[str, Any]:
    """Train with the preset, then 100 whole episodes under new seeds, with the likeliest and with drawn actions."""
    found = preset(method, name)
    wall, cpu = time.perf_counter(), time.process_time()
    trained = train(found.settings, environments(name, found.settings.envs), steps=found.steps, seed=seed, name=name, method=method)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    fixed = evaluate(trained.agent, environments(name, 100), seed=10_000 + seed)
    drawn = evaluate(trained.agent, environments(name, 100), seed=20_000 + seed, deterministic=False)
    last = [earned for _, earned, _ in trained.finished[-100:]]
    return {
        "environment": name, "method": method, "seed": seed, "steps": trained.steps, "seconds": round(wall, 1), "cpu_seconds": round(cpu, 1),
        "mean": float(fixed.mean()), "std": float(fixed.std()), "drawn": float(drawn.mean()), "training": sum(last) / max(1, len(last)),
    }  # fmt: skip


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def mean_and_half(values: list[float]) -> tuple[float, float]:
    """The mean, and half of its 95 % confidence interval over seeds; NaN for one seed."""
    mean, count = sum(values) / len(values), len(values)
    if count == 1:
        return mean, math.nan
    spread = math.sqrt(sum((v - mean) ** 2 for v in values) / (count - 1))
    return mean, STUDENT.get(count - 1, 1.96) * spread / math.sqrt(count)


def interval(values: list[float]) -> str:
    """Mean ± half of the 95 % confidence interval over seeds."""
    mean, half = mean_and_half(values)
    return (f"{mean:.1f}" if math.isnan(half) else f"{mean:.1f} ± {half:.1f}").replace("-", "−")


def table(rows: list[dict[str, Any]]) -> str:
    """The results as a table of Markdown, one line for each environment and method."""
    lines = [
        "| environment | method | steps | seeds | deterministic | seeds at the bar | stochastic | while training | CPU s a seed | SB3 zoo | CleanRL |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    keys = sorted({(r["environment"], r["method"]) for r in rows}, key=lambda key: (list(BARS).index(key[0]), key[1]))
    for name, method in keys:
        own = [r for r in rows if (r["environment"], r["method"]) == (name, method)]
        reached = sum(r["mean"] >= BARS[name] for r in own)
        cells = [
            name, method, f"{preset(method, name).steps // 1000}k", str(len(own)), interval([r["mean"] for r in own]),
            f"{reached} of {len(own)} ≥ {BARS[name]}".replace("-", "−"), interval([r["drawn"] for r in own]) if method != "dqn" else "—",
            interval([r["training"] for r in own]), f"{sum(r['cpu_seconds'] for r in own) / len(own):.0f}",
            ZOO.get((name, method), "—"), CLEANRL.get((name, method), "—"),
        ]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def write_table() -> None:
    """Put the table between the marks of control.md."""
    page = DOCS / "control.md"
    before, _, rest = page.read_text(encoding="utf-8").partition("<!-- table -->\n")
    after = rest.partition("<!-- end -->")[2]
    page.write_text(f"{before}<!-- table -->\n{table(read(DOCS / 'control.jsonl'))}<!-- end -->{after}", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", default=PLAN)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--table", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(1)
    DOCS.mkdir(parents=True, exist_ok=True)
    path = DOCS / "control.jsonl"
    for seed in range(0 if given.table else given.seeds):
        for method, name in (word.split(":") for word in given.what):
            if any((r["method"], r["environment"], r["seed"]) == (method, name, seed) for r in read(path)):
                continue
            try:
                found = one(method, name, seed)
            except UsageError as error:
                print(f"{method} on {name}: {error}")
                continue
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(found) + "\n")
            print(f"{method:9} {name:14} seed {seed}: {found['mean']:8.1f} ± {found['std']:5.1f}, {found['seconds']:.0f} s", flush=True)
    if (DOCS / "control.md").exists():
        write_table()
    print(table(read(path)))


if __name__ == "__main__":
    main()
