"""Chained additions on a dial of ten, one step a line, whose truth is a program: answers with planted slips, and a label for every step."""

from __future__ import annotations

import json
import random
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tilt.data.tokenizers import characters
from tilt.tasks.arithmetic import share

NAMES = "abcdefgh"
ALPHABET = f"0123456789{NAMES}+=\n"
SEPARATOR = "\n"


@dataclass(frozen=True)
class Chains:
    """Prompts "8a2b1c1=": start at 8, add 2, then 1, then 1. The answer takes a step for each addition, modulo ten: "a8+2=0\\nb0+1=1\\nc1+1=2".

    `shortest` to `longest` additions of 1 or 2; `count` prompts are drawn with `seed`, and one is held out by the hash of its text.
    A share of the steps of an answer states a wrong sum, and the steps after it go on from what was stated: `slips` in demonstrations, half in
    answers with labels.
    """

    shortest: int = 3
    longest: int = 5
    slips: float = 0.3
    count: int = 1600
    held_out: float = 0.15
    seed: int = 0

    def prompts(self, *, held_out: bool) -> list[str]:
        """Every prompt of the training or of the held-out part, each once."""
        rng = random.Random(self.seed)
        drawn = [self._prompt(rng) for _ in range(self.count)]
        return [p for p in dict.fromkeys(drawn) if (share(p) < self.held_out) == held_out]

    def _prompt(self, rng: random.Random) -> str:
        moves = [rng.randint(1, 2) for _ in range(rng.randint(self.shortest, self.longest))]
        return str(rng.randrange(10)) + "".join(f"{name}{move}" for name, move in zip(NAMES, moves, strict=False)) + "="

    def answer(self, prompt: str, seed: int, slips: float) -> list[str]:
        """The steps of an answer, a share `slips` of them wrong."""
        rng = random.Random(f"{seed} {prompt}")
        stated, moves = read(prompt)
        steps = []
        for name, move in zip(NAMES, moves, strict=False):
            slip = rng.randrange(1, 10) if rng.random() < slips else 0
            steps.append(f"{name}{stated}+{move}={(stated + move + slip) % 10}")
            stated = (stated + move + slip) % 10
        return steps

    def demonstrations(self, *, held_out: bool, each: int = 2, seed: int = 0) -> list[dict[str, Any]]:
        """`each` answers a prompt as prompt-completion rows, slips included."""
        return [
            {"prompt": prompt, "completion": SEPARATOR.join(self.answer(prompt, 1000 * seed + number, self.slips))}
            for prompt in self.prompts(held_out=held_out)
            for number in range(each)
        ]

    def labelled(self, *, held_out: bool, each: int = 8, seed: int = 1) -> list[dict[str, Any]]:
        """`each` answers a prompt with a label for every step, as rows {prompt, steps, labels}."""
        rows = []
        for prompt in self.prompts(held_out=held_out):
            for number in range(each):
                steps = self.answer(prompt, 1000 * seed + number, 0.5)
                rows.append({"prompt": prompt, "steps": steps, "labels": right(prompt, steps, ended=True)})
        return rows


def read(prompt: str) -> tuple[int, list[int]]:
    """Where a prompt starts, and its additions: "8a2b1c1=" → 8, [2, 1, 1]."""
    return int(prompt[0]), [int(move) for move in re.findall(r"[a-z](\d)", prompt)]


def right(prompt: str, steps: Sequence[str], *, ended: bool = False) -> list[bool]:
    """The truth of each step: it adds the prompt's next number to what the step before stated, and adds rightly. Steps too many are wrong; of an
    answer that has `ended`, so is the last step where further ones were asked for.

    "8a2b1c1=" with a8+2=1, b1+1=2, c2+1=3 → False, True, True: the later steps add rightly to a wrong sum.
    """
    start, moves = read(prompt)
    stated, labels = str(start), []
    for place, step in enumerate(steps):
        known = place < len(moves) and re.fullmatch(r"\d", stated) is not None
        labels.append(known and step == f"{NAMES[place]}{stated}+{moves[place]}={(int(stated) + moves[place]) % 10}")
        stated = step.rpartition("=")[2]
    if ended:
        labels[-1] &= len(steps) >= len(moves)
    return labels


def accuracy(prompt: str, completion: str) -> float:
    """Share of the steps asked for that an answer takes rightly; steps too few or too many count as wrong."""
    labels = right(prompt, completion.split(SEPARATOR))
    return sum(labels) / max(len(labels), len(read(prompt)[1]))


def truth(prompts: Sequence[str], completions: Sequence[str], last: Sequence[bool], **columns: object) -> list[float]:
    """Whether the last step of each beginning of an answer is right, 1 or 0, where it is the answer's `last` step also its end: a judge of steps."""
    asked = zip(prompts, completions, last, strict=True)
    return [float(right(prompt, completion.split(SEPARATOR), ended=ended)[-1]) for prompt, completion, ended in asked]


def outcome(prompts: Sequence[str], completions: Sequence[str], **columns: object) -> list[float]:
    """Whether the last sum of each answer is the prompt's, 1 or 0; no step is looked at."""
    asked = ((*read(prompt), completion) for prompt, completion in zip(prompts, completions, strict=True))
    return [float(completion.rpartition("=")[2] == str((start + sum(moves)) % 10)) for start, moves, completion in asked]


def step_accuracy(prompts: Sequence[str], completions: Sequence[str], **columns: object) -> list[float]:
    """`accuracy` of each answer, as a reward."""
    return [accuracy(prompt, completion) for prompt, completion in zip(prompts, completions, strict=True)]


def write(folder: Path, task: Chains) -> None:
    """The task as files, for recipes that hold prompts out themselves: demonstrations.jsonl, labelled.jsonl, prompts.jsonl, and its tokenizer in words/."""
    folder.mkdir(parents=True, exist_ok=True)
    characters(ALPHABET).save_pretrained(folder / "words")
    whole = replace(task, held_out=0.0)
    prompts = [{"prompt": prompt} for prompt in whole.prompts(held_out=False)]
    made = {"demonstrations": whole.demonstrations(held_out=False, each=8), "labelled": whole.labelled(held_out=False), "prompts": prompts}
    for name, rows in made.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    write(Path(sys.argv[1]), Chains())
