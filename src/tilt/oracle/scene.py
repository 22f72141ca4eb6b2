"""Where rows are audited: two prompts of different difficulty, fifteen answers of lengths 1 to 3, policies in fifths, exact critics."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

from tilt.objectives import NoBonus, NoControl, NoPenalty, Objective
from tilt.oracle import token_mdp as exact
from tilt.oracle.expectation import Situation, ascent, batched
from tilt.oracle.token_mdp import Answer, TokenMDP

Kind = Literal["general", "binary", "dense"]
STOP = 2


@dataclass(frozen=True)
class Scene:
    """An MDP, the policy that is trained on it, and the policy that wrote the demonstrations: `general`, `binary` or `dense` rewards."""

    mdp: TokenMDP
    policy: Tensor
    writer: Tensor

    @staticmethod
    def of(kind: Kind = "general") -> Scene:
        """Fifteen answers, probabilities in fifths."""
        mdp = TokenMDP.of({"general": _general, "binary": _binary, "dense": _nothing}[kind], steps=_steps if kind == "dense" else _no_steps)
        return Scene(replace(mdp, reference=mdp.tilted(0.9, seed=5)), mdp.in_parts(5, seed=3), mdp.in_parts(5, seed=6))

    @staticmethod
    def small(kind: Kind = "general", parts: int = 2) -> Scene:
        """Four answers of lengths 1, 2, 3, 3 (one token and a stop), probabilities 1/2: the limit of groups of four fits in one batch."""
        table = {
            "general": ((0.4, 1.0, -0.7, 0.1), (-1.0, 0.0, 0.3, 2.0)),
            "binary": ((1, 0, 0, 0), (0, 0, 0, 1)),
            "dense": ((0,) * 4,) * 2,
        }[kind]
        steps = _steps if kind == "dense" else _no_steps
        mdp = TokenMDP.of(lambda g, answer: table[g][len(answer) - (answer[-1] == 1)], vocabulary=2, steps=steps)
        return Scene(replace(mdp, reference=mdp.tilted(0.9, seed=5)), mdp.in_parts(parts, seed=9), mdp.in_parts(parts, seed=0))

    @staticmethod
    def fit(row: Objective, kind: Kind = "general") -> Scene:
        """The larger one where the row takes many batches at once, else four answers in fifths."""
        return Scene.of(kind) if batched(row, Scene.small(kind).at(row)) else Scene.small(kind, parts=5)

    @cached_property
    def length(self) -> float:
        """E[n] under the policy."""
        return exact.answer_mean(self.mdp, self.policy, self.mdp.layout.lengths.to(torch.float64)).item()

    def at(self, row: Objective, samples: int = 2, *, critic: Tensor | None = None) -> Situation:
        """On-policy, with a critic that is exact for the row's own KL in the reward and discount; a row that imitates gets the writer's answers."""
        kl, gamma = (getattr(row.credit, name, default) for name, default in (("kl", 0.0), ("gamma", 1.0)))
        right = exact.state_values(self.mdp, self.policy, kl=kl, gamma=gamma) if critic is None else critic
        return Situation.of(self.mdp, samples, self.policy, critic=right)

    def given(self, samples: int = 2) -> Situation:
        """Answers of the writer, as demonstrations are."""
        return Situation.of(self.mdp, samples, self.policy, sampler=self.writer)


def _general(prompt: int, answer: Answer) -> float:
    """Every answer earns something else: it depends on tokens, order, length and the stop; the second prompt pays well for one answer in fifteen."""
    shared = 0.07 * len(answer) ** 0.5 + 0.013 * sum((t + 1) ** 2 * token for t, token in enumerate(answer)) ** 0.5
    if prompt == 1:
        return shared + 2.0 * (answer == (1, 0, STOP)) - 0.3 * (answer[0] == STOP)
    return shared + 0.9 * answer.count(0) - 0.4 * (answer[-1] != STOP) - 0.6 * (answer[0] == 1)


def _binary(prompt: int, answer: Answer) -> float:
    """0 or 1; the second prompt is solved by one answer in fifteen."""
    return float(answer == (1, 0, STOP)) if prompt == 1 else float(0 in answer)


def _nothing(prompt: int, answer: Answer) -> float:
    return 0.0


def _no_steps(prompt: int, answer: Answer) -> list[float]:
    return [0.0] * len(answer)


def _steps(prompt: int, answer: Answer) -> list[float]:
    """Causal: what the token of place t earns depends on the tokens up to t."""
    return [0.3 + 0.5 * (token == prompt) - 0.2 * t - 0.1 * sum(answer[:t]) for t, token in enumerate(answer)]


def policy_part(row: Objective) -> Objective:
    """The row without its penalty and its bonus."""
    return replace(row, penalty=NoPenalty(), bonus=NoBonus(), control=NoControl())


def without_kl(row: Objective) -> Objective:
    """The row that pays nothing for KL in the reward."""
    return replace(row, credit=_unpaid(row.credit))


def _unpaid(credit: Any) -> Any:
    """The credit with kl 0, also where another credit holds it."""
    changes = {f.name: 0.0 if f.name == "kl" else _unpaid(credit.credit) for f in fields(credit) if f.name in ("kl", "credit")}
    return replace(credit, **changes) if getattr(credit, "kl", 0.0) else credit


def reads(row: Objective, scene: Scene) -> bool:
    """Whether the gradient changes when the rewards do."""
    at, other = scene.at(row), replace(scene, mdp=replace(scene.mdp, rewards=scene.mdp.rewards.flip(1), steps=scene.mdp.steps.flip(1)))
    drawn = torch.randint(scene.mdp.answers_count, (16, at.sequences), generator=torch.Generator().manual_seed(0))
    return bool((ascent(row, at, drawn) != ascent(row, replace(at, mdp=other.mdp), drawn)).any().item())
