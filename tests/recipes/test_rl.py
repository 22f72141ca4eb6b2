"""The rl recipe end to end: every row runs, what must not change does not, and what is wrong is refused or stops the run."""

from __future__ import annotations

import json
import math
import re
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from tilt.errors import NumericError, UsageError
from tilt.learning import learner
from tilt.models.loading import load, tiny
from tilt.models.policy import Policy
from tilt.models.saving import save
from tilt.objectives import ALGORITHMS, GLOSSARY, Imitate
from tilt.recipes import rl, roles, stopping, taking_up
from tilt.runs import rollout_store
from tilt.sampling.sampler import Sampler


def variety(completions: list[str], **columns: object) -> list[float]:
    return [float(len(set(text))) for text in completions]


TINY = {"width": 16, "layers": 1, "heads": 2, "context": 32, "vocabulary": 270}
LORA = {"rank": 2, "alpha": 4.0}
CLOCK = ("time", "tokens_per_second", "eps")


def plain(lines: list[dict]) -> list[dict]:
    """Metrics without what depends on the clock and without evaluations."""
    return [{k: v for k, v in line.items() if not k.startswith((*CLOCK, "eval/")) and not k.endswith("_seconds")} for line in lines]


def training(lines: list[dict]) -> list[dict]:
    return [line for line in plain(lines) if "loss" in line or "skipped" in line]


@pytest.mark.parametrize("name", [name for name, row in ALGORITHMS.items() if row.credit != Imitate()])
def test_every_row_of_the_table_runs(run_rl, run_sft, metrics, tmp_path, name):
    """Rows that imitate given answers are trained by sft."""
    more = {"nlpo": {"mask": {}}, "ppo_kl": {"passes": 2}}.get(name, {})
    if name == "distill":
        student = run_sft(steps=1).checkpoint
        more = {"model": str(student), "reference": str(run_sft(model=str(student), steps=6, optimizer={"lr": 1e-2}).checkpoint)}
    if name == "grpo_process":
        (tmp_path / "steps.py").write_text("def variety(steps): return [float(len(set(step))) for step in steps]")
        more = {"reward": {"process": {"path": str(tmp_path / "steps.py:variety"), "separator": "e"}}}
    result = run_rl(algorithm=name, **more)
    lines = metrics(result)
    assert [line["step"] for line in lines] == [0, 1, 2]
    assert all(math.isfinite(value) for line in lines for value in line.values())
    assert lines[0]["grad_norm"] > 0 and "eval/reward" in lines[0] and "eval/reward" in lines[2]
    if name != "ppo_kl":  # which needs two steps
        assert lines[0].get("val/ratio", 1.0) == 1.0 and lines[0].get("val/first_gap", 0.0) == 0.0
    assert lines[0]["sampler/logprob_gap_max"] < 1e-4
    assert (result.checkpoint / "model.safetensors").exists()


@pytest.mark.parametrize("name", ["ppo", "grpo", "gspo", "rloo_clip", "reinforce_pp"])
def test_several_passes_and_minibatches_run(run_rl, metrics, name):
    lines = metrics(run_rl(algorithm=name, passes=2, minibatches=2, critic_lr=2e-3 if name == "ppo" else None, micro_tokens=40))
    assert lines[0]["val/first_gap"] < 1e-5 and lines[0]["val/ratio"] != 1.0
    assert all(math.isfinite(value) for line in lines for value in line.values())


@pytest.mark.parametrize("cut", [{"top_k": 20}, {"top_p": 0.8}, {"min_p": 0.7, "temperature": 0.8}], ids=str)
def test_truncated_training_answers_are_scored_within_their_kept_sets(run_rl, metrics, cut):
    """The ratio is exactly 1 before the first step, the sampler agrees, and the store gives each token its set."""
    result = run_rl(algorithm="ppo", sampling={"max_tokens": 6, "keep_sets": True, **cut}, passes=2, steps=1)
    first = metrics(result)[0]
    assert (
        first["val/first_gap"] == 0.0
        and first["sampler/logprob_gap_max"] < 1e-4
        and 1 < first["sampler/kept_mean"] <= cut.get("top_k", 270)
    )
    rows = rollout_store.read(rollout_store.path_of(result.directory.rollouts, 0))
    for row in rows:
        kept = rollout_store.kept_of(row)
        assert kept is not None and len(kept) == len(row["ids"])
        assert all(token in among and sorted(among) == among for token, among in zip(row["ids"], row["kept"], strict=True))


def test_evaluations_follow_their_own_settings(run_rl, monkeypatch):
    """Whatever narrows training answers: `eval` has its own truncation, and keeps no sets."""
    asked, plain = [], Sampler.evaluate
    monkeypatch.setattr(Sampler, "evaluate", lambda self, *a, **k: (asked.append(k.get("sampling")), plain(self, *a, **k))[1])
    run_rl(
        sampling={"max_tokens": 6, "keep_sets": True, "top_k": 9}, mask={}, eval={"prompts": 4, "min_p": 0.25, "temperature": 0.5}, steps=1
    )
    narrowed = [(s.temperature, s.top_k, s.top_p, s.min_p, s.keep_sets) for s in asked]
    assert set(narrowed) == {(1.0, 9, 1.0, 0.0, True), (0.5, 0, 1.0, 0.25, False)}, "the rehearsal of the reward, and the evaluations"


