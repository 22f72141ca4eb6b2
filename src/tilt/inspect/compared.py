"""Two checkpoints on the same texts, teacher-forced: what each says of every token, and where they differ most."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from tilt.data.packing import Pack, pack
from tilt.data.rollouts import Rollout
from tilt.distributions import entropy, kl
from tilt.inspect.changed import changed
from tilt.inspect.tables import number, pieces
from tilt.learning.shares import share_of
from tilt.models.policy import Policy
from tilt.runs.offsets import Spelling, text_offsets

TOP, AT_ONCE = 5, 2**23
"""Alternatives a token; logits in memory at a time (32 MiB in float32)."""
FORMAT = "tilt comparison 1"
MOST_RANKED = 200
FLOOR = 1e-5
"""KL below which a place counts as unchanged: the noise of float32."""


@dataclass(frozen=True)
class Reading:
    """What two policies (and a reference) say of each action of a pack, [A]; of the alternatives [A, K]."""

    a: Tensor
    b: Tensor
    reference: Tensor | None
    a_entropy: Tensor
    b_entropy: Tensor
    a_rank: Tensor
    b_rank: Tensor
    kl: Tensor
    best: tuple[Tensor, Tensor]
    a_top: tuple[Tensor, Tensor]
    b_top: tuple[Tensor, Tensor]


@torch.no_grad()
def read(a: Policy, b: Policy, reference: Policy | None, batch: Pack, *, micro_tokens: int = 8192) -> Reading:
    """Both policies on a pack; the exact KL(b ‖ a) before each action, a few rows of logits at a time."""
    device = next(a.parameters()).device
    parts: list[tuple[Tensor, ...]] = []
    places: list[Tensor] = []
    for part in batch.split(micro_tokens):
        small = share_of(batch, part).to(device)
        hidden = [None if policy is None else policy.before_actions(small) for policy in (a, b, reference)]
        assert hidden[0] is not None and hidden[1] is not None
        vocabulary = a.head(hidden[0][:1]).shape[1]
        rows = max(1, AT_ONCE // vocabulary)
        found = []
        for begin in range(0, len(small.actions), rows):
            cut = slice(begin, begin + rows)
            actions = small.actions[cut]
            la, lb = (_exact(policy.head(h[cut])).log_softmax(-1) for policy, h in ((a, hidden[0]), (b, hidden[1])))
            ref = None if reference is None or hidden[2] is None else _exact(reference.head(hidden[2][cut])).log_softmax(-1)
            said = [x.gather(1, actions[:, None])[:, 0] for x in (la, lb)]
            tops = [x.topk(min(TOP, vocabulary)) for x in (la, lb)]
            found.append((
                said[0], said[1], said[0] * math.nan if ref is None else ref.gather(1, actions[:, None])[:, 0], entropy(la), entropy(lb),
                (la > said[0][:, None]).sum(1), (lb > said[1][:, None]).sum(1), kl(lb, la).clamp(min=0), la.argmax(1), lb.argmax(1),
                tops[0].indices, tops[0].values, tops[1].indices, tops[1].values,
            ))  # fmt: skip
        parts.append(tuple(torch.cat(column).cpu() for column in zip(*found, strict=True)))
        places.append(batch.layout.actions_of(part))
    order = torch.cat(places).argsort()
    c = [torch.cat(column)[order] for column in zip(*parts, strict=True)]
    return Reading(
        c[0], c[1], None if reference is None else c[2], c[3], c[4], c[5], c[6], c[7], (c[8], c[9]), (c[10], c[11]), (c[12], c[13])
    )


def _exact(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def compare(
    a: Policy, b: Policy, rollouts: Sequence[Rollout], texts: Sequence[tuple[str, str]], tokenizer: Any,
    *, names: tuple[str, str] = ("a", "b"), reference: tuple[str, Policy] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """The comparison of two policies on given answers, as `tilt view` reads it. `texts` are the answers' (prompt, completion)."""
    batch = pack(rollouts)
    found = read(a, b, None if reference is None else reference[1], batch)
    delta = found.b - found.a
    spelling = Spelling(tokenizer)
    flips = found.best[0] != found.best[1]
    channels = {
        "delta": delta, "kl": found.kl, "a_logprobs": found.a, "b_logprobs": found.b, "a_entropy": found.a_entropy, "b_entropy": found.b_entropy,
        "a_rank": found.a_rank, "b_rank": found.b_rank, "argmax_changed": flips.int(),
    }  # fmt: skip
    if found.reference is not None:
        channels["delta_reference"] = found.b - found.reference
    bounds = np.concatenate([[0], np.cumsum(batch.layout.lengths.numpy())]).tolist()
    shown, offsets = [], []
    for i, (rollout, (prompt, completion)) in enumerate(zip(rollouts, texts, strict=True)):
        here = slice(bounds[i], bounds[i + 1])
        offset = text_offsets(rollout.tokens, completion, spelling)
        offsets.append(offset)
        tokens, hexes = pieces(completion, offset, len(rollout.tokens))
        shown.append({
            "prompt": prompt, "completion": completion, "tokens": tokens, "bytes": hexes, "ids": list(rollout.tokens), "mask": [1] * len(rollout.tokens),
            "channels": {name: [_plain(x) for x in values[here].tolist()] for name, values in channels.items()},
            "top": {"a": _tops(found.a_top, here, spelling), "b": _tops(found.b_top, here, spelling)},
        })  # fmt: skip
    return {
        "format": FORMAT, "a": names[0], "b": names[1], "reference": None if reference is None else reference[0], "texts": shown,
        "changed": changed(_table(texts, rollouts, offsets, found, delta)), "ranked": ranked(batch, found, delta, flips), "generations": [], "flips": None,
        "summary": summary(batch, found, delta, flips), "notes": ["Both checkpoints read the same answers; KL is exact, over the whole vocabulary, of b from a."],
    }  # fmt: skip


