"""The gradient of the exact gain, three ways up, and the same gradient from episodes: by enumeration for every weight, and by the same rows that train language models."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tilt.classic.actor_critic import (
    CRITICS,
    PSI,
    ActionValue,
    Trained,
    actor_critic,
    expected_gradient,
    fitted,
    gradient,
    measured,
    prepared,
    reinforce,
    row_of,
    train,
)
from tilt.classic.bellman import action_values
from tilt.classic.episodes import Episodes, sample, trajectories
from tilt.classic.mdp import MDP
from tilt.classic.planning import advantages, evaluate, gain, occupancy, policy_iteration, value_iteration
from tilt.classic.policy_gradient import exact_gradient, fisher, gradient_ascent, natural_ascent, natural_gradient, trust_region_ascent
from tilt.classic.tables import frozen_lake, random_processes, random_walk
from tilt.errors import UsageError
from tilt.objectives import ALGORITHMS, GAE, Doubling, EntropyBonus, Objective, OldKL, Return, ReturnToGo
from tilt.optim.trust_region import conjugate_gradient

GAMMA = 0.8


@pytest.fixture(scope="module")
def steps() -> MDP:
    """Five states in order: every action leads to later ones, at random, and the last ends the episode; rewards of both signs, gamma .8."""
    generator = torch.Generator().manual_seed(0)
    moves = torch.rand(5, 3, 5, generator=generator, dtype=torch.float64) * torch.ones(5, 5).triu(1).unsqueeze(1)
    moves[4] = torch.eye(5)[4]
    reward = torch.randn(5, 3, generator=generator, dtype=torch.float64)
    return MDP.of(moves / moves.sum(-1, keepdim=True), reward, discount=GAMMA, terminal=[4], start=[0.7, 0.3, 0, 0, 0], limit=4)


@pytest.fixture(scope="module")
def theta() -> Tensor:
    return torch.randn(5, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def two_states() -> MDP:
    """In state 0 the second action goes to state 1, which pays 2 for staying; in state 0 the first action pays 1."""
    return MDP.of([[[1.0, 0.0], [0.0, 1.0]], [[0.0, 1.0], [1.0, 0.0]]], [[1.0, 0.0], [2.0, 0.0]], discount=0.9, start=[1.0, 0.0], limit=30)


def close(a: Tensor, b: Tensor, atol: float = 1e-12) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=atol)


# ---------------------------------------------------------------------------------------------- exact


def test_the_gradient_is_that_of_the_gain() -> None:
    """rho pi A = the derivative through the linear solve, on 1,000 random processes; and finite differences of one."""
    mdp = random_processes(1000)
    free = torch.randn(1000, 5, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64).requires_grad_()
    truth = torch.autograd.grad(gain(mdp, free.softmax(-1)).sum(), free)[0]
    close(exact_gradient(mdp, free.detach()), truth, 1e-11)
    one, at = random_processes(seed=5), free.detach()[0]
    for s, a in ((0, 0), (3, 2)):
        nudge = torch.zeros(5, 3, dtype=torch.float64)
        nudge[s, a] = 1e-5
        found = (gain(one, (at + nudge).softmax(-1)) - gain(one, (at - nudge).softmax(-1))) / 2e-5
        assert exact_gradient(one, at)[s, a].item() == pytest.approx(found.item(), abs=1e-8)


def test_the_natural_gradient_solves_for_the_fisher_matrix() -> None:
    """F x = grad J by the pseudo-inverse and by conjugate gradients: the advantages, up to a constant in each state."""
    mdp, at = random_processes(seed=1), torch.randn(5, 3, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    matrix, slope = fisher(mdp, at), exact_gradient(mdp, at)
    close(matrix, matrix.T)
    found = natural_gradient(mdp, at)
    close((torch.linalg.pinv(matrix, hermitian=True) @ slope.flatten()).view(5, 3), found, 1e-9)
    (x,) = conjugate_gradient(lambda v: [(matrix @ v[0].flatten()).view(5, 3)], [slope], 40, tolerance=1e-26)
    apart = x - advantages(mdp, at.softmax(-1))
    assert (apart - apart.mean(-1, keepdim=True)).abs().max() < 1e-8


def test_the_fisher_matrix_is_the_curvature_of_the_divergence() -> None:
    """The Hessian of sum_s rho_old KL(old || new), and of KL(new || old), at new = old; by loops over scores as well."""
    mdp, at = random_processes(seed=1), torch.randn(5, 3, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    old, rho = at.softmax(-1), occupancy(mdp, at.softmax(-1))

    def apart(flat: Tensor) -> Tensor:
        new = flat.view(5, 3).log_softmax(-1)
        return (rho * (old * (old.log() - new)).sum(-1)).sum()

    def back(flat: Tensor) -> Tensor:
        new = flat.view(5, 3).log_softmax(-1)
        return (rho * (new.exp() * (new - old.log())).sum(-1)).sum()

    for function in (apart, back):
        close(torch.autograd.functional.hessian(function, at.flatten()), fisher(mdp, at), 1e-10)
    by_hand = torch.zeros(15, 15, dtype=torch.float64)
    for s in range(5):
        for a in range(3):
            grad = torch.zeros(5, 3, dtype=torch.float64)
            grad[s] = -old[s]
            grad[s, a] += 1
            by_hand += rho[s] * old[s, a] * torch.outer(grad.flatten(), grad.flatten())
    close(fisher(mdp, at), by_hand)


def test_three_ways_up() -> None:
    """Small steps along the gradient and natural steps of any length never go down; the trust region gets nearest to the best in thirty steps."""
    mdp = random_processes(1000, seed=2)
    for climb in (
        gradient_ascent(mdp, torch.zeros(1000, 5, 3), rate=0.05, steps=10),
        natural_ascent(mdp, torch.zeros(1000, 5, 3), rate=5.0, steps=10),
    ):
        assert (climb.gains[1:] - climb.gains[:-1]).min() > -1e-12
    lake = frozen_lake(discount=0.95)
    best = (lake.start * policy_iteration(lake).values).sum()
    end = {  # what is missing to the best
        f.__name__: (best - f(lake, torch.zeros(16, 4), steps=30, **step).gains[-1]).item()  # type: ignore[operator]
        for f, step in ((gradient_ascent, {"rate": 20.0}), (natural_ascent, {"rate": 20.0}), (trust_region_ascent, {"limit": 0.05}))
    }
    assert 0 <= end["trust_region_ascent"] < 1e-6 < end["natural_ascent"] < 0.01 < end["gradient_ascent"]


def test_a_natural_step_multiplies_the_policy() -> None:
    mdp, at = random_processes(seed=4), torch.randn(5, 3, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    weights = at.softmax(-1) * (0.7 * advantages(mdp, at.softmax(-1))).exp()
    close(natural_ascent(mdp, at, rate=0.7, steps=1).logits.softmax(-1), weights / weights.sum(-1, keepdim=True))


# ---------------------------------------------------------------------------------------------- from episodes


@pytest.mark.parametrize("psi", PSI)
@pytest.mark.parametrize("lam", [0.0, 0.6, 1.0])
def test_every_weight_has_grad_j_in_the_mean(psi: str, lam: float, steps: MDP, theta: Tensor) -> None:
    """E[sum_t gamma^t grad log pi Psi_t] = grad J over all trajectories, with an exact critic: the return to go, less V, Q, A and the TD error."""
    truth = exact_gradient(steps, theta)
    exact = evaluate(steps, theta.softmax(-1))
    close(expected_gradient(steps, row_of(PSI[psi](GAMMA, lam)), theta, values=exact), truth)


def test_what_is_biased_is_biased(steps: MDP, theta: Tensor) -> None:
    """A wrong critic only shifts what lam = 1 or a state's baseline takes off; with lam < 1, or as part of Q, it bends the gradient. So does leaving gamma^t out."""
    truth, wrong = exact_gradient(steps, theta), torch.tensor([0.5, -1.0, 2.0, 0.3, 0.0], dtype=torch.float64)

    def found(psi: str, lam: float, **more: bool) -> Tensor:
        return expected_gradient(steps, row_of(PSI[psi](GAMMA, lam)), theta, values=wrong, **more)  # type: ignore[arg-type]

    for psi, lam in (("baseline", 0.5), ("advantage", 1.0), ("q", 1.0), ("to_go", 0.0)):
        close(found(psi, lam), truth)
    for psi, lam in (("delta", 0.0), ("advantage", 0.6), ("q", 0.0)):
        assert (found(psi, lam) - truth).abs().max() > 1e-2
    plain = found("to_go", 1.0, discounted=False)
    assert 0.9 < torch.cosine_similarity(plain.flatten(), truth.flatten(), dim=0) < 0.9999


