"""What Tilt writes is an ordinary Hugging Face folder; a fingerprint tells whether weights ever changed."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tilt.errors import UsageError
from tilt.models import compat
from tilt.models.adapters import has_adapters, merged_state


def save(model: PreTrainedModel, tokenizer: Any, path: str | Path) -> None:
    """Weights (active adapters merged in), config.json, generation_config.json and tokenizer: opens with plain from_pretrained and gives the same logits."""
    check_tokenizer(model, tokenizer)
    compat.write(model, tokenizer, Path(path), merged_state(model) if has_adapters(model) else None)


def snapshot(model: PreTrainedModel, tokenizer: Any) -> Callable[[Path], None]:
    """The same in two halves: the weights are copied now, and what is returned writes the copy, in a thread if need be; tied weights stay tied."""
    state = merged_state(model) if has_adapters(model) else model.state_dict()
    copies = copied(state)
    return lambda path: compat.write(model, tokenizer, path, dict(copies))


def copied(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies in CPU memory; names that share one tensor share one copy."""
    made: dict[tuple[int, torch.Size], Tensor] = {}
    return {name: made.setdefault((t.data_ptr(), t.shape), t.detach().to("cpu", copy=True).contiguous()) for name, t in tensors.items()}


def check_tokenizer(model: PreTrainedModel, tokenizer: Any) -> None:
    """Refuse a tokenizer that AutoTokenizer would open as something else beside this model.

    For some model types (qwen2, phi3, …) transformers ignores the class that the folder names: words would silently become other tokens.
    """
    with tempfile.TemporaryDirectory() as folder:
        compat.write_config(model, Path(folder))
        tokenizer.save_pretrained(folder)
        opened = compat.read_tokenizer(folder)
    probes = [" ".join(sorted(tokenizer.get_vocab())[:200]), "Hello, world 12+34=46\nThe end."]
    if opened.get_vocab() != tokenizer.get_vocab() or any(opened(p)["input_ids"] != tokenizer(p)["input_ids"] for p in probes):
        raise UsageError(
            f"a {model.config.model_type} model with this tokenizer cannot be saved: AutoTokenizer opens it as {type(opened).__name__}, which reads text differently.\n"
            "Choose another model kind (qwen3, llama, gpt2), or the tokenizer of that family."
        )


def fingerprint(module: nn.Module) -> str:
    """SHA-256 of every parameter and buffer with its name, shape and dtype: equal before and after means that nothing changed."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes() if tensor.numel() else b"")
    return digest.hexdigest()
