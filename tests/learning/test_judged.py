"""Judged answers: how they are laid out, what models say of them, and that no row of the table sees how its batch was split."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tilt.data.packing import pack
from tilt.data.rollouts import Prompt, Rollout
from tilt.errors import DataError, UsageError
from tilt.learning.judged import Judged, judged, lay, portions, with_mismatched
from tilt.learning.pairs import (
    EndScores,
    Likelihoods,
    SpanScores,
    divergent_span,
    head_sums,
    held_against,
    measured,
    read,
    read_anchors,
    update_pairs,
    whole_batch,
)
from tilt.learning.reference import move_reference
from tilt.models.adapters import add_lora, plain_copy
from tilt.models.policy import Policy, RewardModel
from tilt.objectives import PREFERENCES, Classifier, Confidence, Logistic, Preference, ScoreMargin, Zero
from tilt.optim.optimizers import AdamW, Optimizer
from tilt.segments import Layout

END = 19


def drawn(seed: int):
    generator = torch.Generator().manual_seed(seed)
    return lambda n: tuple(torch.randint(0, 18, (n,), generator=generator).tolist())


def rankings(sizes: list[int], seed: int = 3) -> list[Judged]:
    """One prompt each, with so many answers of 1 to 6 tokens and an end."""
    draw = drawn(seed)
    made = []
    for i, size in enumerate(sizes):
        prompt = Prompt(draw(2 + i % 3), i)
        made.append(Judged(tuple(Rollout.demonstration(prompt, (*draw(1 + (i + 3 * k) % 6), END)) for k in range(size))))
    return made


PAIRS = rankings([2] * 5)
RANKED = rankings([3, 2, 4])
LABELLED = [Judged((example.answers[0],), good=i % 3 != 1) for i, example in enumerate(rankings([1] * 7, seed=5))]


@pytest.fixture
def policy(lm):
    return Policy(lm)


@pytest.fixture
def reference(lm):
    other = plain_copy(lm)
    generator = torch.Generator().manual_seed(8)
    with torch.no_grad():
        for p in other.parameters():
            p.add_(torch.randn(p.shape, generator=generator) * 0.1)
    return Policy(other).requires_grad_(False)


@pytest.fixture
def model(policy):
    return RewardModel.from_policy(policy, padding=20)


class Catching(Optimizer):
    """An optimizer that keeps the gradient instead of stepping."""

    def step(self) -> Tensor:
        self.seen = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in self.parameters])
        self.clear()
        return self.seen.norm()


def gradient(module, reader, row, examples, anchors, budget, views=(1.0,)):
    optimizer = Catching(module, AdamW(1e-3), 10)
    found, after = update_pairs(reader, optimizer, row, examples, anchors, views=views, micro_tokens=budget)
    return optimizer.seen, found, after


# ------------------------------------------------------------------------------------------------ splits


LIKELY = [name for name, row in PREFERENCES.items() if row.margin.reads == "likelihood"]


@pytest.mark.parametrize("name", LIKELY)
def test_micro_batches_change_nothing(policy, reference, name):
    """Value, metrics and gradient of every row, whatever the budget, against the loss of the whole batch taken at once."""
    row = PREFERENCES[name]
    examples = with_mismatched(PAIRS) if "mismatched" in row.needs else PAIRS
    reader = Likelihoods(policy, row.needs)
    anchors = read_anchors(Likelihoods(reference, row.needs & {"heads"}), examples, 25) if "reference" in row.needs else None
    seen = [gradient(policy, reader, row, examples, anchors, budget) for budget in (10_000, 25, 1)]
    assert [len(portions(examples, budget)) for budget in (10_000, 25, 1)] == [1, 3, 5]
    whole = held_against(reader(lay(examples, 5))[0], anchors)
    if anchors is not None:
        others = [r for e in examples for r in e.mismatched]
        with torch.no_grad():
            said = reader(lay([Judged((r,)) for r in others], 1))[0].chosen if others else whole.mismatched
        whole = replace(whole, mismatched=replace(said, reference=anchors.mismatched))
    loss = row.loss(whole)
    direct = torch.autograd.grad(loss, list(policy.parameters()), materialize_grads=True, allow_unused=True)
    direct = torch.cat([g.flatten() for g in direct])
    assert direct.abs().max() > 1e-6
    for found, said, after in seen:
        torch.testing.assert_close(found, direct, rtol=0, atol=1e-12 * max(1.0, float(direct.abs().max())))
        assert said == pytest.approx(seen[0][1], abs=1e-10) and said["loss"] == pytest.approx(float(loss.detach()), abs=1e-10)
        assert (after == row) == (name != "bco_pair")


@pytest.mark.parametrize("name", ["kto", "bco_pair", "nca_pair"])
def test_micro_batches_of_labelled_answers_change_nothing(policy, reference, name):
    row = PREFERENCES[name]
    examples = with_mismatched(LABELLED) if name == "kto" else LABELLED
    anchors = read_anchors(Likelihoods(reference), examples, 10_000)
    seen = [gradient(policy, Likelihoods(policy), row, examples, anchors, budget) for budget in (10_000, 20, 1)]
    with torch.no_grad():
        ratios = [float(policy(pack([e.answers[0]])).logprobs.sum() - reference(pack([e.answers[0]])).logprobs.sum()) for e in examples]
        others = [r for e in examples for r in e.mismatched]
        kl = [float(policy(pack([r])).logprobs.sum() - reference(pack([r])).logprobs.sum()) for r in others]
    level = {"kto": 0.1 * max(0.0, sum(kl) / max(len(kl), 1)), "bco_pair": 0.1 * sum(ratios) / 7, "nca_pair": 0.0}[name]
    assert seen[0][1]["baseline"] == pytest.approx(level, abs=1e-10)
    good = [r for e, r in zip(examples, ratios, strict=True) if e.good]
    assert seen[0][1]["rewards/chosen"] == pytest.approx(0.1 * sum(good) / len(good), abs=1e-10)
    assert seen[0][1]["margin"] == pytest.approx(seen[0][1]["rewards/chosen"] - seen[0][1]["rewards/rejected"], abs=1e-12)
    for found, said, _ in seen:
        torch.testing.assert_close(found, seen[0][0], rtol=0, atol=1e-12)
        assert said == pytest.approx(seen[0][1], abs=1e-10)


@pytest.mark.parametrize("kind", ["reward", "span", "deepspeed", "smooth"])
def test_micro_batches_of_rankings_change_nothing(model, kind):
    """Each ranking weighs the same, each of its pairs 1 / C(K, 2); against loops over every pair, answer by answer."""
    row = {"deepspeed": PREFERENCES["rm_deepspeed_chat"], "smooth": Preference(ScoreMargin(0.1), Logistic(0.1))}.get(
        kind, PREFERENCES["reward_model"]
    )
    reader = SpanScores(model, 20) if kind == "deepspeed" else EndScores(model, along=kind == "span")
    views = (0.3, 0.7) if kind == "span" else (1.0,)
    seen = [gradient(model, reader, row, RANKED, None, budget, views) for budget in (10_000, 30, 1)]
    loss = torch.zeros(())
    for example in RANKED:
        size = len(example.answers)
        longest = max(len(r.tokens) for r in example.answers)
        padded = [r.tokens + (20,) * (longest - len(r.tokens)) for r in example.answers]
        scores = [model.everywhere(pack([replace_tokens(r, tokens)]))[-longest:] for r, tokens in zip(example.answers, padded, strict=True)]
        for a in range(size):
            for b in range(a + 1, size):
                na, nb = len(example.answers[a].tokens), len(example.answers[b].tokens)
                if kind == "deepspeed":
                    at = next(t for t in range(longest) if padded[a][t] != padded[b][t])
                    each = [torch.log1p(torch.exp(scores[b][t] - scores[a][t])) for t in range(at, max(na, nb))]
                    term = sum(each) / len(each)
                elif kind == "span":
                    gaps = scores[a][na - 1] - scores[b][nb - 1], scores[a][:na].mean() - scores[b][:nb].mean()
                    term = sum(share * torch.log1p(torch.exp(-gap)) for share, gap in zip(views, gaps, strict=True))
                else:
                    h = scores[a][na - 1] - scores[b][nb - 1]
                    h = h - 0.1 if kind == "smooth" else h
                    e = 0.1 if kind == "smooth" else 0.0
                    term = (1 - e) * torch.log1p(torch.exp(-h)) + e * torch.log1p(torch.exp(h))
                loss = loss + term / (size * (size - 1) / 2) / len(RANKED)
    direct = torch.autograd.grad(loss, list(model.parameters()), materialize_grads=True, allow_unused=True)
    direct = torch.cat([g.flatten() for g in direct])
    for found, said, _ in seen:
        torch.testing.assert_close(found, direct, rtol=0, atol=1e-10)
        assert said == pytest.approx(seen[0][1], abs=1e-10) and said["loss"] == pytest.approx(float(loss.detach()), abs=1e-10)


def replace_tokens(rollout: Rollout, tokens: tuple[int, ...]) -> Rollout:
    return Rollout.demonstration(rollout.prompt, tokens)


def test_a_classifier_of_labelled_answers(model):
    """A reward model learns from labels too: the mean over answers of -log sigmoid(+-score)."""
    row = Preference(ScoreMargin(), Classifier(), comparison=Zero())
    found, said, _ = gradient(model, EndScores(model), row, LABELLED, None, 20)
    loss = sum(
        torch.log1p(torch.exp(-model(pack([e.answers[0]]))[0] if e.good else model(pack([e.answers[0]]))[0])) for e in LABELLED
    ) / len(LABELLED)
    direct = torch.autograd.grad(loss, list(model.parameters()), materialize_grads=True, allow_unused=True)
    torch.testing.assert_close(found, torch.cat([g.flatten() for g in direct]), rtol=0, atol=1e-10)
    assert said["loss"] == pytest.approx(float(loss.detach()), abs=1e-10)


# ------------------------------------------------------------------------------------------------ what models say


def test_what_a_policy_says_of_answers(policy):
    """Sums over actions, lengths, sums over the shared length, and the confidence of every action, against plain logits."""
    pairs = Likelihoods(policy, frozenset({"heads", "confidence"}))(lay(RANKED, 3))[0]
    number = 0
    for example in RANKED:
        for a in range(len(example.answers)):
            for b in range(a + 1, len(example.answers)):
                for own, other, side in ((a, b, pairs.chosen), (b, a, pairs.rejected)):
                    answer, short = example.answers[own], min(len(example.answers[own].tokens), len(example.answers[other].tokens))
                    one = pack([answer])
                    logits = policy.head(policy.hidden(one)[one.predictors]).log_softmax(-1)
                    each = logits[torch.arange(len(answer.tokens)), torch.tensor(answer.tokens)]
                    confidence = (each - logits.exp().square().sum(-1).log()).mean()
                    wanted = {"scores": each.sum(), "lengths": len(answer.tokens), "heads": each[:short].sum(), "confidence": confidence}
                    for name, value in wanted.items():
                        assert float(getattr(side, name)[number].detach()) == pytest.approx(
                            float(torch.as_tensor(value).detach()), abs=1e-10
                        ), name
                number += 1
    assert number == 3 + 1 + 6 == len(pairs.margins) and not pairs.chosen.confidence.requires_grad
    assert pairs.weights.tolist() == pytest.approx([1 / 9] * 3 + [1 / 3] + [1 / 18] * 6)


def test_confidence_is_one_in_the_mean_of_the_policys_own_words(policy):
    """sum_v p(v) exp(log p(v) - log sum p^2) = 1 at every state."""
    batch = pack([e.answers[0] for e in PAIRS])
    with torch.no_grad():
        logits = policy.head(policy.hidden(batch)[batch.predictors]).log_softmax(-1)
        weights = (logits - policy.collisions(batch)[:, None]).exp()
    torch.testing.assert_close((logits.exp() * weights).sum(-1), torch.ones(len(batch.actions)))
    assert Confidence().needs == {"confidence"}


def test_head_sums() -> None:
    layout = Layout.of([3, 2])
    x = torch.tensor([1.0, 2, 3, 4, 5])
    assert head_sums(x, layout, torch.tensor([0, 1]), torch.tensor([2, 2])).tolist() == [3, 9]
    assert head_sums(x, layout, torch.tensor([1, 0, 1]), torch.tensor([1, 3, 2])).tolist() == [4, 6, 9], (
        "an answer may stand in several pairs"
    )


@pytest.mark.parametrize(("chosen", "rejected", "span"), [
    ((5, 6, 7, 19), (5, 8, 19), [1, 2, 3]),
    ((5, 19), (5, 19), [1]),
    ((5,), (5, 6, 19), [1, 2]),
    ((5, 6, 19), (5,), [1, 2]),
    ((4, 19), (5, 6, 7, 19), [0, 1, 2, 3]),
])  # fmt: skip
def test_divergent_spans(chosen, rejected, span):
    assert list(divergent_span(chosen, rejected)) == span


def test_the_scores_of_a_span_are_those_of_the_padded_text(model):
    """Position by position, with the end score read before the padding."""
    prompt = Prompt((1, 2), 0)
    pair = Judged((Rollout.demonstration(prompt, (5, 6, 7, END)), Rollout.demonstration(prompt, (5, END))))
    laid = lay([pair], 1, padding=20)
    assert laid.pack.layout.lengths.tolist() == [4, 2], "padding is no action"
    with torch.no_grad():
        found = SpanScores(model, 20)(laid)[0]
        short, long = (
            model.everywhere(pack([replace_tokens(a, t)])) for a, t in zip(pair.answers, ((5, 6, 7, END), (5, END, 20, 20)), strict=True)
        )
        plain = model(pack([pair.answers[0], pair.answers[1]]))
    torch.testing.assert_close(found.span.chosen, short[3:])
    torch.testing.assert_close(found.span.rejected, long[3:])
    torch.testing.assert_close(torch.stack([found.chosen.scores[0], found.rejected.scores[0]]), plain)


def test_the_view_along_an_answer_is_the_mean_of_its_prefixes(model):
    with torch.no_grad():
        end, along = EndScores(model, along=True)(lay(PAIRS, 5))
        for n, example in enumerate(PAIRS):
            for answer, last, mean in zip(
                example.answers, (end.chosen, end.rejected), (along.chosen, along.rejected), strict=True
            ):  # fmt: skip
                prefixes = [pack([Rollout.demonstration(answer.prompt, answer.tokens[: k + 1])]) for k in range(len(answer.tokens))]
                each = torch.stack([model(p)[0] for p in prefixes])
                assert float(mean.scores[n]) == pytest.approx(float(each.mean()), abs=1e-10)
                assert float(last.scores[n]) == pytest.approx(float(each[-1]), abs=1e-10)
    small = read(EndScores(model), PAIRS, 15)[0]
    torch.testing.assert_close(small.chosen.scores, end.chosen.scores)


def test_anchors_follow_their_examples(reference):
    """Any examples in any order: those of rankings, and of labelled answers with their mismatched ones."""
    for examples in (RANKED, with_mismatched(LABELLED)):
        anchors = read_anchors(Likelihoods(reference), examples, 30)
        order = [2, 0, 1]
        direct = read_anchors(Likelihoods(reference), [examples[i] for i in order], 10_000)
        found = anchors.of(order)
        torch.testing.assert_close(found.pairs.chosen.scores, direct.pairs.chosen.scores)
        torch.testing.assert_close(found.pairs.rejected.scores, direct.pairs.rejected.scores)
        torch.testing.assert_close(found.mismatched, direct.mismatched)
        torch.testing.assert_close(found.of([1]).pairs.chosen.scores, anchors.of([0]).pairs.chosen.scores)
        assert len(anchors.of([]).pairs.margins) == 0


def test_mismatched_answers_are_those_of_another_prompt():
    same = PAIRS[0].answers[0].prompt
    examples = [*PAIRS[:1], Judged((Rollout.demonstration(same, (3, END)), Rollout.demonstration(same, (4, END)))), *PAIRS[1:3]]
    found = with_mismatched(examples)
    assert [[r.tokens for r in e.mismatched] for e in found] == [[r.tokens for r in examples[k].answers] for k in (2, 2, 3, 0)]
    assert all(r.prompt == e.answers[0].prompt for e in found for r in e.mismatched)
    with pytest.raises(DataError, match="every row asks the same"):
        with_mismatched(examples[:2])
    assert with_mismatched(examples[:2], PAIRS[4:])[0].mismatched[0].tokens == PAIRS[4].answers[0].tokens


def test_metrics_of_held_out_answers(policy, reference):
    row = PREFERENCES["kto"]
    examples = with_mismatched(PAIRS)
    anchors = read_anchors(Likelihoods(reference), examples, 10_000)
    (pairs,) = whole_batch(Likelihoods(policy), row, examples, anchors, 20)
    found = measured(row, pairs)
    gaps = [float(x) for x in row.margin(pairs.chosen) - row.margin(pairs.rejected)]
    assert found["accuracy"] == pytest.approx(sum(g > 0 for g in gaps) / 5) and found["margin"] == pytest.approx(sum(gaps) / 5)
    assert found["baseline"] >= 0 and len(pairs.mismatched.scores) == 10


# ------------------------------------------------------------------------------------------------ a reference that moves


@pytest.mark.parametrize("adapted", [False, True])
def test_a_reference_moves_by_its_share(lm, reference, adapted):
    """.6 policy + .4 reference in every weight; of a policy with adapters, in the weights that it computes with."""
    if adapted:
        add_lora(lm, 2, 4.0)
        with torch.no_grad():
            for name, p in lm.named_parameters():
                if "lora_B" in name:
                    p.add_(0.3)
    policy = Policy(lm)
    target, before = plain_copy(lm).state_dict(), {k: v.clone() for k, v in reference.lm.state_dict().items()}
    move_reference(reference, policy, 0.6)
    for name, p in reference.lm.named_parameters():
        torch.testing.assert_close(p, 0.6 * target[name] + 0.4 * before[name])
    move_reference(reference, policy, 1.0)
    batch = pack([e.answers[0] for e in PAIRS])
    with torch.no_grad():
        torch.testing.assert_close(reference(batch).logprobs, policy(batch).logprobs)


def test_a_reference_of_another_shape_stays(policy):
    from tilt.models.loading import tiny

    other = Policy(tiny("gpt2", vocabulary=20, width=32, layers=2, heads=2, context=32))
    with pytest.raises(UsageError, match="that the policy has not"):
        move_reference(other, policy, 0.5)


# ------------------------------------------------------------------------------------------------ bad input


def rendered(columns, answers=2):
    prompt = Prompt((1, 2), 7, columns)
    return [tuple(Rollout.demonstration(prompt, (3 + k, END)) for k in range(answers))]


def test_columns_say_how_answers_were_judged():
    (pair,) = judged(rendered({"margin": 2, "probability": "0.25"}))
    assert (pair.margin, pair.probability, pair.paired) == (2.0, 0.25, True)
    (plain,) = judged(rendered({"margin": None}))
    assert (plain.margin, plain.probability, plain.good) == (0.0, 1.0, True)
    assert judged(rendered({"label": False}, 1))[0].good is False and judged(rendered({"label": True}, 1))[0].good is True
    laid = lay([pair], 4)
    assert laid.margins.tolist() == [2.0] and laid.probability.tolist() == [0.25] and laid.weights.tolist() == [0.25]


@pytest.mark.parametrize(("columns", "answers", "reason"), [
    ({"margin": "much"}, 2, "row 7: column 'margin' is 'much', not a finite number"),
    ({"margin": float("nan")}, 2, "column 'margin' is nan"),
    ({"margin": True}, 2, "column 'margin' is True"),
    ({"probability": 1.5}, 2, "row 7: probability is 1.5, and must lie in \\[0, 1\\]"),
    ({"probability": 0.5}, 3, "this row ranks 3 answers"),
])  # fmt: skip
def test_columns_that_cannot_be_used(columns, answers, reason):
    with pytest.raises(DataError, match=reason):
        judged(rendered(columns, answers))


def test_a_row_without_its_reference_is_refused(policy):
    with pytest.raises(UsageError, match="compares with a reference, and there is none"):
        gradient(policy, Likelihoods(policy), PREFERENCES["dpo"], PAIRS, None, 10_000)
