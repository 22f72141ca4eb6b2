"""The attention function that every model runs through: packed rows with shared prefixes, and cached decoding.

It is registered with transformers as "tilt". The packing travels as a `layout=` keyword of the model's forward call; the object decides who sees whom.
"""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

NAME = "tilt"


class Attend(Protocol):
    """Who sees whom in a row of tokens: a pack's segments while training, a cache while sampling."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor, *, layer: int, scaling: float, window: int | None, softcap: float | None, sinks: Tensor | None) -> Tensor:
        """Attention of one layer: query [1, heads, T, width], key and value [1, kv_heads, T, width] → [1, T, heads, width]."""
        ...


def attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None = None, scaling: float | None = None, dropout: float = 0.0,
    sliding_window: int | None = None, softcap: float | None = None, s_aux: Tensor | None = None, layout: Attend | None = None, **unknown: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """Hand one layer's queries, keys and values to the layout."""
    assert layout is not None, "a model with Tilt's attention is called with layout="
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    out = layout.attend(query, key, value, layer=module.layer_idx, scaling=scale, window=sliding_window, softcap=softcap, sinks=s_aux)  # type: ignore[arg-type]
    return out, None


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, lambda *args, **kwargs: None)
