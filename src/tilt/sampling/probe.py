"""How much faster this machine multiplies a model's weights in bfloat16 than in their own dtype: tried in a fraction of a second, never acted upon unasked."""

from __future__ import annotations

from collections import Counter
from time import perf_counter

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

from tilt.models import compat
from tilt.models.work import matrices

SECONDS = 0.25  # the most that is tried


@torch.inference_mode()
def halving(lm: PreTrainedModel, rows: int) -> float:
    """Seconds of one decoding step's products, head included, in the weights' dtype over the same in bfloat16; shapes in turns, the fastest of each."""
    shapes = Counter(tuple(w.shape) for w in [*matrices(compat.body_of(lm)), compat.head_of(lm).weight] if w.dim() == 2)
    own, half = 0.0, 0.0
    until = perf_counter() + SECONDS
    for (wide, deep), count in shapes.most_common():
        weight = torch.ones(wide, deep, dtype=compat.dtype_of(lm), device=compat.device_of(lm))
        pairs = [(weight.new_ones(rows, deep), weight), (weight.new_ones(rows, deep).bfloat16(), weight.bfloat16())]
        best = [float("inf"), float("inf")]
        for trial in range(4):
            for i, (x, w) in enumerate(pairs):
                began = perf_counter()
                F.linear(x, w)
                best[i] = min(best[i], perf_counter() - began)
            if trial and perf_counter() > until:
                break
        own, half = own + count * best[0], half + count * best[1]
    return own / half if half else 1.0
