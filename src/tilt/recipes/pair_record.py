"""What a step on judged answers says of each of them: stored like rollouts, with what the step asks of every token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from tilt.config import Section
from tilt.learning.judged import Judged
from tilt.learning.pairs import Anchors, Asked, Likelihoods, Precision, Reader, asked
from tilt.models.policy import RewardModel
from tilt.objectives import Preference, Rewards
from tilt.recipes import state
from tilt.recipes.reporting import Shown
from tilt.recipes.scoring import reader as texts_by
from tilt.recipes.session import Session
from tilt.runs import rollout_store
from tilt.segments import segment_sum


class Stored(Section):
    """What of the batches is stored to be looked at."""

    rollouts_every: Annotated[
        int, Field(ge=0, description="steps between batches stored with what was asked of every token; 0 = none at all")
    ] = 10
    channels_mb: Annotated[
        float,
        Field(
            gt=0.0,
            description="megabytes of token channels a run may store, before compression; with half of them used they come half as often, and so on",
        ),
    ] = 64.0


@dataclass
class PairRecorder:
    """Stores some batches before their step: of a policy the log-probability of each token and its push, of a reward model the score read after each
    token (`value`), its push at the sequence."""

    run: Session
    tokenizer: Any
    steps: int
    shown: Shown

    @staticmethod
    def of(config: Any, run: Session, tokenizer: Any, steps: int) -> PairRecorder:
        """As the settings have it; what was stored belongs to the run's state."""
        recorder = PairRecorder(run, tokenizer, steps, Shown(config.rollouts_every, config.channels_mb))
        run.state.add(shown=state.attributes(recorder.shown, "bytes"))
        return recorder

    def __call__(
        self, step: int, reader: Reader, row: Preference, examples: Sequence[Judged], anchors: Anchors | None,
        *, views: Sequence[float] = (1.0,), micro_tokens: int, autocast: Precision,
    ) -> None:  # fmt: skip
        """Store this batch where it is due."""
        if not self.shown.due(step, self.steps):
            return
        found = asked(reader, row, examples, anchors, views=views, micro_tokens=micro_tokens, autocast=autocast)
        rollouts = [answer for example in examples for answer in example.answers]
        with torch.no_grad(), autocast():
            if isinstance(reader, Likelihoods):
                scores, sequences, actions = likelihoods(found, row, None if anchors is None else torch.cat(anchors.said))
            else:
                scores, sequences, actions = scored(found, reader.model)  # type: ignore[attr-defined]
        sequences |= {"role": roles(examples)}
        table = rollout_store.RolloutTable(
            rollouts, texts_by(self.tokenizer)(rollouts), Rewards.of(scores, actions=sum(len(r.tokens) for r in rollouts)), self.tokenizer,
            sequences, actions, group=[i for i, example in enumerate(examples) for _ in example.answers], run=self.run.directory.name,
        )  # fmt: skip
        rollout_store.write(self.run.directory.rollouts, step, table)
        self.shown.bytes += 2 * sum(map(len, actions.values()))


Found = tuple[Tensor, dict[str, Any], dict[str, Tensor]]


def roles(examples: Sequence[Judged]) -> list[str]:
    """chosen and rejected of a pair, rank 1, 2, … of a ranking, good or bad of an answer alone."""

    def of(example: Judged) -> list[str]:
        if not example.paired:
            return ["good" if example.good else "bad"]
        count = len(example.answers)
        return ["chosen", "rejected"] if count == 2 else [f"rank {i + 1}" for i in range(count)]

    return [role for example in examples for role in of(example)]


def likelihoods(found: Sequence[Asked], row: Preference, anchor: Tensor | None) -> Found:
    """Each answer's log-probability, less the reference's and times β where the row has them; per token what the policy says, and its push."""
    new, push = (torch.cat([getattr(one, name).cpu() for one in found]).float() for name in ("said", "push"))
    actions = {"new_logprobs": new, "push": push}
    if anchor is not None:
        gap = new - anchor.float()
        actions |= {"reference_logprobs": anchor, "delta_ref": gap}  # and no KL: these tokens were not drawn from the policy
    scale = getattr(row.link, "beta", None) or getattr(row.margin, "beta", None) or 1.0
    parts = actions.get("delta_ref", new).split([one.laid.pack.layout.actions for one in found])
    sums = [segment_sum(part, one.laid.pack.layout.to("cpu")) for part, one in zip(parts, found, strict=True)]
    return scale * torch.cat(sums), {}, actions


def scored(found: Sequence[Asked], model: RewardModel) -> Found:
    """The score of each answer, what the loss asks of it (`push_score`), and per token the score read after it."""
    scores, pushes, values = [], [], []
    for one in found:
        last, everywhere = one.laid.last, model.everywhere(one.laid.pack).float()
        lengths = torch.tensor([len(answer) for answer in one.laid.answers], device=last.device)
        owner = torch.repeat_interleave(torch.arange(len(lengths), device=last.device), lengths)
        place = torch.arange(int(lengths.sum()), device=last.device) - (lengths.cumsum(0) - lengths)[owner]
        values.append(everywhere[(last - lengths + 1)[owner] + place].cpu())
        scores.append(everywhere[last].cpu())
        asked_of = one.push if len(one.push) == len(last) else per_sequence(one)
        pushes.append(asked_of.float().cpu())
    return torch.cat(scores), {"push_score": torch.cat(pushes)}, {"value": torch.cat(values)}


def per_sequence(one: Asked) -> Tensor:
    """The push at all places where a sequence's score is read, added up, [S]."""
    begins = one.laid.pack.segments.start[one.laid.pack.own]
    order = begins.argsort()
    bounds = torch.cat([begins[order], begins.new_tensor([len(one.push)])])
    sums = torch.stack([one.push[a:b].sum() for a, b in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True)])
    return torch.zeros_like(sums).index_copy(0, order, sums)
