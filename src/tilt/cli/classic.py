"""`tilt classic`: planning, tabular learning and control from one line; what was learned as text, and saved agents judged again."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tilt.classic import saving, tables
from tilt.classic.agents import Agent, Report, evaluate
from tilt.classic.deep_q import DeepQ
from tilt.classic.dynamics import DYNAMICS, Continuous
from tilt.classic.environments import Environments, environments, gymnasium
from tilt.classic.mdp import MDP
from tilt.classic.on_policy import OnPolicy
from tilt.classic.one_hot import OneHot
from tilt.classic.planning import evaluate_to_horizon, gain, policy_iteration, value_iteration
from tilt.classic.presets import METHODS, preset, train
from tilt.classic.temporal_difference import double_q_learning, expected_sarsa, q_learning, sarsa
from tilt.cli import pictures
from tilt.config import Document, build_piece, hint, nearest, override
from tilt.errors import UsageError
from tilt.objectives.pieces import PIECES
from tilt.runs.directory import auto_name
from tilt.runs.text import curve, inert

PROCESSES: dict[str, Any] = {
    "FrozenLake-v1": tables.frozen_lake,
    "FrozenLake8x8-v1": lambda **given: tables.frozen_lake(tables.LAKE_8, **given),
    "CliffWalking-v1": tables.cliff_walking,
    "Taxi-v3": tables.taxi,
    "SuttonBarto-5x5": tables.sutton_barto_grid,
}
"""Finite processes, by Gymnasium's ids where it has them."""
PLANNING = ("value-iteration", "policy-iteration")
LEARNING = {"q-learning": q_learning, "sarsa": sarsa, "expected-sarsa": expected_sarsa, "double-q": double_q_learning}
EVERY = (*PLANNING, *LEARNING, *METHODS)
EPISODES = 100


@dataclass(frozen=True)
class ValueIteration:
    """gamma, and the change at which sweeps stop."""

    discount: float = 0.99
    theta: float = 1e-10


@dataclass(frozen=True)
class PolicyIteration:
    """gamma."""

    discount: float = 0.99


@dataclass(frozen=True)
class Tabular:
    """gamma, how many episodes, the step size, and the chance of a random action."""

    discount: float = 0.99
    episodes: int = 2000
    alpha: float = 0.1
    epsilon: float = 0.1


@dataclass(frozen=True)
class Choices:
    """What the command line says besides settings."""

    method: str = ""
    name: str = ""
    root: str = "runs"
    episodes: int = EPISODES
    stochastic: bool = False
    quiet: bool = False


def run(words: Sequence[str], choices: Choices) -> None:
    """`ENV [key=value …]` trains, `eval RUN` judges a saved agent."""
    torch.set_num_threads(1)
    if not words:
        raise UsageError(
            f"name an environment, as in `tilt classic CartPole-v1 --method ppo`: {', '.join((*PROCESSES, *DYNAMICS))}, or another id of Gymnasium"
        )
    if words[0] == "eval":
        _evaluate(words[1:], choices)
        return
    if choices.method not in EVERY:
        told = f"--method {choices.method}: {hint(choices.method, EVERY)}" if choices.method else "--method is missing"
        raise UsageError(f"{told}; methods: {', '.join(EVERY)}")
    name, document = _environment(words[0]), Document()
    stray = next((word for word in words[1:] if "=" not in word), None)
    if stray is not None:
        raise UsageError(f"`{stray}` is no setting: settings are key=value, as in lr=1e-3")
    override(document, words[1:])
    if choices.method in METHODS:
        _control(name, document.values, choices)
    elif name in PROCESSES:
        _tabular(name, document.values, choices)
    else:
        raise UsageError(
            f"{choices.method} needs a finite process with known states: {', '.join(PROCESSES)}; for {name} use {', '.join(METHODS)}"
        )


def _environment(word: str) -> str:
    """The id that a word means: case and version may be left out; an id that nobody knows names the nearest."""
    known = (*PROCESSES, *DYNAMICS)
    for name in known:
        if word.lower() in (name.lower(), name.lower().rpartition("-v")[0]):
            return name
    if near := nearest(word, [*known, *(name.rpartition("-v")[0] or name for name in known)]):
        raise UsageError(f"no environment `{word}`: did you mean `{near}`?")
    registered = list(gymnasium().registry)
    if word not in registered:
        raise UsageError(
            f"no environment `{word}`: {hint(word, registered) if nearest(word, registered) else 'known: ' + ', '.join(known) + ', and the ids of Gymnasium'}"
        )
    return word


def _place(choices: Choices, name: str) -> Path:
    place = Path(choices.root) / (choices.name or auto_name(f"classic-{choices.method}", name))
    if place.exists():
        raise UsageError(f"{place} exists already, and nothing is overwritten: choose another --name, or none (one is made up)")
    return place


