"""From the text of an option, or a value in a file, to the value of a field; whether it may be one is checked later."""

from __future__ import annotations

import re
from contextlib import suppress
from dataclasses import is_dataclass
from typing import Any, Literal, get_args, get_origin

import yaml

from fedra_engine.config.fields import describe_type, field_types, union_members
from fedra_engine.config.yaml_values import load_yaml
from fedra_engine.runtime.errors import InputError

_WORDS = {"true": True, "yes": True, "false": False, "no": False}
_NAMES = re.compile(r"[\w.-]+(,[\w.-]+)+")
"""What a list of names looks like where one text could also be a regular expression."""


def read_text(name: str, kind: Any, text: str) -> Any:
    """What the `text` of an option stands for, by the field's type: YAML, the text itself, or a list between commas.

    Raises:
        InputError: a group of fields in it has one that there is not.
    """
    members = union_members(kind)
    lists = [member for member in members if get_origin(member) in (list, tuple)]
    value: Any = text
    if text.strip():
        with suppress(yaml.YAMLError):
            value = load_yaml(text)
    # A text is what was typed, without YAML's quotes and escapes.
    if isinstance(value, str) or (str in members and value is not None and not (lists and isinstance(value, list))):
        value = text
    entry = get_args(lists[0])[0] if lists else None
    words = [word for member in members if get_origin(member) is Literal for word in get_args(member)]
    if entry in (int, float, str) and type(value) in (int, float, str) and text not in words:
        parts = [read_text(name, entry, part.strip()) for part in text.split(",")]
        if _NAMES.fullmatch(text) if str in members else len(parts) > 1 or type(parts[0]) is entry:
            value = parts
    return fitted(name, kind, value)


def fitted(name: str, kind: Any, value: Any) -> Any:
    """A `value` from YAML as the type `kind` has it: 1 as 1.0, a list as a tuple, a mapping as a dataclass.

    What cannot be one of that type stays as it is.

    Raises:
        InputError: a mapping has a field that the dataclass lacks.
    """
    for member in union_members(kind):
        origin = get_origin(member)
        if origin in (list, tuple) and isinstance(value, list):
            return origin(fitted(name, get_args(member)[0], entry) for entry in value)
        if member is float and type(value) is int:
            with suppress(OverflowError):
                return float(value)
        if member is bool and isinstance(value, str):
            return _WORDS.get(value.lower(), value)
        if is_dataclass(member) and isinstance(value, dict):
            assert isinstance(member, type)
            kinds = field_types(member)
            for other in value.keys() - kinds.keys():
                raise InputError(f"{name}: found an unknown field {other}, expected {describe_type(member)}")
            return member(**{key: fitted(f"{name}.{key}", kinds[key], entry) for key, entry in value.items()})
    return value
