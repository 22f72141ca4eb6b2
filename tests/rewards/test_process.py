"""Rewards of steps: where they lie, who judges, what reads them, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tilt.data.packing import pack
from tilt.data.rendering import renderer
from tilt.data.rollouts import Prompt, Rollout, Sampling
from tilt.data.tokenizers import characters
from tilt.errors import DataError, NumericError, UsageError
from tilt.models.loading import tiny, write_separator
from tilt.models.policy import Policy, RewardModel
from tilt.models.saving import fingerprint, save
from tilt.objectives import ALGORITHMS, Signals
from tilt.recipes import rl
from tilt.recipes.scoring import scoring
from tilt.rewards import parse
from tilt.rewards.functions import Scored
from tilt.rewards.score import Part, Scorer, earned_by

MINE = characters("ab=12?\n")
THEIRS = characters("?\n21=ba ")  # the same letters under other numbers
CPU = torch.device("cpu")
ANSWERS = ["a=1\nb=2", "a=2", "a=1\n\nb=12\na=2\n", "\n"]


def sampled(stops: Sequence[str] = ("stop",) * 4) -> list[Rollout]:
    """The answers as a policy with MINE sampled them, to two prompts."""
    plain = renderer(MINE, "text")
    found = []
    for i, (said, stop) in enumerate(zip(ANSWERS, stops, strict=True)):
        prompt = plain.prompt({"prompt": "ab?" if i < 2 else "b?"}, int(i >= 2))
        tokens = plain.demonstration({"prompt": "a", "completion": said}, 0).tokens
        kept = tokens if stop == "stop" else tokens[:-1]
        found.append(Rollout(prompt, kept, (True,) * len(kept), (-1.0,) * len(kept), stop, Sampling()))  # type: ignore[arg-type]
    return found


def folder(place: Path, tokenizer: Any, separator: str = "\n") -> tuple[str, RewardModel]:
    policy = Policy(tiny(vocabulary=len(tokenizer), width=32, layers=2, heads=4, context=64))
    model = RewardModel.from_policy(policy, padding=tokenizer.pad_token_id, seed=3)
    if separator:
        write_separator(model, separator)
    save(model.model, tokenizer, place)
    return str(place), model


ENDS = [(3, 7), (3,), (3, 9, 14), (1,)]
"""The actions at which the steps of ANSWERS end: at a line break, the last at the end token."""


@pytest.mark.parametrize("budget", [1, 30, 10_000])
def test_each_step_earns_its_chance_at_its_last_action(tmp_path: Path, budget: int) -> None:
    path, model = folder(tmp_path, MINE)
    judged = scoring({"process": {"path": path, "budget": budget}, "weight": 2.0}, MINE, CPU)
    rollouts = sampled()
    rewards = judged(rollouts)
    before = 0
    for i, (rollout, ends) in enumerate(zip(rollouts, ENDS, strict=True)):
        chances = []
        for end in ends:  # each prefix on its own, read at its last token
            alone = replace(
                rollout, tokens=rollout.tokens[: end + 1], sampled=rollout.sampled[: end + 1], logprobs=rollout.logprobs[: end + 1]
            )
            chances.append(float(torch.sigmoid(model(pack([alone]))[0].detach())))
            assert rewards.steps[before + end].item() == pytest.approx(2 * chances[-1], abs=1e-5)
        own = slice(before, before + len(rollout.tokens))
        assert rewards.ends[own].nonzero().flatten().tolist() == list(ends) == rewards.steps[own].nonzero().flatten().tolist()
        assert rewards.parts["process"][i].item() == pytest.approx(sum(chances) / len(chances), abs=1e-5)
        assert earned_by(rollouts, rewards)[i].item() == pytest.approx(2 * sum(chances), abs=1e-5)
        before += len(rollout.tokens)
    assert rewards.total.tolist() == [0.0] * 4 and rewards.scored.all() and before == len(rewards.steps)
    assert list(judged.modules) == ["process reward model process"] and judged.critic_source is None


def test_a_cut_answer_ends_its_last_step_where_it_was_cut(tmp_path: Path) -> None:
    path, _ = folder(tmp_path, MINE)
    rewards = scoring({"process": path}, MINE, CPU)(sampled(("length",) * 4))
    assert rewards.ends.nonzero().flatten().tolist() == [3, 6, 7 + 2, 10 + 3, 10 + 9, 10 + 13, 24]


def test_a_model_of_other_tokens_reads_the_text_again(tmp_path: Path) -> None:
    path, model = folder(tmp_path, THEIRS)
    rollouts = sampled()
    rewards = scoring({"process": path}, MINE, CPU)(rollouts)
    told, before = renderer(THEIRS, "text"), 0
    assert THEIRS.chat_template is not None  # prompts without turns are asked through the template
    for rollout, said, ends in zip(rollouts, ANSWERS, ENDS, strict=True):
        asked = renderer(THEIRS).prompt({"prompt": rollout.prompt.columns["prompt"]}, 0)
        tokens = told.demonstration({"prompt": "a", "completion": said}, 0).tokens
        for end in ends:
            alone = Rollout.demonstration(asked, tokens[: end + 1])
            assert rewards.steps[before + end].item() == pytest.approx(float(torch.sigmoid(model(pack([alone]))[0].detach())), abs=1e-5)
        before += len(rollout.tokens)


def test_the_model_never_changes(tmp_path: Path) -> None:
    path, _ = folder(tmp_path, MINE)
    judged = scoring({"process": path}, MINE, CPU)
    (model,) = judged.modules.values()
    mark = fingerprint(model)
    assert not judged(sampled()).steps.requires_grad and fingerprint(model) == mark and not any(p.requires_grad for p in model.parameters())
    with torch.no_grad():
        next(model.parameters()).fill_(float("nan"))
    with pytest.raises(NumericError, match="the process reward model process is not finite on sample 0"):
        judged(sampled())


RULES = """
def even(prompts, completions, steps, lengths, **columns):
    assert len(prompts) == len(completions) == len(steps) == len(lengths)
    assert all(c.endswith(s) for c, s in zip(completions, steps)), (completions, steps)
    assert columns["last"] == [False, True, True, False, False, True, True]
    return [None if s == "b=12" else float(len(s) + 10 * c.count("\\n")) for c, s in zip(completions, steps)]
