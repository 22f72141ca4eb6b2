"""What a row's expected gradient is, decided by numbers: which target it is a multiple of, and whether exactly or only as the batch grows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from tilt.objectives import NoBonus, NoControl, NoPenalty, Objective, PerBudget, TrustRegion
from tilt.oracle import token_mdp as exact
from tilt.oracle.expectation import Situation, compare, couples, expect, expect_by_prompt, groups, limit
from tilt.oracle.scene import Kind, Scene, policy_part, reads, without_kl
from tilt.oracle.token_mdp import TokenMDP

TIGHT = 1e-9
"""Relative residual under which a gradient is a multiple of its target: enumeration leaves about 1e-14."""

Holds = Literal["exactly", "as the batch grows", "not"]


@dataclass(frozen=True)
class Estimand:
    """The policy part of a row at policy = old: `holds` says how far its expected gradient is `multiple` times the gradient of `target`.

    `kl` is what the reward pays for KL(policy || reference). `weights` are the multiples of the two prompts where they differ, and `binary` says that
    the claim is for rewards 0 and 1. `cosine` and `error` compare with grad J itself (with the target of a row that reads no rewards), whatever holds:
    the error is what is left of the gradient after its best multiple, in small batches of two answers to each of two prompts.
    """

    target: str
    holds: Holds
    multiple: float
    kl: float = 0.0
    weights: tuple[float, ...] = ()
    binary: bool = False
    cosine: float = 1.0
    error: float = 0.0
    gamma: float = 1.0

    @property
    def goal(self) -> str:
        """J in full, where it has more than the reward."""
        return f"E[R] - {self.kl:.3g} KL(policy || reference)" if self.kl else "E[R]"


J, PER_LENGTH, BEST = "J", "E[(R - sg J) / n]", "E[log policy(the best answer of each group)]"
LIKELIHOOD, PROBABILITY = "E[log policy(the answers given)]", "E[sum_t policy(the answers' tokens)]"
WHOLE_KL, TOKEN_KL, NOTHING = "-KL(policy || reference)", "-KL(policy || reference) with prefixes frozen", "nothing"


def estimand(row: Objective) -> Estimand:
    """The strongest claim that the numbers bear out, from `exactly grad J` down to `not` a multiple of any target."""
    plain = policy_part(row)
    scene = scene_of(row)
    return _rewarded(plain, scene) if reads(plain, scene) else _unrewarded(plain, scene)


def scene_of(row: Objective) -> Scene:
    """A reward for each answer, or for each action where the row reads nothing else."""
    plain = policy_part(row)
    kinds: tuple[Kind, ...] = ("general", "dense")
    scenes = (Scene.fit(plain, kind) for kind in kinds)
    return next((scene for scene in scenes if reads(plain, scene)), Scene.fit(plain))


def setting_of(row: Objective, found: Estimand) -> Situation:
    """Where the row's small batches come from: answers given to a row that imitates, else its own."""
    plain, scene = policy_part(row), scene_of(row)
    return scene.given() if found.target in (LIKELIHOOD, PROBABILITY) else scene.at(plain)


def _rewarded(row: Objective, scene: Scene) -> Estimand:
    kl, gamma = getattr(row.credit, "kl", 0.0), getattr(row.credit, "gamma", 1.0)
    found = _both(row, scene)
    first = found["exactly"]
    if not first.any():
        return Estimand(NOTHING, "not", 0.0, cosine=0.0, error=1.0)
    main = compare(first, _paid(scene, kl, gamma))
    base = Estimand(J, "not", 0.0, cosine=main.cosine, error=main.residual, gamma=gamma)
    for holds, mean in found.items():
        if fitted := _with_kl(mean, scene, gamma):
            return replace(base, target=J, holds=holds, multiple=fitted[0], kl=fitted[1])
    for target, aim in ((PER_LENGTH, _per_length), (BEST, _best)):
        for holds in found:
            if near := _fits(row, scene, holds, aim, found[holds]):
                return replace(base, target=target, holds=holds, multiple=near, kl=kl)
    return _reweighted(row, base)


