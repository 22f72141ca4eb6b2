"""What every recipe leaves: the trained model as a plain checkpoint, the numbers of its last evaluation, and where it failed the batch that did it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from tilt.errors import NumericError
from tilt.learning.ema import Ema
from tilt.learning.learner import NonFinite
from tilt.models.policy import Critic, Policy
from tilt.models.saving import copied, snapshot
from tilt.runs.directory import RunDirectory
from tilt.runs.files import atomic_write

HEAD = "value_head.safetensors"


@dataclass(frozen=True)
class Result:
    """A finished run: its directory, the checkpoint it wrote (the directory itself where none), its measures before and after, and
    (prompt, answer before, answer after) for held-out prompts where answers were sampled."""

    directory: RunDirectory
    checkpoint: Path
    before: Mapping[str, float] = field(default_factory=dict)
    after: Mapping[str, float] = field(default_factory=dict)
    answers: tuple[tuple[str, str, str], ...] = ()


def beside(policy: Policy, tokenizer: Any, critic: Critic | None, ema: Ema | None) -> Callable[[Path], None]:
    """What lies beside the policy in its folder, copied now and written later: `value_head.safetensors` of a shared body, or `critic/` (a body with its
    head); and the average of the policy's weights as a folder like its own, `ema/`."""
    writes: list[Callable[[Path], None]] = []
    if ema is not None:
        with ema.applied():
            average = snapshot(policy.lm, tokenizer)
        writes.append(lambda place: average(place / "ema"))
    if policy.value_head is not None:
        shared = copied(policy.value_head.state_dict())
        writes.append(lambda place: save_file(shared, place / HEAD))
    if critic is not None:
        body, head = snapshot(critic.body, tokenizer), copied(critic.head.state_dict())
        writes += [lambda place: body(place / "critic"), lambda place: save_file(head, place / "critic" / HEAD)]

    def write(place: Path) -> None:
        for each in writes:
            each(place)

    return write


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
