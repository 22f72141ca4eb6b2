"""What every recipe opens before its loop: rows, tokenizer, model, device, run directory. Everything that can be refused is refused here."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from tilt.data.formats import Dataset, Want, prompt_text, read
from tilt.data.rendering import Renderer
from tilt.data.rendering import renderer as make_renderer
from tilt.data.shapes import RANKED
from tilt.data.sources import load as load_rows
from tilt.data.streams import split
from tilt.data.tokenizers import train_bpe
from tilt.errors import DataError, UsageError
from tilt.models import adapters, flex, loading, saving
from tilt.models.policy import Policy
from tilt.recipes.settings import Data, Lora, Run, Scratch
from tilt.rewards.model import same_tokens
from tilt.runs.machine import keep_freed_memory

Row = dict[str, Any]


@dataclass(frozen=True)
class Rows:
    """Rows to train on and rows held out, whether they are conversations, and the lines that say what was read."""

    train: list[Row]
    held_out: list[Row]
    conversational: bool
    notes: list[str] = field(default_factory=list)


def rows(data: Data, want: Want) -> Rows:
    """Read, recognise and split: no prompt stands on both sides."""
    found = _read(data.source, want, data.columns)
    notes = [f"data       {data.source}: {found.summary()}"]
    train, held = found.rows, []
    if data.eval is not None:
        held = _read(data.eval, want, data.columns).rows
        seen = {prompt_text(r) for r in held}
        train = [r for r in found.rows if prompt_text(r) not in seen]
        if len(train) < len(found.rows):
            notes.append(f"           {len(found.rows) - len(train)} rows ask what is held out in {data.eval}: left out of training")
    elif data.held_out > 0:
        train, held = _held_out(found.rows, data)
    if data.half != "all":
        train = split(train, [0.5, 0.5], seed=1)[data.half == "second"]
    if not train:
        raise DataError(
            f"{data.source}: no row is left to train on"
            + (f": all ask what is held out in {data.eval}\n  name other rows in data.eval" if data.eval is not None else "")
        )
    return Rows(train, held, found.conversational, [*notes, f"           {len(train)} rows to train on, {len(held)} held out by prompt"])


def _held_out(found: list[Row], data: Data) -> list[list[Row]]:
    try:
        return split(found, data.held_out)
    except DataError as error:
        raise DataError(f"{data.source}: {error}; data.held_out is {data.held_out}, and 0 holds nothing out") from None


def _read(source: str, want: Want, columns: Mapping[str, str]) -> Dataset:
    found = load_rows(source)
    return read(found.rows, want=want, columns=columns, source=found.name)


def texts(found: Iterable[Row]) -> Iterable[str]:
    """Every text of the rows, for a tokenizer to be trained on."""
    for row in found:
        for key in ("text", "prompt", "completion", "chosen", "rejected", "messages", "steps"):
            yield from _texts(row.get(key))
        for answer in row.get(RANKED, ()):
            yield from _texts(answer)


def _texts(value: Any) -> Iterable[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Sequence):
        yield from (m if isinstance(m, str) else str(m["content"]) for m in value)


def settle(run: Run) -> torch.device:
    """Threads, memory, seeds and the device of a run."""
    keep_freed_memory()
    torch.set_num_threads(run.threads or os.cpu_count() or 1)
    torch.manual_seed(run.seed)
    wanted = run.device if run.device != "auto" else ("cuda" if torch.cuda.is_available() else "cpu")
    if wanted == "cuda" and not torch.cuda.is_available():
        raise UsageError("device cuda: no GPU is visible to torch. Use device=cpu, or device=auto")
    return torch.device(wanted)


def precision(run: Run, device: torch.device) -> Callable[[], AbstractContextManager[object]]:
    """bfloat16 arithmetic over float32 weights where it pays (a GPU) or is asked for; else plain float32."""
    if run.dtype == "bfloat16" or (run.dtype == "auto" and device.type == "cuda"):
        return lambda: torch.autocast(device.type, torch.bfloat16)
    return nullcontext


def drawing_dtype(run: Run, wanted: str, device: torch.device) -> torch.dtype | None:
    """What answers are drawn in, None for the policy's own. On a CPU `auto` never means bfloat16, however fast: the learner computes in float32 there."""
    if wanted == "auto":
        return torch.bfloat16 if device.type == "cuda" and precision(run, device) is not nullcontext else None
    return torch.bfloat16 if wanted == "bfloat16" else torch.float32


