"""Which answers of a step are trained on: groups that differ in what they earned (dynamic sampling, DAPO, 2503.14476), answers that ended by themselves."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice

import torch
from torch import Tensor

from tilt.data.rollouts import Prompt, Rollout
from tilt.objectives import Credit, Layout, Rewards
from tilt.recipes.settings import Keep
from tilt.rewards.score import Report
from tilt.rewards.text import Text


@dataclass(frozen=True)
class Answers:
    """The answers of a step, prompt by prompt, as text, what they earned, and what scoring them cost.

    `selected` says that groups were chosen among those drawn; `dropped` are the answers of the others, None where there are none.
    """

    rollouts: Sequence[Rollout]
    texts: Sequence[Text]
    rewards: Rewards
    report: Report
    selected: bool = False
    dropped: Answers | None = None

    @property
    def drawn(self) -> Answers:
        """With the dropped ones, after the others."""
        return self if self.dropped is None else Answers.join([self, self.dropped])

    @property
    def layout(self) -> Layout:
        """Actions and groups, by prompt id."""
        owners = torch.unique(torch.tensor([r.prompt.id for r in self.rollouts]), return_inverse=True)[1]
        return Layout.of([sum(r.sampled) for r in self.rollouts], owners)

    def take(self, sequences: Tensor) -> Answers:
        """These answers alone."""
        index = sequences.tolist()
        rewards = self.rewards.take(sequences, self.layout)
        return Answers([self.rollouts[i] for i in index], [self.texts[i] for i in index], rewards, self.report)

    @staticmethod
    def join(given: Sequence[Answers]) -> Answers:
        """All answers end to end."""
        return Answers(
            [r for a in given for r in a.rollouts], [t for a in given for t in a.texts], Rewards.join([a.rewards for a in given]),
            Report.join([a.report for a in given]),
        )  # fmt: skip


Ask = Callable[[Sequence[Prompt]], Answers]


def select(first: Answers, ask: Ask, spare: Iterator[Prompt], keep: Keep, credit: Credit) -> Answers:
    """The answers to train on, out of the first draw of a step and of what it takes to fill it from the `spare` prompts; all of them unless `keep` says otherwise."""
    answers = _mixed(first, ask, spare, keep.draws, credit) if keep.mixed else first
    if keep.cut:
        return answers
    whole = torch.tensor([r.stop != "length" for r in answers.rollouts])
    return replace(answers, rewards=replace(answers.rewards, trained=answers.rewards.trained & whole))


def _mixed(first: Answers, ask: Ask, spare: Iterator[Prompt], draws: int, credit: Credit) -> Answers:
    """The groups in which the credit finds a difference. In place of the others as many further prompts are asked, in at most `draws` draws in all.

    Where no group differs, the first draw stands and nothing of it is trained on.
    """
    kept, dropped = _parted(first, credit)
    wanted = first.layout.prompts
    reports = [first.report]
    for _ in range(draws - 1):
        prompts = list(islice(spare, wanted - sum(a.layout.prompts for a in kept)))
        if not prompts:
            break
        more = ask(prompts)
        mixed, flat = _parted(more, credit)
        kept, dropped, reports = kept + mixed, dropped + flat, [*reports, more.report]
    if not kept:
        kept, dropped = [replace(first, rewards=replace(first.rewards, trained=torch.zeros_like(first.rewards.trained)))], dropped[1:]
    return replace(Answers.join(kept), report=Report.join(reports), selected=True, dropped=Answers.join(dropped) if dropped else None)


def _parted(answers: Answers, credit: Credit) -> tuple[list[Answers], list[Answers]]:
    """The answers of groups that differ, and of those that do not; an empty part is left out."""
    flat = alike(answers, credit)[answers.layout.prompt]
    mixed, same = torch.nonzero(~flat).flatten(), torch.nonzero(flat).flatten()
    return ([answers.take(mixed)] if len(mixed) else []), ([answers.take(same)] if len(same) else [])


def alike(answers: Answers, credit: Credit) -> Tensor:
    """Prompts among whose answers the credit finds no difference, [G]; a credit of one's own that does not say looks at what they earned in all."""
    find = getattr(credit, "flat", partial(Credit.flat, credit))
    found: Tensor = find(answers.rewards, answers.layout)
    return found
