"""Small decoders of every kind that is computed straight from its weights, and norms that do not round."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from tilt.models import compat

BASE: dict[str, Any] = {
    "vocab_size": 29, "hidden_size": 24, "intermediate_size": 20, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 8, "max_position_embeddings": 700, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
}  # fmt: skip
MIXED = ["sliding_attention", "full_attention", "sliding_attention"]
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3": ("qwen3", {}),
    "qwen3 tied, one key head": ("qwen3", {"tie_word_embeddings": True, "num_key_value_heads": 1}),
    "qwen3 with biases": ("qwen3", {"attention_bias": True}),
    "qwen3 with windows": ("qwen3", {"use_sliding_window": True, "sliding_window": 3, "layer_types": MIXED}),
    "qwen2": ("qwen2", {}),
    "qwen2 with windows": ("qwen2", {"use_sliding_window": True, "sliding_window": 4, "layer_types": MIXED}),
    "llama": ("llama", {"num_key_value_heads": 4, "rms_norm_eps": 1e-3}),
    "llama with every bias": ("llama", {"attention_bias": True, "mlp_bias": True, "hidden_act": "gelu"}),
    "llama 3 angles": ("llama", {"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}}),
    "yarn angles": ("llama", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}}),
    "mistral": ("mistral", {"sliding_window": 3}),
    "mistral without window": ("mistral", {"sliding_window": None}),
    "gemma3": ("gemma3_text", {"sliding_window": 4, "layer_types": MIXED, "query_pre_attn_scalar": 5, "final_logit_softcapping": 2.0, "attention_bias": True}),
}  # fmt: skip


def build(name: str, dtype: torch.dtype = torch.float64) -> PreTrainedModel:
    kind, settings = KINDS.get(name, (name, {}))
    torch.manual_seed(0)
    lm = compat.causal_lm_from_config(compat.config_for(kind, **(BASE | settings))).to(dtype)
    with torch.no_grad():
        for parameter in lm.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    compat.use_attention(lm, "tilt")
    return lm.eval()


@pytest.fixture
def exact_norms(monkeypatch: pytest.MonkeyPatch) -> None:
    """The modules' norms in the weights' dtype: as they are, they round to float32 even in a float64 model."""
    from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
    from transformers.models.llama.modeling_llama import LlamaRMSNorm
    from transformers.models.mistral.modeling_mistral import MistralRMSNorm
    from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm
    from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

    def plain(self: Any, x: Tensor) -> Tensor:
        return self.weight * x / (x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon).sqrt()

    def gemma(self: Any, x: Tensor) -> Tensor:
        return (1.0 + self.weight) * x / (x.pow(2).mean(-1, keepdim=True) + self.eps).sqrt()

    for norm in (LlamaRMSNorm, MistralRMSNorm, Qwen2RMSNorm, Qwen3RMSNorm):
        monkeypatch.setattr(norm, "forward", plain)
    monkeypatch.setattr(Gemma3RMSNorm, "forward", gemma)
