"""The attention function that every model runs through: packed rows with shared prefixes, and cached decoding.

It is registered with transformers as "tilt". The packing travels as a `layout=` keyword of the model's forward call; the object decides who sees whom.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AttentionInterface

from tilt.data.packing import Segments
from tilt.errors import UsageError
from tilt.linear_head import plain

NAME = "tilt"

SMALL = 2**19
"""Scores, batch × heads × queries × keys, up to which two plain products beat the fused kernel on a CPU; they fit the caches (2 to 4 times at 5 queries of 12 keys)."""

HARMLESS = frozenset(
    {"position_ids", "cache_position", "use_cache", "output_attentions", "output_hidden_states", "output_router_logits", "return_dict", "num_items_in_batch", "logits_to_keep"}
)  # fmt: skip
"""Keywords that architectures pass on to attention and that change nothing in its result; any other that is set is refused."""


class Attend(Protocol):
    """Who sees whom in a row of tokens: a pack's segments while training, a cache while sampling."""

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        layer: int,
        scaling: float,
        window: int | None,
        softcap: float | None,
        sinks: Tensor | None,
    ) -> Tensor:
        """Attention of one layer: query [1, heads, T, width], key and value [1, kv_heads, T, width] → [1, T, heads, width]."""
        ...


def attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None = None, scaling: float | None = None, dropout: float = 0.0,
    sliding_window: int | None = None, softcap: float | None = None, s_aux: Tensor | None = None, layout: Attend | None = None, **unknown: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """Hand one layer's queries, keys and values to the layout; what would change the result and is not understood is refused."""
    assert layout is not None, "a model with Tilt's attention is called with layout="
    causal = unknown.pop("is_causal", None)
    strange = sorted(k for k, v in unknown.items() if k not in HARMLESS and v is not None)
    if attention_mask is not None:
        strange.append("attention_mask")
    if causal is False or (causal is None and getattr(module, "is_causal", True) is False):
        strange.append("is_causal=False")
    if dropout:
        strange.append(f"dropout={dropout}")
    if strange:
        raise UsageError(
            f"{type(module).__name__} asks its attention for {', '.join(strange)}, which packed rows do not honour.\nLoad the model through tilt.models.load: it falls back to a padded batch."
        )
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    out = layout.attend(query, key, value, layer=module.layer_idx, scaling=scale, window=sliding_window, softcap=softcap, sinks=s_aux)  # type: ignore[arg-type]
    return out, None


AttentionInterface.register(NAME, attention)
# No mask function beside it: for an attention without one, transformers builds no mask and searches the positions for no packed sequences.


@contextmanager
def twice_differentiable() -> Iterator[None]:
    """Inside, attention and the vocabulary head are computed from plain operations, whose gradients have gradients; the fused ones have none."""
    with sdpa_kernel(SDPBackend.MATH), plain():
        yield


OVERHEAD = {"cpu": 2**12}
"""Pairs of query and key whose cost equals that of one more batch in a layer; on other devices 2^20."""


@dataclass(frozen=True)
class Bunch:
    """Segments of like length, attended to as one padded batch: `queries` [N, C] index tokens of the row, `keys` [N, P + C] their parents' tokens and then their own.

    Padding repeats some token and is masked as a key, unread as a query. `above` and `own` [N] are the lengths of parent and segment; P is 0 for
    roots. Masks are made once per sliding window.
    """

    queries: Tensor
    keys: Tensor
    above: Tensor
    own: Tensor
    masks: dict[int | None, Tensor | None] = field(default_factory=dict, repr=False, compare=False)

    def mask(self, window: int | None) -> Tensor | None:
        """Who sees whom, [N or 1, 1, C, P + C], or None where it is plainly causal; a window of w shows the w latest positions, the own one included."""
        if window is not None and window >= self.keys.shape[1]:
            window = None
        if window not in self.masks:
            self.masks[window] = self._shared(window) if self.keys.shape[1] > self.queries.shape[1] else self._alone(window)
        return self.masks[window]

    def _alone(self, window: int | None) -> Tensor | None:
        return None if window is None else _causal(self.queries.shape[1], self.queries.device, window)[None, None]

    def _shared(self, window: int | None) -> Tensor:
        wide = self.keys.shape[1] - self.queries.shape[1]
        own = _causal(self.queries.shape[1], self.queries.device, window).expand(len(self.queries), -1, -1)
        place = torch.arange(wide, device=own.device)
        seen = (place < self.above[:, None])[:, None].expand(-1, own.shape[1], -1)
        if window is not None:
            position = self.above[:, None] + torch.arange(own.shape[1], device=own.device)
            seen = seen & (position[:, :, None] - place < window)
        return torch.cat([seen, own], 2)[:, None]


