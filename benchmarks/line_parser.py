"""The argument parser of the commands without an experiment: what is wrong is one line, as in the others."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from fedra_engine.config.options import Allowed
from fedra_engine.config.parsing import parse_option
from fedra_engine.runtime.errors import InputError


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
            return parse_option("", text, kind, allowed)
        except InputError as error:
            raise argparse.ArgumentTypeError(str(error).removeprefix(": ")) from error

    return read


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
