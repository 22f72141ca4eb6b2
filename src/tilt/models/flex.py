"""Attention over a pack by one compiled kernel on CUDA (FlexAttention, 2412.05496): nothing is gathered or padded; blocks of the row that nobody sees are skipped."""

from __future__ import annotations

import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention
from transformers import PreTrainedModel

from tilt import linear_head
from tilt.data.packing import Segments
from tilt.models import compat
from tilt.models.attention import Attend, PackedAttention, asking
from tilt.models.work import head_width

BLOCK = 128
LEAST = 2 * BLOCK  # shorter rows are padded to this: a size of one block would be compiled apart
WIDTHS = range(16, 257)
DEVICES = frozenset({"cuda"})
TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 4e-2}
"""Largest difference from the padded bunches per dtype, as a share of the largest entry; other dtypes do not take this way."""

_allowed: ContextVar[bool] = ContextVar("flex", default=True)
_judged: dict[tuple[object, ...], str] = {}


def off() -> AbstractContextManager[None]:
    """Inside, packs are attended to in padded bunches on every device."""
    return linear_head.without(_allowed)


def allowed(device: torch.device) -> bool:
    """Whether plans for this device may be of one kernel: CUDA, and neither `off` nor `linear_head.plain` around."""
    return device.type in DEVICES and _allowed.get() and linear_head.fused()


def plan(segments: Segments) -> Attend:
    """Who sees whom in a pack: by one kernel where that is allowed, else in padded bunches."""
    return FlexAttention.of(segments) if allowed(segments.start.device) else PackedAttention.of(segments)


def closing(segments: Segments) -> tuple[Attend, Tensor]:
    """The same for a last layer, and the tokens [Q] that ask there."""
    return FlexAttention.closing(segments) if allowed(segments.start.device) else PackedAttention.closing(segments)


