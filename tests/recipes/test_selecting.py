"""Which answers are trained on: dynamic sampling refills a step with groups that differ, and cut answers can weigh nothing."""

from __future__ import annotations

import math

import pytest
import torch

from tilt.data.rollouts import Prompt, Rollout, Sampling
from tilt.data.streams import Stream
from tilt.objectives import ALGORITHMS, Layout, Rewards, Signals
from tilt.recipes.selecting import Answers, select
from tilt.recipes.settings import Keep
from tilt.rewards.score import Report
from tilt.rewards.text import Text
from tilt.runs import rollout_store

GROUP = ALGORITHMS["grpo"].credit


def answers(earned: dict[int, list[float]], *, stop: str = "stop") -> Answers:
    """Answers of one and two tokens to prompts by id, which earned this much."""
    rollouts, texts = [], []
    for prompt, group in earned.items():
        for i, _ in enumerate(group):
            tokens = (prompt,) * (1 + i % 2)
            rollouts.append(
                Rollout(
                    Prompt((1, 2), prompt), tokens, (True,) * len(tokens), (-1.0,) * len(tokens), stop if i == 0 else "stop", Sampling()
                )
            )
            texts.append(Text("q", f"{prompt}.{i}"))
    total = torch.tensor([float(value) for group in earned.values() for value in group])
    report = Report({"r": 1.0}, {"r": 2}, {"r": f"first of {min(earned)}"})
    actions = sum(len(r.tokens) for r in rollouts)
    return Answers(rollouts, texts, Rewards.of(total, parts={"r": total}, weights={"r": 1.0}, actions=actions), report)


def prompts(found: Answers) -> list[int]:
    return [r.prompt.id for r in found.rollouts]


def test_groups_that_all_earned_the_same_are_replaced_until_the_step_is_full() -> None:
    first = answers({0: [1, 0], 1: [1, 1], 2: [0, 0], 3: [0, 2]})
    later = {4: [0.5, 0.5], 5: [0, 1], 6: [1, 2], 7: [3, 1]}
    asked = []

    def ask(given):
        asked.append([p.id for p in given])
        return answers({p.id: later[p.id] for p in given})

    found = select(first, ask, (Prompt((1, 2), i) for i in later), Keep(mixed=True), GROUP)
    assert asked == [[4, 5], [6]], "as many as are missing, and no more than are needed"
    assert prompts(found) == [0, 0, 3, 3, 5, 5, 6, 6] and prompts(found.dropped) == [1, 1, 2, 2, 4, 4]
    assert found.rewards.total.tolist() == [1, 0, 0, 2, 0, 1, 1, 2] and found.rewards.parts["r"].tolist() == found.rewards.total.tolist()
    assert found.dropped.rewards.total.tolist() == [1, 1, 0, 0, 0.5, 0.5] and len(found.rewards.steps) == 12
    assert [t.completion for t in found.texts] == ["0.0", "0.1", "3.0", "3.1", "5.0", "5.1", "6.0", "6.1"]
    assert found.report.seconds == {"r": 3.0} and found.report.failures == {"r": 6} and found.report.messages == {"r": "first of 0"}


def test_draws_are_bounded_by_their_number_and_by_the_prompts() -> None:
    flat = {i: [1.0, 1.0] for i in range(20)}
    asked = []

    def ask(given):
        asked.append(len(given))
        return answers({p.id: flat[p.id] for p in given})

    first = answers({20: [1, 0], 21: [1, 1]})
    found = select(first, ask, (Prompt((1, 2), i) for i in range(20)), Keep(mixed=True, draws=3), GROUP)
    assert asked == [1, 1] and prompts(found) == [20, 20] and len(found.dropped.rollouts) == 6
    asked.clear()
    found = select(first, ask, iter([Prompt((1, 2), 0)]), Keep(mixed=True, draws=9), GROUP)
    assert asked == [1] and prompts(found) == [20, 20]
    assert select(first, ask, iter([]), Keep(), GROUP) is first