def _say(text: str, choices: Choices) -> None:
    if not choices.quiet:
        print(inert(text, newline="\n"), flush=True)


# ---------------------------------------------------------------------------------------------- finite processes


def _tabular(name: str, given: dict[str, Any], choices: Choices) -> None:
    seed, slippery = _seed(given), given.pop("slippery", None)
    kinds: dict[str, Any] = {"value-iteration": ValueIteration(), "policy-iteration": PolicyIteration()}
    own = kinds.get(choices.method, Tabular())
    if name == "CliffWalking-v1":
        own = replace(own, discount=1.0, **({"episodes": 500, "alpha": 0.5} if isinstance(own, Tabular) else {}))
    elif name == "SuttonBarto-5x5":
        own = replace(own, discount=0.9)
    settings = build_piece(given, {}, own, choices.method) if given else own
    mdp = _process(name, settings.discount, slippery)
    if choices.method in PLANNING:
        found = value_iteration(mdp, theta=settings.theta) if choices.method == "value-iteration" else policy_iteration(mdp)
        values, policy = found.values, found.policy
        unit = "sweeps" if choices.method == "value-iteration" else "rounds"
        _say(
            f"{choices.method} on {name}, discount {settings.discount:g}: {found.sweeps} {unit}, at most {found.bound:.2g} below the best",
            choices,
        )
    else:
        limit = mdp.limit or (None if bool(mdp.terminal.any()) else 100)
        learned = LEARNING[choices.method](
            mdp, episodes=settings.episodes, alpha=settings.alpha, epsilon=settings.epsilon, seed=seed, limit=limit
        )
        values, policy = learned.q.amax(-1), learned.policy
        _say(curve(f"{choices.method} on {name}: return of an episode while learning", learned.returns.tolist()), choices)
    _say(pictures.tabular(mdp, values, policy), choices)
    _say(_worth(mdp, policy), choices)
    _say(pictures.walk(mdp, policy, seed), choices)
    place = _place(choices, name)
    saving.save_table(place, {"policy": policy, "values": values}, {
        "environment": name, "method": choices.method, "seed": seed, "slippery": slippery, "settings": saving.plain(settings),
    })  # fmt: skip
    _say(f"saved in {place}; `tilt classic eval {place}` judges it again", choices)


def _process(name: str, discount: float, slippery: bool | None) -> MDP:
    if slippery is not None and name not in ("FrozenLake-v1", "FrozenLake8x8-v1", "CliffWalking-v1"):
        raise UsageError(f"slippery has no effect on {name}: FrozenLake and CliffWalking have ice")
    if not isinstance(slippery, bool | None):
        raise UsageError(f"slippery={slippery!r} must be true or false")
    return PROCESSES[name](discount=discount, **({} if slippery is None else {"slippery": slippery}))


def _worth(mdp: MDP, policy: torch.Tensor) -> str:
    """The exact value of a policy from the start, and within the time limit, undiscounted."""
    parts = []
    try:
        parts.append(f"exact value of this policy from the start, discounted: {float(gain(mdp, policy)):.6f}")
    except UsageError:
        parts.append("from the start this policy may go on earning for ever, so undiscounted it has no value")
    if mdp.limit is not None:
        found = evaluate_to_horizon(replace(mdp, discount=1.0), policy)
        parts.append(f"undiscounted within {mdp.limit} steps: {float((mdp.start * found[0]).sum()):.6f}")
    return "; ".join(parts)


# ---------------------------------------------------------------------------------------------- control


def _control(name: str, given: dict[str, Any], choices: Choices) -> None:
    seed, chosen = _seed(given), preset(choices.method, name)
    steps = given.pop("steps", chosen.steps)
    if not isinstance(steps, int) or isinstance(steps, bool) or steps < 1:
        raise UsageError(f"steps={steps!r} must be a whole number of at least 1")
    settings = _settings(chosen.settings, given, choices.method)
    many = _make(name, settings.envs, seed)
    if choices.method == "dqn" and isinstance(many.actions, Continuous):
        raise UsageError(
            f"dqn takes the best of finitely many actions, and those of {name} are continuous: use ppo, ppo-kl, trpo, a2c or reinforce"
        )
    place, start = _place(choices, name), time.perf_counter()
    _say(f"{choices.method} on {name}: {steps:,} steps in {settings.envs} environment(s), seed {seed}", choices)
    trained = train(settings, many, steps=steps, seed=seed, name=name, method=choices.method, progress=_progress(choices, start))
    seconds = time.perf_counter() - start
    judged = evaluate(trained.agent, _make(name, choices.episodes, seed), seed=seed + 10_000, deterministic=not choices.stochastic)
    if trained.finished:
        _say(
            curve(f"{choices.method} on {name}: return of an episode while learning", [earned for _, earned, _ in trained.finished]),
            choices,
        )
    _say(_result(judged, choices), choices)
    _say(pictures.episode(trained.agent, _make(name, 1, seed), seed), choices)
    record = {"steps": trained.steps, "seconds": round(seconds, 1), "evaluation": _judgement(judged, choices)}
    saving.save(trained.agent, place, record)
    lines = [f"{step},{earned:g},{length}" for step, earned, length in trained.finished]
    (place / "episodes.csv").write_text("\n".join(["steps,return,length", *lines]) + "\n", encoding="utf-8")
    _say(f"saved in {place} after {seconds:.0f} s; `tilt classic eval {place}` judges it again", choices)


