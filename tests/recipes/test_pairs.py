"""Recipes on pairs: reward model and DPO."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from tilt.data.packing import pack
from tilt.data.rollouts import Prompt, Rollout
from tilt.errors import NumericError, UsageError
from tilt.learning import pairs as module
from tilt.learning.pairs import end_and_span_scores, end_scores, likelihoods, score_pairs, update_pairs
from tilt.models.loading import load, load_reward_model, tiny
from tilt.models.policy import Policy, RewardModel
from tilt.objectives import PREFERENCES
from tilt.optim.optimizers import AdamW, Optimizer
from tilt.recipes import dpo, reward_model

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    "extra",
    [{}, {"lora": {"rank": 4, "alpha": 8.0}}, {"span": 0.5, "normalise": True, "margin": 0.1, "centring": 0.01}, {"dtype": "bfloat16"}],
)
def test_a_reward_model_learns_a_planted_preference(run_rm, metrics, extra):
    result = run_rm(steps=40, batch=16, optimizer={"lr": 1e-2}, eval_every=20, **extra)
    assert result.after["accuracy"] == 1.0 and result.after["margin"] > 1.0 and result.after["loss"] < 0.4
    assert [line["step"] for line in metrics(result) if "eval/accuracy" in line] == [0, 20, 40]
    scorer, words = load_reward_model(result.checkpoint)
    opened = AutoModelForSequenceClassification.from_pretrained(result.checkpoint)
    tokens = words("q3 yes!")["input_ids"] + [words.eos_token_id]
    with torch.no_grad():
        plainly = opened(torch.tensor([tokens])).logits[0, 0]
        ours = scorer(pack([Rollout.demonstration(Prompt(tuple(tokens[:2]), 0), tuple(tokens[2:]))]))[0]
    assert float(ours) == pytest.approx(float(plainly), abs=1e-4)
    assert AutoTokenizer.from_pretrained(result.checkpoint).pad_token_id not in (None, words.eos_token_id)
    assert result.directory.config.read_text().startswith("recipe: reward_model\n") and result.directory.name.startswith("rm-")


@pytest.mark.parametrize("extra", [{}, {"lora": {"rank": 4, "alpha": 8.0}}, {"label_smoothing": 0.1}, {"dtype": "bfloat16"}])
def test_dpo_learns_a_planted_preference(run_dpo, metrics, extra):
    result = run_dpo(steps=30, batch=16, optimizer={"lr": 1e-2}, eval_every=15, **extra)
    assert result.before["margin"] == pytest.approx(0.0, abs=1e-5) and result.before["accuracy"] == 0.5
    assert result.after["accuracy"] == 1.0 and result.after["margin"] > 0.1
    lines = metrics(result)
    assert lines[0]["loss"] == pytest.approx(0.6931, abs=2e-3 if "dtype" in extra else 1e-4)
    assert [line["step"] for line in lines if "eval/margin" in line] == [0, 15, 30]


def test_another_reference_for_dpo(run_dpo, run_sft, pairs, rows):
    data = {"source": str(pairs), "template": "text"}
    start = run_sft(data=data).checkpoint
    other = run_sft(model=str(start), data=data, steps=10, optimizer={"lr": 1e-2}).checkpoint
    assert run_dpo(model=str(start), reference=str(other)).before["margin"] != 0.0
    with pytest.raises(UsageError, match="its tokenizer differs"):
        run_dpo(model=str(start), reference=str(run_sft().checkpoint))


def test_dpo_leaves_the_base_under_an_adapter(run_dpo, run_sft, pairs):
    start = run_sft(data={"source": str(pairs), "template": "text"}).checkpoint
    before, after = load(start)[0].state_dict(), load(run_dpo(model=str(start), lora={"rank": 2, "alpha": 4.0}).checkpoint)[0].state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all("_proj" in name for name in changed)


def test_a_seed_fixes_runs_on_pairs(run_rm, run_dpo, metrics):
    for run in (run_rm, run_dpo):
        first, again = (
            [{k: v for k, v in line.items() if k not in ("time", "tokens_per_second")} for line in metrics(run())] for _ in range(2)
        )
        assert first == again
        often = [line["loss"] for line in metrics(run(eval_every=1)) if "loss" in line]
        assert often == [line["loss"] for line in first if "loss" in line]


@pytest.fixture
def examples():
    generator = torch.Generator().manual_seed(3)

    def draw(n: int) -> tuple[int, ...]:
        return tuple(torch.randint(0, 20, (n,), generator=generator).tolist())

    prompts = [Prompt(draw(2 + i), i) for i in range(5)]
    return [(Rollout.demonstration(p, draw(1 + i)), Rollout.demonstration(p, draw(6 - i))) for i, p in enumerate(prompts)]


@pytest.fixture
def float64():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


@pytest.mark.parametrize("kind", ["reward", "span", "dpo"])
def test_micro_batches_of_pairs_change_nothing(float64, examples, kind):
    """The gradient of -1/N sum log sigmoid of the margin, whatever the budget, against the whole taken at once."""
    policy = Policy(tiny("gpt2", vocabulary=20, width=16, layers=2, heads=2, context=32).double())
    model = RewardModel.from_policy(policy, padding=20)
    trained, score, views = {
        "reward": (model, end_scores(model), (1.0,)), "span": (model, end_and_span_scores(model), (0.3, 0.7)), "dpo": (policy, likelihoods(policy), (1.0,)),
    }[kind]  # fmt: skip
    reference = (torch.linspace(-9, -1, 5), torch.linspace(-2, -8, 5)) if kind == "dpo" else None
    row = PREFERENCES["dpo" if kind == "dpo" else "reward_model"]
    found, said = [], []
    for budget in (10_000, 20, 1):
        optimizer = Optimizer(trained, AdamW(1e-3), 10)
        optimizer.step = lambda o=optimizer: (
            found.append(torch.cat([p.grad.flatten() for p in o.parameters if p.grad is not None])),
            o.clear(),
            torch.ones(()),
        )[2]
        said.append(update_pairs(score, optimizer, row, examples, reference, views=views, micro_tokens=budget, device=CPU))
    assert torch.allclose(found[0], found[1], atol=1e-10) and torch.allclose(found[0], found[2], atol=1e-10) and found[0].abs().max() > 1e-6
    assert said[0] == pytest.approx(said[1], abs=1e-9) and said[0] == pytest.approx(said[2], abs=1e-9)

    whole = score(module.packed(examples))
    loss = torch.zeros(())
    for view, share in zip(whole, views, strict=True):
        for i in range(5):
            gap = view[2 * i] - view[2 * i + 1]
            if reference is not None:
                gap = 0.1 * (gap - (reference[0][i] - reference[1][i]))
            loss = loss + share * torch.log1p(torch.exp(-gap)) / 5
    assert said[0]["loss"] == pytest.approx(float(loss.detach()), abs=1e-10)
    grads = torch.autograd.grad(loss, list(trained.parameters()), allow_unused=True)
    assert torch.allclose(torch.cat([g.flatten() for g in grads if g is not None]), found[0], atol=1e-10)


def test_the_span_view_is_the_mean_along_the_answer(float64, examples):
    model = RewardModel.from_policy(Policy(tiny("gpt2", vocabulary=20, width=16, layers=1, heads=2, context=32).double()), padding=20)
    with torch.no_grad():
        end, span = end_and_span_scores(model)(module.packed(examples))
        for n, answer in enumerate(a for pair in examples for a in pair):
            prefixes = [pack([Rollout.demonstration(answer.prompt, answer.tokens[: k + 1])]) for k in range(len(answer.tokens))]
            each = torch.stack([model(p)[0] for p in prefixes])
            assert float(span[n]) == pytest.approx(float(each.mean()), abs=1e-10) and float(end[n]) == pytest.approx(
                float(each[-1]), abs=1e-10
            )
    chosen, rejected = score_pairs(end_scores(model), examples, 15, CPU)
    assert torch.allclose(torch.stack([chosen, rejected], 1).flatten(), end, atol=1e-10)


@pytest.mark.parametrize(("run", "recipe"), [("run_rm", reward_model), ("run_dpo", dpo)])
def test_pairs_that_break_are_kept(request, run, recipe, shared, monkeypatch):
    calls = []

    def broken(score, *given, **more):
        calls.append(1)
        return update_pairs((lambda batch: score(batch) * torch.nan) if len(calls) == 2 else score, *given, **more)

    monkeypatch.setattr(recipe, "update_pairs", broken)
    with pytest.raises(NumericError, match="step 1: the model's scores is not finite") as caught:
        request.getfixturevalue(run)(name="broken")
    assert caught.value.exit_code == 4
    assert len(torch.load(shared["root"] / "broken" / "bad_batch_step_000001.pt", weights_only=True)["batch"]["tokens"]) > 0
