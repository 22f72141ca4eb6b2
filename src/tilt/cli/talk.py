"""`tilt generate` and `tilt chat`: a model from a folder, prompts through its template, answers as they come."""

from __future__ import annotations

import json as json_text
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tilt.data.rendering import Renderer, renderer
from tilt.data.rollouts import Prompt, Rollout, Sampling
from tilt.errors import UsageError
from tilt.models import compat, loading
from tilt.runs import checkpoints
from tilt.runs.text import inert
from tilt.sampling import engine
from tilt.sampling.randomness import keys
from tilt.sampling.sampler import Sampler, check, refuse_long, vocabulary_of
from tilt.sampling.stopping import Stops


@dataclass(frozen=True)
class Speaker:
    """A model that can be asked."""

    lm: Any
    tokenizer: Any
    render: Renderer
    sampling: Sampling

    def text(self, tokens: Sequence[int]) -> str:
        """Tokens as text, special ones left out."""
        return str(self.tokenizer.decode(list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False))


def folder_of(model: str) -> str:
    """A run's directory stands for its last checkpoint."""
    path = Path(os.path.expanduser(model))
    if os.path.isdir(path / "checkpoints") and not os.path.exists(path / "config.json"):
        return str(checkpoints.latest(path / "checkpoints"))
    return model


def speaker(model: str, temperature: float, max_tokens: int) -> Speaker:
    """Load a model and its template; a tokenizer without one is asked in plain text."""
    lm, tokenizer = loading.load(folder_of(model))
    render = renderer(tokenizer, "auto")
    sampling = Sampling(temperature, max_tokens, tuple(render.stop_ids))
    check(sampling, vocabulary_of(lm), training=False)
    return Speaker(lm, tokenizer, render, sampling)


def generate(model: str, prompts: Sequence[str], samples: int, temperature: float, max_tokens: int, seed: int, json: bool) -> None:
    """Print `samples` answers to each prompt; with `json` one object a line."""
    found = speaker(model, temperature, max_tokens)
    asked = [found.render.prompt({"prompt": text}, number) for number, text in enumerate(prompts)]
    sampler = Sampler(found.lm, found.tokenizer, replace(found.sampling, temperature=1.0), seed=seed)
    for rollout in sampler.evaluate(asked, samples, step=0, sampling=found.sampling, stream="generate"):
        _show(rollout, prompts[rollout.prompt.id], found, json, several=len(prompts) * samples > 1)


def _show(rollout: Rollout, prompt: str, found: Speaker, json: bool, several: bool) -> None:
    answer = found.text(rollout.tokens)
    if json:
        record = {
            "prompt": prompt,
            "completion": answer,
            "stop": rollout.stop,
            "tokens": len(rollout.tokens),
            "logprob": sum(rollout.logprobs),
        }
        print(json_text.dumps(record, ensure_ascii=False))
        return
    if several:
        print(f"--- prompt {rollout.prompt.id}, answer {rollout.seed[3]} ({rollout.stop}, {len(rollout.tokens)} tokens)")
    print(inert(answer, newline="\n"))


def chat(model: str, temperature: float, max_tokens: int, seed: int, ask: Callable[[str], str] = input) -> None:
    """Read a line, answer it token by token, until /quit or the end of the input."""
    found = speaker(model, temperature, max_tokens)
    how = "with its chat template" if found.render.chat else "in plain text: it has no chat template, so each line is a prompt of its own"
    print(f"{model}, {how}. /reset /temp T /quit")
    turns: list[dict[str, str]] = []
    number = 0
    while True:
        try:
            line = ask("> ").strip()
        except EOFError:
            return
        if line == "/quit":
            return
        if line == "/reset":
            turns = []
        elif line.startswith("/temp"):
            found = _warmer(found, line)
        elif line.startswith("/"):
            print(f"no command {line.split()[0]}: /reset, /temp T, /quit")
        elif line:
            turns.append({"role": "user", "content": line})
            prompt = found.render.prompt({"prompt": turns if found.render.chat else line}, number)
            answer = _answer(found, prompt, seed, number)
            turns.append({"role": "assistant", "content": answer})
            number += 1


def _warmer(found: Speaker, line: str) -> Speaker:
    try:
        changed = replace(found.sampling, temperature=float(line.removeprefix("/temp")))
        check(changed, vocabulary_of(found.lm), training=False)
    except (ValueError, UsageError):
        print("/temp takes a number, at least 0")
        return found
    print(f"temperature {changed.temperature:g}")
    return replace(found, sampling=changed)


class Watched(Stops):
    """Stop conditions that tell a listener every token of the one answer being written."""

    def __init__(self, found: Speaker, listener: Callable[[list[int]], None]) -> None:
        super().__init__(vocabulary_of(found.lm), found.sampling.stop_ids, found.sampling.stop_strings, found.text)
        self.listener = listener

    def ended(self, tokens: NDArray[np.int64], answer: Callable[[int], list[int]]) -> NDArray[np.bool_]:
        self.listener(answer(0))
        return super().ended(tokens, answer)


def _answer(found: Speaker, prompt: Prompt, seed: int, number: int) -> str:
    """Sample one answer, print it as it grows (a character once all its bytes are there), and return its text."""
    context = compat.context_of(found.lm)
    refuse_long([prompt], context)
    printed = 0

    def listen(tokens: list[int]) -> None:
        nonlocal printed
        text = found.text(tokens)
        whole = text.rstrip("\ufffd")
        sys.stdout.write(inert(whole[printed:], newline="\n"))
        sys.stdout.flush()
        printed = max(printed, len(whole))

    request = engine.Request(
        np.array(prompt.tokens, dtype=np.int64),
        keys(seed, "chat", number, [number], [0]),
        min(found.sampling.max_tokens, context - len(prompt.tokens)),
    )
    answer = engine.generate(found.lm, [request], found.sampling, Watched(found, listen), 1)[0][0]
    text = found.text(answer.tokens)
    print(inert(text[printed:], newline="\n") + ("" if answer.stop == "stop" else "  [cut: max_tokens]"))
    return text
