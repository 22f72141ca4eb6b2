"""Which models are the common decoder (Llama, Qwen2, Qwen3, Mistral, Gemma 3), told by their modules: exact classes, exact parts, nothing hooked or replaced."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tilt.models.projection import is_adapted, is_projection

BODIES = {"LlamaModel": "Llama", "Qwen2Model": "Qwen2", "Qwen3Model": "Qwen3", "MistralModel": "Mistral", "Gemma3TextModel": "Gemma3"}
ANGLES = frozenset({"default", "linear", "llama3", "yarn"})  # kinds of rotary angles that depend on the position alone
PROJECTIONS = frozenset({"q_proj", "k_proj", "v_proj", "o_proj"})
NORMS = frozenset({"input_layernorm", "post_attention_layernorm"})
SANDWICH = NORMS | {"pre_feedforward_layernorm", "post_feedforward_layernorm"}
SETTINGS = frozenset(
    {"training", "config", "layer_idx", "layer_type", "head_dim", "num_key_value_groups", "scaling", "attention_dropout", "is_causal", "sliding_window", "is_sliding", "attn_logit_softcapping", "hidden_size"}
)  # fmt: skip
"""What attention layers and blocks of these classes say about themselves; one that says more is not known here. (Gemma 3 states a softcap and does not apply it.)"""


def is_common(body: PreTrainedModel) -> bool:
    """Whether a decoder's weights say all that its modules compute, LoRA of the plain kind included. Quantised or sharded weights, hooks and unknown attributes: no."""
    family = BODIES.get(type(body).__name__)
    if family is None or not type(body).__module__.startswith("transformers.models."):
        return False
    adapted = {id(part) for module in body.modules() if is_adapted(module) for part in module.modules()}
    names = {type(m).__name__ for m in body.modules() if id(m) not in adapted and not is_activation(m)}
    embedding = "Gemma3TextScaledWordEmbedding" if family == "Gemma3" else "Embedding"
    known = {f"{family}{part}" for part in ("DecoderLayer", "Attention", "MLP", "RMSNorm", "RotaryEmbedding")}
    return (
        names <= known | {type(body).__name__, "Linear", "ModuleList", embedding}
        and _parts(body) == {"embed_tokens", "layers", "norm", "rotary_emb"}
        and all(_plain(module) for module in body.modules())
        and len({p.dtype for p in body.parameters()}) == 1
        and all(type(p.data) is Tensor and p.is_floating_point() for p in body.parameters())
        and _turns(body)
        and len(body.layers) == body.config.num_hidden_layers
        and all(_block(block, family) for block in body.layers)
    )


def is_activation(module: nn.Module) -> bool:
    """Whether this is a function of each number alone, with nothing to learn: what stands at `mlp.act_fn`."""
    home = type(module).__module__
    return home in ("torch.nn.modules.activation", "transformers.activations") and not list(module.parameters())


def window_of(block: Any) -> int | None:
    """How many of the latest positions this layer sees, the own one included; None for all."""
    attention = block.self_attn
    window = (
        attention.config.sliding_window if type(attention).__name__ == "MistralAttention" else getattr(attention, "sliding_window", None)
    )
    return None if window is None else int(window)


def gain_of(norm: Any, weight: Tensor) -> Tensor:
    """What a norm multiplies by, from its weight: in Gemma one more than that."""
    return weight + 1.0 if type(norm).__name__.startswith("Gemma") else weight


def epsilon_of(norm: Any) -> float:
    """What a norm adds to the mean square."""
    return float(norm.eps if hasattr(norm, "eps") else norm.variance_epsilon)


def kinds_of(body: Any) -> list[str | None]:
    """The kinds of layers that have angles of their own; None where all have the same."""
    kinds = body.rotary_emb.rope_type
    return list(kinds) if isinstance(kinds, dict) else [None]


def angles_of(body: Any, like: Tensor, positions: Tensor, kind: str | None) -> tuple[Tensor, Tensor]:
    """Cosines and signed sines [T, width] by the model's own rotary module, in the dtype of `like` [1, 1].

    A turned head is x · cos + (x rolled by half its width) · sin, the first half of sin negated.
    """
    cos, sin = (x[0] for x in body.rotary_emb(like, positions[None], *([] if kind is None else [kind])))
    half = sin.shape[1] // 2
    return cos, torch.cat((-sin[:, :half], sin[:, half:]), 1)


def _parts(module: nn.Module) -> set[str]:
    return {name for name, _ in module.named_children()}


def _plain(module: nn.Module) -> bool:
    """Neither hooked nor replaced on the instance."""
    hooks = (module._forward_hooks, module._forward_pre_hooks)
    return not any(hooks) and "forward" not in vars(module)


def _turns(body: Any) -> bool:
    """Whether every head's whole width is turned, by angles that depend on the position alone."""
    kinds = body.rotary_emb.rope_type
    named = set(kinds.values()) if isinstance(kinds, dict) else {kinds}
    frequencies = [b for name, b in body.rotary_emb.named_buffers() if name.endswith("inv_freq")]
    return named <= ANGLES and all(2 * len(f) == block.self_attn.head_dim for f in frequencies for block in body.layers)


def _block(block: Any, family: str) -> bool:
    attention, inner = block.self_attn, block.mlp
    normed = {"q_norm", "k_norm"} if family in ("Qwen3", "Gemma3") else set()
    said = {k for m in (attention, block) for k in vars(m) if not k.startswith("_")}
    return (
        _parts(block) == {"self_attn", "mlp"} | (SANDWICH if family == "Gemma3" else NORMS)
        and _parts(attention) == PROJECTIONS | normed
        and _parts(inner) == {"gate_proj", "up_proj", "down_proj", "act_fn"}
        and is_activation(inner.act_fn)
        and all(is_projection(layer) for holder in (attention, inner) for name, layer in holder.named_children() if name.endswith("_proj"))
        and said <= SETTINGS
        and attention.is_causal is True
        and all(
            m.weight.dtype == torch.float32 or m.weight.dtype == inner.up_proj.weight.dtype
            for m in block.children()
            if hasattr(m, "weight")
        )
    )
