"""Settings that recipes share: the run, the model, the data, the optimizer, the evaluation."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from tilt.config import Section
from tilt.errors import UsageError
from tilt.optim.optimizers import AdamW
from tilt.recipes.alerts import Alerts
from tilt.rewards.spec import check_files, parse
from tilt.runs.trackers import Name as Tracker

Count = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0.0, lt=1.0)]
Positive = Annotated[float, Field(gt=0.0)]


class Scratch(Section):
    """A model with random weights, built from a configuration; its tokenizer is trained on the run's own texts."""

    kind: Literal["qwen3", "qwen2", "llama", "gpt2", "gemma3", "mistral"] = "qwen3"
    width: Annotated[int, Field(ge=8, description="numbers a token is held in; the feed-forward layer has 4 times as many")] = 128
    layers: Count = 4
    heads: Annotated[int, Field(ge=1, description="attention heads; they divide the width")] = 4
    context: Annotated[int, Field(ge=8, description="most tokens of prompt and answer together")] = 512
    vocabulary: Annotated[int, Field(ge=270, description="tokens of a tokenizer that is trained on the run's texts")] = 1024
    tokenizer: Annotated[Literal["bpe"] | Path, Field(description="bpe = trained on the run's texts; or a tokenizer's folder")] = "bpe"

    @model_validator(mode="after")
    def _heads_divide(self) -> Scratch:
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}")
        return self


class Lora(Section):
    """Low-rank adapters (arXiv 2106.09685): the base stays as it is, and with the adapter off it is the reference."""

    rank: Count = 16
    alpha: Annotated[float, Field(gt=0.0, description="the update is scaled by alpha / rank")] = 32.0
    targets: Annotated[str | tuple[str, ...], Field(description="names of the layers that get adapters, or all-linear")] = "all-linear"


class Optimizer(Section):
    """AdamW, its schedule and its gradient clipping."""

    lr: Annotated[float, Field(gt=0.0, le=1.0, description="learning rate after the warm-up")] = 1e-3
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup: Annotated[int, Field(ge=0, description="optimizer steps over which the learning rate rises from 0")] = 0
    final: Annotated[float, Field(ge=0.0, lt=1.0, description="share of lr that is left at the end of a linear or cosine schedule")] = 0.0
    weight_decay: Annotated[float, Field(ge=0.0, description="decoupled, on matrices only")] = 0.0
    clip_norm: Annotated[float, Field(ge=0.0, description="greatest global norm of the gradient; 0 = no clipping")] = 1.0
    betas: Annotated[tuple[Share, Share], Field(description="decay of the two averages of Adam")] = (0.9, 0.95)

    @model_validator(mode="after")
    def _ends(self) -> Optimizer:
        if self.final and self.schedule == "constant":
            raise ValueError(
                f"final {self.final:g} is the end of a schedule, and schedule is constant: set it to linear or cosine, or leave final out"
            )
        return self

    def settings(self) -> AdamW:
        return AdamW(self.lr, self.betas, 1e-8, self.weight_decay, self.warmup, self.schedule, self.final, self.clip_norm)


class Data(Section):
    """Where rows come from, how they are split, and how they become tokens."""

    source: Annotated[str, Field(description="a file, a folder, a public set's name, or hf:org/name[:config][@split]")]
    columns: Annotated[dict[str, str], Field(description="{name that Tilt reads: column of the data}")] = {}
    eval: Annotated[str | None, Field(description="rows to evaluate on; without it a share of `source` is held out")] = None
    held_out: Annotated[Share, Field(description="share of the prompts kept for evaluation, by the hash of the prompt")] = 0.1
    half: Annotated[
        Literal["all", "first", "second"], Field(description="train on all training prompts, or on one of two disjoint halves")
    ] = "all"
    template: Annotated[
        str, Field(description="auto = the tokenizer's own, else none; text = none; tilt, chatml, plain = a bundled one; or Jinja text")
    ] = "auto"
    train_on: Annotated[
        Literal["completion", "assistant", "all"], Field(description="the last answer, every turn of the assistant, or every token")
    ] = "completion"
    max_prompt_tokens: Annotated[int, Field(ge=1, description="longest prompt")] = 256
    max_tokens: Annotated[int, Field(ge=1, description="longest given answer")] = 256
    over_length: Annotated[
        Literal["drop", "truncate"], Field(description="what happens to longer rows; either is counted and reported")
    ] = "drop"

    @model_validator(mode="before")
    @classmethod
    def _name_alone(cls, given: object) -> object:
        return {"source": given} if isinstance(given, str | Path) else given


