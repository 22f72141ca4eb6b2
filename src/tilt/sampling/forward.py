"""The model as the engine sees it: hidden states after each prompt, then after each new token; through the slot cache, or recomputed whole."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedModel

from tilt.models import compat
from tilt.models.anatomy import is_common
from tilt.models.attention import Attend
from tilt.sampling import graphs
from tilt.sampling.cache import CHUNK, Decode, Ints, Store, rounded
from tilt.sampling.graphs import Graphs
from tilt.sampling.lean import Lean
from tilt.sampling.prefill import Continue, Prefill

PREFILL_TOKENS = 4096  # prompt tokens in one forward: enough to fill the cores, few enough for the activations to stay small


class Forward(Protocol):
    """Rows of answers in slots 0 … rows - 1, over groups 0 … groups - 1, each with a prompt."""

    def prefill(self, prompts: Sequence[Ints], first: int) -> Tensor:
        """Read prompts in as groups first, first + 1, …; the hidden state after each prompt, [prompts, D]."""
        ...

    def arrange(self, group: Ints) -> None:
        """Row i answers the prompt of group[i]; called when rows or groups have changed."""
        ...

    def decode(self, tokens: Ints, answered: Ints) -> Tensor:
        """Feed row i its token number answered[i]; the hidden state after it, [rows, D]."""
        ...

    def move_rows(self, source: Ints, target: Ints) -> None:
        """Row source[i] becomes row target[i]."""
        ...

    def move_groups(self, source: Ints, target: Ints, kept: int) -> None:
        """Group source[i] becomes group target[i]; the first `kept` remain."""
        ...

    def fits(self, rows: int, longest: int, groups: int, widest: int) -> bool:
        """Whether so many rows with up to `longest` tokens and groups with prompts of up to `widest` may be held; if so there is room for them now."""
        ...


def forward_of(lm: PreTrainedModel, slots: int, places: int | None = None, *, lean: bool = True) -> Forward:
    """The cached forward for a model that runs Tilt's attention, straight from the weights of a common decoder; the recomputed one for any other.

    `places` limits the tokens, of prompts and answers, that keys and values are held for. `lean=False` runs a common decoder through its modules, as every other model: the same numbers, slower.
    """
    body, device = compat.body_of(lm), compat.device_of(lm)
    if not compat.is_packed(lm):
        return Recomputed(body, device)
    if lean and is_common(body):
        return Cached(Lean(body), device, slots, places, graphs.recorder(device))
    return Cached(Modules(body), device, slots, places)


class Body(Protocol):
    """Hidden states [T, D] of one row of tokens at positions below `reach`; the plan decides who sees whom."""

    def __call__(self, tokens: Tensor, positions: Tensor, reach: int, plan: Attend) -> Tensor: ...


class Modules:
    """The body's own modules."""

    def __init__(self, body: nn.Module) -> None:
        self.body = body

    def __call__(self, tokens: Tensor, positions: Tensor, reach: int, plan: Attend) -> Tensor:
        return compat.run_packed(self.body, tokens, positions, plan)


