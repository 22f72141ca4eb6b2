"""Speed and learning against Stable-Baselines3 on CartPole-v1, PPO and DQN with the same networks and settings: interleaved runs, one thread each.

    python benchmarks/versus_sb3.py --seeds 5 --steps 25600                          speed: ratio of medians
    python benchmarks/versus_sb3.py --methods ppo --steps 100000 --kept rows.jsonl   learning: returns with 95 % intervals over seeds

Stable-Baselines3 lives in an environment of its own, build/sb3 (made here at the first run, with this environment's torch version), never in the project's.
Each run is a fresh process; both sides say how long learning took, by the wall and by the processor, and what 100 episodes earn afterwards.
Runs that `--kept` holds are not made again, new ones are added to it.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from classic import interval, mean_and_half

ROOT = Path(__file__).parent.parent
PLACE = ROOT / "build" / "sb3"

THEIRS = """
import json, sys, time, torch
torch.set_num_threads(1)
from stable_baselines3 import DQN, PPO
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
method, steps, seed = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
if method == "ppo":
    env = make_vec_env("CartPole-v1", 8, seed=seed)
    model = PPO("MlpPolicy", env, n_steps=32, batch_size=256, n_epochs=20, gae_lambda=.8, gamma=.98, ent_coef=0., seed=seed, device="cpu",
                learning_rate=lambda left: 1e-3 * left, clip_range=lambda left: .2 * left)
else:
    env = make_vec_env("CartPole-v1", 1, seed=seed)
    model = DQN("MlpPolicy", env, learning_rate=2.3e-3, batch_size=64, buffer_size=100_000, learning_starts=1000, gamma=.99, target_update_interval=10,
                train_freq=256, gradient_steps=128, exploration_fraction=.16, exploration_final_eps=.04, policy_kwargs=dict(net_arch=[256, 256]),
                seed=seed, device="cpu")
wall, cpu = time.perf_counter(), time.process_time()
model.learn(steps)
wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
mean, _ = evaluate_policy(model, make_vec_env("CartPole-v1", 10, seed=10_000 + seed), 100)
print(json.dumps({"wall": model.num_timesteps / wall, "cpu": model.num_timesteps / cpu, "mean": float(mean)}))
"""

OURS = """
import json, sys, time, torch
torch.set_num_threads(1)
from tilt.classic.agents import evaluate
from tilt.classic.deep_q import DeepQ
from tilt.classic.environments import environments
from tilt.classic.presets import preset, train
method, steps, seed = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
settings = preset("ppo", "CartPole-v1").settings if method == "ppo" else DeepQ()
many = environments("CartPole-v1", settings.envs, seed)
wall, cpu = time.perf_counter(), time.process_time()
trained = train(settings, many, steps=steps, seed=seed)
wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
mean = evaluate(trained.agent, environments("CartPole-v1", 100), seed=10_000 + seed).mean()
print(json.dumps({"wall": trained.steps / wall, "cpu": trained.steps / cpu, "mean": float(mean)}))
"""


def installed() -> Path:
    """The Python of build/sb3, set up where it is not there yet."""
    python = PLACE / "bin" / "python"
    if not python.exists():
        import torch

        subprocess.run([sys.executable, "-m", "venv", str(PLACE)], check=True)
        subprocess.run(
            [python, "-m", "pip", "install", "-q", f"torch=={torch.__version__.partition('+')[0]}", "stable-baselines3"], check=True
        )
    return python


def measured(python: Path | str, program: str, method: str, steps: int, seed: int) -> dict[str, float]:
    """One run in a fresh process."""
    threads = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    done = subprocess.run(
        [python, "-c", program, method, str(steps), str(seed)], check=True, capture_output=True, text=True, env={**os.environ, **threads}
    )
    return json.loads(done.stdout.splitlines()[-1])


def runs(kept: Path | None, python: Path, method: str, steps: int, seeds: int) -> dict[str, list[dict[str, Any]]]:
    """The runs of both sides, seed by seed in turn."""
    rows = [json.loads(line) for line in kept.read_text(encoding="utf-8").splitlines()] if kept is not None and kept.exists() else []
    found: dict[str, list[dict[str, Any]]] = {"sb3": [], "tilt": []}
    for seed in range(seeds):
        for side, of, program in (("sb3", python, THEIRS), ("tilt", sys.executable, OURS)):
            key = {"side": side, "method": method, "steps": steps, "seed": seed}
            row = next((r for r in rows if key.items() <= r.items()), None)
            if row is None:
                row = key | measured(of, program, method, steps, seed)
                if kept is not None:
                    with kept.open("a", encoding="utf-8") as file:
                        file.write(json.dumps(row) + "\n")
            found[side].append(row)
    return found


def apart(sb3: list[float], tilt: list[float]) -> str:
    """Whether the 95 % intervals of the two means overlap."""
    (a, half_a), (b, half_b) = mean_and_half(sb3), mean_and_half(tilt)
    return "yes" if abs(a - b) <= half_a + half_b else "no"


def main() -> None:
    """Print, for each method, the medians of both, their ratio, and what was learned."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=25_600)
    parser.add_argument("--methods", nargs="*", default=["ppo", "dqn"])
    parser.add_argument("--kept", type=Path)
    given = parser.parse_args()
    theirs = installed()
    print(
        "| method | steps | seeds | SB3, steps/s | Tilt, steps/s | ratio by the wall | ratio of processor time | return after it, SB3 | Tilt | intervals overlap |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|")
    for method in given.methods:
        found = runs(given.kept, theirs, method, given.steps, given.seeds)
        sb3, tilt = ({k: statistics.median(r[k] for r in rows) for k in ("wall", "cpu")} for rows in found.values())
        returns = {side: [r["mean"] for r in rows] for side, rows in found.items()}
        told = " | ".join(f"{interval(many)} ({', '.join(format(r, '.0f') for r in many)})" for many in returns.values())
        print(
            f"| {method} | {given.steps:,} | {given.seeds} | {sb3['wall']:,.0f} | {tilt['wall']:,.0f} | {tilt['wall'] / sb3['wall']:.2f} | "
            f"{tilt['cpu'] / sb3['cpu']:.2f} | {told} | {apart(**returns)} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
