"""Workers judge the answers to one prompt beside those to others, while others are still generated if they may: the same calls as afterwards."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

from tilt.data.rollouts import Rollout
from tilt.rewards.functions import Scored
from tilt.rewards.text import Text

Group = tuple[Any, ...]


@dataclass
class Ahead:
    """A function called once for the answers to each prompt, by as many threads as it has workers, each of which waits for one.

    `begin` starts a call, and the call of the whole batch takes what has been begun; what has not begins then. So neither scores nor errors depend on
    when a call began or how many workers there are: the first failure by the order of the prompts is the one that is told. `early` says whether calls are to
    begin before the batch is there.
    """

    call: Callable[[Sequence[Rollout], Sequence[Text]], Scored]
    workers: int = 1
    early: bool = True
    begun: dict[Group, Future[Scored]] = field(default_factory=dict)
    pool: ThreadPoolExecutor = field(init=False)

    def __post_init__(self) -> None:
        self.pool = ThreadPoolExecutor(self.workers, "reward")

    def begin(self, rollouts: Sequence[Rollout], texts: Sequence[Text]) -> None:
        """Let a worker judge the answers to one prompt, after those that were begun before."""
        self.begun[_key(rollouts)] = self.pool.submit(self.call, rollouts, texts)

    def __call__(self, rollouts: Sequence[Rollout], texts: Sequence[Text]) -> Scored:
        """Scores of all answers, prompt by prompt: 2 prompts with 3 answers each are 2 calls of 3."""
        keys = []
        for _, pairs in groupby(zip(rollouts, texts, strict=True), lambda pair: (pair[0].prompt.id, pair[0].prompt.tokens)):
            own, said = zip(*pairs, strict=True)
            keys.append(_key(own))
            if keys[-1] not in self.begun:
                self.begin(own, said)
        found = [future.result() for future in [self.begun.pop(key) for key in keys]]
        message = next((each.message for each in found if each.message), "")
        return Scored([value for each in found for value in each.values], sum(each.failures for each in found), message)

    def close(self) -> None:
        """Begin nothing more."""
        self.pool.shutdown(wait=False, cancel_futures=True)


def _key(rollouts: Sequence[Rollout]) -> Group:
    return tuple((r.prompt.id, r.seed, r.tokens) for r in rollouts)
