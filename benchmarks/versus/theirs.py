"""TRL's side: GRPOTrainer on a workload, one optimizer step for each line on standard input; answers on standard output are lines of JSON behind a mark.

    PYTHON theirs.py FOLDER '{"micro": 64, "dtype": "float32", "paged": false, "loss": "dapo", "steps": 10, "threads": 2}'

Run by versus_trl.py with the Python of an environment of TRL's own.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, LogitsProcessor, LogitsProcessorList, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

sys.path.insert(0, str(Path(__file__).parent))
import workloads as shared

MARK = "@@"


def say(**found: Any) -> None:
    print(MARK + json.dumps(found), flush=True)


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
        seconds = time.perf_counter() - self.began
        say(
            step=seconds,
            generate=self.times.get("generate", 0.0),
            peak=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
            **{k: v for k, v in self.times.items() if k != "generate"},
        )


def main() -> None:
    folder, options = Path(sys.argv[1]), json.loads(sys.argv[2])
    torch.set_num_threads(options["threads"])
    torch.manual_seed(0)
    record = json.loads((folder / "workload.json").read_text())
    work = shared.Workload(**{**record, "shape": shared.Shape(**record["shape"])})
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    rows = [json.loads(line) for line in (folder / "prompts.jsonl").read_text().splitlines()]
    times: dict[str, float] = {}

    def reward(completions: list[str], **_: Any) -> list[float]:
        found = [shared.worth(text) for text in completions]
        times["reward"] = sum(found) / len(found)
        return found

    config = GRPOConfig(
        output_dir=str(folder / "trl"), use_cpu=True, bf16=options["dtype"] == "bfloat16", per_device_train_batch_size=options["micro"],
        gradient_accumulation_steps=work.answers // options["micro"], num_generations=work.samples, max_completion_length=work.new,
        temperature=1.0, top_k=0, top_p=1.0, learning_rate=options["lr"], lr_scheduler_type="constant", beta=0.0, loss_type=options["loss"],
        scale_rewards="group", max_steps=options["steps"], gradient_checkpointing=False, disable_dropout=True, report_to=[], logging_steps=10**6,
        save_strategy="no", weight_decay=0.0, max_grad_norm=1.0, adam_beta2=0.95, shuffle_dataset=False, seed=0, disable_tqdm=True,
        use_transformers_continuous_batching=options["paged"],
    )  # fmt: skip
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=reward,
        args=config,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        callbacks=[Steps(times)],
    )
    trainer.remove_callback(type("None", (TrainerCallback,), {}))
    forced, plain = Forced(work.lengths(), tokenizer.eos_token_id, work.new), trainer.model.generate

    def generate(*given: Any, **named: Any) -> Any:
        forced.first = named["input_ids"].shape[1]
        began = time.perf_counter()
        found = plain(*given, logits_processor=LogitsProcessorList([forced]), **named)
        times["generate"] = time.perf_counter() - began
        return found

    trainer.model.generate = generate
    if options.get("dump"):
        dump(trainer, Path(options["dump"]))
    say(ready=True, micro=options["micro"], dtype=options["dtype"])
    trainer.train()
    say(done=True)


def dump(trainer: Any, path: Path) -> None:
    """Keep the first step's rollouts, advantages, losses and gradient."""
    plain, kept = trainer._compute_loss, []

    def compute(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
        loss = plain(model, inputs)
        kept.append(
            {name: inputs[name].detach().clone() for name in ("prompt_ids", "completion_ids", "completion_mask", "advantages")}
            | {"loss": loss.detach().clone()}
        )
        return loss

    trainer._compute_loss = compute

    class Keep(TrainerCallback):
        def on_pre_optimizer_step(self, *_: Any, model: Any = None, **__: Any) -> None:
            if not path.exists():
                grads = {name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None}
                torch.save({"parts": kept, "gradient": grads}, path)

    trainer.args.max_grad_norm = 0.0
    trainer.add_callback(Keep())


if __name__ == "__main__":
    main()
