"""A pack names, for every action, the token whose output chose it, and each prompt stands in it once."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tilt.data.packing import Pack, evenly, pack
from tilt.data.rollouts import Prompt, Rollout, Sampling

END = 0


def sampled(prompt: tuple[int, ...], id: int, tokens: tuple[int, ...], mask: tuple[bool, ...] | None = None) -> Rollout:
    chosen = mask or (True,) * len(tokens)
    logprobs = tuple(-float(t + 1) if c else math.nan for t, c in zip(tokens, chosen, strict=True))
    return Rollout(Prompt(prompt, id), tokens, chosen, logprobs, "stop", Sampling())


def test_one_answer() -> None:
    made = pack([sampled((5, 6), 0, (7, 8, END))])
    assert made.tokens.tolist() == [5, 6, 7, 8, END] and made.positions.tolist() == [0, 1, 2, 3, 4]
    assert made.predictors.tolist() == [1, 2, 3] and made.actions.tolist() == [7, 8, END]
    assert made.sampler.tolist() == [-8, -9, -1] and made.last_tokens.tolist() == [4]
    numbers = (
        made.tokens,
        made.positions,
        made.predictors,
        made.actions,
        made.own,
        made.segments.start,
        made.segments.parent,
        made.layout.prompt,
    )
    assert all(x.dtype == torch.int64 for x in numbers)


def test_answers_to_one_prompt_share_it() -> None:
    made = pack([sampled((5, 6), 0, (7, 8, END)), sampled((5, 6), 0, (9, END)), sampled((5, 6), 0, (END,))])
    assert made.tokens.tolist() == [5, 6, 7, 8, END, 9, END, END]
    assert made.positions.tolist() == [0, 1, 2, 3, 4, 2, 3, 2]
    assert made.predictors.tolist() == [1, 2, 3, 1, 5, 1], "the first action of every answer is chosen by the last prompt token"
    assert made.actions.tolist() == [7, 8, END, 9, END, END]
    assert made.segments.parent.tolist() == [-1, 0, 0, 0] and made.layout.prompt.tolist() == [0, 0, 0]
    assert made.layout.lengths.tolist() == [3, 2, 1] and made.last_tokens.tolist() == [4, 6, 7]


def test_tool_output_inside_an_answer_is_no_action() -> None:
    made = pack([sampled((5,), 0, (7, 3, 3, 8), (True, False, False, True))])
    assert made.actions.tolist() == [7, 8] and made.predictors.tolist() == [0, 3]
    assert made.sampler.tolist() == [-8, -9]


def test_an_empty_prompt_is_a_text_of_its_own() -> None:
    made = pack([sampled((), 0, (4, 5), (False, True)), sampled((), 1, (6, 7, 8), (False, True, True))])
    assert made.segments.parent.tolist() == [-1, -1] and made.positions.tolist() == [0, 1, 0, 1, 2]
    assert made.predictors.tolist() == [0, 2, 3] and made.actions.tolist() == [5, 7, 8]
    with pytest.raises(AssertionError, match="has no predictor"):
        pack([sampled((), 0, (4, 5))])


def test_equal_prompts_of_other_ids_are_other_groups() -> None:
    made = pack([sampled((5,), 0, (1,)), sampled((5,), 1, (1,))])
    assert made.layout.prompt.tolist() == [0, 1] and made.tokens.tolist() == [5, 1, 5, 1]


def test_groups_may_come_in_any_order() -> None:
    made = pack([sampled((5,), 0, (1, END)), sampled((6, 6), 1, (2,)), sampled((5,), 0, (3,))])
    assert made.layout.prompt.tolist() == [0, 1, 0] and made.layout.sequence.tolist() == [0, 0, 1, 2]
    assert made.tokens.tolist() == [5, 1, END, 3, 6, 6, 2], "answers to a prompt stand behind it"
    assert made.predictors.tolist() == [0, 1, 5, 0] and made.actions.tolist() == [1, END, 2, 3]
    assert made.last_tokens.tolist() == [2, 6, 3]


def test_an_answer_without_an_action_is_refused() -> None:
    with pytest.raises(AssertionError, match="at least one action"):
        pack([sampled((5,), 0, (1,), (False,))])


@st.composite
def batches(draw: st.DrawFn) -> list[Rollout]:
    prompts = draw(st.lists(st.lists(st.integers(1, 9), max_size=4), min_size=1, max_size=4))
    made = []
    for _ in range(draw(st.integers(1, 8))):
        id = draw(st.integers(0, len(prompts) - 1))
        tokens = draw(st.lists(st.integers(10, 99), min_size=1 if prompts[id] else 2, max_size=5))
        mask = draw(st.lists(st.booleans(), min_size=len(tokens), max_size=len(tokens)))
        mask[-1] = True
        mask[0] = mask[0] and bool(prompts[id])
        made.append(sampled(tuple(prompts[id]), id, tuple(tokens), tuple(mask)))
    return made


def contexts(made: Pack) -> list[list[tuple[tuple[int, ...], int, float]]]:
    """For each sequence its actions as (every token before it, the action, the sampler's log-probability), by walking the segments."""
    found: list[list[tuple[tuple[int, ...], int, float]]] = [[] for _ in range(made.layout.sequences)]
    tokens, starts = made.tokens.tolist(), made.segments.start.tolist()
    for a, s in enumerate(made.layout.sequence.tolist()):
        own = int(made.own[s])
        above = int(made.segments.parent[own])
        predictor = int(made.predictors[a])
        lead = [] if above < 0 else tokens[starts[above] : starts[above] + int(made.segments.length[above])]
        inside = tokens[starts[own] : predictor + 1] if predictor >= starts[own] else []
        assert inside or predictor == starts[above] + int(made.segments.length[above]) - 1
        assert int(made.positions[predictor]) == len(lead) + len(inside) - 1
        found[s].append(((*lead, *inside), int(made.actions[a]), float(made.sampler[a])))
    return found


def expected(rollout: Rollout) -> list[tuple[tuple[int, ...], int, float]]:
    return [
        (rollout.prompt.tokens + rollout.tokens[:i], rollout.tokens[i], rollout.logprobs[i])
        for i in range(len(rollout.tokens))
        if rollout.sampled[i]
    ]


@given(batches())
def test_every_action_has_its_own_past_before_it(rollouts: list[Rollout]) -> None:
    made = pack(rollouts)
    assert contexts(made) == [expected(rollout) for rollout in rollouts]
    assert [made.tokens[i].item() for i in made.last_tokens] == [rollout.tokens[-1] for rollout in rollouts]
    assert len(made.tokens) == sum(len(r.tokens) for r in rollouts) + sum(
        len(p) for _, p in {(r.prompt.id, r.prompt.tokens) for r in rollouts}
    )
    ends = (made.segments.start + made.segments.length).tolist()
    assert made.segments.start.tolist() == [0, *ends[:-1]] and ends[-1] == len(made.tokens), "the segments tile the row"


@given(batches(), st.data())
def test_a_part_of_a_pack_is_the_pack_of_the_part(rollouts: list[Rollout], data: st.DataObject) -> None:
    part = data.draw(st.lists(st.integers(0, len(rollouts) - 1), min_size=1, unique=True))
    taken = pack(rollouts).take(torch.tensor(part))
    fresh = pack([rollouts[i] for i in part])
    assert contexts(taken) == contexts(fresh) == [expected(rollouts[i]) for i in part]
    assert len(taken.tokens) == len(fresh.tokens)
    prompts = sorted(set(range(len(taken.segments.start))) - set(taken.own.tolist()))
    assert (taken.segments.parent[prompts] == -1).all(), "a prompt has nothing above it"
    assert (taken.layout.prompt[:, None] == taken.layout.prompt).equal(fresh.layout.prompt[:, None] == fresh.layout.prompt)


@given(batches(), st.integers(1, 40))
def test_parts_hold_every_sequence_once_within_the_budget(rollouts: list[Rollout], budget: int) -> None:
    made = pack(rollouts)
    parts = made.split(budget)
    assert sorted(i for part in parts for i in part.tolist()) == list(range(len(rollouts)))
    for part in parts:
        assert len(made.take(part).tokens) <= budget or len(part) == 1


def test_parts_are_of_like_size() -> None:
    """Ten texts of 10 tokens within 64: six and four by filling up, five and five here."""
    made = pack([sampled((1, 2, 3), i, (4,) * 6 + (END,)) for i in range(10)])
    assert [len(part) for part in made.split(64)] == [5, 5]
    assert evenly(lambda limit: [0] if limit >= 10 else [0, 1], 10) == [0]
    assert evenly(lambda limit: list(range(0, 100, limit)), 51) == [0, 50], "two parts either way"


def test_the_budget_counts_each_prompt_once_a_part() -> None:
    """After one longer prompt, prompts of 3 tokens with answers of 2: two answers to one prompt cost 7, to two prompts 10; no fewer parts than needed, of like size."""
    made = pack([sampled((5,) * 6, 9, (7, END)), *(sampled((5, 5, i), i, (7, END)) for i in (0, 1, 0, 1, 2))])
    rest = torch.arange(1, 6)
    assert [part.tolist() for part in made.split(7, rest)] == [[1, 3], [2, 4], [5]]
    assert [part.tolist() for part in made.split(9, rest)] == [[1, 3], [2, 4], [5]], "9 tokens hold no answer to a second prompt"
    assert [part.tolist() for part in made.split(12, rest)] == [[1, 3, 2], [4, 5]]
    assert [part.tolist() for part in made.split(14, rest)] == [[1, 3, 2], [4, 5]], (
        "two parts either way, and of 14 and 5 tokens the larger would be larger"
    )
    assert [part.tolist() for part in made.split(4, rest)] == [[1], [3], [2], [4], [5]], "longer than the budget, each is a part of its own"
    assert [part.tolist() for part in made.split(12, torch.tensor([5, 4, 1]))] == [[1, 4], [5]]
    assert [part.tolist() for part in made.split(15)] == [[0, 1, 3], [2, 4, 5]], "all sequences, where none are named"
    assert [part.tolist() for part in pack([sampled((), i, (1, 2, END), (False, True, True)) for i in range(3)]).split(6)] == [[0, 1], [2]]


def test_a_pack_moves_whole() -> None:
    moved = pack([sampled((5, 6), 0, (7, 8, END))]).to("meta")
    own, segments, layout = (vars(x) for x in (moved, moved.segments, moved.layout))
    for x in [*own.values(), *segments.values(), layout["sequence"], layout["prompt"], moved.kept.ids, moved.kept.offsets]:
        assert not isinstance(x, torch.Tensor) or x.is_meta
