"""A language model as judge: which of two answers is better (RLAIF), and how good one answer is (d-RLAIF). arXiv 2309.00267."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from tilt.data.packing import pack
from tilt.data.rollouts import Prompt, Rollout
from tilt.data.wording import Wording
from tilt.errors import DataError, NumericError, UsageError
from tilt.models import compat
from tilt.models.policy import Policy
from tilt.rewards.functions import RewardFunction, Scored
from tilt.rewards.text import Text, inert
from tilt.segments import segment_sum

Orders = Literal["both", "one"]
Combine = Literal["log_odds", "mean"]
CERTAIN = 1e-6
"""How near to 0 and 1 the probabilities of a function may come: its log-odds stay within ±13.8."""


# --- what a model goes on with --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Choices:
    """Log-probabilities [N, K], float64, with which a model goes on with each of K texts after each of N questions: summed over a text's tokens.

    One packed forward a part of at most `budget` tokens, each question once.
    """

    policy: Policy
    texts: tuple[tuple[int, ...], ...]
    budget: int = 16384

    def __post_init__(self) -> None:
        self.policy.requires_grad_(False).eval()

    @property
    def longest_question(self) -> int:
        """Tokens that fit the model's context before the longest text."""
        return compat.context_of(self.policy.lm) - max(map(len, self.texts))

    @torch.no_grad()
    def __call__(self, questions: Sequence[tuple[int, ...]]) -> Tensor:
        if not questions:
            return torch.zeros(0, len(self.texts), dtype=torch.float64)
        row = pack([Rollout.demonstration(Prompt(asked, i), said) for i, asked in enumerate(questions) for said in self.texts])
        device, found = compat.device_of(self.policy), torch.empty(row.layout.sequences, dtype=torch.float64)
        for part in row.split(self.budget):
            own = row.take(part).to(device)
            found[part] = segment_sum(self.policy(own).logprobs.double(), own.layout).cpu()
        return found.view(len(questions), len(self.texts))


def tokens_of(texts: Sequence[str], tokenizer: Any, where: str) -> tuple[tuple[int, ...], ...]:
    """The tokens of what a judge may say; texts that the tokenizer cannot tell apart, or does not know, are refused."""
    found = []
    for text in texts:
        ids = tuple(int(i) for i in tokenizer.encode(text, add_special_tokens=False))
        if not ids or (tokenizer.unk_token_id is not None and tokenizer.unk_token_id in ids and text != tokenizer.unk_token):
            raise UsageError(f"`{where}`: the judge's tokenizer has no token for {text!r}; name what the judge can say")
        found.append(ids)
    if same := [(one, other) for i, one in enumerate(texts) for j, other in enumerate(texts) if i < j and found[i] == found[j]]:
        raise UsageError(f"`{where}`: {same[0][0]!r} and {same[0][1]!r} are the same tokens to the judge, so it cannot choose between them")
    return tuple(found)


def verdict_tokens(texts: tuple[str, str], tokenizer: Any, where: str = "verdicts") -> tuple[tuple[int, ...], ...]:
    """The tokens of the two verdicts; neither may begin with the other, since their chances would overlap."""
    first, second = tokens_of(texts, tokenizer, where)
    short, long = sorted((first, second), key=len)
    if long[: len(short)] == short:
        raise UsageError(f"`{where}`: {texts[0]!r} and {texts[1]!r} begin alike and one ends there: choose two that exclude each other")
    return first, second


def exclusive(logprobs: Tensor, texts: Sequence[tuple[int, ...]]) -> Tensor:
    """From the log-probabilities that an answer begins with each text, [N, K], those that it begins with none that goes on from it.

    Tokens 1 and 1 0: P(1) − P(1 0) = P(1) (1 − P(0 | 1)). Of texts that go on only the nearest count; they hold the others.
    """
    found = logprobs.clone()
    for k, text in enumerate(texts):
        longer = [j for j, other in enumerate(texts) if len(other) > len(text) and other[: len(text)] == text]
        nearest = [j for j in longer if not any(i != j and texts[j][: len(texts[i])] == texts[i] for i in longer)]
        if nearest:
            share = (logprobs[:, nearest].logsumexp(-1) - logprobs[:, k]).exp().clamp(max=1.0)
            found[:, k] = logprobs[:, k] + torch.log1p(-share)
    return found


# --- two answers ----------------------------------------------------------------------------------------------------------


class Reading(NamedTuple):
    """What was said of N questions: log-odds that the answer in the first place is better, NaN where the judge could not say; and the probability of all
    that is neither verdict, NaN of a function."""

    log_odds: Tensor
    outside: Tensor


class Comparer(Protocol):
    """Which of two answers to each prompt is better; the first is shown in the first place."""

    def __call__(self, prompts: Sequence[str], first: Sequence[str], second: Sequence[str]) -> Reading: ...


@dataclass(frozen=True)
class ModelComparer:
    """log P(verdict 1 | question) − log P(verdict 2 | question); a question beyond the model's context is not answered."""

    name: str
    choices: Choices
    wording: Wording

    def __call__(self, prompts: Sequence[str], first: Sequence[str], second: Sequence[str]) -> Reading:
        questions = [self.wording(prompt=p, first=a, second=b) for p, a, b in zip(prompts, first, second, strict=True)]
        short = [i for i, question in enumerate(questions) if len(question) <= self.choices.longest_question]
        said = self.choices([questions[i] for i in short])
        refuse_nonfinite(self.name, said, [prompts[i] for i in short])
        log_odds, outside = (torch.full((len(questions),), math.nan, dtype=torch.float64) for _ in range(2))
        log_odds[short] = said[:, 0] - said[:, 1]
        outside[short] = 1 - said.logsumexp(-1).exp()
        return Reading(log_odds, outside)


