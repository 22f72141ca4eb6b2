"""From the words after `tilt rl` to a running recipe: files, overrides, the dry run, the list of settings."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

from tilt.config import Document, gather, hint, parse
from tilt.errors import UsageError
from tilt.runs.text import inert

RECIPES = {
    "pretrain": "pretrain", "sft": "sft", "rm": "reward_model", "prm": "process_reward", "dpo": "dpo", "rl": "rl", "rank": "ranking",
    "label": "labelling", "rlhf": "rlhf", "quickstart": "quickstart",
}  # fmt: skip
"""Command → module in tilt.recipes."""

ENDINGS = (".yaml", ".yml", ".json", ".toml")


@dataclass(frozen=True)
class Switches:
    """What the command line decides besides settings."""

    dry_run: bool = False
    quiet: bool = False
    overwrite: bool = False
    resume: bool = False
    init_from: str = ""


def switches(words: Sequence[str]) -> tuple[Switches, list[str]]:
    """The switches among the words of a command, and the other words."""
    flags = {f"--{name.replace('_', '-')}": name for name in ("dry_run", "quiet", "overwrite", "resume")}
    found: dict[str, Any] = {}
    rest: list[str] = []
    left = iter(words)
    for word in left:
        if word in flags:
            found[flags[word]] = True
        elif word == "--init-from" or word.startswith("--init-from="):
            found["init_from"] = word.partition("=")[2] or next(left, "")
        else:
            rest.append(word)
    return Switches(**found), rest


def split(words: Sequence[str]) -> tuple[list[Path], list[str]]:
    """Recipe files, and everything else as overrides: `a.yaml --steps 3 lr=1` → a.yaml | --steps 3 lr=1."""
    files: list[Path] = []
    overrides: list[str] = []
    rest = iter(words)
    for word in rest:
        if word.startswith("--"):
            overrides.append(word)
            if "=" not in word:
                overrides += [value for value in [next(rest, None)] if value is not None]
        elif "=" not in word and word.endswith(ENDINGS):
            files.append(Path(word))
        else:
            overrides.append(word)
    return files, overrides


def run(command: str, words: Sequence[str], switches: Switches, preset: Sequence[str] = ()) -> None:
    """Read, check and run a recipe. `run` as a command takes the recipe from the file; `preset` overrides come before the user's."""
    files, overrides = split([_recipe_of(word) for word in words])
    wanted, overrides = _resumed_step(overrides, switches)
    document = gather(files, [*preset, *overrides, *_initial(switches)])
    name = _recipe(command, document, files)
    _agree(preset, document)
    recipe = _module(name)
    if switches.quiet and "quiet" in recipe.Config.model_fields:
        document.values["quiet"] = True
    _at_home(document, files, switches)
    config = parse(document.values, recipe.Config, document.origins)
    place = _place(config)
    if switches.resume:
        if place is None:
            raise UsageError(
                "--resume: which run? Give its folder (`tilt run runs/NAME --resume`), or the recipe with the run's name (name=NAME)"
            )
        if not switches.dry_run:
            recipe.run(config, _resuming(place, wanted))
            return
    elif place is not None and not switches.overwrite:
        _refuse_existing(place)
    if switches.dry_run:
        print(inert("\n".join(recipe.plan(config)), newline="\n"))
        return
    with _replacing(place) if switches.overwrite and place else nullcontext():
        recipe.run(config)


def _place(config: Any) -> Path | None:
    """Where the run lies that the configuration names: a folder directly below the root, or None where no name is given."""
    from tilt.runs.directory import check_name

    if not getattr(config, "name", None):
        return None
    check_name(config.name)
    return Path(config.root) / str(config.name)


def _recipe_of(word: str) -> str:
    """The folder of a run stands for its config.yaml."""
    file = Path(word) / "config.yaml"
    return str(file) if not word.startswith("-") and "=" not in word and os.path.isfile(file) else word


def _resumed_step(overrides: Sequence[str], switches: Switches) -> tuple[int | None, list[str]]:
    """`step=N` beside --resume: the checkpoint to go on from; it is no setting."""
    if not switches.resume:
        return None, list(overrides)
    steps = [word for word in overrides if word.startswith("step=")]
    rest = [word for word in overrides if word not in steps]
    if not steps:
        return None, rest
    number = steps[-1].removeprefix("step=")
    if not number.isdigit():
        raise UsageError(f"--resume {steps[-1]}: a step is a whole number, as in --resume step=120")
    return int(number), rest


def _initial(switches: Switches) -> list[str]:
    """`--init-from PATH`: the weights of a run's last checkpoint, or of a model's folder, as the model to start from."""
    if not switches.init_from:
        return []
    if switches.resume:
        raise UsageError("--init-from starts a new run from weights, and --resume goes on with an old one: drop one")
    from tilt.cli.talk import folder_of

    return [f"model={folder_of(switches.init_from)}"]


def _at_home(document: Document, files: Sequence[Path], switches: Switches) -> None:
    """A run's own config.yaml says where the run lies: its folder's name and place, unless others are given."""
    if not switches.resume or not files or files[-1].name != "config.yaml" or not (files[-1].parent / "env.json").is_file():
        return
    home = files[-1].resolve().parent
    given = {key for key in ("name", "root") if not document.origins.get((key,), "given").startswith(str(files[-1]))}
    for key, value in (("name", home.name), ("root", str(home.parent))):
        if key not in given or key not in document.values:
            document.values[key] = value