def _make(name: str, count: int, seed: int) -> Environments:
    return OneHot(PROCESSES[name](discount=0.99), count, seed) if name in PROCESSES else environments(name, count, seed)


def _seed(given: dict[str, Any]) -> int:
    seed = given.pop("seed", 0)
    if not isinstance(seed, int) or isinstance(seed, bool) or seed < 0:
        raise UsageError(f"seed={seed!r} must be a whole number that is not negative")
    return seed


def _settings(own: OnPolicy | DeepQ, given: dict[str, Any], method: str) -> OnPolicy | DeepQ:
    """Settings of a method with `key=value` and, of a row, `slot.key=value` applied."""
    slots = {key: given.pop(key) for key in list(given) if key in saving.SLOTS}
    if slots and isinstance(own, DeepQ):
        raise UsageError(f"`{next(iter(slots))}` is a choice of a row, and dqn is none: its settings are {', '.join(saving.plain(own))}")
    if slots:
        assert isinstance(own, OnPolicy)
        changed = {slot: build_piece(value, PIECES[slot], getattr(own.row, slot), slot) for slot, value in slots.items()}
        own = replace(own, row=replace(own.row, **changed))
    if "row" in given:
        raise UsageError(f"the choices of a row are set by their slots, as in surrogate.high=0.3: {', '.join(saving.SLOTS)}")
    return build_piece(given, {}, own, method) if given else own


def _progress(choices: Choices, start: float) -> Any:
    """Tells of each tenth of the training once it has been reached."""
    told = 0

    def tell(report: Report) -> None:
        nonlocal told
        reached = min(10, report.steps * 10 // report.total)
        if reached > told:
            told = reached
            speed = report.steps / (time.perf_counter() - start)
            _say(f"  {report.steps:>9,} steps   return of the last 100 episodes {report.recent:8.1f}   {speed:,.0f} steps/s", choices)

    return tell


def _judgement(earned: np.ndarray, choices: Choices) -> dict[str, Any]:
    kind = "stochastic" if choices.stochastic else "deterministic"
    return {"policy": kind, "episodes": len(earned), "mean": float(earned.mean()), "std": float(earned.std())}


def _result(earned: np.ndarray, choices: Choices) -> str:
    kind = "drawn" if choices.stochastic else "likeliest"
    half = 1.96 * float(earned.std()) / len(earned) ** 0.5
    return f"{len(earned)} episodes with the {kind} actions: mean {earned.mean():.1f} ± {half:.1f} (95 %), from {earned.min():.1f} to {earned.max():.1f}"


def _evaluate(words: Sequence[str], choices: Choices) -> None:
    """`tilt classic eval RUN [seed=…]`."""
    if not words:
        raise UsageError("name the folder of a saved agent, as in `tilt classic eval runs/NAME`")
    document = Document()
    override(document, words[1:])
    seed = _seed(document.values)
    if document.values:
        raise UsageError(f"`{next(iter(document.values))}` has no effect on eval: it takes seed=…, --episodes and --stochastic")
    folder = Path(words[0])
    if saving.is_table(folder):
        tensors, told = saving.load_table(folder)
        mdp = _process(told["environment"], told["settings"]["discount"], told["slippery"])
        print(f"{told['method']} on {told['environment']}\n{_worth(mdp, tensors['policy'])}\n{pictures.walk(mdp, tensors['policy'], seed)}")
        return
    agent, told = saving.load(folder)
    many = _make(agent.environment, choices.episodes, seed)
    _check(agent, many)
    judged = evaluate(agent, many, seed=seed + 10_000, deterministic=not choices.stochastic)
    print(
        f"{agent.method} on {agent.environment}, trained for {told.get('steps', '?')} steps with seed {agent.seed}\n{_result(judged, choices)}"
    )
    print(inert(pictures.episode(agent, _make(agent.environment, 1, seed), seed), newline="\n"))


def _check(agent: Agent, many: Environments) -> None:
    if agent.actions != many.actions:
        raise UsageError(
            f"the agent acts in {agent.actions}, and {agent.environment} takes {many.actions}: another version of the environment?"
        )
