"""What the values of a configuration must be, as far as the configuration alone shows."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from functools import reduce
from typing import Any, Literal, get_args, get_origin

from fedra_engine.commands.parser_errors import describe_type, field_types, union_members
from fedra_engine.config import ClientsConfig, ExperimentConfig
from fedra_engine.config.options import LONGEST_LIST, SOMETHING, Allowed, Need
from fedra_engine.runtime.errors import InputError, shown


@dataclass(frozen=True)
class _Value:
    """A field that is no group of others, and where it is."""

    name: str
    value: Any
    kind: Any
    field: Field[Any]
    owner: Any
    needs: tuple[Need, ...]

    @property
    def allowed(self) -> Allowed | None:
        """What it, or each entry, may be; None where its type says it."""
        allowed: Allowed | None = self.field.metadata.get("allowed")
        return allowed

    @property
    def words(self) -> list[str]:
        """Texts that its type names."""
        return [word for kind in union_members(self.kind) if get_origin(kind) is Literal for word in get_args(kind)]

    @property
    def default(self) -> Any:
        """Its value if none is given."""
        return self.field.default if self.field.default_factory is MISSING else self.field.default_factory()


def validate(config: ExperimentConfig) -> None:
    """Check what needs nothing but the configuration.

    Raises:
        InputError: the first value that cannot be used, or that differs from its default and does nothing.
    """
    validate_setting(config)
    _check_method(config)


def validate_setting(config: ExperimentConfig) -> None:
    """As `validate`, but for what the method alone refuses, which need not keep others from being compared."""
    check_values(config)
    for message in without_effect(config).values():
        raise InputError(message)
    if config.method.allocation == "reference" and config.seed >= 2**32:
        raise InputError(
            f"seed: found {config.seed} with method.allocation reference, whose legacy NumPy stream takes 32 bits, "
            f"expected a whole number from 0 to {2**32 - 1}"
        )
    _check_data(config)
    _check_target_modules(config.lora.target_modules)
    _check_devices(config.clients)
    if config.trace and config.lora.dropout > 0:
        raise InputError(f"trace: found true with lora.dropout {config.lora.dropout}, expected lora.dropout 0")
    if config.trace and config.data.augmentation != "none":
        raise InputError(f"trace: found true with data.augmentation {config.data.augmentation}, expected none")
    if not config.clients.capacities:
        raise InputError("clients.capacities: found an empty list, expected one entry, or one for each domain")


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
    """Fields with another value than their default that do nothing beside the others' values, and why, for people."""
    found = {}
    for item in _given(config):
        for need in item.needs:
            others = {name: reduce(getattr, name.split("."), config) for name in need}
            if not any(_meets(value, need[name]) for name, value in others.items()):
                beside = " and ".join(f"{name} {_word(value)}" for name, value in others.items())
                found[item.name] = (
                    f"{item.name}: found {shown(item.value)} with {beside}, where it does nothing; expected "
                    f"{_wanted(need)}, or {item.name} {_word(item.default)}"
                )
                break
    return found


def describe_option(item: Field[Any], needs: Sequence[Need]) -> str:
    """What a field takes, and what it needs to do anything, for the help."""
    allowed: Allowed | None = item.metadata.get("allowed")
    texts = [] if allowed is None else [allowed.description]
    return "; ".join([*texts, *(f"only with {_wanted(need)}" for need in needs)])


def _wanted(need: Need) -> str:
    return " or ".join(f"{name} {' or '.join(map(_word, need[name]))}" for name in need)


