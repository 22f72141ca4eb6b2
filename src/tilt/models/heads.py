"""From hidden states to vocabulary scores, with each architecture's scales and caps; and from a pack to hidden states."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TypeGuard

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tilt.data.packing import Pack
from tilt.linear_head import LinearHead
from tilt.models import compat, flex, straight
from tilt.models.padded import Padded

Head = Callable[[Tensor], Tensor]


def hidden_states(model: PreTrainedModel, pack: Pack, at: Tensor | None = None) -> Tensor:
    """Last hidden state of every token of the pack, [T, D], or of the tokens `at`, [N, D]: of a shared prompt only the last one may be among them.

    One packed row, straight from the weights where the architecture is known so well; or a padded batch where it needs one.
    """
    body = compat.body_of(model)
    if compat.is_packed(model) and straight.fits(body):
        return straight.hidden(body, pack.tokens, pack.positions, pack.segments, at)
    if compat.is_packed(model):
        every = compat.run_packed(body, pack.tokens, pack.positions, flex.plan(pack.segments))
    else:
        batch = Padded.of(pack)
        every = compat.run_padded(body, batch.tokens, batch.mask).flatten(0, 1)[batch.place]
    return every if at is None else every[at]


def head_function(lm: PreTrainedModel, layer: nn.Module | None = None) -> Head:
    """Hidden states [N, D] → vocabulary scores [N, V], as this architecture computes them, by the model's own layer or another.

    cohere: logits · logit_scale; granite: logits / logits_scaling; falcon-h1: logits · lm_head_multiplier; gemma: cap · tanh(logits / cap).
    """
    config = compat.text_config(lm)
    scale = 1.0
    for name, inverted in (("logit_scale", False), ("logits_scaling", True), ("lm_head_multiplier", False)):
        value = getattr(config, name, None)
        if value is not None:
            scale = scale / float(value) if inverted else scale * float(value)
    cap = getattr(config, "final_logit_softcapping", None) or getattr(config, "logits_soft_cap", None)
    given = compat.head_of(lm) if layer is None else layer
    if cap is None and _is_matrix(given):
        return LinearHead(given, scale)

    def head(hidden: Tensor) -> Tensor:
        logits = given(hidden)
        logits = logits if scale == 1.0 else logits * scale
        return logits if cap is None else cap * torch.tanh(logits / cap)

    return head


def _is_matrix(layer: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether a layer is nothing but its weights: no bias, adapter, quantisation, hook or parametrisation."""
    hooks = layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks
    return type(layer) is nn.Linear and layer.bias is None and not hooks


def frozen_head(lm: PreTrainedModel) -> Head:
    """The head as it is now, whatever training does: by a copy of its layer where that is trained."""
    layer = compat.head_of(lm)
    if any(p.requires_grad for p in layer.parameters()):
        layer = copy.deepcopy(layer).requires_grad_(False)
    return head_function(lm, layer)
