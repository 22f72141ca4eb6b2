"""Parity presets in runs: each library's defaults and quirks take effect, can be switched, are recorded, and are refused elsewhere."""

from __future__ import annotations

import math

import pytest
import torch
import yaml

from tilt.cli.main import main
from tilt.errors import UsageError
from tilt.objectives import GLOSSARY, ValueLoss
from tilt.parity import PRESETS, undressed
from tilt.recipes import dpo, reward_model, rl
from tilt.recipes.variants import optimised

SHORT = {"max_tokens": 6}


def settings(**given):
    base = {"model": {"width": 16, "heads": 2, "vocabulary": 270}, "data": "rows.jsonl", "reward": {"length": 3}}
    return rl.Config.model_validate(base | given)


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_trains_and_reports_both_columns(run_rl, metrics, name):
    result = run_rl(algorithm=name, samples=4, optimizer={"lr": 1e-3}, critic_lr=1e-3)
    lines = metrics(result)
    assert [line["step"] for line in lines] == [0, 1, 2] and lines[0]["grad_norm"] > 0
    assert all(math.isfinite(value) for line in lines for value in line.values())
    parity = {key for key in lines[0] if key.startswith("parity/")}
    missing = {"val/num_eos_tokens"} | ({"policy/entropy_avg"} if PRESETS[name].quirks.window_means else set())
    missing |= {"objective/non_score_reward"} if name == "grpo_trl_fork" else set()
    named = {"objective/kl", "objective/entropy", "objective/non_score_reward", "objective/rlhf_reward", "objective/scores", "val/num_eos_tokens",
             "policy/approxkl_avg", "policy/clipfrac_avg", "loss/policy_avg", "loss/value_avg", "val/clipfrac_avg", "policy/entropy_avg", "val/ratio",
             "val/ratio_var"}  # fmt: skip
    assert parity == {f"parity/{key}" for key in named - missing}
    assert "parity/<metric>" in GLOSSARY
    assert lines[0]["parity/objective/scores"] == pytest.approx(lines[0]["objective/scores"], abs=1e-5)
    assert lines[0]["parity/loss/policy_avg"] == pytest.approx(lines[0]["loss/policy_avg"], abs=1e-5)
    text = (result.directory.path / "objective.txt").read_text()
    assert f"parity with {PRESETS[name].source}" in text and "corrected on purpose" in text and "PROBLEM" not in text


def test_the_first_update_of_a_preset_starts_at_ratio_one(run_rl, metrics):
    line = metrics(run_rl(algorithm="ppo_trl_0_12", passes=1))[0]
    assert line["parity/val/ratio"] == 1 and line["parity/policy/approxkl_avg"] == 0 and line["parity/policy/clipfrac_avg"] == 0


def test_pads_dilute_the_parity_column_only(run_rl, metrics):
    """An answer that ends early leaves pads in its window: each adds -1 to the entropy, and all dilute the means."""
    result = run_rl(
        algorithm="ppo_trl_0_12",
        samples=4,
        sampling=SHORT | {"stop_strings": ["1", "2", "3", "a", "e", "0"]},
        optimizer={"lr": 1e-2},
        seed=3,
    )
    line = metrics(result)[0]
    assert line["length/mean"] < 6
    pads = 6 - line["length/mean"]
    assert line["parity/objective/entropy"] == pytest.approx(line["objective/entropy"] - pads, abs=1e-4)
    assert line["parity/policy/approxkl_avg"] == pytest.approx(line["policy/approxkl_avg"] * line["length/mean"] / 6, rel=1e-4)
    assert line["parity/loss/value_avg"] == pytest.approx(line["loss/value_avg"], rel=1e-5)


def test_the_defaults_of_a_library_are_under_what_is_given():
    config = settings(algorithm="ppo_trl_0_12")
    assert (config.passes, config.samples, config.sampling.temperature, config.sampling.max_tokens, config.optimizer.clip_norm) == (
        4,
        1,
        0.7,
        53,
        0.0,
    )
    assert config.optimizer.lr == rl.Config.model_fields["optimizer"].default.lr
    config = settings(algorithm="ppo-trl-0-12", passes=2, sampling={"max_tokens": 9})
    assert (config.passes, config.sampling.temperature, config.sampling.max_tokens) == (2, 0.7, 9)
    config = settings(algorithm="ppo_deepspeed_chat")
    assert (config.optimizer.lr, config.critic_lr, config.optimizer.schedule, config.optimizer.clip_norm) == (9.65e-6, 5e-6, "cosine", 1.0)
    assert settings(algorithm="rloo_trl_0_12").samples == 2 and settings(algorithm="grpo_trl_fork").samples == 4
    assert settings(algorithm="ppo").passes == 1