def short(steps): return [1.0]
def raises(steps): raise KeyError("gold")
"""


def test_a_function_judges_every_step(tmp_path: Path) -> None:
    (tmp_path / "rules.py").write_text(RULES)
    judged = scoring([{"process": f"{tmp_path / 'rules.py'}:even", "name": "even", "weight": 0.5}, {"length": 3, "weight": 1.0}], MINE, CPU)
    rollouts = sampled()
    rewards = judged(rollouts)
    starts = [0, 8, 12, 27]
    expected = {3: 3.0, 7: 13.0, 8 + 3: 3.0, 12 + 3: 3.0, 12 + 14: 23.0, 27 + 1: 1.0 + 10.0}  # a step that is not judged has no end
    assert starts[-1] + len(rollouts[3].tokens) == len(rewards.steps)
    assert {i: 2 * rewards.steps[i].item() for i in rewards.ends.nonzero().flatten().tolist()} == expected
    assert rewards.parts["even"].tolist() == [8.0, 3.0, 13.0, 11.0] and rewards.weights == {"even": 0.0, "length": 1.0}
    assert earned_by(rollouts, rewards).tolist() == pytest.approx((rewards.total + torch.tensor([8.0, 1.5, 13.0, 5.5])).tolist())
    for name, message in (
        ("short", "returned 1 values; expected a list with one number or None for each of the 7"),
        ("raises", "raised KeyError"),
    ):
        with pytest.raises(DataError, match=message):
            scoring({"process": f"{tmp_path / 'rules.py'}:{name}"}, MINE, CPU)(rollouts)
    quiet = scoring({"process": f"{tmp_path / 'rules.py'}:raises", "on_error": "skip"}, MINE, CPU)(rollouts)
    assert not quiet.ends.any() and not quiet.scored.any()


def test_rewards_of_steps_are_added_at_the_actions_that_were_sampled() -> None:
    """Tokens of a tool are no actions; two parts that judge the same step add up."""
    given = Rollout(Prompt((1,), 0), (5, 6, 7, 8, 9), (True, False, False, True, True), (0.0,) * 5, "stop", Sampling())
    from tilt.rewards.process import action_at

    assert [action_at(given, token) for token in range(5)] == [0, 0, 0, 1, 2]
    parts = [
        Part("x", 2.0, lambda r, t: Scored([0.5, None], steps=[[(0, 0.5), (2, 1.0)], []])),
        Part("y", -1.0, lambda r, t: Scored([1.0, 1.0], steps=[[(2, 1.0)], [(0, 3.0)]])),
        Part("z", 1.0, lambda r, t: Scored([4.0, 5.0])),
    ]
    rewards = Scorer(parts)([given, given], [("", "")] * 2)  # type: ignore[list-item]
    assert rewards.steps.tolist() == [1.0, 0.0, 1.0, -3.0, 0.0, 0.0] and rewards.ends.tolist() == [True, False, True, True, False, False]
    assert rewards.total.tolist() == [4.0, 5.0] and earned_by([given, given], rewards).tolist() == [6.0, 2.0]


def test_the_rewards_of_steps_are_the_credit_of_process_supervision() -> None:
    """The golden numbers of the specification, from a scorer's rewards: steps (2, .5), (5, 1) of 5 actions, (3, -.5) of 4, counted from 1."""
    rollouts = [Rollout.demonstration(Prompt((1,), 0), (5,) * n) for n in (5, 4)]
    scorer = Scorer([Part("p", 1.0, lambda r, t: Scored([0.0, 0.0], steps=[[(1, 0.5), (4, 1.0)], [(2, -0.5)]]))])
    rewards, layout = scorer(rollouts, [("", "")] * 2), pack(rollouts).layout  # type: ignore[list-item]
    credit = ALGORITHMS["grpo_process"].credit
    found = credit(rewards, Signals.of(torch.zeros(9)), layout).advantages
    assert found.tolist() == pytest.approx([1.0910894512] * 2 + [0.8728715609] * 3 + [-1.0910894512] * 3 + [0.0], abs=1e-6)


