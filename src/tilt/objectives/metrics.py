"""What a batch of experience says about itself, and the glossary: one line per metric."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from tilt.objectives.credit import earned, settled
from tilt.objectives.experience import Rewards, Signals
from tilt.objectives.objective import Metrics
from tilt.segments import Layout, group_count, group_flat, segment_sum


@torch.no_grad()
def batch_metrics(rewards: Rewards, signals: Signals, layout: Layout, *, kl: float) -> Metrics:
    """Metrics of a whole batch before its update, as (sum, weight); `kl` is the coefficient of the KL in the reward.

    A pair of weight 0 was not measured: nobody asked for its signal. Rewards are over scored sequences.
    """
    drift = segment_sum(signals.old - signals.reference, layout)
    clean, _ = settled(rewards, signals, layout)
    score, scored = earned(clean, layout), clean.scored
    found = {
        "objective/kl": _mean(drift),
        "objective/entropy": _mean(-segment_sum(signals.old, layout)),
        "objective/non_score_reward": _mean(-kl * drift if kl else torch.zeros_like(drift)),
        "objective/rlhf_reward": _mean(torch.where(scored, score - kl * drift if kl else score, torch.nan)),
        "objective/scores": _mean(torch.where(scored, score, torch.nan)),
        "objective/scores_std": _std(torch.where(scored, score, torch.nan)),
        "objective/unscored": ((~scored).sum().to(score), score.new_tensor(layout.sequences)),
        "length/mean": _mean(layout.lengths.to(score)),
    }
    for name, part in rewards.parts.items():
        found[f"reward/{name}"] = _mean(part.to(score))
        found[f"reward/{name}_std"] = _std(part.to(score))
    several = group_count(layout, scored) > 1
    found["groups/zero_variance"] = ((group_flat(score, layout, scored) & several).sum().to(score), several.sum().to(score))
    return found


def _mean(x: Tensor) -> tuple[Tensor, Tensor]:
    """Sum and number of the entries that are not NaN."""
    return x.nansum(), (~x.isnan()).sum().to(x)


def _std(x: Tensor) -> tuple[Tensor, Tensor]:
    """Standard deviation (divisor n) of the entries that are not NaN, times n, and n."""
    total, count = _mean(x)
    away = torch.where(x.isnan(), 0, x - total / count)
    return torch.where(count > 0, (away.square().sum() / count).sqrt() * count, 0), count


GLOSSARY: Mapping[str, str] = MappingProxyType(
    {
        "loss": "The loss summed over the batch, penalty and value term included. No healthy range: it need not fall in RL. NaN stops the run; read the reward instead.",
        "kl": "Mean over answers of sum_t (old - reference), nats. Grows slowly from 0; if it runs away, raise kl or beta or lower the learning rate.",
        "reward": "Mean reward of the scored answers, those of dropped groups included. Should rise; believe `eval/reward` before it.",
        "entropy": "Mean exact entropy of the policy over actions, nats. Falls slowly; near 0 exploration is over: raise temperature or the upper clip, or stop earlier.",
        "grad_norm": "Norm of the gradient before clipping. Steady within a factor of ten; spikes ask for a lower learning rate, exact 0 for a reward that varies.",
        "critic/grad_norm": "Norm of the critic's gradient before clipping. As for `grad_norm`.",
        "lr": "Learning rate of the policy at this step. Follows the schedule; check it first when nothing moves.",
        "objective/kl": "Mean over answers of sum_t (old - reference), nats: distance from the reference. Starts at 0; stay under the cap you state for the run.",
        "objective/entropy": "Mean over answers of sum_t -old: surprise of the sampled answers, nats, so it grows with length. A collapse to 0 means one answer: lower the learning rate.",
        "objective/non_score_reward": "Mean of -kl * sum_t (old - reference): what the KL in the reward costs. Small beside the scores; if it dominates, lower kl.",
        "objective/rlhf_reward": "Mean of score plus non-score reward: what the policy is trained on. Should rise; if scores rise and this falls, the KL grows too fast.",
        "objective/scores": "Mean reward of the scored answers. Should rise; compare with held-out evaluation, and read samples when it rises too easily.",
        "objective/scores_std": "Standard deviation of the reward over the batch. Above 0; at 0 there is nothing to learn from: mix prompts or raise the temperature.",
        "objective/unscored": "Share of answers that the reward could not score. Near 0; they train nothing: look at them in the sample table.",
        "reward/<part>": "Mean of one part of the reward before its weight. Watch which part the policy finds first; a part that falls is being traded away.",
        "reward/<part>_std": "Standard deviation of that part over the batch. A part that no longer varies teaches nothing.",
        "reward/missing_stop": "With missing_stop_penalty: minus the share of answers that did not end by themselves. Near 0; else raise max_tokens or the penalty.",
        "reward/<part>_running_mean": "With normalise: mean of every score of this part that training has seen, taken off each. Follows the scores slowly.",
        "reward/<part>_running_std": "With normalise: their standard deviation, by which each is divided. Above 0; near 0 the part teaches nothing, and noise becomes loud.",
        "reward/<part>_seconds": "Seconds that this part of the reward took. Small beside time/generate; else the reward is what you wait for.",
        "reward/<part>_failed": "Answers on which this part failed (on_error zero or skip). 0; else read the note in log.txt.",
        "groups/zero_variance": "Share of prompts whose answers all earned the same: they give no group-relative signal. Under a half; else prompts are too easy or too hard.",
        "groups/kept": "With keep.mixed: prompts whose answers earned differently and are trained on. Near `prompts`; when fewer, raise keep.draws or change the mix of prompts.",
        "groups/drawn": "With keep.mixed: prompts asked for the step. Up to twice `prompts`; far more means that most are too easy or too hard.",
        "length/mean": "Mean number of actions of an answer. Drifts with the task; steady growth with flat reward is padding: check the average and the length reward.",
        "length/truncated": "Share of answers cut at max_tokens. Under 0.1; else raise max_tokens or reward stopping.",
        "policy/approxkl_avg": ".5 mean (logprobs - old)^2 over actions and updates: how far this batch moved the policy. Below about 0.02; else fewer passes or a lower learning rate. Exactly 0 on a first update.",
        "policy/clipfrac_avg": "Share of actions (sequences, for sequence ratios) whose gradient the clip cut or capped. 0 on a first update, then below about 0.2; above it lower the learning rate.",
        "policy/clipfrac_low": "The part of the clip fraction with the ratio too low (Adv < 0). Much larger than the high part: bad answers are pushed down fast.",
        "policy/clipfrac_high": "The part with the ratio too high (Adv > 0, or beyond the cap). Large while entropy falls: raise the upper clip.",
        "policy/clipped": "Actions whose gradient the clip cut or capped at their last visit in this batch. 0 on a first update; equals the marks of `clip` on the token page.",
        "policy/entropy_avg": "Exact entropy of the policy, mean over actions, nats. As for `entropy`; absent where it was not computed.",
        "policy/penalty_avg": "Mean penalty taken off the gain, beta included. Small beside the spread of the advantages; else lower beta.",
        "policy/kl_reference": "Exact KL(policy || reference) of the states, mean over actions, nats. Grows slowly from 0; if it runs away raise beta.",
        "policy/kl_old": "Exact KL(old || policy) of the states after the batch's last step, mean over actions, nats. About the target of its controller; else raise or lower beta.",
        "trpo/kl": "Exact KL(old || policy) after the natural step, mean over actions, nats. Between a third of the limit and the limit; 0 where no step was accepted.",
        "trpo/improvement": "Rise of the surrogate by the natural step. Above 0; shrinking towards 0 with the reward flat, the batch has nothing left to teach: ask more prompts.",
        "trpo/backtracks": "How often the line search shortened the step. 0 to 2; at `backtracks` nothing was accepted and the weights are what they were: raise damping or the batch.",
        "trpo/cg_residual": "|g - (F + damping) x| / |g| after the conjugate gradients. Below about 0.3; above it raise iterations or damping.",
        "policy/correction_avg": "Mean factor of the corrections over actions. Near 1 where sampler and learner agree; the kept share for masks.",
        "kl_coefficient": "What the KL divergence is multiplied with at this step. Moves only under a controller; a steady climb says that the policy runs away.",
        "entropy_coefficient": "What the entropy bonus is multiplied with at this step. Moves only under a controller.",
        "loss/policy_avg": "The policy part of the loss, penalty included. On a first update of whitened or centred advantages near 0; not a measure of progress.",
        "loss/value_avg": "The critic's loss before its coefficient. Falls early, then follows the rewards; if it stays high raise the critic's learning rate.",
        "val/clipfrac_avg": "Share of actions on which value clipping decides. Below about 0.2; more means that the critic is too slow: widen the clip or add passes.",
        "val/ratio": "Mean ratio policy / old over actions. 1 on a first update, then within a few percent; else passes reach too far.",
        "val/ratio_spread": "Mean (ratio - 1)^2 over actions. 0 on a first update; growth over passes shows how much of the batch is off-policy.",
        "val/first_gap": "Mean |probability - probability under old| before the batch's first update. 0; anything else says that old was computed differently: the run stops above guards.old at its first update, above max_mismatch later.",
        "val/reference_gap": "Mean |probability - probability under the reference| at the first update, where the reference is a copy of the policy as it starts. 0; else it is no copy: the run stops above guards.reference.",
        "val/num_eos_tokens": "Answers that ended by themselves, with a stop token. Near all of them; else raise max_tokens or reward stopping.",
        "sampler/logprob_gap_mean": "Mean |old - sampler| over actions, nats. Under 0.01 in float32, 0.05 in bf16; above it the sampler and the learner disagree: check precision and temperature.",
        "sampler/logprob_gap_max": "Largest |old - sampler|. Under 0.1 in float32; single large gaps point to a wrong position, mask or stop token.",
        "sampler/probability_gap_mean": "Mean |probability under the learner - under the sampler| before the batch's first update. Under 1e-5 in float32, 0.005 in bfloat16; above it read the diagnosis, and at max_mismatch the run stops.",
        "sampler/kept_mean": "Mean number of tokens that a sampled token was chosen among, of those that were not chosen from the whole vocabulary. It falls with the entropy; at 1 there is nothing left to learn from: widen top_k, top_p or min_p, or refresh the mask more often.",
        "pretrain/nll": "Mean negative log-likelihood of the pretraining texts of each step, nats a token, before its coefficient; not part of `loss`. Should not rise; if it does, raise pretrain_coefficient.",
        "parity/<metric>": "The metric of this name as the library of a parity preset computes it, over padded windows; docs/parity.md. For comparing with its logs: believe the metric without the prefix.",
        "preference/loss": "Mean loss of the pairs, or of labelled answers. log 2 = 0.693 at indifference for logistic rows; should fall on held-out pairs, else stop: it overfits.",
        "preference/accuracy": "Share of pairs whose chosen answer has the larger reward (a tie counts half); of labelled answers, share on the right side of the baseline. Above 0.5; 1.0 in training with 0.6 held out is memorising.",
        "preference/margin": "Mean reward of chosen less rejected. Grows from 0; very large margins mean over-confidence: add label smoothing or stop.",
        "preference/rewards/chosen": "Mean reward of chosen answers (DPO: beta log policy / reference). If it falls with the margin growing, good answers become unlikely too: lower the learning rate.",
        "preference/rewards/rejected": "Mean reward of rejected answers. Falls; a collapse to large negative numbers asks for a larger beta.",
        "preference/baseline": "Reward that separates good answers from bad ones (KTO: beta KL from mismatched answers; BCO: running mean). Near 0 at first; steady growth is drift from the reference: raise beta.",
        "skipped": "Steps skipped because no group was left to learn from. Near 0; else prompts are too easy or too hard.",
        "skipped/total": "Skipped steps so far. Small beside the steps taken.",
        "sequences/trained": "Answers that could move the weights at this step. Close to prompts times samples; few mean that most groups earned the same.",
        "episode": "Answers sampled so far. Counts up; the axis on which runs of different batch sizes compare.",
        "eps": "Answers a second of this step. Steady; it falls as answers grow.",
        "tokens_per_second": "Sampled tokens per second of the whole step. Steady; a slow decline is growing answers.",
        "time/generate": "Seconds spent sampling. Usually the largest part; shorten with fewer tokens or larger batches.",
        "time/reward": "Seconds spent on rewards. Small for rules; a slow judge or function shows here.",
        "time/evaluate": "Seconds spent scoring under old, reference and critic. Below the update; 0 where a row needs none.",
        "time/update": "Seconds spent on passes over the batch. Grows with passes; larger micro-batches help until memory is full.",
        "time/publish": "Seconds spent handing weights to the sampler. Near 0 in one process.",
        "time/step": "Seconds of the whole step, evaluation left out. The sum of its parts; what is missing is bookkeeping.",
        "eval/reward": "Mean reward of answers to held-out prompts. The number to believe; flat while `reward` rises means memorised prompts.",
        "eval/reward_std": "Standard deviation of the reward over held-out answers. Above 0 while there is something left to learn.",
        "eval/reward_se": "Standard error of eval/reward, prompts taken as independent. Differences below twice this are noise: ask more prompts.",
        "eval/reward/<part>": "Mean of one part of the reward on held-out answers. As for `reward/<part>`.",
        "eval/reward/<part>_std": "Its standard deviation over held-out answers. As for `reward/<part>_std`.",
        "eval/measure/<part>": "Mean of a reward that is measured and never trained on. Should rise with eval/reward; if it falls, the reward is being gamed.",
        "eval/measure/<part>_std": "Its standard deviation over held-out answers. The unit in which a rise is judged.",
        "eval/kl": "Estimated KL(policy || reference) of whole held-out answers, nats. Grows slowly from 0; stay under the cap you state.",
        "eval/kl_first": "With reference_update: estimated KL(policy || first reference) of whole held-out answers, nats. The distance from where the run began; eval/kl is to the reference as it stands.",
        "reference/distance": "With reference_update: norm of the change of the reference's weights since the run began, over their norm. Grows slowly; a jump is a reset.",
        "eval/pretrain_nll": "Negative log-likelihood of held-out pretraining texts, nats a token. Near its first value; a rise is what the policy forgets.",
        "eval/pretrain_perplexity": "exp of eval/pretrain_nll. As for it.",
        "eval/ema_reward": "eval/reward of the moving average of the weights, at the run's end. Near eval/reward or above it; far below, the decay is too slow for so few steps.",
        "eval/ema_kl": "eval/kl of the moving average of the weights. At most about eval/kl.",
        "eval/length": "Mean number of tokens of a held-out answer. As for `length/mean`.",
        "eval/truncated": "Share of held-out answers cut at max_tokens. Under 0.1; else raise max_tokens or reward stopping.",
        "eval/distinct_2": "Different word pairs over all word pairs of the held-out answers, one to each prompt; the mean of that where there are several. A fall below 0.8 of its first value is collapse onto few phrases.",
        "eval/nll": "Negative log-likelihood of held-out given answers, nats a token. Should fall; when it rises while loss falls, stop: it overfits.",
        "eval/perplexity": "exp of eval/nll. Read it as the number of equally likely tokens to choose from.",
        "eval/ends": "Share of held-out given answers after which the policy finds a stop token the likeliest. Near 1 after SFT; else sampled answers run on.",
        "eval/first_wrong": "Share of held-out answers whose first wrong step the process reward model finds, or that it finds faultless where they are. Above 0.9 before a policy is trained on it.",
        "eval/located": "The same share among answers with a wrong step. If `eval/cleared` is high and this low, it calls everything right: label more wrong steps.",
        "eval/cleared": "Share of the faultless held-out answers in which the process reward model finds no wrong step. If this is low, it calls good steps wrong: train longer.",
    }
)
