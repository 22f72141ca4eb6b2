"""LoRA through peft: the base stays as it is, the adapter is trained, and with the adapter off the model is the reference.

An adapter is switched by a flag that peft's layers read; who is trainable never changes here. (peft's own `set_adapter` and
`enable_adapters` set `requires_grad`, which makes a frozen adapter trainable.)
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from tilt.errors import UsageError
from tilt.models import compat, vetting

ALL_LINEAR = "all-linear"


def add_lora(
    lm: PreTrainedModel, rank: int, alpha: float, targets: str | Sequence[str] = ALL_LINEAR, *, name: str = "default", seed: int = 0
) -> PreTrainedModel:
    """Give linear layers of the body a trainable W + alpha/rank · B A (arXiv 2106.09685), B = 0 at first; the base and every other adapter are frozen.

    `targets` are endings of layer names ("q_proj", "v_proj"), or "all-linear": every linear layer of the body, heads left out.
    The score layer of a reward model stays trainable. The adapter becomes the active one; the model is changed in place and returned.
    """
    import peft

    layers = _targets(lm, targets)
    kind = "SEQ_CLS" if hasattr(lm, "score") else "CAUSAL_LM"
    transposed = any(
        isinstance(lm.get_submodule(n), Conv1D) or isinstance(getattr(lm.get_submodule(n), "base_layer", None), Conv1D) for n in layers
    )
    config = peft.LoraConfig(
        r=rank, lora_alpha=alpha, target_modules=layers, lora_dropout=0.0, bias="none", task_type=kind, fan_in_fan_out=transposed
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        peft.inject_adapter_in_model(config, lm, adapter_name=name)
    for path, parameter in lm.named_parameters():
        parameter.requires_grad_(f".{name}." in path and "lora_" in path)
        if "lora_" in path:
            parameter.data = parameter.data.to(compat.dtype_of(lm))
    if hasattr(lm, "score"):
        compat.score_of(lm).requires_grad_(True)
    _activate(lm, [name])
    return lm


def has_adapters(model: nn.Module) -> bool:
    return bool(_layers(model))


@contextmanager
def adapter_off(model: nn.Module) -> Iterator[None]:
    """The base without its adapters: the reference. Forward and backward of one role both belong inside; everything is restored at the end."""
    with _roles(model, off=True, active=None):
        yield


@contextmanager
def adapter_on(model: nn.Module, name: str) -> Iterator[None]:
    """One adapter alone, for forward and backward of its role; everything is restored at the end."""
    layers = _layers(model)
    if not any(name in layer.lora_A for layer in layers):
        raise UsageError(
            f"there is no adapter {name!r}.\nThe model has: {', '.join(sorted({n for layer in layers for n in layer.lora_A})) or 'none'}."
        )
    with _roles(model, off=False, active=[name]):
        yield


def merged_state(model: nn.Module) -> dict[str, Tensor]:
    """The weights with active adapters added, under the base's names; the model itself is not touched."""
    state = {k: v for k, v in model.state_dict().items() if "lora_" not in k}
    for path, layer in model.named_modules():
        if not hasattr(layer, "lora_A") or not hasattr(layer, "base_layer"):
            continue
        weight = layer.base_layer.weight.detach().clone()
        for name in [] if layer._disable_adapters else layer.active_adapters:
            if name in layer.lora_A:
                weight += layer.get_delta_weight(name).detach().to(weight.dtype)
        state[f"{path}.base_layer.weight"] = weight
    return {k.replace(".base_layer.", "."): v for k, v in state.items()}


def plain_copy(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of its own, every weight trainable, active adapters added to the weights and gone."""
    twin = copy.deepcopy(model)
    for path, layer in list(twin.named_modules()):
        if hasattr(layer, "lora_A") and hasattr(layer, "base_layer"):
            base = layer.base_layer
            for name in [] if layer._disable_adapters else layer.active_adapters:
                if name in layer.lora_A:
                    base.weight.data += layer.get_delta_weight(name).detach().to(base.weight.dtype)
            twin.set_submodule(path, base)
    return twin.requires_grad_(True)


def save_adapter(model: PreTrainedModel, path: str | Path, *, base: str, name: str = "default") -> None:
    """The adapter alone as peft writes it: adapter_config.json (which names the `base` to load it on) and adapter_model.safetensors."""
    from safetensors.torch import save_file

    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    config: Any = model.peft_config[name]
    config.base_model_name_or_path = str(base)
    config.inference_mode = True
    try:
        config.save_pretrained(folder)
    finally:
        config.inference_mode = False
    tensors = {
        f"base_model.model.{k.replace(f'.{name}.', '.')}": v.detach().cpu().contiguous()
        for k, v in model.state_dict().items()
        if "lora_" in k and f".{name}." in k
    }
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def adapter_base(path: Path) -> str:
    """The model that an adapter folder was trained on."""
    base = vetting.read_object(path / "adapter_config.json", "adapter").get("base_model_name_or_path")
    if not base:
        raise UsageError(
            f"adapter {path}: adapter_config.json names no base model.\nSet base_model_name_or_path to the folder or hub name it was trained on."
        )
    return str(base)


def merge_adapter(lm: PreTrainedModel, path: Path) -> PreTrainedModel:
    """The model with the adapter of this folder added to its weights."""
    import peft

    return peft.PeftModel.from_pretrained(lm, str(path)).merge_and_unload()


def _layers(model: nn.Module) -> list[Any]:
    return [m for m in model.modules() if hasattr(m, "lora_A") and hasattr(m, "base_layer")]


def _activate(model: nn.Module, names: list[str]) -> None:
    for layer in _layers(model):
        layer._active_adapter = list(names)


@contextmanager
def _roles(model: nn.Module, *, off: bool, active: list[str] | None) -> Iterator[None]:
    layers = _layers(model)
    if not layers:
        raise UsageError("the model has no adapter to switch.\nAdd one with add_lora, or keep separate weights for the reference.")
    before = [(layer._disable_adapters, layer._active_adapter) for layer in layers]
    for layer in layers:
        layer._disable_adapters = off
        layer._active_adapter = layer._active_adapter if active is None else active
    try:
        yield
    finally:
        for layer, (disabled, names) in zip(layers, before, strict=True):
            layer._disable_adapters, layer._active_adapter = disabled, names


def _targets(lm: PreTrainedModel, targets: str | Sequence[str]) -> list[str]:
    """Full names of the linear layers of the body that are meant."""
    prefix = next(n for n, m in lm.named_modules() if m is compat.body_of(lm))
    linear = []
    for path, module in compat.body_of(lm).named_modules(prefix=prefix):
        kind = module.base_layer if hasattr(module, "lora_A") else module
        if isinstance(kind, nn.Linear | Conv1D) and ".lora_" not in path and not path.endswith(".base_layer"):
            linear.append(path)
    wanted = [targets] if isinstance(targets, str) else list(targets)
    if wanted == [ALL_LINEAR]:
        return linear
    absent = [w for w in wanted if not any(p == w or p.endswith("." + w) for p in linear)]
    if absent or not wanted:
        endings = sorted({p.rsplit(".", 1)[-1] for p in linear})
        raise UsageError(
            f"lora targets {', '.join(absent) or '(none)'}: no linear layer of {type(lm).__name__} ends so.\nUse all-linear or some of: {', '.join(endings)}."
        )
    return [p for p in linear if any(p == w or p.endswith("." + w) for w in wanted)]
