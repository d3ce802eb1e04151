"""What the values of a configuration must be, as far as the configuration alone shows."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from functools import reduce
from types import NoneType
from typing import Any, Literal, get_args, get_origin

from fedra_engine.config import ExperimentConfig
from fedra_engine.config.fields import describe_type, did_you_mean, field_types, known_name, union_members
from fedra_engine.config.options import CHOICES, LONGEST_LIST, SOMETHING, Allowed, Choice, Need
from fedra_engine.runtime.errors import InputError, shown


@dataclass(frozen=True)
class _Value:
    """A field that is no group of others, and where it is; names in its needs are dotted from the root."""

    name: str
    value: Any
    kind: Any
    field: Field[Any]
    owner: Any
    needs: tuple[Need, ...]

    @property
    def allowed(self) -> Allowed | Choice | None:
        """What it, or each entry, may be; None where its type says it."""
        allowed: Allowed | Choice | None = self.field.metadata.get("allowed")
        return allowed

    @property
    def default(self) -> Any:
        """The field's value if none is given."""
        return self.field.default if self.field.default_factory is MISSING else self.field.default_factory()


def validate(config: ExperimentConfig) -> None:
    """Check what needs nothing but the configuration.

    Raises:
        InputError: the first value that cannot be used, or that differs from its default and does nothing.
    """
    validate_setting(config)
    config.method.check_server(config.server)


def validate_setting(config: ExperimentConfig) -> None:
    """As `validate`, but for what the method alone refuses, which need not keep others from being compared."""
    check_values(config)
    for message in without_effect(config).values():
        raise InputError(message)
    for part in (config, config.data, config.lora, config.clients):
        part.check(config)


def validate_together(configs: Sequence[ExperimentConfig]) -> list[ExperimentConfig]:
    """Check variants of one experiment: an option may do nothing in some of them, which then get its default.

    Raises:
        InputError: a value that cannot be used in one of them, or that does nothing in all that have it.
    """
    for config in configs:
        check_values(config)
    idle = [without_effect(config) for config in configs]
    used = {
        item.name
        for config, names in zip(configs, idle, strict=True)
        for item in _given(config)
        if item.name not in names
    }
    for name, message in (pair for names in idle for pair in names.items()):
        if name not in used:
            raise InputError(message)
    settled = copy.deepcopy(list(configs))
    for config in settled:
        # Without one option, another may do nothing any more.
        while names := without_effect(config):
            for item in _values(config):
                if item.name in names:
                    setattr(item.owner, item.field.name, item.default)
        validate_setting(config)
    return settled


def check_values(config: Any) -> None:
    """Check each field of a dataclass, and of those in it, by its type and by what it declares.

    Raises:
        InputError: the first value that is not allowed.
    """
    for item in _values(config):
        _check_value(item)


def without_effect(config: Any) -> dict[str, str]:
    """Fields that differ from their default but do nothing beside the other values, each with a message."""
    found = {}
    for item in _given(config):
        for need in item.needs:
            others = {name: reduce(getattr, name.split("."), config) for name in need}
            if not any(_meets(name, value, need[name]) for name, value in others.items()):
                beside = " and ".join(f"{name} {_word(value)}" for name, value in others.items())
                found[item.name] = (
                    f"{item.name}: found {shown(item.value)} with {beside}, where it does nothing; expected "
                    f"{_wanted(need)}, or {item.name} {_word(item.default)}"
                )
                break
    return found


def describe_option(item: Field[Any], kind: Any, needs: Sequence[Need]) -> str:
    """What a field takes, and what it needs to do anything, for the help."""
    allowed: Allowed | Choice | None = item.metadata.get("allowed")
    taken = describe_type(kind, None if allowed is None else allowed.description)
    return "; ".join([taken, *(f"only with {_wanted(need)}" for need in needs)])


def needs_of(item: Field[Any], prefix: str) -> tuple[Need, ...]:
    """What a field of the group `prefix` (with a dot behind) needs, with names dotted from the root."""
    needs: Sequence[Need] = item.metadata.get("needs", ())
    return tuple({name if "." in name else prefix + name: need[name] for name in need} for need in needs)


def _wanted(need: Need) -> str:
    return " or ".join(f"{name} {' or '.join(map(_word, need[name]))}" for name in need)


def _values(config: Any, prefix: str = "", needs: tuple[Need, ...] = ()) -> Iterator[_Value]:
    kinds = field_types(type(config))
    # Python lets one set any name; a mistyped one would do nothing.
    for name in vars(config).keys() - kinds.keys():
        known = known_name(f"{prefix}{name}", [f"{prefix}{field}" for field in kinds])
        raise InputError(f"{prefix}{name}: found no field of that name, expected {known}")
    for item in fields(config):
        name, value = f"{prefix}{item.name}", getattr(config, item.name)
        of_field = (*needs, *needs_of(item, prefix))
        if is_dataclass(value):
            yield from _values(value, f"{name}.", of_field)
            continue
        yield _Value(name, value, kinds[item.name], item, config, of_field)
        for index, entry in enumerate(value if isinstance(value, list | tuple) else []):
            if is_dataclass(entry):
                yield from _values(entry, f"{name}[{index}].", of_field)


def _given(config: Any) -> Iterator[_Value]:
    """Those with another value than their default."""
    return (item for item in _values(config) if _plain(item.value) != _plain(item.default))


def _check_value(item: _Value) -> None:
    value, kind, allowed = _plain(item.value), item.kind, item.allowed
    members = union_members(kind)
    words = [word for member in members if get_origin(member) is Literal for word in get_args(member)]
    if (value is None and NoneType in members) or (isinstance(value, str) and value in words):
        return
    entries = [value]
    for member in members if isinstance(value, list) else ():
        if get_origin(member) is list or (get_origin(member) is tuple and len(get_args(member)) == len(value)):
            entries, kind = value, get_args(member)[0]
    if len(entries) > LONGEST_LIST:
        raise InputError(f"{item.name}: found a list of {len(entries):,}, expected at most {LONGEST_LIST:,}")
    types = set(union_members(kind))
    for entry in entries:
        fits = type(entry) in types if allowed is None else types & {int, float, str} and allowed.contains(entry)
        if not fits:
            expected = describe_type(kind, None if allowed is None else allowed.description)
            near = did_you_mean(str(entry), allowed.names) if isinstance(allowed, Choice) else ""
            raise InputError(f"{item.name}: found {shown(entry)}, expected {expected}{near}")


def _meets(name: str, value: Any, wanted: Sequence[Any]) -> bool:
    """Whether a field's value is a wanted one. Nobody knows which options a source from outside the package reads."""
    if name != "method.name" and name in CHOICES and value in CHOICES[name].registered:
        return True
    return value in wanted or (SOMETHING in wanted and value is not None and value != [])


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _word(value: Any) -> str:
    """A value of a field as one writes it on the command line."""
    if value is SOMETHING:
        return "given"
    return value if isinstance(value, str) else shown(value)
