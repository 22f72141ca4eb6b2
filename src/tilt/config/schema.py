"""Sections: frozen, strict groups of settings; every error of a configuration at once, each with key, value, line and mend."""

from __future__ import annotations

import types
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from tilt.config.files import Document, Key, _Dumper, override, read_file
from tilt.config.names import nearest
from tilt.errors import UsageError


class Section(BaseModel):
    """A group of settings: frozen, unknown keys refused, no guessing of types.

    `true` is not 1.0 and "0.1" is not a float; an int serves as a float, a list as a tuple, text as a path. A mapping given for a nested
    section is laid over that section's default here, so one key changes one setting. Floats are finite.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False, arbitrary_types_allowed=True)

    @model_validator(mode="before")
    @classmethod
    def _accept(cls, values: Any) -> Any:
        if not isinstance(values, Mapping):
            return values
        accepted = dict(values)
        for name, info in cls.model_fields.items():
            if name not in accepted:
                continue
            value, default = accepted[name], info.get_default(call_default_factory=True, validated_data={})
            if isinstance(value, Mapping) and isinstance(default, Section) and info.annotation is type(default):
                value = _over(default, value)
            accepted[name] = _shaped(value, info.annotation)
        return accepted


C = TypeVar("C", bound=Section)


def _over(default: Section, value: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that a default section states, with the given ones laid over them."""
    result: dict[str, Any] = {name: getattr(default, name) for name in default.model_fields_set}
    for name, given in value.items():
        info = type(default).model_fields.get(name)
        below = getattr(default, name) if info else None
        nested = isinstance(below, Section) and isinstance(given, Mapping) and info is not None and info.annotation is type(below)
        result[name] = _over(below, given) if nested and isinstance(below, Section) else given
    return result


def _shaped(value: Any, annotation: Any) -> Any:
    """A list as a tuple where a tuple is asked for, text as a path where a path is; all else as it is."""
    options = list(_options(annotation))
    chosen = any(value in get_args(option) for option in options if get_origin(option) is Literal)
    if isinstance(value, str) and Path in options and str not in options and not chosen:
        return Path(value)
    if isinstance(value, (list, tuple)):
        for option in options:
            if option is tuple or get_origin(option) is tuple:
                inner = get_args(option)
                kinds = [inner[0]] * len(value) if len(inner) == 2 and inner[1] is Ellipsis else [*inner, *[Any] * len(value)]
                return tuple(_shaped(item, kind) for item, kind in zip(value, kinds, strict=False))
    if isinstance(value, Mapping):
        for option in options:
            if get_origin(option) in (dict, Mapping) and len(get_args(option)) == 2:
                return {key: _shaped(item, get_args(option)[1]) for key, item in value.items()}
    return value


def _options(annotation: Any) -> Iterator[Any]:
    """The members of a union, through `Annotated`; a plain annotation is its own only member."""
    if get_origin(annotation) in (Union, types.UnionType):
        for member in get_args(annotation):
            yield from _options(member)
    elif hasattr(annotation, "__metadata__"):
        yield from _options(annotation.__origin__)
    else:
        yield annotation


def _sections(annotation: Any) -> Iterator[type[Section]]:
    """Every section class that an annotation mentions."""
    for option in _options(annotation):
        if isinstance(option, type) and not get_args(option) and issubclass(option, Section):
            yield option
        for inner in get_args(option):
            yield from _sections(inner)


def load(files: Sequence[Path], overrides: Sequence[str], cls: type[C]) -> C:
    """The configuration from defaults < files, left to right < overrides; every error at once."""
    document = gather(files, overrides)
    return parse(document.values, cls, document.origins)


def gather(files: Sequence[Path], overrides: Sequence[str]) -> Document:
    """Files merged left to right and overridden, before any check."""
    document = Document()
    for file in files:
        document.merge(read_file(Path(file)))
    override(document, overrides)
    return document


def recipe_name(cls: type[Section]) -> str:
    """The recipe whose configuration this is: the default of its `recipe` field, else the last part of its module's name (rl_settings → rl)."""
    info = cls.model_fields.get("recipe")
    return str(info.default) if info is not None else cls.__module__.rpartition(".")[2].removesuffix("_settings")


