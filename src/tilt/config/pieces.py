"""Strict building of an objective's pieces: plain frozen dataclasses from tagged or partial mappings, nothing guessed, nothing ignored."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, Field, fields, is_dataclass, replace
from typing import Any, Literal, get_args, get_origin, get_type_hints

from pydantic import ConfigDict, TypeAdapter, ValidationError

from tilt.config.names import hint
from tilt.errors import UsageError


def build_piece(value: Any, registry: Mapping[str, type], own: Any = None, where: str = "piece") -> Any:
    """The piece that a slot's value asks for.

    `clip` → Clip(); `{clip: {low: 0.2}}` → Clip(low=0.2); `{high: 0.28}` → the row's own piece with that field changed; `{clip: {}, high: 0.28}` → Clip(high=0.28).
    """
    if is_dataclass(value) and not isinstance(value, type):
        if type(value) not in registry.values():
            raise UsageError(f"`{where}` is {value!r}, which is no piece for this slot: one of {', '.join(registry)}")
        return value
    if isinstance(value, str):
        value = {value: {}}
    if not isinstance(value, Mapping) or not value:
        raise UsageError(
            f"`{where}` is {value!r}: expected a name ({', '.join(registry)}) or a mapping such as {{{next(iter(registry), 'name')}: {{…}}}}"
        )
    own_fields = {f.name for f in fields(own)} if own is not None else set()
    tags = [key for key in value if key in registry and not (key in own_fields and not isinstance(value[key], Mapping))]
    if len(tags) > 1:
        raise UsageError(
            f"`{where}` names {len(tags)} pieces, {' and '.join(tags)}: keep one (a later file adds to an earlier one; `{where}={tags[-1]}` replaces)"
        )
    rest = {key: item for key, item in value.items() if key not in tags}
    if not tags:
        stranger = next((key for key, item in rest.items() if key not in own_fields and (own is None or isinstance(item, Mapping))), None)
        if stranger is not None:
            raise UsageError(f"`{where}`: unknown piece `{stranger}`: {hint(str(stranger), registry)}")
        return _change(own, rest, registry, where)
    settings = value[tags[0]]
    if settings is not None and not isinstance(settings, Mapping):
        raise UsageError(f"`{where}.{tags[0]}` is {settings!r}: expected a mapping of its settings")
    return _make(registry[tags[0]], {**(settings or {}), **rest}, registry, f"{where}.{tags[0]}")


def _make(cls: type, settings: Mapping[str, Any], registry: Mapping[str, type], where: str) -> Any:
    checked = _checked(cls, settings, None, registry, where)
    missing = [f.name for f in fields(cls) if f.init and f.name not in checked and f.default is MISSING and f.default_factory is MISSING]
    if missing:
        raise UsageError(f"`{where}` needs " + ", ".join(f"`{name}`" for name in missing))
    return _call(cls, checked, where)


def _change(own: Any, settings: Mapping[str, Any], registry: Mapping[str, type], where: str) -> Any:
    checked = _checked(type(own), settings, own, registry, where)
    return _call(lambda **kw: replace(own, **kw), checked, where)


def _call(make: Any, settings: Mapping[str, Any], where: str) -> Any:
    try:
        return make(**settings)
    except (ValueError, TypeError, AssertionError) as error:
        raise UsageError(f"`{where}`: {error}") from None


def _checked(cls: type, settings: Mapping[str, Any], own: Any, registry: Mapping[str, type], where: str) -> dict[str, Any]:
    """Every setting with the type its field asks for; all that is wrong with this piece at once."""
    known: dict[str, Field[Any]] = {f.name: f for f in fields(cls) if f.init}
    hints = get_type_hints(cls)
    result, problems = {}, []
    for name, value in settings.items():
        if name not in known:
            problems.append(f"unknown key `{where}.{name}`: {hint(str(name), known) if known else f'{cls.__name__} has no settings'}")
            continue
        try:
            result[name] = _field(value, hints[name], getattr(own, name, None), registry, f"{where}.{name}")
        except UsageError as error:
            problems.append(str(error))
    if problems:
        raise UsageError("\n".join(problems))
    return result


def _field(value: Any, kind: Any, own: Any, registry: Mapping[str, type], where: str) -> Any:
    """A nested piece, or a value of exactly the annotated type (an int serves as a float, a list as a tuple; a bool is not a number)."""
    if is_dataclass(kind) and isinstance(kind, type) and isinstance(value, Mapping):
        return _change(own, value, registry, where) if isinstance(own, kind) else _make(kind, value, registry, where)
    if getattr(kind, "_is_protocol", False) or (is_dataclass(own) and not is_dataclass(kind)):
        return build_piece(value, registry, own if is_dataclass(own) else None, where)
    given = tuple(value) if isinstance(value, list) else value
    if isinstance(value, bool) and get_origin(kind) is Literal and not any(value is choice for choice in get_args(kind)):
        raise UsageError(f"`{where}` is {value}: expected {' or '.join(repr(choice) for choice in get_args(kind))}")
    try:
        return TypeAdapter(kind, config=ConfigDict(strict=True, arbitrary_types_allowed=True)).validate_python(given)
    except ValidationError as error:
        expected = error.errors()[0]["msg"].removeprefix("Input should be ")
        raise UsageError(f"`{where}` is {value!r}: expected {expected}") from None