def _values(config: Any, prefix: str = "", needs: tuple[Need, ...] = ()) -> Iterator[_Value]:
    kinds = field_types(type(config))
    for item in fields(config):
        name, value = f"{prefix}{item.name}", getattr(config, item.name)
        of_field = (*needs, *item.metadata.get("needs", ()))
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
    options = union_members(item.kind)
    lists = [option for option in options if get_origin(option) in (list, tuple)]
    value = item.value
    if (value is None and type(None) in options) or (isinstance(value, str) and value in item.words):
        return
    if lists and isinstance(value, list | tuple):
        count = len(get_args(lists[0])) if get_origin(lists[0]) is tuple else None
        if len(value) > LONGEST_LIST or (count is not None and len(value) != count):
            most = f"{count}" if count is not None else f"at most {LONGEST_LIST:,}"
            raise InputError(f"{item.name}: found a list of {len(value):,}, expected {most}")
        entry_kind = get_args(lists[0])[0]
        for entry in value:
            fits = isinstance(entry, entry_kind) if item.allowed is None else item.allowed.contains(entry)
            if not fits:
                raise InputError(f"{item.name}: found {shown(entry)}, expected {_describe(item, entry_kind)}")
        return
    if bool in options:
        fits = isinstance(value, bool)
    else:
        fits = item.allowed is not None and {int, float, str} & set(options) != set() and item.allowed.contains(value)
    if not fits:
        raise InputError(f"{item.name}: found {shown(value)}, expected {_describe(item, item.kind)}")


def _describe(item: _Value, kind: Any) -> str:
    if item.allowed is None:
        return describe_type(kind)
    return " or ".join([item.allowed.description, *item.words])


def _meets(value: Any, wanted: Sequence[Any]) -> bool:
    return value in wanted or (SOMETHING in wanted and value is not None and value != [])


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _word(value: Any) -> str:
    """A value of a field as one writes it on the command line."""
    if value is SOMETHING:
        return "given"
    return value if isinstance(value, str) else shown(value)


def _check_method(config: ExperimentConfig) -> None:
    server, name = config.server, config.method.name
    reasons: Mapping[str, str] = {
        "flora": "the method writes the rest of each mean into the model",
        "fedexlora": "the method writes the rest of each mean into the model",
        "flexlora": "factors from an SVD have another basis every round, so nothing lies between two of them",
    }
    if name in reasons and (server.optimizer != "fedavg" or server.rate != 1):
        raise InputError(
            f"server: found optimizer {server.optimizer} with lr {server.rate:g} and method.name {name}, expected "
            f"fedavg with lr 1 ({reasons[name]})"
        )


def _check_data(config: ExperimentConfig) -> None:
    data = config.data
    if data.source != "digits" and data.root is None:
        raise InputError(f"data.root: found none with data.source {data.source}, expected where its samples are")
    repeated = [domain for domain in data.domains if data.domains.count(domain) > 1]
    if repeated:
        raise InputError(f"data.domains: found {repeated[0]!r} more than once, expected every domain once")


def _check_devices(clients: ClientsConfig) -> None:
    timed = [device for device in clients.devices if (device.compute, device.upload, device.download) != (None,) * 3]
    for index, device in enumerate(clients.devices):
        if clients.capacities == "memory" and device.memory is None:
            raise InputError(
                f"clients.devices[{index}].memory: found null with clients.capacities memory, expected GiB"
            )
        if device.variation > 0 and device not in timed:
            raise InputError(
                f"clients.devices[{index}].variation: found {device.variation:g} of a device that takes no time, "
                "expected its compute, upload or download, or variation 0"
            )
    if not clients.devices and clients.capacities == "memory":
        raise InputError("clients.capacities: found memory with no clients.devices, expected devices and their memory")
    if clients.deadline is not None and not timed:
        raise InputError(
            f"clients.deadline: found {clients.deadline:g} with clients.devices that take no time, expected compute, "
            "upload or download of a device, or no deadline"
        )
    if clients.capacities == "memory" and clients.capacity_schedule == "drawn":
        raise InputError(
            "clients.capacity_schedule: found drawn with clients.capacities memory, expected fixed (a client keeps its "
            "device)"
        )


def _check_target_modules(target_modules: list[str] | str) -> None:
    if not target_modules:
        raise InputError("lora.target_modules: found nothing, expected name endings or a regular expression")
    if isinstance(target_modules, str):
        try:
            with warnings.catch_warnings():
                # Of what a later Python will read in another way.
                warnings.simplefilter("error")
                re.compile(target_modules)
        except (re.error, Warning, RecursionError, OverflowError) as error:
            raise InputError(
                f"lora.target_modules: found {target_modules!r} ({error}), expected a regular expression"
            ) from error