@pytest.mark.parametrize(("name", "passes"), [("trpo", 1), ("ppo_kl", 2)])
@pytest.mark.parametrize(
    "narrow", [{"sampling": {"max_tokens": 6, "keep_sets": True, "top_p": 0.6}}, {"mask": {"top_p": 0.6}}], ids=["sets", "mask"]
)
def test_exact_divergences_and_fisher_products_stay_within_the_sets(run_rl, metrics, name, passes, narrow):
    """A divergence from a distribution cut elsewhere would be infinite."""
    lines = metrics(run_rl(algorithm=name, passes=passes, **narrow))
    assert all(math.isfinite(value) for line in lines for value in line.values())
    assert all(line["sampler/logprob_gap_max"] < 1e-4 and line["grad_norm"] > 0 for line in lines[:-1])


def test_a_mask_is_taken_again_every_so_many_steps(run_rl, metrics, monkeypatch):
    """With any row: sets and card say so, copies are taken at steps 0 and 2, and ratio and sampler agree before each first step."""
    taken = []
    plain = Sampler.mask
    monkeypatch.setattr(Sampler, "mask", lambda self, top_p: (taken.append((self.version, top_p)), plain(self, top_p)))
    result = run_rl(
        algorithm="grpo", mask={"top_p": 0.5, "refresh": 2}, sampling={"max_tokens": 6, "keep_sets": True, "top_k": 99}, passes=2, steps=4
    )
    assert taken == [(0, 0.5), (2, 0.5)]
    for line in metrics(result)[:-1]:
        assert line["val/first_gap"] == 0.0 and line["sampler/logprob_gap_max"] < 1e-4 and 1 < line["sampler/kept_mean"] <= 99
    said = (result.directory.path / "objective.txt").read_text()
    assert (
        "drawn within the top-p 0.5 sets of a copy of the policy, taken every 2 steps and held beside the models above, then top_k 99; policy, old, reference"
        in said
    )


def test_every_metric_has_a_line_in_the_glossary(run_rl, run_sft, metrics, rows):
    known = {name.replace("<part>", part) for name in GLOSSARY for part in ("variety", "missing_stop")}
    beside = {"pretrain_data": {"source": str(rows), "read_as": "sft", "batch": 4}, "pretrain_coefficient": 1.0, "ema": 0.9}
    reward = {"function": variety, "normalise": True}
    more = {"reward": reward, "missing_stop_penalty": 0.1, "keep": {"mixed": True}, "reference_update": {"every": 1}}
    for result in (run_rl(algorithm="ppo", measure=[variety], **beside, **more), run_sft(reward=variety, eval={"every": 1})):
        seen = {name for line in metrics(result) for name in line} - {"step", "time"}
        assert sorted(seen - known) == []


def test_evaluation_does_not_touch_training(run_rl, metrics):
    often, never = (metrics(run_rl(algorithm="ppo", steps=3, eval={"every": every, "prompts": n})) for every, n in ((1, 5), (0, 2)))
    assert training(often) == training(never)
    assert [("eval/reward" in line) for line in often] == [True] * 4 and [("eval/reward" in line) for line in never] == [
        True,
        False,
        False,
        True,
    ]


def test_storing_rollouts_does_not_touch_training(run_rl, metrics):
    assert training(metrics(run_rl(rollouts_every=1, save_every=1))) == training(metrics(run_rl(rollouts_every=0)))


def test_a_seed_fixes_the_run_and_another_changes_it(run_rl, metrics):
    first, again, other = (training(metrics(run_rl(seed=seed))) for seed in (3, 3, 4))
    assert first == again != other


def test_the_record_names_the_recipe_the_row_and_a_python_reward(run_rl):
    result = run_rl()
    text = result.directory.config.read_text()
    config = yaml.safe_load(text)
    assert config["recipe"] == "rl" and config["algorithm"] == "grpo" and config["reward"].endswith(":variety")
    assert text.startswith("# reward: a Python object in hand") and result.directory.name.startswith("grpo-")
    assert "objective: Objective(" in (result.directory.path / "objective.txt").read_text()


def test_a_configuration_of_plain_values_reruns_from_its_record(run_rl, metrics):
    first = run_rl(reward={"length": 3}, seed=5)
    given = yaml.safe_load(first.directory.config.read_text())
    assert given.pop("recipe") == "rl"
    again = rl.run(rl.Config.model_validate(given))
    assert training(metrics(first)) == training(metrics(again))