class Cached:
    """Each prompt read once per group, each answer's token read once: two stores of keys and values, one row of new tokens per forward.

    With `make` a lean body's decoding steps are recorded, where its stores may have the sizes that takes (no limit of `places`).
    """

    def __init__(
        self, body: Body, device: torch.device, slots: int, places: int | None = None, make: Callable[[], graphs.Recording] | None = None
    ) -> None:
        self.body, self.device, self.places = body, device, places
        self.prompts, self.answers = (Store(min(slots, 32), 1), Store(slots, CHUNK)) if places is None else (Store(0, 0), Store(0, 0))
        self.plan = Decode(self.prompts, self.answers, device)
        self.lengths = np.zeros(0, dtype=np.int64)
        self.graphs: Graphs | None = None
        if make is not None and isinstance(body, Lean) and places is None:
            self.graphs = Graphs(body, self.prompts, self.answers, device, make)

    def prefill(self, prompts: Sequence[Ints], first: int) -> Tensor:
        lengths = np.array([len(prompt) for prompt in prompts])
        longest = int(lengths.max())
        self.lengths = np.concatenate((self.lengths[:first], lengths))
        self.prompts.reserve(first + len(prompts), longest)
        if longest > PREFILL_TOKENS:
            return torch.cat([self._in_parts(prompt, first + i) for i, prompt in enumerate(prompts)])
        plan = Prefill(self.prompts, first, lengths, self.device)
        return self._run(np.concatenate(prompts), plan.positions, longest, plan)[plan.last]

    def fits(self, rows: int, longest: int, groups: int, widest: int) -> bool:
        if self.places is None:
            return True
        longest, widest = rounded(longest), rounded(widest)
        wanted = (self.answers, rows, longest), (self.prompts, groups, widest)
        if all(r <= store.rows and c <= store.columns for store, r, c in wanted):
            return True
        if rows * longest + groups * widest > self.places:
            return False
        for store, r, c in wanted:
            store.resize(r, c)
        return True

    def _in_parts(self, prompt: Ints, row: int) -> Tensor:
        """A long prompt a part at a time, the parts shorter where much lies before them; the hidden state after it, [1, D]."""
        length = len(prompt)
        part = min(PREFILL_TOKENS, max(PREFILL_TOKENS // 16, PREFILL_TOKENS**2 // length))
        for start in range(0, length, part):
            plan = Continue(self.prompts, row, start, min(start + part, length), self.device)
            hidden = self._run(prompt[plan.start : plan.stop], plan.positions, plan.stop, plan)
        return hidden[-1:]

    def arrange(self, group: Ints) -> None:
        self.plan.arrange(group, self.lengths)
        if self.graphs is not None:
            self.graphs.arrange(group, self.lengths)

    def decode(self, tokens: Ints, answered: Ints) -> Tensor:
        if self.graphs is None:
            return self._step(tokens, answered)
        try:
            found = self.graphs.decode(tokens, answered)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            return self._unrecorded(error, self._step(tokens, answered))
        self.plan.longest = int(answered.max()) + 1
        if self.graphs.fresh:
            plain = self._step(tokens, answered)
            far = graphs.distance(found, plain)
            if not far <= graphs.TOLERANCE.get(plain.dtype, 0.1):
                return self._unrecorded(f"hidden states differ by {far:.1e}", plain)
            self.graphs.again()
        return found

    def _unrecorded(self, why: object, plain: Tensor) -> Tensor:
        """Go on step by step."""
        self.graphs = None
        graphs.refuse(self.device, why)
        return plain

    def _step(self, tokens: Ints, answered: Ints) -> Tensor:
        positions = self.plan.advance(answered)
        return self._run(tokens, positions, int((self.plan.prompt_length + answered).max()) + 1, self.plan)

    def move_rows(self, source: Ints, target: Ints) -> None:
        self.answers.move(source, target, self.plan.longest)

    def move_groups(self, source: Ints, target: Ints, kept: int) -> None:
        self.prompts.move(source, target, self.prompts.columns)
        self.lengths[target] = self.lengths[source]
        self.lengths = self.lengths[:kept]

    def _run(self, tokens: Ints, positions: Tensor, reach: int, plan: Attend) -> Tensor:
        return self.body(torch.from_numpy(tokens).to(self.device), positions, reach, plan)


class Recomputed:
    """No cache: every step reads prompt and answer again, right-padded, which no causal model can see. Slow, and right for any architecture."""

    def __init__(self, body: nn.Module, device: torch.device) -> None:
        self.body, self.device = body, device
        self.prompts: list[NDArray[np.int64]] = []
        self.texts: list[list[int]] = []
        self.group = np.zeros(0, dtype=np.int64)

    def prefill(self, prompts: Sequence[Ints], first: int) -> Tensor:
        self.prompts = [*self.prompts[:first], *prompts]
        return self._last([prompt.tolist() for prompt in prompts])

    def arrange(self, group: Ints) -> None:
        self.group = group
        self.texts = self.texts[: len(group)] + [[] for _ in range(len(group) - len(self.texts))]

    def decode(self, tokens: Ints, answered: Ints) -> Tensor:
        for row, (token, length) in enumerate(zip(tokens.tolist(), answered.tolist(), strict=True)):
            self.texts[row] = [*self.texts[row][:length], token]
        return self._last([self.prompts[group].tolist() + text for group, text in zip(self.group, self.texts, strict=True)])

    def move_rows(self, source: Ints, target: Ints) -> None:
        for here, there in zip(source.tolist(), target.tolist(), strict=True):
            self.texts[there] = self.texts[here]

    def move_groups(self, source: Ints, target: Ints, kept: int) -> None:
        for here, there in zip(source.tolist(), target.tolist(), strict=True):
            self.prompts[there] = self.prompts[here]
        self.prompts = self.prompts[:kept]

    def fits(self, rows: int, longest: int, groups: int, widest: int) -> bool:
        return True  # nothing is held

    def _last(self, texts: list[list[int]]) -> Tensor:
        """Hidden states at the last token of each text."""
        lengths = torch.tensor([len(text) for text in texts])
        padded = torch.zeros(len(texts), int(lengths.max()), dtype=torch.long)
        for row, text in enumerate(texts):
            padded[row, : len(text)] = torch.tensor(text)
        mask = (torch.arange(padded.shape[1]) < lengths[:, None]).long()
        hidden = compat.run_padded(self.body, padded.to(self.device), mask.to(self.device))
        return hidden[torch.arange(len(texts), device=self.device), (lengths - 1).to(self.device)]


class Both:
    """Two models over the same rows and groups, each with a cache of its own; their hidden states side by side, [rows, D + E]."""

    def __init__(self, first: Forward, second: Forward) -> None:
        self.first, self.second = first, second

    def prefill(self, prompts: Sequence[Ints], first: int) -> Tensor:
        return torch.cat((self.first.prefill(prompts, first), self.second.prefill(prompts, first)), -1)

    def arrange(self, group: Ints) -> None:
        self.first.arrange(group)
        self.second.arrange(group)

    def decode(self, tokens: Ints, answered: Ints) -> Tensor:
        return torch.cat((self.first.decode(tokens, answered), self.second.decode(tokens, answered)), -1)

    def move_rows(self, source: Ints, target: Ints) -> None:
        self.first.move_rows(source, target)
        self.second.move_rows(source, target)

    def move_groups(self, source: Ints, target: Ints, kept: int) -> None:
        self.first.move_groups(source, target, kept)
        self.second.move_groups(source, target, kept)

    def fits(self, rows: int, longest: int, groups: int, widest: int) -> bool:
        return self.first.fits(rows, longest, groups, widest) and self.second.fits(rows, longest, groups, widest)
