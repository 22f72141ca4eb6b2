"""Recipes on judged answers: reward models, DPO and its family, on pairs, rankings and labelled answers."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from tilt.data.packing import pack
from tilt.data.rollouts import Prompt, Rollout
from tilt.errors import DataError, NumericError, UsageError
from tilt.learning.pairs import update_pairs
from tilt.models.loading import load, load_reward_model
from tilt.objectives import PREFERENCES
from tilt.recipes import dpo, reward_model


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


@pytest.mark.parametrize(("run", "recipe"), [("run_rm", reward_model), ("run_dpo", dpo)])
def test_pairs_that_break_are_kept(request, run, recipe, shared, monkeypatch):
    calls = []

    def broken(reader, *given, **more):
        calls.append(1)
        if len(calls) == 2:
            for weight in (getattr(reader, "policy", None) or reader.model).parameters():
                weight.data.fill_(torch.nan)
        return update_pairs(reader, *given, **more)

    monkeypatch.setattr(recipe, "update_pairs", broken)
    with pytest.raises(NumericError, match="step 1: the model's scores is not finite") as caught:
        request.getfixturevalue(run)(name="broken")
    assert caught.value.exit_code == 4
    assert len(torch.load(shared["root"] / "broken" / "bad_batch_step_000001.pt", weights_only=True)["batch"]["tokens"]) > 0


# ------------------------------------------------------------------------------------------------ every row masters a toy


QUICK = {
    "reward_model",
    "rm_deepspeed_chat",
    "dpo",
    "ipo",
    "simpo",
    "orpo",
    "kto",
    "bco_pair",
    "aot",
    "exo_pair",
    "ld_dpo",
    "wpo",
    "dpo_js",
    "apo_down",
}


@pytest.mark.parametrize("name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in PREFERENCES])
def test_a_row_masters_a_planted_preference(run_rm, run_dpo, name):
    """Thirty steps: on held-out pairs the better answer has the larger reward, by far more than at first."""
    run = run_dpo if PREFERENCES[name].margin.reads == "likelihood" else run_rm
    settings = {"objective": {"link": {"temperature": 0.2}}} if name == "discopop" else {}
    result = run(algorithm=name, steps=30, batch=16, optimizer={"lr": 1e-2}, save=False, **settings)
    assert result.after["accuracy"] == 1.0
    assert result.after["margin"] - result.before["margin"] > 0.1 and result.after["loss"] < result.before["loss"]
    text = (result.directory.path / "objective.txt").read_text()
    assert text.startswith(f"algorithm: {name}\n") and ("consistent for" in text) and (settings or repr(PREFERENCES[name]) in text)


@pytest.mark.slow
def test_discopop_at_its_own_temperature_needs_a_start(run_dpo, run_sft, pairs):
    """From its reference it goes into the hollow at h = -.12, and says so; from a policy whose margins are positive it masters the toy."""
    lost = run_dpo(algorithm="discopop", steps=30, batch=16, optimizer={"lr": 1e-2}, save=False)
    assert lost.after["margin"] == pytest.approx(-0.1186, abs=0.02) and "note       at a margin of 0" in lost.directory.log.read_text()
    start = run_sft(data={"source": str(pairs), "template": "text"}).checkpoint
    ahead = run_dpo(model=str(start), steps=15, batch=16, optimizer={"lr": 1e-2}).checkpoint
    result = run_dpo(model=str(ahead), reference=str(start), algorithm="discopop", steps=30, batch=16, optimizer={"lr": 1e-2}, save=False)
    assert result.before["margin"] > 0.1 and result.after["accuracy"] == 1.0 and result.after["margin"] > result.before["margin"] + 0.2


def test_a_row_of_your_own(run_dpo, tmp_path):
    """A link is a frozen dataclass with __call__(margin, probability); its row is trained by name and stands in the run's record."""
    file = tmp_path / "mine.py"
    file.write_text(
        "from dataclasses import dataclass, replace\nimport torch\nfrom tilt.objectives import PREFERENCES\n"
        "from tilt.objectives.links import expected\n\n@dataclass(frozen=True)\nclass Exponential:\n"
        '    """exp(-h)."""\n    scale: float = 1.0\n    def __call__(self, margin, probability):\n'
        "        return expected(lambda h: (-self.scale * h).exp(), margin, probability)\n\nMINE = replace(PREFERENCES['dpo'], link=Exponential())\n"
    )
    result = run_dpo(
        algorithm=f"{file}:MINE", objective={"link": {"scale": 2.0}}, beta=0.2, steps=30, batch=16, optimizer={"lr": 1e-2}, save=False
    )
    assert result.after["accuracy"] == 1.0 and result.directory.name.startswith("mine-")
    text = (result.directory.path / "objective.txt").read_text()
    assert "Exponential(scale=2.0)" in text and "beta=0.2" in text and "sha256" in text and "not known for this link" in text


