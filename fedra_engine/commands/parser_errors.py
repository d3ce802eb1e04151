"""The argument parsers' complaints as one line: the field, what was found, what was expected."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import is_dataclass
from difflib import get_close_matches
from itertools import pairwise
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, NoReturn, Union, get_args, get_origin, get_type_hints

from fedra_engine.config.options import Allowed
from fedra_engine.runtime.errors import InputError, shown

_NAMES = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", NoneType: "null"}


class LineParser(argparse.ArgumentParser):
    """An argument parser, for launchers without an experiment, that complains as the others do."""

    def __init__(self, **options: Any) -> None:
        """Takes argparse's `options`."""
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        """Raise InputError."""
        text = " ".join(message.split())
        for pattern, words in (
            (r"argument (?:--)?(\S+): (found .*)", "{0}: {1}"),
            (
                r"argument (?:--)?(\S+): invalid choice: (.*) \(choose from (.*)\)",
                "{0}: found {1}, expected one of {2}",
            ),
            (r"argument (?:--)?(\S+): expected (.*)", "{0}: found no value, expected {1}"),
            (
                r"argument (?:--)?(\S+): not allowed with argument (.*)",
                "{0}: found it beside {1}, expected one of them",
            ),
            (r"the following arguments are required: (.*)", "{0}: found nothing, expected a value"),
            (r"unrecognized arguments: (.*)", "{0}: found an unknown option, expected one that --help lists"),
        ):
            if match := re.fullmatch(pattern, text):
                raise InputError(words.format(*match.groups()))
        raise InputError(f"{self.prog}: {text}; see --help")


def typed(kind: type[int] | type[float], allowed: Allowed) -> Callable[[str], Any]:
    """The type of an option of `LineParser`: a number, of those that are allowed."""

    def read(text: str) -> Any:
        try:
            return parse_number(text, kind, allowed)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return read


def parse_number(text: str, kind: type[int] | type[float], allowed: Allowed) -> Any:
    """The number that `text` is.

    Raises:
        ValueError: it is none, or not allowed; says what was found and what was expected.
    """
    # Numbers of thousands of digits take long to read. Python also takes `1_000` and digits of other scripts.
    if len(text) < 30 and text.isascii() and "_" not in text:
        with suppress(ValueError):
            value = kind(text)
            if allowed.contains(value):
                return value
    raise ValueError(f"found {shown(text)}, expected {allowed.description}")


def path(text: str) -> Path:
    """The type of an option of `LineParser`: what can be a path, with `~` in front for a user's home."""
    if not text or "\0" in text:
        raise argparse.ArgumentTypeError(f"found {text!r}, expected a path")
    return Path(os.path.expanduser(text))


def existing_file(text: str) -> Path:
    """The type of an option of `LineParser`; a pipe is no file."""
    file = path(text)
    if not file.is_file():
        raise argparse.ArgumentTypeError(f"found no file {file}, expected one")
    return file


def existing_folder(text: str) -> Path:
    """The type of an option of `LineParser`."""
    folder = path(text)
    if not folder.is_dir():
        raise argparse.ArgumentTypeError(f"found no folder {folder}, expected one")
    return folder


_TYPES: dict[type[Any], dict[str, Any]] = {}
"""Of the classes seen so far: to find them out takes most of the time of checking a configuration."""


def field_types(config_class: type[Any]) -> Mapping[str, Any]:
    """Type of every field of a dataclass."""
    if config_class not in _TYPES:
        _TYPES[config_class] = get_type_hints(config_class)
    return _TYPES[config_class]


def is_optional(kind: Any) -> bool:
    """Whether null is a value of the type."""
    return NoneType in get_args(kind)


def union_members(kind: Any) -> tuple[Any, ...]:
    """The types of a union, or the one type."""
    return get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)


