"""The arithmetic and the reading that a decoder cannot avoid: floating-point operations of a pass over a pack, bytes that decoding reads."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn
from transformers import PreTrainedModel

from tilt.data.packing import Pack
from tilt.models import compat


def pass_flops(lm: PreTrainedModel, pack: Pack, *, backward: bool, head: bool = True) -> float:
    """Operations of a forward pass, with `backward` also of its gradients: 2 a weight and token, twice that again backwards (once where the weight is frozen);
    4 · width a pair of tokens that see each other, a head and layer; the vocabulary on actions alone. Nothing is counted twice for being computed twice."""
    config = compat.text_config(lm)
    weights = sum(w.numel() * _times(w, backward) for w in matrices(compat.body_of(lm)))
    width = config.num_hidden_layers * config.num_attention_heads * head_width(lm)
    vocabulary = compat.head_of(lm).weight if head else None
    over_actions = 0 if vocabulary is None else 2 * vocabulary.numel() * _times(vocabulary, backward) * len(pack.actions)
    return 2.0 * weights * len(pack.tokens) + 4.0 * width * pairs(pack) * (3 if backward else 1) + over_actions


def _times(weight: Tensor, backward: bool) -> int:
    return 1 + (1 + weight.requires_grad if backward else 0)


def pairs(pack: Pack) -> int:
    """Pairs of a token and one that it sees, itself included: a run of 3 after a prompt of 5 → 3 · 5 + 1 + 2 + 3; a sliding window is not looked at."""
    length, parent = pack.segments.length, pack.segments.parent
    before = length[parent.clamp(min=0)] * (parent >= 0)
    return int((length * before + length * (length + 1) // 2).sum())


def decode_bytes(lm: PreTrainedModel, prompts: int, prompt: int, samples: int, new: int, slots: int) -> float:
    """Bytes read to sample `new` tokens of each answer, the first from the prompt's pass: every weight once a step of at most `slots` answers,
    a prompt's keys and values once a step for all its answers, an answer's own once a step."""
    answers, size, token = prompts * samples, compat.dtype_of(lm).itemsize, cached_bytes(lm)
    weights = (sum(w.numel() for w in matrices(compat.body_of(lm))) + compat.head_of(lm).weight.numel()) * size
    waves = -(-answers // slots)
    return float((new - 1) * (waves * weights + prompts * prompt * token) + answers * token * (new - 1) * new // 2)


def cached_bytes(lm: PreTrainedModel) -> int:
    """Bytes of a token's keys and values in every layer."""
    config = compat.text_config(lm)
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return int(2 * config.num_hidden_layers * heads * head_width(lm) * compat.dtype_of(lm).itemsize)


def head_width(lm: PreTrainedModel) -> int:
    """Width of one attention head."""
    config = compat.text_config(lm)
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def matrices(body: nn.Module) -> Iterator[Tensor]:
    """The weights that multiply every token: matrices, tables of embeddings left out."""
    tables = {id(module.weight) for module in body.modules() if isinstance(module, nn.Embedding)}
    return (p for p in body.parameters() if p.dim() == 2 and id(p) not in tables)
