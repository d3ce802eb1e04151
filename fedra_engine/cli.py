"""What all launchers share: options made from a dataclass, and bad input as one line and exit code 2.

Nothing here imports torch, so that `--help` and a mistyped option answer at once.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar

from jsonargparse import ArgumentParser, Namespace

from fedra_engine.cli_errors import describe_parser_error, describe_type, field_types, is_optional
from fedra_engine.config import ExperimentConfig
from fedra_engine.errors import InputError

Config = TypeVar("Config")


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
    parser = ArgumentParser(description=description, exit_on_error=False, allow_abbrev=False)
    parser.add_argument("--config", action="config", help="YAML file with values for the fields below.")
    parser.add_class_arguments(config_class)
    return parser


def parse_config(parser: ArgumentParser, config_class: type[Config], arguments: Sequence[str]) -> Config:
    """The `config_class` that `arguments` describe to its parser.

    Raises:
        InputError: an unknown option or field, or a value of another type than the field's.
    """
    try:
        values = parser.parse_args(list(arguments))
    except (argparse.ArgumentError, UnicodeDecodeError) as error:
        # argparse has no public list of them.
        options = [option for action in parser._actions for option in action.option_strings]
        raise InputError(describe_parser_error(str(error), config_class, arguments, options)) from error
    _check_values(values, config_class)
    instances = parser.instantiate(values)
    config: Config = config_class(**{name: instances[name] for name in field_types(config_class)})
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


def parse_count(option: str, text: str, *, least: int, most: int = 10**9) -> int:
    """The value `text` of an `option`.

    Raises:
        InputError: it is no whole number from `least` to `most`.
    """
    digits = text.strip()
    # Python converts no text of thousands of digits.
    if not digits.isdecimal() or len(digits) > len(str(most)) or not least <= int(digits) <= most:
        raise InputError(f"{option}: found {_shortened(text)}, expected a whole number from {least} to {most}")
    return int(digits)


def check_different(option: str, entries: Sequence[str | int]) -> None:
    """Raises InputError when an `option` has one of its `entries` twice."""
    entry, times = Counter(entries).most_common(1)[0]
    if times > 1:
        raise InputError(f"{option}: found {entry} more than once, expected every one once")


def _shortened(text: str) -> str:
    return repr(text) if len(text) <= 60 else f"{text[:60]!r} …"


def _check_values(values: Namespace, config_class: type[Any], prefix: str = "") -> None:
    """Refuse what the parser lets through in files: null for any field, and anything for a group of fields."""
    for name, kind in field_types(config_class).items():
        value = values[name]
        if is_dataclass(kind):
            if not isinstance(value, Namespace):
                names = ", ".join(field.name for field in fields(kind))
                raise InputError(f"{prefix}{name}: found {value!r}, expected fields of it: {names}")
            assert isinstance(kind, type)
            _check_values(value, kind, f"{prefix}{name}.")
        elif value is None and not is_optional(kind):
            raise InputError(f"{prefix}{name}: found null, expected {describe_type(kind)}")
