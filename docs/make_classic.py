"""Run the cells of docs/classic, write what they print below them, and draw the figures: `python docs/make_classic.py [--pages]`, about a minute."""

from __future__ import annotations

import io
import re
import sys
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from tilt.classic.actor_critic import actor_critic, reinforce, train
from tilt.classic.episodes import World, draws
from tilt.classic.improvement import difference, mixture, mixture_bound, surrogate
from tilt.classic.language import soft_value_iteration, state_policy, token_process
from tilt.classic.mdp import MDP, uniform
from tilt.classic.pictures import beside, curves_svg, grid_svg
from tilt.classic.planning import evaluate, gain, plan_to_horizon, policy_iteration, value_iteration
from tilt.classic.policy_gradient import gradient_ascent, natural_ascent, trust_region_ascent
from tilt.classic.tables import cliff_walking, frozen_lake, random_walk, sutton_barto_grid
from tilt.classic.temporal_difference import double_q_learning, expected_sarsa, monte_carlo, q_learning, sarsa, temporal_difference
from tilt.objectives import ALGORITHMS, GAE, GroupRelative
from tilt.oracle import token_mdp as exact
from tilt.oracle.expectation import Situation, expect_by_prompt
from tilt.oracle.token_mdp import TokenMDP

FOLDER = Path(__file__).with_name("classic")
CELL = re.compile(r"```python\n(?P<code>.*?)```\n(?:\n```text\n.*?```\n)?", re.DOTALL)
Points = Sequence[tuple[float, float]]


def rewritten(page: str) -> str:
    """The page with its cells run from top to bottom in one namespace, and what each prints below it."""
    names: dict[str, object] = {}

    def run(cell: re.Match[str]) -> str:
        said = io.StringIO()
        with redirect_stdout(said):
            exec(compile(cell["code"], "docs/classic", "exec"), names)
        printed = "\n".join(line.rstrip() for line in said.getvalue().rstrip("\n").split("\n"))
        return f"```python\n{cell['code']}```\n" + (f"\n```text\n{printed}\n```\n" if printed.strip() else "")

    return CELL.sub(run, page)


# ---------------------------------------------------------------------------------------------- figures


def numbered(values: Tensor | Sequence[float], start: int = 0) -> list[tuple[float, float]]:
    return [(float(i), float(v)) for i, v in enumerate(values, start)]


def values_of_a_grid() -> str:
    """v of the random policy, and v* with the best actions, of Sutton and Barto's grid."""
    mdp = sutton_barto_grid()
    best = policy_iteration(mdp)
    return beside(
        grid_svg(mdp, evaluate(mdp, uniform(mdp)), title="v of the random policy", digits=1),
        grid_svg(mdp, best.values, best.policy, title="v*", digits=1),
    )


def sweeps() -> str:
    """How far value iteration is from v* after each sweep, on the frozen lake; and the lake's v* with its policy."""
    curves: dict[str, Points] = {}
    for gamma in (0.9, 0.95, 0.99):
        lake = frozen_lake(discount=gamma)
        best = policy_iteration(lake).values
        curves[f"gamma {gamma:g}"] = numbered((value_iteration(lake, theta=1e-9).path - best).abs().amax(-1), 1)
    lake = frozen_lake(discount=0.99)
    best = policy_iteration(lake)
    curves["policy iteration, .99"] = numbered((best.path - best.values).abs().amax(-1).clamp(min=1e-16)[:-1], 1)
    return beside(curves_svg(curves, title="largest error of v after each sweep or round", x="sweeps, rounds", log=True), grid_svg(lake, best.values, best.policy, title="v* of the lake, gamma .99"))  # fmt: skip


def time_left() -> str:
    """The best first steps on the frozen lake with 100 steps left, and with few."""
    lake = frozen_lake(discount=1.0)
    plan = plan_to_horizon(lake)
    return beside(*(grid_svg(lake, plan.values[100 - left], plan.policy[100 - left], title=f"{left} steps left") for left in (100, 20, 6)))


