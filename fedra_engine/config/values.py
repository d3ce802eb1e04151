"""Read values from the YAML of configurations and the text of options, by the types of their fields.

Unlike in YAML 1.1, `010` is not 8, `1:30` not 90, `no` not false and `2026-01-01` no date; and a file cannot expand
without end. Whether a value is allowed is checked later.
"""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin

import yaml

from fedra_engine.config.fields import describe_type, field_types, literal_values, settings, union_members
from fedra_engine.config.options import PATH
from fedra_engine.runtime.errors import InputError

Config = TypeVar("Config")

_LARGEST = 1 << 20
"""Most bytes of a file."""
_DEEPEST = 20
"""Most levels of brackets or indents."""
_MOST = 20_000
"""Most values in a file."""
_LONGEST_NUMBER = 400
"""Most digits of a number."""
_SCALARS = (
    ("bool", r"true|false|True|False", [*"tTfF"]),
    ("null", r"~|null|Null|", [*"~nN", ""]),
    ("int", r"[-+]?[0-9]+", [*"-+0123456789"]),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?", [*"-+.0123456789"]),
    ("float", r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", [*"-+."]),
)
"""Tags of scalars without quotes, their patterns, and the characters that they begin with."""
_WORDS = {"true": True, "yes": True, "false": False, "no": False}
_NAMES = re.compile(r"[\w.-]+(,[\w.-]+)+")
"""A list of names, where a text may also be a regular expression."""


class _Loader(yaml.SafeLoader):
    """Reads scalars without quotes as in YAML 1.2: numbers, true, false, null, or texts."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 (as in the class above)

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self._depth = self._values = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        """Refuse aliases, by which a few lines can expand without end, too many values and too deep nesting."""
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent):
            raise yaml.YAMLError(f"found the alias *{event.anchor}, expected its value written out")
        self._values += 1
        if self._values > _MOST:
            raise yaml.YAMLError(f"found more than {_MOST:,} values")
        self._depth += 1
        if self._depth > _DEEPEST:
            raise yaml.YAMLError(f"found more than {_DEEPEST} levels of brackets or indents")
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        """Refuse a repeated key, of which one would silently win, and a key that is not a text."""
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for position, key in enumerate(keys):
            if not isinstance(key, str):
                raise yaml.YAMLError(f"found {key!r} as the name of a field, expected text")
            if key in keys[:position]:
                raise yaml.YAMLError(f"found {key!r} more than once, expected every field once")
        return super().construct_mapping(node, deep=deep)

    def construct_whole(self, node: Any) -> int:
        """A decimal number, also with leading zeros."""
        if len(node.value) > _LONGEST_NUMBER:
            raise yaml.YAMLError(f"found a number of {len(node.value)} digits, expected at most {_LONGEST_NUMBER}")
        return int(node.value)


class _Dumper(yaml.SafeDumper):
    """Quotes texts that `_Loader` or a YAML 1.1 loader would read as something else."""


for _kind, _pattern, _first in _SCALARS:
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_kind}", re.compile(rf"^(?:{_pattern})$"), _first)
_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_whole)


def load_yaml(text: str) -> Any:
    """The value of an option's text; yaml.YAMLError if it is no YAML, or too large."""
    value = yaml.load(text, Loader=_Loader)
    # A prompt that is a column in braces is not a mapping.
    if isinstance(value, dict) and value and ":" not in text and all(entry is None for entry in value.values()):
        return text
    return value


def dump_yaml(values: Any) -> str:
    """YAML that `load_yaml_file` reads back as `values`."""
    text: str = yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True)
    return text


def load_yaml_file(option: str, name: str) -> dict[str, Any]:
    """The fields and values in the file `name`, given by an `option`; InputError if it has none, or is too large."""
    path, expected = Path(os.path.expanduser(name)), "expected a YAML file of fields and values"
    if option != "config":
        expected += f", or options --{option}.<field>"
    try:
        # A pipe or a device may never end.
        if not path.is_file():
            found = f"{name!r}, which is no file" if path.exists() else f"no file {name!r}"
            raise InputError(f"{option}: found {found}; {expected}")
        if path.stat().st_size > _LARGEST:
            raise InputError(f"{option}: found more than {_LARGEST >> 20} MiB in {name!r}, {expected}")
        values = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except InputError:
        raise
    except (OSError, yaml.YAMLError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        if isinstance(error, yaml.MarkedYAMLError):
            line = "" if error.problem_mark is None else f" (line {error.problem_mark.line + 1})"
            reason = " ".join(filter(None, [error.context, error.problem])) + line
        raise InputError(f"{option}: {name}: {reason}; {expected}") from error
    if not isinstance(values, dict):
        raise InputError(f"{option}: found {'nothing' if values is None else 'no fields'} in {name!r}, {expected}")
    return values


def read_text(name: str, kind: Any, text: str) -> Any:
    """The value of an option's `text`, by the field's type: YAML, the text itself, or a list between commas."""
    members = union_members(kind)
    lists = [member for member in members if get_origin(member) in (list, tuple)]
    value: Any = text
    if text.strip():
        with suppress(yaml.YAMLError):
            value = load_yaml(text)
    # Texts are taken as typed, as YAML would interpret quotes and escapes.
    if isinstance(value, str) or (str in members and value is not None and not (lists and isinstance(value, list))):
        value = text
    entry = get_args(lists[0])[0] if lists else None
    scalars = (int, float, str)
    if entry in scalars and type(value) in scalars and text not in literal_values(kind):
        parts = [read_text(name, entry, part.strip()) for part in text.split(",")]
        if _NAMES.fullmatch(text) if str in members else len(parts) > 1 or type(parts[0]) is entry:
            value = parts
    return fitted(name, kind, value)


def plain_copy(config: Config) -> Config:
    """A copy of a configuration made in Python, as a file has it: paths as texts, arrays as lists, no NumPy numbers.

    Raises:
        InputError: it has an attribute that is no field.
    """
    copied = copy.deepcopy(config)
    for setting in settings(copied):
        setattr(setting.owner, setting.field, _plain(setting.value))
    return copied


def _plain(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return type(value)(_plain(entry) for entry in value)
    if isinstance(value, os.PathLike):
        return os.path.expanduser(os.fspath(value))
    return value.tolist() if hasattr(value, "tolist") else value


def fitted(name: str, kind: Any, value: Any) -> Any:
    """Convert a `value` from YAML to the type `kind`: 1 to 1.0, a list to a tuple, a mapping to a dataclass.

    A leading `~` in paths is expanded. What cannot be converted is returned as it is, but a mapping with a field that
    the dataclass lacks is an InputError.
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
        if origin is dict and isinstance(value, dict):
            return {key: fitted(name, get_args(member)[1], entry) for key, entry in value.items()}
        if is_dataclass(member) and isinstance(value, dict):
            return _made(name, member, value)
    return value


def _made(name: str, config_class: Any, values: Mapping[str, Any]) -> Any:
    kinds = field_types(config_class)
    for other in values.keys() - kinds.keys():
        raise InputError(f"{name}: found an unknown field {other}, expected {describe_type(config_class)}")
    found = {key: fitted(f"{name}.{key}".removeprefix("."), kinds[key], value) for key, value in values.items()}
    for field in fields(config_class):
        if field.metadata.get("allowed") is PATH and isinstance(found.get(field.name), str):
            found[field.name] = os.path.expanduser(found[field.name])
    return config_class(**found)
