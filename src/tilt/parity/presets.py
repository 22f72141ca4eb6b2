"""The presets: a row, the quirks of the library it is named after, and that library's defaults."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

from tilt.objectives import (
    GAE,
    K3,
    PREFERENCES,
    Clip,
    GroupRelative,
    NoPenalty,
    Objective,
    Preference,
    ProductRatio,
    SequenceAverage,
    TokenAverage,
    TokenRatio,
    ValueLoss,
)
from tilt.parity.pieces import dressed
from tilt.parity.quirks import Quirks


@dataclass(frozen=True)
class Preset:
    """A row of the table as one library computes it: its quirks on top of the row, its defaults as settings of `tilt rl`, and what a run still
    does differently on purpose, as (what the library does, what the run does)."""

    row: Objective
    quirks: Quirks
    settings: Mapping[str, Any]
    source: str
    corrections: tuple[tuple[str, str], ...]

    def objective(self, row: Objective, width: int, switched: Mapping[str, bool]) -> Objective:
        """This preset's quirks, some of them switched, on a row of its kind, for answers of at most `width` tokens."""
        return dressed(row, width, replace(self.quirks, **switched))


TRL = Quirks(
    score_after_last=True, critic_after_last=True, micro_batch_means=True, pads_in_entropy=True, window_means=True, variance_of_means=True
)  # fmt: skip
TRL_RUN = {"passes": 4, "minibatches": 1, "sampling": {"temperature": 0.7, "max_tokens": 53}, "optimizer": {"clip_norm": 0.0}}
TRL_CORRECTIONS = (
    (
        "samples all `response_length` tokens with the stop token disabled, then cuts behind the first one",
        "generation ends at the stop token",
    ),
    ("val/num_eos_tokens counts stop tokens of the text before it is cut", "val/num_eos_tokens counts answers that ended by themselves"),
    (
        "policy/entropy_avg is over all positions, pads included",
        "no parity/policy/entropy_avg: pads have no distribution here; policy/entropy_avg is over actions",
    ),
    (
        "the loss is a mean over each micro-batch",
        "weights are fixed on the whole batch; the same where one micro-batch holds a mini-batch, as by default",
    ),
    ("whitening, means and counts are of one process", "of the whole batch"),
    ("the learning rate changes once a batch", "once an optimizer step"),
    ("divides logits by temperature + 1e-7", "by the temperature"),
    ("one optimizer over policy and value model", "one each with the same settings; the same without gradient clipping"),
    ("drops the value model at the end, and cannot resume", "saves the critic beside the policy"),
)
NO_CRITIC = tuple(pair for pair in TRL_CORRECTIONS if "value model" not in pair[0])

# fmt: off
PRESETS: Mapping[str, Preset] = MappingProxyType({
    "ppo_trl_0_12": Preset(
        Objective(GAE(1.0, 0.95, 0.05), TokenRatio(), Clip(0.2, 0.2), TokenAverage(), NoPenalty(), ValueLoss(0.1, 0.2)),
        TRL, TRL_RUN | {"samples": 1}, "TRL 0.12.1, PPOTrainer", TRL_CORRECTIONS),
    "rloo_trl_0_12": Preset(
        Objective(GroupRelative("leave_one_out", "none", kl=0.05), ProductRatio(), Clip(0.2, 0.2), SequenceAverage()),
        Quirks(micro_batch_means=True, pads_in_entropy=True, window_means=True, sequence_statistics=True, variance_of_means=True),
        TRL_RUN | {"samples": 2}, "TRL 0.12.1, RLOOTrainer", NO_CRITIC),
    "grpo_trl_fork": Preset(
        Objective(GroupRelative("mean", "group_std"), TokenRatio(), Clip(0.2, 0.2), TokenAverage(), K3(0.05)),
        Quirks(micro_batch_means=True, clamped_std=True, pads_in_entropy=True, window_means=True, window_clipfrac=True, variance_of_means=True,
               normalised_reward=True),
        TRL_RUN | {"samples": 4, "sampling": {"temperature": 0.7, "max_tokens": 53, "top_k": 50, "top_p": 0.9, "keep_sets": True}},
        "saisurbehera/trl, branch grpo at 15614a0",
        (("the rollout's log-probabilities are of the truncated distribution, the policy's and the reference's of the whole one: the ratio starts away from 1",
          "policy, old and reference are scored within the set that each token was chosen among: the ratio starts at 1"),
         ("sampling_strategy, top_p, top_k and temperature have no effect", "`sampling` has"), *NO_CRITIC)),
    "ppo_deepspeed_chat": Preset(
        Objective(GAE(1.0, 0.95, 0.1, 5.0, False), TokenRatio(), Clip(0.2, 0.2), TokenAverage(), NoPenalty(), ValueLoss(1.0, 0.2)),
        Quirks(stop_is_pad=True, score_after_last=True, kl_after_last=True, micro_batch_means=True),
        {"passes": 1, "minibatches": 1, "prompts": 16, "samples": 1, "critic_lr": 5e-6, "sampling": {"max_tokens": 256},
         "optimizer": {"lr": 9.65e-6, "schedule": "cosine", "warmup": 100, "betas": (0.9, 0.95), "clip_norm": 1.0}},
        "DeepSpeedExamples 83757d9, step 3",
        (("answers are greedy unless the checkpoint says otherwise", "answers are sampled: old and sampler are one policy, and the KL estimate holds"),
         ("dropout is active when experience is scored", "no model drops anything"),
         ("answers of one token or none are dropped; if none is left the last experience is used again", "they are scored as they are"),
         ("the loss is a mean over each micro-batch", "weights are fixed on the whole batch; the same where one micro-batch holds it"),
         ("an answer whose stop token fills the last slot leaves it untrained", "there the stop token is trained: the window knows lengths, not token ids"),
         ("pad = eos or not decides by the tokenizer", "stop_is_pad decides"))),
})
# fmt: on


@dataclass(frozen=True)
class PairPreset:
    """A row on pairs, the library's defaults as settings of the recipe that trains it, and what a run does differently on purpose."""

    row: Preference
    settings: Mapping[str, Any]
    source: str
    corrections: tuple[tuple[str, str], ...]


DEEPSPEED_STEP = {"schedule": "cosine", "warmup": 0, "weight_decay": 0.0, "betas": (0.9, 0.95), "clip_norm": 1.0}

PAIR_PRESETS: Mapping[str, PairPreset] = MappingProxyType({
    "rm_deepspeed_chat": PairPreset(
        PREFERENCES["rm_deepspeed_chat"], {"epochs": 1.0, "batch": 16, "optimizer": {"lr": 5e-5, **DEEPSPEED_STEP}}, "DeepSpeedExamples 83757d9, step 2",
        (("skips num_padding_at_beginning pads before it looks for the end of an answer", "an answer ends where it ends: nothing is padded in front"),
         ("an equal pair is compared at the last position of the padded row", "at the last token of the answer; it costs log 2 either way"))),
    "dpo_deepspeed_chat": PairPreset(
        PREFERENCES["dpo"], {"epochs": 1.0, "batch": 16, "optimizer": {"lr": 1e-3, **DEEPSPEED_STEP}}, "DeepSpeedExamples 83757d9, the DPO step",
        (("leaves the common beginning of the two answers out of their log-probabilities, so the rewards it reports differ; the loss does not",
          "sums the whole answer"),
         ("its evaluation reports the rewards of the last batch alone", "of all held-out pairs"),
         ("the learning rate is 1e-3, its scripts use 5e-5", "the default stands; set optimizer.lr"))),
})  # fmt: skip