def test_the_td_error_is_the_advantage_in_the_mean() -> None:
    """E[delta | s, a] = A(s, a) for exact V, so E[delta grad log pi] = grad J on any process, one that never ends too."""
    mdp = random_processes(seed=7)
    policy = torch.randn(5, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64).softmax(-1)
    v = evaluate(mdp, policy)
    delta = torch.stack([torch.stack([sum((mdp.chance[s, a, k] * (mdp.earned[s, a, k] + 0.9 * v[mdp.following[s, a, k]] - v[s]) for k in range(5)), torch.zeros(())) for a in range(3)]) for s in range(5)])  # fmt: skip
    close(delta.double(), advantages(mdp, policy))
    close(delta.double() + v.unsqueeze(-1), action_values(mdp, v))


def test_sampled_gradients_agree_with_the_exact_one(steps: MDP, theta: Tensor) -> None:
    """8,000 episodes: every entry within four standard errors, which are those of single episodes; one that is half as long again would be found out."""
    row, values = row_of(PSI["advantage"](GAMMA, 0.9)), evaluate(steps, theta.softmax(-1))
    found = sample(steps, theta.softmax(-1), 8_000, seed=3)
    experience = prepared(row, found, theta, values, torch.zeros(5, 3), GAMMA)
    whole = -gradient(row, found, experience, theta, theta, torch.zeros(5, 3))
    scores = torch.eye(3, dtype=torch.float64)[found.actions] - theta.softmax(-1)[found.states]
    each = torch.zeros(8_000, 5, 3, dtype=torch.float64)
    weight = experience.advantages * GAMMA ** found.layout.positions.double()
    each.index_put_((found.layout.sequence, found.states), weight.unsqueeze(-1) * scores, accumulate=True)
    close(each.mean(0), whole, 1e-12)
    truth, error = exact_gradient(steps, theta), each.std(0) / 8_000**0.5
    assert ((whole - truth).abs() <= 4 * error + 1e-15).all()
    assert ((1.5 * truth - truth).abs() > 4 * error).any()


