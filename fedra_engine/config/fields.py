"""The fields of a configuration, their types in words, and suggestions for mistyped names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass
from difflib import get_close_matches
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from fedra_engine.config.options import Allowed, Choice, Need
from fedra_engine.runtime.errors import InputError

_NAMES = {int: "a whole number", float: "a number", bool: "true or false", str: "text", NoneType: "null"}
_PLURALS = {
    "a whole number": "whole numbers",
    "a number": "numbers",
    "text": "texts",
    "one of ": "",
    "fields": "mappings with",
}
"""How descriptions of the entries of a list begin, by how those of one value do."""

TYPES: dict[type[Any], dict[str, Any]] = {}
"""Cache of `field_types`, which would take most of the time of checking a configuration."""


def field_types(config_class: Any) -> Mapping[str, Any]:
    """Type of every field of a dataclass."""
    if config_class not in TYPES:
        TYPES[config_class] = get_type_hints(config_class)
    return TYPES[config_class]


def union_members(kind: Any) -> tuple[Any, ...]:
    """The types of a union; of any other type, that one alone."""
    return get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)


def literal_values(kind: Any) -> list[Any]:
    """The values of a `Literal`, alone or in a union."""
    return [word for member in union_members(kind) if get_origin(member) is Literal for word in get_args(member)]


def describe_type(kind: Any, allowed: Allowed | Choice | None = None) -> str:
    """A type in words, as in `a whole number or null`; `allowed` describes its numbers and texts."""
    origin, inner = get_origin(kind), get_args(kind)
    if origin is Literal:
        return f"one of {', '.join(map(str, inner))}" if len(inner) > 1 else str(inner[0])
    if origin in (Union, UnionType):
        return " or ".join(describe_type(member, allowed) for member in inner)
    if origin in (list, tuple):
        length = f"{len(inner)} " if origin is tuple else ""
        return f"a list of {length}{_plural(describe_type(inner[0], allowed))}"
    if origin is dict:
        return f"a mapping from texts to {_plural(describe_type(inner[1], allowed))}"
    if is_dataclass(kind):
        return f"fields {', '.join(field_types(kind))}"
    return allowed.description if allowed and kind in (int, float, str) else _NAMES[kind]


def _plural(description: str) -> str:
    """The description of several values, as in `whole numbers from 1 to 128`."""
    for one, several in _PLURALS.items():
        if description.startswith(one):
            return several + description.removeprefix(one)
    return f"entries ({description} each)"


@dataclass(frozen=True)
class Setting:
    """A field of a configuration, groups excepted.

    Attributes:
        name: dotted, from the root of the configuration.
        value: in this configuration.
        allowed: the values that the field, or each entry of a list or mapping, may have; None where the type says it.
        needs: those of the field and of its groups, with names from the root.
        owner: the group that the field belongs to.
        field: name of the field in the group.
    """

    name: str
    value: Any
    default: Any
    kind: Any
    allowed: Allowed | Choice | None
    needs: tuple[Need, ...]
    owner: Any
    field: str


def settings(config: Any, prefix: str = "", needs: tuple[Need, ...] = ()) -> Iterator[Setting]:
    """All fields of a configuration, in order; those of groups in a list come after the list.

    Raises InputError for an attribute that is not a field, as Python lets one assign to a mistyped name.
    """
    kinds = field_types(type(config))
    for name in vars(config).keys() - kinds.keys():
        known = known_name(f"{prefix}{name}", [f"{prefix}{field}" for field in kinds])
        raise InputError(f"{prefix}{name}: found no field of that name, expected {known}")
    for field in fields(config):
        name, value = f"{prefix}{field.name}", getattr(config, field.name)
        own = ({n if "." in n else prefix + n: need[n] for n in need} for need in field.metadata.get("needs", ()))
        of_field = (*needs, *own)
        if is_dataclass(value):
            yield from settings(value, f"{name}.", of_field)
            continue
        default = field.default if field.default_factory is MISSING else field.default_factory()
        allowed = field.metadata.get("allowed")
        yield Setting(name, value, default, kinds[field.name], allowed, of_field, config, field.name)
        for index, entry in enumerate(value if isinstance(value, list | tuple) else []):
            if is_dataclass(entry):
                yield from settings(entry, f"{name}[{index}].", of_field)


def field_names(config_class: type[Any]) -> list[str]:
    """Dotted names of all fields, groups excepted."""
    return [setting.name for setting in settings(config_class())]


def type_of_field(name: str, config_class: type[Any]) -> Any:
    """Type of the field, or group of fields, with a dotted `name`; None if there is none."""
    kind: Any = config_class
    for part in name.split("."):
        kind = field_types(kind).get(part) if is_dataclass(kind) else None
    return kind


def did_you_mean(found: str, names: Sequence[str], cutoff: float = 0.6) -> str:
    """The end of a message: the most similar of `names`; empty if none is near."""
    matches = get_close_matches(found, names, n=1, cutoff=cutoff)
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


def known_name(found: str, names: Sequence[str]) -> str:
    """What a message expects in place of an unknown name, which may begin with dashes; with the nearest name."""
    name = _nearest(found.lstrip("-").replace("-", "_"), names)
    dashes = "--" if found.startswith("--") else ""
    return "one that --help_all lists" + (f" (did you mean {dashes}{name}?)" if name else "")


def _nearest(found: str, names: Sequence[str]) -> str | None:
    """The most likely of `names` for an unknown one; None if none is near.

    The last part counts most: `training.learning_rate` is `training.lr`, `server.learning_rate` is `server.lr`.
    """
    group, _, last = found.rpartition(".")
    alias = ALIASES.get(last, last)
    for name in (f"{group}.{alias.rpartition('.')[2]}", alias):
        if name in names:
            return name
    by_last = {name.rpartition(".")[2]: name for name in reversed(names)}
    same = [name for name in names if name.rpartition(".")[2] == last]
    if close := get_close_matches(found, same, n=1, cutoff=0) or get_close_matches(found, names, n=1):
        return close[0]
    return next((by_last[name] for name in get_close_matches(last, list(by_last), n=1)), None)