def test_stored_rollouts_hold_the_channels(run_rl, metrics):
    result = run_rl(algorithm="ppo", passes=2, optimizer={"lr": 3e-2}, critic_lr=1e-2)
    rows = rollout_store.read(rollout_store.path_of(result.directory.rollouts, 1))
    assert len(rows) == 16
    for name in (
        "ratio",
        "clip",
        "push",
        "entropy",
        "value",
        "return",
        "token_reward",
        "adv_t",
        "delta_ref",
        "kl",
        "old_logprobs",
        "new_logprobs",
    ):
        assert len(rows[0][name]) == len(rows[0]["ids"]), name
    clips = {mark for row in rows for mark in row["clip"]}
    assert clips <= {-1, 0, 1, 2} and len(clips) > 1
    for row in rows:
        assert sum(row["token_reward"]) == pytest.approx(
            row["reward"] - 0.05 * sum(o - r for o, r in zip(row["old_logprobs"], row["reference_logprobs"], strict=True)), abs=2e-2
        )
        group = [other["reward"] for other in rows if other["group_id"] == row["group_id"]]
        assert row["group_mean"] == pytest.approx(sum(group) / 4, abs=1e-5)
    line = metrics(result)[1]
    assert sum(mark in (-1, 1) for row in rows for mark in row["clip"]) == line["policy/clipped"] > 0
    looked = [row for row in rows if row["topk_ids"] is not None]
    assert len(looked) == 8
    for row in rows:
        for t, token in enumerate(row["ids"]):
            assert math.isnan(row["result"][t]) == (row not in looked)
            if row in looked:
                best = dict(zip(row["topk_ids"][t], row["topk_logp"][t], strict=True))
                assert len(best) == 5 and list(best.values()) == sorted(best.values(), reverse=True)
                assert len(row["topk_ref"][t]) == len(row["topk_text"][t]) == 5
                assert token not in best or best[token] == pytest.approx(row["old_logprobs"][t], abs=4e-3)


def test_channels_come_less_often_as_their_budget_is_used(run_rl):
    result = run_rl(rollouts_every=1, steps=12, channels_mb=3e-3)
    with_channels = [step for step in range(12) if rollout_store.has_channels(rollout_store.path_of(result.directory.rollouts, step))]
    assert with_channels[0] == 0
    gaps = [b - a for a, b in pairwise(with_channels)]
    assert len(with_channels) < 12 and gaps[:-1] == sorted(gaps[:-1]) and max(gaps) >= 2 and with_channels[-1] == 11
    assert rollout_store.stored(result.directory.rollouts) == list(range(12))


def test_groups_without_a_difference_are_marked_skipped_and_counted(run_rl, metrics):
    def same(completions, **columns):
        return [1.0] * len(completions)

    result = run_rl(algorithm="dapo", reward=same)
    lines = metrics(result)
    assert [line.get("skipped") for line in lines] == [1.0, 1.0, None] and lines[1]["skipped/total"] == 2
    assert "skipped    2 of 2 batches" in result.directory.log.read_text()
    assert {row["dropped_reason"] for row in rollout_store.read(rollout_store.path_of(result.directory.rollouts, 0))} == {"zero_variance"}
    assert lines[0]["objective/entropy"] > 0  # also of answers that no update looked at


def test_unscored_answers_are_counted_and_left_out(run_rl, metrics):
    def some(completions, **columns):
        return [None if i % 4 == 1 else float(len(set(text))) for i, text in enumerate(completions)]

    result = run_rl(algorithm="dapo", reward=some)
    assert metrics(result)[0]["objective/unscored"] == 0.25
    rows = rollout_store.read(rollout_store.path_of(result.directory.rollouts, 0))
    assert [row["reward"] is None for row in rows] == [i % 4 == 1 for i in range(16)]
    assert all(row["dropped_reason"] == "filter" and row["advantage"] == 0 for row in rows[1::4])


def test_nothing_could_be_scored(run_rl, metrics):
    lines = metrics(run_rl(reward=lambda completions, **columns: [None] * len(completions), algorithm="ppo", eval={"prompts": 2}))
    assert lines[0]["objective/unscored"] == 1.0 and lines[0]["skipped"] == 1.0 and "grad_norm" not in lines[0]


def test_a_run_that_its_kl_ends_at_a_step_to_be_saved_is_saved_once(run_rl):
    result = run_rl(steps=6, save_every=1, max_kl=1e-9, optimizer={"lr": 3e-2})
    assert "is above max_kl" in result.directory.log.read_text()
    saved = sorted(folder.name for folder in result.directory.checkpoints.iterdir())
    assert saved[-1] == result.checkpoint.name and 1 < len(saved) < 6
    result = run_rl(steps=16, save_every=1, stop_rise=1e-9, optimizer={"lr": 3e-2})
    assert "the reward has risen" in result.directory.log.read_text() and "step_000009" < result.checkpoint.name < "step_000016"


# --- frozen models --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def trained(run_sft, run_rm):
    """An SFT model and a reward model on its body."""
    policy = run_sft(steps=2).checkpoint
    return policy, run_rm(model=str(policy), steps=2).checkpoint


