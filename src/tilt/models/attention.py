"""The attention function that every model runs through: packed rows with shared prefixes, and cached decoding.

It is registered with transformers as "tilt". The packing travels as a `layout=` keyword of the model's forward call; the object decides who sees whom.
"""

from __future__ import annotations

from collections.abc import Iterator
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


@dataclass(frozen=True)
class PackedAttention:
    """Attention over a pack: roots as one padded causal batch, children as a second batch that also sees their parent's keys.

    `roots` [R, L] and `queries` [S, C] index tokens of the row, `keys` [S, P + C] their parent's tokens and then their own; padding repeats
    some token and is masked as a key, unread as a query. `inverse` [T] finds each token in the flattened (roots, children) outputs.
    Worked example: prompt 5 6 with answers 7 8 E and 9 E → row 5 6 7 8 E 9 E, roots [0 1], queries [2 3 4; 5 6 ·],
    keys [0 1 2 3 4; 0 1 5 6 ·], inverse 0 1 2 3 4 5 6.
    `above` [S] and `own` [S] are the lengths of parent and child. Masks are made once per sliding window.
    """

    roots: Tensor
    queries: Tensor
    keys: Tensor
    inverse: Tensor
    above: Tensor
    own: Tensor
    masks: dict[int | None, tuple[Tensor | None, Tensor]] = field(default_factory=dict, repr=False, compare=False)

    @staticmethod
    def of(segments: Segments) -> PackedAttention:
        """The plan of a pack: which tokens each part gathers, and where each token's output lies."""
        start, length, parent = segments.start, segments.length, segments.parent
        is_root = parent < 0
        root, child = is_root.nonzero()[:, 0], (~is_root).nonzero()[:, 0]
        above = parent[child]
        longest_root, longest_own, longest_above = (int(n.max()) if len(n) else 0 for n in (length[root], length[child], length[above]))

        def gather(which: Tensor, width: int) -> Tensor:
            steps = torch.arange(width, device=start.device).expand(len(which), width)
            return start[which, None] + torch.minimum(steps, length[which, None] - 1)

        roots, queries = gather(root, longest_root), gather(child, longest_own)
        keys = torch.cat([gather(above, longest_above), queries], 1)
        base = torch.empty_like(start)
        base[root] = torch.arange(len(root), device=start.device) * longest_root
        base[child] = len(root) * longest_root + torch.arange(len(child), device=start.device) * longest_own
        tokens = int(length.sum())
        inverse = torch.repeat_interleave(base - start, length, output_size=tokens) + torch.arange(tokens, device=start.device)
        return PackedAttention(roots, queries, keys, inverse, length[above], length[child])

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
        (_, heads, tokens, _), kv_heads = query.shape, key.shape[1]
        q, k, v = (x.transpose(1, 2).reshape(tokens, -1) for x in (query, key, value))
        if window is not None and window >= max(self.roots.shape[1], self.keys.shape[1]):
            window = None
        causal, shared = self._masks(window)

        def part(questions: Tensor, answers: Tensor, mask: Tensor | None) -> Tensor:
            out = _attention(
                _heads(q, questions, heads), _heads(k, answers, kv_heads), _heads(v, answers, kv_heads), mask, scaling, softcap, sinks
            )
            return out.transpose(1, 2).reshape(questions.numel(), -1)

        outputs = [part(self.roots, self.roots, causal)]
        if len(self.queries):
            outputs.append(part(self.queries, self.keys, shared))
        return F.embedding(self.inverse, torch.cat(outputs)).unflatten(1, (heads, -1))[None]

    def _masks(self, window: int | None) -> tuple[Tensor | None, Tensor]:
        """Who sees whom among roots (None: plainly causal) and from children, [S, 1, C, P + C]; a window of w shows the w latest positions, the own one included."""
        if window not in self.masks:
            self.masks[window] = (
                None if window is None else _causal(self.roots.shape[1], self.roots.device, window)[None, None],
                self._shared(window),
            )
        return self.masks[window]

    def _shared(self, window: int | None) -> Tensor:
        wide = self.keys.shape[1] - self.queries.shape[1]
        own = _causal(self.queries.shape[1], self.queries.device, window).expand(len(self.queries), -1, -1)
        place = torch.arange(wide, device=own.device)
        seen = (place < self.above[:, None])[:, None].expand(-1, own.shape[1], -1)
        if window is not None:
            position = self.above[:, None] + torch.arange(own.shape[1], device=own.device)
            seen = seen & (position[:, :, None] - place < window)
        return torch.cat([seen, own], 2)[:, None]


def _causal(n: int, device: torch.device, window: int | None) -> Tensor:
    """Position i sees j where 0 <= i - j < window, [n, n]."""
    place = torch.arange(n, device=device)
    back = place[:, None] - place
    return back >= 0 if window is None else (back >= 0) & (back < window)


def _heads(row: Tensor, index: Tensor, heads: int) -> Tensor:
    """Tokens of the row [T, heads · width] by index [B, N] → [B, heads, N, width]. (An embedding lookup has the fastest backward.)"""
    return F.embedding(index, row).unflatten(2, (heads, -1)).transpose(1, 2)


def _attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float, softcap: float | None, sinks: Tensor | None) -> Tensor:
    """Attention of a batch, [B, heads, N, width]; without a mask it is causal. `softcap` bounds scores by c·tanh(s/c), `sinks` [heads] are scores of a key without value."""
    groups = q.shape[1] // k.shape[1]
    if softcap is None and sinks is None:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, scale=scaling, enable_gqa=groups > 1)
    k, v = (x.repeat_interleave(groups, 1) for x in (k, v))
    scores = q @ k.transpose(2, 3) * scaling
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    hidden = ~(_causal(q.shape[2], q.device, None) if mask is None else mask)
    scores = scores.masked_fill(hidden, float("-inf"))
    if sinks is not None:
        scores = torch.cat([scores, sinks.to(scores.dtype)[None, :, None, None].expand(*scores.shape[:3], 1)], 3)
    precise = scores if scores.dtype == torch.float64 else scores.float()
    return torch.softmax(precise, 3)[..., : k.shape[2]].to(v.dtype) @ v
