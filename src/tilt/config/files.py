"""YAML and TOML into plain values, remembering the line of every key, and `key.sub=value` overrides on top.

Scalars follow YAML 1.2: `1e-6` and `1E-6` are floats, `1_000` is an int, only `true` and `false` are bools, so `no`, `off` and `12:30` are text.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import yaml

from tilt.config.names import nearest
from tilt.errors import UsageError

Key = tuple[str, ...]
MOST_NODES = 100_000  # an alias of an alias of an alias … can stand for billions of values
MOST_DEPTH = 100
MOST_BYTES = 4_000_000

SCALARS = {
    "null": (r"~|null|Null|NULL|", "~nN\0"),
    "bool": (r"true|True|TRUE|false|False|FALSE", "tTfF"),
    "int": (r"[-+]?[0-9][0-9_]*|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789"),
    "float": (r"[-+]?(?:[0-9][0-9_]*\.?[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)", "-+.0123456789"),
    "merge": (r"<<", "<"),
}


class _Loader(yaml.SafeLoader):
    """YAML 1.2 scalars."""

    yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {}  # type: ignore[misc]


class _Dumper(yaml.SafeDumper):
    """Quotes whatever YAML 1.1 or 1.2 would not read as text."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


for _name, (_pattern, _first) in SCALARS.items():
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(
            f"tag:yaml.org,2002:{_name}", re.compile(f"^(?:{_pattern})$"), ["" if c == "\0" else c for c in _first]
        )


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    """Text, in double quotes where YAML would fold it: NEL and the Unicode separators count as line breaks."""
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style='"' if re.search("[\x85\u2028\u2029]", text) else None)


_Dumper.add_representer(str, _text)


