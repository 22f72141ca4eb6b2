"""One step of a policy row, number by number: every value comes from the function that an update calls."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from tilt.distributions import k1, logprobs
from tilt.inspect.entries import Entry, Notebook
from tilt.inspect.fixtures import EXAMPLE_CHOICES, EXAMPLE_DISTRIBUTIONS, EXAMPLE_TOKENS, Batch
from tilt.inspect.trust_region import trace_step
from tilt.objectives import (
    GAE,
    Clip,
    Experience,
    GeometricRatio,
    GeometricTokenRatio,
    GroupRelative,
    Imitate,
    Importance,
    NoPenalty,
    NoRatio,
    Objective,
    Outputs,
    ProductRatio,
    ReturnToGo,
    Rewards,
    Signals,
    TokenAverage,
    TokenRatio,
    TrustRegion,
    ValueLoss,
    batch_metrics,
)
from tilt.objectives.card import words
from tilt.objectives.credit import earned, settled, shaped
from tilt.segments import Layout, group_mean, group_std, segment_mean, segment_sum

PAPERS: Mapping[type, str] = {
    GAE: "1506.02438; 000:161-169, 001:3-11",
    GroupRelative: "2402.03300 eq. 3, 2402.14740; 003:245 (there without /std), 003:212-216, 000:237-245 (there over the whole batch), 000:259-261",
    ReturnToGo: "Williams 1992; 002:93-103",
    TokenRatio: "1707.06347; 003:246, 003:257-259, 000:183",
    ProductRatio: "2402.14740 with the ratio of TRL 0.12.1; 003:190",
    GeometricRatio: "2507.18071; 003:262-269 (a geometric mean, not an arithmetic one)",
    GeometricTokenRatio: "2507.18071; 003:273",
    Clip: "1707.06347; 003:247, 000:188-190, 001:23-24, 002:191-211",
    ValueLoss: "1707.06347; 000:231-233, 004:253-265 (the target is Adv + V)",
}


def source_of(piece: object) -> str:
    """The paper and the lines of the notes for a piece."""
    return PAPERS.get(type(piece), "docs/algorithms.md")


def trace(row: Objective, batch: Batch) -> list[Entry]:
    """Every intermediate number of one step of this row on a batch, in the order in which an update computes them."""
    note = Notebook()
    layout, signals, outputs = batch.layout, batch.signals, batch.outputs
    note("answers to each prompt", "G", Layout.of, "2402.03300; 003:168", torch.bincount(layout.prompt).to(signals.old), "prompt")
    note.stage = "responses"
    note("length", "n_i, the stop token included", segment_sum, "004:94; 003:238", layout.lengths.to(signals.old), "answer")
    if "sampler" in row.needs:
        note(
            "sampler",
            "log-probability of each token when it was sampled",
            "tilt.sampling.sampler:Sampler.sample",
            "003:238",
            signals.sampler,
            "action",
        )
    note.stage = "experience"
    _signals(note, row, batch)
    experience = _credit(note, row, batch)
    note.stage = "update"
    _update(note, row, outputs, experience)
    if isinstance(row.penalty, TrustRegion):
        trace_step(note, row, experience, row.penalty)
    _variants(note, row, batch)
    return note.entries


def _signals(note: Notebook, row: Objective, batch: Batch) -> None:
    """What the reward model, the old policy, the reference and the critic say."""
    layout, signals = batch.layout, batch.signals
    if row.credit != Imitate():
        note(
            "R",
            "score of each answer",
            "tilt.models.policy:RewardModel.forward",
            "001:43, 004:217-219",
            earned(settled(batch.rewards, signals, layout)[0], layout),
            "answer",
        )
    if "old" in row.needs:
        note("old", "log p_old(token | tokens before it)", logprobs, "003:160, 004:150", signals.old, "action")
    if "reference" in row.needs:
        note("reference", "log p_reference(token | tokens before it)", logprobs, "003:144-158, 004:151", signals.reference, "action")
        whole = segment_sum(signals.reference, layout)
        note("reference of the answer", "sum_t log p_reference", segment_sum, "003:158", whole, "answer")
        note(
            "k1",
            "u_t = old - reference",
            k1,
            "004:153-168 (the similarity there is -k1), 001:46",
            k1(signals.old - signals.reference),
            "action",
        )
    if "values" in row.needs:
        note(
            "V",
            "value of the state before each token",
            "tilt.models.policy:Critic.forward",
            "004:172-215, 000:200",
            signals.values,
            "action",
        )


def _credit(note: Notebook, row: Objective, batch: Batch) -> Experience:
    """From rewards to advantages, returns and weights."""
    layout, credit = batch.layout, row.credit
    rewards, signals = settled(batch.rewards, batch.signals, layout)
    kl = getattr(credit, "kl", 0.0)
    if isinstance(credit, GAE | ReturnToGo) or kl:
        paid = shaped(rewards, signals, layout, kl)
        note(
            "r",
            f"-{kl:g} (old - reference)_t, and R on the last action" if kl else "R on the last action",
            shaped,
            "001:47, 000:211-217",
            paid,
            "action",
        )
    if isinstance(credit, GAE):
        plain = replace(credit, whitened=False)
        for name, formula, piece in (
            ("delta", f"r_t + {credit.gamma:g} V_(t+1) - V_t", replace(plain, lam=0.0)),
            ("Adv before whitening", f"delta_t + {credit.gamma:g} * {credit.lam:g} Adv_(t+1)", plain),
        ):
            note(name, formula, credit, "1506.02438; 000:169, 001:6-9", piece(rewards, signals, layout).advantages, "action")
        note("return", "Adv_t + V_t", credit, "004:253-265 (there r_t + V_(t+1))", plain(rewards, signals, layout).returns, "action")
    if isinstance(credit, GroupRelative):
        reward = segment_sum(shaped(rewards, signals, layout, kl), layout)
        if kl:
            note("R with KL", f"R - {kl:g} sum_t (old - reference)_t", segment_sum, "000:239", reward, "answer")
        note("mean", "mean of the group", group_mean, "003:245", group_mean(reward, layout, rewards.scored), "prompt")
        for ddof in (0, 1) if credit.scale == "group_std" else ():
            text = f"standard deviation of the group, divisor n - {ddof}{'' if ddof == credit.ddof else ' (not used)'}"
            note(f"std, ddof {ddof}", text, group_std, "003:212-216", group_std(reward, layout, rewards.scored, ddof), "prompt")
    experience = row.prepare(batch.rewards, batch.signals, layout)
    note("Adv", words(credit), credit, source_of(credit), experience.advantages, "action")
    note("w", words(row.average), row.average, "2402.03300, 1707.06347; 003:250", experience.weights, "action")
    return experience


def _update(note: Notebook, row: Objective, outputs: Outputs, experience: Experience) -> None:
    """Ratios, the clip, the loss and its gradient."""
    note("logprobs", "log p_policy(token | tokens before it)", logprobs, "003:160", outputs.logprobs, "action")
    _surrogate(note, row, outputs, experience, _ratio(note, row, outputs, experience))
    _terms(note, row, outputs, experience)
    _loss(note, row, outputs, experience)


def _ratio(note: Notebook, row: Objective, outputs: Outputs, experience: Experience) -> Tensor:
    """How far the policy has moved from old, [A]."""
    layout, signals = experience.layout, experience.signals
    ratio = torch.ones_like(outputs.logprobs)
    if not isinstance(row.ratio, NoRatio):
        moved = outputs.logprobs - signals.old
        note("log-ratio", "D_t = logprobs - old", torch.sub, "003:257", moved, "action")
        if row.ratio.per_sequence:
            note("log-ratio of the answer", "sum_t D_t", segment_sum, "003:190", segment_sum(moved, layout), "answer")
            note("mean log-ratio", "sum_t D_t / n_i", segment_mean, "003:267", segment_mean(moved, layout), "answer")
        ratio = row.ratio(outputs.logprobs, signals.old, layout, experience.advantages)
        note("rho", words(row.ratio), row.ratio, source_of(row.ratio), ratio, "action")
        note(
            "rho Adv",
            "rho_t Adv_t",
            Importance(),
            "003:248, 002:185",
            Importance()(ratio, outputs.logprobs, experience.advantages),
            "action",
        )
    if isinstance(row.surrogate, Clip):
        note(
            "clip(rho)",
            f"rho held in [{1 - row.surrogate.low:g}, {1 + row.surrogate.high:g}]",
            torch.clamp,
            source_of(row.surrogate),
            ratio.clamp(1 - row.surrogate.low, 1 + row.surrogate.high),
            "action",
        )
    return ratio


def _surrogate(note: Notebook, row: Objective, outputs: Outputs, experience: Experience, ratio: Tensor) -> None:
    """What is gained, and what the clip cuts."""
    gain = row.surrogate(ratio, outputs.logprobs, experience.advantages)
    note("surrogate", words(row.surrogate), row.surrogate, source_of(row.surrogate), gain, "action")
    low, high = row.clip_sides(outputs, experience)
    if not isinstance(row.ratio, NoRatio):
        note(
            "cut",
            "1 where the gradient is cut for being too high, -1 too low",
            Objective.clip_sides,
            "002:197-211, 000:190",
            high.to(gain) - low.to(gain),
            "action",
        )


def _terms(note: Notebook, row: Objective, outputs: Outputs, experience: Experience) -> None:
    """Penalty, corrections and the critic's loss."""
    layout, signals = experience.layout, experience.signals
    if not isinstance(row.penalty, NoPenalty | TrustRegion):
        note(
            "penalty",
            words(row.penalty),
            row.penalty,
            "2402.03300; 003:249, 003:194, 000:257",
            row.penalty(outputs, signals, layout),
            "action",
        )
    if row.corrections:
        note("correction", words(row.corrections), Objective.factors, "docs/algorithms.md", row.factors(outputs, experience), "action")
    if row.value.needs:
        note(
            "new V",
            "value of the state before each token, as the critic now is",
            "tilt.models.policy:Critic.forward",
            "004:196",
            outputs.values,
            "action",
        )
        note(
            "value loss",
            words(row.value),
            row.value,
            source_of(row.value),
            row.value(outputs.values, signals.values, experience.returns),
            "action",
        )


