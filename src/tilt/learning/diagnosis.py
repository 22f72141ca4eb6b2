"""Why the learner disagrees with what sampled or scored its answers: a few of them are scored again, each time with one thing changed."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tilt.data.packing import Pack, pack
from tilt.data.rollouts import Rollout
from tilt.learning.guards import NAMES, Mismatch
from tilt.learning.learner import Learner
from tilt.models import compat
from tilt.objectives import Signals

ANSWERS, TOKENS = 2, 16
"""How many answers to each of two prompts are looked at, and the most tokens of each."""


def explain(learner: Learner, lm: PreTrainedModel, rollouts: Sequence[Rollout], batch: Pack, signals: Signals, error: Mismatch) -> str:
    """What is to blame for a mismatch, in a line that begins with its name; empty where nothing is found.

    `lm` sampled the rollouts, which were packed in their order as `batch` and have these signals.
    """
    if not torch.equal(batch.positions, _positions(batch)):
        return "positions: the batch does not number the tokens of each text from 0 on"
    return Case.of(learner, lm, rollouts, signals, error).verdict()


@dataclass(frozen=True)
class Fit:
    """The temperature at which plain scores come nearest to given ones, how near (mean |log-probability difference|), and whether that explains them."""

    temperature: float
    gap: float
    good: bool


@dataclass(frozen=True)
class Case:
    """A few answers; the log-probabilities of their actions as the update scored them, and as `whom` it disagrees with did."""

    learner: Learner
    lm: PreTrainedModel
    whom: str
    rollouts: tuple[Rollout, ...]
    scored: Tensor
    theirs: Tensor

    @staticmethod
    def of(learner: Learner, lm: PreTrainedModel, rollouts: Sequence[Rollout], signals: Signals, error: Mismatch) -> Case:
        """Two answers to each of two prompts among those that the update looked at, cut to a few tokens."""
        assert error.scores is not None
        lengths = [sum(r.sampled) for r in rollouts]
        scored, theirs = error.scores.split(lengths), getattr(signals, error.whom).split(lengths)
        seen = [i for i, score in enumerate(scored) if torch.isfinite(score).all()]
        prompts = list(dict.fromkeys(rollouts[i].prompt.tokens for i in seen))[:2]
        chosen = [i for p in prompts for i in [i for i in seen if rollouts[i].prompt.tokens == p][:ANSWERS]]
        short = tuple(_cut(rollouts[i]) for i in chosen)
        counts = [sum(r.sampled) for r in short]
        first = [torch.cat([x[i][:n] for i, n in zip(chosen, counts, strict=True)]).double().cpu() for x in (scored, theirs)]
        return Case(learner, lm, error.whom, short, *first)

    @property
    def tolerance(self) -> float:
        """Mean |log-probability difference| below which two scores of the same thing agree."""
        return max(0.03 if self.learner.guards.half else 1e-4, gap(self.scored, self.theirs) / 10)

    @property
    def asked(self) -> float:
        """The temperature that the rollouts say they were sampled at."""
        return self.rollouts[0].sampling.temperature

    def verdict(self) -> str:
        """The one change that explains the difference, named; empty where none does."""
        if (spread := self.unsteady()) > 1e-5:
            return (
                f"dropout: two forward passes of the learner over the same answers differ by {spread:.2g}; {_random(self.learner.policy)}"
            )
        with self.other() as lm:
            here, there = self.plain(self.learner.policy.lm), self.plain(lm)
        mine, yours = self.fit(here, self.scored), self.fit(there, self.theirs)
        if not mine.good:
            return self._packed()
        if not yours.good:
            return self._sampler() if self.whom == "sampler" else f"{self.whom}: it was scored by other weights or settings than it has now"
        if abs(math.log(mine.temperature / yours.temperature)) > 0.01:
            verb = "sampled" if self.whom == "sampler" else f"scored under {self.whom}"
            return f"temperature: the answers were {verb} at {yours.temperature:.3g}, and the learner scores them at {mine.temperature:.3g}; sampling.temperature is {self.asked:g}"
        if (apart := gap(here(self.asked), there(self.asked))) > self.tolerance:
            mend = "they were not published after the last update" if self.whom == "sampler" else "it is no copy"
            return f"stale weights: {NAMES[self.whom]} and the learner hold different weights, whose scores are {apart:.2g} apart: {mend}"
        return ""

    @contextmanager
    def other(self) -> Iterator[PreTrainedModel]:
        """The model that the learner disagrees with."""
        if self.whom != "reference":
            yield self.lm if self.whom == "sampler" else self.learner.policy.lm
            return
        assert self.learner.reference is not None
        with self.learner.reference() as anchor:
            yield anchor.lm

    def plain(self, lm: PreTrainedModel, positions: Sequence[Tensor] = ()) -> Callable[[float], Tensor]:
        """Scores of the actions by temperature, from one ordinary forward pass of each text alone: no packing, no cache, no dropout."""
        rows, actions = [], [t for r in self.rollouts for t, chosen in zip(r.tokens, r.sampled, strict=True) if chosen]
        with torch.no_grad(), ordinary(lm):
            for i, r in enumerate(self.rollouts):
                tokens = torch.tensor([*r.prompt.tokens, *r.tokens], device=compat.device_of(lm))
                more = {"position_ids": positions[i][None].to(tokens.device)} if positions else {}
                whole = torch.ones_like(tokens)[None]  # without a mask transformers takes a jump of positions for another text
                logits = lm(input_ids=tokens[None], attention_mask=whole, use_cache=False, **more).logits[0, -len(r.tokens) - 1 : -1]
                rows.append((logits if logits.dtype == torch.float64 else logits.float()).cpu()[torch.tensor(r.sampled)])
        table, index = pack(self.rollouts).kept.restrict(torch.cat(rows)), torch.tensor(actions)[:, None]
        return lambda temperature: (table / temperature).log_softmax(-1).gather(1, index)[:, 0].double()

    def fit(self, plain: Callable[[float], Tensor], scores: Tensor) -> Fit:
        """Search temperatures from 1/20 to 20, ever finer, around the best so far; the one asked for wins a tie."""
        best, reach = self.asked, math.log(20)
        for _ in range(4):
            tried = [best, *(best * math.exp(reach * k / 12) for k in range(-12, 13))]
            best = min(tried, key=lambda t: gap(plain(t), scores))
            reach /= 8
        found = gap(plain(best), scores)
        return Fit(best, found, found <= self.tolerance)

    def forward(self, rollouts: Sequence[Rollout]) -> Tensor:
        """The learner's own scores of a few answers, packed, in its precision and mode."""
        with torch.no_grad(), self.learner.autocast():
            return self.learner.policy(pack(rollouts).to(self.learner.device), temperature=self.asked).logprobs.double().cpu()

    def unsteady(self) -> float:
        """Largest difference between two forward passes of the learner over the same answers."""
        return float((self.forward(self.rollouts) - self.forward(self.rollouts)).abs().max())

    def _packed(self) -> str:
        """The learner's packed forward pass is not that of its weights: by what an action sees, or by where its tokens stand."""
        if leak := self._seen():
            return f"attention mask: in the learner's packed forward pass {leak}"
        if gap(self.forward(self.rollouts), self.plain(self.learner.policy.lm)(self.asked)) <= self.tolerance:
            return "batch: the learner scores the answers rightly by themselves, but not in their batch; look at how it is made and split"
        known = "every action sees all of its own text and nothing else, but the packed scores are not those of the text alone"
        return f"positions: {self._misplaced(self.learner.policy.lm, self.forward(self.rollouts)) or known}"

    def _sampler(self) -> str:
        """The sampler's scores are not those of its weights."""
        if found := self._misplaced(self.lm, self.theirs):
            return f"positions: in the sampler {found}"
        return (
            "sampler: its scores are not those of its own weights over these tokens: its cache or attention mask is wrong, "
            "or the answers were changed (tokenised again) after they were sampled"
        )

    def _seen(self) -> str:
        """Which tokens an action sees that it must not, or does not see that it must, found by changing them; empty where all is well."""
        vocabulary, whole = int(compat.head_of(self.learner.policy.lm).weight.shape[0]), [replace(r, kept=None) for r in self.rollouts]
        parts = self.forward(whole).split([sum(r.sampled) for r in whole])

        def moved(i: int, rollouts: Sequence[Rollout]) -> Tensor:
            return (self.forward(rollouts).split([len(p) for p in parts])[i] - parts[i]).abs()

        for i, own in enumerate(whole):
            others = [
                r if k == i else _changed(r, vocabulary, slice(None), r.prompt.tokens != own.prompt.tokens) for k, r in enumerate(whole)
            ]
            if moved(i, others).max() > 1e-4:
                return "an action's score changes with the tokens of other texts"
            alone = list(whole)
            alone[i] = _changed(own, vocabulary, slice(-1, None))
            earlier = len(parts[i]) - int(own.sampled[-1])
            if earlier and moved(i, alone)[:earlier].max() > 1e-4:
                return "an action's score changes with the tokens after it"
            alone[i] = _changed(own, vocabulary, slice(0, 1))
            later = len(parts[i]) - int(own.sampled[0])
            if later and moved(i, alone)[-later:].max() == 0:
                return "an action's score does not change with the answer's tokens before it"
        asked = [_changed(r, vocabulary, slice(0, 0), True) for r in whole]
        beyond = [
            moved(i, asked)[1:] for i in range(len(parts)) if len(parts[i]) > 1
        ]  # the first action is chosen at the prompt's own last token
        return "an answer's score does not change with its prompt" if beyond and torch.cat(beyond).max() == 0 else ""

    def _misplaced(self, lm: PreTrainedModel, scores: Tensor) -> str:
        """Which wrong positions make the plain forward pass give these scores; empty where none does that is known."""
        if "position_ids" not in inspect.signature(lm.forward).parameters:
            return ""
        for how, positions in _placings(self.rollouts).items():
            fits = all(int(p.min()) >= 0 and int(p.max()) < compat.context_of(lm) for p in positions)
            if fits and gap(self.plain(lm, positions)(self.asked), scores) <= self.tolerance:
                return how
        return ""


