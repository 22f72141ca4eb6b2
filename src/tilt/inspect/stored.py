"""A batch of a finished or running run, from the rollouts that it stored."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tilt.errors import DataError, UsageError
from tilt.inspect.fixtures import Batch
from tilt.objectives import Layout, Objective, Outputs, Rewards, Signals, TrustRegion
from tilt.runs import rollout_store

HALF = "log-probabilities are stored in half precision: differences of them are good to about 1e-3"


def stored_batch(run: Path, step: int | None) -> tuple[Batch, int]:
    """The batch of a step (by default the last one that has its token channels), and its number. The policy is the one that the last pass of the update saw."""
    folder = run / "rollouts"
    steps = rollout_store.stored(folder)
    if not steps:
        raise DataError(f"{run} holds no rollouts: a run of `tilt rl` stores them in rollouts/, every `rollouts_every` steps")
    full = [number for number in steps if rollout_store.has_channels(rollout_store.path_of(folder, number))]
    if not full:
        raise DataError(f"{folder} holds no token channels: set `rollouts_every` above 0")
    number = full[-1] if step is None else step
    if number not in full:
        raise DataError(f"{folder} holds no token channels of step {number}; it holds those of {', '.join(map(str, full))}")
    rows = rollout_store.read(rollout_store.path_of(folder, number))
    if not any(sum(row["mask"]) for row in rows):
        raise DataError(f"{rollout_store.path_of(folder, number)} holds no sampled token")
    return batch_of(rows), number


def batch_of(rows: list[dict[str, Any]]) -> Batch:
    """Stored rows as an objective reads them, in float64; what was not stored is NaN."""
    names: dict[int, int] = {}
    prompts = [names.setdefault(row["group_id"], len(names)) for row in rows]
    layout = Layout.of([sum(row["mask"]) for row in rows], prompts)
    reward = torch.tensor([torch.nan if row["reward"] is None else row["reward"] for row in rows], dtype=torch.float64)
    old, reference, values = (_channel(rows, name, layout) for name in ("old_logprobs", "reference_logprobs", "value"))
    new, moved = _channel(rows, "new_logprobs", layout), _channel(rows, "delta_ref", layout)
    untrained = new.isnan()
    policy = torch.where(untrained, old, new)
    reference = torch.where(moved.isnan(), reference, policy - moved)
    signals = Signals.of(
        old, sampler=_channel(rows, "sampler_logprobs", layout), reference=reference, values=values, entropy=_channel(rows, "entropy", layout),
        final=torch.zeros(layout.sequences, dtype=torch.float64),
    )  # fmt: skip
    said = [HALF]
    if not values.isnan().all():
        said.append("the critic's values are those before the update; the new ones are not stored, so its loss is shown at the old ones")
    if untrained.any():
        said.append("answers that the update left out are shown with policy = old")
    return Batch(
        Rewards.of(reward, scored=~reward.isnan(), actions=layout.actions), signals, layout,
        Outputs.of(
            policy.requires_grad_(), values=values.clone().requires_grad_(), entropy=_channel(rows, "entropy", layout), sequences=layout.sequences
        ),
        [row["completion"] for row in rows], said,
    )  # fmt: skip


def _channel(rows: list[dict[str, Any]], name: str, layout: Layout) -> Tensor:
    """A token channel on the action axis, [A]; NaN where it is not stored."""
    found = [
        torch.nan if row.get(name) is None or row[name][i] is None else float(row[name][i])
        for row in rows
        for i, chosen in enumerate(row["mask"])
        if chosen
    ]
    assert len(found) == layout.actions
    return torch.tensor(found, dtype=torch.float64)


MISSING: Mapping[str, str] = {
    "reference": "the reference's log-probabilities", "values": "a critic's values", "sampler": "the sampler's log-probabilities", "entropy": "entropies",
}  # fmt: skip


def check_readable(row: Objective, batch: Batch, name: str, where: str) -> None:
    """Refuse a row that reads what the batch has not."""
    missing = [text for need, text in MISSING.items() if need in row.needs and getattr(batch.signals, need).isnan().all()]
    if row.bonus.coefficient and batch.outputs.entropy.isnan().all():
        missing.append("entropies")
    if row.against != "none" and not isinstance(row.penalty, TrustRegion):
        missing.append("distributions over the whole vocabulary")
    if missing:
        raise UsageError(
            f"{name} reads {' and '.join(dict.fromkeys(missing))}, and {where} has none: trace a run of {name} (--run), or another algorithm here"
        )
