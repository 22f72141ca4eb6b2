"""Settings of reinforcement learning, and which of them cannot go together."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from tilt.objectives import Imitate, Objective, PartsRelative, ProcessRelative, Teacher, TrustRegion
from tilt.recipes.settings import Count, Evaluation, Guards, Keep, Mask, ReferenceUpdate, Reward, Sampling, Texts, Training
from tilt.recipes.settings import Optimizer as OptimizerSettings
from tilt.recipes.variants import optimised, preset_settings
from tilt.rewards.spec import Process, parse


class Config(Training):
    """Reinforcement learning of a policy from a reward, by any row of the table or one of your own."""

    algorithm: Annotated[str, Field(description="a name of `tilt algorithms`, a parity preset, or file.py:NAME")] = "grpo"
    objective: Annotated[dict[str, Any], Field(description="slots of the row to change, such as {surrogate: {high: 0.28}}")] = {}
    quirks: Annotated[
        dict[str, bool],
        Field(description="of a parity preset: quirks to switch off or on, such as {score_after_last: false}; docs/parity.md"),
    ] = {}
    reward: Annotated[Reward, Field(description="file.py:function, a rule, a reward model, or a weighted list of them")]
    measure: Annotated[Reward, Field(description="further rewards that are measured on held-out answers and never trained on")] = None
    missing_stop_penalty: Annotated[float, Field(ge=0.0, description="taken from the reward of an answer that was cut at max_tokens")] = 0.0
    reward_clip: Annotated[
        float | None, Field(gt=0.0, description="the weighted sum of the rewards is held within ± this, before missing_stop_penalty")
    ] = None
    reference: Annotated[str | None, Field(description="the KL anchor; without it the policy as it starts")] = None
    reference_update: ReferenceUpdate = ReferenceUpdate()
    critic: Annotated[
        Literal["auto", "reward_model", "policy", "shared"],
        Field(
            description="what the critic starts from, where the row needs one; auto = the reward model where there is one with the policy's tokens, else the policy"
        ),
    ] = "auto"
    critic_lr: Annotated[float | None, Field(gt=0.0, description="the critic's learning rate; without it the policy's")] = None
    critic_warmup: Annotated[int, Field(ge=0, description="first steps in which only the critic learns")] = 0
    pretrain_data: Annotated[
        Texts | None, Field(description="texts whose likelihood every optimizer step raises too, against forgetting (PPO-ptx)")
    ] = None
    pretrain_coefficient: Annotated[
        float, Field(ge=0.0, description="what their mean negative log-likelihood a token weighs in the loss; InstructGPT has 27.8")
    ] = 0.0
    ema: Annotated[
        float | None,
        Field(
            gt=0.0,
            lt=1.0,
            description="decay of a moving average of the policy's weights, saved beside it as ema/; DeepSpeed-Chat has 0.992",
        ),
    ] = None
    steps: Count = 200
    prompts: Annotated[int, Field(ge=1, description="prompts a step")] = 32
    samples: Annotated[int, Field(ge=1, description="answers to each prompt")] = 8
    keep: Keep = Keep()
    passes: Annotated[int, Field(ge=1, description="times each answer is trained on")] = 1
    minibatches: Annotated[int, Field(ge=1, description="optimizer steps a pass")] = 1
    sampling: Sampling = Sampling()
    mask: Annotated[
        Mask | None,
        Field(
            description="a mapping (even {}) draws training answers inside the top-p sets of a copy of the policy, with any row; nlpo needs it"
        ),
    ] = None
    optimizer: OptimizerSettings = OptimizerSettings(lr=1e-4)
    eval: Evaluation = Evaluation()
    max_kl: Annotated[
        float | None,
        Field(gt=0.0, description="stop after the first step whose answers have a sequence KL to the reference above this, nats"),
    ] = None
    stop_rise: Annotated[
        float | None,
        Field(
            gt=0.0,
            description="stop where the mean reward of six steps is above that of the first four by so many standard deviations of the first step's scores: "
            "a reward model is a proxy, and beyond some rise the policy only learns its weak sides",
        ),
    ] = None
    max_mismatch: Annotated[
        float,
        Field(
            gt=0.0,
            description="stop when learner and sampler differ by more than this in mean probability, before any batch's first update",
        ),
    ] = 0.05
    guards: Guards = Guards()
    rollouts_every: Annotated[
        int,
        Field(
            ge=0,
            description="steps between rollouts stored with every token channel, and shown; those of other steps are stored without; 0 = none at all",
        ),
    ] = 10
    channels_mb: Annotated[
        float,
        Field(
            gt=0.0,
            description="megabytes of token channels a run may store, before compression; with half of them used they come half as often, and so on",
        ),
    ] = 64.0

    @model_validator(mode="before")
    @classmethod
    def _preset(cls, given: Any) -> Any:
        """A parity preset brings the defaults of its library; what is given stands."""
        return preset_settings(given)

    @model_validator(mode="after")
    def _possible(self) -> Config:
        name, row = optimised(self.algorithm, self.objective, self.quirks, self.sampling.max_tokens)
        problems = row.check(samples=self.samples, passes=self.passes)
        if row.credit == Imitate():
            problems.append(
                f"algorithm {name} imitates given answers, and rl samples its own: use `tilt sft`, or raft to imitate the best samples"
            )
        if isinstance(row.credit, Teacher) and self.reference is None:
            problems.append(
                f"algorithm {name} learns from a teacher, and without one the policy is compared with itself: set reference to the teacher's path"
            )
        if self.keep.mixed and self.samples < 2:
            problems.append("keep.mixed drops groups whose answers all earned the same, as a single answer does: set samples to 2 or more")
        if self.keep.mixed and isinstance(row.credit, Teacher):
            problems.append(f"keep.mixed looks at rewards, which algorithm {name} does not read: leave it out")
        problems += self._scales(row) + self._steps(name, row)
        if self.reference_update.every and isinstance(row.credit, Teacher):
            problems.append("reference_update would move the teacher towards the policy that learns from it: leave it out")
        elif self.reference_update.every and "reference" not in row.needs and self.max_kl is None:
            problems.append(f"reference_update: algorithm {name} reads no reference: leave it out, or choose a row with a KL")
        if row.against == "old":
            problems += self._beside_old(row)
        elif row.passes is not None and self.minibatches > 1 and self.passes * self.minibatches > row.passes:
            problems.append(
                f"minibatches {self.minibatches}: {type(row.surrogate).__name__} has no ratio to correct for the steps in between; set minibatches to 1"
            )
        if self.minibatches > self.prompts * self.samples:
            problems.append(f"minibatches {self.minibatches} is more than the {self.prompts * self.samples} answers of a step")
        if row.value.needs and self.critic == "shared" and (self.critic_warmup or self.critic_lr is not None):
            problems.append(
                "critic shared has no weights of its own for critic_lr and critic_warmup; leave them out, or set critic to policy"
            )
        if self.critic_warmup >= self.steps:
            problems.append(f"critic_warmup {self.critic_warmup} leaves no step of {self.steps} for the policy; set it below steps")
        if name == "nlpo" and self.mask is None:
            problems.append("nlpo is PPO inside a mask, and there is none: set mask to {top_p: 0.9, refresh: 20}, or choose ppo")
        if (self.pretrain_data is None) != (self.pretrain_coefficient == 0):
            problems.append(
                "pretrain_data and pretrain_coefficient go together: set both (a coefficient of 27.8 is InstructGPT's), or neither"
            )
        if problems:
            raise ValueError("; ".join(problems))
        return self

    def _scales(self, row: Objective) -> list[str]:
        """Settings of the reward's scale that a credit does not read, or that something else reads wrongly."""
        problems = []
        normalised = [] if self.reward is None else [spec.name for spec in parse(self.reward) if spec.normalise]
        if isinstance(row.credit, PartsRelative) and self.reward_clip is not None:
            problems.append("reward_clip holds the weighted sum of the rewards, and parts_relative reads each by itself: leave it out")
        if isinstance(row.credit, PartsRelative) and normalised:
            problems.append(
                f"reward {normalised[0]}: parts_relative normalises every part itself, so normalise has no effect: leave it out"
            )
        if self.stop_rise is not None and normalised:
            problems.append(
                f"stop_rise looks at the training reward, whose part {normalised[0]} is normalised: its mean stays near 0; leave out one of them"
            )
        return problems

    def _steps(self, name: str, row: Objective) -> list[str]:
        """What a credit that reads the rewards of steps alone would ignore, or miss."""
        if not isinstance(row.credit, ProcessRelative) or self.reward is None:
            return []
        others = [spec.name for spec in parse(self.reward) if not isinstance(spec.source, Process)]
        if len(others) == len(parse(self.reward)):
            return [
                f"algorithm {name} reads rewards of steps, and reward gives none: name a judge of steps, reward: {{process: MODEL}} or {{process: file.py:function}}"
            ]
        unread = [*(f"reward {other}" for other in others)]
        unread += [key for key, value in (("missing_stop_penalty", self.missing_stop_penalty), ("reward_clip", self.reward_clip)) if value]
        return (
            [f"{', '.join(unread)}: without effect, algorithm {name} reads the rewards of steps alone; leave it out, or move it to measure"]
            if unread
            else []
        )

    def _beside_old(self, row: Objective) -> list[str]:
        """What does not go with a trust region or a penalty to the old policy."""
        if not isinstance(row.penalty, TrustRegion):
            still = f"{row.penalty!r} compares with the policy before a batch's first step, which with one optimizer step is the policy itself: set passes to 2 or more"
            return [still] if self.passes * self.minibatches == 1 else []
        problems = []
        if self.minibatches > 1:
            problems.append(
                f"minibatches {self.minibatches}: {row.penalty!r} takes one natural step on the whole batch; set minibatches to 1"
            )
        if self.pretrain_data is not None:
            problems.append("pretrain_data: a natural step follows the surrogate alone; leave it and pretrain_coefficient out")
        if row.value.needs and self.critic == "shared":
            problems.append(
                "critic shared: a natural step moves the whole policy, so the critic needs weights of its own; set critic to policy"
            )
        return problems

    @property
    def narrowing(self) -> dict[str, str]:
        """What keeps training answers from being drawn from the whole distribution, in words for the card; empty where nothing does."""
        cut = [f"{key} {getattr(self.sampling, key):g}" for key in self.sampling.narrowed]
        found = (
            []
            if self.mask is None
            else [
                f"the top-p {self.mask.top_p:g} sets of a copy of the policy, taken every {self.mask.refresh} steps and held beside the models above"
            ]
        )
        found += [", ".join(cut)] if cut else []
        within = "; policy, old, reference and KL are those of the distributions renormalised within the kept sets"
        return {"drawn within": ", then ".join(found) + within} if found else {}
