"""A judge: what it says equals a loop with plain transformers, both orders cancel its bias, soft labels are learned, grades are expectations."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from decoders import exact_norms  # noqa: F401
from torch import Tensor

from tilt.data.rendering import renderer
from tilt.data.rollouts import Rollout, Sampling
from tilt.data.tokenizers import characters
from tilt.data.wording import Wording
from tilt.errors import DataError, NumericError, UsageError
from tilt.models.loading import tiny
from tilt.models.policy import Policy
from tilt.models.saving import fingerprint, save
from tilt.objectives import PREFERENCES, Answers, Pairs
from tilt.recipes.scoring import scoring
from tilt.rewards import parse
from tilt.rewards.functions import RewardFunction
from tilt.rewards.judge import (
    CERTAIN,
    Choices,
    FunctionComparer,
    ModelComparer,
    Opinions,
    Reading,
    compare,
    exclusive,
    graded,
    tokens_of,
    verdict_tokens,
)

pytestmark = pytest.mark.usefixtures("exact_norms")  # as they are, the modules' norms round to float32

WORDS = characters("ab12345678910?:. ")
ASKED, FIRST, SECOND = ["a?", "b b?", "a?", "ab?"], ["a", "bb ab", "", "aaaaaaa"], ["b", "a", "ba ba", "b"]
TEMPLATE = "{prompt} 1:{first} 2:{second}."


@pytest.fixture(scope="module")
def lm() -> Any:
    return tiny(vocabulary=len(WORDS), width=32, layers=2, heads=4, context=64, seed=5).double()


def alone(lm: Any) -> Any:
    """The same weights under transformers' own attention."""
    plain = deepcopy(lm)
    plain.set_attn_implementation("sdpa")
    return plain


@torch.no_grad()
def padded(plain: Any, questions: Sequence[Sequence[int]], said: Sequence[int]) -> list[float]:
    """log P(said | question) of each question, from one padded batch."""
    texts = [[*question, *said] for question in questions]
    width = max(map(len, texts))
    ids = torch.tensor([[*text, *[0] * (width - len(text))] for text in texts])
    mask = torch.tensor([[1] * len(text) + [0] * (width - len(text)) for text in texts])
    found = plain(input_ids=ids, attention_mask=mask).logits.log_softmax(-1)
    return [
        sum(float(found[i, len(question) + k - 1, token]) for k, token in enumerate(said)) for i, question in enumerate(questions)
    ]  # fmt: skip


@pytest.mark.parametrize("budget", [16, 60, 10_000])
@pytest.mark.parametrize("verdicts", [("1", "2"), ("1.", "22b"), ("ab", "aa")])
@pytest.mark.parametrize("chat", [False, True])
def test_a_judge_equals_a_padded_loop(lm: Any, verdicts: tuple[str, str], chat: bool, budget: int) -> None:
    """Log-odds and the mass outside, of verdicts of one token and of several, whatever the parts."""
    judge = ModelComparer("j", Choices(Policy(lm), verdict_tokens(verdicts, WORDS), budget), Wording(WORDS, TEMPLATE, chat))
    plain, turns = alone(lm), renderer(WORDS, "auto" if chat else "text")
    for one, other, read in ((FIRST, SECOND, "first"), (SECOND, FIRST, "swapped")):
        texts = [f"{p} 1:{a.strip()} 2:{b.strip()}." for p, a, b in zip(ASKED, one, other, strict=True)]
        questions = [turns.prompt({"prompt": text}, 0).tokens for text in texts]
        of_first, of_second = (padded(plain, questions, WORDS.encode(said, add_special_tokens=False)) for said in verdicts)
        opinions = compare(judge, ASKED, FIRST, SECOND)
        assert getattr(opinions, read).tolist() == pytest.approx([a - b for a, b in zip(of_first, of_second, strict=True)], abs=1e-10)
        left = judge(ASKED, one, other).outside
        assert left.tolist() == pytest.approx([1 - math.exp(a) - math.exp(b) for a, b in zip(of_first, of_second, strict=True)], abs=1e-10)
    assert opinions.outside.tolist() == pytest.approx(
        ((judge(ASKED, FIRST, SECOND).outside + judge(ASKED, SECOND, FIRST).outside) / 2).tolist()
    )


def test_a_question_beyond_the_context_is_not_answered(lm: Any) -> None:
    judge = ModelComparer("j", Choices(Policy(lm), ((5,), (6, 7))), Wording(WORDS, TEMPLATE, chat=False))
    long = "a" * (64 - 2 - len("a? 1: 2:b."))
    log_odds = judge(["a?"] * 3, [long, long + "a", "a"], ["b"] * 3).log_odds
    assert log_odds.isnan().tolist() == [False, True, False]
    assert compare(judge, [], [], []).probability.tolist() == []


