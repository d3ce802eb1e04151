"""What all launchers share: options made from a dataclass, and bad input as one line and exit code 2.

Nothing here imports torch, so that `--help` and a mistyped option answer at once.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

import yaml
from jsonargparse import ArgumentParser, set_dumper, set_loader

from fedra_engine.commands.parser_errors import (
    describe_parser_error,
    describe_type,
    entry_types,
    field_types,
    is_optional,
    parse_number,
    type_of_field,
)
from fedra_engine.config import ExperimentConfig
from fedra_engine.config.options import PATH, Allowed, Need
from fedra_engine.config.validation import describe_option
from fedra_engine.config.yaml_values import dump_yaml, load_yaml, load_yaml_file
from fedra_engine.runtime.errors import InputError, shown

Config = TypeVar("Config")
_MODE = "strict_yaml"
set_loader(_MODE, load_yaml, (yaml.YAMLError,))
set_dumper(_MODE, dump_yaml)


@dataclass(frozen=True)
class LauncherOption:
    """An option that a launcher has beside the fields of the experiment.

    Attributes:
        name: without dashes.
        metavar: what its value is called in the help.
        help: a sentence without its full stop.
        default: its value, as text, if it is not given; None if it has none.
        choices: all values it may have; any if empty.
    """

    name: str
    metavar: str = "VALUE"
    help: str = ""
    default: str | None = None
    choices: tuple[str, ...] = ()


def quiet_libraries() -> None:
    """Keep what Hugging Face libraries, imported later, say of their own accord out of the output.

    Errors still show, and so do the main process's progress bars in a terminal.
    """
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if not sys.stderr.isatty() or os.environ.get("RANK", "0") != "0":
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")


def build_parser(config_class: type[Any], description: str) -> ArgumentParser:
    """Options `--config`, `--print_config` and one for every field of `config_class`, dots between levels."""
    parser = ArgumentParser(description=description, exit_on_error=False, allow_abbrev=False, parser_mode=_MODE)
    parser.add_argument("--config", action="config", help="YAML file with values for the fields below.")
    parser.add_class_arguments(config_class)
    texts = dict(_help(config_class))
    for action in parser._actions:
        if text := texts.get(action.dest):
            action.help = f"{(action.help or '').removesuffix('.')} ({text})"
    return parser


def parse_config(parser: ArgumentParser, config_class: type[Config], arguments: Sequence[str]) -> Config:
    """The `config_class` that `arguments` describe to its parser.

    Raises:
        InputError: a file that cannot be read, an unknown option or field, or a value of another type than the field's.
    """
    _check_given(config_class, arguments)
    try:
        values = parser.parse_args(list(arguments))
    except (argparse.ArgumentError, RecursionError, ValueError) as error:
        # argparse has no public list of them.
        options = [option for action in parser._actions for option in action.option_strings]
        raise InputError(describe_parser_error(str(error), config_class, arguments, options)) from error
    names = field_types(config_class)
    if others := [name for name in vars(values) if name not in (*names, "config")]:
        raise InputError(f"{others[0]}: found it in a file, expected it as an option, --{others[0]}")
    instances = parser.instantiate(values)
    config: Config = config_class(**{name: instances[name] for name in names})
    _expand_homes(config)
    return config


def read_config(file: Path, *options: str) -> ExperimentConfig:
    """The experiment that a file describes, but for what `options` say.

    Raises:
        InputError: the file cannot be read, or has something in it that is no experiment.
    """
    return parse_config(build_parser(ExperimentConfig, ""), ExperimentConfig, ["--config", str(file), *options])


def split_options(
    arguments: Sequence[str], options: Collection[LauncherOption]
) -> tuple[argparse.Namespace, list[str]]:
    """The values of a launcher's own `options`, as text, and all other arguments.

    Raises:
        InputError: one of the options has no value, or none of its choices.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    expected = {f"--{option.name}": " or ".join(option.choices) or "one" for option in options}
    for option in options:
        parser.add_argument(f"--{option.name}", default=option.default)
    try:
        values, others = parser.parse_known_args(arguments)
    except argparse.ArgumentError as error:
        name = str(error.argument_name)
        raise InputError(f"{name.removeprefix('--')}: found no value, expected {expected[name]}") from error
    for option in options:
        value = getattr(values, option.name)
        if option.choices and value not in (*option.choices, option.default):
            raise InputError(f"{option.name}: found {value!r}, expected {' or '.join(option.choices)}")
    return values, others


