"""`make mutants` stays true: every planted fault still fits the code, every test it names exists, and every explained survivor is a mutant that there is."""

from __future__ import annotations

import ast
import tomllib
from collections import Counter
from pathlib import Path

import mutate
import pytest
from planted import FAULTS
from run import TESTS, explanations, suite_of

ROOT = Path(__file__).parents[1]
SAMPLE = '''
"""A text about 1 < 2."""
LIMIT: float = 0.5


def weigh(x, low=0, high=LIMIT):
    """Not 1."""
    if not low < high:
        raise ValueError(f"{low + 1} is not below {high}")
    total = x.detach().exp().sum()
    total = total / 2
    return torch.minimum(total, x[low:]) - high
'''


def test_what_is_mutated_and_what_is_not() -> None:
    made = mutate.mutants("sample.py", SAMPLE)
    found = {(m.operator, m.before, m.after) for m in made}
    assert {
        ("comparison", "low < high", "(low) <= (high)"), ("boolean", "not low < high", "low < high"), ("condition", "not low < high", "not (not low < high)"),
        ("detach", "x.detach()", "x"), ("drop", "x.detach().exp()", "x.detach()"), ("mean", "x.detach().exp().sum()", "x.detach().exp().mean()"),
        ("statement", "total = total / 2", "pass"), ("arithmetic", "total / 2", "(total) * (2)"), ("constant", "2", "3"), ("slice", "x[low:]", "x[(low) + 1:]"),
        ("minmax", "torch.minimum(total, x[low:])", "torch.maximum(total, x[low:])"), ("constant", "0.5", "1.0"),
        ("sign", "return torch.minimum(total, x[low:]) - high", "return -(torch.minimum(total, x[low:]) - high)"),
    } <= found, found  # fmt: skip
    assert not any("text" in m.before or "ValueError" in m.before or "low + 1" in m.before for m in made)
    assert len({m.key for m in made}) == len(made) == len({m.source for m in made})
    for m in made:
        ast.parse(m.source)


def test_keys_do_not_depend_on_the_line() -> None:
    """A line above moves no mutant into or out of the choice."""
    before, after = (mutate.mutants("sample.py", text) for text in (SAMPLE, "\n# more\n" + SAMPLE))
    assert [(m.key, m.chosen) for m in before] == [(m.key, m.chosen) for m in after]


def test_the_choice_is_large_and_spread() -> None:
    made = [m for file in mutate.targets() for m in mutate.mutants(file)]
    chosen = [m for m in made if m.chosen]
    assert len(chosen) >= 400 and {m.operator for m in chosen} == set(mutate.SHARES)
    assert {m.file for m in chosen} == set(mutate.targets())
    for m in chosen[::10]:
        ast.parse(m.source)
    assert all((ROOT / name.split("::")[0]).exists() for file in mutate.targets() for name in suite_of(file))
    assert set(TESTS) <= set(mutate.targets())


def test_every_planted_fault_fits_and_its_test_exists() -> None:
    slots = Counter(fault.slot for fault in FAULTS)
    assert len({fault.name for fault in FAULTS}) == len(FAULTS) >= 100
    assert {"credit", "ratio", "surrogate", "average", "penalty", "packing", "heads", "sampler"} <= set(slots)
    for fault in FAULTS:
        ast.parse(fault.wrong())
        path, _, name = fault.test.partition("::")
        defined = {node.name for node in ast.walk(ast.parse((ROOT / path).read_text())) if isinstance(node, ast.FunctionDef)}
        assert name in defined, f"{fault.name}: {path} has no {name}"
    with pytest.raises(ValueError, match="plant it anew"):
        type(FAULTS[0])(**{**vars(FAULTS[0]), "old": "no such text"}).wrong()


def test_every_explained_survivor_is_a_mutant() -> None:
    text = (ROOT / "tests" / "mutants" / "survivors.toml").read_text(encoding="utf-8")
    keys = {m.key for file in mutate.targets() for m in mutate.mutants(file)}
    for file, section in tomllib.loads(text).items():
        for key, why in section.items():
            assert key in keys, f"survivors.toml explains a mutant that no longer exists: {key}"
            assert key.startswith(f"{file}: ") and len(why) > 20
    assert len(explanations()) == sum(len(section) for section in tomllib.loads(text).values())