# --- both orders ----------------------------------------------------------------------------------------------------------

TRUTH = torch.tensor([0.9, 0.55, 0.5, 0.2, 0.03], dtype=torch.float64)


def leaning(bias: float) -> Any:
    """A judge that knows the chance of each pair and adds `bias` to the log-odds of whatever stands first; answers are numbers of pairs with their sign."""

    def judge(prompts: Sequence[str], first: Sequence[str], second: Sequence[str]) -> Reading:
        log_odds = torch.stack([torch.logit(TRUTH[int(p)]) * (1 if a == "+" else -1) for p, a in zip(prompts, first, strict=True)]) + bias
        return Reading(log_odds, torch.full_like(log_odds, 0.25))

    return judge


def asked(bias: float, **how: Any) -> Opinions:
    count = len(TRUTH)
    return compare(leaning(bias), [str(i) for i in range(count)], ["+"] * count, ["-"] * count, **how)


@pytest.mark.parametrize("bias", [-2.0, -0.3, 0.0, 0.7, 3.0])
def test_both_orders_recover_the_true_preference_rate(bias: float) -> None:
    """A bias for a place that is additive in the log-odds cancels; one order keeps it, and the mean of the probabilities shrinks."""
    both = asked(bias)
    assert (both.probability - TRUTH).abs().max() < 1e-12 and abs(float(both.probability.mean() - TRUTH.mean())) < 1e-12
    assert both.metrics()["position_bias"] == pytest.approx(bias, abs=1e-12) and both.metrics()["outside"] == 0.25
    one, mean = asked(bias, orders="one"), asked(bias, combine="mean")
    assert one.metrics().keys() == {"confidence", "outside"} and torch.allclose(torch.logit(one.probability), torch.logit(TRUTH) + bias)
    shrunk, true = (mean.probability - 0.5).abs(), (TRUTH - 0.5).abs()
    paper = [(1 / (1 + math.exp(-x - bias)) + 1 - 1 / (1 + math.exp(x - bias))) / 2 for x in torch.logit(TRUTH).tolist()]
    assert mean.probability.tolist() == pytest.approx(paper, abs=1e-12)
    if bias:
        assert abs(float(one.probability.mean() - TRUTH.mean())) > 0.02
        assert (shrunk < true)[true > 0].all() and ((mean.probability > 0.5) == (TRUTH > 0.5))[true > 0].all()
    else:
        assert torch.allclose(mean.probability, TRUTH, atol=1e-12) and torch.allclose(one.probability, TRUTH, atol=1e-12)


def test_metrics_of_opinions() -> None:
    """Of log-odds 1.0 and -3.0 of the first place the bias is -1; a verdict is the same in both orders where the signs differ, two ties included."""
    nan = math.nan
    first = torch.tensor([1.0, 2.0, -1.0, 0.0, nan, 1.0], dtype=torch.float64)
    swapped = torch.tensor([-3.0, 1.0, 0.5, 0.0, 1.0, nan], dtype=torch.float64)
    found = Opinions(first, swapped, torch.full((6,), 0.125), "both", "log_odds").metrics()
    assert found["position_bias"] == pytest.approx((-1 + 1.5 - 0.25 + 0) / 4) and found["consistency"] == 0.75 and found["outside"] == 0.125
    better = [1 / (1 + math.exp(-x)) for x in (2.0, 0.5, 0.75, 0.0)]
    assert found["confidence"] == pytest.approx(sum(better) / 4)
    nothing = Opinions(first * nan, swapped, torch.zeros(6), "both", "mean")
    assert nothing.metrics() == {} and nothing.probability.isnan().all()
    halves = [Opinions(first[s], swapped[s], torch.full((3,), 0.125), "both", "log_odds") for s in (slice(3), slice(3, 6))]
    assert Opinions.join(halves).metrics() == found


@pytest.mark.parametrize("row", ["reward_model", "dpo"])
def test_soft_labels_teach_the_log_odds_of_the_judge(row: str) -> None:
    """-[p ls(h) + (1 - p) ls(-h)]: value and gradient as the paper writes them, and the maximum of the likelihood is h = logit p."""
    chances = asked(0.7).probability
    scores = torch.zeros(len(chances), dtype=torch.float64, requires_grad=True)
    strength = getattr(PREFERENCES[row].margin, "beta", 1.0)

    def loss() -> Tensor:
        sides = [Answers.of(x, reference=torch.zeros_like(x)) for x in (scores, torch.zeros_like(scores))]
        return PREFERENCES[row].loss(Pairs.of(*sides, probability=chances))

    with torch.no_grad():
        scores += torch.linspace(-2, 2, len(scores), dtype=torch.float64)
    value = loss()
    (slope,) = torch.autograd.grad(value, scores)
    expected, slopes = 0.0, []
    for p, score in zip(chances.tolist(), scores.tolist(), strict=True):
        h = strength * score
        expected -= (p * math.log(1 / (1 + math.exp(-h))) + (1 - p) * math.log(1 / (1 + math.exp(h)))) / len(chances)
        slopes.append(strength * (1 / (1 + math.exp(-h)) - p) / len(chances))
    assert float(value.detach()) == pytest.approx(expected, abs=1e-12) and slope.tolist() == pytest.approx(slopes, abs=1e-12)
    newton = torch.optim.LBFGS([scores], lr=1.0, max_iter=200, tolerance_grad=1e-13, tolerance_change=0, line_search_fn="strong_wolfe")

    def closure() -> float:
        newton.zero_grad()
        found = loss()
        found.backward()  # type: ignore[no-untyped-call]
        return float(found.detach())

    newton.step(closure)
    assert (strength * scores.detach()).tolist() == pytest.approx(torch.logit(TRUTH).tolist(), abs=1e-5)