@pytest.mark.parametrize(
    "extra",
    [
        {},
        {"lora": LORA},
        {"critic": "shared"},
        {"critic": "shared", "lora": LORA},
        {"critic": "policy"},
        {"critic": "reward_model", "critic_warmup": 1},
    ],
)
def test_four_models(run_rl, metrics, trained, extra):
    policy, judge = trained
    result = run_rl(
        algorithm="ppo", model=str(policy), reward={"model": str(judge), "name": "rm"}, optimizer={"lr": 1e-2}, passes=2, **extra
    )
    lines = metrics(result)
    assert all(math.isfinite(value) for line in lines for value in line.values())
    log = result.directory.log.read_text()
    assert (
        "unchanged  reward model 0" in log and ("unchanged  base under the adapter" if "lora" in extra else "unchanged  reference") in log
    )
    before, after = (torch.cat([p.flatten() for p in load(place)[0].parameters()]) for place in (policy, result.checkpoint))
    assert not torch.equal(before, after)
    assert lines[0]["objective/kl"] == pytest.approx(0.0, abs=1e-4) and lines[-1]["eval/kl"] != 0.0
    if extra.get("critic") == "shared":
        assert load_file(result.checkpoint / "value_head.safetensors")["weight"].abs().max() > 0
    else:
        head = load_file(result.checkpoint / "critic" / "value_head.safetensors")
        assert set(head) == {"weight", "bias"} and (result.checkpoint / "critic" / "model.safetensors").exists()
    if extra.get("critic_warmup"):
        assert "grad_norm" not in lines[0] and "grad_norm" in lines[1] and lines[0]["critic/grad_norm"] > 0


def test_a_reward_model_of_other_tokens_scores_the_text(run_rl, run_rm, trained):
    judge = run_rm(model={"kind": "llama", "width": 24, "layers": 1, "heads": 2, "context": 64, "vocabulary": 300}, lora=LORA).checkpoint
    result = run_rl(algorithm="ppo", model=str(trained[0]), reward=[{"model": str(judge), "weight": 0.5}, {"length": 4}])
    assert "unchanged  reward model 0" in result.directory.log.read_text()
    with pytest.raises(UsageError, match="no reward model here reads the policy's tokens"):
        run_rl(algorithm="ppo", model=str(trained[0]), reward={"model": str(judge)}, critic="reward_model")


def test_a_reference_from_a_path_is_used_and_never_changes(run_rl, metrics, trained, run_sft, pairs):
    other = run_sft(model=str(trained[0]), steps=6, optimizer={"lr": 1e-2}).checkpoint
    result = run_rl(model=str(trained[0]), reference=str(other))
    assert abs(metrics(result)[0]["kl"]) > 1e-3 and "unchanged  reference" in result.directory.log.read_text()
    strange = run_sft(data={"source": str(pairs), "template": "text"}, steps=1).checkpoint
    with pytest.raises(UsageError, match="its tokenizer differs"):
        run_rl(model=str(trained[0]), reference=str(strange))


def test_a_frozen_model_that_changed_is_found(run_rl, trained, monkeypatch):
    policy, judge = trained
    found = rl.train

    def corrupt(config, parts, run):
        with torch.no_grad():
            parts.scoring.models[0][0].score_layer.weight.add_(1.0)
        return found(config, parts, run)

    monkeypatch.setattr(rl, "train", corrupt)
    with pytest.raises(NumericError, match="reward model 0 changed"):
        run_rl(model=str(policy), reward={"model": str(judge)})


def test_with_an_adapter_the_reference_is_exact(run_rl, metrics, trained):
    lines = metrics(run_rl(model=str(trained[0]), lora=LORA, steps=3, optimizer={"lr": 5e-2}))
    assert lines[0]["kl"] == pytest.approx(0.0, abs=1e-5) and lines[0]["eval/kl"] == 0.0
    assert abs(lines[-1]["eval/kl"]) > 1e-4


# --- a reference that follows the policy -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
def test_a_reference_that_is_reset_stands_where_the_policy_stood(run_rl, metrics, trained, lora):
    """Iterative GRPO: after a reset the policy is its own reference; the first one is kept, measured against, and never changes."""
    result = run_rl(
        model=str(trained[0]), lora=lora, steps=4, optimizer={"lr": 3e-2}, reference_update={"every": 2, "share": 1.0}, eval={"every": 1}
    )
    lines, log = metrics(result), result.directory.log.read_text()
    assert [abs(line["kl"]) < 1e-5 for line in lines[:4]] == [True, False, True, False], "steps 0 and 2 begin at the reference"
    assert [line["reference/distance"] == 0 for line in lines[:4]] == [True, False, False, False]
    assert lines[1]["reference/distance"] == lines[2]["reference/distance"] < lines[3]["reference/distance"]
    assert lines[0]["eval/kl_first"] == pytest.approx(0.0, abs=1e-5) and lines[1]["eval/kl_first"] == pytest.approx(
        lines[1]["eval/kl"], abs=1e-5
    )
    assert abs(lines[2]["eval/kl"]) < 1e-5 < abs(lines[2]["eval/kl_first"])
    assert "unchanged  first reference" in log and "unchanged  reference" not in log


