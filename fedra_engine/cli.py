"""What all launchers share: options made from a dataclass, and bad input as one line and exit code 2.

Nothing here imports torch, so that `--help` and a mistyped option answer at once.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Collection, Iterator, Sequence
from dataclasses import fields, is_dataclass
from typing import Any, TypeVar

from jsonargparse import ArgumentParser, Namespace

from fedra_engine.cli_errors import describe_parser_error, describe_type, field_types, is_optional
from fedra_engine.errors import InputError

Config = TypeVar("Config")


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


def _check_values(values: Namespace, config_class: type[Any], prefix: str = "") -> None:
    """What the parser lets through in files: null for any field, and anything for a group of fields."""
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


def differences(
    found: Any, expected: Any, irrelevant: Collection[str], prefix: str = ""
) -> Iterator[tuple[str, Any, Any]]:
    """Dotted names of the fields in which two configurations differ, with both values; but for irrelevant ones."""
    for field in fields(found):
        name, one, other = f"{prefix}{field.name}", getattr(found, field.name), getattr(expected, field.name)
        if name in irrelevant:
            continue
        if is_dataclass(one):
            yield from differences(one, other, irrelevant, f"{name}.")
        elif one != other:
            yield name, one, other