def language_model(model: str | Scratch, tokenizer: str | None, corpus: Callable[[], Iterable[str]], seed: int) -> tuple[Any, Any, str]:
    """A causal LM, its tokenizer and its short name: from a folder or hub name, or built and its tokenizer trained on the corpus."""
    if not isinstance(model, Scratch):
        lm, words = loading.load(model, tokenizer=tokenizer)
        return lm, words, Path(model).name if Path(model).is_dir() else model
    given = tokenizer or (str(model.tokenizer) if isinstance(model.tokenizer, Path) else None)
    words = train_bpe(corpus(), model.vocabulary) if given is None else loading.read_tokenizer(given)
    lm = loading.tiny(
        model.kind, vocabulary=len(words), width=model.width, layers=model.layers, heads=model.heads, context=model.context, seed=seed
    )
    loading.separate_padding(words, len(words))
    saving.check_tokenizer(lm, words)
    return lm, words, f"{model.kind}-{sum(p.numel() for p in lm.parameters()) / 1e6:.1f}M"


def other_model(path: str, tokenizer: Any, device: torch.device, role: str) -> Policy:
    """A frozen policy from a checkpoint that reads the same tokens; one of other tokens is refused."""
    lm, words = loading.load(path)
    if not same_tokens(words, tokenizer):
        raise UsageError(
            f"{role} {path}: its tokenizer differs from the policy's, so it cannot score the policy's tokens\n  name a checkpoint of the same family"
        )
    return policy_of(lm, device).requires_grad_(False)


def adapted(lm: Any, lora: Lora | None) -> Any:
    """The model with low-rank adapters where asked for."""
    return lm if lora is None else adapters.add_lora(lm, rank=lora.rank, alpha=lora.alpha, targets=lora.targets)


def renderer(tokenizer: Any, data: Data, lm: Any, found: Rows) -> Renderer:
    """How rows become tokens; nothing longer than the model's context."""
    context = loading.compat.context_of(lm)
    prompt = min(data.max_prompt_tokens, context - min(data.max_tokens, context // 2))
    return make_renderer(
        tokenizer, data.template, conversational=found.conversational, max_prompt_tokens=prompt, max_tokens=min(data.max_tokens, context - prompt),
        train_on=data.train_on, over_length=data.over_length,
    )  # fmt: skip


def headline(model: str, module: nn.Module, device: torch.device, run: Run) -> str:
    """Device and size, in one line; on a GPU another says how packs are attended to."""
    every = sum(p.numel() for p in module.parameters())
    trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
    line = f"model      {model}: {every / 1e6:.2f}M parameters, {trained / 1e6:.2f}M trained; {device}, {torch.get_num_threads()} threads, seed {run.seed}"
    return line if device.type not in flex.DEVICES else f"{line}\n{_attention(module, device, run)}"


def _attention(module: nn.Module, device: torch.device, run: Run) -> str:
    lm = next(part for part in module.modules() if isinstance(part, PreTrainedModel))
    if not loading.compat.is_packed(lm):
        return "attention  the model's own, on padded batches"
    with precision(run, device)():
        half = torch.is_autocast_enabled(device.type)
        return flex.told(lm, device, torch.get_autocast_dtype(device.type) if half else loading.compat.dtype_of(lm))


def policy_of(lm: Any, device: torch.device, *, value_head: bool = False) -> Policy:
    return Policy(lm.to(device), value_head=value_head)


def due(step: int, steps: int, every: int) -> bool:
    """Whether a step is one to evaluate at: the first, the last, and every `every`-th between."""
    return step in (0, steps) or (every > 0 and step % every == 0)