def test_a_baseline_lowers_the_variance(steps: MDP, theta: Tensor) -> None:
    """E |g|^2 of one episode, exact: the return to go, less V, the exact advantage of each step (lam 0), in this order."""
    values, found = evaluate(steps, theta.softmax(-1)), trajectories(steps, theta.softmax(-1))

    def square(psi: str, lam: float) -> float:
        experience = prepared(row_of(PSI[psi](GAMMA, lam)), found.episodes, theta, values, torch.zeros(5, 3), GAMMA)
        scores = torch.eye(3, dtype=torch.float64)[found.episodes.actions] - theta.softmax(-1)[found.episodes.states]
        each = torch.zeros(len(found.chance), 5, 3, dtype=torch.float64)
        weight = experience.advantages * GAMMA ** found.episodes.layout.positions.double()
        each.index_put_((found.episodes.layout.sequence, found.episodes.states), weight.unsqueeze(-1) * scores, accumulate=True)
        return found.mean(each.square().sum((1, 2))).item()

    assert square("to_go", 1.0) > square("baseline", 1.0) > square("delta", 0.0)


def test_the_targets_of_the_critics() -> None:
    """td0, td_lambda and mc on three steps by hand, and the table that is fitted to them."""
    episodes = Episodes.of([([(0, 0, 1.0), (1, 0, 2.0), (0, 0, 3.0)], 2, False)])
    values = torch.tensor([10.0, 20.0, 30.0], dtype=torch.float64)
    found = {
        name: prepared(
            row_of(make(0.5, 0.5)), episodes, torch.zeros(3, 1).double(), values, torch.zeros(3, 1).double(), 1.0
        ).returns.tolist()
        for name, make in CRITICS.items()
    }
    assert found["td0"] == [1 + 10, 2 + 5, 3 + 15]
    assert found["mc"] == [1 + 1 + 0.75 + 3.75, 2 + 1.5 + 7.5, 3 + 15]
    last = 18.0
    middle = 2 + 0.5 * (0.5 * 10 + 0.5 * last)
    assert found["td_lambda"] == [1 + 0.5 * (0.5 * 20 + 0.5 * middle), middle, last]
    assert fitted(values, episodes, torch.tensor([1.0, 5.0, 2.0]).double(), 0.5).tolist() == [
        10 + 0.5 * (1.5 - 10),
        20 + 0.5 * (5 - 20),
        30.0,
    ]
    assert fitted(values, episodes, torch.tensor([1.0, 5.0, 2.0]).double(), 1.0).tolist() == [1.5, 5.0, 30.0], (
        "rate 1 is the mean of each state"
    )


