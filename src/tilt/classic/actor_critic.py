"""The policy gradient from episodes: rows of THE TABLE, and rows like them, train a softmax per state with a table of values as their critic.

An environment's step is an action, an episode is a sequence, and episodes from one start are answers to one prompt: credit, surrogate and trust region are those of language models.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tilt.classic.episodes import Episodes, sample, trajectories
from tilt.classic.mdp import MDP
from tilt.classic.planning import gain
from tilt.errors import UsageError
from tilt.objectives.credit import GAE, Credit, Credited, ReturnToGo, check_fraction
from tilt.objectives.experience import Experience, Outputs, Rewards, Signals
from tilt.objectives.objective import Objective
from tilt.objectives.penalty import TrustRegion
from tilt.objectives.policy import NoRatio, PerBudget, Score
from tilt.objectives.value import NoValue, ValueLoss
from tilt.optim.trust_region import hessian_product, trust_region_step
from tilt.segments import Layout, segment_sum


@dataclass(frozen=True)
class Trained:
    """Logits [S, A] and the critic's values [S]; J before the first update and after each, exact [iterations + 1]; the mean return of each batch, [iterations]."""

    logits: Tensor
    values: Tensor
    gains: Tensor
    returns: Tensor


@dataclass(frozen=True)
class ActionValue(Credit):
    """Psi_t = A_t + V_t, an estimate of Q(s_t, a_t): GAE without its baseline. lam 0 is r_t + gamma V(s_(t+1)), lam 1 the return to go."""

    gamma: float = 1.0
    lam: float = 0.0

    def __post_init__(self) -> None:
        check_fraction(self, gamma=self.gamma, lam=self.lam)

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"values"})

    def __call__(self, rewards: Rewards, signals: Signals, layout: Layout) -> Credited:
        found = GAE(self.gamma, self.lam, whitened=False)(rewards, signals, layout)
        return found._replace(advantages=found.returns)


PSI: Mapping[str, Callable[[float, float], Credit]] = {
    "to_go": lambda gamma, lam: ReturnToGo(gamma),
    "baseline": lambda gamma, lam: ReturnToGo(gamma, baseline="critic"),
    "q": lambda gamma, lam: ActionValue(gamma, lam),
    "advantage": lambda gamma, lam: GAE(gamma, lam, whitened=False),
    "delta": lambda gamma, lam: GAE(gamma, 0.0, whitened=False),
}
"""What weighs grad log pi(a_t | s_t): the return to go, that less V, Q, A, or the TD error."""
CRITICS: Mapping[str, Callable[[float, float], Credit]] = {
    "td0": lambda gamma, lam: GAE(gamma, 0.0, whitened=False),
    "td_lambda": lambda gamma, lam: GAE(gamma, lam, whitened=False),
    "mc": lambda gamma, lam: GAE(gamma, 1.0, whitened=False),
}
"""What the critic is fitted to: r + gamma V(s'), the lambda-return, or the return to go."""


def row_of(credit: Credit) -> Objective:
    """The plain policy gradient with this credit: sum over the actions of an episode, mean over episodes."""
    return Objective(credit, NoRatio(), Score(), PerBudget(1), value=ValueLoss(1.0) if "values" in credit.needs else NoValue())


def reinforce(mdp: MDP, *, iterations: int, episodes: int = 16, rate: float = 0.5, seed: int = 0, limit: int | None = None) -> Trained:
    """REINFORCE (Williams 1992): sample whole episodes, theta += rate mean_i sum_t gamma^t grad log pi(a_t | s_t) G_t, and again."""
    return train(mdp, row_of(ReturnToGo(mdp.discount)), iterations=iterations, episodes=episodes, rate=rate, seed=seed, limit=limit)


def actor_critic(
    mdp: MDP,
    *,
    psi: str = "delta",
    critic: str = "td0",
    lam: float = 0.9,
    iterations: int,
    episodes: int = 16,
    rate: float = 0.5,
    critic_rate: float = 0.5,
    seed: int = 0,
    limit: int | None = None,
) -> Trained:
    """theta += rate grad log pi Psi, V += critic_rate (target - V), with Psi one of `PSI` and the target one of `CRITICS`."""
    for name, given, known in (("psi", psi, PSI), ("critic", critic, CRITICS)):
        if given not in known:
            raise UsageError(f"actor_critic: {name}={given!r} is none of {', '.join(known)}")
    return train(
        mdp, row_of(PSI[psi](mdp.discount, lam)), iterations=iterations, episodes=episodes, rate=rate, critic_rate=critic_rate,
        targets=CRITICS[critic](mdp.discount, lam), seed=seed, limit=limit,
    )  # fmt: skip


