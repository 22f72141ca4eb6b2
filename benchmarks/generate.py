"""Sampling speed of Tilt's engine against transformers' `generate` on a small model: interleaved runs, ratio of medians.

    python benchmarks/generate.py --prompts 8 --samples 8 --length 32 --tokens 64 --repeat 5

Both draw at temperature 1 with no stop token, so both do the same number of steps; prompts have equal lengths, so `generate` pads nothing.
`--lora R` gives every layer an adapter of rank R.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from transformers import Qwen3Config

from tilt.data.rollouts import Prompt, Sampling
from tilt.models import compat
from tilt.models.adapters import add_lora
from tilt.sampling.sampler import Sampler


def main() -> None:
    """Print a table: milliseconds a step of each, median and quartiles, and the ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (
        ("prompts", 8),
        ("samples", 8),
        ("length", 32),
        ("tokens", 64),
        ("repeat", 5),
        ("layers", 4),
        ("width", 128),
        ("vocabulary", 512),
        ("threads", 2),
        ("lora", 0),
    ):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    o = parser.parse_args()
    torch.set_num_threads(o.threads)
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=o.vocabulary, hidden_size=o.width, intermediate_size=3 * o.width, num_hidden_layers=o.layers, num_attention_heads=o.width // 32,
        num_key_value_heads=max(1, o.width // 64), head_dim=32, max_position_embeddings=o.length + o.tokens, tie_word_embeddings=True, eos_token_id=None,
    )  # fmt: skip
    lm = compat.causal_lm_from_config(config).to(o.device, getattr(torch, o.dtype)).eval()
    if o.lora:
        add_lora(lm, o.lora, 2.0 * o.lora)
    prompts = torch.randint(0, o.vocabulary, (o.prompts, o.length))
    asked = [Prompt(tuple(row), i) for i, row in enumerate(prompts.tolist())]
    sampler = Sampler(lm, None, Sampling(max_tokens=o.tokens), slots=o.prompts * o.samples)
    rows = prompts.repeat_interleave(o.samples, 0).to(o.device)

    def ours() -> None:
        compat.use_attention(lm, "tilt")
        assert all(len(r.tokens) == o.tokens for r in sampler.sample(asked, o.samples, step=0))

    def theirs() -> None:
        compat.use_attention(lm, "sdpa")
        out = lm.generate(rows, attention_mask=torch.ones_like(rows), do_sample=True, top_k=0, max_new_tokens=o.tokens, pad_token_id=0)
        assert out.shape[1] == o.length + o.tokens

    size = sum(p.numel() for p in lm.parameters()) / 1e6
    print(
        f"{size:.2f} M parameters, {o.prompts} prompts of {o.length} tokens × {o.samples} answers of {o.tokens}, {o.device} {o.dtype}, {o.threads} threads"
    )
    table = interleave({"transformers generate": theirs, "tilt": ours}, o.repeat)
    print(f"{'':24}{'ms a step':>12}{'quartiles':>18}{'tokens a second':>18}")
    for name, seconds in table.items():
        low, middle, high = (q * 1000 / o.tokens for q in statistics.quantiles(seconds, n=4))
        print(f"{name:24}{middle:12.2f}{f'{low:.2f} – {high:.2f}':>18}{len(rows) * 1000 / middle:18,.0f}")
    ratio = statistics.median(table["transformers generate"]) / statistics.median(table["tilt"])
    print(f"tilt is {ratio:.2f} × as fast")


def interleave(contestants: dict[str, Callable[[], None]], repeat: int) -> dict[str, list[float]]:
    """Seconds of each run, taken in turns after one warm-up each, so that a busy machine slows all alike."""
    for run in contestants.values():
        run()
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(repeat):
        for name, run in contestants.items():
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            start = time.perf_counter()
            run()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - start)
    return seconds


if __name__ == "__main__":
    main()