def parse(values: Mapping[str, Any], cls: type[C], origin: Mapping[Key, str] | str = "") -> C:
    """A section from plain values, or one UsageError with a line per problem: key, what was given and where, what is expected.

    A top-level `recipe:` says which recipe a file is for and must agree with `cls`.
    """
    values = dict(values)
    problems = [f"`{'.'.join(where)}` holds half a character (a lone surrogate): write it whole" for where in _halves(values)]
    if problems:
        raise _refused(problems, cls)
    if "recipe" not in cls.model_fields and "recipe" in values:
        named = values.pop("recipe")
        if named != recipe_name(cls):
            problems.append(f"`recipe` is {_got(named)}{_at(origin, ('recipe',))}, but this is the recipe `{recipe_name(cls)}`")
    try:
        config = cls.model_validate(values)
    except ValidationError as error:
        problems += _problems(error, values, cls, origin)
        config = None
    if problems or config is None:
        raise _refused(problems, cls)
    return config


def _refused(problems: Sequence[str], cls: type[Section]) -> UsageError:
    """One error that lists every problem."""
    count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
    lines = "\n".join(f"  {line}" for problem in problems for line in problem.splitlines())
    return UsageError(f"{count} in the configuration of `{recipe_name(cls)}`:\n{lines}")


def _halves(values: Any, where: Key = ()) -> Iterator[Key]:
    """The places of texts that UTF-8 cannot hold, keys escaped."""
    if isinstance(values, str):
        if values.encode("utf-8", "replace").decode() != values:
            yield where
    elif isinstance(values, Mapping):
        for key, value in values.items():
            name = str(key).encode("ascii", "backslashreplace").decode()
            yield from ((*where, name),) if isinstance(key, str) and any(True for _ in _halves(key)) else _halves(value, (*where, name))
    elif isinstance(values, (list, tuple)):
        for number, value in enumerate(values):
            yield from _halves(value, (*where, str(number)))


def _problems(error: ValidationError, values: Mapping[str, Any], cls: type[Section], origin: Mapping[Key, str] | str) -> list[str]:
    """One line per key that is wrong; of a union's complaints only those that fit what was given are kept."""
    found: dict[Key, list[Any]] = {}
    for item in error.errors():
        found.setdefault(_path(item["loc"], item["type"], values), []).append(item)
    lines = []
    for path, items in found.items():
        given = _value(values, path)
        deeper = any(other[: len(path)] == path and len(other) > len(path) for other in found)
        if deeper and isinstance(given, (Mapping, list)) and all(i["type"] not in ("value_error", "assertion_error") for i in items):
            continue
        lines.append(_line(path, items, cls, origin))
    return lines


def _path(location: tuple[Any, ...], kind: str, values: Any) -> Key:
    """The key path of an error: pydantic's location without the names of union members and validators."""
    path: list[str] = []
    here = values
    for part in location:
        last = part == location[-1] and kind in ("missing", "extra_forbidden")
        if isinstance(here, Mapping) and (part in here or last):
            path, here = [*path, str(part)], here.get(part)
        elif isinstance(here, (list, tuple)) and isinstance(part, int) and 0 <= part < len(here):
            path, here = [*path, str(part)], here[part]
        elif last and not isinstance(here, (list, tuple)):
            path.append(str(part))
    return tuple(path)


def _value(values: Any, path: Key) -> Any:
    for part in path:
        values = (
            values.get(part)
            if isinstance(values, Mapping)
            else values[int(part)]
            if isinstance(values, (list, tuple)) and part.isdecimal()
            else None
        )
    return values


def _at(origin: Mapping[Key, str] | str, path: Key) -> str:
    """Where a key was set, or the nearest enclosing key that has a known place."""
    if isinstance(origin, str):
        return f" ({origin})" if origin else ""
    for length in range(len(path), 0, -1):
        if path[:length] in origin:
            return f" ({origin[path[:length]]})"
    return ""


