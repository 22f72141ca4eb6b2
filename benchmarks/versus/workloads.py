"""The workloads of the comparison with TRL: shapes, lengths and where answers stop. Read by both sides, so it imports nothing but the standard library."""

from __future__ import annotations

import json
import random
from dataclasses import asdict, dataclass
from typing import Any

END = "<end>"
PAD = "<pad>"


@dataclass(frozen=True)
class Shape:
    """A decoder of the Qwen3 family with tied embeddings."""

    width: int
    layers: int
    heads: int
    kv_heads: int
    inner: int
    vocabulary: int

    def config(self, context: int) -> dict[str, Any]:
        """Arguments of transformers' Qwen3Config."""
        return {
            "vocab_size": self.vocabulary, "hidden_size": self.width, "intermediate_size": self.inner, "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads, "num_key_value_heads": self.kv_heads, "head_dim": self.width // self.heads,
            "max_position_embeddings": context, "tie_word_embeddings": True,
        }  # fmt: skip


@dataclass(frozen=True)
class Workload:
    """Answers of GRPO: `answers` a step in groups of `samples`, prompts of `prompt` tokens, at most `new` sampled ones; with `stops` answers end where `lengths` says."""

    shape: Shape
    prompt: int
    new: int
    samples: int
    answers: int
    stops: bool = False

    @property
    def prompts(self) -> int:
        return self.answers // self.samples

    def lengths(self, seed: int = 0) -> list[int]:
        """Sampled tokens of each answer of a step. Without stops all have `new`; with them an uneven list: median 24 and maximum 128 of 128."""
        if not self.stops:
            return [self.new] * self.answers
        rng = random.Random(seed)
        drawn = [min(self.new, max(2, round(24 * rng.lognormvariate(0, 0.9)))) for _ in range(self.answers - 2)]
        return rng.sample([self.new, 24, *drawn], self.answers)

    def record(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Lesson:
    """Supervised or preference training on the instructions of rasbt-instruct (the folder TILT_DATA): `batch` rows a step, answers of `kind` sft or dpo."""

    kind: str
    shape: Shape
    batch: int = 32
    context: int = 512

    def record(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Race:
    """GRPO on two-digit sums from the same weights until the mean of `window` steps' sampled answers is right in `target` of the cases; the learning rate
    falls in a straight line to 0 after `steps`. The weights are `learned` by SFT, else random."""

    target: float = 0.9
    window: int = 4
    prompts: int = 64
    samples: int = 8
    new: int = 5
    lr: float = 5e-4
    warmup: int = 5
    steps: int = 240
    learned: bool = True

    def record(self) -> dict[str, Any]:
        return asdict(self)


SMALL = Shape(width=128, layers=4, heads=4, kv_heads=2, inner=384, vocabulary=1024)
WORKLOADS = {
    "W1": Workload(SMALL, prompt=64, new=64, samples=8, answers=64),
    "W2": Workload(SMALL, prompt=512, new=128, samples=16, answers=64),
    "W3": Workload(Shape(256, 4, 4, 2, 768, 151_936), prompt=128, new=64, samples=8, answers=32),
    "W4": Workload(Shape(512, 8, 8, 4, 1536, 4096), prompt=256, new=128, samples=8, answers=64, stops=True),
}
LARGE = {  # for a GPU: the sizes of Qwen2.5-0.5B and Qwen3-1.7B in this family
    "0.5B": Workload(Shape(896, 24, 14, 2, 4864, 151_936), prompt=512, new=512, samples=16, answers=256),
    "1.7B": Workload(Shape(2048, 28, 16, 8, 6144, 151_936), prompt=512, new=512, samples=16, answers=256),
}
CHECK = Workload(SMALL, prompt=24, new=48, samples=4, answers=16, stops=True)  # what both sides are compared on, number by number
LESSONS = {"W6-sft": Lesson("sft", Shape(256, 4, 4, 2, 768, 4096)), "W6-dpo": Lesson("dpo", Shape(256, 4, 4, 2, 768, 4096))}
RACES = {"W5": Race()}
TINY: dict[str, Workload | Lesson | Race] = {  # the same programs in seconds, on anything
    "tiny": Workload(Shape(32, 2, 4, 2, 48, 64), prompt=6, new=5, samples=2, answers=4),
    "tiny-sft": Lesson("sft", Shape(32, 2, 4, 2, 48, 512), batch=4),
    "tiny-sums": Race(target=0.0, window=1, prompts=4, samples=4, learned=False),
}


MARK = "@@"  # before what a side has to say, among all else on its standard output


def say(**found: Any) -> None:
    """One line of JSON behind the mark."""
    print(MARK + json.dumps(found), flush=True)


def waited() -> float:
    """The most MiB held so far, of a GPU's tensors where this process uses one, else of the process; a GPU has done all it was told by then."""
    import resource
    import sys

    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()
        return float(torch.cuda.max_memory_allocated() / 2**20)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def recorded(record: dict[str, Any]) -> Workload | Lesson | Race:
    """The workload that a record describes."""
    if "target" in record:
        return Race(**record)
    return (Lesson if "kind" in record else Workload)(**{**record, "shape": Shape(**record["shape"])})


def words(size: int) -> list[str]:
    """A vocabulary of so many words, one token each; the last two end and pad."""
    return [*(f"w{i}" for i in range(size - 2)), END, PAD]


def prompts(work: Workload, count: int, seed: int = 0) -> list[str]:
    """Prompts of exactly `work.prompt` tokens."""
    rng = random.Random(seed)
    return [" ".join(f"w{rng.randrange(work.shape.vocabulary - 2)}" for _ in range(work.prompt)) for _ in range(count)]


def worth(completion: str) -> float:
    """A reward that depends on the answer alone and differs within every group: a hash of its text, in [0, 1)."""
    return sum(ord(c) * (i + 1) for i, c in enumerate(completion)) % 9973 / 9973


def worths(prompts: list[str], completions: list[str], **columns: object) -> list[float]:
    """The same as a reward function of Tilt."""
    return [worth(text) for text in completions]


def right(completions: list[str], answer: list[str], **columns: object) -> list[float]:
    """1 where the completion is exactly the sum, else 0: a reward function of both sides."""
    return [float(given.strip() == sought) for given, sought in zip(completions, answer, strict=True)]


def question(row: dict[str, str]) -> str:
    """The prompt of a row of rasbt-instruct."""
    return row["instruction"] + (f"\n{row['input']}" if row["input"] else "") + "\n"
