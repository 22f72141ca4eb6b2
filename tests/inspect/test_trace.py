"""`tilt trace`: the golden numbers of the specification appear, every function named exists where it is said to stand, and a stored batch is what was trained."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tilt.cli.main import main
from tilt.inspect import trace as module
from tilt.inspect.entries import STAGES, Entry, place_of
from tilt.inspect.fixtures import fixture_f, fixture_p
from tilt.inspect.pair_trace import trace_pairs
from tilt.inspect.stored import batch_of, stored_batch
from tilt.inspect.trace import batch_entries, examples, trace
from tilt.objectives import ALGORITHMS, PREFERENCES, Clip, TrustRegion
from tilt.segments import Layout

TRPO = ALGORITHMS["trpo"]


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def steps(name: str) -> dict[str, Entry]:
    return {e.name: e for e in [*trace(ALGORITHMS[name], fixture_f()), *batch_entries(ALGORITHMS[name], fixture_f())]}


GOLDEN = {  # algorithms.md, section 11 and THE TABLE
    ("grpo", "mean"): [0.125],
    ("grpo", "std, ddof 0"): [0.739509972887],
    ("grpo", "std, ddof 1"): [0.853912563830],
    ("grpo", "Adv"): [1.0246950766] * 3 + [-0.1463850109] * 2 + [0.4391550328] * 4 + [-1.3174650985],
    ("grpo", "Adv, divisor n"): [1.1832159566, -0.1690308509, 0.5070925528, -1.5212776585],
    ("grpo", "Adv, std + 1e-4"): [1.0245750906, -0.1463678701, 0.4391036103, -1.3173108308],
    ("grpo", "Adv without std"): [0.875, -0.125, 0.375, -1.125],
    ("grpo", "policy/clipfrac_avg"): [0.3],
    ("grpo", "policy/approxkl_avg"): [0.03825],
    ("grpo", "loss"): [0.116475290553],
    ("grpo", "loss, token average"): [-0.274024181517],
    ("rloo", "R with KL"): [0.9975, -0.005, 0.4875, -0.99],
    ("rloo", "Adv"): [1.1666666667] * 3 + [-0.17] * 2 + [0.4866666667] * 4 + [-1.4833333333],
    ("rloo", "Adv without KL"): [7 / 6, -1 / 6, 0.5, -1.5],
    ("rloo", "rho of the answer"): [1.1618342427, 0.9048374180, 0.7788007831, 1.3498588076],
    ("rloo", "loss"): [0.500416666667],
    ("ppo", "Adv before whitening"): [0.63448125, 0.867875, 0.3925, -0.20525, 0.005, -0.0487428125, 0.06448125, 0.367875, 0.2925, -0.89],
    ("ppo", "Adv"): [0.9946645115, 1.4719343526, 0.4998339828, -0.7225125774, -0.2925696844, -0.4024690437, -0.1709357215, 0.4494780078, 0.2953427138, -2.1227665415],
    ("ppo", "policy/clipfrac_avg"): [0.2],
    ("ppo", "loss/policy_avg"): [0.094233954009],
    ("ppo", "loss/value_avg"): [0.102342052811],
    ("ppo", "val/clipfrac_avg"): [0.2],
    ("gspo", "rho"): [1.0512710964] * 3 + [0.9512294245] * 2 + [0.9394130628] * 4 + [1.3498588076],
    ("gspo", "arithmetic mean of the ratios"): [1.0732868857, 1.0100894268, 0.9698011286, 1.3498588076],
    ("gspo", "loss"): [0.121770008308],
    ("gspo", "loss, clip of GRPO"): [0.106964326378],
    ("gspo", "push, clip of GRPO"): [0.0897693597] * 3 + [-0.0174057162] * 2 + [0.0257842484] * 4 + [-0.4445979667],
}  # fmt: skip


@pytest.mark.parametrize("name, number", GOLDEN, ids=[f"{a}: {b}" for a, b in GOLDEN])
def test_golden_number(name: str, number: str) -> None:
    expected = torch.tensor(GOLDEN[name, number], dtype=torch.float64)
    assert (steps(name)[number].value - expected).abs().max() < 5.1e-11, steps(name)[number].value.tolist()


PAIRS = {  # algorithms.md, section 7: each loss on fixture P
    "dpo": [0.649159339, 0.723597113], "cdpo": [0.658159339, 0.717597113], "robust": [0.637909339, 0.731097113], "ipo": [16.81, 31.36],
    "hinge": [0.91, 1.06], "simpo": [0.644396660, 0.693147181], "fidelity": [0.277168882, 0.303577357], "exo_pair": [0.462432890, 0.544223906],
    "nca_pair": [1.364250575, 1.401469353], "sppo_hard": [41.41, 56.2], "apo_zero": [0.977503937, 1.014998500], "apo_down": [0.987513842, 1.009995668],
    "discopop": [0.876373017, 0.801891159], "sigmoid_norm": [0.683197180, 0.706569400], "dpo_forward_kl": [0.645423229, 0.721080883],
    "dpo_js": [0.670359793, 0.707504977], "dpo_alpha": [0.647699819, 0.722201381],
}  # fmt: skip


@pytest.mark.parametrize("name", PAIRS)
def test_golden_number_on_pairs(name: str) -> None:
    found = {e.name: e.value for e in trace_pairs(PREFERENCES[name], fixture_p(), name)}
    assert found["loss of each pair"].tolist() == pytest.approx(PAIRS[name], abs=5.1e-10)
    assert found["loss"].item() == pytest.approx(sum(PAIRS[name]) / 2, abs=5.1e-10)


def test_the_trace_of_dpo_on_fixture_p() -> None:
    found = {e.name: e.value.tolist() for e in trace_pairs(PREFERENCES["dpo"], fixture_p(), "dpo")}
    assert (
        found["c"] == pytest.approx([0.4, -0.2]) and found["r"] == pytest.approx([-0.5, 0.4]) and found["h"] == pytest.approx([0.09, -0.06])
    )
    share = [0.1 * (1 - p) / 2 for p in found["P(chosen is better)"]]  # beta sigmoid(-h), over two pairs
    assert found["push of the chosen"] == pytest.approx(share) and found["push of the rejected"] == pytest.approx([-x for x in share])


def test_worked_examples_of_the_notes() -> None:
    found = {e.name: e.value for e in examples()}
    assert found["reference of the whole answer"].item() == pytest.approx(-5.156817804274337, abs=1e-14)
    assert found["Adv of 你 我 他"].tolist() == [-10, 0, 10] and found["Q of 你 我 他"].tolist() == [10, 20, 30]


def test_every_function_stands_where_the_trace_says() -> None:
    entries = [e for row in ALGORITHMS.values() if row.against == "none" for e in trace(row, fixture_f())] + examples()
    entries += [e for row in PAIRS for e in trace_pairs(PREFERENCES[row], fixture_p(), row)]
    assert len(entries) > 300 and {e.stage for e in entries} == set(STAGES)
    for e in entries:
        if e.place == "torch":
            continue
        file, _, line = e.place.rpartition(":")
        text = Path(file).read_text(encoding="utf-8").splitlines()[int(line) - 1]
        assert text.strip().startswith(f"def {e.computed_by.rpartition('.')[2].rpartition(':')[2]}("), (e.place, text)
    with pytest.raises(AssertionError, match="no_such"):
        place_of("tilt.segments:no_such")


def test_numbers_come_from_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """A row whose clip is another gives other numbers; a function of the library that is replaced is the one whose value is shown."""
    row = replace(ALGORITHMS["grpo"], surrogate=Clip(0.05, 0.05))
    wide, narrow = (next(e for e in trace(r, fixture_f()) if e.name == "loss").value for r in (ALGORITHMS["grpo"], row))
    assert wide != narrow
    monkeypatch.setattr(module, "group_mean", lambda x, layout, scored: torch.full((1,), 7.0))
    assert steps("grpo")["mean"].value.tolist() == [7.0]


def test_the_step_of_a_trust_region_keeps_its_limit() -> None:
    found = {e.name: e.value for e in trace(TRPO, fixture_f())}
    assert found["accepted"] == 1 and 0 < found["KL(old || policy)"] <= 0.01 and found["rise of L"] > 0
    p = fixture_f().signals.old.exp()
    assert torch.allclose(found["F"], p * (1 - p) / 10, atol=1e-12)
    advantages = TRPO.prepare(fixture_f().rewards, fixture_f().signals, fixture_f().layout).advantages
    assert torch.allclose(found["g"], advantages * (1 - p) / 10, atol=1e-12)
    assert torch.allclose((found["F"] + 0.1) * found["x"], found["g"], atol=5e-6)
    assert found["first length"] == pytest.approx(math.sqrt(0.02 / (found["F"] * found["x"] ** 2).sum()))


# ------------------------------------------------------------------------------------------------ command line


def shown(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main(["trace", *words]) == 0
    return capsys.readouterr().out


def test_side_by_side_agreement_is_said_once(capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(capsys, "grpo", "gspo")
    assert text.count("1.0246950766  1.0246950766  1.0246950766") == 1, "the advantages are the same"
    line = next(x for x in text.splitlines() if "1.3498588076  0.8187307531" in x)
    assert "1.0512710964  1.0512710964  1.0512710964" in line, "the ratios stand side by side"
    assert "0.1164752905" in text and "0.1217700083" in text and "-5.1568178043" in text and "-10  0  10" in text
    for title in STAGES.values():
        assert title in text


def test_json_holds_everything(capsys: pytest.CaptureFixture[str]) -> None:
    found = json.loads(shown(capsys, "ppo", "--json"))
    numbers = {e["name"]: e for e in found["trace"]["ppo"]}
    assert numbers["loss"]["value"] == pytest.approx(0.094233954009 + 0.1 * 0.102342052811, abs=1e-12)
    assert numbers["rho"]["value"][3] == pytest.approx([math.exp(0.3)]) and numbers["rho"]["place"].endswith(
        ".py:" + numbers["rho"]["place"].rpartition(":")[2]
    )


def test_rows_on_pairs_side_by_side(capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(capsys, "dpo", "ipo")
    assert "fixture P" in text and any("0.649159339  0.7235971" in x and "16.81  31.36" in x for x in text.splitlines())


def test_a_slot_can_be_changed(capsys: pytest.CaptureFixture[str]) -> None:
    assert "0.106964326378" in shown(capsys, "gspo", "surrogate.low=0.2", "surrogate.high=0.2").partition("the same name")[0]


@pytest.mark.parametrize(
    "words, code, message",
    [
        (["gpro"], 2, "grpo"),
        (["grpo", "--step", "3"], 2, "--run"),
        (["grpo", "surrogate.lwo=0.2"], 2, "low"),
        (["grpo", "--run", "nowhere"], 3, "holds no rollouts"),
        (["grpo", "dpo"], 2, "do not read the same batch"),
        (["dpo", "--run", "nowhere"], 3, "holds no rollouts"),
        (["kto"], 2, "mismatched"),
        (["reward_model"], 2, "a reward model's scores"),
    ],
)  # fmt: skip
def test_bad_input(words: list[str], code: int, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["trace", *words]) == code
    assert message in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------ stored batches


def row(group: int, reward: float | None, old: list[float], new: list[float | None], **more: object) -> dict:
    ones = {"mask": [1] * len(old), "old_logprobs": old, "sampler_logprobs": old, "new_logprobs": new}
    return {"group_id": group, "reward": reward, "completion": "text", **ones, **more}


def test_stored_rows_become_a_batch() -> None:
    rows = [
        row(7, 1.0, [-0.5, -0.25], [-0.25, -0.5], delta_ref=[0.125, -0.25], mask=[1, 0, 1], old_logprobs=[-0.5, None, -0.25], sampler_logprobs=[-0.5, None, -0.25],
            new_logprobs=[-0.25, None, -0.5]),
        row(9, None, [-1.0], [None], delta_ref=[None]),
    ]  # fmt: skip
    rows[0]["delta_ref"] = [0.125, None, -0.25]
    batch = batch_of(rows)
    assert batch.layout.lengths.tolist() == [2, 1] and batch.layout.prompt.tolist() == [0, 1]
    assert batch.rewards.scored.tolist() == [True, False]
    assert batch.signals.reference.tolist()[:2] == [-0.375, -0.25] and batch.outputs.logprobs.tolist() == [-0.25, -0.5, -1.0]
    assert isinstance(batch.layout, Layout) and len(batch.stored) == 2


def test_a_live_batch_is_what_the_run_trained(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from tilt.recipes import rl
    from tilt.runs.journal import read_metrics

    file = tmp_path / "sums.jsonl"
    file.write_text("".join(json.dumps({"prompt": f"{a}+{b}=", "completion": str(a + b)}) + "\n" for a in range(8) for b in range(4)))
    config = {
        "algorithm": "ppo", "model": {"width": 16, "layers": 1, "heads": 2, "context": 32, "vocabulary": 270}, "data": {"source": str(file), "template": "text"},
        "reward": {"length": 3}, "steps": 2, "prompts": 4, "samples": 4, "passes": 2, "sampling": {"max_tokens": 6}, "eval": {"prompts": 2}, "rollouts_every": 1,
        "threads": 1, "quiet": True, "root": str(tmp_path / "runs"), "optimizer": {"lr": 1e-2},
    }  # fmt: skip
    run = rl.run(rl.Config.model_validate(config)).directory
    batch, number = stored_batch(run.path, None)
    assert number == 1 and stored_batch(run.path, 0)[1] == 0
    lines = [line for line in read_metrics(run.metrics) if line["step"] == 1]
    found = {e.name: e.value for e in [*trace(ALGORITHMS["ppo"], batch), *batch_entries(ALGORITHMS["ppo"], batch)]}
    for name, within in (("objective/scores", 1e-6), ("objective/kl", 2e-2), ("objective/entropy", 2e-2), ("objective/rlhf_reward", 2e-2)):
        assert float(found[name]) == pytest.approx(lines[0][name], abs=within), name
    from tilt.runs import rollout_store

    stored = rollout_store.read(rollout_store.path_of(run.rollouts, 1))
    assert torch.allclose(found["Adv"], torch.tensor([x for r in stored for x in r["adv_t"]], dtype=torch.float64), atol=0.02)
    text = shown(capsys, "ppo", "grpo", "--run", str(run.path), "--step", "0", "--group", "1")
    assert f"step 0 of {run.path}" in text and "half precision" in text and "answer 4:" in text and "answer 3:" not in text
    assert main(["trace", "ppo", "--run", str(run.path), "--step", "9"]) == 3 and "it holds those of 0, 1" in capsys.readouterr().err
    assert main(["trace", "ppo", "--run", str(run.path), "--group", "9"]) == 2


def test_a_row_that_reads_what_was_not_stored_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from tilt.errors import UsageError
    from tilt.inspect.stored import check_readable

    batch = batch_of([row(0, 1.0, [-1.0], [-1.0]), row(0, 0.0, [-1.0], [-1.0])])
    check_readable(ALGORITHMS["dapo"], batch, "dapo", "here")
    with pytest.raises(UsageError, match="reference's log-probabilities and a critic's values, and here has none"):
        check_readable(ALGORITHMS["ppo"], batch, "ppo", "here")


@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_row_is_traced_or_refused(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """On fixture F every number is finite; a row that reads entropies or whole distributions says so."""
    row = ALGORITHMS[name]
    vocabulary = "entropy" in row.needs or row.bonus.coefficient or (row.against != "none" and not isinstance(row.penalty, TrustRegion))
    code = main(["trace", name, "--json"])
    assert code == (2 if vocabulary else 0)
    if not vocabulary:
        text = capsys.readouterr().out
        assert "NaN" not in text and "Infinity" not in text
