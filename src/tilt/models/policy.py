"""The four roles as modules: policy, reward model and critic; body, predictors and heads inside one forward, so that each is sharded, compiled and checkpointed as a whole."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tilt.data.packing import Pack
from tilt.distributions import SMALL, Anchor, collision, score_actions
from tilt.errors import UsageError
from tilt.models import agreement, compat
from tilt.models.adapters import plain_copy
from tilt.models.heads import Head, head_function, hidden_states
from tilt.objectives.experience import Outputs


class Policy(nn.Module):
    """A causal LM that scores the actions of a pack; with `value_head` it is its own critic (one linear layer on the same body, zero at first)."""

    def __init__(self, lm: PreTrainedModel, *, value_head: bool = False, chunk: int = 1024) -> None:
        super().__init__()
        self.lm = lm
        self.chunk = chunk
        self.value_head = value_layer(lm) if value_head else None

    @property
    def note(self) -> str:
        """The line for the run's beginning when the model runs on padded batches; empty when packed."""
        return agreement.note(self.lm)

    def hidden(self, pack: Pack, at: Tensor | None = None) -> Tensor:
        """Last hidden state of every token, [T, D], or of those `at` alone: of a shared prompt only its last."""
        return hidden_states(self.lm, pack, at)

    @property
    def head(self) -> Head:
        """Hidden states [N, D] → vocabulary scores [N, V], by the weights as they are when it is called."""
        return head_function(self.lm)

    @torch.no_grad()
    def before_actions(self, pack: Pack) -> Tensor:
        """Hidden states before the actions, [A, D], without a graph: what an anchor keeps of this policy."""
        return self.hidden(pack, pack.predictors)

    @torch.no_grad()
    def collisions(self, pack: Pack) -> Tensor:
        """log sum_v p(v)^2 before each action, [A]: how likely two draws agree; without a graph."""
        hidden = self.before_actions(pack)
        parts = [
            collision(logits if logits.dtype == torch.float64 else logits.float()) for logits in map(self.head, hidden.split(self.chunk))
        ]
        return torch.cat(parts)

    @torch.no_grad()
    def alternatives(self, pack: Pack, count: int, temperature: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
        """Log-probabilities of the actions [A], and the likeliest tokens before each, at most `count`, with theirs, [A, count] both.

        All are of the whole vocabulary at this temperature, whatever a token was chosen among.
        """
        said, ids, best = [], [], []
        for logs, actions in self._logs(pack, pack.actions[:, None], temperature):
            top = logs.topk(min(count, logs.shape[1]))
            said.append(logs.gather(1, actions)[:, 0])
            ids.append(top.indices)
            best.append(top.values)
        return torch.cat(said), torch.cat(ids), torch.cat(best)

    @torch.no_grad()
    def said_of(self, pack: Pack, tokens: Tensor, temperature: float = 1.0) -> Tensor:
        """Log-probabilities of these tokens before each action, [A, K] both, of the whole vocabulary at this temperature."""
        return torch.cat([logs.gather(1, some) for logs, some in self._logs(pack, tokens, temperature)])

    def _logs(self, pack: Pack, tokens: Tensor, temperature: float) -> Iterator[tuple[Tensor, Tensor]]:
        """Log-probabilities of the whole vocabulary before some actions after others, with their share of the tokens; 64 MiB of them at a time."""
        rows = max(1, min(self.chunk, SMALL // compat.text_config(self.lm).vocab_size))
        for hidden, some in zip(self.before_actions(pack).split(rows), tokens.split(rows), strict=True):
            logits = self.head(hidden)
            yield ((logits if logits.dtype == torch.float64 else logits.float()) / temperature).log_softmax(-1), some

    def forward(
        self, pack: Pack, *, temperature: float = 1.0, entropy: bool = False, values: bool = False, against: Anchor | None = None
    ) -> Outputs:
        """Log-probabilities of the actions at this temperature, [A]; entropies, values and the exact KL with an anchor where asked, NaN elsewhere.

        All are of the distributions within the kept sets of the pack.
        """
        count, places = len(pack.predictors), pack.predictors
        hidden = self.hidden(pack, torch.cat([places, pack.last_tokens]) if values else places)
        scores = score_actions(
            hidden[:count],
            self.head,
            pack.actions,
            temperature=temperature,
            entropy=entropy,
            chunk=self.chunk,
            against=against,
            kept=pack.kept,
        )
        if not values:
            return Outputs.of(scores.logprobs, entropy=scores.entropy, kl=scores.kl, sequences=pack.layout.sequences)
        assert self.value_head is not None, "values are asked of a policy without a value head"
        worth = self.value_head(hidden)[:, 0].to(scores.logprobs.dtype)
        return Outputs(*scores, values=worth[:count], final=worth[count:])


def value_layer(model: PreTrainedModel) -> nn.Linear:
    """A zero layer from the body's width to one value, on the model's device and dtype."""
    layer = nn.Linear(compat.text_config(model).hidden_size, 1, device=compat.device_of(model), dtype=compat.dtype_of(model))
    with torch.no_grad():
        layer.weight.zero_()
        layer.bias.zero_()
    return layer


class RewardModel(nn.Module):
    """A sequence classifier with one label: forward(pack) → score of each sequence [S], read at its last token.

    `model` is the transformers class itself, so what it saves is what AutoModelForSequenceClassification opens.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    @staticmethod
    def from_policy(policy: Policy, *, padding: int, seed: int = 0) -> RewardModel:
        """The policy's body, copied, under a fresh score layer, normal with deviation 1/√(D + 1); `padding` is a token id that no text ends with
        (a new row of the embedding where it lies beyond it). Adapters of the policy are merged in."""
        lm = policy.lm
        config = copy.deepcopy(lm.config)
        config.num_labels = 1
        rows = lm.get_input_embeddings().weight.shape[0]
        config.pad_token_id = padding if padding < rows else None
        try:
            model = compat.classifier_from_config(config, compat.dtype_of(lm))
        except ValueError as error:
            raise UsageError(
                f"transformers has no sequence classifier for {type(lm).__name__}.\nChoose another architecture for the reward model."
            ) from error
        compat.body_of(model).load_state_dict(plain_copy(compat.body_of(lm)).state_dict())
        if padding >= rows:
            model.resize_token_embeddings(padding + 1)
            model.config.pad_token_id = padding
        generator = torch.Generator().manual_seed(seed)
        width = compat.text_config(lm).hidden_size
        with torch.no_grad():
            score = compat.score_of(model)
            score.weight.copy_(torch.randn(score.weight.shape, generator=generator) / (width + 1) ** 0.5)
        compat.adopt(compat.without_dropout(model), lm)
        return RewardModel(model.to(compat.device_of(lm)).eval())

    @property
    def note(self) -> str:
        return agreement.note(self.model)

    @property
    def score_layer(self) -> nn.Linear:
        """The linear layer from the body to the score."""
        return compat.score_of(self.model)

    def forward(self, pack: Pack) -> Tensor:
        """Score of each sequence, [S]."""
        return compat.score_of(self.model)(hidden_states(self.model, pack, pack.last_tokens))[:, 0]

    def everywhere(self, pack: Pack) -> Tensor:
        """Score read after every token, [T]: what `forward` reads at the last token of each sequence."""
        return compat.score_of(self.model)(hidden_states(self.model, pack))[:, 0]

    def after(self, pack: Pack, ends: Sequence[Sequence[int]]) -> Tensor:
        """Score read after the answers' tokens with these numbers, [J]: one list of numbers for each sequence, in the pack's order of sequences."""
        starts = pack.segments.start[pack.own].tolist()
        places = [start + end for start, numbers in zip(starts, ends, strict=True) for end in numbers]
        return self.everywhere(pack)[torch.tensor(places, device=pack.tokens.device)]


class Critic(nn.Module):
    """A body and a linear layer: forward(pack) → V before each action [A] and V after each sequence's last token [S]."""

    def __init__(self, body: PreTrainedModel, head: nn.Linear) -> None:
        super().__init__()
        self.body = body
        self.head = head

    @staticmethod
    def from_reward_model(reward_model: RewardModel) -> Critic:
        """Body and score layer copied: at first, the value of a state is the reward model's score of the text so far."""
        body = plain_copy(compat.body_of(reward_model.model))
        head = value_layer(body)
        with torch.no_grad():
            head.weight.copy_(compat.score_of(reward_model.model).weight)
        return Critic(compat.adopt(body, reward_model.model), head)

    @staticmethod
    def from_policy(policy: Policy) -> Critic:
        """The policy's body, copied, under a zero layer: at first every value is 0."""
        body = plain_copy(compat.body_of(policy.lm))
        return Critic(compat.adopt(body, policy.lm), value_layer(body))

    def forward(self, pack: Pack) -> tuple[Tensor, Tensor]:
        """Values [A] of the states before the actions, and final values [S]."""
        values = self.head(hidden_states(self.body, pack, torch.cat([pack.predictors, pack.last_tokens])))[:, 0]
        return values[: len(pack.predictors)], values[len(pack.predictors) :]