def train(
    mdp: MDP,
    row: Objective,
    *,
    iterations: int,
    episodes: int = 16,
    passes: int = 1,
    rate: float = 0.5,
    critic_rate: float = 0.5,
    targets: Credit | None = None,
    discounted: bool = True,
    reference: Tensor | None = None,
    logits: Tensor | None = None,
    seed: int = 0,
    limit: int | None = None,
) -> Trained:
    """Sample episodes, prepare their experience, step along the row's gradient `passes` times, and again. A row with a trust region takes its natural step.

    `discounted` weighs step t by gamma^t: then the gradient is that of the discounted J; without it, as in most code, it is the gradient of no function.
    A row with a value term has a critic: a table that goes `critic_rate` of the way to the mean target of each state that was seen, whatever the term's coefficient;
    `targets` are those of the row's own credit unless given.
    `reference` [S, A] are logits, the uniform policy unless given.
    """
    _check(mdp, row, iterations, passes)
    theta = (
        torch.zeros(mdp.state_count, mdp.action_count, dtype=torch.float64) if logits is None else logits.detach().to(torch.float64).clone()
    )
    anchor = torch.zeros_like(theta) if reference is None else reference.to(torch.float64)
    values, gains, returns = torch.zeros(mdp.state_count, dtype=torch.float64), [gain(mdp, theta.softmax(-1))], []
    for iteration in range(iterations):
        found = sample(mdp, theta.softmax(-1), episodes, seed=seed, first=iteration * episodes, limit=limit)
        experience = prepared(row, found, theta, values, anchor, mdp.discount if discounted else 1.0)
        aims = experience.returns if targets is None else prepared(row_of(targets), found, theta, values, anchor, 1.0).returns
        old = theta
        for _ in range(passes):
            if isinstance(row.penalty, TrustRegion):
                theta = natural_step(row, found, experience, old, anchor)
            else:
                theta = theta - rate * gradient(row, found, experience, theta, old, anchor)
        row = row.following(measured(row, found, experience, theta, old, anchor))
        if row.value.needs:
            values = fitted(values, found, aims, critic_rate)
        gains.append(gain(mdp, theta.softmax(-1)))
        returns.append(found.returns(1.0).mean())
    return Trained(theta, values, torch.stack(gains), torch.stack(returns))


# ---------------------------------------------------------------------------------------------- one batch


def prepared(row: Objective, episodes: Episodes, logits: Tensor, values: Tensor, reference: Tensor, discount: float) -> Experience:
    """The experience of these episodes: rewards on every action, V(s_t) from the table, V of the state where an episode was cut off after its last action (0 where it ended)."""
    said, anchor = logits.detach().log_softmax(-1), reference.log_softmax(-1)
    at = (episodes.states, episodes.actions)
    final = torch.where(episodes.ended, 0.0, values[episodes.last])
    signals = Signals.of(
        said[at],
        sampler=said[at],
        reference=anchor[at],
        values=values[episodes.states],
        entropy=_entropy(said)[episodes.states],
        final=final,
    )
    rewards = Rewards.of(torch.zeros(episodes.layout.sequences, dtype=torch.float64), steps=episodes.rewards)
    found = row.prepare(rewards, signals, episodes.layout)
    return found if discount == 1 else replace(found, weights=found.weights * discount ** episodes.layout.positions.to(found.weights))


def outputs(row: Objective, episodes: Episodes, logits: Tensor, old: Tensor, reference: Tensor) -> Outputs:
    """What the softmax of each state says of the actions taken there; `kl` is exact, against whatever the row compares with."""
    said = logits.log_softmax(-1)
    before = (old if row.against == "old" else reference).detach().log_softmax(-1)
    kl = before.exp() * (before - said) if row.against == "old" else said.exp() * (said - before)
    return Outputs.of(said[episodes.states, episodes.actions], entropy=_entropy(said)[episodes.states], kl=kl.sum(-1)[episodes.states])


