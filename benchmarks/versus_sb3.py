"""Steps a second against Stable-Baselines3 on CartPole-v1, PPO and DQN with the same networks and settings: interleaved runs, one thread each, ratio of medians.

    python benchmarks/versus_sb3.py --repeat 5 --steps 25600

Stable-Baselines3 lives in an environment of its own, build/sb3 (made here at the first run, with this environment's torch version), never in the project's.
Each run is a fresh process; both sides say how long learning took, by the wall and by the processor, and what 100 episodes earn afterwards.
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


def told(returns: list[float]) -> str:
    """The mean over seeds, and each."""
    return f"{statistics.mean(returns):.0f} ({', '.join(format(r, '.0f') for r in returns)})"


def main() -> None:
    """Print, for each method, the medians of both, their ratio, and what was learned."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--steps", type=int, default=25_600)
    parser.add_argument("--methods", nargs="*", default=["ppo", "dqn"])
    given = parser.parse_args()
    theirs = installed()
    print("| method | steps | SB3 steps/s | Tilt steps/s | ratio, wall | ratio, processor time | SB3 return after | Tilt return after |")
    print("|---|---|---|---|---|---|---|---|")
    for method in given.methods:
        found: dict[str, list[dict[str, Any]]] = {"sb3": [], "tilt": []}
        for seed in range(given.repeat):
            found["sb3"].append(measured(theirs, THEIRS, method, given.steps, seed))
            found["tilt"].append(measured(sys.executable, OURS, method, given.steps, seed))
        median = {side: {k: statistics.median(r[k] for r in runs) for k in ("wall", "cpu", "mean")} for side, runs in found.items()}
        means = {side: told([r["mean"] for r in runs]) for side, runs in found.items()}
        sb3, tilt = median["sb3"], median["tilt"]
        print(
            f"| {method} | {given.steps:,} | {sb3['wall']:,.0f} | {tilt['wall']:,.0f} | {tilt['wall'] / sb3['wall']:.2f} | {tilt['cpu'] / sb3['cpu']:.2f} | "
            f"{means['sb3']} | {means['tilt']} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