def test_what_cannot_be_had_is_refused(tmp_path: Path) -> None:
    unnamed, _ = folder(tmp_path / "plain", MINE, "")
    named, _ = folder(tmp_path / "named", MINE)
    with pytest.raises(UsageError, match="does not say what stands between the steps"):
        scoring({"process": unnamed}, MINE, CPU)
    assert scoring({"process": {"path": unnamed, "separator": "="}}, MINE, CPU)(sampled()).ends.sum() > 0
    with pytest.raises(UsageError, match=r"was trained on steps separated by '\\n', not by '='; leave separator out"):
        scoring({"process": {"path": named, "separator": "="}}, MINE, CPU)
    with pytest.raises(UsageError, match="the tokenizer does not spell it as text"):
        scoring({"process": {"path": unnamed, "separator": ";"}}, MINE, CPU)
    with pytest.raises(UsageError, match=r"`reward.normalise` is about scores of whole answers"):
        parse({"process": named, "normalise": True})
    with pytest.raises(ValueError, match="there is no reward file"):
        rl_config(reward={"process": "nowhere.py:f"})
    with pytest.raises(ValueError, match="grpo_process reads rewards of steps, and reward gives none: name a judge of steps"):
        rl_config(reward={"length": 3})
    unread = {"reward": [{"process": named}, {"length": 3}], "missing_stop_penalty": 1.0}
    with pytest.raises(
        ValueError, match="reward length, missing_stop_penalty: without effect, algorithm grpo_process reads the rewards of steps alone"
    ):
        rl_config(**unread)
    assert rl_config(**unread, algorithm="grpo").samples == 8
    (tmp_path / "rules.py").write_text(RULES)
    for name in ("steps", "last"):
        rollouts = [replace(r, prompt=replace(r.prompt, columns={**r.prompt.columns, name: ["a"]})) for r in sampled()]
        with pytest.raises(DataError, match=f"a column named {name}"):
            scoring({"process": f"{tmp_path / 'rules.py'}:even"}, MINE, CPU)(rollouts)


def rl_config(**settings: Any) -> rl.Config:
    return rl.Config.model_validate({"model": "m", "data": "d.jsonl", "algorithm": "grpo_process"} | settings)


def test_a_run_records_what_steps_earned(tmp_path: Path) -> None:
    """The reward of an answer is the sum over its steps wherever a run speaks of it."""
    from tilt.runs import rollout_store

    (tmp_path / "rules.py").write_text("def one(steps): return [1.0 if '1' in step else 0.5 for step in steps]")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"prompt": f"{a}{b}?"}) + "\n" for a in "ab12=" for b in "ab12="))
    MINE.save_pretrained(tmp_path / "words")
    given = {
        "model": {"width": 16, "layers": 1, "heads": 2, "context": 24, "tokenizer": str(tmp_path / "words")}, "threads": 1, "quiet": True,
        "data": {"source": str(tmp_path / "rows.jsonl"), "template": "text"}, "root": tmp_path / "runs", "steps": 2, "prompts": 6, "samples": 4,
        "sampling": {"max_tokens": 8}, "reward": {"process": f"{tmp_path / 'rules.py'}:one"}, "rollouts_every": 1, "eval": {"prompts": 4},
    }  # fmt: skip
    result = rl.run(rl_config(**given))
    rows = rollout_store.read(result.directory.rollouts / "step_000000.parquet")
    for row in rows:
        steps = [step for step in row["completion"].split("\n") if step.strip()] or [row["completion"]]
        said = [1.0 if "1" in step else 0.5 for step in steps]
        assert row["reward"] == pytest.approx(sum(said)) == pytest.approx(sum(row["token_reward"]))
        assert row["rewards"]["process"] == pytest.approx(sum(said) / len(said))
    lines = [json.loads(line) for line in result.directory.metrics.read_text().splitlines()]
    assert lines[0]["reward"] == pytest.approx(sum(row["reward"] for row in rows) / len(rows), abs=1e-6)
    assert lines[0]["grad_norm"] > 0 and lines[0]["eval/reward"] > 0 and result.after["reward"] > 0
