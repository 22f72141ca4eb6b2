"""TRL's side: a trainer on a workload, one optimizer step for each line on standard input; answers on standard output are lines of JSON behind a mark.

    PYTHON theirs.py FOLDER '{"micro": 64, "dtype": "float32", "paged": false, "loss": "dapo", "steps": 10, "threads": 2, "lr": 1e-5, "seed": 0}'

Run by versus_trl.py with the Python of an environment of TRL's own.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, LogitsProcessor, LogitsProcessorList, TrainerCallback
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

sys.path.insert(0, str(Path(__file__).parent))
import workloads as shared
from workloads import say


class Forced(LogitsProcessor):
    """Row i ends at its token number lengths[i], and no earlier."""

    def __init__(self, lengths: list[int], end: int, new: int) -> None:
        self.lengths, self.end, self.new, self.first = torch.tensor(lengths), end, new, 0

    def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores[:, self.end] = -torch.inf
        now = (self.lengths == ids.shape[1] - self.first + 1) & (self.lengths < self.new)
        if now.any():
            scores[now] = -torch.inf
            scores[now, self.end] = 0.0
        return scores


class Steps(TrainerCallback):
    """Waits for its turn before each step, and says how long the step took."""

    def __init__(self, times: dict[str, float]) -> None:
        self.times = times

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        if not sys.stdin.readline():
            os._exit(0)
        self.times.clear()
        self.began = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        here = shared.waited()
        seconds = time.perf_counter() - self.began
        say(step=seconds, peak=here, **self.times)


def main() -> None:
    folder, options = Path(sys.argv[1]), json.loads(sys.argv[2])
    torch.set_num_threads(options["threads"])
    torch.manual_seed(options["seed"])
    record = json.loads((folder / "workload.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=getattr(torch, options.get("weights", "float32")))
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    rows = Dataset.from_list([json.loads(line) for line in (folder / "prompts.jsonl").read_text().splitlines()])
    times: dict[str, float] = {}
    common = dict(
        output_dir=str(folder / "trl"), use_cpu=options.get("device", "cpu") == "cpu", bf16=options["dtype"] == "bfloat16", per_device_train_batch_size=options["micro"],
        learning_rate=options["lr"], lr_scheduler_type="constant", max_steps=options["steps"], gradient_checkpointing=False, report_to=[],
        logging_steps=10**6, save_strategy="no", weight_decay=0.0, max_grad_norm=1.0, adam_beta2=0.95, shuffle_dataset=False, seed=options["seed"],
        disable_tqdm=True,
    )  # fmt: skip
    work = shared.recorded(record)
    if isinstance(work, shared.Lesson):
        trainer = lesson(work, common, model, tokenizer, rows)
    elif isinstance(work, shared.Race):
        rising = common | {"warmup_steps": work.warmup, "lr_scheduler_type": "linear"}
        trainer = race(work, rising, options, model, tokenizer, rows, times)
    else:
        trainer = grpo(work, common, options, model, tokenizer, rows, times)
    trainer.add_callback(Steps(times))
    if options.get("dump"):
        dump(trainer, Path(options["dump"]))
    say(ready=True)
    trainer.train()
    say(done=True)


def lesson(work: shared.Lesson, common: dict[str, Any], model: Any, tokenizer: Any, rows: Dataset) -> Any:
    """SFT on completions, or DPO with the reference's log-probabilities read beforehand."""
    size = {k: v for k, v in common.items() if k != "shuffle_dataset"} | {
        "gradient_accumulation_steps": work.batch // common["per_device_train_batch_size"]
    }
    if work.kind == "sft":
        return SFTTrainer(model=model, args=SFTConfig(**size, max_length=work.context), train_dataset=rows, processing_class=tokenizer)
    config = DPOConfig(**size, max_length=work.context, beta=0.1, precompute_ref_log_probs=True, disable_dropout=True)
    return DPOTrainer(model=model, args=config, train_dataset=rows, processing_class=tokenizer)


def grpo(
    work: shared.Workload,
    common: dict[str, Any],
    options: dict[str, Any],
    model: Any,
    tokenizer: Any,
    rows: Dataset,
    times: dict[str, float],
) -> Any:
    """GRPO without a penalty; answers end where the workload says."""

    def reward(completions: list[str], **_: Any) -> list[float]:
        return [shared.worth(text) for text in completions]

    trainer = group(work, work.answers, common, options, model, tokenizer, rows, reward)
    timed(trainer, times, LogitsProcessorList([Forced(work.lengths(), tokenizer.eos_token_id, work.new)]))
    return trainer


def race(
    work: shared.Race, common: dict[str, Any], options: dict[str, Any], model: Any, tokenizer: Any, rows: Dataset, times: dict[str, float]
) -> Any:
    """GRPO on sums; each step says which share of its answers was right."""

    def reward(completions: list[str], answer: list[str], **_: Any) -> list[float]:
        found = shared.right(completions, answer)
        times["reward"] = sum(found) / len(found)
        return found

    trainer = group(work, work.prompts * work.samples, common, options, model, tokenizer, rows, reward)
    timed(trainer, times, LogitsProcessorList())
    return trainer


def group(
    work: Any, answers: int, common: dict[str, Any], options: dict[str, Any], model: Any, tokenizer: Any, rows: Dataset, reward: Any
) -> Any:
    config = GRPOConfig(
        **common, gradient_accumulation_steps=answers // common["per_device_train_batch_size"], num_generations=work.samples,
        max_completion_length=work.new, temperature=1.0, top_k=0, top_p=1.0, beta=0.0, loss_type=options["loss"], scale_rewards="group",
        disable_dropout=True, use_transformers_continuous_batching=options["paged"],
    )  # fmt: skip
    return GRPOTrainer(model=model, reward_funcs=reward, args=config, train_dataset=rows, processing_class=tokenizer)


def timed(trainer: Any, times: dict[str, float], processors: LogitsProcessorList) -> None:
    """Time the model's generation, with these processors of its scores."""
    plain = trainer.model.generate

    def generate(*given: Any, **named: Any) -> Any:
        for processor in processors:
            processor.first = named["input_ids"].shape[1]
        began = time.perf_counter()
        found = plain(*given, **({"logits_processor": processors} if processors else {}), **named)
        shared.waited()
        times["generate"] = time.perf_counter() - began
        return found

    trainer.model.generate = generate


def dump(trainer: Any, path: Path) -> None:
    """Keep the first step's rollouts, advantages, losses and gradient (before clipping)."""
    plain, kept = trainer._compute_loss, []

    def compute(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
        loss = plain(model, inputs)
        wanted = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask", "advantages")
        kept.append({name: inputs[name].detach().clone() for name in wanted} | {"loss": loss.detach().clone()})
        return loss

    class Keep(TrainerCallback):
        def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
            if not path.exists():
                torch.save(
                    {"parts": kept, "gradient": {n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None}},
                    path,
                )

    trainer._compute_loss = compute
    trainer.args.max_grad_norm = 0.0
    trainer.add_callback(Keep())


if __name__ == "__main__":
    main()