def test_where_no_group_differs_the_first_draw_stands_and_trains_nothing() -> None:
    first = answers({0: [1, 1], 1: [0, 0]})
    found = select(
        first, lambda given: answers({p.id: [2, 2] for p in given}), (Prompt((1, 2), i) for i in (7, 8)), Keep(mixed=True, draws=2), GROUP
    )
    assert prompts(found) == [0, 0, 1, 1] and not found.rewards.trained.any() and prompts(found.dropped) == [7, 7, 8, 8]
    row, layout = ALGORITHMS["grpo"], found.layout
    signals = Signals.of(torch.zeros(layout.actions), reference=torch.zeros(layout.actions), sequences=4)
    assert not row.prepare(found.rewards, signals, layout).weights.any()


def test_a_group_of_which_one_answer_is_scored_has_no_difference() -> None:
    first = answers({0: [1, 0], 1: [1, 0]})
    scored = torch.tensor([True, False, True, True])
    first = Answers(
        first.rollouts, first.texts, Rewards.of(first.rewards.total, parts=first.rewards.parts, scored=scored, actions=6), first.report
    )
    assert prompts(select(first, answers, iter([]), Keep(mixed=True), GROUP)) == [1, 1]


def test_process_rewards_differ_by_their_steps() -> None:
    credit = ALGORITHMS["grpo_process"].credit
    layout = Layout.of([2, 2, 2, 2], [0, 0, 1, 1])
    steps = torch.tensor([1.0, 0, 0, 1, 1, 1, 1, 1])
    rewards = Rewards.of(torch.zeros(4), steps, ends=torch.ones(8, dtype=torch.bool))
    assert credit.flat(rewards, layout).tolist() == [False, True] and GROUP.flat(rewards, layout).tolist() == [True, True]


@pytest.mark.parametrize("name", ["grpo", "dapo", "dr_grpo", "rloo", "reinforce_pp_baseline"])
def test_cut_answers_weigh_nothing_and_stay_in_the_baseline(name) -> None:
    """Weights are those of a batch without them; the advantages of the others are those of the batch with them."""
    found = select(answers({0: [1, 0, 2], 1: [1, 3, 0.5]}, stop="length"), answers, iter([]), Keep(cut=False), GROUP)
    assert found.rewards.trained.tolist() == [False, True, True] * 2
    row, layout, n = ALGORITHMS[name], found.layout, found.layout.actions
    generator = torch.Generator().manual_seed(0)
    signals = Signals.of(*torch.randn(1, n, generator=generator), reference=torch.randn(n, generator=generator), sequences=6)
    every = row.prepare(Rewards.of(found.rewards.total, actions=n), signals, layout)
    some = row.prepare(found.rewards, signals, layout)
    seen = found.rewards.trained[layout.sequence]
    others = torch.nonzero(found.rewards.trained).flatten()
    small = layout.take(others)
    alone = row.average(small, torch.ones(4, dtype=torch.bool)).to(some.weights)
    assert torch.equal(some.weights[seen], alone) and not some.weights[~seen].any()
    assert torch.equal(some.advantages[seen], every.advantages[seen]) and not some.advantages[~seen].any()


def test_the_spare_prompts_of_a_step_are_the_others_in_an_order_of_their_own() -> None:
    stream = Stream(list(range(23)), seed=4)
    for step in (0, 1, 5):
        drawn, spare = stream.draw(step, 6), list(stream.spare(step, 6))
        assert sorted(drawn + spare) == list(range(23)) and spare == list(stream.spare(step, 6)) != sorted(spare)
    assert list(stream.spare(0, 6)) != list(stream.spare(4, 6)) and list(Stream([1], 0).spare(0, 1)) == []


# --- in a run --------------------------------------------------------------------------------------------------------------------


