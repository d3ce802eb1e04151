"""The exceptions that launchers turn into a single line, and messages in which no name steers a terminal."""

from __future__ import annotations

import logging
import textwrap
import unicodedata
from collections.abc import Sequence
from typing import Any

_LONGEST = 300
"""Characters of another library's message that are kept."""
_LONGEST_MESSAGE = 2000
_LONGEST_VALUE = 200


class InputError(ValueError):
    """Something the user gave (a field, a file, a folder) cannot be used; exit code 2.

    The message is one line: the field or file, what was found, what was expected. It is made one whatever the user's
    text in it: control characters are escaped, and the middle of what is very long is left out.
    """

    def __init__(self, message: str) -> None:
        line = printable(" ".join(message.split()))
        if len(line) > _LONGEST_MESSAGE:
            line = f"{line[: _LONGEST_MESSAGE // 2]} … {line[-_LONGEST_MESSAGE // 2 :]}"
        super().__init__(line)


class ProcessLostError(RuntimeError):
    """Another process of the job died or hangs, or the job was ended from outside; exit code 1."""


def one_line(error: Exception) -> str:
    """What another library says is wrong: the first paragraph of its message, or the exception's name if it has none.

    A first line alone may only announce what the next ones say; later paragraphs give advice.
    """
    message = str(error).strip() or type(error).__name__
    return textwrap.shorten(message.partition("\n\n")[0], _LONGEST, placeholder=" …")


def printable(text: str, keep: str = "") -> str:
    """`text` with control characters and undecodable bytes as escapes such as `\\x1b`, but for those in `keep`.

    Names of files and labels can hold them; on a terminal they would move the cursor or turn the reading direction.
    """
    if text.isprintable():
        return text
    return "".join(
        character
        if character.isprintable() or character in keep or _is_part_of_writing(character)
        else character.encode("unicode_escape").decode("ascii")
        for character in text
    )


class PrintableFormatter(logging.Formatter):
    """Log lines in which no name steers a terminal."""

    def format(self, record: logging.LogRecord) -> str:
        """As the class above has it, but `printable`."""
        return printable(super().format(record), keep="\n")


def _is_part_of_writing(character: str) -> bool:
    """Whether it is a space, or joins or separates letters: what Python calls unprintable, and languages need."""
    return unicodedata.category(character) == "Zs" or character in "\u200c\u200d"


def first_few(names: Sequence[str], most: int) -> str:
    """The first of `names`, at `most` so many, and how many others there are."""
    others = len(names) - most
    more = f" and {others:,} other{'s' if others > 1 else ''}" if others > 0 else ""
    return ", ".join(names[:most]) + more


def count_of(number: int, thing: str) -> str:
    """`1 round`, `2 rounds`."""
    return f"{number:,} {thing}{'' if number == 1 else 's'}"


def shown(value: Any) -> str:
    """A value in a message: as YAML has it, texts in quotes, and shortened."""
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    if isinstance(value, int) and abs(value) >= 10**20:
        return f"a whole number of {value.bit_length() * 0.30103:.0f} digits"
    text = repr(value)
    return text if len(text) <= _LONGEST_VALUE else f"{text[:_LONGEST_VALUE]} …"