@pytest.fixture
def write(tmp_path):
    def make(name: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
        file = tmp_path / name
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return {"source": str(file), "template": "text"}

    return make


def planted(i: int) -> tuple[str, str]:
    return "yes" + "!" * (i % 3), "no" + "!" * ((i + 1) % 3)


def labelled() -> list[dict[str, Any]]:
    return [{"prompt": f"q{i} ", "completion": planted(i)[i % 3 == 0], "label": int(i % 3 != 0)} for i in range(60)]


def pairs_with(**columns: Any) -> list[dict[str, Any]]:
    rows = []
    for i in range(48):
        chosen, rejected = planted(i)
        rows.append({"prompt": f"q{i} ", "chosen": chosen, "rejected": rejected, **columns})
    return rows


@pytest.mark.parametrize("name", ["kto", "bco_pair"])
def test_labelled_answers_teach_as_pairs_do(run_dpo, write, pairs, name):
    """Twice as many good as bad answers, evaluated on labelled answers, and on pairs from another file."""
    data = write("labelled.jsonl", labelled())
    result = run_dpo(data=data, algorithm=name, steps=30, batch=16, optimizer={"lr": 1e-2}, save=False)
    assert result.after["accuracy"] > 0.9 and result.after["margin"] > 0.1
    other = [{"prompt": f"z{i} ", "chosen": planted(i)[0], "rejected": planted(i)[1]} for i in range(12)]
    held = run_dpo(
        data=data | {"eval": write("held.jsonl", other)["source"]}, algorithm=name, steps=30, batch=16, optimizer={"lr": 1e-2}, save=False
    )
    assert held.after["accuracy"] == 1.0 and "labelled answers" in held.directory.log.read_text()


def test_a_reward_model_of_labelled_answers(run_rm, write):
    data = write("labelled.jsonl", labelled())
    slots = {"link": "classifier", "comparison": "zero"}
    result = run_rm(data=data, objective=slots, steps=40, batch=16, optimizer={"lr": 1e-2}, save=False)
    assert result.after["accuracy"] > 0.9 and "longer_is_better" not in result.after


@pytest.mark.parametrize("recipe", ["rm", "dpo"])
def test_rankings_teach_every_pair(run_rm, run_dpo, write, recipe):
    rows = [{"prompt": f"q{i} ", "answers": ["yes" + "!" * (i % 3), "well", "no" + "!" * (i % 2)]} for i in range(48)]
    run = run_rm if recipe == "rm" else run_dpo
    result = run(data=write("ranked.jsonl", rows), steps=40, batch=12, optimizer={"lr": 1e-2}, save=False)
    assert result.after["accuracy"] == 1.0
    log = result.directory.log.read_text()
    assert "of 12 rankings" in log and "rankings, best first" in log


def test_soft_labels_and_margins_are_read_and_said(run_dpo, run_rm, write, metrics):
    """Labels that say nothing teach nothing; labels that say the opposite teach the opposite; a margin is named in the header."""
    settings = {"steps": 30, "batch": 16, "optimizer": {"lr": 1e-2}, "save": False}
    for probability, side in ((0.5, 0), (0.0, -1)):
        result = run_dpo(data=write(f"p{probability}.jsonl", pairs_with(probability=probability)), **settings)
        assert (
            f"column `probability`, the chance that the chosen answer is the better one: mean {probability:.3f}"
            in result.directory.log.read_text()
        )
        assert result.after["margin"] == pytest.approx(0, abs=0.02) if side == 0 else result.after["margin"] < -0.1
    wide = run_rm(data=write("margin.jsonl", pairs_with(margin=2.0)), **settings)
    assert "column `margin`, by how much the chosen answer should win: mean 2.000" in wide.directory.log.read_text()
    assert metrics(wide)[0]["loss"] > 1.5, "log(1 + e^(2 - gap)) where the gap is small"


@pytest.mark.parametrize("extra", [{}, {"lora": {"rank": 2, "alpha": 4.0}}])
def test_a_reference_that_follows_the_policy(run_dpo, metrics, extra):
    """Replaced after every step, the reference is the policy before the next one, and no margin is left; moved by a share, some is."""
    settings = {"steps": 6, "batch": 8, "optimizer": {"lr": 1e-2}, "save": False, **extra}
    still, whole, half = (
        metrics(run_dpo(**settings, reference_update=update))
        for update in ({"every": 0}, {"every": 1, "share": 1.0}, {"every": 2, "share": 0.5})
    )
    assert [line["margin"] for line in whole[:-1]] == pytest.approx([0.0] * 6, abs=1e-5)
    assert whole[-1]["eval/margin"] == pytest.approx(0.0, abs=1e-5) and abs(still[-1]["eval/margin"]) > 1e-3
    assert [line["loss"] for line in half[:2]] == pytest.approx([line["loss"] for line in still[:2]], abs=1e-6), (
        "until the second step it stays"
    )
    assert half[3]["loss"] != still[3]["loss"]


@pytest.mark.parametrize("settings, reason", [
    ({"algorithm": "dop"}, "unknown algorithm `dop`: did you mean `dpo`?"),
    ({"algorithm": "grpo"}, "it is a row of `tilt rl`"),
    ({"algorithm": "reward_model"}, "whose margin reads a reward model's score: use `tilt rm`"),
    ({"algorithm": "hinge", "label_smoothing": 0.1}, "`label_smoothing` 0.1 has no effect"),
    ({"algorithm": "orpo", "beta": 0.2}, "`beta` 0.2 has no effect"),
    ({"algorithm": "robust", "objective": {"link": {"smoothing": 0.5}}}, "smoothing=0.5 must lie in [0, .5)"),
    ({"algorithm": "exo_pair", "label_smoothing": 0.0}, "smoothing=0.0 must lie in (0, .5)"),
    ({"beta": 0.2, "objective": {"margin": {"beta": 0.3}}}, "`beta` and `objective.margin.beta` say the same thing twice"),
    ({"beta": 0.2, "objective": {"margin": {"implicit_reward": {"beta": 0.3}}}}, "`beta` and `objective.margin.beta` say the same thing twice"),
    ({"algorithm": "simpo", "reference": "somewhere"}, "reference: without effect, `simpo` reads no reference"),
    ({"algorithm": "simpo", "reference_update": {"every": 5}}, "reference_update: without effect"),
    ({"algorithm": "kto", "objective": {"comparison": "pair"}}, "Prospect judges answers one by one"),
    ({"objective": {"lnk": "hinge"}}, "unknown key `objective.lnk`: did you mean `link`?"),
])  # fmt: skip
def test_settings_of_dpo_that_cannot_be(pairs, shared, settings, reason):
    from tilt.config import parse

    with pytest.raises(UsageError) as caught:
        parse({"model": {"width": 16}, "data": {"source": str(pairs)}, **settings}, dpo.Config)
    assert reason in str(caught.value)


@pytest.mark.parametrize("settings, reason", [
    ({"algorithm": "dpo"}, "whose margin reads a policy's likelihoods: use `tilt dpo`"),
    ({"algorithm": "rm_deepspeed_chat", "span": 0.5}, "span 0.5: `rm_deepspeed_chat` already compares along the answer"),
    ({"centring": 0.1, "objective": {"regulariser": {"centring": {"coefficient": 0.2}}}}, "say the same thing twice"),
    ({"margin": 0.1, "objective": {"margin": {"offset": 0.2}}}, "say the same thing twice"),
    ({"objective": {"weight": "confidence"}}, "reads the likelihood of answers, and ScoreMargin is a reward model's score"),
])  # fmt: skip
def test_settings_of_a_reward_model_that_cannot_be(pairs, shared, settings, reason):
    from tilt.config import parse

    with pytest.raises(UsageError) as caught:
        parse({"model": {"width": 16}, "data": {"source": str(pairs)}, **settings}, reward_model.Config)
    assert reason in str(caught.value)


def test_short_settings_reach_the_row(pairs):
    def row(**settings: Any) -> Any:
        return dpo.Config.model_validate({"model": {"width": 16}, "data": {"source": str(pairs)}, **settings}).row()[1]

    assert row() == PREFERENCES["dpo"] and row(beta=0.3).margin.beta == 0.3
    assert row(label_smoothing=0.1) == PREFERENCES["cdpo"] and row(algorithm="cdpo") == PREFERENCES["cdpo"]
    ipo = row(algorithm="ipo", beta=0.3)
    assert ipo.link.beta == 0.3 and ipo.margin.beta == 1.0, "the number that ties ipo to the reference is that of its link"
    assert row(algorithm="dpo", objective={"link": {"hinge": {"distance": 2.0}}}).link.distance == 2.0


@pytest.mark.parametrize("name, rows, reason", [
    ("dpo", labelled(), "cannot be read as preference: missing chosen, rejected"),
    ("kto", [{"prompt": "q", "chosen": "a", "rejected": "b"}] * 4, "every row asks the same"),
    ("kto", pairs_with(probability=0.7), "the data bring probabilities of the labels"),
    ("aot", pairs_with(margin=0.7), "the data bring margins"),
    ("dpo", pairs_with(margin="wide"), "column 'margin' is 'wide'"),
    ("dpo", pairs_with(probability=2), "must lie in [0, 1]"),
    ("dpo", [{"prompt": f"q{i}", "answers": ["yes", "no", "well"], "margin": 1.0} for i in range(48)], "this row ranks 3 answers"),
    ("dpo", [{"prompt": f"q{i}", "answers": "yes"} for i in range(48)], "answers must be a list of at least two"),
    ("bco_pair", [{"prompt": f"q{i}", "answers": ["yes", "no", "well"][: 2 + i % 2]} for i in range(48)], "rankings of different lengths do not"),
])  # fmt: skip
def test_data_that_a_row_cannot_learn_from(run_dpo, write, name, rows, reason):
    data = write("rows.jsonl", rows)
    with pytest.raises((UsageError, DataError)) as caught:
        run_dpo(data=data | ({"held_out": 0.0} if "same" in reason else {}), algorithm=name)
    assert reason in str(caught.value)
