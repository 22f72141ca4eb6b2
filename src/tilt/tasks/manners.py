"""Requests in a small grammar, whose truth is a program: an answer that does what was asked and says it kindly is preferred."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from tilt.tasks.arithmetic import share

VERBS = ("bring", "find", "paint", "wash", "sell", "draw", "fix", "hide")
COLOURS = ("red", "blue", "green", "black", "white", "yellow")
THINGS = ("cup", "lamp", "chair", "door", "boat", "kite", "coat", "drum", "vase", "bike")
OPENINGS = ("sure", "gladly", "well", "okay", "ugh", "whatever")
CLOSINGS = ("thank you", "my pleasure", "that is all", "so be it", "now go away", "do not ask again")
KINDNESS = {"sure": 1, "gladly": 2, "well": 0, "okay": 0, "ugh": -1, "whatever": -2, "thank": 1, "pleasure": 2, "go": -1, "ask": -2}
WORDS = tuple(
    sorted(
        {w for group in (VERBS, COLOURS, THINGS, OPENINGS, CLOSINGS) for words in group for w in words.split()}
        | {"i", "will", "the", "please"}
    )
)


@dataclass(frozen=True)
class Manners:
    """Prompts "please VERB the COLOUR THING"; answers "OPENING i will VERB the COLOUR THING CLOSING". A prompt is held out by the hash of its text."""

    held_out: float = 0.15
    slips: float = 0.1

    def prompts(self, *, held_out: bool) -> list[str]:
        """Every prompt of the training or of the held-out part."""
        every = (f"please {v} the {c} {t}" for v in VERBS for c in COLOURS for t in THINGS)
        return [p for p in every if (share(p) < self.held_out) == held_out]

    def answers(self, prompt: str, seed: int) -> Iterator[str]:
        """An endless stream of answers to a prompt: openings and closings at random, one detail wrong in a share `slips` of them."""
        rng = random.Random(f"{seed} {prompt}")
        _, verb, _, colour, thing = prompt.split()
        while True:
            asked = [verb, colour, thing]
            if rng.random() < self.slips:
                k = rng.randrange(3)
                asked[k] = rng.choice((VERBS, COLOURS, THINGS)[k])
            yield f"{rng.choice(OPENINGS)} i will {asked[0]} the {asked[1]} {asked[2]} {rng.choice(CLOSINGS)}"

    def demonstrations(self, *, held_out: bool, each: int = 4, seed: int = 0) -> list[dict[str, Any]]:
        """`each` answers a prompt, as prompt-completion rows: no better than chance at kindness."""
        rows = []
        for prompt in self.prompts(held_out=held_out):
            stream = self.answers(prompt, seed)
            rows += [{"prompt": prompt, "completion": " " + next(stream)} for _ in range(each)]
        return rows

    def pairs(self, *, held_out: bool, each: int = 8, seed: int = 1) -> list[dict[str, Any]]:
        """`each` pairs a prompt with different merits, the better one chosen."""
        rows = []
        for prompt in self.prompts(held_out=held_out):
            stream, found = self.answers(prompt, seed), 0
            while found < each:
                a, b = next(stream), next(stream)
                if merit(prompt, a) != merit(prompt, b):
                    chosen, rejected = (a, b) if merit(prompt, a) > merit(prompt, b) else (b, a)
                    rows.append({"prompt": prompt, "chosen": " " + chosen, "rejected": " " + rejected})
                    found += 1
        return rows

    def verdicts(
        self, template: str, *, held_out: bool, each: int = 8, first: float = 0.5, seed: int = 3, says: tuple[str, str] = ("1", "2")
    ) -> list[dict[str, Any]]:
        """Demonstrations for a judge: `each` pairs of different merits a prompt in the template's places, answered by which is better. The better answer stands
        first in a share `first` of them: away from a half, a judge that learns this is biased for a place."""
        rng, rows = random.Random(seed), []
        for pair in self.pairs(held_out=held_out, each=each, seed=seed):
            sides = [pair["chosen"].strip(), pair["rejected"].strip()]
            swapped = rng.random() >= first
            asked = template.format(prompt=pair["prompt"], first=sides[swapped], second=sides[not swapped])
            rows.append({"prompt": asked, "completion": says[swapped]})
        return rows


def merit(prompt: str, answer: str) -> float:
    """The truth: kindness of the words used, three points for each detail of the request that is repeated in order, minus one for each word too many or too few."""
    words = answer.split()
    _, verb, _, colour, thing = prompt.split()
    body = " ".join(words)
    details = sum(1 for wanted in (f"i will {verb} the", f"the {colour}", f"{colour} {thing}") if wanted in body)
    kind = sum(KINDNESS.get(w, 0) for w in set(words))
    return kind + 3.0 * details - max(0, abs(len(words) - 9) - 2)


def preference_rate(prompts: Sequence[str], answers: Sequence[str], others: Sequence[str]) -> float:
    """Share of answers that the program prefers to the other answer to the same prompt, ties counted half."""
    wins = [(merit(p, a) > merit(p, b)) + 0.5 * (merit(p, a) == merit(p, b)) for p, a, b in zip(prompts, answers, others, strict=True)]
    return sum(wins) / len(wins)
