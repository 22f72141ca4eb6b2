"""The smallest task with a right answer: two letters are shown, and the second is to be said again."""

from __future__ import annotations

from dataclasses import dataclass

LETTERS = "abcdef"


@dataclass(frozen=True)
class Echo:
    """Prompts of two letters; the answer is the second. A policy that knows nothing is right in one case of `len(letters)` at best."""

    letters: str = LETTERS

    def rows(self) -> list[dict[str, str]]:
        """Every prompt with its answer."""
        return [{"prompt": a + b, "answer": b, "completion": b} for a in self.letters for b in self.letters]

    def reward(self, completions: list[str], answer: list[str], **columns: object) -> list[float]:
        """1 for an answer whose first letter is the one asked for, else 0."""
        return [float(text[:1] == sought) for text, sought in zip(completions, answer, strict=True)]
