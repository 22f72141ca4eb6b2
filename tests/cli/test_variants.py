"""From `algorithm:` and `objective:` to a row: names, slots, rows of your own, and the error that each mistake gets."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest

from tilt.config import Section, parse
from tilt.errors import UsageError
from tilt.objectives import ALGORITHMS, GAE, K3, PREFERENCES, Clip, GroupRelative, NoPenalty, Objective, TwoSided
from tilt.recipes.variants import VariantError, judges, origin, override, resolve, resolve_preference

VARIANT = """
from __future__ import annotations
from dataclasses import dataclass
from typing import ClassVar
import torch
from tilt.objectives import ALGORITHMS, Clip, Objective
from dataclasses import replace

@dataclass(frozen=True)
class Soft:
    width: float = 0.5
    passes: ClassVar[int | None] = None
    def __call__(self, ratio, logprobs, advantages):
        return torch.tanh((ratio - 1) / self.width) * advantages

SOFT = replace(ALGORITHMS["grpo"], surrogate=Soft())
NOT_A_ROW = 3
KIND = Objective
"""


@pytest.fixture
def variant(tmp_path: Path) -> Path:
    path = tmp_path / "my_variant.py"
    path.write_text(VARIANT)
    return path


@pytest.mark.parametrize("name", [*ALGORITHMS, "reinforce-pp", "dr-grpo"])
def test_every_row_by_its_name(name: str) -> None:
    plain = name.replace("-", "_")
    assert resolve(name, {}) == (plain, ALGORITHMS[plain])


def test_preference_rows() -> None:
    assert resolve_preference("dpo", {"margin": {"beta": 0.5}})[1].margin.beta == 0.5  # type: ignore[attr-defined]
    assert resolve_preference("reward-model", {}) == ("reward_model", PREFERENCES["reward_model"])


@pytest.mark.parametrize("changes, slot, expected", [
    ({"surrogate": {"high": 0.28}}, "surrogate", Clip(0.2, 0.28)),
    ({"surrogate": {"clip": {"low": 0.1}}}, "surrogate", Clip(low=0.1)),
    ({"surrogate": "two_sided"}, "surrogate", TwoSided()),
    ({"penalty": "none"}, "penalty", NoPenalty()),
    ({"penalty": {"k3": {"beta": 0.1}}}, "penalty", K3(0.1)),
    ({"credit": {"gae": {"lam": 1}}}, "credit", GAE(lam=1.0)),
    ({"credit": {"scale": "none"}}, "credit", GroupRelative(scale="none")),
])  # fmt: skip
def test_slots(changes: dict[str, Any], slot: str, expected: object) -> None:
    _, row = resolve("grpo", changes)
    assert getattr(row, slot) == expected
    rest = [name for name in ("credit", "ratio", "surrogate", "average", "penalty", "value") if name != slot]
    assert all(getattr(row, name) == getattr(ALGORITHMS["grpo"], name) for name in rest)


@pytest.mark.parametrize("algorithm, changes, expected", [
    ("gpro", {}, "unknown algorithm `gpro`: did you mean `grpo`?"),
    ("dpo", {}, "unknown algorithm `dpo`: it is a row of `tilt dpo or rm`"),
    ("grpo", {"surogate": {}}, "unknown key `objective.surogate`: did you mean `surrogate`?"),
    ("grpo", {"margin": {"beta": 1}}, "unknown key `objective.margin`"),
    ("grpo", {"surrogate": {"hihg": 0.3}}, "unknown key `objective.surrogate.hihg`: did you mean `high`?"),
    ("grpo", {"surrogate": {"high": True}}, "`objective.surrogate.high` is True: expected a valid number"),
    ("grpo", {"surrogate": "clp"}, "`objective.surrogate`: unknown piece `clp`: did you mean `clip`?"),
    ("nowhere.py:ROW", {}, "no such file: nowhere.py"),
    ("my_variant.py", {}, "a row of your own is named `file.py:NAME`"),
    ("my_variant.py:", {}, "a row of your own is named `file.py:NAME`"),
    ("my_variant.py:SOFTT", {}, "my_variant.py has no `SOFTT`: did you mean `SOFT`?"),
    ("my_variant.py:NOT_A_ROW", {}, "`NOT_A_ROW` in my_variant.py is int, not a row of this table: write `NOT_A_ROW = Objective(credit=…"),
    ("my_variant.py:KIND", {}, "`KIND` in my_variant.py is the class Objective"),
    ("raises.py:X", {}, "raises.py:2: ZeroDivisionError: division by zero"),
    ("syntax.py:X", {}, "syntax.py:1: "),
    ("empty.py:X", {}, "empty.py has no `X`: it defines no Objective"),
])  # fmt: skip
def test_mistakes(variant: Path, monkeypatch: pytest.MonkeyPatch, algorithm: str, changes: dict[str, Any], expected: str) -> None:
    monkeypatch.chdir(variant.parent)
    for name, text in (("raises.py", "a = 1\n1 / 0\n"), ("syntax.py", "def\n"), ("empty.py", "")):
        (variant.parent / name).write_text(text)
    with pytest.raises(UsageError) as caught:
        resolve(algorithm, changes)
    assert expected in str(caught.value)


def test_all_slots_are_checked_at_once() -> None:
    with pytest.raises(VariantError) as caught:
        resolve("grpo", {"surogate": {}, "surrogate": {"hihg": 1}, "penalty": {"k4": {}}})
    assert len(str(caught.value).splitlines()) == 3


def test_a_row_of_your_own_and_its_record(variant: Path) -> None:
    name = f"{variant}:SOFT"
    _, row = resolve(name, {"surrogate": {"width": 0.25}, "penalty": "none"})
    assert isinstance(row, Objective) and repr(row.surrogate) == "Soft(width=0.25)" and row.penalty == NoPenalty()
    found = origin(name)
    assert found.sha256 == hashlib.sha256(variant.read_bytes()).hexdigest() and found.source == str(variant.resolve())
    lines = found.lines(row)
    assert lines[0] == "algorithm: SOFT" and "Soft(width=0.25)" in lines[1] and found.sha256 in lines[2] and str(variant) in lines[2]
    assert origin("ppo").lines(ALGORITHMS["ppo"]) == ["algorithm: ppo", f"objective: {ALGORITHMS['ppo']!r}"]


def test_which_table_a_row_belongs_to(variant: Path) -> None:
    variant.write_text(VARIANT + "\nfrom tilt.objectives import PREFERENCES\nPAIRED = PREFERENCES['ipo']\n")
    assert judges("rm-deepspeed-chat") and judges(f"{variant}:PAIRED") and not judges("grpo") and not judges(f"{variant}:SOFT")
    assert resolve_preference(f"{variant}:PAIRED", {"link": {"beta": 0.2}})[1].link.beta == 0.2  # type: ignore[union-attr]


def test_a_changed_file_is_read_again(variant: Path) -> None:
    assert resolve(f"{variant}:SOFT", {})[1].surrogate.width == 0.5  # type: ignore[attr-defined]
    variant.write_text(VARIANT.replace("0.5", "0.75"))
    assert resolve(f"{variant}:SOFT", {})[1].surrogate.width == 0.75  # type: ignore[attr-defined]


def test_an_override_leaves_the_table_as_it_is() -> None:
    before = repr(ALGORITHMS["ppo"])
    override(ALGORITHMS["ppo"], {"surrogate": {"high": 0.5}})
    assert repr(ALGORITHMS["ppo"]) == before


def test_a_bad_row_is_reported_beside_the_other_errors() -> None:
    from pydantic import model_validator

    class Rl(Section):
        algorithm: str

        @model_validator(mode="after")
        def _possible(self) -> Rl:
            resolve(self.algorithm, {})
            return self

    class Both(Section):
        rl: Rl
        steps: int

    with pytest.raises(UsageError) as caught:
        parse({"rl": {"algorithm": "gpro"}, "steps": "x"}, Both)
    text = str(caught.value)
    assert "2 problems" in text and "`rl`: unknown algorithm `gpro`" in text and "`steps` is 'x'" in text
