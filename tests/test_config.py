"""Configuration: what is accepted, and every message that a wrong one gets."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import Field, ValidationError, model_validator

from tilt.config import Section, build_piece, dump, load, nearest, parse, read_value
from tilt.errors import UsageError


class Optimizer(Section):
    learning_rate: Annotated[float, Field(gt=0)] = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    clip: float | None = 1.0


class Model(Section):
    path: str = ""
    layers: Annotated[int, Field(ge=1)] = 2


class Config(Section):
    recipe: Literal["toy"] = "toy"
    name: str = ""
    model: str | Model = "tiny"
    optimizer: Optimizer = Optimizer(learning_rate=5e-5)
    files: tuple[Path, ...] = ()
    words: Literal["bpe"] | Path = "bpe"
    weights: dict[str, float] = {}
    objective: dict[str, Any] = {}
    kind: Literal["full", "lora"] = "full"
    shuffle: bool = True
    steps: Annotated[int, Field(ge=1, le=1000)] = 10
    samples: int = 4

    @model_validator(mode="after")
    def _whole_groups(self) -> Config:
        if self.steps % self.samples == 3:
            raise ValueError(f"steps={self.steps} and samples={self.samples} do not fit: set samples to 2")
        return self


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def message(files: list[Path], overrides: list[str]) -> str:
    with pytest.raises(UsageError) as caught:
        load(files, overrides, Config)
    return str(caught.value)


# ------------------------------------------------------------------------------------------------ scalars


@pytest.mark.parametrize("text, value", [
    ("1e-6", 1e-6), ("1E-6", 1e-6), ("1.0e-6", 1e-6), ("+1e3", 1000.0), (".5", 0.5), ("5.", 5.0), ("-1.5E+2", -150.0), (".inf", float("inf")),
    ("1_000", 1000), ("0", 0), ("-7", -7), ("010", 10), ("0x1F", 31), ("0o17", 15), ("true", True), ("False", False), ("null", None), ("~", None), ("", None),
    ("no", "no"), ("off", "off"), ("yes", "yes"), ("12:30", "12:30"), ("2024-01-01", "2024-01-01"), ("1e", "1e"), ("e5", "e5"), ("'1e-6'", "1e-6"), ("1.2.3", "1.2.3"),
    ("[1, 2e-3, a]", [1, 0.002, "a"]), ("{a: 1}", {"a": 1}), ("-", [None]), ("..", ".."),
])  # fmt: skip
def test_scalars_follow_yaml_1_2(text: str, value: object) -> None:
    found = read_value(text)
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize("text", ["1e-6", "1E-6"])
def test_a_small_learning_rate_is_a_number_in_a_file_and_on_the_command_line(tmp_path: Path, text: str) -> None:
    file = write(tmp_path / "r.yaml", f"optimizer:\n  learning_rate: {text}\n")
    assert load([file], [], Config).optimizer.learning_rate == 1e-6
    assert load([], [f"optimizer.learning_rate={text}"], Config).optimizer.learning_rate == 1e-6


# ------------------------------------------------------------------------------------------------ precedence


def test_later_wins_and_mappings_merge(tmp_path: Path) -> None:
    first = write(tmp_path / "a.yaml", "name: a\noptimizer: {clip: 2.0, learning_rate: 1.0}\nfiles: [x, y]\n")
    second = write(tmp_path / "b.toml", 'steps = 20\nfiles = ["z"]\n[optimizer]\nlearning_rate = 2\n')
    config = load([first, second], ["steps=30", "--optimizer.betas", "[0.1, 0.2]", "--shuffle=false", "weights.exact=1"], Config)
    assert config == Config(
        name="a",
        optimizer=Optimizer(clip=2.0, learning_rate=2.0, betas=(0.1, 0.2)),
        files=(Path("z"),),
        steps=30,
        shuffle=False,
        weights={"exact": 1.0},
    )


def test_one_nested_key_leaves_the_section_defaults_of_its_place() -> None:
    assert load([], ["optimizer.clip=null"], Config).optimizer == Optimizer(learning_rate=5e-5, clip=None)
    assert Config(optimizer={"clip": None}).optimizer.learning_rate == 5e-5  # type: ignore[arg-type]


@pytest.mark.parametrize("words, expected", [
    (["steps=5"], {"steps": 5}), (["--steps", "5"], {"steps": 5}), (["--steps=5"], {"steps": 5}), (["--samples", "-3"], {"samples": -3}),
    (["--optimizer.learning-rate", "2"], {"optimizer": Optimizer(learning_rate=2)}), (["name=a=b"], {"name": "a=b"}),
    (["model.layers=3"], {"model": Model(layers=3)}), (["files=[a, b]", "files.1=c"], {"files": (Path("a"), Path("c"))}),
    (["objective.surrogate.high=0.28"], {"objective": {"surrogate": {"high": 0.28}}}), (["name=no"], {"name": "no"}),
])  # fmt: skip
def test_overrides(words: list[str], expected: dict[str, Any]) -> None:
    assert load([], words, Config) == Config(**expected)


def test_merge_keys_and_anchors(tmp_path: Path) -> None:
    file = write(tmp_path / "r.yaml", "objective: &o {a: 1, b: 2}\nweights:\n  <<: *o\n  b: 3\n")
    assert load([file], [], Config).weights == {"a": 1.0, "b": 3.0}


def test_an_empty_file_changes_nothing(tmp_path: Path) -> None:
    assert load([write(tmp_path / "r.yaml", "# nothing yet\n")], [], Config) == Config()


# ------------------------------------------------------------------------------------------------ strictness


@pytest.mark.parametrize("setting", [
    {"steps": True}, {"steps": 1.0}, {"steps": "1"}, {"optimizer": {"learning_rate": True}}, {"optimizer": {"learning_rate": "0.1"}}, {"shuffle": 1}, {"shuffle": "no"},
    {"name": 3}, {"files": "a"}, {"kind": "Full"}, {"optimizer": {"betas": [0.9]}}, {"optimizer": {"betas": [0.9, 0.9, 0.9]}}, {"weights": {"a": True}},
    {"optimizer": {"learning_rate": float("nan")}}, {"optimizer": {"clip": float("inf")}}, {"optimizer": None}, {"model": None}, {"stepz": 1}, {"model": {"lairs": 1}},
])  # fmt: skip
def test_nothing_is_guessed(setting: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Config(**setting)
    with pytest.raises(UsageError):
        parse(setting, Config)


def test_what_converts() -> None:
    config = parse({"optimizer": {"clip": 1, "betas": [0, 1]}, "files": ["a"], "weights": {"x": 1}}, Config)
    assert type(config.optimizer.clip) is float and config.optimizer.betas == (0.0, 1.0) and config.files == (Path("a"),)


@pytest.mark.parametrize("text, expected", [("bpe", "bpe"), ("some/file", Path("some/file"))])
def test_a_choice_beside_a_path_stays_a_choice(text: str, expected: object) -> None:
    config = load([], [f"words={text}"], Config)
    assert config.words == expected and type(config.words) in (str, type(Path()))
    assert parse(read_value(dump(config)), Config) == config and Config(words=text) == config  # type: ignore[arg-type]


def test_a_section_is_frozen() -> None:
    with pytest.raises(ValidationError):
        Config().steps = 3


# ------------------------------------------------------------------------------------------------ messages


@pytest.mark.parametrize("text, expected", [
    ("stepz: 3", "unknown key `stepz` (r.yaml:1): did you mean `steps`?"),
    ("optimizer:\n  learnin_rate: 1", "unknown key `optimizer.learnin_rate` (r.yaml:2): did you mean `learning_rate`?"),
    ("\n\nlearning_rate: 1", "unknown key `learning_rate` (r.yaml:3): did you mean `optimizer.learning_rate`?"),
    ("model: {lairs: 3}", "unknown key `model.lairs` (r.yaml:1): did you mean `layers`?"),
    ("qqq: 3", "unknown key `qqq` (r.yaml:1): known keys: recipe, name, model, optimizer, files"),
    ("steps: 0", "`steps` is 0 (r.yaml:1): expected ≥ 1"),
    ("steps: 2000", "`steps` is 2000 (r.yaml:1): expected ≤ 1000"),
    ("steps: 1.5", "`steps` is 1.5 (r.yaml:1): expected a whole number"),
    ("steps: '3'", "`steps` is '3' (text) (r.yaml:1): expected a whole number"),
    ("steps: true", "`steps` is true (r.yaml:1): expected a whole number"),
    ("shuffle: no", "`shuffle` is 'no' (text) (r.yaml:1): expected true or false"),
    ("optimizer:\n  learning_rate: -1", "`optimizer.learning_rate` is -1 (r.yaml:2): expected > 0"),
    ("optimizer: 3", "`optimizer` is 3 (r.yaml:1): expected a mapping of settings"),
    ("optimizer:\n  betas:\n  - 1\n  - x", "`optimizer.betas.1` is 'x' (text) (r.yaml:2): expected a number"),
    ("optimizer: {betas: [1]}", "`optimizer.betas` is [1] (r.yaml:1): expected a longer list"),
    ("name: null", "`name` is null (r.yaml:1): expected text"),
    ("kind: lorra", "`kind` is 'lorra' (text) (r.yaml:1): expected one of 'full' or 'lora'; did you mean `lora`?"),
    ("model: 3", "`model` is 3 (r.yaml:1): expected text or a mapping of settings"),
    ("weights: {a: [1]}", "`weights.a` is [1] (r.yaml:1): expected a number"),
    ("steps: 7", "steps=7 and samples=4 do not fit: set samples to 2"),
    ("recipe: sft", "`recipe` is 'sft' (text) (r.yaml:1): expected 'toy'"),
])  # fmt: skip
def test_messages_name_key_value_place_and_mend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, expected: str) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "r.yaml", text + "\n")
    found = message([Path("r.yaml")], [])
    assert expected in found and found.startswith("1 problem in the configuration of `toy`:\n") and len(found.splitlines()) == 2


def test_all_errors_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "r.yaml", "steps: 0\nmodel: {lairs: 1, layers: 0}\noptimizer:\n  clip: true\n  beta: 1\n")
    assert message([Path("r.yaml")], ["--samples", "x", "kind=3"]).splitlines() == [
        "7 problems in the configuration of `toy`:",
        "  `model.layers` is 0 (r.yaml:2): expected ≥ 1",
        "  unknown key `model.lairs` (r.yaml:2): did you mean `layers`?",
        "  `optimizer.clip` is true (r.yaml:4): expected a number",
        "  unknown key `optimizer.beta` (r.yaml:5): did you mean `betas`?",
        "  `kind` is 3 (given as kind=3): expected one of 'full' or 'lora'",
        "  `steps` is 0 (r.yaml:1): expected ≥ 1",
        "  `samples` is 'x' (text) (given as samples=x): expected a whole number",
    ]


@pytest.mark.parametrize("words, expected", [
    (["steps"], "`steps` has no value: write `key=value`"),
    (["--shuffle"], "`--shuffle` has no value: write `--shuffle VALUE`, for a switch `--shuffle true`"),
    (["--shuffle", "--steps", "3"], "`--shuffle` has no value"),
    (["=3"], "`=3`: a key is one or more names"),
    (["a..b=3"], "`a..b=3`: a key is one or more names"),
    (["steps=[1"], "steps=[1:1:3: not valid YAML"),
    (["name=a", "name.b=3"], "`name` is 'a' (given as name=a), so `name.b` cannot be set inside it"),
    (["files=[a]", "files.1=b"], "`files` is a list of 1: `1` is not one of its numbers 0–0"),
    (["stepz=1"], "unknown key `stepz` (given as stepz=1): did you mean `steps`?"),
])  # fmt: skip
def test_bad_overrides(words: list[str], expected: str) -> None:
    assert expected in message([], words)


@pytest.mark.parametrize("name, text, expected", [
    ("r.yaml", "a: [1\nb: 2\n", "r.yaml:2:2: not valid YAML"),
    ("r.yaml", "a: 1\n\tb: 2\n", "r.yaml:2:1: not valid YAML"),
    ("r.yaml", "steps: 1\nname: x\nsteps: 2\n", "r.yaml:3: `steps` is set twice (first on line 1)"),
    ("r.yaml", "- 1\n- 2\n", "r.yaml: expected `key: value` lines, got list"),
    ("r.yaml", "just text\n", "got str"),
    ("r.yaml", "a: &x {b: *x}\n", "r.yaml:1: an alias that contains itself"),
    ("r.yaml", "a: !!python/object:os.system {}\n", "not valid YAML"),
    ("r.yaml", "[1, 2]: 3\n", "r.yaml:1: a key must be one word"),
    ("r.toml", "a = \n", "r.toml: not valid TOML"),
    ("r.txt", "a: 1\n", "a recipe is a .yaml, .yml, .json or .toml file"),
])  # fmt: skip
def test_broken_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, text: str, expected: str) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / name, text)
    assert expected in message([Path(name)], [])


def test_aliases_of_aliases_are_bounded(tmp_path: Path) -> None:
    lines = ["a0: &a0 [1,1,1,1,1,1,1,1,1,1]"] + [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 9)]
    assert "more than 100000 values" in message([write(tmp_path / "r.yaml", "\n".join(lines))], [])


def test_a_file_that_is_not_there_names_the_nearest(tmp_path: Path) -> None:
    write(tmp_path / "recipe.yaml", "")
    found = message([tmp_path / "recpie.yaml"], [])
    assert "no such file" in found and f"did you mean {tmp_path / 'recipe.yaml'}?" in found


def test_a_file_that_is_not_text(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_bytes(b"\xff\xfe\x00a")
    assert "UTF-8" in message([tmp_path / "r.yaml"], [])


def test_toml_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "r.toml", "name = 'x'\n\n[optimizer]\nbeta = 1\n")
    assert "unknown key `optimizer.beta` (r.toml:4): did you mean `betas`?" in message([Path("r.toml")], [])


def test_the_recipe_of_a_file_must_be_the_one_that_runs(tmp_path: Path) -> None:
    class Bare(Section):
        steps: int = 1

    Bare.__module__ = "tilt.recipes.bare"
    assert load([write(tmp_path / "a.yaml", "recipe: bare\nsteps: 2\n")], [], Bare).steps == 2
    with pytest.raises(UsageError, match=r"`recipe` is 'sft'.*but this is the recipe `bare`"):
        load([write(tmp_path / "b.yaml", "recipe: sft\n")], [], Bare)
    assert yaml.safe_load(dump(Bare())) == {"steps": 1}


# ------------------------------------------------------------------------------------------------ dump


def test_a_dump_reads_back(tmp_path: Path) -> None:
    config = Config(
        name="1e-6",
        model=Model(layers=3),
        optimizer=Optimizer(learning_rate=1e-6, clip=None),
        files=(Path("a b"), Path("é")),
        objective={"credit": {"gae": {"lam": 1.0}}, "x": None},
    )
    assert load([write(tmp_path / "c.yaml", dump(config))], [], Config) == config


@given(st.text(max_size=30).filter(lambda t: not any(0xD800 <= ord(c) <= 0xDFFF for c in t)))
@settings(max_examples=200, deadline=None)
def test_any_text_survives_a_dump(text: str) -> None:
    config = Config(name=text, objective={"a": [text, 1e-6, True, None]})
    assert parse(read_value(dump(config)), Config) == config


@given(st.floats(allow_nan=False, allow_infinity=False))
@settings(max_examples=200, deadline=None)
def test_any_number_survives_a_dump_bit_for_bit(value: float) -> None:
    assert parse(read_value(dump(Config(weights={"w": value}))), Config).weights["w"].hex() == value.hex()


def test_a_dump_means_the_same_to_yaml_1_1() -> None:
    assert yaml.safe_load(dump(Config(name="no")))["name"] == "no"


# ------------------------------------------------------------------------------------------------ nearest


@pytest.mark.parametrize(
    "name, expected", [("gpro", "grpo"), ("reinforce-pp", "reinforce_pp"), ("reinforcepp", "reinforce_pp"), ("PPO", "ppo"), ("zebra", None)]
)
def test_nearest(name: str, expected: str | None) -> None:
    assert nearest(name, ["ppo", "grpo", "rloo", "reinforce", "reinforce_pp"]) == expected


# ------------------------------------------------------------------------------------------------ pieces


@dataclass(frozen=True)
class Inner:
    width: float = 0.5


@dataclass(frozen=True)
class Clip:
    low: float = 0.2
    high: float = 0.2
    inner: Inner = field(default_factory=Inner)

    def __post_init__(self) -> None:
        if self.low < 0:
            raise ValueError("low must be ≥ 0")


@dataclass(frozen=True)
class Budget:
    tokens: int
    mode: Literal["a", "b"] = "a"
    exact: bool = False
    ddof: Literal[0, 1] = 1
    sizes: tuple[int, ...] = ()


REGISTRY: dict[str, type] = {"clip": Clip, "budget": Budget}


@pytest.mark.parametrize("value, own, expected", [
    ("clip", None, Clip()),
    ({"clip": {}}, None, Clip()),
    ({"clip": None}, None, Clip()),
    ({"clip": {"low": 1}}, None, Clip(low=1.0)),
    ({"high": 0.28}, Clip(0.1, 0.1), Clip(0.1, 0.28)),
    ({"inner": {"width": 2}}, Clip(0.1), Clip(0.1, inner=Inner(2.0))),
    ({"clip": {"low": 0.3}, "high": 0.4}, Clip(0.1, 0.1), Clip(0.3, 0.4)),
    ({"budget": {"tokens": 3, "mode": "b", "exact": True, "sizes": [1, 2], "ddof": 0}}, Clip(), Budget(3, "b", True, 0, (1, 2))),
    (Clip(0.7), None, Clip(0.7)),
])  # fmt: skip
def test_pieces(value: object, own: object, expected: object) -> None:
    built = build_piece(value, REGISTRY, own, "surrogate")
    assert built == expected and type(built) is type(expected)


@pytest.mark.parametrize("value, own, expected", [
    ("clp", None, "`surrogate`: unknown piece `clp`: did you mean `clip`?"),
    ({"clip": {"lwo": 0.1}}, None, "unknown key `surrogate.clip.lwo`: did you mean `low`?"),
    ("clp", Clip(), "`surrogate`: unknown piece `clp`: did you mean `clip`?"),
    ({"clp": {"low": 1}}, Clip(), "`surrogate`: unknown piece `clp`: did you mean `clip`?"),
    ({"lwo": 0.1}, Clip(), "unknown key `surrogate.lwo`: did you mean `low`?"),
    ({"clip": {"inner": {"wdth": 1}}}, None, "unknown key `surrogate.clip.inner.wdth`: did you mean `width`?"),
    ({"clip": {"low": True}}, None, "`surrogate.clip.low` is True: expected a valid number"),
    ({"clip": {"low": "0.1"}}, None, "`surrogate.clip.low` is '0.1': expected a valid number"),
    ({"clip": {"low": None}}, None, "`surrogate.clip.low` is None: expected a valid number"),
    ({"budget": {"tokens": True}}, None, "`surrogate.budget.tokens` is True: expected a valid integer"),
    ({"budget": {"tokens": 2, "ddof": True}}, None, "`surrogate.budget.ddof` is True: expected 0 or 1"),
    ({"budget": {"tokens": 2, "exact": 1}}, None, "`surrogate.budget.exact` is 1: expected a valid boolean"),
    ({"budget": {"tokens": 1.5}}, None, "`surrogate.budget.tokens` is 1.5: expected a valid integer"),
    ({"budget": {"tokens": 1, "mode": "c"}}, None, "`surrogate.budget.mode` is 'c': expected 'a' or 'b'"),
    ({"budget": {}}, None, "`surrogate.budget` needs `tokens`"),
    ({"clip": {"low": -1}}, None, "`surrogate.clip`: low must be ≥ 0"),
    ({"clip": 3}, None, "`surrogate.clip` is 3: expected a mapping of its settings"),
    ({"clip": {}, "budget": {"tokens": 1}}, None, "`surrogate` names 2 pieces, clip and budget: keep one"),
    (3, Clip(), "`surrogate` is 3: expected a name (clip, budget)"),
    (None, Clip(), "`surrogate` is None: expected a name"),
    ({}, Clip(), "`surrogate` is {}: expected a name"),
    (Inner(), None, "`surrogate` is Inner(width=0.5), which is no piece for this slot"),
])  # fmt: skip
def test_wrong_pieces(value: object, own: object, expected: str) -> None:
    with pytest.raises(UsageError) as caught:
        build_piece(value, REGISTRY, own, "surrogate")
    assert expected in str(caught.value)


def test_all_that_is_wrong_with_a_piece_at_once() -> None:
    with pytest.raises(UsageError) as caught:
        build_piece({"clip": {"lwo": 1, "high": True, "inner": {"x": 1}}}, REGISTRY)
    assert len(str(caught.value).splitlines()) == 3


def test_every_registered_piece_refuses_unknown_keys_and_bools_for_numbers() -> None:
    from tilt.objectives import PIECES

    for slot, registry in PIECES.items():
        for name, kind in registry.items():
            with pytest.raises(UsageError, match="unknown key"):
                build_piece({name: {"no_such_setting": 1}}, registry, None, slot)
            with pytest.raises(FrozenInstanceError):
                kind.__setattr__(object.__new__(kind), "x", 1)
            for key, annotation in kind.__annotations__.items():
                if annotation in ("float", "int") or "Literal[0, 1]" in str(annotation):
                    with pytest.raises(UsageError, match=f"{key}` is True"):
                        build_piece({name: {key: True}}, registry, None, slot)


@pytest.mark.parametrize("values", [{"name": "\ud800"}, {"objective": {"\ud800": None}}, {"\ud800": 1}, {"weights": {"\ud800": 0.5}}])
def test_half_a_character_is_a_problem_like_any_other(values):
    with pytest.raises(UsageError, match=r"(name|ud800|weights).*holds half a character"):
        parse(values, Config)