def add_help(parser: ArgumentParser, options: Iterable[LauncherOption]) -> None:
    """List in the parser's help what `split_options` takes from the arguments before it sees them."""
    for option in options:
        default = "" if option.default is None else f" (default: {option.default})"
        text = f"{option.help}{default}."
        parser.add_argument(f"--{option.name}", metavar=option.metavar, default=argparse.SUPPRESS, help=text)


OVERSUBSCRIBE = LauncherOption(
    "oversubscribe", "true|false", "Whether processes may share cores", "false", ("true", "false")
)


def check_not_given(arguments: Iterable[str], fields: Mapping[str, str]) -> None:
    """Raises InputError when one of the `fields` that a launcher sets itself is given; each with the option for it."""
    given = {argument.partition("=")[0].removeprefix("--") for argument in arguments if argument.startswith("--")}
    for field, option in fields.items():
        if field in given:
            raise InputError(f"{field}: found it as an option of its own, expected {option} to set it")


def parse_option(option: str, text: str, kind: type[int] | type[float], allowed: Allowed) -> Any:
    """The number `text` of an `option` that `split_options` found.

    Raises:
        InputError: it is none, or not allowed.
    """
    try:
        return parse_number(text, kind, allowed)
    except ValueError as error:
        raise InputError(f"{option}: {error}") from error


def check_different(option: str, entries: Sequence[str | int]) -> None:
    """Raises InputError when an `option` has one of its `entries` twice."""
    entry, times = Counter(entries).most_common(1)[0]
    if times > 1:
        raise InputError(f"{option}: found {entry} more than once, expected every one once")


def _check_given(config_class: type[Any], arguments: Sequence[str]) -> None:
    """Check what the parser would take for something else, or read without end: files, and texts in place of numbers.

    A file is one for `--config`, or for an option with the name of a group of fields.
    """
    given = [argument.partition("=")[::2] for argument in arguments if argument.startswith("--") and "=" in argument]
    given += [(option, value) for option, value in pairwise(arguments) if option.startswith("--") and "=" not in option]
    for option, text in given:
        # A + appends to a list.
        name = option.removeprefix("--").removesuffix("+")
        kind = config_class if name == "config" else type_of_field(name.split("."), config_class)
        if is_dataclass(kind) and (name == "config" or not text.startswith("{")):
            values = load_yaml_file(name, text)
            if "config" in values:
                raise InputError(f"config: found it in {text!r}, expected it as an option, --config")
            _check_raw("" if name == "config" else name, kind, values)
        elif kind is not None:
            try:
                _check_raw(name, kind, load_yaml(text) if text.strip() else text)
            except yaml.YAMLError:
                _check_raw(name, kind, text)


def _check_raw(name: str, kind: Any, value: Any) -> None:
    """Refuse null, fields of a group that are none, and texts for numbers, of which Python reads more than there are.

    (`int` takes `1_000`, digits of other scripts and, asked for the base, `0x10`.)
    """
    if is_dataclass(kind):
        assert isinstance(kind, type)
        kinds = field_types(kind)
        if not isinstance(value, dict):
            raise InputError(f"{name}: found {shown(value)}, expected fields of it: {', '.join(kinds)}")
        for key, entry in value.items():
            if key in kinds:
                _check_raw(f"{name}.{key}".removeprefix("."), kinds[key], entry)
        return
    if value is None and not is_optional(kind):
        raise InputError(f"{name}: found null, expected {describe_type(kind)}")
    inner = entry_types(kind)
    group = next(filter(is_dataclass, inner), None)
    for index, entry in enumerate(value if isinstance(value, list) else [value]):
        if group is not None and isinstance(entry, dict):
            _check_raw(f"{name}[{index}]", group, entry)
        elif isinstance(entry, str) and not ({str, bool} & inner or entry in inner):
            raise InputError(f"{name}: found {shown(entry)}, expected {describe_type(kind)}")


def _help(config_class: type[Any], prefix: str = "", needs: tuple[Need, ...] = ()) -> Iterator[tuple[str, str]]:
    """What each field takes, by its dotted name."""
    kinds = field_types(config_class)
    for item in fields(config_class):
        name, kind, of_field = f"{prefix}{item.name}", kinds[item.name], (*needs, *item.metadata.get("needs", ()))
        if is_dataclass(kind):
            assert isinstance(kind, type)
            yield from _help(kind, f"{name}.", of_field)
        else:
            yield name, describe_option(item, of_field)


def _expand_homes(config: Any) -> None:
    """Replace `~` in front of every path by the home it stands for."""
    for item in fields(config):
        value = getattr(config, item.name)
        if is_dataclass(value):
            _expand_homes(value)
        elif isinstance(value, str) and item.metadata.get("allowed") is PATH:
            object.__setattr__(config, item.name, os.path.expanduser(value))