def test_action_value_is_gae_with_its_baseline_put_back() -> None:
    episodes = Episodes.of([([(0, 0, 1.0), (1, 0, 2.0)], 2, True)])
    values = torch.tensor([10.0, 20.0, 30.0], dtype=torch.float64)
    found = prepared(row_of(ActionValue(0.5, 0.0)), episodes, torch.zeros(3, 1).double(), values, torch.zeros(3, 1).double(), 1.0)
    assert found.advantages.tolist() == found.returns.tolist() == [11.0, 2.0], "30 is not read: the episode ended"
    with pytest.raises(UsageError, match="lam=2"):
        ActionValue(0.5, 2.0)


# ---------------------------------------------------------------------------------------------- loops


def test_reinforce_finds_the_best_policy_of_two_states() -> None:
    mdp = two_states()
    found = reinforce(mdp, iterations=80, episodes=16, rate=0.3)
    assert found.logits.argmax(-1).tolist() == policy_iteration(mdp).policy.tolist() == [1, 0]
    assert found.gains[-1] > 0.97 * (mdp.start * policy_iteration(mdp).values).sum() and found.gains[-1] > found.gains[0]
    assert len(found.gains) == 81 and len(found.returns) == 80


def test_one_update_by_hand() -> None:
    """theta += rate / N sum_i sum_t gamma^t (1[a] - pi) G_t: divided by trajectories, not by actions."""
    mdp = two_states()
    found, episodes = reinforce(mdp, iterations=1, episodes=3, rate=0.1), sample(mdp, torch.full((2, 2), 0.5).double(), 3)
    theta = torch.zeros(2, 2, dtype=torch.float64)
    for i in range(3):
        steps = episodes.layout.actions_of(torch.tensor([i])).tolist()
        rewards = episodes.rewards[steps].tolist()
        for t, step in enumerate(steps):
            to_go = sum(0.9 ** (k - t) * rewards[k] for k in range(t, len(rewards)))
            for a in range(2):
                theta[episodes.states[step], a] += 0.1 / 3 * 0.9**t * to_go * (float(a == episodes.actions[step]) - 0.5)
    close(found.logits, theta)


@pytest.mark.parametrize("critic", CRITICS)
@pytest.mark.parametrize("psi", ["q", "advantage", "delta", "baseline"])
def test_actor_and_critic_find_the_goal(psi: str, critic: str) -> None:
    """A pond of six cells, gamma .95: from .12 to .8 and more of the best, .9025, in twenty updates; the critic knows the start's value."""
    mdp = frozen_lake(("SFF", "FHG"), slippery=False, discount=0.95)
    found = actor_critic(mdp, psi=psi, critic=critic, iterations=20, rate=3.0)
    assert found.gains[0] < 0.13 and found.gains[-1] >= 0.8
    assert (found.values[0] - found.gains[-1]).abs() < 0.12


ROWS: list[tuple[str, float, Callable[[Objective], Objective], dict[str, float]]] = [
    ("ppo", 0.95, lambda row: replace(row, credit=GAE(0.95, 0.95)), {"passes": 4, "rate": 5.0}),
    ("ppo_kl", 0.95, lambda row: replace(row, credit=GAE(0.95, 0.95)), {"passes": 4, "rate": 5.0}),
    ("trpo", 0.95, lambda row: replace(row, credit=GAE(0.95, 0.97)), {}),
    ("reinforce_pp", 0.95, lambda row: replace(row, credit=ReturnToGo(0.95, whitened=True)), {"passes": 4, "rate": 5.0}),
    ("grpo", 1.0, lambda row: row, {"passes": 4, "rate": 5.0}),
    ("rloo", 1.0, lambda row: row, {"rate": 3.0}),
]


@pytest.mark.parametrize(("name", "gamma", "fitting", "settings"), ROWS, ids=[row[0] for row in ROWS])
def test_rows_that_train_language_models_cross_the_lake(
    name: str, gamma: float, fitting: Callable[[Objective], Objective], settings: dict[str, float]
) -> None:
    mdp = frozen_lake(slippery=False, discount=gamma)
    found: Trained = train(mdp, fitting(ALGORITHMS[name]), iterations=45, **settings)  # type: ignore[arg-type]
    best = value_iteration(mdp).values[0]
    assert found.gains[0] < 0.02 and found.gains[-1] > 0.85 * best, f"{found.gains[-1]:.3f} of {best:.3f}"


