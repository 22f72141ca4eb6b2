"""The nearest known name, for errors that teach."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import SequenceMatcher


def _plain(name: str) -> str:
    return name.lower().replace("-", "_").strip("_")


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name most like this one, or nothing when none is like it: `learnin_rate` → `learning_rate`, `reinforcepp` → `reinforce_pp`."""

    def likeness(candidate: str) -> float:
        a, b = _plain(name), _plain(candidate)
        whole = SequenceMatcher(None, a, b).ratio()
        part = 0.75 if len(a) >= 2 and (b.startswith(a) or b.endswith("_" + a)) else 0.0
        return max(whole, part)

    best = max(known, key=likeness, default=None)
    return best if best is not None and likeness(best) >= 0.6 else None


def hint(name: str, known: Iterable[str]) -> str:
    """`did you mean …?`, or the list of what is known when nothing is near."""
    names = list(known)
    best = nearest(name, names)
    return f"did you mean `{best}`?" if best else "known: " + ", ".join(names)
