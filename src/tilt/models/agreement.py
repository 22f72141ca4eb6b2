"""The self-check of a loaded model: packed rows give what the plain forward of each sequence gives, or the model runs padded."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tilt import linear_head
from tilt.data.packing import Pack, pack
from tilt.data.rollouts import Prompt, Rollout
from tilt.errors import UsageError
from tilt.models import compat
from tilt.models.attention import NAME
from tilt.models.heads import head_function, hidden_states

TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3}
"""Largest difference per dtype, in units of the largest deviation from the mean over the texts; half precision is judged by 0.1."""


def settle(lm: PreTrainedModel) -> None:
    """Switch a fresh causal LM or classifier to packed rows where they are exact, else leave it on padded batches; `note` tells which.

    Two prompts, four answers (one of one token), windows cut to 3, are scored in every way. A model whose padded forward
    disagrees as well is refused: Tilt does not know its head.
    """
    plain = compat.attention_of(lm)
    with (
        torch.no_grad(),
        _short_windows(lm),
        linear_head.plain(),
    ):  # the modules are judged; what is computed straight from weights is known
        trial = _trial(compat.text_config(lm).vocab_size).to(compat.device_of(lm))
        try:
            truth = _plain(lm, trial)
        except ValueError:  # sdpa refuses soft-capped scores
            plain = "eager"
            compat.use_attention(lm, plain)
            truth = _plain(lm, trial)
        chunked = "it cuts attention into chunks" if compat.chunked_attention(lm) else ""
        failure = chunked or _try(lm, trial, truth, NAME)
        if not failure:
            return
        padded_failure = _try(lm, trial, truth, plain)
    if padded_failure:
        raise UsageError(
            f"Tilt cannot score {type(lm).__name__}: its own forward gives other log-probabilities ({padded_failure}).\n"
            "Its vocabulary head has a step that Tilt does not know. Choose another model, or teach tilt.models.heads.head_function the step."
        )
    lm.tilt_note = f"{type(lm).__name__} runs on padded batches, each prompt once per answer (packed rows: {failure})"  # type: ignore[assignment]


def note(model: PreTrainedModel) -> str:
    """The line for the run's beginning when a model runs padded; empty when it runs packed."""
    return str(getattr(model, "tilt_note", ""))


def _try(lm: PreTrainedModel, trial: Pack, truth: Tensor, implementation: str) -> str:
    """Why log-probabilities under this implementation are not the plain ones; empty where they are."""
    compat.use_attention(lm, implementation)
    if compat.attention_of(lm) != implementation:
        return "its attention cannot be exchanged"
    try:
        found = _judged(lm, hidden_states(lm, trial)[trial.predictors])
    except (UsageError, TypeError, ValueError, AttributeError, AssertionError, RuntimeError, IndexError) as error:
        return str(error).splitlines()[0][:200] if str(error) else type(error).__name__
    worst = float((found - truth).abs().max())
    spread = float((truth - truth.mean(0)).abs().max())
    return "" if worst <= TOLERANCE.get(compat.dtype_of(lm), 0.1) * spread else f"log-probabilities differ by {worst:.1e}"


def _judged(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    """What is compared: a causal LM's log-probabilities [A, V]; a classifier's hidden states over their largest entry [A, D]."""
    if compat.head_of(model) is None:
        return hidden.double() / hidden.double().abs().max()
    return torch.log_softmax(head_function(model)(hidden).double(), -1)


def _plain(lm: PreTrainedModel, trial: Pack) -> Tensor:
    """What `_judged` should give, from one ordinary forward call per sequence, no padding."""
    rows = []
    for s, own in enumerate(trial.own.tolist()):
        start, length, parent = int(trial.segments.start[own]), int(trial.segments.length[own]), int(trial.segments.parent[own])
        above = range(int(trial.segments.start[parent]), int(trial.segments.start[parent] + trial.segments.length[parent]))
        text = trial.tokens[list(above) + list(range(start, start + length))]
        actions = int(trial.layout.lengths[s])
        if compat.head_of(lm) is None:
            rows.append(compat.body_of(lm)(input_ids=text[None], use_cache=False).last_hidden_state[0, -actions - 1 : -1])
        else:
            rows.append(lm(input_ids=text[None], use_cache=False).logits[0, -actions - 1 : -1])
    whole = torch.cat(rows)
    return _judged(lm, whole) if compat.head_of(lm) is None else torch.log_softmax(whole.double(), -1)


def _trial(vocabulary: int) -> Pack:
    """Two prompts of 7 and 3 random tokens with answers of 5, 1, 3 and 6."""
    generator = torch.Generator().manual_seed(0)

    def draw(n: int) -> tuple[int, ...]:
        return tuple(torch.randint(0, vocabulary, (n,), generator=generator).tolist())

    first, second = Prompt(draw(7), 0), Prompt(draw(3), 1)
    return pack([Rollout.demonstration(p, draw(n)) for p, n in ((first, 5), (first, 1), (first, 3), (second, 6))])


@contextmanager
def _short_windows(lm: PreTrainedModel) -> Iterator[None]:
    """Every sliding window cut to 3, so that a few tokens show whether windows are honoured."""
    holders = [x for x in [compat.text_config(lm), *lm.modules()] if isinstance(getattr(x, "sliding_window", None), int)]
    widths = [x.sliding_window for x in holders]
    for holder in holders:
        holder.sliding_window = 3  # type: ignore[union-attr]
    try:
        yield
    finally:
        for holder, width in zip(holders, widths, strict=True):
            holder.sliding_window = width  # type: ignore[union-attr]
