"""The fields of a configuration: their types, those types in words, and the option that somebody meant who typed
one that there is not.
"""

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


ALIASES = {
    "batch": "training.batch_size",
    "batch_size": "training.batch_size",
    "data": "data.source",
    "dataset": "data.source",
    "epochs": "training.local_epochs",
    "learning_rate": "training.lr",
    "lr": "training.lr",
    "method": "method.name",
    "model": "model.path",
    "num_clients": "data.clients",
    "num_epochs": "training.local_epochs",
    "num_rounds": "rounds",
    "optimizer": "training.optimizer",
    "output": "output_dir",
    "r": "lora.rank",
    "rank": "lora.rank",
}
"""What other programs call an option, and its name here."""


def nearest(found: str, names: Sequence[str]) -> str | None:
    """The one of `names` that an unknown name most likely stands for; None if none is near.

    The last part counts most: `training.learning_rate` and `lr` are `training.lr`, `server.learning_rate` is
    `server.lr`.
    """
    group, _, last = found.rpartition(".")
    alias = ALIASES.get(last, last)
    for name in (f"{group}.{alias.rpartition('.')[2]}", alias):
        if name in names:
            return name
    same = [name for name in names if name.rpartition(".")[2] == last]
    if close := get_close_matches(found, same, n=1, cutoff=0) or get_close_matches(found, names, n=1):
        return close[0]
    by_last = {name.rpartition(".")[2]: name for name in reversed(names)}
    close = get_close_matches(last, list(by_last), n=1)
    return by_last[close[0]] if close else None


def known_name(found: str, names: Sequence[str]) -> str:
    """What to expect in place of an unknown name, which may have dashes in front, with the nearest that there is."""
    name = nearest(found.lstrip("-").replace("-", "_"), names)
    dashes = "--" if found.startswith("--") else ""
    return "one that --help-all lists" + (f" (did you mean {dashes}{name}?)" if name else "")
