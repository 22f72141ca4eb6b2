"""What an update changed, from what its step stored: tokens, positions, entropies, classes, over-confidence, and where an answer collapses. No torch."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from tilt.inspect.collapse import FLAGS, collapses
from tilt.inspect.tables import Floats, Rows, cut, number, pieces

SHOWN, POINTS, CONFIDENT = 50, 2000, 0.9
BANDS = ((0.9, 0.99), (0.99, 0.999), (0.999, 0.9999), (0.9999, 1.0))
CONNECTIVES = frozenset(
    [
        "so",
        "thus",
        "therefore",
        "hence",
        "then",
        "because",
        "since",
        "but",
        "however",
        "although",
        "though",
        "if",
        "when",
        "while",
        "and",
        "or",
        "also",
        "first",
        "second",
        "next",
        "finally",
        "wait",
        "let",
        "now",
        "instead",
        "actually",
        "maybe",
        "perhaps",
        "alternatively",
        "所以",
        "因此",
        "因为",
        "但是",
        "然而",
        "如果",
        "那么",
        "首先",
        "其次",
        "然后",
        "最后",
        "而且",
        "或者",
        "不过",
        "其实",
        "另外",
        "于是",
    ]
)
OPERATORS = re.compile(r"[-+*/=<>^%×÷±≤≥≠·√|&~()\[\]{}]+")
NUMBERS = re.compile(r"[-+]?[\d.,]*\d[\d.,]*%?")
Classes = Callable[[str], str]


def kind_of(token: str) -> str:
    """number, operator, connective or other: ` 12` → number, `=` → operator, ` therefore` → connective."""
    text = token.strip().strip(".,;:!?").casefold() or token.strip()
    if NUMBERS.fullmatch(text):
        return "number"
    if text and OPERATORS.fullmatch(text):
        return "operator"
    return "connective" if text in CONNECTIVES else "other"


class Tokens:
    """Every action of some rows with its text, place and channels, flat: one entry an action."""

    def __init__(self, rows: Rows) -> None:
        texts: list[str] = []
        owner: list[int] = []
        place: list[int] = []
        keep: list[bool] = []
        masks = rows.plain("mask")
        offsets, ids = rows.plain("text_offsets"), rows.plain("ids")
        for i, completion in enumerate(rows.completions):
            found, hexes = pieces(completion, offsets[i], None)
            mask = masks[i] if isinstance(masks[i], list) and len(masks[i]) == len(found) else [1] * len(found)
            named = ids[i] if isinstance(ids[i], list) and len(ids[i]) == len(found) else [None] * len(found)
            for t, (text, raw, used, token) in enumerate(zip(found, hexes, mask, named, strict=True)):
                texts.append(f"<{raw}>" if text is None else text or (f"#{token}" if token is not None else ""))
                owner.append(i)
                place.append(t)
                keep.append(bool(used))
        self.rows, self.keep = rows, np.array(keep, bool)
        self.sizes = np.bincount(np.array(owner, int), minlength=rows.count)
        self.text = [text for text, used in zip(texts, keep, strict=True) if used]
        self.row, self.place = np.array(owner, int)[self.keep], np.array(place, int)[self.keep]
        self.count = len(self.text)

    def channel(self, name: str) -> Floats | None:
        """A channel of every action, None where it is not stored or fits the tokens nowhere."""
        if name not in self.rows.channels:
            return None
        starts, values = self.rows.lists(name)
        sizes = self.sizes
        if not np.array_equal(np.diff(starts)[sizes > 0], sizes[sizes > 0]) or values.size < sizes.sum():
            return None
        return values[np.repeat(sizes > 0, np.diff(starts))][self.keep].astype(np.float64)


def changed(table: pa.Table, *, classes: Classes = kind_of, step: int = 0) -> dict[str, Any]:
    """The tables of a step (or of several, one after the other)."""
    return changed_of(Tokens(Rows(table, step)), classes=classes)


def changed_of(tokens: Tokens, *, classes: Classes = kind_of) -> dict[str, Any]:
    """The same of tokens that were read before."""
    rows = tokens.rows
    names = ("push", "delta_ref", "result", "kl", "entropy", "clip", "new_logprobs")
    found = {name: values for name in names if (values := tokens.channel(name)) is not None and not np.isnan(values).all()}
    missing = [
        f"{title} is not stored"
        for name, title in zip(names[:5], ("push", "Δ reference", "result", "KL", "entropy"), strict=True)
        if name not in found
    ]
    kinds = [classes(text) for text in tokens.text]
    flags = collapses(rows, tokens)
    return {
        "tokens": by_token(tokens.text, kinds, found), "positions": by_position(tokens.place, found), "entropy": by_entropy(found),
        "scatter": scatter(tokens.text, found), "confident": confident(found), "classes": by_class(kinds, found),
        "parts": by_part(rows, tokens, found), "collapse": flags[:FLAGS], "flags": len(flags), "missing": missing, "count": tokens.count,
    }  # fmt: skip


def _known(values: Floats) -> Floats:
    """0 for what is not known; what is infinite stays so."""
    return np.where(np.isnan(values), 0.0, values)


def _sums(groups: np.ndarray[Any, Any], size: int, found: Mapping[str, Floats], name: str) -> list[float | None]:
    if name not in found:
        return [None] * size
    return [number(x) for x in np.bincount(groups, _known(found[name]), size)]


def by_token(texts: Sequence[str], kinds: Sequence[str], found: Mapping[str, Floats]) -> dict[str, Any]:
    """Tokens that were gained and lost most: sums of Δ reference, push and result over their places; ordered by Δ, or without it by push."""
    order = next((name for name in ("delta_ref", "push", "result") if name in found), None)
    if order is None or not texts:
        return {"gained": [], "lost": [], "by": None}
    known = {text: i for i, text in enumerate(dict.fromkeys(texts))}
    which = np.array([known[text] for text in texts])
    counts = np.bincount(which, minlength=len(known))
    columns = {key: _sums(which, len(known), found, name) for key, name in (("push", "push"), ("delta", "delta_ref"), ("result", "result"))}
    kind = dict(zip(texts, kinds, strict=True))
    weight = np.bincount(which, _known(found[order]), len(known))
    names = list(known)

    def line(i: int) -> dict[str, Any]:
        return {
            "token": cut(names[i], 60),
            "class": kind[names[i]],
            "count": int(counts[i]),
            **{key: values[i] for key, values in columns.items()},
        }

    ranked = np.argsort(-weight, kind="stable").tolist()
    return {
        "gained": [line(i) for i in ranked[:SHOWN] if weight[i] > 0], "lost": [line(i) for i in reversed(ranked[-SHOWN:]) if weight[i] < 0], "by": order,
    }  # fmt: skip


def by_position(place: np.ndarray[Any, Any], found: Mapping[str, Floats]) -> list[dict[str, Any]]:
    """Means by position in the answer: every one up to 16, then in bins that grow by a quarter."""
    if not len(place):
        return []
    edges = list(range(17))
    while edges[-1] <= place.max():
        edges.append(max(edges[-1] + 1, int(edges[-1] * 1.25)))
    bins = np.searchsorted(edges, place, side="right") - 1
    lines = []
    for b in np.unique(bins).tolist():
        here = bins == b
        line: dict[str, Any] = {"from": edges[b], "to": edges[b + 1], "count": int(here.sum())}
        for key, name in (("kl", "kl"), ("delta", "delta_ref"), ("push", "push"), ("entropy", "entropy")):
            line[key] = number(_mean(found[name][here])) if name in found else None
        line["clipped"] = number(float((np.abs(found["clip"][here]) == 1).mean())) if "clip" in found else None
        lines.append(line)
    return lines


def _mean(values: Floats) -> float | None:
    values = values[~np.isnan(values)]
    return float(values.mean()) if len(values) else None


def by_entropy(found: Mapping[str, Floats]) -> dict[str, Any]:
    """Percentiles of the entropy, and the share of Σ KL and Σ |push| on the fifth of the tokens with the highest."""
    entropy = found.get("entropy")
    if entropy is None:
        return {"percentiles": [], "top20_share_of_kl": None, "top20_share_of_push": None}
    known = ~np.isnan(entropy)
    top = known & (entropy >= np.quantile(entropy[known], 0.8))

    def share(name: str) -> float | None:
        if name not in found:
            return None
        values = np.abs(_known(found[name]))[known]
        return number(values[top[known]].sum() / values.sum()) if values.sum() > 0 else None

    return {
        "percentiles": [[q, number(np.quantile(entropy[known], q / 100))] for q in (0, 5, 10, 25, 50, 75, 80, 90, 95, 99, 100)],
        "top20_share_of_kl": share("kl"), "top20_share_of_push": share("push"),
    }  # fmt: skip


def scatter(texts: Sequence[str], found: Mapping[str, Floats]) -> dict[str, Any]:
    """push against result, token by token: every so many where there are more than 2,000."""
    if "push" not in found or "result" not in found:
        return {"push": [], "result": [], "token": [], "cut": False}
    known = np.nonzero(~np.isnan(found["push"]) & ~np.isnan(found["result"]))[0]
    picked = known[:: max(1, math.ceil(len(known) / POINTS))]
    agree = np.sign(found["push"][known]) * np.sign(found["result"][known])
    return {
        "push": [number(x) for x in found["push"][picked]], "result": [number(x) for x in found["result"][picked]],
        "token": [cut(texts[i], 40) for i in picked.tolist()], "cut": len(picked) < len(known), "count": len(known),
        "as_asked": number(float((agree > 0).sum() / max(1, (agree != 0).sum()))),
    }  # fmt: skip


def leaving(p: float, n: int) -> float:
    """The chance that at least one of n rollouts leaves the top choice at a place of probability p: 1 − pⁿ (0.99, 16 → 0.1485)."""
    return 1 - p**n


def confident(found: Mapping[str, Floats]) -> dict[str, Any]:
    """Over-confidence: tokens above 0.9 that are pushed further up, by bands of probability, and what is left of exploration there. Where it is known what came
    of the update (`looked`): how many rose, how many crossed into the next band, and the mean probabilities before and after."""
    logs, push, result = found.get("new_logprobs"), found.get("push"), found.get("result")
    chances = [{"p": p, "n": n, "chance": number(leaving(p, n))} for p in (0.9, 0.99, 0.999) for n in (4, 16, 64)]
    if logs is None:
        return {"above": CONFIDENT, "count": 0, "pushed_further": None, "bands": [], "leaving": chances}
    p = np.exp(np.nan_to_num(logs, nan=-np.inf))
    up = push > 0 if push is not None else np.zeros(len(p), bool)
    down = push < 0 if push is not None else np.zeros(len(p), bool)
    later = None if result is None else np.exp(np.minimum(0.0, logs + result))
    bands = []
    for low, high in BANDS:
        here = (p >= low) & ((p < high) if high < 1 else (p <= 1))
        looked = here if later is None else here & ~np.isnan(later)
        bands.append({
            "from": low, "to": high, "count": int(here.sum()), "pushed_up": int((here & up).sum()), "pushed_down": int((here & down).sum()),
            "looked": None if later is None else int(looked.sum()), "rose": None if later is None else int((looked & (later > p)).sum()),
            "crossed": None if later is None or high == 1 else int((looked & (later >= high)).sum()),
            "mean_before": number(_mean(p[looked])), "mean_after": number(None if later is None else _mean(later[looked])),
        })  # fmt: skip
    above = p > CONFIDENT
    return {"above": CONFIDENT, "count": int(above.sum()), "pushed_further": int((above & up).sum()) if push is not None else None, "bands": bands, "leaving": chances}  # fmt: skip


def by_class(kinds: Sequence[str], found: Mapping[str, Floats]) -> list[dict[str, Any]]:
    """Tokens by class: how many, Σ |push|, Σ Δ, Σ KL."""
    names = sorted(set(kinds))
    which = np.array([names.index(kind) for kind in kinds], int)
    sizes = {"push": np.abs(found["push"])} if "push" in found else {}
    columns = {
        "push": _sums(which, len(names), sizes, "push"), "delta": _sums(which, len(names), found, "delta_ref"), "kl": _sums(which, len(names), found, "kl"),
    }  # fmt: skip
    counts = np.bincount(which, minlength=len(names)) if kinds else np.zeros(0, int)
    return [{"class": name, "count": int(counts[i]), **{key: values[i] for key, values in columns.items()}} for i, name in enumerate(names)]


def by_part(rows: Rows, tokens: Tokens, found: Mapping[str, Floats]) -> dict[str, Any]:
    """What the answers' rewards are made of: mean, deviation and weight of every part, and how they go together over the answers of the step, with the whole
    reward, the length and the KL (Pearson's correlation; None where one of two never varies). A reward that follows the length is a reward for length."""
    columns: list[tuple[str, float | None, list[Any]]] = [
        (name, rows.weights.get(name, 1.0), values) for name, values in rows.parts().items()
    ]
    columns += [("whole reward", None, rows.plain("reward")), ("tokens", None, rows.plain("length"))]
    if "kl" in found:
        columns.append(("KL, nats", None, [number(x) for x in np.bincount(tokens.row, _known(found["kl"]), rows.count)]))
    lines, table = [], []
    for name, weight, values in columns:
        numbers = np.array([x if isinstance(x, (int, float)) else np.nan for x in values], np.float64)
        known = np.isfinite(numbers)
        if known.any():
            table.append(np.where(known, numbers, np.nan))
            mean, deviation = numbers[known].mean(), numbers[known].std()
            lines.append({"name": name, "weight": weight, "mean": number(mean), "std": number(deviation), "known": int(known.sum())})
    return {"lines": lines, "together": [[number(correlation(a, b)) for b in table] for a in table]}


def correlation(a: Floats, b: Floats) -> float | None:
    """Pearson's correlation over the entries where both are known; None where one does not vary: 1 2 3, 2 4 6 → 1."""
    both = np.isfinite(a) & np.isfinite(b)
    a, b = a[both], b[both]
    if len(a) < 3 or np.ptp(a) <= 1e-9 * max(1.0, float(np.abs(a).max())) or np.ptp(b) <= 1e-9 * max(1.0, float(np.abs(b).max())):
        return None
    return float(np.corrcoef(a, b)[0, 1])
