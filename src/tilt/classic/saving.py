"""An agent as a folder: agent.json says what it is and how it was trained, weights.safetensors holds its networks and the statistics of its observations."""

from __future__ import annotations

import json
import os
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

import tilt
from tilt.classic.agents import Agent
from tilt.classic.deep_q import DeepQ
from tilt.classic.dynamics import Continuous, Discrete
from tilt.classic.networks import ActionValues, Critic, Policy
from tilt.classic.normalisation import Running
from tilt.classic.on_policy import OnPolicy
from tilt.errors import DataError, UsageError
from tilt.objectives.objective import Objective
from tilt.objectives.pieces import PIECES

SLOTS = ("credit", "ratio", "surrogate", "average", "penalty", "value", "bonus", "control")


def save(agent: Agent, folder: Path, record: dict[str, Any] | None = None) -> Path:
    """Write an agent into a new folder, with a further record of its training."""
    tensors = {f"policy.{name}": x for name, x in agent.policy.state_dict().items()}
    if agent.critic is not None:
        tensors |= {f"critic.{name}": x for name, x in agent.critic.state_dict().items()}
    if agent.observed is not None:
        tensors |= {f"observed.{name}": torch.from_numpy(x) for name, x in agent.observed.state().items()}
    told = {
        "tilt": tilt.__version__,
        "environment": agent.environment,
        "method": agent.method,
        "seed": agent.seed,
        "observation": _width(agent),
        "actions": plain(agent.actions),
        "settings": plain(agent.settings),
        **(record or {}),
    }
    return _write(folder, "agent.json", tensors, told)


def save_table(folder: Path, tensors: dict[str, torch.Tensor], told: dict[str, Any]) -> Path:
    """Write what was found for a finite process into a new folder: its tensors, and table.json."""
    return _write(folder, "table.json", tensors, {"tilt": tilt.__version__, **told})


def is_table(folder: Path) -> bool:
    """Whether a folder holds what was found for a finite process."""
    return (folder / "table.json").exists()


def load_table(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The tensors of a folder, and what table.json says."""
    return _read(folder, "table.json")


def _write(folder: Path, name: str, tensors: dict[str, torch.Tensor], told: dict[str, Any]) -> Path:
    try:
        folder.mkdir(parents=True)
    except FileExistsError:
        raise UsageError(f"{folder} exists already, and nothing is overwritten: choose another name") from None
    save_file({key: x.detach().clone().contiguous() for key, x in tensors.items()}, folder / "weights.safetensors")
    written = folder / f"{name}.part"
    written.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    os.replace(written, folder / name)
    return folder


def _read(folder: Path, name: str) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    try:
        told = json.loads((folder / name).read_text(encoding="utf-8"))
        return load_file(folder / "weights.safetensors"), told
    except FileNotFoundError as error:
        raise UsageError(f"{folder} holds no saved agent: {Path(str(error.filename or error)).name} is missing") from None
    except ValueError as error:
        raise DataError(f"{folder}/{name} is damaged: {error}") from None


def load(folder: Path) -> tuple[Agent, dict[str, Any]]:
    """The agent of a folder, and everything that agent.json says."""
    tensors, told = _read(folder, "agent.json")
    actions = Discrete(**told["actions"]) if "count" in told["actions"] else Continuous(*(tuple(x) for x in told["actions"].values()))
    settings, size, seed = _settings(told["settings"]), told["observation"], told["seed"]

    def part(name: str) -> dict[str, torch.Tensor]:
        return {key.removeprefix(f"{name}."): x for key, x in tensors.items() if key.startswith(f"{name}.")}

    critic = None
    if isinstance(settings, DeepQ):
        assert isinstance(actions, Discrete)
        policy: Any = ActionValues(size, actions.count, settings.hidden, settings.activation, seed)
        policy.to(torch.float64 if settings.dtype == "float64" else torch.float32)
    else:
        policy = Policy(size, actions, settings.hidden, settings.activation, seed)
        critic = Critic(size, settings.hidden, settings.activation, seed)
        critic.load_state_dict(part("critic"))
    policy.load_state_dict(part("policy"))
    seen = part("observed")
    observed = Running.restored({name: x.numpy() for name, x in seen.items()}) if seen else None
    return Agent(told["environment"], told["method"], settings, actions, policy, critic, observed, seed), told


def plain(value: Any) -> Any:
    """Settings as JSON: a row as {slot: {piece: its numbers}}, whatever else by its fields."""
    if isinstance(value, Objective):
        return {slot: _tagged(slot, getattr(value, slot)) for slot in SLOTS}
    if is_dataclass(value):
        return {f.name: plain(getattr(value, f.name)) for f in fields(value)}
    return list(value) if isinstance(value, tuple) else value


def _tagged(slot: str, piece: Any) -> dict[str, Any]:
    name = next(name for name, kind in PIECES[slot].items() if type(piece) is kind)
    return {name: {f.name: getattr(piece, f.name) for f in fields(piece)}}


def _settings(told: dict[str, Any]) -> OnPolicy | DeepQ:
    rest: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in told.items() if name != "row"}
    if "row" not in told:
        return DeepQ(**rest)
    pieces = {slot: PIECES[slot][name](**numbers) for slot, one in told["row"].items() for name, numbers in one.items()}
    return OnPolicy(Objective(**pieces), **rest)


def _width(agent: Agent) -> int:
    """The length of an observation vector: the inputs of the first layer."""
    first = next(p for p in agent.policy.parameters() if p.dim() == 2)
    return int(first.shape[1])
