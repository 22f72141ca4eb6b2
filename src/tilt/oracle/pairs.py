"""The audit of a row on judged answers: where its loss is stationary, which way its first step goes, and the checks of a batch's form."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from math import log
from time import perf_counter

import torch
from torch import Tensor

from tilt.objectives import Answers, Pairs, Preference, Span
from tilt.objectives import pull as through
from tilt.oracle import token_mdp as exact
from tilt.oracle.checks import CLOSE, MICRO, NAN, Check
from tilt.oracle.token_mdp import Answer, TokenMDP

WORTH = (8, 1, 4, 2)
"""exp(reward) of the answers of lengths 1, 2, 3, 3: every Bradley-Terry chance is a whole number of 45ths."""


@dataclass(frozen=True)
class World:
    """One prompt, four answers of lengths 1, 2, 3, 3 with rewards log 8, 1, 4, 2, and every pair of them labelled as often as Bradley-Terry would, either way."""

    mdp: TokenMDP
    first: Tensor
    second: Tensor

    @staticmethod
    def of(wrong: int = 0) -> World:
        """`wrong` of ten labels are turned round."""
        mdp = TokenMDP.of(lambda g, a: log(WORTH[_number(a)]), prompts=1, vocabulary=2)
        order, labels = [WORTH[_number(a)] for a in mdp.answers], []
        for i in range(4):
            for j in range(i):
                right = 45 * order[i] // (order[i] + order[j])
                wins = right * (10 - wrong) + (45 - right) * wrong
                labels += [(i, j)] * (wins if wrong else right) + [(j, i)] * ((450 - wins) if wrong else 45 - right)
        first, second = torch.tensor(labels).unbind(1)
        return World(replace(mdp, reference=mdp.tilted(0.6, seed=5)), first, second)

    @property
    def rewards(self) -> Tensor:
        return self.mdp.rewards[0]

    def pairs(self, scores: Tensor, actions: Tensor) -> Pairs:
        """All labels, from the score (log-probability) of each answer [4] and of each of their actions [9]."""
        reference = exact.logprobs(self.mdp, self.mdp.reference)[0]
        sides = [
            self._answers(own, other, scores, actions, reference) for own, other in ((self.first, self.second), (self.second, self.first))
        ]
        mismatched = replace(sides[0].take(torch.arange(0, len(self.first), 7)), scores=sides[0].scores[::7].detach())
        count = len(self.first)
        span = Span(scores[self.first], scores[self.second], torch.arange(count))
        return Pairs.of(sides[0], sides[1], mismatched=mismatched, span=span)

    def _answers(self, own: Tensor, other: Tensor, scores: Tensor, actions: Tensor, reference: Tensor) -> Answers:
        lengths = self.mdp.layout.lengths
        shared = torch.minimum(lengths[own], lengths[other])
        upto = torch.cat([actions.new_zeros(1), actions.cumsum(0)]), torch.cat([reference.new_zeros(1), reference.cumsum(0)])
        starts = self.mdp.layout.starts[own]
        heads, anchors = (x[starts + shared] - x[starts] for x in upto)
        return Answers.of(
            scores[own], reference=self.mdp.over_answers(reference[None])[0][own], lengths=lengths[own].double(), heads=heads,
            reference_heads=anchors, confidence=-0.3 * lengths[own].double(),
        )  # fmt: skip

    def policy_pairs(self, logits: Tensor) -> Pairs:
        """All labels as a policy sees them."""
        said = exact.logprobs(self.mdp, logits)
        return self.pairs(self.mdp.over_answers(said)[0], said[0])


def _number(answer: Answer) -> int:
    """Which of the four answers: how many tokens stand before its stop, 3 where it has none."""
    return len(answer) - (answer[-1] == 1)


@dataclass(frozen=True)
class PairAudit:
    """What was found of a row on judged answers. `cosine`: of its first step from the reference with grad E[R], or of scores with the rewards."""

    name: str
    statement: str
    cosine: float
    checks: tuple[Check, ...]
    verdict: str
    seconds: float

    @property
    def mistakes(self) -> tuple[Check, ...]:
        """Each mistake once."""
        return tuple({check.mistake: check for check in self.checks if not check.passed}.values())

    @property
    def sound(self) -> bool:
        return not self.mistakes


def plain(found: PairAudit) -> dict[str, object]:
    """An audit as nested dictionaries."""
    told = asdict(found) | {"sound": found.sound, "mistakes": [asdict(check) for check in found.mistakes]}
    return {key: list(value) if isinstance(value, tuple) else value for key, value in told.items()}


def audit_pairs(row: Preference, name: str = "custom") -> PairAudit:
    """Audit a row on every label that four answers can get."""
    began, world = perf_counter(), World.of()
    checks = [*_checks(row, world), _direction(row, world)]
    cosine, statement = _first_step(row, world), _stationary(row, world)
    failed = "; ".join(dict.fromkeys(check.mistake for check in checks if not check.passed))
    verdict = (
        f"do not train with it: {failed}"
        if failed
        else "sound"
        if statement.startswith("stationary")
        else "usable: `tilt algorithms` with its name says where it goes"
    )
    if not failed and cosine < 0:
        verdict = "usable with care: from the reference it first goes the wrong way"
    return PairAudit(name, statement, cosine, tuple(checks), verdict, perf_counter() - began)


def _reader(row: Preference, world: World) -> Callable[[Tensor], Pairs]:
    """Labels from what the row trains: a score for each answer, or a policy."""
    return world.policy_pairs if row.margin.reads == "likelihood" else lambda x: world.pairs(x, x.repeat(3)[: world.mdp.layout.actions])


def _gradient(row: Preference, world: World, at: Tensor) -> Tensor:
    free = at.clone().requires_grad_()
    return torch.autograd.grad(row.loss(_reader(row, world)(free)), free)[0]


def _first_step(row: Preference, world: World) -> float:
    """Cosine of the first step, from the reference with grad E[R], or of scores, from 0, with the rewards."""
    if row.margin.reads == "score":
        step, up = -_gradient(row, world, torch.zeros(4, dtype=torch.float64)), world.rewards - world.rewards.mean()
    else:
        step = -_gradient(row, world, world.mdp.reference)
        up = exact.gradient(lambda p: exact.expected_reward(world.mdp, p), world.mdp.reference)
    return torch.cosine_similarity(step.flatten(), up.flatten(), dim=0).item()


def _stationary(row: Preference, world: World) -> str:
    """Whether the mean loss over all labels has gradient 0 at the reward (up to a constant), or at the tilted policy."""
    beta = float(getattr(row.margin, "beta", 1.0))
    likely = row.margin.reads == "likelihood"
    at = exact.optimum(world.mdp, beta).policy if likely else world.rewards - world.rewards.mean()
    where = f"the tilted policy, reference * exp(reward / {beta:g}) / Z" if likely else "the true reward, up to a constant"
    wrong = round(10 * float(getattr(row.link, "smoothing", 0.0)))
    for noise in (0, wrong):
        if _gradient(row, World.of(noise), at).norm() < 1e-10:
            return f"stationary at {where}" + (f", where {noise} of ten labels are wrong" if noise else "")
    return "its minimum is not the tilted policy" if likely else "its minimum is not the true reward"


def _direction(row: Preference, world: World) -> Check:
    """The loss of a policy (scores) that follows the rewards is below that of one that follows them the wrong way."""
    read = _reader(row, world)
    with torch.no_grad():
        right, wrong = (
            row.loss(read(exact.optimum(replace(world.mdp, rewards=sign * world.mdp.rewards), 0.05).policy if row.margin.reads == "likelihood" else sign * world.rewards)).item()
            for sign in (1, -1)
        )  # fmt: skip
    if right < wrong:
        return Check(
            "direction", True, f"the loss is {right:.4g} where rewards are followed, {wrong:.4g} where they are followed the wrong way"
        )
    return Check("direction", False, f"the loss is {right:.4g} where rewards are followed, and {wrong:.4g}, no more, where they are followed the wrong way", "sign flipped", "chosen answers must gain, rejected ones lose")  # fmt: skip


# ------------------------------------------------------------------------------------------------------- checks


def _checks(row: Preference, world: World) -> list[Check]:
    trials: tuple[tuple[str, Callable[[Preference, Pairs], Check]], ...] = (
        ("split over micro-batches", _split), ("order of the pairs", _order), ("statistics that nobody asked for", _unasked), ("far answers", _far),
    )  # fmt: skip
    found = []
    for name, trial in trials:
        try:
            found.append(replace(trial(row, world.policy_pairs(world.mdp.tilted(0.5, seed=3))), name=name))
        except Exception as error:
            found.append(Check(name, False, f"{type(error).__name__}: {error}", f"it fails on {name}", "mend the error first"))
    return found


def _slopes(row: Preference, pairs: Pairs) -> Tensor:
    """∂loss/∂ of the scores and heads of both sides, and of the scores on the span, [6, N]."""
    quiet = pairs.detach()
    free = [x.clone().requires_grad_() for x in _moved(quiet)]
    loss = row.loss(_with(quiet, free))
    if not loss.requires_grad:
        return torch.zeros(6, len(pairs.margins), dtype=torch.float64)
    return torch.stack(torch.autograd.grad(loss, free, allow_unused=True, materialize_grads=True))


def _moved(pairs: Pairs) -> list[Tensor]:
    return [pairs.chosen.scores, pairs.rejected.scores, pairs.chosen.heads, pairs.rejected.heads, pairs.span.chosen, pairs.span.rejected]


def _with(pairs: Pairs, free: list[Tensor]) -> Pairs:
    chosen, rejected = replace(pairs.chosen, scores=free[0], heads=free[2]), replace(pairs.rejected, scores=free[1], heads=free[3])
    return replace(pairs, chosen=chosen, rejected=rejected, span=replace(pairs.span, chosen=free[4], rejected=free[5]))


def _gap(found: Tensor, right: Tensor) -> float:
    return (found - right).norm().item() / (right.norm().item() or 1.0) if found.isfinite().all() else float("inf")


def _split(row: Preference, pairs: Pairs) -> Check:
    """Losses of parts add up; where the row couples pairs, parts through the slopes of the whole do."""
    whole, found = _slopes(row, pairs), torch.zeros(6, len(pairs.margins), dtype=torch.float64)
    order = torch.randperm(len(pairs.margins), generator=torch.Generator().manual_seed(0))
    for part in (x.sort().values for x in (order[:5], order[5:60], order[60:])):
        share = pairs.detach().take(part)
        free = [x.clone().requires_grad_() for x in _moved(share)]
        mine = _with(share, free)
        loss = through(mine, row.slopes(pairs.detach()).take(part)) if row.coupled else row.loss(mine)
        found[:, part] = torch.stack(torch.autograd.grad(loss, free, allow_unused=True, materialize_grads=True))
    gap = _gap(found, whole)
    if gap < CLOSE:
        return Check("", True, f"the gradient in three uneven parts is that of the whole batch (to {gap:.0e})")
    return Check("", False, f"the gradient in three uneven parts differs by {gap:.2g} of its size", MICRO, "the loss must be a sum over pairs with the weights that they bring, or the comparison must say `coupled`")  # fmt: skip


def _order(row: Preference, pairs: Pairs) -> Check:
    order = torch.randperm(len(pairs.margins), generator=torch.Generator().manual_seed(1))
    before, after = _slopes(row, pairs).sum(1), _slopes(row, pairs.take(order)).sum(1)
    gap = _gap(after, before)
    if gap < CLOSE:
        return Check("", True, f"another order of the pairs changes nothing (to {gap:.0e})")
    return Check("", False, f"another order of the pairs changes the gradient by {gap:.2g} of its size", "it depends on the order of the batch", "judge each pair by its own statistics")  # fmt: skip


READ = {"reference": "reference", "reference_heads": "heads", "heads": "heads", "confidence": "confidence"}
"""Statistics of an answer, and the need that names each."""


def _unasked(row: Preference, pairs: Pairs) -> Check:
    before, read = _slopes(row, pairs), []
    for name, need in READ.items():
        blank = {name: torch.full((len(pairs.margins),), NAN, dtype=torch.float64)}
        if need not in row.needs and not torch.equal(_slopes(row, replace(pairs, chosen=replace(pairs.chosen, **blank), rejected=replace(pairs.rejected, **blank))), before):  # fmt: skip
            read.append(name)
    if "mismatched" not in row.needs and not torch.equal(_slopes(row, replace(pairs, mismatched=pairs.mismatched.take(torch.zeros(0).long()))), before):  # fmt: skip
        read.append("mismatched")
    if read:
        return Check("", False, f"the gradient depends on {', '.join(read)}, which `needs` does not name", "it reads a signal that it does not ask for", f"name it in `needs`: {', '.join(read)}")  # fmt: skip
    return Check("", True, "NaN in every statistic that `needs` does not name changes nothing")


def _far(row: Preference, pairs: Pairs) -> Check:
    """Margins eighty nats wide, right and wrong."""
    for shift in (-40.0, 40.0):
        moved = [x + (-shift if number % 2 else shift) for number, x in enumerate(_moved(pairs.detach()))]
        if not _slopes(row, _with(pairs.detach(), moved)).isfinite().all():
            return Check("", False, f"with chosen answers {shift:+.0f} and rejected ones {-shift:+.0f} nats from the reference the gradient is not finite", "it overflows", "use logsigmoid and expm1 instead of their parts")  # fmt: skip
    return Check("", True, "answers forty nats from the reference, either way, have finite gradients")