def even(completions, **columns):
    """1 where an answer has an even number of different characters."""
    return [float(len(set(text)) % 2 == 0) for text in completions]


def test_a_run_with_dynamic_sampling(run_rl, metrics):
    """The first draw is that of a run without it; what is dropped is in the store with its reason; the step is deterministic."""
    plainly = run_rl(algorithm="dapo", reward=even, samples=2, prompts=6, steps=1)
    first, again = (
        run_rl(algorithm="dapo", reward=even, samples=2, prompts=6, steps=3, keep={"mixed": True, "draws": 6}) for _ in range(2)
    )
    rows = [rollout_store.read(rollout_store.path_of(run.directory.rollouts, 0)) for run in (plainly, first, again)]
    asked = [{(row["group_id"], row["completion"]) for row in found} for found in rows]
    assert asked[0] < asked[1] == asked[2]
    assert [row["reward"] for row in rows[1]] == [row["reward"] for row in rows[2]]
    reasons = {}
    for row in rows[1]:
        reasons.setdefault(row["group_id"], []).append((row["dropped_reason"], row["reward"]))
    assert {tuple(sorted({r for r, _ in group}, key=str)) for group in reasons.values()} == {(None,), ("zero_variance",)}
    assert all((len({reward for _, reward in group}) == 1) == (group[0][0] == "zero_variance") for group in reasons.values())
    line = metrics(first)[0]
    kept = sum(group[0][0] is None for group in reasons.values())
    assert line["groups/kept"] == kept <= 6 and line["groups/drawn"] == len(reasons) == line["episode"] / 2
    assert line["groups/zero_variance"] == pytest.approx(1 - kept / len(reasons)) and line["sequences/trained"] == 2 * kept
    assert line["reward"] == pytest.approx(sum(row["reward"] for row in rows[1]) / len(rows[1]), abs=1e-6)
    for row in rows[1]:
        dropped = row["dropped_reason"] is not None
        assert all(math.isnan(x) for x in row["push"]) == dropped == (math.isnan(row["advantage"]))
        group = [other["reward"] for other in rows[1] if other["group_id"] == row["group_id"]]
        assert row["group_mean"] == pytest.approx(sum(group) / 2)
    assert metrics(first)[2]["episode"] > 36


def test_a_run_in_which_no_group_ever_differs_is_skipped(run_rl, metrics):
    result = run_rl(algorithm="grpo", reward=lambda completions, **columns: [1.0] * len(completions), keep={"mixed": True, "draws": 2})
    line = metrics(result)[0]
    assert line["skipped"] == 1.0 and line["groups/kept"] == 0 and line["groups/drawn"] == 8
    rows = rollout_store.read(rollout_store.path_of(result.directory.rollouts, 0))
    assert {row["dropped_reason"] for row in rows} == {"zero_variance"} and len(rows) == 32


def test_a_run_that_trains_on_whole_answers_only(run_rl, metrics):
    result = run_rl(algorithm="dapo", keep={"cut": False}, sampling={"max_tokens": 3})
    rows = rollout_store.read(rollout_store.path_of(result.directory.rollouts, 0))
    assert {row["dropped_reason"] for row in rows if row["truncated"]} == {"overlong"}
    assert metrics(result)[0]["sequences/trained"] <= sum(not row["truncated"] for row in rows)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"keep": {"mixed": True}, "samples": 1, "algorithm": "ppo"}, "keep.mixed drops groups whose answers all earned the same"),
        ({"keep": {"draws": 8}}, "draws 8 has no effect without mixed"),
        ({"keep": {"mixed": True, "draws": 1}}, "greater than or equal to 2"),
        ({"keep": {"mixed": True}, "algorithm": "distill", "reference": "x"}, "keep.mixed looks at rewards"),
    ],
)
def test_what_cannot_work_is_refused(run_rl, settings, words):
    with pytest.raises(ValueError, match=words):
        run_rl(**settings)