def test_quirks_can_be_switched_and_slots_changed():
    _, whole = optimised("ppo_trl_0_12", {}, {}, 8)
    _, without = optimised("ppo_trl_0_12", {"value": {"coefficient": 0.5}}, {"score_after_last": False, "critic_after_last": False}, 8)
    assert whole.credit.quirks.score_after_last and not without.credit.quirks.score_after_last
    assert "final" in whole.credit.needs and "final" not in without.credit.needs
    assert isinstance(without.value, ValueLoss) and without.value.coefficient == 0.5 and undressed(without).value.coefficient == 0.5


def test_a_switched_quirk_changes_the_run(run_rl, metrics):
    same = {"algorithm": "ppo_trl_0_12", "samples": 4, "sampling": SHORT | {"stop_strings": ["1", "2", "3", "a", "e", "0"]}, "seed": 3,
            "critic": "policy", "optimizer": {"lr": 1e-2}}  # fmt: skip
    on, off = (metrics(run_rl(**same, quirks=quirks))[1] for quirks in ({}, {"score_after_last": False, "critic_after_last": False}))
    assert on["loss/value_avg"] != off["loss/value_avg"]


def test_the_record_reruns_a_preset(run_rl, metrics):
    first = run_rl(algorithm="rloo_trl_0_12", reward={"length": 3}, passes=1, quirks={"sequence_statistics": False})
    given = yaml.safe_load(first.directory.config.read_text())
    given.pop("recipe")
    again = rl.run(rl.Config.model_validate(given))
    clock = ("time", "tokens_per_second", "eps")
    a, b = (
        [{k: v for k, v in line.items() if not k.startswith(clock) and "_seconds" not in k} for line in metrics(x)] for x in (first, again)
    )
    assert a == b and given["passes"] == 1


@pytest.mark.parametrize(
    "given, message",
    [
        ({"algorithm": "ppo", "quirks": {"stop_is_pad": True}}, "quirks. are of the parity presets"),
        ({"algorithm": "ppo_trl_0_12", "quirks": {"scor_after_last": True}}, "score_after_last"),
        ({"algorithm": "ppo_trl_0_12", "quirks": {"kl_after_last": True}}, "log-probability of a pad"),
        ({"algorithm": "ppo_trl_0_12", "quirks": {"score_after_last": False}}, "critic_after_last"),
        ({"algorithm": "rloo_trl_0_12", "quirks": {"stop_is_pad": True}}, "token mean"),
        ({"algorithm": "rloo_trl_0_12", "samples": 1}, "compares the answers"),
        ({"algorithm": "ppo_trl_0_13"}, "ppo_trl_0_12"),
    ],
)
def test_bad_input(given, message):
    with pytest.raises((UsageError, ValueError), match=message):
        settings(**given)


@pytest.mark.parametrize("name, rate", [("rm_deepspeed_chat", 5e-5), ("dpo_deepspeed_chat", 1e-3)])
def test_the_presets_on_pairs_train_with_their_defaults(name, rate, run_rm, run_dpo, metrics):
    run = run_rm if name.startswith("rm") else run_dpo
    result = run(algorithm=name, optimizer={"lr": 1e-2}, steps=20)
    given = yaml.safe_load(result.directory.config.read_text())
    assert given["optimizer"]["schedule"] == "cosine" and given["optimizer"]["weight_decay"] == 0 and given["epochs"] == 1
    lines = metrics(result)
    assert lines[-1]["eval/accuracy"] > 0.9 and lines[-1]["eval/loss"] < lines[0]["eval/loss"]
    assert "parity with DeepSpeedExamples" in (result.directory.path / "objective.txt").read_text()
    base = {"algorithm": name, "model": {"width": 16, "heads": 2, "vocabulary": 270}, "data": "pairs.jsonl"}
    recipe = reward_model if name.startswith("rm") else dpo
    assert recipe.Config.model_validate(base).optimizer.lr == rate and recipe.Config.model_validate(base | {"batch": 4}).batch == 4


def test_the_card_of_a_preset_is_shown(capsys):
    threads = torch.get_num_threads()
    assert main(["algorithms", "ppo-deepspeed-chat", "surrogate.high=0.3"]) == 0
    text = capsys.readouterr().out
    torch.set_num_threads(threads)
    assert "parity with DeepSpeedExamples" in text and "on  stop_is_pad" in text and "1.3" in text
