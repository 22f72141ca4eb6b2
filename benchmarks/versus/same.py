"""Whether both libraries compute the same from the same rollouts: advantages, loss and gradient of one step, `grpo` and `dapo`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import workloads as shared
from transformers import AutoModelForCausalLM, AutoTokenizer

from tilt.data.packing import pack
from tilt.data.rollouts import Prompt, Rollout, Sampling
from tilt.models import compat
from tilt.models.policy import Policy
from tilt.objectives import ALGORITHMS, GroupRelative, NoPenalty, Rewards, Signals
from tilt.objectives.policy import SequenceAverage, TokenAverage

EPS = 1e-4  # what TRL adds to a group's standard deviation


def rollouts_of(parts: list[dict[str, Any]]) -> list[Rollout]:
    """TRL's padded tensors as rollouts, in its order."""
    found: list[Rollout] = []
    for part in parts:
        for row in range(len(part["prompt_ids"])):
            prompt = part["prompt_ids"][row][part["prompt_mask"][row].bool()].tolist()
            answer = part["completion_ids"][row][part["completion_mask"][row].bool()].tolist()
            number = len(found)
            asked = Prompt(tuple(prompt), hash(tuple(prompt)) % 2**31)
            found.append(
                Rollout(asked, tuple(answer), (True,) * len(answer), (0.0,) * len(answer), "stop", Sampling(), 0, (0, 0, asked.id, number))
            )
    return found


def compared(folder: Path, kept: dict[str, Any], loss: str) -> dict[str, float]:
    """Largest differences between TRL's step and the same step computed here, relative where said."""
    parts = kept["parts"]
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    rollouts = rollouts_of(parts)
    earned = torch.tensor([shared.worth(tokenizer.decode(r.tokens, skip_special_tokens=True)) for r in rollouts])
    row = replace(
        ALGORITHMS["grpo"], credit=GroupRelative(scale="group_std", ddof=1, eps=EPS), penalty=NoPenalty(),
        average=TokenAverage() if loss == "dapo" else SequenceAverage(),
    )  # fmt: skip
    compat.quiet()
    lm = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    compat.use_attention(lm, "tilt")
    policy, batch = Policy(lm), pack(rollouts)
    said = policy(batch)
    experience = row.prepare(Rewards.of(earned), Signals.of(said.logprobs.detach()), batch.layout)
    value = row.loss(said, experience)
    value.backward()
    theirs = torch.cat([part["advantages"].flatten() for part in parts])
    ours = experience.advantages[batch.layout.last]
    gradient = {name: p.grad for name, p in lm.named_parameters() if p.grad is not None}
    far = torch.stack([(gradient[n] - g).norm() for n, g in kept["gradient"].items()]).norm()
    whole = torch.stack([g.norm() for g in kept["gradient"].values()]).norm()
    return {
        "advantages": float((theirs - ours).abs().max()),
        "loss": abs(float(sum(part["loss"] for part in parts)) - float(value.detach())),
        "gradient, relative": float(far / whole),
    }


def told(name: str, found: dict[str, float]) -> str:
    return f"{name}: " + ", ".join(f"{key} differ by {value:.1e}" for key, value in found.items())


def read(path: Path) -> dict[str, Any]:
    return torch.load(path, weights_only=True)  # type: ignore[no-any-return]