@dataclass(frozen=True)
class PackedAttention:
    """Attention over a pack: roots in causal batches, children in batches that also see their parents' keys, segments of like length together.

    `inverse` [T] finds each token in the flattened outputs of all bunches.
    Worked example: prompt 5 6 with answers 7 8 E and 9 E → row 5 6 7 8 E 9 E; roots: queries [0 1]; children: queries [2 3 4; 5 6 ·],
    keys [0 1 2 3 4; 0 1 5 6 ·]; inverse 0 1 2 3 4 5 6.
    """

    bunches: tuple[Bunch, ...]
    inverse: Tensor

    @staticmethod
    def of(segments: Segments) -> PackedAttention:
        """The plan of a pack: which tokens each batch gathers, and where each token's output lies."""
        start, length, parent = segments.start, segments.length, segments.parent
        above = torch.where(parent >= 0, length[parent.clamp(min=0)], 0)
        return _planned(start, start, length, start[parent.clamp(min=0)], above)

    @staticmethod
    def closing(segments: Segments) -> tuple[PackedAttention, Tensor]:
        """The plan of a last layer, and the tokens [N] whose outputs it gives, in order: all of what nothing hangs under, the last of what something does.

        Its queries are those tokens' alone; its keys are all tokens'. Worked example: 5 6 | 7 8 E | 9 E → tokens 1 2 3 4 5 6: of the prompt only the end.
        """
        start, length, parent = segments.start, segments.length, segments.parent
        shared, first, own = _closing(segments)
        above = torch.where(shared, length - 1, torch.where(parent >= 0, length[parent.clamp(min=0)], 0))
        before = torch.where(shared, start, start[parent.clamp(min=0)])
        compact = own.cumsum(0) - own
        tokens = asking(segments)
        return _planned(compact, first, own, before, above), tokens

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        layer: int,
        scaling: float,
        window: int | None,
        softcap: float | None,
        sinks: Tensor | None,
    ) -> Tensor:
        """Attention of one layer in row order: query [1, heads, T, width], key and value [1, kv_heads, T, width] → [1, T, heads, width]."""
        heads, kv_heads = query.shape[1], key.shape[1]
        q, k, v = (x.transpose(1, 2).reshape(x.shape[2], -1) for x in (query, key, value))

        def part(bunch: Bunch) -> Tensor:
            questions, answers = bunch.queries, bunch.keys
            out = attended(
                _heads(q, questions, heads),
                _heads(k, answers, kv_heads),
                _heads(v, answers, kv_heads),
                bunch.mask(window),
                scaling,
                softcap,
                sinks,
            )
            return out.transpose(1, 2).reshape(questions.numel(), -1)

        return F.embedding(self.inverse, torch.cat([part(bunch) for bunch in self.bunches])).unflatten(1, (heads, -1))[None]


def asking(segments: Segments) -> Tensor:
    """The tokens that ask in a last layer, in order: all of what nothing hangs under, the last of what something does."""
    _, first, own = _closing(segments)
    return torch.repeat_interleave(first - (own.cumsum(0) - own), own) + torch.arange(int(own.sum()), device=own.device)


def _closing(segments: Segments) -> tuple[Tensor, Tensor, Tensor]:
    """Of each segment in a last layer: whether others hang under it, the first token that asks, and how many do."""
    start, length, parent = segments.start, segments.length, segments.parent
    shared = torch.zeros_like(start, dtype=torch.bool)
    shared[parent[parent >= 0]] = True
    return shared, torch.where(shared, start + length - 1, start), torch.where(shared, 1, length)


