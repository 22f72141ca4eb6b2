"""Settings that recipes share: the run, the model, the data, the optimizer, the evaluation."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from tilt.config import Section
from tilt.optim.optimizers import AdamW

Count = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0.0, lt=1.0)]
Positive = Annotated[float, Field(gt=0.0)]


class Scratch(Section):
    """A model with random weights, built from a configuration; its tokenizer is trained on the run's own texts."""

    kind: Literal["qwen3", "qwen2", "llama", "gpt2", "gemma3", "mistral"] = "qwen3"
    width: Annotated[int, Field(ge=8)] = 128
    layers: Count = 4
    heads: Count = 4
    context: Annotated[int, Field(ge=8)] = 512
    vocabulary: Annotated[int, Field(ge=270)] = 1024
    tokenizer: Literal["bpe"] | Path = "bpe"

    @model_validator(mode="after")
    def _heads_divide(self) -> Scratch:
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}")
        return self


class Lora(Section):
    """Low-rank adapters (arXiv 2106.09685): the base stays as it is, and with the adapter off it is the reference."""

    rank: Count = 16
    alpha: Positive = 32.0
    targets: str | tuple[str, ...] = "all-linear"


class Optimizer(Section):
    """AdamW, its schedule and its gradient clipping."""

    lr: Annotated[float, Field(gt=0.0, le=1.0)] = 1e-3
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup: Annotated[int, Field(ge=0)] = 0
    final: Share = 0.0
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.0
    clip_norm: Annotated[float, Field(ge=0.0)] = 1.0
    betas: tuple[Share, Share] = (0.9, 0.95)

    def settings(self) -> AdamW:
        return AdamW(self.lr, self.betas, 1e-8, self.weight_decay, self.warmup, self.schedule, self.final, self.clip_norm)


class Data(Section):
    """Where rows come from, how they are split, and how they become tokens."""

    source: str
    columns: dict[str, str] = {}
    eval: Annotated[str | None, Field(description="rows to evaluate on; without it a share of `source` is held out")] = None
    held_out: Annotated[Share, Field(description="share of the prompts kept for evaluation, by the hash of the prompt")] = 0.1
    half: Annotated[
        Literal["all", "first", "second"], Field(description="train on all training prompts, or on one of two disjoint halves")
    ] = "all"
    template: Annotated[str, Field(description="how prompts are written: auto, plain, chat, or the name of a bundled template")] = "auto"
    train_on: Literal["completion", "assistant", "all"] = "completion"
    max_prompt_tokens: Count = 256
    max_tokens: Annotated[int, Field(ge=1, description="longest given answer")] = 256
    over_length: Annotated[
        Literal["drop", "truncate"], Field(description="what happens to longer rows; either is counted and reported")
    ] = "drop"

    @model_validator(mode="before")
    @classmethod
    def _name_alone(cls, given: object) -> object:
        return {"source": given} if isinstance(given, str | Path) else given


class Evaluation(Section):
    """When and how the policy is measured on held-out prompts, on randomness of its own."""

    every: Annotated[int, Field(ge=0, description="steps between evaluations; 0 = before and after only")] = 0
    prompts: Count = 128
    samples: Count = 1
    temperature: Annotated[float, Field(ge=0.0, description="0 = greedy")] = 1.0
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    top_k: Annotated[int, Field(ge=0)] = 0


class Sampling(Section):
    """How training answers are sampled. Only the temperature may be changed: a truncated distribution cannot be scored again."""

    temperature: Positive = 1.0
    max_tokens: Count = 64
    stop_strings: tuple[str, ...] = ()
    top_k: Annotated[int, Field(ge=0)] = 0
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    slots: Annotated[int, Field(ge=1, description="answers decoded side by side")] = 512

    @model_validator(mode="after")
    def _whole_distribution(self) -> Sampling:
        if self.top_k > 0 or self.top_p < 1:
            raise ValueError(
                "top_k and top_p cannot be used for training answers: they cannot be re-scored without the kept set. Set top_k 0 and top_p 1 here; `eval:` may use them"
            )
        return self


class Run(Section):
    """Where a run lies and how it computes."""

    name: Annotated[str | None, Field(description="folder under `root`; without it one is chosen")] = None
    root: Path = Path("runs")
    seed: Annotated[int, Field(ge=0)] = 0
    log_every: Count = 10
    threads: Annotated[int, Field(ge=0, description="CPU threads; 0 = all cores")] = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16"],
        Field(description="of the computation; auto = bfloat16 on a GPU, float32 on a CPU; weights of the policy stay float32"),
    ] = "auto"
    quiet: bool = False


class Training(Run):
    """A run that trains one model on one set of data."""

    model: str | Scratch
    data: Data
    tokenizer: Annotated[str | None, Field(description="tokenizer folder or name, where the model brings none")] = None
    lora: Lora | None = None
    micro_tokens: Annotated[int, Field(ge=16, description="most tokens in one forward pass")] = 16384
    save: Annotated[bool, Field(description="write the trained model to checkpoints/")] = True