def test_a_reference_that_averages_is_its_recursion(trained):
    lm, _ = load(trained[0])
    policy, config = Policy(lm), rl.Config.model_validate(
        {"model": "x", "data": "x", "reward": "exact", "reference_update": {"every": 1, "share": 0.25}}
    )  # fmt: skip
    anchor, frozen = roles.reference(config, policy, None, torch.device("cpu"))
    moving = roles.moving(config, anchor, policy)
    assert frozen == {} and moving.distance == 0.0
    first = [p.detach().clone() for p in lm.parameters()]
    truth = [p.clone() for p in first]
    for step in range(3):
        with torch.no_grad():
            for p in lm.parameters():
                p.add_(0.1 * (step + 1))
        moving.move(policy)
        truth = [0.25 * p.detach() + 0.75 * kept for p, kept in zip(lm.parameters(), truth, strict=True)]
        assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(truth, moving.reference.parameters(), strict=True))
    away = sum(float((a - b).double().square().sum()) for a, b in zip(truth, first, strict=True))
    assert moving.distance == pytest.approx((away / sum(float(b.double().square().sum()) for b in first)) ** 0.5, rel=1e-4)
    assert all(torch.equal(a, b) for a, b in zip(first, moving.first.parameters(), strict=True))
    with anchor() as reference:
        assert reference is moving.reference


# --- the scale of rewards --------------------------------------------------------------------------------------------------------


def test_several_rewards_each_on_its_own_scale(run_rl, metrics):
    reward = [variety, {"length": {"high": 2, "ramp": 4}, "weight": 0.5}]
    summed, apart = (metrics(run_rl(reward=reward, objective=given)) for given in ({}, {"credit": "parts_relative"}))
    assert summed[0]["reward"] == apart[0]["reward"] and summed[0]["loss/policy_avg"] != apart[0]["loss/policy_avg"]
    assert apart[0]["grad_norm"] > 0 and apart[0]["reward/length"] == summed[0]["reward/length"]


def test_a_normalised_reward_is_normalised_in_training_and_plain_in_evaluation(run_rl, metrics, trained):
    policy, judge = trained
    plain, scaled = (
        metrics(
            run_rl(
                algorithm="ppo", model=str(policy), reward={"model": str(judge), "name": "rm", "normalise": normalise}, eval={"every": 1}
            )
        )
        for normalise in (False, True)
    )
    assert plain[0]["eval/reward"] == scaled[0]["eval/reward"] and plain[0]["reward/rm"] == scaled[0]["reward/rm"]
    assert scaled[0]["reward"] == pytest.approx(0.0, abs=1e-5) and scaled[0]["objective/scores_std"] == pytest.approx(1.0, abs=1e-4)
    assert scaled[0]["reward/rm_running_mean"] == pytest.approx(scaled[0]["reward/rm"], abs=1e-5)


def test_a_reward_is_clipped_before_the_penalty_for_a_missing_stop(run_rl, metrics):
    line = metrics(run_rl(reward_clip=1.5, missing_stop_penalty=0.25, sampling={"max_tokens": 3}))[0]
    assert line["reward/variety"] > 1.5 > line["reward"] and line["reward/missing_stop"] == pytest.approx(-line["length/truncated"])
    assert (
        line["reward"] >= 1.0 - 0.25
        and run_rl(objective={"credit": {"gae": {"whiten_rewards": True}}}, algorithm="ppo").checkpoint.exists()
    )


# --- pretraining beside, and the average of the weights --------------------------------------------------------------------------


@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
def test_the_average_of_the_weights_is_a_model_beside_the_checkpoint(run_rl, metrics, trained, lora):
    policy, _ = trained
    result = run_rl(model=str(policy), ema=0.5, lora=lora, optimizer={"lr": 1e-2}, steps=1)
    start, end, average = (load(place)[0].state_dict() for place in (policy, result.checkpoint, result.checkpoint / "ema"))
    assert any(not torch.equal(average[name], end[name]) for name in start)
    if lora is None:  # one step: halfway
        assert all(torch.allclose(average[name], (start[name] + end[name]) / 2, atol=1e-6) for name in start)
    again = run_rl(model=str(result.checkpoint / "ema"), steps=1)
    assert metrics(again)[0]["eval/reward"] == pytest.approx(metrics(result)[-1]["eval/ema_reward"], abs=1e-6)
    assert not (run_rl(steps=1).checkpoint / "ema").exists()


def test_pretraining_beside_is_measured_and_changes_what_is_learned(run_rl, metrics, rows):
    texts = {"source": str(rows), "read_as": "sft", "batch": 4}
    plainly, beside = run_rl(), run_rl(pretrain_data=texts, pretrain_coefficient=27.8)
    first, *_, last = metrics(beside)
    assert first["pretrain/nll"] > 0 and last["eval/pretrain_perplexity"] == pytest.approx(math.exp(last["eval/pretrain_nll"]))
    assert last["eval/pretrain_nll"] < first["eval/pretrain_nll"] and "eval/pretrain_nll" not in metrics(plainly)[0]
    assert "pieces to pretrain on, 4 an optimizer step, weight 27.8" in beside.directory.log.read_text()
    assert "eval/pretrain_nll" not in metrics(run_rl(pretrain_data=texts | {"held_out": 0.0}, pretrain_coefficient=1.0))[0]
    with pytest.raises(UsageError, match="pretrain_data.batch 1000"):
        run_rl(pretrain_data=texts | {"batch": 1000}, pretrain_coefficient=1.0)