@dataclass(frozen=True)
class FunctionComparer:
    """A function (prompts, first, second) → P(the first is better) of each, or None; 0 and 1 count as CERTAIN and 1 − CERTAIN."""

    function: RewardFunction

    def __call__(self, prompts: Sequence[str], first: Sequence[str], second: Sequence[str]) -> Reading:
        said = self.function(prompts, first, {"first": first, "second": second}).values if prompts else []
        if wrong := [(i, value) for i, value in enumerate(said) if value is not None and not 0 <= value <= 1]:
            i, value = wrong[0]
            raise DataError(
                f"the judge {self.function.name} returned {value} for pair {i}: expected the probability, from 0 to 1, that the first answer is better"
                f" (prompt {inert(prompts[i])}, first {inert(first[i])}, second {inert(second[i])})"
            )
        chances = torch.tensor([math.nan if value is None else value for value in said], dtype=torch.float64)
        return Reading(torch.logit(chances, eps=CERTAIN), torch.full_like(chances, math.nan))


@dataclass(frozen=True)
class Opinions:
    """What a judge says of N pairs (a, b): log-odds of the answer in the first place with a there, `first`, and with b there, `swapped` (NaN where not asked or
    not answered)."""

    first: Tensor
    swapped: Tensor
    outside: Tensor
    orders: Orders
    combine: Combine

    @property
    def probability(self) -> Tensor:
        """P(a better), [N]: logit P = (first − swapped) / 2, exact where the first place adds a constant to the log-odds; or the mean of the two
        probabilities (the paper's), which such a bias draws towards 1/2."""
        if self.orders == "one":
            return self.first.sigmoid()
        if self.combine == "mean":
            return (self.first.sigmoid() + (-self.swapped).sigmoid()) / 2
        return ((self.first - self.swapped) / 2).sigmoid()

    def metrics(self) -> dict[str, float]:
        """Means over the pairs that were judged: `confidence`, the probability of the better answer; `outside`; and of both orders `position_bias`, the log-odds of
        the first place, and `consistency`, how often the verdict is the same whatever the order."""
        chances = self.probability
        seen = ~chances.isnan()
        if not seen.any():
            return {}
        found = {"confidence": float(torch.maximum(chances, 1 - chances)[seen].mean())}
        if not self.outside[seen].isnan().any():
            found["outside"] = float(self.outside[seen].mean())
        if self.orders == "both":
            found["position_bias"] = float(((self.first + self.swapped) / 2)[seen].mean())
            found["consistency"] = float((self.first.sign() == -self.swapped.sign())[seen].double().mean())
        return found

    @staticmethod
    def join(parts: Sequence[Opinions]) -> Opinions:
        """The opinions of all parts, in order."""
        whole = {name: torch.cat([getattr(part, name) for part in parts]) for name in ("first", "swapped", "outside")}
        return Opinions(**whole, orders=parts[0].orders, combine=parts[0].combine)


def compare(
    judge: Comparer, prompts: Sequence[str], one: Sequence[str], other: Sequence[str], *, orders: Orders = "both", combine: Combine = "log_odds"
) -> Opinions:  # fmt: skip
    """Ask the judge about each pair, both ways round unless `orders` is "one"."""
    first = judge(prompts, one, other)
    if orders == "one":
        return Opinions(first.log_odds, torch.full_like(first.log_odds, math.nan), first.outside, orders, combine)
    swapped = judge(prompts, other, one)
    return Opinions(first.log_odds, swapped.log_odds, (first.outside + swapped.outside) / 2, orders, combine)


# --- one answer -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Grade:
    """A part of the reward, d-RLAIF: sum_i i P(i) over the grades 1 … K that the judge may give an answer, P normalised over them, from [1, K] to [−1, 1]."""

    name: str
    choices: Choices
    wording: Wording

    def __call__(self, rollouts: Sequence[Rollout], texts: Sequence[Text]) -> Scored:
        prompts = [str(rollout.prompt.columns.get("prompt", text.prompt)) for rollout, text in zip(rollouts, texts, strict=True)]
        questions = [self.wording(prompt=p, answer=text.completion) for p, text in zip(prompts, texts, strict=True)]
        if long := [i for i, question in enumerate(questions) if len(question) > self.choices.longest_question]:
            raise DataError(
                f"the judge {self.name} can read {self.choices.longest_question} tokens, and sample {long[0]} with its question has {len(questions[long[0]])}: "
                f"prompt {inert(prompts[long[0]])}\nShorten the template or sampling.max_tokens, or name a judge with a longer context."
            )
        said = self.choices(questions)
        refuse_nonfinite(self.name, said, prompts)
        return Scored(graded(exclusive(said, self.choices.texts)).tolist())


def graded(logprobs: Tensor) -> Tensor:
    """Expected grade in [−1, 1] from the log-probabilities [N, K] of the grades 1 … K: all on 1 → −1, all on K → 1."""
    return logprobs.softmax(-1) @ torch.linspace(-1, 1, logprobs.shape[-1], dtype=logprobs.dtype)


def refuse_nonfinite(name: str, said: Tensor, prompts: Sequence[str]) -> None:
    """Stop where a judge's log-probabilities are not numbers."""
    if wrong := (~said.isfinite().all(-1)).nonzero().flatten().tolist():
        raise NumericError(
            f"the judge {name} is not finite on question {wrong[0]}: prompt {inert(prompts[wrong[0]])}\nLook at its training run, or load it in float32."
        )