def gap(one: Tensor, other: Tensor) -> float:
    """Mean |log-probability difference|."""
    return float((one - other).abs().mean())


@contextmanager
def ordinary(lm: PreTrainedModel) -> Iterator[None]:
    """Inside, the model is called as transformers would: its own attention instead of Tilt's, dropout off."""
    attention, modes = compat.attention_of(lm), [(module, module.training) for module in lm.modules()]
    lm.eval()
    if compat.is_packed(lm):
        compat.use_attention(lm, "eager")
    try:
        yield
    finally:
        compat.use_attention(lm, attention)
        for module, training in modes:
            module.training = training


def _cut(rollout: Rollout) -> Rollout:
    sampled = rollout.sampled[:TOKENS]
    kept = None if rollout.kept is None else rollout.kept.part(0, sum(sampled))
    return replace(rollout, tokens=rollout.tokens[:TOKENS], sampled=sampled, logprobs=rollout.logprobs[:TOKENS], kept=kept)


def _changed(rollout: Rollout, vocabulary: int, which: slice, prompt: bool = False) -> Rollout:
    """The rollout with these tokens of the answer, and where asked all tokens of the prompt, replaced by others."""
    tokens, asked = list(rollout.tokens), rollout.prompt.tokens
    tokens[which] = [(t + 1) % vocabulary for t in tokens[which]]
    other = replace(rollout.prompt, tokens=tuple((t + 1) % vocabulary for t in asked)) if prompt else rollout.prompt
    return replace(rollout, tokens=tuple(tokens), prompt=other)