# --- precision ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["grpo", "ppo"])
def test_bfloat16_on_a_processor(run_rl, metrics, name):
    lines = metrics(run_rl(algorithm=name, dtype="bfloat16", passes=2))
    assert all(math.isfinite(value) for line in lines for value in line.values())
    assert 0 < lines[0]["sampler/logprob_gap_max"] < 0.1


@pytest.mark.parametrize(("beta", "above"), [(1e-2, True), (1e3, False)])
def test_an_adaptive_penalty_reaches_its_target(run_rl, metrics, beta, above):
    """KL(old || policy) of a step starts far above its target, or far below; beta is doubled or halved until it stays within a factor of 1.5."""
    objective = {
        "penalty": {"old_kl": {"beta": beta}},
        "control": {"doubling": {"target": 0.02}},
        "value": "none",
        "credit": "group_relative",
    }
    lines = training(metrics(run_rl(
        algorithm="ppo_kl", objective=objective, passes=4, steps=40, prompts=8, optimizer={"lr": 2e-2}, rollouts_every=0, save=False
    )))  # fmt: skip
    kl, used = [line["policy/kl_old"] for line in lines], [line["kl_coefficient"] for line in lines]
    assert kl[0] > 0.04 if above else kl[0] < 0.005
    for now, then, distance in zip(used, used[1:], kl, strict=False):
        assert then == now * (2 if distance > 0.03 else 0.5 if distance < 0.02 / 1.5 else 1)
    assert 0.02 / 1.5 < sorted(kl[-15:])[7] < 0.03 and 1 < used[-1] < 100, (kl, used)


def test_a_controller_waits_while_only_the_critic_learns(run_rl, metrics):
    lines = training(metrics(run_rl(algorithm="ppo_kl", passes=2, critic_warmup=2, steps=4, rollouts_every=0, save=False)))
    assert [line["kl_coefficient"] for line in lines[:3]] == [1.0, 1.0, 1.0] and lines[0]["policy/kl_old"] < 1e-9 < lines[3][
        "policy/kl_old"
    ]


def test_a_trust_region_run_says_what_each_step_did(run_rl, metrics):
    run = run_rl(algorithm="trpo", lora={"rank": 2}, steps=3, critic_lr=1e-2)
    lines = training(metrics(run))
    assert all(0 < line["trpo/kl"] <= 0.01 and line["trpo/improvement"] > 0 and "lr" not in line for line in lines)
    bare = run_rl(algorithm="trpo", objective={"credit": "group_relative", "value": "none"}, optimizer={"lr": 1e-3})
    assert "optimizer: without effect, a trust region" in (bare.directory.path / "log.txt").read_text()


# --- what is refused, what stops -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"samples": 1}, "samples=1 gives no signal"),
        ({"algorithm": "ppo_kl"}, "with one optimizer step is the policy itself: set passes to 2"),
        ({"algorithm": "trpo", "passes": 2}, "one natural step on the whole batch.*set passes to 1"),
        ({"algorithm": "trpo", "minibatches": 2}, "one natural step on the whole batch; set minibatches to 1"),
        ({"algorithm": "trpo", "critic": "shared"}, "the critic needs weights of its own"),
        ({"algorithm": "trpo", "pretrain_data": "texts.txt", "pretrain_coefficient": 1.0}, "follows the surrogate alone"),
        ({"algorithm": "nlpo"}, "nlpo is PPO inside a mask.*set mask to"),
        ({"mask": {"top_p": 1.0}}, "mask.top_p"),
        ({"sampling": {"top_k": 5}}, "top_k in training answers.*Set sampling.keep_sets: true"),
        ({"sampling": {"top_k": 5, "keep_sets": True, "temperature": 0.0}}, "temperature"),
        ({"algorithm": "rloo", "passes": 2}, "set passes to 1"),
        ({"algorithm": "rloo", "minibatches": 2}, "set minibatches to 1"),
        ({"minibatches": 17}, "more than the 16 answers"),
        ({"algorithm": "ppo", "critic": "shared", "critic_warmup": 1}, "critic shared has no weights of its own"),
        ({"critic_warmup": 2}, "leaves no step"),
        ({"reward": "nowhere.py:score"}, "there is no reward file"),
        ({"reward": [{"lenth": 3}, {"exact": {}, "weight": "much"}]}, "(?s)unknown key.*lenth.*expected a finite number"),
        ({"pretrain_coefficient": 1.0}, "pretrain_data and pretrain_coefficient go together"),
        ({"pretrain_data": "texts.txt"}, "pretrain_data and pretrain_coefficient go together"),
        ({"ema": 1.0}, "less than 1"),
        ({"algorithm": "dapo", "reference_update": {"every": 5}}, "algorithm dapo reads no reference"),
        ({"algorithm": "distill", "reference": "x", "reference_update": {"every": 5}}, "would move the teacher"),
        ({"reward_clip": 0.0}, "greater than 0"),
        ({"reward_clip": 1.0, "objective": {"credit": "parts_relative"}}, "reward_clip holds the weighted sum"),
        (
            {"reward": {"length": 3, "normalise": True}, "objective": {"credit": "parts_relative"}},
            "parts_relative normalises every part itself",
        ),
        ({"reward": {"length": 3, "normalise": True}, "stop_rise": 1.0}, "whose part length is normalised"),
        ({"algorithm": "distill"}, "set reference to the teacher's path"),
        ({"measure": "exact:3"}, "does not name a reward function"),
    ],
)
def test_settings_that_cannot_work_are_refused(run_rl, settings, words):
    with pytest.raises((UsageError, ValueError), match=words):
        run_rl(**settings)