# --- functions ------------------------------------------------------------------------------------------------------------


def test_a_function_is_a_judge() -> None:
    """Probabilities become log-odds; certainty is bounded, so that two certain answers that contradict each other are a tie."""

    def judge(prompts: list[str], first: list[str], second: list[str]) -> list[float | None]:
        assert len(prompts) == len(first) == len(second)
        return [{"x": None, "sure": 1.0, "never": 0.0}.get(a, len(a) / (len(a) + len(b))) for a, b in zip(first, second, strict=True)]

    comparer = FunctionComparer(RewardFunction("judge", judge))
    found = compare(comparer, ["p"] * 4, ["aaa", "sure", "x", "sure"], ["a", "sure", "b", "never"])
    assert found.probability.tolist() == pytest.approx([0.75, 0.5, math.nan, 1 - CERTAIN], nan_ok=True, abs=1e-9)
    assert found.outside.isnan().all() and "outside" not in found.metrics()
    never = FunctionComparer(RewardFunction("judge", lambda first: 1 / len(first)))
    assert compare(never, [], [], []).probability.tolist() == [], "nothing is asked about no pairs"
    with pytest.raises(DataError, match=r"the judge judge returned 1.5 for pair 0: expected the probability, from 0 to 1"):
        compare(FunctionComparer(RewardFunction("judge", lambda first: [1.5] * len(first))), ["p"], ["a"], ["b"])
    with pytest.raises(DataError, match="returned 1 values"):
        compare(FunctionComparer(RewardFunction("judge", lambda first: [0.5])), ["p"] * 2, ["a"] * 2, ["b"] * 2)


# --- grades ---------------------------------------------------------------------------------------------------------------


def sampled(answers: Sequence[str] = ("a", "bb ab", "aaaaaaa")) -> list[Rollout]:
    plain = renderer(WORDS, "text")
    found = []
    for i, said in enumerate(answers):
        tokens = plain.demonstration({"prompt": "a", "completion": said}, 0).tokens
        prompt = plain.prompt({"prompt": ASKED[i]}, i)
        found.append(Rollout(prompt, tokens, (True,) * len(tokens), (-1.0,) * len(tokens), "stop", Sampling()))
    return found


def test_ten_is_not_one(lm: Any) -> None:
    """P(1) is that of a 1 that is no beginning of 10: the sum over every other token after it."""
    said = tokens_of([str(i) for i in range(1, 11)], WORDS, "scores")
    assert [len(tokens) for tokens in said] == [1] * 9 + [2] and said[9][0] == said[0][0]
    question = tuple(WORDS.encode("a? b.", add_special_tokens=False))
    found = exclusive(Choices(Policy(lm), said)([question]), said).exp()[0]
    after, plain = {}, alone(lm)
    for text in (question, (*question, said[0][0])):
        with torch.no_grad():
            after[text] = plain(input_ids=torch.tensor([text])).logits[0, -1].softmax(-1)
    one = after[question][said[0][0]]
    zero = said[9][1]
    others = sum(float(one * p) for token, p in enumerate(after[*question, said[0][0]].tolist()) if token != zero)
    assert float(found[0]) == pytest.approx(others, abs=1e-12) and float(found[9]) == pytest.approx(float(one) - others, abs=1e-12)
    assert found[1:9].tolist() == pytest.approx([float(after[question][tokens[0]]) for tokens in said[1:9]], abs=1e-12)


def test_only_the_nearest_of_those_that_go_on_is_taken_away() -> None:
    """1, 10, 100, 12: P(1) loses P(10) and P(12), P(10) loses P(100); the rest is shared out once."""
    texts = ((1,), (1, 0), (1, 0, 0), (1, 2), (3,))
    begins = torch.tensor([[0.8, 0.5, 0.2, 0.1, 0.15]], dtype=torch.float64)
    assert exclusive(begins.log(), texts).exp()[0].tolist() == pytest.approx([0.8 - 0.5 - 0.1, 0.5 - 0.2, 0.2, 0.1, 0.15], abs=1e-12)
    sure = torch.tensor([[0.5, 0.5 + 1e-9, 0.1, 1e-30, 0.5]], dtype=torch.float64)
    assert exclusive(sure.log(), texts)[0, 0] == -math.inf, "rounding does not make a chance below nought"


