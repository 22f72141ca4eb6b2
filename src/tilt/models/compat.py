"""Every call whose shape depends on the transformers version: configs, weights, tokenizers, templates, attention implementations."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel
from transformers import logging as transformers_logging

from tilt.models.attention import NAME, Attend

SAFE: Mapping[str, Any] = {"use_safetensors": True, "trust_remote_code": False}
"""No pickle is read, and no code of a checkpoint is run."""


def quiet() -> None:
    """No progress bars and no advice from transformers while weights are read and written."""
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()


def config_for(kind: str, **settings: Any) -> Any:
    """The configuration of an architecture by its model type ("qwen3", "llama", "gpt2", …)."""
    return AutoConfig.for_model(kind, **settings)


def causal_lm_from_config(config: Any) -> PreTrainedModel:
    """A causal LM with random weights, float32."""
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def classifier_from_config(config: Any, dtype: torch.dtype) -> PreTrainedModel:
    """A sequence classifier with random weights."""
    return AutoModelForSequenceClassification.from_config(config, dtype=dtype)


def read_causal_lm(model: str, dtype: torch.dtype) -> tuple[PreTrainedModel, list[str]]:
    """A causal LM from a folder or hub name in this dtype (never the checkpoint's), and the names of weights that the files lack."""
    lm, info = AutoModelForCausalLM.from_pretrained(model, dtype=dtype, output_loading_info=True, **SAFE)
    return lm, sorted(info["missing_keys"]) + sorted(str(k) for k in info.get("mismatched_keys", ()))


def read_classifier(model: str, dtype: torch.dtype) -> tuple[PreTrainedModel, list[str]]:
    """A sequence classifier with one label from a folder or hub name, and the names of weights that the files lack."""
    classifier, info = AutoModelForSequenceClassification.from_pretrained(
        model, dtype=dtype, num_labels=1, output_loading_info=True, **SAFE
    )
    return classifier, sorted(info["missing_keys"]) + sorted(str(k) for k in info.get("mismatched_keys", ()))


def read_tokenizer(model: str) -> Any:
    return AutoTokenizer.from_pretrained(model, trust_remote_code=False)


def read_config(model: str) -> Any:
    return AutoConfig.from_pretrained(model, trust_remote_code=False)


def size_of(model: str) -> int | None:
    """How many numbers the configuration of a causal LM or a classifier describes, without allocating them; None where it describes no model at all."""
    config = read_config(model)
    kinds = [AutoModelForCausalLM, AutoModelForSequenceClassification]
    if any("SequenceClassification" in str(name) for name in getattr(config, "architectures", None) or ()):
        kinds.reverse()
    for kind in kinds:
        if type(config) in kind._model_mapping:
            with torch.device("meta"):
                return sum(p.numel() for p in kind.from_config(config).parameters())
    return None


def render_chat(tokenizer: Any, messages: Sequence[Mapping[str, Any]], *, answer_next: bool) -> list[int]:
    """Token ids of a conversation under the tokenizer's template; `answer_next` appends the opening of the assistant's turn. (transformers 5 returns a mapping unless told.)"""
    ids = tokenizer.apply_chat_template(list(messages), tokenize=True, add_generation_prompt=answer_next, return_dict=False)
    return [int(i) for i in ids]


def text_config(model: PreTrainedModel) -> Any:
    """The configuration of the language part."""
    return model.config.get_text_config()


def context_of(model: PreTrainedModel) -> int:
    """The most tokens of prompt and answer together; without a stated limit 2^31."""
    return int(getattr(text_config(model), "max_position_embeddings", None) or 2**31)


def use_attention(model: PreTrainedModel, implementation: str) -> None:
    model.set_attn_implementation(implementation)


def attention_of(model: PreTrainedModel) -> str:
    return str(model.config._attn_implementation)


def is_packed(model: PreTrainedModel) -> bool:
    """Whether this model runs packed rows through Tilt's attention; otherwise padded batches."""
    return attention_of(model) == NAME


def body_of(model: PreTrainedModel) -> PreTrainedModel:
    """The model without its head: embeddings to last hidden states."""
    return model.base_model


def head_of(lm: PreTrainedModel) -> Any:
    """The layer from hidden states to vocabulary scores; None for a classifier."""
    return lm.get_output_embeddings()


def run_packed(body: nn.Module, tokens: Tensor, positions: Tensor, layout: Attend) -> Tensor:
    """Last hidden states [T, D] of one row; `layout` decides who sees whom. No cache and no mask."""
    return body(input_ids=tokens[None], position_ids=positions[None], use_cache=False, layout=layout).last_hidden_state[0]


def run_padded(body: nn.Module, tokens: Tensor, mask: Tensor) -> Tensor:
    """Last hidden states [S, L, D] of a right-padded batch; positions are passed wherever the architecture takes them."""
    takes = inspect.signature(body.forward).parameters
    extra = {"attention_mask": mask} if "attention_mask" in takes else {}
    if "position_ids" in takes:
        extra["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
    return body(input_ids=tokens, use_cache=False, **extra).last_hidden_state


def write_config(model: PreTrainedModel, path: Path) -> None:
    model.config.save_pretrained(path)


def dtype_of(model: nn.Module) -> torch.dtype:
    return next(p.dtype for p in model.parameters() if p.is_floating_point())


def device_of(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def chunked_attention(model: PreTrainedModel) -> bool:
    """Whether attention is cut into chunks by masks alone (Llama 4), which short texts cannot show."""
    return bool(getattr(text_config(model), "attention_chunk_size", None))


def score_of(classifier: PreTrainedModel) -> nn.Linear:
    """The score layer of a sequence classifier: hidden states to one number, without bias."""
    return classifier.score


def adopt(model: PreTrainedModel, source: PreTrainedModel) -> PreTrainedModel:
    """Run `model` as `source` runs: packed or padded, with the same note."""
    use_attention(model, attention_of(source))
    if hasattr(source, "tilt_note"):
        model.tilt_note = source.tilt_note
    return model


def write(model: PreTrainedModel, tokenizer: Any, path: Path, weights: dict[str, Tensor] | None) -> None:
    """A folder that plain from_pretrained opens. Special ids follow the tokenizer; padding is left unset rather than equal to the end token.

    The model itself is only read: with `weights` of their own this may run in a thread while the model is trained.
    """
    twin = copy.copy(model)
    twin.config, twin.generation_config = copy.deepcopy(model.config), copy.deepcopy(getattr(model, "generation_config", None))
    twin.config._attn_implementation = "eager"
    ends = tokenizer.eos_token_id
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id != ends else None
    for settings in [s for s in (text_config(twin), twin.generation_config) if s is not None]:
        settings.bos_token_id = tokenizer.bos_token_id
        if settings.eos_token_id is None:
            settings.eos_token_id = ends
        if settings is twin.generation_config or padding is not None:
            settings.pad_token_id = padding
    twin.save_pretrained(path, state_dict=weights)
    tokenizer.save_pretrained(path)


def without_dropout(model: PreTrainedModel) -> PreTrainedModel:
    """Every dropout, layer drop and router jitter of the modules set to zero (the configuration keeps them): a policy is scored as it is sampled."""
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        for name, value in vars(module).items():
            if isinstance(value, float) and any(word in name for word in ("dropout", "pdrop", "layerdrop", "jitter")):
                setattr(module, name, 0.0)
    return model


def recompute_activations(model: PreTrainedModel) -> None:
    """Recompute each layer in the backward pass instead of keeping its activations; it applies in train mode."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable()