def prediction() -> str:
    """Root mean square error of the values of the random walk, mean of 60 runs: Monte-Carlo and TD at a constant rate."""
    walk = random_walk()
    truth, start = evaluate(walk, uniform(walk))[1:-1], torch.full((7,), 0.5, dtype=torch.float64)
    rules: dict[str, Callable[[int], Tensor]] = {
        "Monte-Carlo": lambda seed: (
            monte_carlo(walk, uniform(walk), episodes=100, alpha=0.03, visits="every", seed=seed, initial=start).history
        ),
        "TD(0)": lambda seed: temporal_difference(walk, uniform(walk), episodes=100, alpha=0.1, seed=seed, initial=start).history,
        "TD(.8)": lambda seed: temporal_difference(walk, uniform(walk), episodes=100, alpha=0.1, lam=0.8, seed=seed, initial=start).history,
    }
    curves = {}
    for name, rule in rules.items():
        error = torch.stack([(rule(seed)[:, 1:-1] - truth).square().mean(1).sqrt() for seed in range(60)]).mean(0)
        curves[name] = numbered([0.5 / 3 * 2**0.5, *error])
    rates = [0.02 * i for i in range(1, 26)]
    hat = {
        f"lam {lam:g}": [
            (rate, float(torch.stack([(temporal_difference(walk, uniform(walk), episodes=10, alpha=rate, lam=lam, seed=seed, initial=start).history[:, 1:-1] - truth).square().mean(1).sqrt().mean() for seed in range(30)]).mean()))
            for rate in rates
        ]
        for lam in (0.0, 0.4, 0.8, 1.0)
    }  # fmt: skip
    hat = {name: [(a, b) for a, b in points if b < 0.4] for name, points in hat.items()}
    return beside(
        curves_svg(curves, title="random walk: error of V, 60 runs", x="episodes"),
        curves_svg(hat, title="TD(lam): error over 10 episodes", x="alpha"),
    )


def cliff() -> str:
    """What the last ten episodes earned while learning on the cliff, mean of 20 seeds, and the ways that Q-learning and SARSA learn."""
    mdp = cliff_walking()
    curves: dict[str, Points] = {}
    for rule in (q_learning, sarsa, expected_sarsa, double_q_learning):
        mean = torch.stack([rule(mdp, episodes=500, seed=seed).returns for seed in range(20)]).mean(0)
        smooth = mean.unfold(0, 10, 1).mean(-1)
        curves[rule.__name__] = [(float(i + 10), max(float(v), -100.0)) for i, v in enumerate(smooth) if i % 5 == 0]
    ways = []
    for rule in (q_learning, sarsa):
        found = rule(mdp, episodes=500, seed=0)
        way = walked(mdp, found.policy)
        seen = found.q.amax(-1).index_fill(0, torch.arange(37, 47), torch.nan)
        ways.append(_way_svg(mdp, seen, found.policy, way, f"{rule.__name__}: the greedy way earns {1 - len(way)}"))
    return beside(curves_svg(curves, title="returns while learning (clipped at -100), 20 seeds", x="episodes", width=520), ways[0], ways[1])


def walked(mdp: MDP, policy: Tensor) -> list[int]:
    """The states of a deterministic walk under a deterministic policy."""
    world, stream = World.of(mdp), draws(0, 0)
    s, way, done = world.begin(next(stream)[0]), [], False
    while not done and len(way) < 60:
        way.append(s)
        s, _, done = world.step(s, int(policy[s]), 0.0)
    return [*way, s]


def _way_svg(mdp: MDP, values: Tensor, policy: Tensor, way: Sequence[int], title: str) -> str:
    """A grid whose arrows stand on the way only."""
    text = grid_svg(mdp, values, policy, title=title, digits=0, side=32)
    lines, cell = text.split("\n"), -1
    kept = []
    for line in lines:
        cell += "<rect x=" in line
        if re.search(r">[←↓→↑]<", line) and cell not in way:
            continue
        kept.append(line)
    return "\n".join(kept)


def bounds() -> str:
    """J along the line from a policy to the greedy one, its surrogate, and the bound that conservative policy iteration climbs."""
    moves = torch.eye(3, dtype=torch.float64)[torch.tensor([[1, 0], [1, 2], [0, 2]])]
    mdp = MDP.of(moves, [[2.0, -1.0], [1.0, 0.0], [1.0, -1.0]], discount=0.6, start=[1.0, 0.0, 0.0])
    old = uniform(mdp)
    target = torch.nn.functional.one_hot(policy_iteration(mdp).policy, 2).double()
    shares = [i / 60 for i in range(61)]
    curves = {
        "J of the mixture": [(a, float(gain(mdp, mixture(mdp, old, target, a)))) for a in shares],
        "surrogate L": [(a, float(surrogate(mdp, old, mixture(mdp, old, target, a)))) for a in shares],
        "lower bound": [(a, b) for a in shares if (b := float(mixture_bound(mdp, old, target, a))) > 0],
    }
    assert abs(difference(mdp, old, target) - (gain(mdp, target) - gain(mdp, old))) < 1e-12
    return curves_svg(curves, title="J, L and its bound, gamma .6", x="share of the target policy")