def _loss(note: Notebook, row: Objective, outputs: Outputs, experience: Experience) -> None:
    """The loss, its gradient, and the metrics of the step."""
    loss = row.loss(outputs, experience)
    for name, formula in (("loss/policy_avg", "-sum_t w_t (surrogate - penalty)_t"), ("loss/value_avg", "sum_t w_t value_t")):
        pairs = row.metrics(outputs, experience)
        if name in pairs:
            note(name, formula, Objective.metrics, "003:250, 000:300-308", pairs[name][0] / pairs[name][1], "batch")
    note("loss", "what is differentiated", Objective.loss, "003:250, 000:235", loss, "batch")
    if loss.requires_grad:
        _gradients(note, loss, outputs)
    for name in ("policy/approxkl_avg", "policy/clipfrac_avg", "val/ratio", "val/clipfrac_avg"):
        if name in pairs:
            note(
                name,
                "the metric of this name, docs/algorithms.md",
                Objective.metrics,
                "000:290-328",
                pairs[name][0] / pairs[name][1],
                "batch",
            )


def _gradients(note: Notebook, loss: Tensor, outputs: Outputs) -> None:
    """What the update asks of each log-probability and of each value."""
    leaves = [x for x in (outputs.logprobs, outputs.values) if x.requires_grad]
    slopes = dict(zip(map(id, leaves), torch.autograd.grad(loss, leaves, allow_unused=True, retain_graph=True), strict=True))
    for name, x, formula, source in (
        (
            "push",
            outputs.logprobs,
            "-d loss / d logprobs_t: the weight of grad log p_t",
            "003:44-48: Adv_t rho_t, over the number of actions",
        ),
        ("push of the critic", outputs.values, "-d loss / d V_t", "001:39"),
    ):
        slope = slopes.get(id(x))
        if slope is not None:
            note(name, formula, torch.autograd.grad, source, -slope, "action")