@pytest.mark.parametrize("scores", [2, 5, 10])
def test_a_grade_is_the_expected_score_from_minus_one_to_one(scores: int) -> None:
    chances = torch.rand(3, scores, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    expected = [sum((i + 1) * p for i, p in enumerate(row)) / sum(row) for row in chances.tolist()]
    assert graded(chances.log()).tolist() == pytest.approx([2 * (x - 1) / (scores - 1) - 1 for x in expected], abs=1e-12)
    certain = torch.full((2, scores), -math.inf, dtype=torch.float64)
    certain[0, 0] = certain[1, -1] = 0.0
    assert graded(certain).tolist() == [-1.0, 1.0]


def test_grades_are_rewards(lm: Any, tmp_path: Path) -> None:
    """Through the configuration, with a weight; the judge is frozen, is counted among the models, and never changes."""
    save(lm.float(), WORDS, tmp_path / "judge")
    lm.double()
    template = "{prompt} {answer}."
    given = {"judge": {"model": str(tmp_path / "judge"), "template": template, "scores": 10, "budget": 16}, "weight": 2.0}
    judged = scoring(given, WORDS, torch.device("cpu"))
    (role,) = judged.modules
    mark = fingerprint(judged.modules[role])
    rollouts = sampled()
    total = judged(rollouts).total
    said = tokens_of([str(i) for i in range(1, 11)], WORDS, "scores")
    turns = renderer(WORDS)
    questions = [turns.prompt({"prompt": f"{ASKED[i]} {said}."}, 0).tokens for i, said in enumerate(("a", "bb ab", "aaaaaaa"))]
    plain = Choices(Policy(lm), said)
    assert total.tolist() == pytest.approx((2 * graded(exclusive(plain(questions), said))).tolist(), abs=1e-5)
    assert role == "judge judge" and fingerprint(judged.modules[role]) == mark and judged.critic_source is None
    assert not any(p.requires_grad for p in judged.modules[role].parameters())
    with pytest.raises(DataError, match="the judge judge can read 62 tokens, and sample 0 with its question has"):
        judged(sampled(["a" * 60]))
    with torch.no_grad():
        next(judged.modules[role].parameters()).fill_(math.nan)
    with pytest.raises(NumericError, match="the judge judge is not finite on question 0"):
        judged(rollouts)


# --- bad input ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("verdicts", "message"),
    [
        (("1", "1"), "'1' and '1' are the same tokens to the judge"),
        (("1", "10"), "'1' and '10' begin alike and one ends there"),
        (("ab1", "ab"), "begin alike and one ends there"),
        (("1", "z"), "the judge's tokenizer has no token for 'z'"),
        (("", "1"), "has no token for ''"),
    ],
)
def test_verdicts_that_do_not_exclude_each_other_are_refused(verdicts: tuple[str, str], message: str) -> None:
    with pytest.raises(UsageError, match="`judge.verdicts`: .*" + message):
        verdict_tokens(verdicts, WORDS, "judge.verdicts")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"judge": {"model": "m", "template": "{prompt}"}}, r"`reward.judge.template` has no \{answer\}"),
        ({"judge": {"model": "m", "template": "{prompt} {answer} {first}"}}, r"has \{first\}, which is not given here"),
        ({"judge": {"model": "m", "scores": 1, "template": "{prompt} {answer}"}}, "at least 2 grades"),
        ({"judge": {"model": "m", "scores": 5}}, "names 10 grades: give a template"),
        ({"judge": {"model": "m", "score": 5}}, "unknown key `reward.judge.score`"),
        ({"judge": {"model": "m", "rendering": "chat"}}, "rendering"),
        ({"judge": {}}, "needs `model`"),
        ({"judge": "rules.py:score"}, "it needs no judge; give it as the reward itself"),
        ({"judge": "m", "on_error": "skip"}, "`reward.on_error` is about functions, and judge is a model"),
        ({"judge": {"model": "m", "timeout": 3}}, "`reward.timeout` is about functions"),
        ({"judge": "m", "model": "m"}, "names judge and model: give exactly one"),
    ],
)
def test_bad_rewards_are_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse(json.loads(json.dumps(given)))
    (spec,) = parse({"judge": "m", "weight": 0.5, "normalise": True})
    assert (spec.name, spec.source.scores, spec.weight, spec.normalise) == ("judge", 10, 0.5, True)  # type: ignore[union-attr]
