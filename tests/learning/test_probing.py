"""What an update came to on a few answers, and what was likeliest there instead."""

from __future__ import annotations

import copy

import pytest
import torch

from tilt.learning.learner import Passes
from tilt.learning.probing import chosen, probe, result
from tilt.objectives import ALGORITHMS


def log_softmax(policy, batch, temperature):
    return (policy.head(policy.before_actions(batch)) / temperature).log_softmax(-1)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_alternatives_are_those_of_the_whole_vocabulary(make, batch, temperature):
    learner = make(Passes(1, 1, 12))
    learner.policy.chunk = 4
    found = probe(learner, batch, temperature)
    actions = torch.cat([batch.layout.actions_of(torch.tensor([s])) for s in found.sequences.tolist()])
    logs = log_softmax(learner.policy, batch, temperature)[actions]
    best = logs.topk(5)
    assert torch.equal(found.ids[actions], best.indices) and torch.allclose(found.policy[actions].double(), best.values, atol=1e-6)
    assert torch.allclose(found.before[actions], logs.gather(1, batch.actions[actions][:, None])[:, 0], atol=1e-12)
    with learner.reference() as anchor:
        other = log_softmax(anchor, batch, temperature)[actions]
    assert torch.allclose(found.reference[actions].double(), other.gather(1, best.indices), atol=1e-6)
    assert torch.allclose(found.anchor[actions], other.gather(1, batch.actions[actions][:, None])[:, 0], atol=1e-12)
    others = torch.ones(batch.layout.actions, dtype=torch.bool)
    others[actions] = False
    assert others.any() and found.before[others].isnan().all() and (found.ids[others] == -1).all()


def test_result_is_what_the_update_did_and_exactly_nothing_where_it_did_nothing(make, batch, rewards):
    learner, row = make(Passes(1, 1, 12)), ALGORITHMS["dapo"]
    found = probe(learner, batch, 1.0)
    assert (result(learner, batch, found, 1.0)[~found.before.isnan()] == 0).all()
    before = copy.deepcopy(learner.policy)
    learner.update(batch, row.prepare(rewards, learner.evaluate(batch, row.needs), batch.layout), row)
    with torch.no_grad():
        truth = learner.policy(batch).logprobs - before(batch).logprobs
    moved = result(learner, batch, found, 1.0)
    looked = ~moved.isnan()
    assert torch.allclose(moved[looked], truth[looked], atol=1e-12) and moved[looked].abs().max() > 1e-5


def test_whole_groups_are_looked_at_and_of_one_large_group_a_share(batch):
    picked = chosen(batch)
    groups = batch.layout.prompt[picked].tolist()
    assert groups == [0, 0, 0, 2, 2, 2]