def _variants(note: Notebook, row: Objective, batch: Batch) -> None:
    """What other code calls by the same name, and what the notes have otherwise."""
    note.stage = "elsewhere"
    layout, outputs = batch.layout, batch.outputs

    def loss_of(changed: Objective) -> Tensor:
        return changed.loss(outputs, changed.prepare(batch.rewards, batch.signals, layout))

    def advantages(changed: Objective) -> Tensor:
        return changed.prepare(batch.rewards, batch.signals, layout).advantages[layout.starts]

    credit = row.credit
    if isinstance(credit, GroupRelative) and credit.scale == "group_std":
        for name, piece, where in (
            ("Adv, divisor n", replace(credit, ddof=0), "TRL's asynchronous GRPO adds 1e-8"),
            ("Adv, std + 1e-4", replace(credit, eps=1e-4), "TRL"),
            ("Adv without std", replace(credit, scale="none"), "Dr. GRPO, 2503.20783; 003:245"),
        ):
            note(name, words(piece), piece, where, advantages(replace(row, credit=piece)), "answer")
        if isinstance(row.ratio, TokenRatio):
            token = replace(row, average=TokenAverage())
            note(
                "loss, token average",
                words(token.average),
                Objective.loss,
                "the default of verl, OpenRLHF and TRL 1.x",
                loss_of(token),
                "batch",
            )
    if isinstance(credit, GroupRelative) and credit.kl:
        note(
            "Adv without KL",
            words(replace(credit, kl=0.0)),
            credit,
            "2402.14740",
            advantages(replace(row, credit=replace(credit, kl=0.0))),
            "answer",
        )
    if isinstance(row.ratio, GeometricRatio):
        wide = replace(row, surrogate=Clip(0.2, 0.2))
        note("loss, clip of GRPO", words(wide.surrogate), Objective.loss, "003:247", loss_of(wide), "batch")
        if outputs.logprobs.requires_grad:
            slope = torch.autograd.grad(loss_of(wide), outputs.logprobs)[0]
            note(
                "push, clip of GRPO", "Adv s / (G n_i) of every action that is not cut", torch.autograd.grad, "2507.18071", -slope, "action"
            )
        mean = segment_mean(TokenRatio()(outputs.logprobs, batch.signals.old, layout, outputs.logprobs), layout)
        note("arithmetic mean of the ratios", "mean_t rho_t: not GSPO's ratio", segment_mean, "003:262, 003:269 (read so)", mean, "answer")
    if isinstance(row.ratio, NoRatio) and isinstance(credit, GroupRelative):
        ratio = ProductRatio()(outputs.logprobs, batch.signals.old, layout, outputs.logprobs)[layout.starts]
        note("rho of the answer", words(ProductRatio()), ProductRatio(), "TRL 0.12.1; 000:247", ratio, "answer")


