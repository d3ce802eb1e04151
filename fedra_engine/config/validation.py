"""Check a configuration without data and model; whatever is wrong is an InputError that names the field."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import is_dataclass
from difflib import get_close_matches
from functools import reduce
from importlib.util import find_spec
from types import NoneType
from typing import Any, get_args, get_origin

from fedra_engine.config import ExperimentConfig
from fedra_engine.config.fields import Setting, describe_type, did_you_mean, literal_values, settings, union_members
from fedra_engine.config.options import CHOICES, LONGEST_LIST, SOMETHING, Choice, Need
from fedra_engine.runtime.errors import InputError, shown


def validate(config: ExperimentConfig) -> None:
    """Check everything that the configuration alone decides, also that no given option is without effect."""
    validate_setting(config)
    config.check_method()


def validate_setting(config: ExperimentConfig) -> None:
    """As `validate`, without the method's own check, which must not keep other methods from being compared."""
    check_values(config)
    for message in without_effect(config).values():
        raise InputError(message)
    for part in (config, config.data, config.lora, config.clients):
        part.check()


def check_trackers(names: Sequence[str]) -> None:
    """Raise InputError unless the trackers that `report_to` names are installed; imports none of them."""
    for name in names:
        if find_spec(name) is None:
            raise InputError(
                f"report_to: found {name}, which is not installed, expected one that is "
                f"(pip install {name}, or 'fedra-engine[trackers]' for all)"
            )


def check_paths(config: ExperimentConfig) -> None:
    """Raise InputError for data or a model that are given as a path at which there is nothing.

    What is not plainly a path may be a name on the hub.
    """
    for field, path in (("data.root", config.data.root), ("model.path", config.model.path)):
        if path is None or not path.startswith(("/", "./", "../")) or os.path.exists(path):
            continue
        parent, name = os.path.split(os.path.abspath(path))
        beside = list[str]()
        # The parent may be a file, or nobody's to read.
        with suppress(OSError):
            beside = os.listdir(parent)
        near = get_close_matches(name, beside, n=1)
        meant = f" (did you mean {os.path.join(parent, near[0])!r}?)" if near else ""
        raise InputError(f"{field}: found nothing at {path!r}, expected a folder or file{meant}")


def validate_together(configs: Sequence[ExperimentConfig]) -> list[ExperimentConfig]:
    """Check variants of one experiment. An option needs an effect in one of them, and is reset in the others."""
    for config in configs:
        check_values(config)
    idle = [without_effect(config) for config in configs]
    used = {
        setting.name
        for config, names in zip(configs, idle, strict=True)
        for setting in _given(config)
        if setting.name not in names
    }
    for name, message in (pair for names in idle for pair in names.items()):
        if name not in used:
            raise InputError(message)
    settled = copy.deepcopy(list(configs))
    for config in settled:
        # Resetting one option may leave another without effect.
        while names := without_effect(config):
            for setting in settings(config):
                if setting.name in names:
                    setattr(setting.owner, setting.field, setting.default)
        validate_setting(config)
    return settled


def without_effect(config: Any) -> dict[str, str]:
    """Messages by field, for fields that differ from their defaults but have no effect under the other values."""
    found = {}
    for setting in _given(config):
        name = setting.name
        for need in setting.needs:
            others = {other: reduce(getattr, other.split("."), config) for other in need}
            if not any(_meets(other, value, need[other]) for other, value in others.items()):
                beside = " and ".join(f"{other} {_word(value)}" for other, value in others.items())
                found[name] = (
                    f"{name}: found {shown(setting.value)} with {beside}, where it does nothing; expected "
                    f"{wanted(need)}, or {name} {_word(setting.default)}"
                )
                break
    return found


def wanted(need: Need) -> str:
    """A need in words."""
    return " or ".join(f"{name} {' or '.join(map(_word, need[name]))}" for name in need)


def check_values(config: Any) -> None:
    """Check every field, also those of groups, against its type and its `allowed` values."""
    for setting in settings(config):
        value, kind, allowed = _as_list(setting.value), setting.kind, setting.allowed
        members = union_members(kind)
        if (value is None and NoneType in members) or (isinstance(value, str) and value in literal_values(kind)):
            continue
        entries = [value]
        for member in members if isinstance(value, list) else ():
            if get_origin(member) is list or (get_origin(member) is tuple and len(get_args(member)) == len(value)):
                entries, kind = value, get_args(member)[0]
        if isinstance(value, dict) and get_origin(kind) is dict:
            entries, kind = list(value.values()), get_args(kind)[1]
        if len(entries) > LONGEST_LIST:
            raise InputError(f"{setting.name}: found a list of {len(entries):,}, expected at most {LONGEST_LIST:,}")
        types = set(union_members(kind))
        for entry in entries:
            fits = type(entry) in types if allowed is None else types & {int, float, str} and allowed.contains(entry)
            if not fits:
                near = ""
                if isinstance(allowed, Choice):
                    near = did_you_mean(str(entry), allowed.names) or " (--import MODULE adds names of your own)"
                if isinstance(entry, dict) and isinstance(kind, type) and is_dataclass(kind):
                    # Those of files have become objects before.
                    near = f" in a {kind.__name__}"
                expected = describe_type(kind, allowed) + near
                raise InputError(f"{setting.name}: found {shown(entry)}, expected {expected}")


def _given(config: Any) -> Iterator[Setting]:
    """Fields whose values differ from their defaults."""
    return (setting for setting in settings(config) if _as_list(setting.value) != _as_list(setting.default))


def _meets(name: str, value: Any, wanted: Sequence[Any]) -> bool:
    """Whether a field has a wanted value, or one registered from outside the package, whose needs are not known."""
    if name != "method.name" and name in CHOICES and value in CHOICES[name].registered:
        return True
    return value in wanted or (SOMETHING in wanted and value is not None and value != [])


def _as_list(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _word(value: Any) -> str:
    """A value of a need as it is typed on the command line."""
    if value is SOMETHING:
        return "given"
    return value if isinstance(value, str) else shown(value)