def test_too_few_prompts_and_missing_places_are_refused_before_a_run_exists(run_rl, shared):
    with pytest.raises(UsageError, match="only 5[0-9] training prompts"):
        run_rl(prompts=1000)
    with pytest.raises(UsageError, match="tokenizer /nowhere"):
        run_rl(model={"width": 16, "tokenizer": "/nowhere"})
    with pytest.raises(UsageError, match="no such folder"):
        run_rl(model="/nowhere/model")
    with pytest.raises(UsageError, match="qwen2 model with this tokenizer cannot be saved"):
        run_rl(model={"kind": "qwen2", "width": 16, "layers": 1, "heads": 2, "context": 32, "vocabulary": 270})
    assert not Path(shared["root"]).exists()


def test_an_idle_critic_setting_is_said_and_changes_nothing(run_rl, metrics):
    plainly, idle = run_rl(), run_rl(critic_lr=1e-2, critic_warmup=1)
    assert "critic_lr, critic_warmup: without effect" in idle.directory.log.read_text()
    assert training(metrics(plainly)) == training(metrics(idle))


def test_answers_that_the_context_cuts_are_said(run_rl, metrics):
    """Prompts of 4 tokens and 40 for the answer in a context of 32: answers end after 28."""
    result = run_rl(steps=1, sampling={"max_tokens": 40})
    said = re.search(
        r"(\d+) of \1 prompts leave less than sampling.max_tokens 40 of the model's context of 32 tokens", result.directory.log.read_text()
    )
    assert said
    assert metrics(result)[0]["length/mean"] <= 28
    assert "of the model's context" not in run_rl(steps=1).directory.log.read_text()


def test_a_batch_that_breaks_the_loss_is_kept(run_rl, shared, monkeypatch):
    found = learner.Learner._forward

    def broken(self, small, objective, temperature, anchor):
        said = found(self, small, objective, temperature, anchor)
        return type(said)(**{**vars(said), "logprobs": said.logprobs * torch.nan}) if self.version == 1 else said

    monkeypatch.setattr(learner.Learner, "_forward", broken)
    with pytest.raises(NumericError, match="step 1: the policy's log-probabilities is not finite") as caught:
        run_rl(name="broken")
    assert caught.value.exit_code == 4
    kept = torch.load(Path(shared["root"]) / "broken" / "bad_batch_step_000001.pt", weights_only=True)
    assert kept["step"] == 1 and len(kept["batch"]["actions"]) == len(kept["experience"]["advantages"]) > 0
    assert "stopped: NumericError" in (Path(shared["root"]) / "broken" / "log.txt").read_text()


def test_a_stale_sampler_stops_the_run(run_rl, monkeypatch):
    def stale(self, policy):
        with torch.no_grad():
            self.lm = tiny("qwen3", vocabulary=270, width=16, layers=1, heads=2, context=32, seed=9)
            self.lm.get_output_embeddings().weight.mul_(60)

    monkeypatch.setattr(rl.Sampler, "load", stale)
    with pytest.raises(NumericError, match="disagree about the same answers"):
        run_rl(algorithm="dapo")