def _int(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int:
    text = node.value.replace("_", "")
    return _bounded(int(text, 0) if text[:2] in ("0o", "0x") else int(text, 10))


def _bounded(number: int) -> int:
    """Whole numbers that a machine can count with."""
    if not -(2**63) <= number < 2**63:
        raise ValueError("a whole number of more than 18 digits")
    return number


_Loader.add_constructor("tag:yaml.org,2002:int", _int)


@dataclass
class Document:
    """Plain values, and where each key was set: ("rl", "clip") → "recipe.yaml:12"."""

    values: dict[str, Any] = field(default_factory=dict)
    origins: dict[Key, str] = field(default_factory=dict)

    def merge(self, later: Document) -> None:
        """Lay a later document over this one: mappings are merged, everything else is replaced."""
        _merge(self.values, later.values)
        self.origins.update(later.origins)


def _merge(into: dict[str, Any], later: Mapping[str, Any]) -> None:
    for key, value in later.items():
        if isinstance(value, Mapping) and isinstance(into.get(key), dict):
            _merge(into[key], value)
        else:
            into[key] = value


def read_file(path: Path) -> Document:
    """The values of a .yaml, .yml, .json or .toml file."""
    try:
        if not path.is_file():
            near = nearest(path.name, [p.name for p in path.parent.iterdir() if p.is_file()]) if path.parent.is_dir() else None
            raise UsageError(f"no such file: {path}" + (f"\ndid you mean {path.parent / near}?" if near else ""))
        if (size := path.stat().st_size) > MOST_BYTES:
            raise UsageError(f"{path}: {size:,} bytes are no recipe; at most {MOST_BYTES:,}")
        text = path.read_text(encoding="utf-8-sig")
    except (UnicodeDecodeError, OSError) as error:
        raise UsageError(f"{path}: cannot be read as UTF-8 text: {error}") from None
    if path.suffix == ".toml":
        return _read_toml(text, str(path))
    if path.suffix in (".yaml", ".yml", ".json"):
        return _read_yaml(text, str(path))
    raise UsageError(f"{path}: a recipe is a .yaml, .yml, .json or .toml file")


def read_value(text: str, origin: str = "value") -> Any:
    """One value as YAML: `null`, `[1, 2]`, `{a: 1}`, `true`, `1e-6`; what is not one of these is text."""
    return _from_yaml(text, origin, Document())


def _read_yaml(text: str, name: str) -> Document:
    document = Document()
    values = _from_yaml(text, name, document)
    if values is not None and not isinstance(values, dict):
        raise UsageError(f"{name}: expected `key: value` lines, got {type(values).__name__}")
    document.values = values or {}
    return document


def _from_yaml(text: str, name: str, document: Document) -> Any:
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        return None if node is None else _build(loader, node, (), document, name, [], [0])
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f":{mark.line + 1}:{mark.column + 1}" if mark else ""
        raise UsageError(f"{name}{line}: not valid YAML: {error.problem or error.context}") from None
    except (yaml.YAMLError, ValueError) as error:
        raise UsageError(f"{name}: not valid YAML: {error}") from None
    except RecursionError:
        raise UsageError(f"{name}: not valid YAML here: brackets within brackets within brackets, hundreds of them") from None


def _build(loader: Any, node: yaml.Node, path: Key, document: Document, name: str, above: list[yaml.Node], count: list[int]) -> Any:
    """The value of a node; its key's line goes to the origins."""
    at = f"{name}:{node.start_mark.line + 1}"
    count[0] += 1
    if any(node is other for other in above) or count[0] > MOST_NODES:
        raise UsageError(f"{at}: an alias that contains itself, or more than {MOST_NODES} values")
    if len(above) > MOST_DEPTH:
        raise UsageError(f"{at}: values within values within values, more than {MOST_DEPTH} deep")
    if not isinstance(node, yaml.ScalarNode) and node.tag not in ("tag:yaml.org,2002:map", "tag:yaml.org,2002:seq"):
        raise UsageError(f"{at}: not valid YAML here: the tag {node.tag}")
    if isinstance(node, yaml.SequenceNode):
        return [_build(loader, child, (*path, str(i)), document, name, [*above, node], count) for i, child in enumerate(node.value)]
    if not isinstance(node, yaml.MappingNode):
        try:
            return loader.construct_object(node)
        except ValueError as error:
            raise UsageError(f"{at}: not valid here: {error}") from None
    seen: dict[str, int] = {}
    for key, _ in node.value:
        line = key.start_mark.line + 1
        if not isinstance(key, yaml.ScalarNode):
            raise UsageError(f"{name}:{line}: a key must be one word")
        if key.tag != "tag:yaml.org,2002:merge" and key.value in seen:
            raise UsageError(f"{name}:{line}: `{key.value}` is set twice (first on line {seen[key.value]}); keep one")
        seen[key.value] = line
    loader.flatten_mapping(node)
    result = {}
    for key, child in node.value:
        document.origins[(*path, key.value)] = f"{name}:{key.start_mark.line + 1}"
        result[key.value] = _build(loader, child, (*path, key.value), document, name, [*above, node], count)
    return result


def _read_toml(text: str, name: str) -> Document:
    try:
        values = tomllib.loads(text)
        _check(values, 0)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{name}: not valid TOML: {error}") from None
    document = Document(values)
    table: Key = ()
    for number, line in enumerate(text.splitlines(), 1):
        if header := re.match(r"\s*\[\s*([\w\-. \"']+?)\s*\]", line):
            table = _dotted(header[1])
            document.origins[table] = f"{name}:{number}"
        elif key := re.match(r"\s*([\w\-. \"']+?)\s*=", line):
            document.origins[table + _dotted(key[1])] = f"{name}:{number}"
    return document


def _check(value: Any, depth: int) -> None:
    """No number too large, no nesting too deep."""
    if depth > MOST_DEPTH:
        raise ValueError(f"values within values within values, more than {MOST_DEPTH} deep")
    if isinstance(value, int):
        _bounded(value)
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        _check(inner, depth + 1)


def _dotted(text: str) -> Key:
    return tuple(part.strip().strip("\"'") for part in text.split("."))


ALONE = {"data": "source"}
"""Sections that may be written as one setting alone: `data: NAME` is `data: {source: NAME}`, so `data.held_out` can still be set."""


def override(document: Document, arguments: Sequence[str]) -> None:
    """Set `key.sub=value`, `--key.sub value` or `--key.sub=value` in the document; list items are reached by number."""
    for name, text in _pairs(arguments):
        origin = f"given as {name}={text}"
        _set(document, tuple(name.split(".")), read_value(text, f"{name}={text}"), origin)


def _pairs(arguments: Sequence[str]) -> Iterator[tuple[str, str]]:
    rest = iter(arguments)
    for word in rest:
        dashed = word.startswith("--")
        name, equals, text = word.removeprefix("--").partition("=")
        if dashed:
            name = name.replace("-", "_")
        if not equals:
            value = next(rest, None) if dashed else None
            if value is None or value.startswith("--"):
                mend = (
                    f"`{word} VALUE`, for a switch `{word} true`"
                    if dashed
                    else "`key=value`, `key.sub=value` or `--key value`; a recipe file ends in .yaml or .toml"
                )
                raise UsageError(f"`{word}` has no value: write {mend}")
            text = value
        if not all(name.split(".")):
            raise UsageError(f"`{word}`: a key is one or more names joined by dots, as in `optimizer.learning_rate=1e-4`")
        yield name, text


def _set(document: Document, path: Key, value: Any, origin: str) -> None:
    here: Any = document.values
    above: Any = None
    for depth, key in enumerate(path):
        where = ".".join(path[:depth])
        if isinstance(here, str) and path[depth - 1] in ALONE and isinstance(above, dict):
            above[path[depth - 1]] = here = {ALONE[path[depth - 1]]: here}
        if isinstance(here, list):
            if not key.isdecimal() or int(key) >= len(here):
                raise UsageError(f"`{where}` is a list of {len(here)}: `{key}` is not one of its numbers 0–{len(here) - 1} ({origin})")
            index: Any = int(key)
        elif isinstance(here, dict):
            index = key
            here.setdefault(key, None)
        else:
            set_at = document.origins.get(path[:depth], "")
            raise UsageError(
                f"`{where}` is {here!r}{f' ({set_at})' if set_at else ''}, so `{'.'.join(path)}` cannot be set inside it ({origin}): make it a mapping first"
            )
        if depth == len(path) - 1:
            here[index] = value
            document.origins = {k: v for k, v in document.origins.items() if k[: len(path)] != path}
        elif here[index] is None:
            here[index] = {}
        document.origins.setdefault(path[: depth + 1], origin)
        above, here = here, here[index]