def _planned(asked: Tensor, start: Tensor, length: Tensor, before: Tensor, above: Tensor) -> PackedAttention:
    """The plan of segments of `length` tokens from `start` on, whose queries lie from `asked` on, and which see `above` tokens from `before` on, too."""
    extra = OVERHEAD.get(start.device.type, 2**20)
    sizes = list(zip(above.tolist(), length.tolist(), strict=True))
    parts = [which for child in (False, True) for which in alike([i for i, (a, _) in enumerate(sizes) if (a > 0) == child], sizes, extra)]

    def gather(first: Tensor, count: Tensor, width: int) -> Tensor:
        steps = torch.arange(width, device=first.device).expand(len(first), width)
        return first[:, None] + torch.minimum(steps, (count[:, None] - 1).clamp(min=0))

    bunches, base, done = [], torch.empty_like(start), 0
    for part in parts:
        which = torch.tensor(part, device=start.device)
        own = max(sizes[i][1] for i in part)
        queries, keys = gather(asked[which], length[which], own), gather(start[which], length[which], own)
        if sizes[part[0]][0]:
            keys = torch.cat([gather(before[which], above[which], max(sizes[i][0] for i in part)), keys], 1)
        bunches.append(Bunch(queries, keys, above[which], length[which]))
        base[which] = done + torch.arange(len(part), device=start.device) * own
        done += queries.numel()
    tokens = sum(n for _, n in sizes)
    inverse = torch.repeat_interleave(base - asked, length, output_size=tokens) + torch.arange(tokens, device=start.device)
    return PackedAttention(tuple(bunches), inverse)


def alike(which: Sequence[int], sizes: Sequence[tuple[int, int]], overhead: int) -> list[list[int]]:
    """Segments, named by number, in bunches of like size, (parent, own) each: those for which padded pairs of query and key, and `overhead` a bunch, are fewest.

    Segments whose sizes have the same powers of two are never parted. Worked example: own sizes 3 4 60, no parents, overhead 100: [3 4], [60]; overhead
    10,000: all together.
    """
    classes: dict[tuple[int, int], list[int]] = {}
    for i in which:
        above, own = sizes[i]
        classes.setdefault(((own - 1).bit_length(), (above - 1).bit_length() if above else 0), []).append(i)
    ordered = [classes[name] for name in sorted(classes)]
    shapes = [(len(c), max(sizes[i][0] for i in c), max(sizes[i][1] for i in c)) for c in ordered]
    best: list[tuple[float, int]] = [(0, 0)]  # the cheapest way with the first classes, and where its last bunch begins
    for end in range(1, len(ordered) + 1):
        choices = []
        count = above = own = 0
        for begin in range(end - 1, -1, -1):
            number, parent, size = shapes[begin]
            count, above, own = count + number, max(above, parent), max(own, size)
            choices.append((best[begin][0] + count * own * (above + own) + overhead, begin))
        best.append(min(choices))
    found: list[list[int]] = []
    end = len(ordered)
    while end:
        begin = best[end][1]
        found.insert(0, sorted(i for c in ordered[begin:end] for i in c))
        end = begin
    return found


def _causal(n: int, device: torch.device, window: int | None) -> Tensor:
    """Position i sees j where 0 <= i - j < window, [n, n]."""
    place = torch.arange(n, device=device)
    back = place[:, None] - place
    return back >= 0 if window is None else (back >= 0) & (back < window)


def _heads(row: Tensor, index: Tensor, heads: int) -> Tensor:
    """Tokens of the row [T, heads · width] by index [B, N] → [B, heads, N, width]. (An embedding lookup has the fastest backward.)"""
    return F.embedding(index, row).unflatten(2, (heads, -1)).transpose(1, 2)


def attended(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float, softcap: float | None, sinks: Tensor | None) -> Tensor:
    """Attention of a batch, [B, heads, N, width]; without a mask it is causal. `softcap` bounds scores by c·tanh(s/c), `sinks` [heads] are scores of a key without value."""
    batch, heads, asked, width = q.shape
    kv_heads, seen = k.shape[1], k.shape[2]
    common = softcap is None and sinks is None
    if common and (q.device.type != "cpu" or batch * heads * asked * seen > SMALL):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, scale=scaling, enable_gqa=heads > kv_heads)
    scores = ((q * scaling).reshape(batch, kv_heads, -1, width) @ k.transpose(2, 3)).view(batch, heads, asked, seen)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    shown = _causal(asked, q.device, None) if mask is None else mask
    scores = scores + torch.zeros(shown.shape, dtype=scores.dtype, device=q.device).masked_fill_(~shown, float("-inf"))
    if sinks is not None:
        scores = torch.cat([scores, sinks.to(scores.dtype)[None, :, None, None].expand(batch, heads, asked, 1)], 3)
    precise = scores if scores.dtype == torch.float64 else scores.float()
    weights = torch.softmax(precise, 3)[..., :seen].to(v.dtype)
    return (weights.reshape(batch, kv_heads, -1, seen) @ v).view(batch, heads, asked, width)