class Texts(Section):
    """Texts that are trained on beside something else: where they come from, and how many an optimizer step."""

    source: Annotated[str, Field(description="a file, a folder, a public set's name, or hf:org/name[:config][@split]")]
    columns: Annotated[dict[str, str], Field(description="{name that Tilt reads: column of the data}")] = {}
    read_as: Annotated[
        Literal["text", "sft", "preference"],
        Field(description="what a row holds: a text, a prompt with its answer, or a prompt with two (each a text)"),
    ] = "text"
    held_out: Annotated[Share, Field(description="share of the texts kept to be measured at every evaluation; 0 measures nothing")] = 0.1
    length: Annotated[int, Field(ge=2, description="longest piece of a text, in tokens; never more than the model's context")] = 256
    batch: Annotated[int, Field(ge=1, description="pieces an optimizer step")] = 32

    @model_validator(mode="before")
    @classmethod
    def _name_alone(cls, given: object) -> object:
        return {"source": given} if isinstance(given, str | Path) else given


def _readable(reward: Any) -> Any:
    """A reward that can be had: every part of it parses, and the files that it names are there."""
    try:
        if reward is not None:
            check_files(parse(reward))
    except UsageError as error:
        raise ValueError(str(error)) from error
    return reward


Reward = Annotated[Any, AfterValidator(_readable)]


class Evaluation(Section):
    """When and how the policy is measured on held-out prompts, on randomness of its own."""

    every: Annotated[int, Field(ge=0, description="steps between evaluations; 0 = before and after only")] = 0
    prompts: Annotated[int, Field(ge=1, description="most held-out prompts to ask")] = 128
    samples: Annotated[int, Field(ge=1, description="answers to each")] = 1
    temperature: Annotated[float, Field(ge=0.0, description="0 = greedy")] = 1.0
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    top_k: Annotated[int, Field(ge=0)] = 0
    min_p: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0


class Sampling(Section):
    """How training answers are sampled. A truncated distribution can be scored again only with the set that each token was chosen among."""

    temperature: Positive = 1.0
    max_tokens: Annotated[int, Field(ge=1, description="longest answer")] = 64
    stop_strings: Annotated[tuple[str, ...], Field(description="texts that end an answer, besides the end token")] = ()
    top_k: Annotated[int, Field(ge=0, description="draw among so many of the likeliest tokens; 0 = all; needs keep_sets")] = 0
    top_p: Annotated[
        float, Field(gt=0.0, le=1.0, description="then among the smallest set that holds so much of their mass; 1 = all; needs keep_sets")
    ] = 1.0
    min_p: Annotated[
        float,
        Field(ge=0.0, lt=1.0, description="then among those at least so many times as likely as the likeliest; 0 = all; needs keep_sets"),
    ] = 0.0
    keep_sets: Annotated[
        bool,
        Field(
            description="keep the tokens that each token was chosen among, and score every model within them: 4 bytes a kept id, "
            "up to the whole vocabulary a token with top_p"
        ),
    ] = False
    slots: Annotated[int, Field(ge=1, description="answers decoded side by side")] = 512
    cache_gib: Annotated[
        float | None,
        Field(
            gt=0.0,
            description="GiB for keys and values; answers that do not fit wait, or begin again and draw the same tokens; None = as much as it takes",
        ),
    ] = None
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16"],
        Field(
            description="of the weights that draw; bfloat16 is a copy cast at every publish, faster and not quite the learner's policy; "
            "auto = bfloat16 where a GPU computes in it, else the policy's own"
        ),
    ] = "auto"

    @model_validator(mode="after")
    def _scorable(self) -> Sampling:
        cut = self.narrowed
        if cut and not self.keep_sets:
            raise ValueError(
                f"{' and '.join(cut)} in training answers: they cannot be scored again without the set that each token was chosen among. "
                "Set sampling.keep_sets: true, or narrow by the temperature alone; `eval:` may truncate freely"
            )
        if self.keep_sets and not cut:
            raise ValueError("keep_sets has no sets to keep: set top_k, top_p or min_p, or leave it out")
        return self

    @property
    def cache(self) -> int | None:
        """Bytes for keys and values."""
        return None if self.cache_gib is None else int(self.cache_gib * 2**30)

    @property
    def narrowed(self) -> list[str]:
        """The settings by which fewer than all tokens may be drawn."""
        return [key for key in ("top_k", "top_p", "min_p") if getattr(self, key) != type(self).model_fields[key].default]


class Mask(Section):
    """Training answers are drawn inside the top-p sets of a copy of the policy that is taken again from time to time (NLPO, arXiv 2210.01241)."""

    top_p: Annotated[
        float, Field(gt=0.0, lt=1.0, description="mass of the copy's likeliest tokens; those that end an answer are always among them")
    ] = 0.9
    refresh: Annotated[int, Field(ge=1, description="steps between copies")] = 20


class Keep(Section):
    """Which answers of a step are trained on."""

    mixed: Annotated[
        bool,
        Field(
            description="only groups whose answers earned differently; in place of the others further prompts are asked (dynamic sampling, DAPO)"
        ),
    ] = False
    draws: Annotated[
        int,
        Field(ge=2, description="with mixed: most draws of prompts a step, the first included; then the step goes on with what there is"),
    ] = 4
    cut: Annotated[
        bool,
        Field(
            description="answers that were cut at max_tokens too; false: they weigh nothing and are in no denominator (overlong filter), but what they "
            "earned stays in the mean and deviation of their group"
        ),
    ] = True

    @model_validator(mode="after")
    def _effective(self) -> Keep:
        if self.draws != type(self).model_fields["draws"].default and not self.mixed:
            raise ValueError(f"draws {self.draws} has no effect without mixed: set mixed to true, or leave draws out")
        return self


