"""The process reward model's recipe: what it learns, what it leaves, what it refuses."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from tilt.data.packing import pack
from tilt.data.rendering import renderer
from tilt.data.steps import stepwise
from tilt.data.tokenizers import characters
from tilt.errors import DataError, UsageError
from tilt.learning.steps import measure_steps, score_steps, update_steps
from tilt.models.loading import load_process_model, load_reward_model, tiny
from tilt.models.policy import Policy, RewardModel
from tilt.recipes import process_reward

CPU = torch.device("cpu")
TINY = {"width": 16, "layers": 1, "heads": 2, "context": 48, "vocabulary": 270}


@pytest.fixture
def steps_file(tmp_path):
    """A planted truth: a step is right when it says yes."""
    file = tmp_path / "steps.jsonl"
    rows = []
    for i in range(60):
        labels = [(i >> j) % 3 != 0 for j in range(1 + i % 3)]
        rows.append({"prompt": f"q{i}:", "steps": [f"{'yes' if right else 'no'}{j}" for j, right in enumerate(labels)], "labels": labels})
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture
def run_prm(steps_file, shared):
    def run(**settings: Any):
        given = {"model": TINY, "data": {"source": str(steps_file), "template": "text"}, "steps": 3, "batch": 8}
        return process_reward.run(process_reward.Config.model_validate(shared | given | settings))

    return run


@pytest.mark.parametrize("extra", [{}, {"lora": {"rank": 4, "alpha": 8.0}}, {"dtype": "bfloat16"}])
def test_it_learns_a_planted_truth_and_opens_as_a_classifier(run_prm, metrics, extra):
    result = run_prm(steps=40, batch=16, optimizer={"lr": 1e-2}, eval_every=20, separator=" ; ", **extra)
    assert result.after["accuracy"] == result.after["first_wrong"] == result.after["located"] == result.after["cleared"] == 1.0
    assert result.before["loss"] > 2 * result.after["loss"]
    assert [line["step"] for line in metrics(result) if "eval/accuracy" in line] == [0, 20, 40]
    model, words, separator = load_process_model(result.checkpoint)
    assert separator == " ; " and load_reward_model(result.checkpoint)[0].model.config.step_separator == " ; "
    answer = stepwise(renderer(words, "text"), separator, {"prompt": "q1:", "steps": ["yes0", "no1"], "labels": [1.0, 0.0]}, 0)
    ours = score_steps(model, [answer], 1000, CPU)
    opened = AutoModelForSequenceClassification.from_pretrained(result.checkpoint)
    for end, score in zip(answer.ends, ours.tolist(), strict=True):
        tokens = [*answer.rollout.prompt.tokens, *answer.rollout.tokens[: end + 1]]
        with torch.no_grad():
            assert float(opened(torch.tensor([tokens])).logits[0, 0]) == pytest.approx(score, abs=1e-4)
    assert AutoTokenizer.from_pretrained(result.checkpoint).pad_token_id not in (None, words.eos_token_id)
    assert result.directory.config.read_text().startswith("recipe: process_reward\n") and result.directory.name.startswith("prm-")


def answers() -> tuple[RewardModel, list[Any]]:
    tokenizer = characters("abcdef=?\n")
    lm = tiny(vocabulary=len(tokenizer), width=16, layers=2, heads=2, context=64).double()
    model = RewardModel.from_policy(Policy(lm), padding=tokenizer.pad_token_id)
    rows = [
        {"prompt": f"{'ab'[i % 2]}?", "steps": ["abc"[: 1 + (i + j) % 3] for j in range(1 + i % 4)], "labels": [((i + j) % 4) / 3 for j in range(1 + i % 4)]}
        for i in range(9)
    ]  # fmt: skip
    return model, [stepwise(renderer(tokenizer, "text"), "\n", row, i) for i, row in enumerate(rows)]


class Still:
    """An optimizer that leaves weights and gradients as they are."""

    lr = 0.0

    def step(self) -> torch.Tensor:
        return torch.zeros(())


def test_the_update_is_the_gradient_of_the_mean_over_steps_however_it_is_split():
    model, given = answers()
    losses = []
    for answer in given:  # one answer at a time, one step at a time
        scores = model.everywhere(pack([answer.rollout]))
        for end, label in zip(answer.ends, answer.labels, strict=True):
            p = torch.sigmoid(scores[len(answer.rollout.prompt.tokens) + end])
            losses.append(-label * p.log() - (1 - label) * (1 - p).log())
    loss = torch.stack(losses).mean()
    loss.backward()
    wanted = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    for budget in (1, 30, 10_000):
        model.zero_grad()
        report = update_steps(model, Still(), given, micro_tokens=budget, device=CPU)  # type: ignore[arg-type]
        assert report["loss"] == pytest.approx(loss.item(), abs=1e-10)
        for name, p in model.named_parameters():
            assert name not in wanted or torch.allclose(p.grad, wanted[name], atol=1e-10), name


def test_measures_count_answers_by_their_first_wrong_step(monkeypatch):
    model, given = answers()
    given = given[:4]  # 1 2 3 4 steps; labels 0 | 1/3 2/3 | 2/3 1 0 | 1 0 1/3 2/3
    right = [[1.0], [-1.0, 1.0], [1.0, -1.0, -1.0], [1.0, -1.0, 1.0, 1.0]]
    by_tokens = {answer.rollout.tokens: scores for answer, scores in zip(given, right, strict=True)}

    def told(self, pack, ends):
        spans = [slice(int(pack.segments.start[i]), int(pack.segments.start[i] + pack.segments.length[i])) for i in pack.own]
        return torch.tensor([x for span in spans for x in by_tokens[tuple(pack.tokens[span].tolist())]])

    monkeypatch.setattr(RewardModel, "after", told)
    found = measure_steps(model, given, 10_000, CPU)
    assert found["accuracy"] == pytest.approx((0 + 2 + 2 + 3) / 10)
    assert found["first_wrong"] == found["located"] == 0.5 and "cleared" not in found


def test_a_seed_fixes_the_run(run_prm, metrics):
    first, again = (
        [{k: v for k, v in line.items() if k not in ("time", "tokens_per_second")} for line in metrics(run_prm())] for _ in range(2)
    )
    assert first == again


def test_the_plan_shows_the_ends_of_steps(steps_file, shared):
    given = {"model": TINY, "data": {"source": str(steps_file), "template": "text"}, "separator": ";"}
    lines = process_reward.plan(process_reward.Config.model_validate(shared | given))
    assert any("trained (in brackets)" in line for line in lines) and any("⟦;⟧" in line for line in lines)


def test_bad_input(run_prm, tmp_path):
    with pytest.raises(ValueError, match="train_on all: without effect"):
        run_prm(data={"source": "x", "train_on": "all"})
    with pytest.raises(UsageError, match=r"separator '<\|end\|>': the tokenizer does not spell it as text"):
        run_prm(separator="<|end|>")
    with pytest.raises(DataError, match="step 0 holds the separator 'e'"):
        run_prm(separator="e")
    (tmp_path / "plain.jsonl").write_text('{"prompt": "p", "completion": "c"}\n' * 9)
    with pytest.raises(DataError, match="cannot be read as stepwise: missing steps, labels"):
        run_prm(data={"source": str(tmp_path / "plain.jsonl")})