def _line(path: Key, items: list[Any], cls: type[Section], origin: Mapping[Key, str] | str) -> str:
    name, at, first = ".".join(path), _at(origin, path), items[0]
    if any(item["type"] == "extra_forbidden" for item in items):
        return f"unknown key `{name}`{at}: {_nearest_key(path, cls)}"
    if first["type"] == "missing" and isinstance(first["input"], tuple):
        return f"`{name}` is {_got(list(first['input']))}{at}: expected a longer list"
    if first["type"] == "missing":
        return f"`{name}` is required{at}"
    if first["type"] in ("value_error", "assertion_error"):
        reason = first.get("ctx", {}).get("error", first["msg"])
        return f"`{name}`{at}: {reason}" if name else str(reason)
    expected = " or ".join(dict.fromkeys(_expected(item) for item in items))
    line = f"`{name}` is {_got(first['input'])}{at}: expected {expected}"
    if first["type"] == "literal_error" and isinstance(first["input"], str):
        near = nearest(first["input"], [str(v).strip("'") for v in first["ctx"]["expected"].replace(" or ", ", ").split(", ")])
        line += f"; did you mean `{near}`?" if near else ""
    return line


EXPECTED = {
    "float_type": "a number", "int_type": "a whole number", "bool_type": "true or false", "string_type": "text", "tuple_type": "a list",
    "dict_type": "a mapping", "model_type": "a mapping of settings", "finite_number": "a finite number", "none_required": "null", "model_attributes_type": "a mapping of settings",
}  # fmt: skip
SYMBOLS = {
    "greater_than": ("gt", ">"),
    "greater_than_equal": ("ge", "≥"),
    "less_than": ("lt", "<"),
    "less_than_equal": ("le", "≤"),
    "multiple_of": ("multiple_of", "a multiple of"),
}


def _expected(item: Any) -> str:
    kind, context = item["type"], item.get("ctx", {})
    if kind in SYMBOLS:
        key, symbol = SYMBOLS[kind]
        return f"{symbol} {context[key]}"
    if kind == "is_instance_of" and context.get("class") == "Path":
        return "a path"
    if kind == "literal_error":
        return f"one of {context['expected']}" if "," in context["expected"] or " or " in context["expected"] else str(context["expected"])
    return EXPECTED.get(kind) or item["msg"].removeprefix("Input should be ")


def _got(value: Any) -> str:
    """A short picture of what was given, with its kind where that is not plain: `'0.1' (text)`, `True`, `null`."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    text = repr(str(value) if isinstance(value, Path) else value)
    short = text if len(text) <= 60 else text[:40] + " … " + text[-15:]
    return f"{short} (text)" if isinstance(value, str) else short


def _nearest_key(path: Key, cls: type[Section]) -> str:
    """`did you mean …?`: a key of the same section, else the same key in another section, else what the section knows."""
    *above, last = path
    here: list[type[Section]] = [cls]
    for part in above:
        inside = [s for section in here if part in section.model_fields for s in _sections(section.model_fields[part].annotation)]
        here = inside or (here if part.isdecimal() else [])
    known = list(dict.fromkeys(name for section in here for name in section.model_fields))
    if near := nearest(last, known):
        return f"did you mean `{near}`?"
    elsewhere = [name for name in _all_keys(cls) if name.rpartition(".")[2] == last]
    return f"did you mean `{elsewhere[0]}`?" if elsewhere else "known keys: " + ", ".join(known)


def _all_keys(cls: type[Section], above: str = "", depth: int = 0) -> Iterator[str]:
    for name, info in cls.model_fields.items():
        yield above + name
        if depth < 4:
            for section in _sections(info.annotation):
                yield from _all_keys(section, f"{above}{name}.", depth + 1)


def dump(config: Section) -> str:
    """The whole configuration as YAML, defaults included; with a line `recipe: NAME` above, `tilt run` on it reruns the run."""
    return yaml.dump(plain(config), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def plain(value: Any) -> Any:
    """A configuration as mappings, lists, text, numbers, bools and nulls only."""
    if isinstance(value, BaseModel):
        return {name: plain(getattr(value, name)) for name in type(value).model_fields}
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"a configuration holds plain values, not {type(value).__name__}")
