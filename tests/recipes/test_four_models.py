"""The pipeline of four models: each row of the requirement table of parity.md, section 6, is the test of that name."""

from __future__ import annotations

import copy
import inspect
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tilt.data.packing import pack
from tilt.data.rollouts import Prompt, Rollout
from tilt.distributions import k1, logprobs
from tilt.inspect.entries import STAGES
from tilt.inspect.fixtures import fixture_f
from tilt.inspect.trace import examples, trace
from tilt.learning.learner import Learner, Passes
from tilt.models.heads import hidden_states
from tilt.models.loading import load, load_reward_model, tiny
from tilt.models.policy import Critic, Policy
from tilt.models.saving import fingerprint
from tilt.objectives import ALGORITHMS, PREFERENCES, Clip, Rewards
from tilt.objectives.card import card, clip_level, kl_place, models
from tilt.optim.optimizers import AdamW, Optimizer
from tilt.oracle.token_mdp import TokenMDP
from tilt.recipes import rl, rlhf
from tilt.runs.journal import read_metrics

STAGE_NAMES = ("pretrain", "sft", "reward_model", "rl")


def yes(completions: list[str], **columns: object) -> list[float]:
    """How much of an answer is a yes."""
    return [sum(letter in "yes" for letter in text) - 0.1 * len(text) for text in completions]


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Pretraining, SFT, reward model and PPO from random weights on a toy corpus: the better answer says yes."""
    place = tmp_path_factory.mktemp("pipeline")
    made = [{"prompt": f"q{i} ", "chosen": "yes" + "!" * (i % 3), "rejected": "no" + "!" * ((i + 1) % 3)} for i in range(48)]
    (place / "mine.py").write_text(inspect.getsource(yes))
    (place / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in made))
    config = {
        "name": "all", "root": str(place / "runs"), "threads": 1, "quiet": True,
        "model": {"width": 16, "layers": 1, "heads": 2, "context": 32, "vocabulary": 270},
        "data": {"source": str(place / "pairs.jsonl"), "template": "text"},
        "rank": {"samples": 6, "reward": f"{place / 'mine.py'}:yes", "sampling": {"max_tokens": 6}},
        "pretrain": {"steps": 6, "optimizer": {"lr": 1e-2}}, "sft": {"steps": 12, "optimizer": {"lr": 1e-2}},
        "reward_model": {"steps": 12, "batch": 16, "optimizer": {"lr": 1e-2}},
        "rl": {"algorithm": "ppo", "steps": 3, "prompts": 4, "samples": 4, "passes": 2, "sampling": {"max_tokens": 6}, "eval": {"prompts": 4},
               "rollouts_every": 1, "optimizer": {"lr": 1e-3}},
    }  # fmt: skip
    return rlhf.run(rlhf.Config.model_validate(config))


def stage(result: Any, name: str) -> Path:
    return Path(result.directory.path) / name


def checkpoint(result: Any, name: str) -> Path:
    return max((stage(result, name) / "checkpoints").iterdir())


def evaluations(result: Any, name: str, key: str) -> list[float]:
    return [line[key] for line in read_metrics(stage(result, name) / "metrics.jsonl") if key in line]


def test_one_entry_point_runs_pretrain_sft_rm_ppo_from_scratch(pipeline: Any) -> None:
    for name in STAGE_NAMES:
        assert (checkpoint(pipeline, name) / "model.safetensors").exists() and (stage(pipeline, name) / "config.yaml").exists()
        assert read_metrics(stage(pipeline, name) / "metrics.jsonl")
    for name, key, better in (("sft", "eval/nll", -1), ("reward_model", "eval/accuracy", 1)):
        values = evaluations(pipeline, name, key)
        assert better * (values[-1] - values[0]) > 0, (name, values)
    assert (Path(pipeline.directory.path) / "report.md").exists()


def test_every_stage_can_be_taken_up_again_from_its_record(pipeline: Any, tmp_path: Path) -> None:
    given = yaml.safe_load((stage(pipeline, "rl") / "config.yaml").read_text())
    assert given.pop("recipe") == "rl" and given["model"] == str(checkpoint(pipeline, "sft"))
    again = rl.run(rl.Config.model_validate(given | {"root": str(tmp_path), "name": "again"}))
    first, second = (read_metrics(place / "metrics.jsonl")[0] for place in (stage(pipeline, "rl"), again.directory.path))
    assert first["objective/scores"] == second["objective/scores"] and first["loss"] == second["loss"]


def test_rm_data_are_sft_samples_ranked_with_their_provenance(pipeline: Any) -> None:
    place, sft = stage(pipeline, "rank"), checkpoint(pipeline, "sft")
    record = json.loads((place / "provenance.json").read_text())
    mark = fingerprint(Policy(load(str(sft))[0]))
    assert record["model"] == str(sft) and record["sha256"] == mark and record["samples"] == 6 and record["reward"].endswith("mine.py:yes")
    rows = [json.loads(line) for line in (place / "pairs.jsonl").read_text().splitlines()]
    assert len(rows) == record["pairs"] > 20 and {row["sampled_from"] for row in rows} == {f"{sft}@{mark[:12]}"}
    for row in rows:
        better, worse = yes([row["chosen"], row["rejected"]])
        assert better > worse and (row["chosen_score"], row["rejected_score"]) == pytest.approx((better, worse), abs=1e-6)
        assert row["prompt"].startswith("q") and row["chosen_sample"] != row["rejected_sample"]
    given = yaml.safe_load((stage(pipeline, "reward_model") / "config.yaml").read_text())
    assert given["data"]["source"] == str(place / "pairs.jsonl"), "the reward model learns from them"


def test_actor_and_reference_start_from_sft_and_the_reference_is_frozen(pipeline: Any) -> None:
    first = read_metrics(stage(pipeline, "rl") / "metrics.jsonl")[0]
    assert first["objective/kl"] == pytest.approx(0.0, abs=1e-4), "actor and reference are one model before the first step"
    before, after = load(str(checkpoint(pipeline, "sft")))[0], load(str(checkpoint(pipeline, "rl")))[0]
    said = (stage(pipeline, "rl") / "log.txt").read_text()
    (mark,) = re.findall(r"unchanged  reference (\w+)", said)
    assert fingerprint(Policy(before)).startswith(mark), "at the end the reference still has the weights of the SFT model"
    assert fingerprint(before) != fingerprint(after), "and the actor has not"


def test_the_critic_starts_from_the_rm_and_the_rm_is_frozen(pipeline: Any) -> None:
    place = checkpoint(pipeline, "reward_model")
    judge, words = load_reward_model(str(place))
    critic = Critic.from_reward_model(judge)
    texts = [Rollout.demonstration(Prompt(tuple(words("q1 ")["input_ids"]), 0), tuple(words(t)["input_ids"])) for t in ("yes!", "no")]
    batch = pack(texts)
    with torch.no_grad():
        _, final = critic(batch)
        assert torch.equal(hidden_states(critic.body, batch), hidden_states(judge.model, batch))
        assert torch.allclose(final, judge(batch), atol=1e-6), "at first the value of a text is the reward model's score of it"
    (mark,) = re.findall(r"unchanged  reward model 0 (\w+)", (stage(pipeline, "rl") / "log.txt").read_text())
    assert fingerprint(judge).startswith(mark)


def test_the_loop_has_four_steps_in_order(pipeline: Any) -> None:
    """Prompts, responses, experience from critic, reward model and reference, losses of actor and critic."""
    entries = trace(ALGORITHMS["ppo"], fixture_f())
    order = list(dict.fromkeys(e.stage for e in entries if e.stage in ("prompts", "responses", "experience", "update")))
    assert order == ["prompts", "responses", "experience", "update"]
    assert [re.search(r"004:27[5-8]", title).group() for title in list(STAGES.values())[:4]] == ["004:275", "004:276", "004:277", "004:278"]  # type: ignore[union-attr]
    named = {stage: [e.name for e in entries if e.stage == stage] for stage in order}
    assert {"R", "V", "reference"} <= set(named["experience"]) and {"loss/policy_avg", "loss/value_avg"} <= set(named["update"])
    line = read_metrics(stage(pipeline, "rl") / "metrics.jsonl")[0]
    assert all(line[f"time/{phase}"] >= 0 for phase in ("generate", "reward", "evaluate", "update"))


@pytest.fixture
def batch() -> Any:
    """Answers of unequal lengths to three prompts."""
    generator = torch.Generator().manual_seed(0)

    def draw(n: int) -> tuple[int, ...]:
        return tuple(torch.randint(0, 20, (n,), generator=generator).tolist())

    prompts = [Prompt(draw(3), i) for i in range(3)]
    return pack([Rollout.demonstration(prompts[i // 2], draw(1 + i)) for i in range(6)])


def learner_of(*, shared: bool, lr: float) -> Learner:
    lm = tiny("qwen3", vocabulary=20, width=16, layers=1, heads=2, context=32)
    policy = Policy(lm, value_head=shared)
    critic = None if shared else Critic.from_policy(policy)
    rule = AdamW(lr, clip_norm=0.0)
    return Learner(
        policy, Optimizer(policy, rule, 10), critic=critic, critic_optimizer=None if critic is None else Optimizer(critic, rule, 10), settings=Passes(2)
    )  # fmt: skip


def updated(learner: Learner, batch: Any) -> None:
    from dataclasses import replace

    row = replace(ALGORITHMS["ppo"], credit=replace(ALGORITHMS["ppo"].credit, kl=0.0))
    signals = learner.evaluate(batch, row.needs)
    rewards = Rewards.of(torch.tensor([1.0, -1.0, 0.5, 2.0, 0.0, -0.5]), actions=batch.layout.actions)
    signals = replace(signals, final=torch.zeros_like(signals.final))
    learner.update(batch, row.prepare(rewards, signals, batch.layout), row)


@pytest.mark.parametrize("shared", [False, True], ids=["separate optimizers", "shared optimizer"])
def test_critic_and_actor_losses_both_update(batch: Any, shared: bool) -> None:
    learner = learner_of(shared=shared, lr=1e-2)
    assert (learner.critic_optimizer is None) == shared
    value = learner.policy.value_head if shared else learner.critic
    before = copy.deepcopy(learner.policy.lm), copy.deepcopy(value)
    updated(learner, batch)
    assert fingerprint(before[0]) != fingerprint(learner.policy.lm) and fingerprint(before[1]) != fingerprint(value)


def test_a_token_mdp_can_be_enumerated() -> None:
    mdp = TokenMDP.of(lambda prompt, answer: float(len(answer)), prompts=1)
    assert mdp.answers_count == 15 and sorted(set(mdp.layout.lengths.tolist())) == [1, 2, 3]


def test_reference_logprob_of_the_worked_example() -> None:
    found = {e.name: e.value for e in examples()}
    assert found["reference of the whole answer"].item() == pytest.approx(-5.156817804274337, abs=1e-14)
    assert math.log(0.4 * 0.5 * 0.3 * 0.4 * 0.6 * 0.4) == pytest.approx(-5.156817804274337, abs=1e-12)


def test_the_similarity_of_the_notes_is_minus_k1() -> None:
    """ref - logp is large where the policies agree: its mean under the policy is -KL(policy || reference)."""
    generator = torch.Generator().manual_seed(0)
    policy, reference = (torch.randn(5, generator=generator, dtype=torch.float64) for _ in range(2))
    tokens = torch.arange(5)
    u = logprobs(policy.expand(5, 5), tokens) - logprobs(reference.expand(5, 5), tokens)
    similarity = -k1(u)
    kl = (policy.softmax(-1) * (policy.log_softmax(-1) - reference.log_softmax(-1))).sum()
    assert (policy.softmax(-1) * similarity).sum().item() == pytest.approx(-kl.item(), abs=1e-12) and kl > 0


def test_the_gradient_weight_of_a_token_is_advantage_times_ratio() -> None:
    """d gain / d logprobs_t = Adv_t rho_t inside the clip range, 0 where it cuts."""
    old = torch.tensor([-1.0, -1.0, -1.0, -1.0], dtype=torch.float64)
    new = (old + torch.tensor([0.1, -0.1, 0.5, -0.5], dtype=torch.float64)).requires_grad_()
    advantages = torch.tensor([2.0, -1.0, 1.0, -3.0], dtype=torch.float64)
    ratio = (new - old).exp()
    (slope,) = torch.autograd.grad(Clip(0.2, 0.2)(ratio, new, advantages).sum(), new)
    expected = torch.where(torch.tensor([True, True, False, False]), advantages * ratio.detach(), 0)
    assert torch.allclose(slope, expected, atol=1e-12)


@pytest.mark.parametrize(
    "name, held, ruled, clip, kl",
    [("ppo", 4, 3, "token", "reward"), ("rloo_clip", 3, 2, "answer", "reward"), ("rloo", 3, 2, "none", "reward"), ("grpo", 3, 2, "token", "loss")],
)  # fmt: skip
def test_describe_says_models_held_clip_and_kl(name: str, held: int, ruled: int, clip: str, kl: str) -> None:
    row = ALGORITHMS[name]
    assert len(models(row)) == held and len(models(row, ruled=True)) == ruled
    assert (clip_level(row), kl_place(row)) == (clip, kl)
    text = card(row)
    assert re.search(rf"models held +{held}: ", text) and re.search(rf"KL in +{kl}\n", text)
    assert re.search(r"clip +none\n" if clip == "none" else rf"clip +of the {clip}\n", text)
    assert re.search(rf"models held +{ruled}: ", card(row, reward_models=0))


def test_dpo_holds_two_models() -> None:
    assert models(PREFERENCES["dpo"]) == ["policy", "reference"]


def test_the_record_of_a_run_counts_the_models_that_it_held(pipeline: Any) -> None:
    text = (stage(pipeline, "rl") / "objective.txt").read_text()
    assert re.search(r"models held +4: ", text) and "reward_models 1" in text


def test_on_the_first_update_ratio_is_one_kl_zero_clip_fraction_zero(batch: Any, pipeline: Any) -> None:
    line = read_metrics(stage(pipeline, "rl") / "metrics.jsonl")[0]
    assert line["val/first_gap"] < 1e-5 and abs(line["objective/kl"]) < 1e-4
    assert line["sampler/probability_gap_mean"] < 0.005, "sampler and learner are one policy"
    given = yaml.safe_load((stage(pipeline, "rl") / "config.yaml").read_text())
    given.pop("recipe")
    once = rl.run(rl.Config.model_validate(given | {"name": "once", "passes": 1, "steps": 1}))
    line = read_metrics(once.directory.metrics)[0]
    assert line["val/ratio"] == 1 and line["policy/approxkl_avg"] == 0 and line["policy/clipfrac_avg"] == 0


def test_a_learning_rate_of_zero_changes_nothing(batch: Any) -> None:
    learner = learner_of(shared=False, lr=0.0)
    marks = fingerprint(learner.policy), fingerprint(learner.critic)
    updated(learner, batch)
    assert (fingerprint(learner.policy), fingerprint(learner.critic)) == marks and learner.version == 1


def test_the_page_names_these_tests() -> None:
    page = (Path(__file__).parents[2] / "docs" / "parity.md").read_text(encoding="utf-8")
    named = re.findall(r"\| `(test_\w+)` \|$", page.partition("## The pipeline of four models")[2], re.MULTILINE)
    here = [name for name in globals() if name.startswith("test_")]
    assert sorted(named) == sorted(set(here) - {"test_the_page_names_these_tests"})