@dataclass(frozen=True)
class Spans:
    """What each query sees of the row: keys from `above` on and before `above_end`, of its parent; from `own` on and before `own_end`, of itself; int32 [Q] each.

    Worked example: 5 6 | 7 8 E | 9 E, all asking → above 0 0 0 0 0 0 0, above_end 0 0 2 2 2 2 2, own 0 0 2 2 2 5 5, own_end 1 2 3 4 5 6 7.
    """

    above: Tensor
    above_end: Tensor
    own: Tensor
    own_end: Tensor

    @staticmethod
    def of(segments: Segments, tokens: Tensor, window: int | None) -> Spans:
        """Of these tokens of the row, through a window of the latest positions, the own one included."""
        owner = torch.repeat_interleave(torch.arange(len(segments.length), device=tokens.device), segments.length)[tokens]
        start, parent = segments.start[owner], segments.parent[owner]
        first = torch.where(parent >= 0, segments.start[parent.clamp(min=0)], 0)
        length = torch.where(parent >= 0, segments.length[parent.clamp(min=0)], 0)
        own, oldest = start, torch.zeros_like(start)
        if window is not None:
            own = torch.maximum(start, tokens - window + 1)
            oldest = (length + tokens - start - window + 1).clamp(min=0)
        found = (first + torch.minimum(oldest, length), first + length, own, tokens + 1)
        return Spans(*(x.to(torch.int32) for x in found))

    def padded(self, count: int) -> Spans:
        """With queries after the last that see nothing, `count` in all."""
        return Spans(*(F.pad(x, (0, count - len(x))) for x in (self.above, self.above_end, self.own, self.own_end)))

    def sees(self, query: Tensor, key: Tensor) -> Tensor:
        """Whether the query with this number sees this token of the row."""
        inherited = (key >= self.above[query]) & (key < self.above_end[query])
        return inherited | ((key >= self.own[query]) & (key < self.own_end[query]))

    def mask(self, keys: int) -> BlockMask:
        """The same by blocks: which hold a pair, and which hold nothing but pairs. Queries and `keys` come in whole blocks."""
        begin = torch.arange(0, keys, BLOCK, device=self.own.device)

        def inside(start: Tensor, end: Tensor) -> Tensor:
            return (torch.minimum(end[:, None], begin + BLOCK) - torch.maximum(start[:, None], begin)).clamp(min=0)

        pairs = inside(self.above, self.above_end) + inside(self.own, self.own_end)
        pairs = pairs.view(-1, BLOCK, len(begin)).sum(1)[None, None]
        full = pairs == BLOCK * BLOCK

        def see(_batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return self.sees(query, key)

        return BlockMask.from_kv_blocks(
            *_listed((pairs > 0) & ~full), *_listed(full), BLOCK_SIZE=BLOCK, mask_mod=see, seq_lengths=(len(self.own), keys)
        )


def _listed(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """How many blocks of keys each block of queries has [1, 1, Q], and their numbers, these first [1, 1, Q, K]."""
    order = torch.argsort(blocks.to(torch.int8), dim=-1, descending=True, stable=True)
    return blocks.sum(-1, dtype=torch.int32), order.to(torch.int32)


@dataclass(frozen=True)
class FlexAttention:
    """The plan of a pack for one kernel: `tokens` [Q] ask, all of the row answer. Masks are made once per window; `bunches` is what stands in where the kernel does not serve."""

    segments: Segments
    tokens: Tensor
    last: bool
    masks: dict[int | None, BlockMask] = field(default_factory=dict, repr=False, compare=False)
    bunches: list[PackedAttention] = field(default_factory=list, repr=False, compare=False)

    @staticmethod
    def of(segments: Segments) -> FlexAttention:
        """The plan in which every token asks."""
        return FlexAttention(segments, torch.arange(int(segments.length.sum()), device=segments.length.device), last=False)

    @staticmethod
    def closing(segments: Segments) -> tuple[FlexAttention, Tensor]:
        """The plan of a last layer, and the tokens that ask: those of `PackedAttention.closing`."""
        tokens = asking(segments)
        return FlexAttention(segments, tokens, last=True), tokens

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
        """Attention of one layer in row order: query [1, heads, Q, width], key and value [1, kv_heads, T, width] → [1, Q, heads, width]."""
        given = query.device.type
        dtype = torch.get_autocast_dtype(given) if torch.is_autocast_enabled(given) and query.dtype != torch.float64 else query.dtype
        q, k, v = (x.to(dtype) for x in (query, key, value))
        if not verdict(q, k, v, softcap, sinks):
            try:
                return self._in_one(q, k, v, scaling, window, softcap, sinks)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # a kernel that cannot be compiled for this length
                _refuse(_name(q, k, v, softcap, sinks), error)
        if not self.bunches:
            self.bunches.append(PackedAttention.closing(self.segments)[0] if self.last else PackedAttention.of(self.segments))
        return self.bunches[0].attend(query, key, value, layer=layer, scaling=scaling, window=window, softcap=softcap, sinks=sinks)

    def _in_one(
        self, q: Tensor, k: Tensor, v: Tensor, scaling: float, window: int | None, softcap: float | None, sinks: Tensor | None
    ) -> Tensor:
        """The kernel on the row, padded to whole blocks."""
        asked, keys = _whole(q.shape[2]), _whole(k.shape[2])
        if window not in self.masks:
            self.masks[window] = Spans.of(self.segments, self.tokens, window).padded(asked).mask(keys)
        q, k, v = (x if x.shape[2] == n else F.pad(x, (0, 0, 0, n - x.shape[2])) for x, n in ((q, asked), (k, keys), (v, keys)))
        cap = None if softcap is None else torch.tensor(softcap, dtype=torch.float32, device=q.device)
        with torch.autocast(q.device.type, enabled=False):
            out = kernel(q, k, v, self.masks[window], scaling, cap, sinks)
        return out[:, :, : len(self.tokens)].transpose(1, 2)


def _whole(length: int) -> int:
    return max(LEAST, -(-length // BLOCK) * BLOCK)


def kernel(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, scaling: float, cap: Tensor | None, sinks: Tensor | None) -> Tensor:
    """One call for a whole row: compiled, once for all lengths, on CUDA; elsewhere from plain operations."""
    if q.device.type != "cuda":
        return _flex(q, k, v, mask, scaling, cap, sinks)
    with torch._dynamo.config.patch(specialize_float=True, recompile_limit=64):
        return _compiled()(q, k, v, mask, scaling, cap, sinks)  # type: ignore[no-any-return]


def _flex(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, scaling: float, cap: Tensor | None, sinks: Tensor | None) -> Tensor:
    """A sink is a score of a key without value: out · sigmoid(log Σ exp of the scores - sink)."""

    def capped(score: Tensor, _batch: Tensor, _head: Tensor, _query: Tensor, _key: Tensor) -> Tensor:
        return cap * torch.tanh(score / cap)  # type: ignore[operator]

    found: Any = flex_attention(
        q, k, v, score_mod=None if cap is None else capped, block_mask=mask, scale=scaling, enable_gqa=q.shape[1] != k.shape[1],
        return_aux=None if sinks is None else AuxRequest(lse=True),
    )  # fmt: skip
    if sinks is None:
        return found  # type: ignore[no-any-return]
    out, aux = found
    return (out * torch.sigmoid(aux.lse - sinks[:, None])[..., None]).to(v.dtype)  # type: ignore[no-any-return]


@cache
def _compiled() -> Any:
    return torch.compile(_flex, dynamic=True, fullgraph=True)


# --- the self-check -------------------------------------------------------------------------------------------------------


def verdict(q: Tensor, k: Tensor, v: Tensor, softcap: float | None, sinks: Tensor | None) -> str:
    """Why queries, keys and values of this kind go the other way; empty where the kernel serves. A kind is tried once: forward and gradient on small packs."""
    if q.dtype not in TOLERANCE or q.shape[3] not in WIDTHS or v.shape[3] not in WIDTHS:
        return f"{str(q.dtype).removeprefix('torch.')} heads of width {q.shape[3]}"
    name = _name(q, k, v, softcap, sinks)
    if name not in _judged:
        _judged[name] = ""  # the trial itself comes by here
        try:
            with ThreadPoolExecutor(1) as fresh:  # no autocast, no inference mode and no hooks of checkpointing are on there
                far = fresh.submit(disagreement, q, k, v, softcap, sinks).result()
            if not far <= TOLERANCE[q.dtype]:
                _refuse(name, f"its results differ by {far:.1e}")
        except Exception as error:
            _refuse(name, error)
    return _judged[name]


def told(lm: PreTrainedModel, device: torch.device, dtype: torch.dtype) -> str:
    """How this model's packs are attended to on the device in this dtype, for the first lines of a run; tried where it has not been."""
    config, width = compat.text_config(lm), head_width(lm)
    kv_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    q, k = (torch.empty(1, heads, 1, width, device=device, dtype=dtype) for heads in (config.num_attention_heads, kv_heads))
    why = verdict(q, k, k, None, None)
    return f"attention  {f'padded bunches; FlexAttention is not used: {why}' if why else 'FlexAttention, one kernel a row'}"


def _name(q: Tensor, k: Tensor, v: Tensor, softcap: float | None, sinks: Tensor | None) -> tuple[object, ...]:
    return (q.device.type, q.dtype, q.shape[1], k.shape[1], q.shape[3], v.shape[3], softcap is None, sinks is None)


def _refuse(name: tuple[object, ...], why: object) -> None:
    """Not used any more for this kind; said once, where warnings go."""
    lines = str(why).splitlines()
    _judged[name] = lines[0][:200] if lines else type(why).__name__
    warnings.warn(f"FlexAttention is not used for {name[1]} heads of width {name[4]}: {_judged[name]}", stacklevel=2)


def disagreement(q: Tensor, k: Tensor, v: Tensor, softcap: float | None, sinks: Tensor | None) -> float:
    """The largest difference from padded bunches, of outputs and gradients, as a share of the largest entry of each: two packs of unlike lengths, with and without a window, every token asking and in a last layer."""
    worst = 0.0
    for scale, window in ((1, None), (40, None), (40, 70)):
        segments = Segments(*(torch.tensor(x, device=q.device) for x in _forest(scale)))
        generator = torch.Generator().manual_seed(scale)

        def draw(heads: int, width: int, generator: torch.Generator = generator, scale: int = scale) -> Tensor:
            return torch.randn(1, heads, 21 * scale, width, generator=generator).to(q.device, q.dtype).requires_grad_()

        given = [draw(q.shape[1], q.shape[3]), draw(k.shape[1], k.shape[3]), draw(k.shape[1], v.shape[3])]
        given += [] if sinks is None else [torch.linspace(-1, 1, len(sinks), device=q.device, dtype=sinks.dtype).requires_grad_()]
        for last in (False, True):
            plan = FlexAttention.closing(segments)[0] if last else FlexAttention.of(segments)
            other = PackedAttention.closing(segments)[0] if last else PackedAttention.of(segments)
            scaling, sink = q.shape[3] ** -0.5, None if sinks is None else given[3]
            one, two = (
                attend(given[0][:, :, plan.tokens], given[1], given[2], scaling=scaling, window=window, softcap=softcap, sinks=sink)
                for attend in (plan._in_one, partial(other.attend, layer=0))
            )
            along = torch.randn(two.shape, generator=generator).to(q.device, q.dtype)
            slopes = zip(*(torch.autograd.grad(x, given, along) for x in (one, two)), strict=True)
            for a, b in [(one.detach(), two.detach()), *slopes]:
                far = float((a.float() - b.float()).abs().max() / b.float().abs().max())
                worst = max(worst, far if far == far else float("inf"))
    return worst


def _forest(scale: int) -> tuple[list[int], list[int], list[int]]:
    """Starts, lengths and parents: two prompts with answers, one alone; one answer of a single token at scale 1."""
    return [x * scale for x in (0, 4, 7, 8, 13, 15)], [x * scale for x in (4, 3, 1, 5, 2, 6)], [-1, 0, 0, -1, -1, 4]
