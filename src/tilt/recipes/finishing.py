"""What every recipe leaves: the trained model as a plain checkpoint, the numbers of its last evaluation, and where it failed the batch that did it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from tilt.errors import NumericError
from tilt.learning.ema import Ema
from tilt.learning.learner import NonFinite
from tilt.models import compat
from tilt.models.policy import Critic, Policy
from tilt.models.saving import save
from tilt.runs import checkpoints
from tilt.runs.directory import RunDirectory
from tilt.runs.files import atomic_write


@dataclass(frozen=True)
class Result:
    """A finished run: its directory, the checkpoint it wrote (the directory itself where none), its measures before and after, and
    (prompt, answer before, answer after) for held-out prompts where answers were sampled."""

    directory: RunDirectory
    checkpoint: Path
    before: Mapping[str, float] = field(default_factory=dict)
    after: Mapping[str, float] = field(default_factory=dict)
    answers: tuple[tuple[str, str, str], ...] = ()


def saved(directory: RunDirectory, step: int, write: Callable[[Path], None], wanted: bool) -> Path:
    """The checkpoint of the last step, written unless it is there already, or the run's directory where none is wanted."""
    if wanted and step in checkpoints.saved(directory.checkpoints):
        return checkpoints.latest(directory.checkpoints)
    return checkpoints.save(directory.checkpoints, step, write) if wanted else directory.path


def write_policy(policy: Policy, tokenizer: Any, critic: Critic | None, ema: Ema | None, place: Path) -> None:
    """The policy as an ordinary folder; beside it what its critic knows: `value_head.safetensors` of a shared body, or `critic/` (a body with its head);
    and the average of its weights as a folder like its own, `ema/`."""
    save(policy.lm, tokenizer, place)
    if ema is not None:
        with ema.applied():
            save(policy.lm, tokenizer, place / "ema")
    if policy.value_head is not None:
        _write_head(policy.value_head, place)
    if critic is not None:
        compat.write(critic.body, tokenizer, place / "critic", None)
        _write_head(critic.head, place / "critic")


def _write_head(head: nn.Module, place: Path) -> None:
    save_file({name: value.detach().cpu().contiguous() for name, value in head.state_dict().items()}, place / "value_head.safetensors")


@contextmanager
def keeping(directory: RunDirectory, step: int) -> Iterator[None]:
    """What is not finite stops the run with the term named and the offending micro-batch kept as plain tensors."""
    try:
        yield
    except NonFinite as error:
        kept = directory.path / f"bad_batch_step_{step:06d}.pt"
        found = {"step": step, "term": error.term, "batch": _plain(error.batch), "experience": _plain(error.experience)}
        atomic_write(kept, lambda temporary: torch.save(found, temporary))
        raise NumericError(
            f"step {step}: {error.term} is not finite; the update was not applied\n"
            f"  kept: {kept} holds the micro-batch (read it with torch.load)\n"
            "  mend: lower the learning rate, clip the gradient (optimizer.clip_norm), and look at the data and rewards of this step"
        ) from error


def _plain(value: Any) -> Any:
    """Dataclasses as mappings of tensors, so that reading them back runs no code."""
    if is_dataclass(value):
        return {f.name: _plain(getattr(value, f.name)) for f in fields(value)}
    return value.detach().cpu() if isinstance(value, Tensor) else value