def test_workers_of_a_reward_end_with_the_run(run_rl, tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text("def score(completions, **columns):\n    return [float(len(set(t))) for t in completions]\n")
    closed = []
    found = rl.Scoring.close
    monkeypatch.setattr(rl.Scoring, "close", lambda self: (closed.append(self), found(self)))
    run_rl(reward=f"{tmp_path / 'mine.py'}:score")
    assert len(closed) == 1
    monkeypatch.setattr(rl, "train", lambda *parts: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run_rl(measure={"length": 3})
    assert len(closed) == 3


def test_failures_of_a_reward_are_said_once(run_rl, metrics):
    def shaky(completions, **columns):
        return [math.nan] * len(completions)

    result = run_rl(reward={"function": shaky, "on_error": "skip"})
    assert result.directory.log.read_text().count("returned nan") == 1
    assert metrics(result)[0]["reward/shaky_failed"] == 16


# --- one's own row ---------------------------------------------------------------------------------------------------------------


def test_a_row_of_ones_own_from_a_file_trains_from_python(run_rl, metrics):
    file = Path(__file__).parents[2] / "examples" / "my_variant.py"
    result = run_rl(algorithm=f"{file}:MINE", objective={"penalty": {"k2": {"beta": 0.1}}}, passes=2)
    record = (result.directory.path / "objective.txt").read_text()
    assert "Smooth(width=4.0)" in record and "K2(beta=0.1" in record and "sha256" in record
    assert metrics(result)[0]["grad_norm"] > 0 and result.directory.name.startswith("my-variant-")


def test_overriding_part_of_a_row_from_words(rows, shared):
    from tilt.config import gather, parse

    document = gather(
        [],
        [
            f"data={rows}",
            "data.held_out=0.5",
            "data.template=text",
            "model.width=16",
            "reward.length.high=3",
            "objective.surrogate.high=0.28",
            "algorithm=dapo",
        ],
    )
    config = parse(document.values, rl.Config, document.origins)
    assert config.data.held_out == 0.5 and config.data.source == str(rows)
    assert rl.optimised(config.algorithm, config.objective, {}, 64)[1].surrogate.high == 0.28


# --- base models whose padding is their end --------------------------------------------------------------------------------------


def test_a_base_model_whose_padding_is_its_end(run_rl, run_rm, run_sft, tmp_path):
    start = run_sft(steps=1).checkpoint
    for name in ("tokenizer_config.json",):
        settings = json.loads((start / name).read_text())
        settings["pad_token"] = settings["eos_token"]
        (start / name).write_text(json.dumps(settings))
    judge = run_rm(model=str(start)).checkpoint
    _, words = load(run_rl(algorithm="ppo", model=str(start), reward={"model": str(judge)}).checkpoint)
    assert words.pad_token_id != words.eos_token_id


def test_a_tokenizer_from_elsewhere(run_rl, run_sft, tmp_path):
    checkpoint = run_sft(steps=1).checkpoint
    bare, words = tmp_path / "bare", tmp_path / "words"
    lm, tokenizer = load(checkpoint)
    tokenizer.save_pretrained(words)
    save(lm, tokenizer, bare)
    for file in bare.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(UsageError, match="tokenizer"):
        run_rl(model=str(bare))
    assert run_rl(model=str(bare), tokenizer=str(words)).checkpoint.exists()


def test_the_critic_has_a_learning_rate_of_its_own(run_rl, metrics):
    """After one step of AdamW weights have moved by at most their rate."""
    start = roles.Critic.from_policy
    made = []

    class Watched(roles.Critic):
        @staticmethod
        def from_policy(policy):
            made.append((policy, start(policy)))
            return made[-1][1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(roles, "Critic", Watched)
        run_rl(algorithm="ppo", steps=1, optimizer={"lr": 1e-4}, critic_lr=1e-2)
    (_, critic), *more = made
    assert not more and 5e-3 < float(critic.head.weight.detach().abs().max()) <= 1.01e-2


def test_the_end_of_a_multi_stage_pipeline_is_reusable(run_rl, trained):
    """What rl saved is a policy to start from again."""
    again = run_rl(model=str(run_rl(model=str(trained[0]), algorithm="ppo", critic="policy").checkpoint))
    assert (again.checkpoint / "config.json").exists()


def test_recorded_values_are_plain():
    config = rl.Config.model_validate({"model": {}, "data": "x", "reward": [{"function": len, "weight": 2}, "exact"], "measure": max})
    plainly, held = taking_up.recorded(config)
    assert plainly.reward == [{"function": "builtins:len", "weight": 2}, "exact"] and plainly.measure == "builtins:max"
    assert held == ["reward.0.function", "measure"]


def test_the_rise_is_of_the_last_six_steps_over_the_first_four() -> None:
    scores = [1.0, 0.0, 2.0, 1.0, 9.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]
    assert stopping.risen(scores, 0.5) == (4.5 - 1.0) / 0.5
    assert stopping.risen(scores[:9], 0.5) == 0.0  # no step is among both


def test_a_plan_counts_what_modifiers_hold_and_take(rows, shared):
    """Models that are held besides, texts beside, and draws of prompts."""
    given = {
        "model": TINY, "data": {"source": str(rows), "template": "text"}, "reward": {"length": 3}, "prompts": 4, "samples": 4, "steps": 10,
        "sampling": {"max_tokens": 6},
    }  # fmt: skip
    texts = {"source": str(rows), "read_as": "sft", "batch": 8}
    more = {"ema": 0.9, "reference_update": {"every": 2}, "pretrain_data": texts, "pretrain_coefficient": 1.0, "keep": {"mixed": True}}
    plain, full = ("\n".join(rl.plan(rl.Config.model_validate(shared | given | extra))) for extra in ({}, more))
    assert "average of the weights" in full and "first reference" in full and "first reference" not in plain
    assert not Path(shared["root"]).exists()