def _plain(x: float) -> Any:
    return x if isinstance(x, int) else float(f"{x:.7g}") if math.isfinite(x) else number(x)


def _tops(top: tuple[Tensor, Tensor], here: slice, spelling: Spelling) -> list[Any]:
    pairs = zip(top[0][here].tolist(), top[1][here].tolist(), strict=True)
    return [[[spelling.shown(token), number(log)] for token, log in zip(ids, logs, strict=True)] for ids, logs in pairs]


def _table(
    texts: Sequence[tuple[str, str]], rollouts: Sequence[Rollout], offsets: Sequence[Sequence[int]], found: Reading, delta: Tensor
) -> pa.Table:
    """The comparison as a stored step would hold it: Δ between the two in place of that against the reference."""
    starts = pa.array(np.concatenate([[0], np.cumsum([len(o) for o in offsets])]).astype(np.int32))

    def lists(values: Any) -> pa.Array:
        return pa.ListArray.from_arrays(starts, pa.array(np.asarray(values)))

    flat = {"delta_ref": delta, "kl": found.kl, "entropy": found.a_entropy, "new_logprobs": found.a, "result": delta}
    return pa.table({
        "prompt": [_storable(prompt) for prompt, _ in texts], "completion": [_storable(completion) for _, completion in texts],
        "ids": lists(np.array([t for r in rollouts for t in r.tokens], np.uint32)), "text_offsets": lists(np.array([o for each in offsets for o in each], np.int32)),
        **{name: lists(values.float().numpy()) for name, values in flat.items()},
    })  # fmt: skip


def _storable(text: str) -> str:
    return text.encode("utf-8", "replace").decode()


def ranked(batch: Pack, found: Reading, delta: Tensor, flips: Tensor) -> list[dict[str, Any]]:
    """The places that changed most, by exact KL; of places that read the same text before them only the first."""
    order = found.kl.argsort(descending=True, stable=True).tolist()
    owner, position = batch.layout.sequence.tolist(), batch.layout.positions.tolist()
    seen: set[tuple[float, int]] = set()
    lines: list[dict[str, Any]] = []
    for i in order:
        if float(found.kl[i]) < FLOOR or len(lines) >= MOST_RANKED:
            break
        key = (round(float(found.kl[i]), 9), position[i])
        if key in seen:
            continue
        seen.add(key)
        gained = f"the token went from {100 * math.exp(float(found.a[i])):.3g} % to {100 * math.exp(float(found.b[i])):.3g} %"
        lines.append({
            "text": owner[i], "position": position[i], "score": _plain(float(found.kl[i])), "delta": _plain(float(delta[i])),
            "reason": gained + ("; the top choice changed" if bool(flips[i]) else ""),
        })  # fmt: skip
    return lines


def summary(batch: Pack, found: Reading, delta: Tensor, flips: Tensor) -> dict[str, Any]:
    """Means and extremes over all tokens; the sampled k1 = log b − log a of given texts is no estimate of KL, and stands as the mean Δ."""
    order = found.kl.sort(descending=True).values
    count = len(order)
    return {
        "texts": batch.layout.sequences, "tokens": count, "mean_kl": _plain(float(found.kl.mean())), "largest_kl": _plain(float(order[0])), "mean_delta": _plain(float(delta.mean())),
        "share_of_kl_in_top_tenth_of_tokens": _plain(float(order[: max(1, count // 10)].sum() / order.sum())) if float(order.sum()) > 0 else 0.0,
        "top_choice_changed": int(flips.sum()), "unchanged_tokens": int((found.kl < FLOOR).sum()), "mean_entropy_a": _plain(float(found.a_entropy.mean())), "mean_entropy_b": _plain(float(found.b_entropy.mean())),
    }  # fmt: skip


def mcnemar(gained: int, lost: int) -> float:
    """The exact two-sided McNemar test: 2 · P(X ≤ min) for X ~ Binomial(gained + lost, 1/2), at most 1: 5 and 0 → 0.0625."""
    count = gained + lost
    tail = sum(math.comb(count, k) for k in range(min(gained, lost) + 1)) / 2**count
    return min(1.0, 2 * tail)


def flips_of(prompts: Sequence[str], a: Sequence[tuple[str, bool]], b: Sequence[tuple[str, bool]]) -> dict[str, Any]:
    """Which prompts were answered rightly by one and wrongly by the other, and how unlikely that is by chance."""
    pairs = list(zip(prompts, a, b, strict=True))
    gained = [{"prompt": p, "a": x[0], "b": y[0]} for p, x, y in pairs if not x[1] and y[1]]
    lost = [{"prompt": p, "a": x[0], "b": y[0]} for p, x, y in pairs if x[1] and not y[1]]
    both = sum(x[1] and y[1] for _, x, y in pairs)
    return {
        "gained": gained,
        "lost": lost,
        "both": both,
        "neither": len(pairs) - both - len(gained) - len(lost),
        "p": mcnemar(len(gained), len(lost)),
    }