def describe_type(kind: Any) -> str:
    """A type in words: `a whole number or null`."""
    origin, inner = get_origin(kind), get_args(kind)
    if origin is Literal:
        return f"one of {', '.join(map(str, inner))}" if len(inner) > 1 else str(inner[0])
    if origin in (Union, UnionType):
        return " or ".join(map(describe_type, inner))
    if origin is list:
        return f"a list ({describe_type(inner[0])} each)"
    if origin is tuple:
        return f"a list of {len(inner)} ({describe_type(inner[0])} each)"
    if is_dataclass(kind):
        assert isinstance(kind, type)
        return f"fields {', '.join(field_types(kind))}"
    return _NAMES[kind]


def describe_parser_error(
    message: str, config_class: type[Any], arguments: Sequence[str], options: Sequence[str]
) -> str:
    """Put jsonargparse's several lines into one.

    Args:
        message: of the parser's exception.
        config_class: what is parsed.
        arguments: what the parser was given, to name the configuration file.
        options: those that the parser knows.
    """
    text = " ".join(message.split())
    if ": Unable to load config" in text:
        # The reason stands behind.
        text = "Parser key " + text.rpartition(" - Parser key ")[2]
    if match := re.match(r"unrecognized arguments: (\S+)", text):
        found = match[1].partition("=")[0]
        return f"{found}: found an unknown option, expected {known_name(found, options)}"
    if match := re.match(r"(?:Group '(.*?)' does not accept option|Option) '(.*?)'", text):
        found, names = ".".join(part for part in match.groups() if part), list(field_names(config_class))
        return f"{found}: found an unknown field{_file(arguments)}, expected {known_name(found, names)}"
    if match := re.match(r"Parser key \"(.*?)\": Problem with given class_path .*Option '(.*?)' is not accepted", text):
        kind = type_of_field(match[1].split("."), config_class)
        return f"{match[1]}: found an unknown field {match[2]}{_file(arguments)}, expected {describe_type(kind)}"
    if match := re.match(r'Parser key "(.*?)": .*(?:Got|Given) value: ?(.*)', text):
        if nested := re.search(r"NestedArg\(key='(.*?)'", text):
            found = f"--{match[1]}.{nested[1]}"
            return f"{found}: found an unknown option, expected {known_name(found, options)}"
        kind = type_of_field(match[1].split("."), config_class)
        if kind is not None and not is_dataclass(kind):
            found = match[2].partition(" Subclass types expect")[0]
            return f"{match[1]}: found {found or 'nothing'}, expected {describe_type(kind)}"
    if match := re.match(r"argument --(\S+): expected one argument", text):
        return f"{match[1]}: found no value, expected one"
    # Rare enough to stay in the parser's words.
    return f"{text}{_file(arguments)}; expected options and values as --help lists them"


def known_name(found: str, names: Sequence[str]) -> str:
    """What to expect in place of an unknown name, with the most similar of those that there are."""
    matches = get_close_matches(found, names, n=1)
    hint = f" (did you mean {matches[0]}?)" if matches else ""
    return f"one that --help lists{hint}"


def field_names(config_class: type[Any], prefix: str = "") -> Iterator[str]:
    """Dotted names of all fields that are no groups of others."""
    for name, kind in field_types(config_class).items():
        if is_dataclass(kind):
            assert isinstance(kind, type)
            yield from field_names(kind, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def _file(arguments: Sequence[str]) -> str:
    """The configuration files among the arguments, as an addition to a message."""
    files = [after for option, after in pairwise(arguments) if option == "--config"]
    files += [argument.removeprefix("--config=") for argument in arguments if argument.startswith("--config=")]
    return f" in {', '.join(files)}" if files else ""


def type_of_field(path: Sequence[str], config_class: type[Any]) -> Any:
    """Type of the field at a dotted `path`; None if there is none."""
    kind: Any = config_class
    for name in path:
        if not is_dataclass(kind):
            return None
        assert isinstance(kind, type)
        kind = field_types(kind).get(name)
    return kind


def entry_types(kind: Any) -> set[Any]:
    """Of what types a value, or an entry of it, can be; literals stand for themselves."""
    found = set[Any]()
    for option in union_members(kind):
        if get_origin(option) in (list, tuple, Literal):
            found |= set(get_args(option))
        else:
            found.add(option)
    return found