def _positions(batch: Pack) -> Tensor:
    """Positions as they must be: each segment counts on from the end of its parent."""
    length, parent = batch.segments.length, batch.segments.parent
    above = torch.where(parent >= 0, length[parent.clamp(min=0)], 0)
    return torch.cat([torch.arange(n) + a for n, a in zip(length.tolist(), above.tolist(), strict=True)])


def _placings(rollouts: Sequence[Rollout]) -> dict[str, list[Tensor]]:
    """Ways to place the tokens of prompt and answer wrongly that are worth a look."""
    batch = pack(rollouts)
    starts = batch.segments.start.tolist()
    roots, own = batch.segments.parent[batch.own].tolist(), batch.own.tolist()
    sizes = [(len(r.prompt.tokens), len(r.tokens)) for r in rollouts]

    def shifted(by: Callable[[int], int]) -> list[Tensor]:
        return [torch.cat([torch.arange(above), torch.arange(n) + by(above)]) for above, n in sizes]

    row = [
        torch.cat([torch.arange(above) + starts[root], torch.arange(n) + starts[mine]])
        for (above, n), root, mine in zip(sizes, roots, own, strict=True)
    ]
    return {
        "tokens are numbered along the whole row, not from 0 in each text": row,
        "the tokens of answers are numbered from 0 again": shifted(lambda above: 0),
        "the tokens of answers stand one too far": shifted(lambda above: above + 1),
        "the tokens of answers stand one too near": shifted(lambda above: above - 1),
        "all tokens stand at 0": [torch.zeros(above + n, dtype=torch.long) for above, n in sizes],
    }


def _random(module: nn.Module) -> str:
    """The modules that draw at random, in words."""
    found = [
        name for name, part in module.named_modules() if isinstance(part, nn.modules.dropout._DropoutNd) and part.training and part.p > 0
    ]
    if found:
        return f"{len(found)} dropout layers are active ({found[0]}): the policy must be scored as it is sampled"
    return "something in it draws at random"