def _resuming(place: Path, step: int | None) -> Any:
    from tilt.recipes.taking_up import Start

    if not place.is_dir():
        if step is not None:
            raise UsageError(f"--resume step={step}: there is no run at {place}")
        print(f"nothing to resume at {place}: the run starts")
    return Start(resume=True, step=step)


def _refuse_existing(path: Path) -> None:
    from tilt.runs.directory import refuse_existing

    refuse_existing(path)


def _replacing(path: Path) -> Any:
    from tilt.runs.directory import replacing

    return replacing(path)


def _recipe(command: str, document: Document, files: Sequence[Path]) -> str:
    """The module of the recipe; the `recipe:` key is taken out of the document and must not contradict the command."""
    named = document.values.pop("recipe", None)
    at = document.origins.get(("recipe",), "")
    stated = _canonical(str(named), document, at) if named is not None else None
    if command != "run":
        if stated is not None and stated != RECIPES[command]:
            raise UsageError(f"`recipe` is {named!r} ({at}), but the command is `tilt {command}`: use `tilt run`, or another file")
        return RECIPES[command]
    if stated is None:
        where = f"{files[-1]} does not say" if files else "nothing says"
        raise UsageError(f"{where} which recipe to run: add a line `recipe: rl` (one of {', '.join(RECIPES)})")
    return stated


def _canonical(name: str, document: Document, at: str) -> str:
    """`rm` → reward_model; the name of an algorithm means the recipe that trains it."""
    plain = name.replace("-", "_")
    if plain in RECIPES or plain in RECIPES.values():
        return RECIPES.get(plain, plain)
    if recipe := trainer(plain):
        document.values.setdefault("algorithm", plain)
        return RECIPES[recipe]
    raise UsageError(f"unknown recipe `{name}` ({at}): {hint(name, RECIPES)}")


def trainer(algorithm: str) -> str:
    """The command that trains a row of the tables: grpo → rl, one that imitates given answers → sft, kto → dpo, rm_deepspeed_chat → rm; "" where there is none."""
    from tilt.objectives import ALGORITHMS, PREFERENCES, Imitate
    from tilt.parity import PAIR_PRESETS, PRESETS

    rows = {**PREFERENCES, **{name: preset.row for name, preset in PAIR_PRESETS.items()}}
    if algorithm in rows:
        return "dpo" if rows[algorithm].margin.reads == "likelihood" else "rm"
    if algorithm in ALGORITHMS and ALGORITHMS[algorithm].credit == Imitate():
        return "sft"
    return "rl" if algorithm in ALGORITHMS or algorithm in PRESETS else ""


def _agree(preset: Sequence[str], document: Document) -> None:
    """`tilt ppo algorithm=grpo` contradicts itself."""
    for word in preset:
        key, _, value = word.partition("=")
        if document.values.get(key) != value:
            raise UsageError(
                f"the command says {word}, but `{key}` is {document.values.get(key)!r} ({document.origins.get((key,), 'given')}): drop one"
            )


def _module(name: str) -> Any:
    return import_module(f"tilt.recipes.{name}")


def settings(command: str) -> list[tuple[str, str, str]]:
    """Every setting of a recipe as (key, default, meaning), nested ones with their dots."""
    return list(_settings(_module(RECIPES[command]).Config, ""))


def _settings(cls: Any, above: str, stated: Any = None, depth: int = 0) -> Iterator[tuple[str, str, str]]:
    from pydantic_core import PydanticUndefined

    from tilt.config import Section

    for name, info in cls.model_fields.items():
        default = info.get_default(call_default_factory=True, validated_data={}) if stated is None else getattr(stated, name)
        inner = default if isinstance(default, Section) else None
        sections = [kind for kind in _members(info.annotation) if isinstance(kind, type) and issubclass(kind, Section)]
        recipe = next(
            (
                command
                for command, module in RECIPES.items()
                for kind in sections
                if kind.__module__.removesuffix("_settings") == f"tilt.recipes.{module}"
            ),
            None,
        )
        if recipe is not None:
            yield (
                above + name,
                "null" if default is None else "{}",
                f"the settings of `tilt {recipe}`; data and model come from above unless given",
            )
            continue
        if (len(sections) != 1 or inner is None) and sections != [info.annotation]:
            shown = "required" if default is PydanticUndefined else _shown(default)
            yield above + name, shown, "; ".join(part for part in (info.description or "", _accepted(info)) if part)
        if sections and depth < 3:
            yield from _settings(sections[0], f"{above}{name}.", inner, depth + 1)


def _members(annotation: Any) -> tuple[Any, ...]:
    """The members of a union; a plain annotation is its own only member."""
    return get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)


def _accepted(info: Any) -> str:
    """The choices or the limits of a setting, in a few words."""
    choices = [repr(value).strip("'") for kind in _members(info.annotation) if get_origin(kind) is Literal for value in get_args(kind)]
    signs = (("ge", "≥"), ("gt", ">"), ("le", "≤"), ("lt", "<"))
    limits = [f"{sign} {getattr(rule, name):g}" for rule in info.metadata for name, sign in signs if getattr(rule, name, None) is not None]
    return ", ".join([*([" | ".join(choices)] if len(choices) > 1 else []), *limits])


def _shown(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(list(value)) if isinstance(value, tuple) else str(value).replace("\n", "\\n") if str(value) else "''"
