"""Models from checkpoints, hub names and configurations: dropout off, packed attention on wherever it is exact."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from tilt.errors import UsageError
from tilt.models import compat
from tilt.models.agreement import note, settle

__all__ = ["build", "load", "note", "tiny"]


def load(model: str | Path, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> tuple[PreTrainedModel, Any]:
    """A causal LM and its tokenizer from a folder or a hub name (from the local cache when offline)."""
    compat.quiet()
    name = located(model)
    lm, lacking = reading(name, lambda: compat.read_causal_lm(name, dtype))
    if lacking:
        raise UsageError(
            f"model {name}: the checkpoint lacks weights of a causal LM: {_some(lacking)}.\nIs it a classifier or an encoder? Give a causal language model."
        )
    tokenizer = reading(name, lambda: compat.read_tokenizer(name))
    rows = lm.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        raise UsageError(
            f"model {name}: the tokenizer has {len(tokenizer)} tokens but the embedding only {rows} rows.\nSave the model again after resize_token_embeddings(len(tokenizer))."
        )
    separate_padding(tokenizer, rows)
    return ready(lm.to(device)), tokenizer


def build(config: Any, *, seed: int = 0) -> PreTrainedModel:
    """A causal LM with random weights from a transformers configuration; the seed fixes them and leaves the global generator alone."""
    compat.quiet()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        lm = compat.causal_lm_from_config(config)
    return ready(lm)


def tiny(
    kind: str = "qwen3",
    *,
    vocabulary: int,
    width: int = 128,
    layers: int = 4,
    heads: int = 4,
    context: int = 512,
    seed: int = 0,
    **settings: Any,
) -> PreTrainedModel:
    """A small causal LM with random weights: grouped key heads (two questions to one key), feed-forward 4 × width; `settings` go to the configuration."""
    shape = {
        "vocab_size": vocabulary, "hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads,
        "max_position_embeddings": context, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
    }  # fmt: skip
    if kind != "gpt2":
        shape |= {"intermediate_size": 4 * width, "num_key_value_heads": max(1, heads // 2), "head_dim": width // heads}
    try:
        config = compat.config_for(kind, **(shape | settings))
    except ValueError as error:
        raise UsageError(
            f"model kind {kind!r}: {_first_line(error)}\nUse a transformers model type, such as qwen3, llama or gpt2."
        ) from error
    return build(config, seed=seed)


def ready(lm: PreTrainedModel) -> PreTrainedModel:
    """Dropout off, packed attention where it is exact."""
    without_dropout(lm).eval()
    settle(lm)
    return lm


def without_dropout(model: PreTrainedModel) -> PreTrainedModel:
    """Every dropout, layer drop and router jitter of the modules set to zero (the configuration keeps them): a policy is scored as it is sampled."""
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        for name, value in vars(module).items():
            if isinstance(value, float) and any(word in name for word in ("dropout", "pdrop", "layerdrop", "jitter")):
                setattr(module, name, 0.0)
    return model


def separate_padding(tokenizer: Any, rows: int) -> None:
    """Give the tokenizer a padding token that is not the end token: its unknown token, another special one, or an unused embedding row; none where there is no room.

    Tilt never pads what it trains on; what it saves must not confuse padding with the end.
    """
    if tokenizer.pad_token_id is not None and tokenizer.pad_token_id != tokenizer.eos_token_id:
        return
    taken = {tokenizer.eos_token_id, tokenizer.bos_token_id}
    special = [i for i in [tokenizer.unk_token_id, *tokenizer.all_special_ids, *sorted(tokenizer.added_tokens_decoder)] if i is not None]
    for i in special:
        if i not in taken:
            tokenizer.pad_token = tokenizer.convert_ids_to_tokens(i)
            return
    if len(tokenizer) < rows:
        tokenizer.add_special_tokens({"pad_token": "<|pad|>"})
        return
    tokenizer.pad_token = None


def located(model: str | Path) -> str:
    """The folder's path or the hub's name; a path that does not exist, or a folder without config.json, is refused."""
    path = Path(model).expanduser()
    if path.is_dir():
        if not (path / "config.json").exists():
            raise UsageError(
                f"model {path}: the folder has no config.json.\nGive a folder written by save_pretrained, with config.json, weights and tokenizer."
            )
        return str(path)
    text = str(model)
    if path.exists() or text.startswith((".", "/", "~")) or text.count("/") > 1:
        raise UsageError(f"model {text}: there is no such folder.\nGive an existing folder or a hub name like Qwen/Qwen3-0.6B.")
    return text


def reading(name: str, read: Any) -> Any:
    """What `read` returns; a failure becomes a short error that says where the model was looked for."""
    try:
        return read()
    except (OSError, ValueError, RuntimeError, KeyError, ImportError) as error:
        if Path(name).is_dir():
            raise UsageError(
                f"model {name}: cannot be read: {_first_line(error)}\nWrite it again with save_pretrained, or name another folder."
            ) from error
        raise UsageError(
            f"model {name}: neither a folder here nor found in the hub's local cache: {_first_line(error)}\n"
            "Check the name; offline, download it first on a machine with network, or give a folder."
        ) from error


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]