def _both(row: Objective, scene: Scene, samples: int = 2) -> dict[Holds, Tensor]:
    """The expected gradient, and where it goes as the batch grows, if anywhere else."""
    at = scene.at(row, samples)
    coupled = couples(row, at)
    found: dict[Holds, Tensor] = {"exactly": (expect if samples == 2 else expect_by_prompt)(row, at).mean}
    return found | {"as the batch grows": limit(row, at)} if coupled else found


def _fits(row: Objective, scene: Scene, holds: Holds, target: Callable[[Scene, int], Tensor], found: Tensor) -> float | None:
    """The multiple of the target that the gradient is, with two samples a prompt and, on four answers, with three; None where it is none."""
    aim = target(scene, 2)
    if not aim.any() or (near := compare(found, aim)).residual > TIGHT:
        return None
    small = Scene.small("dense" if scene.mdp.steps.any() else "general")
    again = _both(row, small, 3)
    return near.multiple if compare(again.get(holds, again["exactly"]), target(small, 3)).residual < TIGHT else None


def _paid(scene: Scene, kl: float, gamma: float) -> Tensor:
    """E[sum_t grad l_t sum_(k>=t) gamma^(k-t) r_k], KL paid: grad J where gamma is 1."""
    return exact.score_mean(scene.mdp, scene.policy, scene.policy, exact.to_go(scene.mdp, scene.policy, kl=kl, gamma=gamma))


def _with_kl(found: Tensor, scene: Scene, gamma: float) -> tuple[float, float] | None:
    """(a, kl) such that the gradient is a (grad E[R] - kl grad KL); None where it is not of that form."""
    plain = _paid(scene, 0.0, gamma).flatten()
    pull = plain - _paid(scene, 1.0, gamma).flatten()
    solved = torch.linalg.lstsq(torch.stack([plain, -pull], 1), found.flatten().unsqueeze(1)).solution.flatten()
    left = found.flatten() - solved[0] * plain + solved[1] * pull
    if left.norm() > TIGHT * found.norm() or solved[0].abs() * plain.norm() < TIGHT * found.norm():
        return None
    kl = (solved[1] / solved[0]).item()
    return solved[0].item(), kl if abs(kl) > 1e-7 else 0.0


def _per_length(scene: Scene, samples: int, kl: float = 0.0) -> Tensor:
    """grad E[(R - sg J) / n], prompt by prompt; R pays for KL."""
    mdp, policy = scene.mdp, scene.policy
    earned = exact.to_go(mdp, policy, kl=kl)[:, mdp.layout.starts]
    mean = (exact.answer_logprobs(mdp, policy).exp() * earned).sum(1, keepdim=True)
    return _of_answers(mdp, policy, (earned - mean) / mdp.layout.lengths)


def _of_answers(mdp: TokenMDP, policy: Tensor, x: Tensor) -> Tensor:
    """E[x grad log policy(answer)], x [G, N] held fixed."""
    return exact.score_mean(mdp, policy, policy, x[:, mdp.layout.sequence])


def _best(scene: Scene, samples: int) -> Tensor:
    """Gradient of the mean log-likelihood of the best answer of each group, the groups held fixed."""
    group, orders = groups(scene.mdp.answers_count, samples, ordered=False)
    chance = orders * exact.answer_logprobs(scene.mdp, scene.policy)[:, group].sum(2).exp()
    earned = scene.mdp.returns[:, group]
    top = group.expand_as(earned).gather(2, earned.argmax(2, keepdim=True)).squeeze(2)
    often = torch.zeros_like(scene.mdp.returns).scatter_add(1, top, chance)
    return _of_answers(scene.mdp, scene.policy, often / exact.answer_logprobs(scene.mdp, scene.policy).exp())


