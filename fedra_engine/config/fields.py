"""The fields of a configuration: their types, those types in words, and the name that somebody may have meant."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import is_dataclass
from difflib import get_close_matches
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

_NAMES = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", NoneType: "null"}


TYPES: dict[type[Any], dict[str, Any]] = {}
"""Of the classes seen so far: to find them out takes most of the time of checking a configuration."""


def field_types(config_class: type[Any]) -> Mapping[str, Any]:
    """Type of every field of a dataclass."""
    if config_class not in TYPES:
        TYPES[config_class] = get_type_hints(config_class)
    return TYPES[config_class]


def union_members(kind: Any) -> tuple[Any, ...]:
    """The types of a union, or the one type."""
    return get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)


def describe_type(kind: Any, scalar: str | None = None) -> str:
    """A type in words: `a whole number or null`; with `scalar` in place of a number or text of any value."""
    origin, inner = get_origin(kind), get_args(kind)
    if origin is Literal:
        return f"one of {', '.join(map(str, inner))}" if len(inner) > 1 else str(inner[0])
    if origin in (Union, UnionType):
        return " or ".join(describe_type(member, scalar) for member in inner)
    if origin is list:
        return f"a list ({describe_type(inner[0], scalar)} each)"
    if origin is tuple:
        return f"a list of {len(inner)} ({describe_type(inner[0], scalar)} each)"
    if is_dataclass(kind):
        assert isinstance(kind, type)
        return f"fields {', '.join(field_types(kind))}"
    return scalar if scalar and kind in (int, float, str) else _NAMES[kind]


def type_of_field(name: str, config_class: type[Any]) -> Any:
    """Type of the field, or group of fields, with a dotted `name`; None if there is none."""
    kind: Any = config_class
    for part in name.split("."):
        if not is_dataclass(kind):
            return None
        assert isinstance(kind, type)
        kind = field_types(kind).get(part)
    return kind


def field_names(config_class: type[Any], prefix: str = "") -> Iterator[str]:
    """Dotted names of all fields that are no groups of others."""
    for name, kind in field_types(config_class).items():
        if is_dataclass(kind):
            assert isinstance(kind, type)
            yield from field_names(kind, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def did_you_mean(found: str, names: Sequence[str]) -> str:
    """An addition to a message: the most similar of `names`; nothing if none is."""
    matches = get_close_matches(found, names, n=1)
    return f" (did you mean {matches[0]}?)" if matches else ""