class Guards(Section):
    """What a run's first update tolerates before it is applied; beyond it the run stops with a diagnosis. A large number switches a guard off."""

    sampler: Annotated[
        float, Field(gt=0.0, description="largest |log-probability difference| of an action between learner and sampler, float32")
    ] = 1e-4
    old: Annotated[float, Field(gt=0.0, description="the same between the policy and what was evaluated as `old`, float32")] = 1e-5
    reference: Annotated[
        float, Field(gt=0.0, description="the same between the policy and a reference that is its copy as it starts, float32")
    ] = 1e-5
    probability: Annotated[float, Field(gt=0.0, description="mean |probability difference| to any of the three, in bfloat16")] = 5e-3
    clipped: Annotated[float, Field(ge=0.0, description="share of the batch that the clip cuts, float32")] = 0.0


class ReferenceUpdate(Section):
    """A reference that follows the policy (TR-DPO, arXiv 2404.09656)."""

    every: Annotated[int, Field(ge=0, description="steps between updates of the reference; 0 = it never moves")] = 0
    share: Annotated[float, Field(gt=0.0, le=1.0, description="reference ← share · policy + (1 − share) · reference; 1 replaces it")] = 0.6


class Run(Section):
    """Where a run lies and how it computes."""

    name: Annotated[str | None, Field(description="folder under `root`; without it one is chosen")] = None
    root: Annotated[Path, Field(description="folder that holds the runs")] = Path("runs")
    seed: Annotated[int, Field(ge=0, description="of weights, order and sampling")] = 0
    log_every: Annotated[int, Field(ge=1, description="steps between lines where the output is no terminal")] = 10
    threads: Annotated[int, Field(ge=0, description="CPU threads; 0 = all cores")] = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16"],
        Field(description="of the computation; auto = bfloat16 on a GPU, float32 on a CPU; weights of the policy stay float32"),
    ] = "auto"
    quiet: Annotated[bool, Field(description="nothing on the terminal; the files are complete")] = False
    watchdog: Annotated[
        float,
        Field(ge=0.0, description="minutes that one phase of a step may take; then the stacks are written down and the run ends; 0 = any"),
    ] = 120.0
    track: Annotated[
        tuple[Tracker, ...],
        BeforeValidator(lambda given: (given,) if isinstance(given, str) else given),
        Field(description="also send metrics to tensorboard, trackio, wandb or mlflow; one, or a list"),
    ] = ()

    @property
    def saves(self) -> Training | None:
        """When the run writes checkpoints; None where it writes none."""
        return None


class Training(Run):
    """A run that trains one model on one set of data."""

    model: Annotated[str | Scratch, Field(description="a checkpoint's folder or a hub name; or a mapping, for a model from scratch")]
    data: Data
    tokenizer: Annotated[str | None, Field(description="tokenizer folder or name, where the model brings none")] = None
    lora: Annotated[Lora | None, Field(description="a mapping (even {}) trains adapters instead of all weights")] = None
    micro_tokens: Annotated[int, Field(ge=16, description="most tokens in one forward pass")] = 16384
    halve_micro: Annotated[
        bool,
        Field(
            description="where memory does not suffice for an update, begin it again with half the micro_tokens, and keep to them; metrics say so"
        ),
    ] = False
    save: Annotated[bool, Field(description="write checkpoints, from which the run can be resumed; the last is the trained model")] = True
    save_every: Annotated[int, Field(ge=0, description="steps between checkpoints; 0 = by save_minutes alone, and at the end")] = 0
    save_minutes: Annotated[
        float, Field(ge=0.0, description="minutes after which the next step ends with a checkpoint; 0 = by save_every alone")
    ] = 10.0
    keep_last: Annotated[int, Field(ge=0, description="checkpoints that are kept, the last ones; 0 = all")] = 2
    alerts: Alerts = Alerts()
    keep_best: Annotated[
        str | None, Field(description="beside them the checkpoint at which this metric was highest, such as eval/reward")
    ] = None

    @property
    def saves(self) -> Training | None:
        return self if self.save else None

    @property
    def saving(self) -> str:
        """When checkpoints are written and which are kept, in words."""
        when = [f"every {self.save_every} steps"] * (self.save_every > 0) + [f"every {self.save_minutes:g} min"] * (self.save_minutes > 0)
        kept = "all are kept" if not self.keep_last else f"the last {self.keep_last} are kept"
        return f"{', '.join([*when, 'at the end'])}; {kept}" + (f", and the best by {self.keep_best}" if self.keep_best else "")