def _reweighted(row: Objective, base: Estimand) -> Estimand:
    """Rewards 0 and 1, without KL in the reward: is each prompt's gradient a multiple of its own target? Weights are those of four samples."""
    bare = without_kl(row)
    scene, small = Scene.fit(row, "binary"), Scene.small("binary")
    found, more = _both(bare, scene), _both(bare, small, 4)
    for target, aim in ((J, lambda scene: _paid(scene, 0.0, 1.0)), (PER_LENGTH, lambda scene: _per_length(scene, 2))):
        for holds, mean in found.items():
            near = [compare(mean[g], aim(scene)[g]) for g in range(2)]
            last = [compare(more.get(holds, more["exactly"])[g], aim(small)[g]) for g in range(2)]
            if max(x.residual for x in near + last) < TIGHT and all(x.multiple for x in near):
                scale = small.length if holds == "as the batch grows" else 1.0
                return replace(base, target=target, holds=holds, weights=tuple(x.multiple * scale for x in last), binary=True)
    return base


def _unrewarded(row: Objective, scene: Scene) -> Estimand:
    """Rows that read no rewards: they imitate answers given, or follow a teacher."""
    mdp, policy, ones = scene.mdp, scene.policy, torch.ones_like(scene.mdp.steps)
    said = exact.logprobs(mdp, policy)
    targets = {
        LIKELIHOOD: (scene.given(), exact.score_mean(mdp, policy, scene.writer, ones)),
        PROBABILITY: (scene.given(), exact.score_mean(mdp, policy, scene.writer, said.exp())),
        WHOLE_KL: (scene.at(row), -exact.gradient(lambda p: exact.divergence(mdp, p, mdp.reference), policy)),
        TOKEN_KL: (scene.at(row), -exact.gradient(lambda p: exact.frozen(mdp, policy, exact.divergences(p, mdp.reference)), policy)),
    }
    nearest = Estimand(NOTHING, "not", 0.0, cosine=0.0, error=1.0)
    for target, (at, aim) in targets.items():
        found = expect(row, at).mean
        if not found.any():
            continue
        near = compare(found, aim)
        grown = compare(limit(row, at), aim) if couples(row, at) else near
        for holds, x in (("exactly", near), ("as the batch grows", grown)):
            if x.residual < TIGHT:
                return Estimand(target, holds, x.multiple, cosine=near.cosine, error=near.residual)  # type: ignore[arg-type]
        if abs(near.cosine) > abs(nearest.cosine):
            nearest = Estimand(target, "not", near.multiple, cosine=near.cosine, error=near.residual)
    return nearest


# ------------------------------------------------------------------------------------------------- the other terms


@dataclass(frozen=True)
class Pull:
    """Where the penalty and the bonus pull: `multiple` times the gradient of `along`; `averaged` where that is so of the sum over actions, which the
    row's average then weighs answer by answer; `cosine` under 1 where it is only the nearest of the divergences."""

    along: str
    holds: Holds
    multiple: float
    averaged: bool = False
    cosine: float = 1.0


def pull(row: Objective) -> Pull | None:
    """The part of the expected gradient that penalty and bonus add at policy = old; None where the row has neither."""
    if isinstance(row.penalty, NoPenalty | TrustRegion) and isinstance(row.bonus, NoBonus):
        return None
    scene = Scene.fit(row)
    found = _added(row, scene)
    if found["exactly"].norm() < 1e-13:
        return Pull("nothing at policy = old", "exactly", 0.0)
    summed = _added(replace(row, average=PerBudget(1), control=NoControl()), scene)
    for averaged, means in ((False, found), (True, summed)):
        for along, aim in _pulls(scene).items():
            for holds, mean in means.items():
                if (near := compare(mean, aim)).residual < TIGHT:
                    return Pull(along, holds, near.multiple, averaged)
    nearest = {along: compare(found["exactly"], aim) for along, aim in _pulls(scene).items()}
    along = max(nearest, key=lambda name: abs(nearest[name].cosine))
    return Pull(along, "not", nearest[along].multiple, cosine=abs(nearest[along].cosine))


def _added(row: Objective, scene: Scene) -> dict[Holds, Tensor]:
    plain = policy_part(row)
    whole, rest = _both(row, scene), _both(plain, scene)
    return {holds: mean - rest.get(holds, rest["exactly"]) for holds, mean in whole.items()}