def test_a_trust_region_keeps_each_step_inside() -> None:
    mdp, row = frozen_lake(slippery=False, discount=0.95), replace(ALGORITHMS["trpo"], credit=GAE(0.95, 0.97))
    episodes = sample(mdp, torch.full((16, 4), 0.25).double(), 64)
    theta, values = torch.zeros(16, 4, dtype=torch.float64), torch.zeros(16, dtype=torch.float64)
    after = train(mdp, row, iterations=1, episodes=64).logits
    apart = (0.25 * (-torch.tensor(4.0).log() - after.log_softmax(-1))).sum(-1)[episodes.states].mean()
    assert 0.005 < apart <= 0.01 and (after != theta).any()
    quiet = MDP.of(mdp.transition, torch.zeros(16, 4), discount=0.95, terminal=mdp.terminal, start=mdp.start, limit=20)
    assert torch.equal(train(quiet, row, iterations=1).logits, theta) and not values.any(), "nothing better inside: every bit stays"


def test_a_controller_moves_its_coefficient() -> None:
    """What it reads is the exact KL(old || policy) after the update; a beta that is halved at every step lets the policy go farther than a fixed one."""
    mdp, base = two_states(), row_of(GAE(0.9, 0.95, whitened=False))
    row = replace(base, ratio=ALGORITHMS["ppo_kl"].ratio, surrogate=ALGORITHMS["ppo_kl"].surrogate, penalty=OldKL(50.0))
    still, moved = (train(mdp, r, iterations=20, passes=4, rate=0.01) for r in (row, replace(row, control=Doubling(1.0))))
    assert moved.gains[-1] > still.gains[-1] + 1 > still.gains[0] + 1
    episodes, theta, even = (
        sample(mdp, torch.full((2, 2), 0.5).double(), 4),
        torch.tensor([[0.3, 0.0], [0.0, 0.1]]).double(),
        torch.zeros(2, 2).double(),
    )
    experience = prepared(row, episodes, even, torch.zeros(2).double(), even, 1.0)
    found = measured(row, episodes, experience, theta, even, even)
    apart = (0.5 * (torch.tensor(0.5).double().log() - theta.log_softmax(-1))).sum(-1)[episodes.states].mean()
    assert found["policy/kl_old"] == pytest.approx(apart.item(), abs=1e-12) and found["sequences"] == 4 and found["objective/kl"] == 0


def test_an_entropy_bonus_keeps_the_policy_open() -> None:
    mdp = two_states()
    row = row_of(ReturnToGo(0.9))
    greedy, open_ = (train(mdp, r, iterations=25, rate=0.08).logits.softmax(-1) for r in (row, replace(row, bonus=EntropyBonus(2.0))))
    assert greedy[0].max() > open_[0].max() + 0.05


def test_training_is_counted() -> None:
    mdp = two_states()
    first, again, other, shorter = (reinforce(mdp, iterations=n, seed=seed) for n, seed in ((5, 0), (5, 0), (5, 1), (3, 0)))
    assert (
        torch.equal(first.logits, again.logits)
        and not torch.equal(first.logits, other.logits)
        and torch.equal(first.gains[:4], shorter.gains)
    )


def test_settings_that_cannot_be_met_are_refused() -> None:
    mdp = two_states()
    for call, told in (
        (lambda: reinforce(mdp, iterations=0), "iterations=0"),
        (lambda: train(mdp, ALGORITHMS["ppo"], iterations=1), r"discounts by 1.0, the process by 0.9: make them equal"),
        (lambda: train(mdp, row_of(Return()), iterations=1), "discounts by 1.0"),
        (lambda: train(mdp, row_of(ReturnToGo(0.9)), iterations=1, passes=2), "not passes=2"),
        (lambda: actor_critic(mdp, psi="x", iterations=1), "psi='x' is none of to_go, baseline, q, advantage, delta"),
        (lambda: actor_critic(mdp, critic="x", iterations=1), "critic='x' is none of td0, td_lambda, mc"),
        (lambda: gradient_ascent(mdp, torch.zeros(2, 2), rate=1.0, steps=0), "steps=0"),
        (lambda: expected_gradient(random_walk(), row_of(ReturnToGo()), torch.zeros(7, 1)), "horizon=None"),
    ):
        with pytest.raises(UsageError, match=told):
            call()
