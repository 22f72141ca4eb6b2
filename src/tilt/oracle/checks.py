"""What must not change an update, tried on random batches of unequal answers; each failure has the name of the mistake that shows itself so."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import partial

import torch
from torch import Tensor

from tilt.errors import UsageError
from tilt.objectives import Experience, Layout, Objective, Outputs, Rewards, Signals
from tilt.segments import segment_sum

CLOSE = 1e-10
MICRO, DROPPED = "mean over the micro-batch", "stale normaliser: it counts answers that were dropped"
ORDER, UNMASKED = "it depends on the order of the batch", "mask dropped"
FOLLOWS = {MICRO: {DROPPED}, ORDER: {DROPPED, UNMASKED}}
"""What a mistake brings with it: a mean inside the loss counts whatever stands in the batch, and places shift with the answers that pad it."""
NAN = float("nan")


@dataclass(frozen=True)
class Check:
    """One trial: what was tried, whether it passed, what was seen; where it failed the name of the mistake and how to mend it."""

    name: str
    passed: bool
    seen: str
    mistake: str = ""
    mend: str = ""


@dataclass(frozen=True)
class Batch:
    """Nine answers of 1 to 5 actions to three prompts, interleaved; the policy is near old, every reward and signal another number."""

    layout: Layout
    rewards: Rewards
    signals: Signals
    outputs: Outputs

    @staticmethod
    def random(seed: int, *, dense: bool = True, on_policy: bool = False) -> Batch:
        """`dense`: every action earns something, beside the score of its answer."""
        draw = torch.Generator().manual_seed(seed)

        def normal(count: int, scale: float = 1.0) -> Tensor:
            return scale * torch.randn(count, dtype=torch.float64, generator=draw)

        prompt = torch.arange(3).repeat(3)[torch.randperm(9, generator=draw)]
        layout = Layout.of(torch.randint(1, 6, (9,), generator=draw), torch.unique(prompt, return_inverse=True)[1])
        count = layout.actions
        old = -normal(count).abs() - 0.05
        near = [old if on_policy else old + normal(count, 0.1), old + normal(count, 0.1), old + normal(count, 0.3)]
        steps = normal(count, 0.3 if dense else 0.0)
        rewards = Rewards.of(normal(9), steps, ends=steps != 0)
        signals = Signals.of(old, sampler=near[1], reference=near[2], values=normal(count), entropy=normal(count).abs(), final=torch.zeros(9, dtype=torch.float64))  # fmt: skip
        outputs = Outputs.of(near[0], entropy=normal(count).abs(), kl=normal(count).abs(), values=normal(count), final=signals.final)
        return Batch(layout, rewards, signals, outputs)


def prepared(row: Objective, batch: Batch) -> Experience:
    return row.prepare(batch.rewards, batch.signals, batch.layout)


Draw = Callable[..., Batch]
FREE = ("logprobs", "entropy", "kl", "values")


def slopes(row: Objective, outputs: Outputs, experience: Experience) -> Tensor:
    """Derivatives of the loss by log-probabilities, entropies, exact KL and values, [4, A]; 0 where it does not depend on them."""
    free = {name: getattr(outputs, name).detach().requires_grad_() for name in FREE}
    loss = row.loss(replace(outputs, **free), experience)
    if not loss.requires_grad:
        return torch.zeros(4, experience.layout.actions, dtype=torch.float64)
    return torch.stack(torch.autograd.grad(loss, list(free.values()), allow_unused=True, materialize_grads=True))


def whole(row: Objective, batch: Batch) -> Tensor:
    return slopes(row, batch.outputs, prepared(row, batch))


def part_of(outputs: Outputs, layout: Layout, sequences: Tensor) -> Outputs:
    actions = layout.actions_of(sequences)
    return Outputs(**{f.name: getattr(outputs, f.name)[sequences if f.name == "final" else actions] for f in fields(Outputs)})


def in_parts(row: Objective, batch: Batch, parts: list[Tensor]) -> Tensor:
    """The slopes of the whole batch, prepared at once, from losses of its parts."""
    experience, found = prepared(row, batch), torch.zeros(4, batch.layout.actions, dtype=torch.float64)
    for part in parts:
        found[:, batch.layout.actions_of(part)] = slopes(row, part_of(batch.outputs, batch.layout, part), experience.take(part))
    return found


# ---------------------------------------------------------------------------------------------------- the trials


def all_checks(row: Objective) -> list[Check]:
    """Every trial; one that raises has failed, and none says anything about a row that remembers."""
    draw = partial(Batch.random, dense=_takes_dense(row))
    trials: tuple[tuple[str, Callable[[Objective, Draw], Check]], ...] = (
        ("memory", memory), ("split over micro-batches", split), ("split over ranks", ranks), ("order of the answers", order),
        ("answers that nobody could score", unscored), ("signals that nobody asked for", unasked), ("groups of equal rewards", equal_rewards),
        ("stop token", stop_token), ("baseline", baseline),
    )  # fmt: skip
    found: list[Check] = []
    for name, trial in trials:
        try:
            found.append(replace(trial(row, draw), name=name))
        except Exception as error:
            found.append(Check(name, False, f"{type(error).__name__}: {error}", f"it fails on {name}", "mend the error first"))
        if not found[0].passed:
            break
    return found


def _takes_dense(row: Objective) -> bool:
    """Whether the row accepts rewards on single actions; padded windows refuse them."""
    try:
        prepared(row, Batch.random(0))
    except UsageError:
        return False
    return True


def memory(row: Objective, draw: Draw) -> Check:
    """The same batch gives the same update, whatever came between."""
    first, second = draw(1), draw(2)
    whole(row, first)
    before = whole(row, first)
    whole(row, second)
    after = whole(row, first)
    if torch.equal(before, after):
        return Check("", True, "the same batch gives the same bits after another one")
    factor = _constant(after, before)
    if factor is None:
        return Check("", False, "the same batch gives another gradient after another batch", "it remembers the batch before", "compute every statistic in `prepare`, from its arguments alone")  # fmt: skip
    return Check("", False, f"after another batch the same batch gives {factor:.4g} times its gradient", "stale normaliser", "compute the denominator in `average`, from the layout of this batch")  # fmt: skip


def split(row: Objective, draw: Draw) -> Check:
    """Losses of parts add up to the loss of the batch, however unevenly it is cut."""
    worst = (0.0, 1.0)
    for seed in range(3):
        batch = draw(seed)
        shuffled = torch.randperm(9, generator=torch.Generator().manual_seed(seed))
        worst = max(worst, _apart(in_parts(row, batch, [shuffled[:2], shuffled[2:3], shuffled[3:]]), whole(row, batch)))
    return _added_up(worst, "in three uneven parts")


def ranks(row: Objective, draw: Draw) -> Check:
    """Two ranks with every other answer, each one answer at a time."""
    worst = (0.0, 1.0)
    for seed in range(3):
        batch = draw(seed)
        worst = max(
            worst, _apart(in_parts(row, batch, [torch.tensor([i]) for start in (0, 1) for i in range(start, 9, 2)]), whole(row, batch))
        )
    return _added_up(worst, "on two ranks, one answer at a time")


def _added_up(worst: tuple[float, float], how: str) -> Check:
    gap, size = worst
    if gap < CLOSE:
        return Check("", True, f"the gradient {how} is that of the whole batch (to {gap:.0e})")
    return Check(
        "", False, f"the gradient {how} differs from that of the whole batch by {gap:.2g} of its size, and is {size:.2g} times as long",
        MICRO, "the loss must be a sum: denominators belong in `average`, statistics in `credit`, both fixed on the whole batch",
    )  # fmt: skip


def order(row: Objective, draw: Draw) -> Check:
    """A batch packed in another order gives each action the same push."""
    gap = 0.0
    for seed in range(3):
        batch = draw(seed)
        order = torch.randperm(9, generator=torch.Generator().manual_seed(seed + 10))
        gap = max(gap, _apart(whole(row, _reordered(batch, order)), whole(row, batch)[:, batch.layout.actions_of(order)])[0])
    if gap < CLOSE:
        return Check("", True, f"another order of the answers changes nothing (to {gap:.0e})")
    return Check("", False, f"another order of the answers changes the gradient by {gap:.2g} of its size", ORDER, "find answers by `layout.prompt` and `layout.sequence`, never by place")  # fmt: skip


def _reordered(batch: Batch, order: Tensor) -> Batch:
    actions = batch.layout.actions_of(order)
    signals = Signals(**{f.name: getattr(batch.signals, f.name)[order if f.name == "final" else actions] for f in fields(Signals)})
    rewards = Rewards.of(batch.rewards.total[order], batch.rewards.steps[actions], ends=batch.rewards.ends[actions])
    return Batch(batch.layout.take(order), rewards, signals, part_of(batch.outputs, batch.layout, order))


def unscored(row: Objective, draw: Draw) -> Check:
    """Answers that could not be scored pad the batch and hold NaN, infinities or huge numbers: the others are pushed as if alone."""
    for seed in range(2):
        batch = draw(seed)
        clean, count = whole(row, batch), batch.layout.actions
        for junk in (NAN, float("inf"), 700.0, 0.0):
            dirty = whole(row, _padded(batch, junk))
            if not dirty.isfinite().all():
                return Check("", False, f"with answers that nobody could score, holding {junk}, the gradient is not finite", UNMASKED, "count `rewards.scored` answers only, and return them as `counted`")  # fmt: skip
            kept, leaked = dirty[:, :count], dirty[:, count:]
            if leaked.any() or _apart(kept, clean)[0] > CLOSE:
                factor = None if leaked.any() else _constant(kept, clean)
                if factor is not None:
                    return Check("", False, f"answers that nobody could score scale the gradient by {factor:.4g}", DROPPED, "let `average` count the answers in `counted` alone")  # fmt: skip
                where = "they are trained on" if leaked.any() else "they change the push on the others"
                return Check("", False, f"answers that nobody could score, holding {junk}: {where}", UNMASKED, "count `rewards.scored` answers only, and return them as `counted`")  # fmt: skip
    return Check("", True, "answers that nobody could score, holding NaN, inf, 700 or 0, change nothing")


def _padded(batch: Batch, junk: float) -> Batch:
    """Three more answers, to the first prompt, to the second, and to one of their own."""
    lengths, prompt = [*batch.layout.lengths.tolist(), 2, 1, 3], [*batch.layout.prompt.tolist(), 0, 1, batch.layout.prompts]

    def more(x: Tensor) -> Tensor:
        return torch.cat([x, torch.full((6,), junk, dtype=torch.float64)])

    def ends(x: Tensor) -> Tensor:
        return torch.cat([x, torch.full((3,), junk, dtype=torch.float64)])

    scored = torch.tensor([True] * 9 + [False] * 3)
    told = torch.cat([batch.rewards.ends, torch.ones(6, dtype=torch.bool)])
    rewards = Rewards.of(ends(batch.rewards.total), more(batch.rewards.steps), scored=scored, ends=told)
    signals = Signals(**{f.name: (ends if f.name == "final" else more)(getattr(batch.signals, f.name)) for f in fields(Signals)})
    outputs = Outputs(**{f.name: (ends if f.name == "final" else more)(getattr(batch.outputs, f.name)) for f in fields(Outputs)})
    return Batch(Layout.of(lengths, prompt), rewards, signals, outputs)


def unasked(row: Objective, draw: Draw) -> Check:
    """What `needs` does not name may be NaN."""
    batch = draw(4)
    before = whole(row, batch)
    blank = torch.full((batch.layout.actions,), NAN, dtype=torch.float64)
    told = [name for name in ("sampler", "old", "reference", "values", "entropy") if name not in row.needs]
    said = {"values": "values" in row.needs, "kl": row.against != "none", "entropy": bool(row.bonus.coefficient)}
    trials = {name: replace(batch, signals=replace(batch.signals, **{name: blank})) for name in told}
    trials |= {
        f"the policy's {name}": replace(batch, outputs=replace(batch.outputs, **{name: blank})) for name, asked in said.items() if not asked
    }
    read = [name for name, trial in trials.items() if not torch.equal(whole(row, trial), before)]
    if read:
        return Check("", False, f"the gradient depends on {', '.join(read)}, which `needs` does not name", "it reads a signal that it does not ask for", f"name {', '.join(read)} in `needs`: else training gives it NaN")  # fmt: skip
    return Check("", True, "NaN in every signal that `needs` does not name changes nothing")


def equal_rewards(row: Objective, draw: Draw) -> Check:
    """Seven answers that all earn .3, in float32, where the mean of seven .3 is not .3; beside them seven that earn .5, which is exact."""
    for dense in (False, True) if draw(0).rewards.steps.any() else (False,):
        exact, rounded = (_equal(row, amount, dense) for amount in (0.5, 0.3))
        if not (exact.isfinite().all() and rounded.isfinite().all()):
            return Check("", False, "in a group of equal rewards advantages are not finite", "it divides by a standard deviation of zero", "give advantage 0 where max = min")  # fmt: skip
        if exact.abs().max() < 1e-6 and rounded.abs().max() > 1e-4:
            return Check("", False, f"seven rewards of .3 have advantages up to {rounded.abs().max().item():.2g}, seven of .5 have 0", "it trains on rounding noise", "decide by max = min, never by a small standard deviation")  # fmt: skip
    return Check("", True, "groups of equal rewards stay finite, and no rounding noise is trained on")


def _equal(row: Objective, amount: float, dense: bool) -> Tensor:
    layout, old = Layout.of([1, 3, 2, 2, 1, 3, 2], [0] * 7), torch.linspace(-2, -0.1, 14)
    steps = torch.full((14,), amount if dense else 0.0)
    rewards = Rewards.of(torch.full((7,), 0.0 if dense else amount), steps, ends=steps != 0)
    signals = Signals(sampler=old, old=old, reference=old, values=torch.zeros(14), entropy=old.abs(), final=torch.zeros(7))
    return row.prepare(rewards, signals, layout).advantages


def stop_token(row: Objective, draw: Draw) -> Check:
    """How hard the last action of an answer is pushed, the stop token as a rule, beside the others of the same answer."""
    last, first, others = [], [], []
    for seed in range(3):
        batch = draw(seed, on_policy=True)
        layout, push = batch.layout, whole(row, batch)[0].abs()
        long = layout.lengths > 1
        last.append(push[layout.last[long]])
        first.append(push[layout.starts[long]])
        others.append((segment_sum(push, layout)[long] - last[-1]) / (layout.lengths[long] - 1))
    ends, starts, rest = (torch.cat(x) for x in (last, first, others))
    if not rest.any() and not ends.any():
        return Check("", False, "no action is pushed at all", "nothing is learned", "the loss must depend on the log-probabilities where advantages are not 0")  # fmt: skip
    if not ends.any():
        return Check("", False, "the last action of every answer has gradient 0, the others have not", "stop token unweighted", "the stop token is an action: give it the weight of the others")  # fmt: skip
    if not starts.any():
        return Check("", False, "the first action of every answer has gradient 0, the others have not", "first token unweighted", "every action has a weight: look for a shift by one")  # fmt: skip
    return Check("", True, f"the last action is pushed {(ends.mean() / rest.mean()).item():.2f} times as hard as the others of its answer")


def baseline(row: Objective, draw: Draw) -> Check:
    """What one more unit of reward does to an answer's own advantage and to its neighbours', in groups of three: 1 and -1/2, or 2/3 and -1/3."""
    own, others = set(), set()
    for seed in range(2):
        batch = draw(seed)
        before = prepared(row, batch).advantages
        for i in range(9):
            one = torch.zeros(9, dtype=torch.float64).index_fill(0, torch.tensor(i), 1.0)
            moved = prepared(row, replace(batch, rewards=replace(batch.rewards, total=batch.rewards.total + one))).advantages - before
            at = batch.layout.last
            mates = (batch.layout.prompt == batch.layout.prompt[i]) & (torch.arange(9) != i)
            own.add(round(moved[at[i]].item(), 9))
            others |= {round(x, 9) for x in moved[at[mates]].tolist()}
    including = own == {round(2 / 3, 9)} and others == {round(-1 / 3, 9)}
    declared = getattr(row.credit, "centre", None) or ("mean" if type(row.credit).__module__.startswith("tilt.") else None)
    if including and declared != "mean":
        said = f"although centre is {declared!r}" if declared else "and the credit does not say so"
        return Check("", False, f"an answer is judged by a mean that counts itself, {said}: its advantage, and the gradient, shrink by 1 - 1/G", "baseline includes self", "use the mean of the other answers, or declare it: a field `centre` with the value \"mean\"")  # fmt: skip
    if own == {1.0} and others == {-0.5}:
        return Check("", True, "an answer is judged by the mean of the others")
    if including:
        return Check("", True, "an answer is judged by a mean that counts itself: 1 - 1/G of the leave-one-out advantage")
    if own == {1.0} and others == {0.0}:
        return Check("", True, "an answer is judged by itself, or by a baseline that no reward moves")
    return Check(
        "",
        True,
        "the advantage is no linear function of the group's rewards" if own != {0.0} else "advantages do not depend on the rewards",
    )


# --------------------------------------------------------------------------------------------------- comparisons


def _apart(found: Tensor, right: Tensor) -> tuple[float, float]:
    """|found - right| / |right|, and |found| / |right|; a gradient that is not finite is infinitely far."""
    size = right.norm().item()
    if not found.isfinite().all() or not right.isfinite().all():
        return float("inf"), float("inf")
    return (found - right).norm().item() / (size or 1.0), found.norm().item() / (size or 1.0)


def _constant(found: Tensor, right: Tensor) -> float | None:
    """The number by which every entry was multiplied; None where there is no single one."""
    factor = ((found * right).sum() / right.square().sum()).item() if right.any() else 1.0
    return factor if factor and _apart(found, factor * right)[0] < CLOSE else None