def _pulls(scene: Scene) -> Mapping[str, Tensor]:
    mdp, policy = scene.mdp, scene.policy
    functions = {
        "KL(policy || reference)": lambda p: exact.divergence(mdp, p, mdp.reference),
        "KL(policy || reference) with prefixes frozen": lambda p: exact.frozen(mdp, policy, exact.divergences(p, mdp.reference)),
        "KL(reference || policy)": lambda p: exact.divergence(mdp, mdp.reference, p),
        "KL(reference || policy) with prefixes frozen": lambda p: exact.frozen(mdp, policy, exact.divergences(mdp.reference, p)),
        "the entropy with prefixes frozen": lambda p: exact.frozen(mdp, policy, exact.entropies(p)),
    }
    return {along: exact.gradient(function, policy) for along, function in functions.items()}


COUNTS = (2, 3, 4)


def multiples(row: Objective) -> tuple[float, ...]:
    """The multiple of grad J (of grad J / E[n] where the row holds only as the batch grows) with 2, 3, 4 samples a prompt, on four answers."""
    plain, scene, found = policy_part(row), Scene.small(), []
    aim = _paid(scene, getattr(row.credit, "kl", 0.0), getattr(row.credit, "gamma", 1.0))
    for samples in COUNTS:
        means = _both(plain, scene, samples)
        grown = means.get("as the batch grows")
        found.append(compare(means["exactly"], aim).multiple if grown is None else compare(grown, aim).multiple * scene.length)
    return tuple(found)


def growth(row: Objective) -> tuple[float, ...]:
    """The bias, as a share of the gradient, in batches of 1, 2 and 3 groups of two answers to one prompt."""
    small, plain, found = Scene.small(), policy_part(row), []
    for count in (1, 2, 3):
        mdp = TokenMDP(
            2, 3, *(x[1:].repeat(count, *[1] * (x.dim() - 1)) for x in (small.mdp.rewards, small.mdp.steps, small.mdp.reference))
        )
        scene = Scene(mdp, small.policy[1:].repeat(count, 1, 1), small.writer[1:].repeat(count, 1, 1))
        mean = expect(plain, scene.at(plain)).mean.sum(0)
        aim = _paid(scene, getattr(row.credit, "kl", 0.0), getattr(row.credit, "gamma", 1.0)).sum(0)
        found.append(compare(mean, aim).residual)
    return tuple(found)


def scale_free(row: Objective) -> bool:
    """Whether twice the reward, without KL, gives the same gradient as the batch grows: the row divides by a standard deviation."""
    bare = without_kl(policy_part(row))
    scene = Scene.small()
    double = replace(scene, mdp=replace(scene.mdp, rewards=2 * scene.mdp.rewards, steps=2 * scene.mdp.steps))
    one, two = (list(_both(bare, each).values())[-1] for each in (scene, double))
    return bool((one - two).norm() < 1e-6 * one.norm())


def named(found: tuple[float, ...], tolerance: float = 1e-7) -> str:
    """A multiple as a function of G: 1, a constant, (1 - 1/G), or (1 - 1/G) over a constant; empty where it is none of these."""
    shares = [m / (1 - 1 / g) for m, g in zip(found, COUNTS, strict=True)]
    for numbers, text in ((found, ""), (shares, "(1 - 1/G)")):
        if max(numbers) - min(numbers) < tolerance * abs(numbers[0]):
            return _scaled(numbers[-1], text)
    return ""


def _scaled(scale: float, text: str) -> str:
    sign, size = "-" if scale < 0 else "", abs(scale)
    if abs(size - 1) < 1e-7:
        return sign + (text or "1")
    whole = round(1 / size)
    number = f"{whole}" if whole and abs(whole * size - 1) < 1e-7 else ""
    if number:
        return f"{sign}{text or '1'} / {number}"
    return f"{sign}{size:.4g}" + (f" {text}" if text else "")
