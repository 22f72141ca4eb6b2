"""A checkpoint's folder is input like any other: nothing in it is unpickled, run, fetched or read outside of it, and nothing is allocated that does not fit."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from tilt.errors import UsageError
from tilt.models import compat

PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.pickle")
MOST_LAYERS = 4096
MOST_JSON = 50_000_000
SPARE = 2**28
"""Numbers that a configuration may describe beyond twice those that its files hold, before it is refused unread."""


def check_checkpoint(folder: Path) -> None:
    """Refuse a model's folder that holds pickles only, names files outside of itself, or describes what its files do not hold or the memory cannot."""
    config = read_object(folder / "config.json", "model")
    named = config.get("transformers_weights")
    if named is not None and not (isinstance(named, str) and named.endswith((".safetensors", ".safetensors.index.json"))):
        raise UsageError(f"model {folder}: config.json names the weights {named!r}: only safetensors are read")
    if config.get("auto_map"):
        raise UsageError(
            f"model {folder}: it brings Python code of its own (auto_map in config.json), and Tilt runs no code of a checkpoint"
        )
    for key, value in _entries(config):
        if key.endswith("attn_implementation") and "/" in str(value):
            raise UsageError(f"model {folder}: config.json wants the kernel {value!r} of a hub, and Tilt runs no code of a checkpoint")
        if (
            any(word in key for word in ("layer", "expert", "block"))
            and type(value) in (int, float)
            and value > MOST_LAYERS
            and _counts(key)
        ):
            raise UsageError(f"model {folder}: config.json asks for {key} = {value:,}; at most {MOST_LAYERS:,} are built")
    files = weights(folder, "model", "model")
    _check_size(folder, config, files)


def check_adapter(folder: Path) -> None:
    """Refuse an adapter's folder that holds pickles only, is no LoRA, or asks for a greater rank than its weights have."""
    config = read_object(folder / "adapter_config.json", "adapter")
    if str(config.get("peft_type", "LORA")).upper() != "LORA":
        raise UsageError(f"adapter {folder}: adapter_config.json is of type {config['peft_type']!r}; only LORA can be merged")
    found = [
        shape
        for file in weights(folder, "adapter", "adapter_model")
        for name, shape in shapes(file)
        if "lora_A" in name or "lora_embedding_A" in name
    ]
    most = max((shape[0] for shape in found if shape), default=0)
    patterns = config.get("rank_pattern") or {}
    ranks = [config.get("r", 8), *(patterns.values() if isinstance(patterns, Mapping) else [patterns])]
    if odd := next((rank for rank in ranks if type(rank) is not int or not 0 < rank <= most), None):
        raise UsageError(f"adapter {folder}: adapter_config.json has the rank {odd!r}, and its weights have at most {most}")


def weights(folder: Path, what: str, stem: str) -> list[Path]:
    """The safetensors files of a folder, every name of an index a file within it; a folder with pickles alone is refused."""
    index = folder / f"{stem}.safetensors.index.json"
    whole = folder / f"{stem}.safetensors"
    if not index.exists() or whole.exists():
        files = [whole] if whole.exists() else sorted(folder.glob("*.safetensors"))
        pickles = [file.name for pattern in PICKLES for file in folder.glob(pattern) if file.name != "training_args.bin"]
        if not files and pickles:
            raise UsageError(
                f"{what} {folder}: its weights are pickled ({', '.join(sorted(pickles)[:3])}): reading a pickle runs whatever code it holds, so Tilt does not.\n"
                "If you trust it, convert it once: python -c \"from transformers import AutoModelForCausalLM as M; M.from_pretrained('FOLDER').save_pretrained('NEW')\""
            )
        return files
    mapped = read_object(index, what).get("weight_map")
    if not isinstance(mapped, Mapping) or not all(isinstance(name, str) for name in mapped.values()):
        raise UsageError(
            f"{what} {folder}: {index.name} has no weight_map of {{weight: file}}.\nWrite the folder again with save_pretrained."
        )
    for name in sorted(set(mapped.values())):
        if os.path.basename(name) != name or not name.endswith(".safetensors"):
            raise UsageError(f"{what} {folder}: {index.name} names {name!r}, which is no safetensors file of this folder.")
        if not (folder / name).is_file():
            raise UsageError(f"{what} {folder}: {name} is missing, which {index.name} names.\nCopy the folder again.")
    return [folder / name for name in sorted(set(mapped.values()))]


def read_object(path: Path, what: str) -> dict[str, Any]:
    """A JSON file that holds one object."""
    try:
        if path.stat().st_size > MOST_JSON:
            raise UsageError(f"{what} {path.parent}: {path.name} has {path.stat().st_size:,} bytes; at most {MOST_JSON:,} are read")
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(
            f"{what} {path.parent}: cannot be read: {path.name}: {str(error)[:200]}.\nWrite it again with save_pretrained."
        ) from None
    if not isinstance(found, dict):
        raise UsageError(
            f"{what} {path.parent}: {path.name} holds {type(found).__name__}, not an object.\nWrite it again with save_pretrained."
        )
    return found


def shapes(file: Path) -> Iterator[tuple[str, list[int]]]:
    """Name and shape of every tensor of a safetensors file, from its header alone."""
    try:
        with safe_open(str(file), framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - no mapping
                yield name, tensors.get_slice(name).get_shape()
    except (SafetensorError, OSError, ValueError) as error:
        raise UsageError(
            f"{file.parent}: cannot be read: {file.name} is not a whole safetensors file: {str(error)[:200]}.\nCopy it again, or write it again with save_pretrained."
        ) from None


def _check_size(folder: Path, config: Mapping[str, Any], files: list[Path]) -> None:
    stored = sum(int(torch.Size(shape).numel()) for file in files for _, shape in shapes(file))
    described = compat.size_of(str(folder))
    if described is None:
        return
    if 4 * described > (most := memory()):
        raise UsageError(
            f"model {folder}: config.json describes {described:,} numbers, {4 * described / 2**30:,.0f} GiB in float32, and this machine has {most / 2**30:,.0f} GiB"
        )
    if described > 2 * stored + SPARE and "quantization_config" not in config:
        raise UsageError(
            f"model {folder}: config.json describes {described:,} numbers, and the weights beside it are {stored:,}.\nThey do not belong together: copy the folder again."
        )


def memory() -> int:
    """Bytes of this machine's memory."""
    return int(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


def _counts(key: str) -> bool:
    """Whether a key is a number of things (num_hidden_layers, n_layer), not their width or a coefficient."""
    return key.startswith(("num_", "n_")) or key.endswith(("layers", "layer", "experts", "blocks"))


def _entries(value: Any) -> Iterator[tuple[str, Any]]:
    """Every key of nested objects with its value."""
    if isinstance(value, Mapping):
        yield from value.items()
    for inner in value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ():
        yield from _entries(inner)