def ways_up() -> str:
    """J on the frozen lake by exact steps, and on dry ice by sampled ones."""
    lake = frozen_lake(discount=0.95)
    best = (lake.start * policy_iteration(lake).values).sum()
    exact_ways = {
        "gradient, rate 20": gradient_ascent(lake, torch.zeros(16, 4), rate=20.0, steps=40),
        "natural, rate 20": natural_ascent(lake, torch.zeros(16, 4), rate=20.0, steps=40),
        "trust region, .05": trust_region_ascent(lake, torch.zeros(16, 4), limit=0.05, steps=40),
    }
    dry = frozen_lake(slippery=False, discount=0.95)
    rows = {name: replace(ALGORITHMS[name], credit=GAE(0.95, 0.95)) for name in ("ppo", "trpo")}
    sampled = {
        "REINFORCE": reinforce(dry, iterations=80, rate=5.0).gains,
        "actor-critic, delta": actor_critic(dry, iterations=80, rate=5.0).gains,
        "PPO": train(dry, rows["ppo"], iterations=80, passes=4, rate=5.0).gains,
        "TRPO": train(dry, rows["trpo"], iterations=80).gains,
    }
    return beside(
        curves_svg({name: numbered((best - climb.gains).clamp(min=1e-12)) for name, climb in exact_ways.items()}, title="slippery lake: J* - J, exact steps", x="steps", log=True),
        curves_svg({name: numbered(gains) for name, gains in sampled.items()}, title="dry lake: J, 16 episodes an update", x="updates"),
    )  # fmt: skip


def bridge_task() -> TokenMDP:
    """One prompt, fifteen answers of one to three tokens, a reference in general position."""
    found = TokenMDP.of(lambda g, a: 0.9 * a.count(0) - 0.4 * (a[-1] != 2) + 0.25 * len(a) ** 0.5 - 0.6 * (a[0] == 1), prompts=1)
    return replace(found, reference=found.tilted(0.9, 5))


def bridge() -> str:
    """The gap KL(policy || pi*) of RLOO, PPO's first steps and GRPO with k3, by exact expected gradients; and the answers' probabilities at their ends."""
    tree, beta = bridge_task(), 0.7
    best = soft_value_iteration(token_process(tree), beta, reference=state_policy(tree.reference)).policy[:-1].view(1, 7, 3).log()
    rows = {
        "RLOO": (replace(ALGORITHMS["rloo"], credit=GroupRelative("leave_one_out", "none", kl=beta)), 2),
        "PPO": (replace(ALGORITHMS["ppo_sequence"], credit=GAE(1.0, 0.95, kl=beta, whitened=False), average=ALGORITHMS["rloo"].average, value=ALGORITHMS["rloo"].value), 1),
        "GRPO, k3 in the loss": (replace(ALGORITHMS["grpo"], credit=GroupRelative("mean", "none"), average=ALGORITHMS["rloo"].average, penalty=replace(ALGORITHMS["grpo"].penalty, beta=beta)), 2),
    }  # fmt: skip
    curves: dict[str, Points] = {}
    ends = {"reference": tree.reference, "pi*": best}
    for name, (row, samples) in rows.items():
        at, gaps = tree.reference.log_softmax(-1), []
        for step in range(60):
            gap = float(exact.divergence(tree, at, best))
            gaps += [(float(step), gap)] if gap > 1e-9 else []
            slope = expect_by_prompt(row, Situation.of(tree, samples, at, critic=exact.state_values(tree, at, kl=beta))).mean
            at = (at + 0.3 * slope / (exact.visits(tree, at).unsqueeze(-1) * at.exp())).log_softmax(-1)
        curves[name], ends[name] = gaps, at
    order = exact.answer_logprobs(tree, best)[0].argsort(descending=True)
    shares = {
        name: [(float(i), float(exact.answer_logprobs(tree, policy)[0].exp()[n])) for i, n in enumerate(order)]
        for name, policy in ends.items()
    }
    return beside(
        curves_svg(curves, title="KL(policy ‖ pi*), exact expected steps", x="steps", log=True),
        curves_svg(shares, title="probability of each answer, likeliest first", x="answers", dots=True),
    )


FIGURES = (values_of_a_grid, sweeps, time_left, prediction, cliff, bounds, ways_up, bridge)


def main(words: Sequence[str]) -> None:
    for path in sorted(FOLDER.glob("*.md")):
        path.write_text(rewritten(path.read_text(encoding="utf-8")), encoding="utf-8")
    if "--pages" not in words:
        for draw in FIGURES:
            (FOLDER / f"{draw.__name__}.svg").write_text(draw(), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
