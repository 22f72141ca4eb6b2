"""Models from checkpoints, hub names and configurations: dropout off, packed attention on wherever it is exact."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from tilt.errors import UsageError, is_foreign
from tilt.models import adapters, compat, vetting
from tilt.models.agreement import note, settle
from tilt.models.policy import RewardModel

__all__ = [
    "build",
    "load",
    "load_process_model",
    "load_reward_model",
    "note",
    "padded_tokenizer",
    "read_tokenizer",
    "tiny",
    "write_separator",
]


def load(
    model: str | Path, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu", tokenizer: str | Path | None = None
) -> tuple[PreTrainedModel, Any]:
    """A causal LM and its tokenizer from a folder or a hub name (from the local cache when offline); a LoRA folder is merged into its base.

    `tokenizer` names another folder or hub name to take the tokenizer from.
    """
    compat.quiet()
    folder = Path(os.path.expanduser(model))
    adapter = folder if os.path.exists(folder / "adapter_config.json") and not (folder / "config.json").exists() else None
    name = str(model) if adapter is None else adapters.adapter_base(adapter)
    if adapter is not None:
        vetting.check_adapter(adapter)
    name = vetted(name)
    lm, lacking = reading(name, lambda: compat.read_causal_lm(name, dtype))
    _complete(name, lacking, "a causal LM", "Is it a classifier or an encoder? Give a causal language model.")
    if adapter is not None:
        merged = adapter
        lm = reading(str(adapter), lambda: adapters.merge_adapter(lm, merged))
    words = str(adapter) if adapter is not None and (adapter / "tokenizer_config.json").exists() else name
    moved = lm.to(device)
    return reading(name, lambda: ready(moved)), _tokenizer(words if tokenizer is None else str(tokenizer), lm)


def load_reward_model(
    model: str | Path, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> tuple[RewardModel, Any]:
    """A sequence classifier with one label, of any architecture, and its own tokenizer."""
    compat.quiet()
    name = vetted(model)
    labels = reading(name, lambda: compat.read_config(name)).num_labels
    classifier, lacking = reading(name, lambda: compat.read_classifier(name, dtype))
    _complete(
        name,
        lacking,
        "a reward model",
        f"Its configuration has {labels} labels. Train one with `tilt rm`, or give a sequence classifier with one label.",
    )
    moved = classifier.to(device)
    return RewardModel(reading(name, lambda: ready(moved))), _tokenizer(name, classifier)


def write_separator(model: RewardModel, separator: str) -> None:
    """Note in the configuration what stands between the steps that this process reward model reads."""
    model.model.config.step_separator = separator


def load_process_model(
    model: str | Path, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> tuple[RewardModel, Any, str]:
    """A process reward model, its tokenizer, and the separator of steps that it was trained with; empty where its configuration names none."""
    found, tokenizer = load_reward_model(model, dtype=dtype, device=device)
    return found, tokenizer, str(getattr(found.model.config, "step_separator", ""))


def _complete(name: str, lacking: list[str], what: str, mend: str) -> None:
    """Refuse a checkpoint from which weights would be drawn at random."""
    if lacking:
        more = f" and {len(lacking) - 3} more" if len(lacking) > 3 else ""
        raise UsageError(f"model {name}: the checkpoint lacks weights of {what}: {', '.join(lacking[:3])}{more}.\n{mend}")


def read_tokenizer(name: str | Path) -> Any:
    """A tokenizer from a folder or hub name. A folder without one is refused: transformers would make up an empty one from the model's type."""
    compat.quiet()
    folder = Path(os.path.expanduser(name))
    if folder.is_dir() and not any(any(folder.glob(pattern)) for pattern in ("tokenizer*", "vocab*", "*.model", "*.tiktoken")):
        raise UsageError(
            f"tokenizer {folder}: the folder holds no tokenizer (tokenizer.json).\nName one: `tokenizer: FOLDER`, or save it there with save_pretrained."
        )
    return reading(str(name), lambda: _checked(compat.read_tokenizer(str(name))), what="tokenizer")


def _checked(tokenizer: Any) -> Any:
    """A tokenizer whose vocabulary and special tokens can be listed, and which reads a letter."""
    if not isinstance(tokenizer.all_special_tokens, list) or not tokenizer.get_vocab():
        raise ValueError("it has no vocabulary")
    tokenizer.encode("a", add_special_tokens=False)
    return tokenizer


