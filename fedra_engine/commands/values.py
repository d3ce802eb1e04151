"""From the text of an option, or a value in a file, to the value of a field."""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import is_dataclass
from typing import Any, Literal, get_args, get_origin

import yaml

from fedra_engine.config.fields import describe_type, field_types, union_members
from fedra_engine.config.yaml_values import load_yaml
from fedra_engine.runtime.errors import InputError, shown

_WORDS = {"true": True, "yes": True, "false": False, "no": False}
_NAMES = re.compile(r"[\w.-]+(,[\w.-]+)+")
"""What a list of names looks like where one text could also be a regular expression."""


def read_text(name: str, kind: Any, text: str) -> Any:
    """The value that the `text` of an option stands for: YAML; a text as it is; or entries of a list between commas.

    Raises:
        InputError: it is none of the type `kind`.
    """
    members = union_members(kind)
    lists = [member for member in members if get_origin(member) in (list, tuple)]
    value: Any = text
    if text.strip():
        with suppress(yaml.YAMLError):
            value = load_yaml(text)
    if isinstance(value, str):
        # Without YAML's quotes and escapes, a text is what was typed.
        value = text
    entry = get_args(lists[0])[0] if lists else None
    words = [word for member in members if get_origin(member) is Literal for word in get_args(member)]
    if entry in (int, float, str) and isinstance(value, str | int | float) and text not in words:
        parts = [part.strip() for part in text.split(",")]
        if entry is not str:
            value = [read_text(name, entry | str, part) for part in parts]
        elif str not in members or _NAMES.fullmatch(text):
            value = parts
    try:
        return fitted(name, kind, value)
    except InputError:
        if str in members and value is not None:
            return text
        raise


def fitted(name: str, kind: Any, value: Any) -> Any:
    """A `value` read from YAML as one of the type `kind`: whole numbers may be numbers, lists tuples, mappings groups.

    Raises:
        InputError: it is none; what is in range is checked later.
    """
    for member in union_members(kind):
        found = _as_member(name, member, value, kind)
        if found is not _NONE:
            return found
    raise InputError(f"{name}: found {shown(value)}, expected {describe_type(kind)}")


_NONE = object()


def _as_member(name: str, member: Any, value: Any, kind: Any) -> Any:
    """The value as one of the types of the union `kind`; `_NONE` if it is none."""
    origin, inner = get_origin(member), get_args(member)
    if origin in (list, tuple) and isinstance(value, list) and (origin is list or len(value) == len(inner)):
        return origin(_entry(f"{name}[{index}]", name, inner[0], entry, kind) for index, entry in enumerate(value))
    if member is float and isinstance(value, int) and not isinstance(value, bool):
        with suppress(OverflowError):
            return float(value)
    if member is bool and isinstance(value, str):
        return _WORDS.get(value.lower(), _NONE)
    if origin is Literal:
        fits = value in inner
    else:
        fits = (
            isinstance(member, type) and isinstance(value, member) and (member is bool or not isinstance(value, bool))
        )
    return value if fits else _NONE


def _entry(place: str, name: str, member: Any, value: Any, kind: Any) -> Any:
    """An entry of the list `name` of the type `kind`, which a message describes."""
    if is_dataclass(member) and isinstance(value, dict):
        assert isinstance(member, type)
        kinds: Mapping[str, Any] = field_types(member)
        for other in value.keys() - kinds.keys():
            raise InputError(f"{name}: found an unknown field {other}, expected {describe_type(kind)}")
        return member(**{key: fitted(f"{place}.{key}", kinds[key], entry) for key, entry in value.items()})
    found = _as_member(name, member, value, kind)
    if found is _NONE:
        raise InputError(f"{name}: found {shown(value)}, expected {describe_type(kind)}")
    return found