def examples() -> list[Entry]:
    """The log-probability of 003:144-160 and the advantages of 000:155, by the functions that a run uses."""
    note = Notebook(stage="examples")
    dtype = torch.float64
    logits, chosen = torch.tensor(EXAMPLE_DISTRIBUTIONS, dtype=dtype).log(), torch.tensor(EXAMPLE_CHOICES)
    each = logprobs(logits, chosen)
    note("reference of " + " ".join(EXAMPLE_TOKENS), "ln .4, ln .5, ln .3, ln .4, ln .6, ln .4", logprobs, "003:145-157", each, "answer")
    whole = segment_sum(each, Layout.of([len(chosen)]))
    note("reference of the whole answer", "their sum", segment_sum, "003:158", whole, "answer")
    layout, paid = Layout.of([1, 1, 1], [0, 0, 0]), torch.tensor([10.0, 20.0, 30.0], dtype=dtype)
    note("Q of 你 我 他", "reward of each: all three would be reinforced", earned, "000:155", paid, "answer")
    credit = GroupRelative("mean", "none")
    advantages = credit(Rewards.of(paid, actions=3), Signals.of(torch.zeros(3, dtype=dtype)), layout).advantages
    note("Adv of 你 我 他", "Q - mean: 你 is punished, 他 reinforced", credit, "000:155-157", advantages, "answer")
    return note.entries


def batch_entries(row: Objective, batch: Batch) -> list[Entry]:
    """The metrics of the batch before its update."""
    note = Notebook(stage="experience")
    rewards, signals = batch.rewards, batch.signals
    found = batch_metrics(rewards, signals, batch.layout, kl=getattr(row.credit, "kl", 0.0))
    for name in ("objective/kl", "objective/entropy", "objective/non_score_reward", "objective/rlhf_reward", "objective/scores"):
        total, weight = found[name]
        if float(weight) > 0:
            note(name, "the metric of this name, docs/algorithms.md", batch_metrics, "000:263-288", total / weight, "batch")
    return note.entries