def _tokenizer(name: str, model: PreTrainedModel) -> Any:
    tokenizer = read_tokenizer(name)
    rows = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        raise UsageError(
            f"model {name}: the tokenizer has {len(tokenizer)} tokens but the embedding only {rows} rows.\nSave the model again after resize_token_embeddings(len(tokenizer))."
        )
    if (highest := max(tokenizer.get_vocab().values(), default=0)) >= rows:
        raise UsageError(
            f"model {name}: the tokenizer has a token of number {highest:,} but the embedding only {rows} rows.\nName the tokenizer that belongs to it: `tokenizer: FOLDER`."
        )
    separate_padding(tokenizer, rows)
    return tokenizer


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


def ready(model: PreTrainedModel) -> PreTrainedModel:
    """Dropout off, packed attention where it is exact."""
    compat.without_dropout(model).eval()
    settle(model)
    return model


def separate_padding(tokenizer: Any, rows: int) -> None:
    """Give the tokenizer a padding token that is not the end token; none where there is no room among `rows` embeddings.

    In this order: a token called padding, a reserved one, an unused embedding row, the unknown token. Tilt never pads what it
    trains on; what it saves must not confuse padding with the end.
    """
    end = tokenizer.eos_token_id
    if tokenizer.pad_token_id is not None and tokenizer.pad_token_id != end:
        return
    names = {str(t): i for i, t in tokenizer.added_tokens_decoder.items() if i != end and i < rows}
    called = [n for n in names if "pad" in n.lower()] + [n for n in names if "reserved" in n.lower() or "unused" in n.lower()]
    if called:
        tokenizer.pad_token = called[0]
    elif len(tokenizer) < rows:
        tokenizer.add_special_tokens({"pad_token": "<|pad|>"})
    elif tokenizer.unk_token_id is not None and tokenizer.unk_token_id not in (end, tokenizer.bos_token_id):
        tokenizer.pad_token = tokenizer.unk_token
    else:
        tokenizer.pad_token = None


def padded_tokenizer(tokenizer: Any) -> Any:
    """A copy of the tokenizer with a padding token of its own, for a reward model: one is added where `load` found no room."""
    words = copy.deepcopy(tokenizer)
    separate_padding(words, 2**31)
    return words


def located(model: str | Path) -> str:
    """The folder's path, the last checkpoint of a run's directory, or the hub's name; what does not exist, or is no model, is refused."""
    if "\0" in str(model) or len(str(model)) > 1000:
        raise UsageError(
            f"model {str(model)[:100]!r}: this cannot be a folder's name.\nGive an existing folder or a hub name like Qwen/Qwen3-0.6B."
        )
    path = Path(os.path.expanduser(model))
    if os.path.isdir(path):
        if not (path / "config.json").exists():
            if saved := sorted(path.glob("checkpoints/step_*"), key=lambda folder: (len(folder.name), folder.name)):
                return str(saved[-1])
            raise UsageError(
                f"model {path}: the folder has no config.json.\nGive a folder written by save_pretrained, with config.json, weights and tokenizer."
            )
        return str(path)
    text = str(model)
    if os.path.exists(path) or text.startswith((".", "/", "~")) or text.count("/") > 1:
        raise UsageError(f"model {text}: there is no such folder.\nGive an existing folder or a hub name like Qwen/Qwen3-0.6B.")
    return text


def vetted(model: str | Path) -> str:
    """The same for a model that is about to be read: a folder that cannot be trusted, or cannot be held, is refused before."""
    name = located(model)
    if os.path.isdir(name):
        reading(name, lambda: vetting.check_checkpoint(Path(name)))
    return name


def reading(name: str, read: Callable[[], Any], what: str = "model") -> Any:
    """What `read` returns; a failure becomes a short error that says where the model was looked for."""
    try:
        return read()
    except BaseException as error:
        if not is_foreign(error) or isinstance(error, torch.OutOfMemoryError):
            raise
        if os.path.isdir(name):
            raise UsageError(
                f"{what} {name}: cannot be read: {_first_line(error)}\nWrite it again with save_pretrained, or name another folder."
            ) from error
        raise UsageError(
            f"{what} {name}: neither a folder here nor found in the hub's local cache: {_first_line(error)}\n"
            "Check the name; offline, download it first on a machine with network, or give a folder."
        ) from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]
