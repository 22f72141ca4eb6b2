"""Addition of two-digit numbers, written 07+45=052: verifiable, with problems held out by hash so that no stage ever sees them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

ALPHABET = "0123456789+="


@dataclass(frozen=True)
class Addition:
    """All sums a+b with a, b < `limit`; a problem is held out when the hash of its text falls into the first `held_out` share."""

    limit: int = 100
    held_out: float = 0.1

    def rows(self, *, held_out: bool) -> list[dict[str, Any]]:
        """Problems as prompt-completion rows with the number sought in `answer`."""
        problems = ((a, b) for a in range(self.limit) for b in range(self.limit))
        return [
            {"prompt": f"{a:02d}+{b:02d}=", "completion": f"{a + b:03d}", "answer": f"{a + b:03d}"}
            for a, b in problems
            if (share(f"{a}+{b}=") < self.held_out) == held_out
        ]


def share(text: str) -> float:
    """A number in [0, 1) that depends on the text alone."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64


def correct(prompts: Sequence[str], completions: Sequence[str], answer: Sequence[str], **columns: object) -> list[float]:
    """1 where the completion is exactly the sum, else 0."""
    return [float(given.strip() == sought) for given, sought in zip(completions, answer, strict=True)]
