"""What Tilt writes is an ordinary Hugging Face folder; a fingerprint tells whether weights ever changed."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from tilt.models import compat
from tilt.models.adapters import has_adapters, merged_state


def save(model: PreTrainedModel, tokenizer: Any, path: str | Path) -> None:
    """Weights (active adapters merged in), config.json, generation_config.json and tokenizer: opens with plain from_pretrained and gives the same logits."""
    compat.write(model, tokenizer, Path(path), merged_state(model) if has_adapters(model) else None)


def fingerprint(module: nn.Module) -> str:
    """SHA-256 of every parameter and buffer with its name, shape and dtype: equal before and after means that nothing changed."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes() if tensor.numel() else b"")
    return digest.hexdigest()