def gradient(row: Objective, episodes: Episodes, experience: Experience, logits: Tensor, old: Tensor, reference: Tensor) -> Tensor:
    """The gradient of the row's loss by the logits, [S, A]; its mean is -grad J for the rows that say so."""
    at = logits.detach().clone().requires_grad_()
    loss = replace(row, value=NoValue()).loss(outputs(row, episodes, at, old, reference), experience)
    return torch.autograd.grad(loss, at)[0]


def natural_step(row: Objective, episodes: Episodes, experience: Experience, old: Tensor, reference: Tensor) -> Tensor:
    """The logits after a step to the edge of the row's trust region, or the old ones where nothing better lies inside."""
    rule, theta = row.penalty, old.detach().clone().requires_grad_()
    assert isinstance(rule, TrustRegion)
    bare = replace(row, value=NoValue())
    layout = episodes.layout
    count = max(1, round(rule.share * layout.sequences))
    part = layout.actions_of((torch.arange(count) / rule.share).long())

    def apart(chosen: Tensor) -> Tensor:
        return outputs(row, episodes, theta, old, reference).kl[chosen].mean()

    def measure() -> tuple[float, float]:
        return -float(bare.loss(outputs(row, episodes, theta, old, reference), experience)), float(apart(torch.arange(layout.actions)))

    trust_region_step(
        [theta], [-gradient(row, episodes, experience, old, old, reference)], hessian_product(lambda: apart(part), [theta]), measure,
        limit=rule.limit, iterations=rule.iterations, damping=rule.damping, backtracks=rule.backtracks, decay=rule.decay,
    )  # fmt: skip
    return theta.detach()


def measured(
    row: Objective, episodes: Episodes, experience: Experience, logits: Tensor, old: Tensor, reference: Tensor
) -> dict[str, float]:
    """What a controller of the row may read after its update: the row's metrics at the new policy, the KL divergence of an episode to the reference, and how many there were."""
    bare, signals = replace(row, value=NoValue()), experience.signals
    found = {
        name: float(s / w) for name, (s, w) in bare.metrics(outputs(row, episodes, logits, old, reference), experience).items() if w > 0
    }
    apart = segment_sum(signals.old - signals.reference, episodes.layout).mean()
    return found | {"objective/kl": float(apart), "sequences": float(episodes.layout.sequences)}


def fitted(values: Tensor, episodes: Episodes, targets: Tensor, rate: float) -> Tensor:
    """V(s) += rate (mean target of the visits of s - V(s)): at rate 1 the regression argmin E (V(s_t) - target_t)^2."""
    count = torch.zeros_like(values).index_add(0, episodes.states, torch.ones_like(targets))
    mean = torch.zeros_like(values).index_add(0, episodes.states, targets) / count.clamp(min=1)
    return torch.where(count > 0, values + rate * (mean - values), values)


def expected_gradient(
    mdp: MDP, row: Objective, logits: Tensor, *, values: Tensor | None = None, horizon: int | None = None, discounted: bool = True
) -> Tensor:
    """The mean of minus the sampled gradient over all trajectories, [S, A]: what episodes one at a time would give in the long run; `values` are the critic's.

    For rows whose credit looks at one episode alone.
    """
    found = trajectories(mdp, logits.softmax(-1), horizon)
    critic = torch.zeros(mdp.state_count, dtype=torch.float64) if values is None else values
    even = torch.zeros_like(logits)
    experience = prepared(row, found.episodes, logits, critic, even, mdp.discount if discounted else 1.0)
    share = found.chance * found.episodes.layout.sequences
    experience = replace(experience, weights=experience.weights * share[found.episodes.layout.sequence])
    return -gradient(row, found.episodes, experience, logits, logits, even)


def _entropy(logprobs: Tensor) -> Tensor:
    return -(logprobs.exp() * logprobs).sum(-1)


def _check(mdp: MDP, row: Objective, iterations: int, passes: int) -> None:
    if iterations < 1:
        raise UsageError(f"iterations={iterations} must be at least 1")
    if row.passes is not None and passes > row.passes:
        raise UsageError(
            f"{row.surrogate!r} is right for {row.passes} pass over fresh episodes, not passes={passes}; choose a clipped surrogate"
        )
    gamma = getattr(row.credit, "gamma", 1.0)
    if gamma != mdp.discount:
        raise UsageError(f"{row.credit!r} discounts by {gamma}, the process by {mdp.discount}: make them equal")
