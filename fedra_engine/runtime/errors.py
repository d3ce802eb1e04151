"""The exceptions that launchers turn into a single line, and helpers for messages."""

from __future__ import annotations

import logging
import textwrap
import unicodedata
from collections.abc import Sequence
from typing import Any

_LONGEST = 300
"""Maximum characters of another library's message."""
_LONGEST_MESSAGE = 2000
_LONGEST_VALUE = 200


class InputError(ValueError):
    """Something the user gave (a field, a file, a folder) cannot be used; exit code 2.

    The message is one line: the field or file, what was found, what was expected. Line breaks and control characters in
    it are replaced, and a very long one loses its middle.
    """

    def __init__(self, message: str) -> None:
        line = printable(" ".join(message.split()))
        if len(line) > _LONGEST_MESSAGE:
            line = f"{line[: _LONGEST_MESSAGE // 2]} … {line[-_LONGEST_MESSAGE // 2 :]}"
        super().__init__(line)


class ProcessLostError(RuntimeError):
    """Another process of the job died or hangs, or the job was ended from outside; exit code 1."""


def one_line(error: Exception) -> str:
    """The first paragraph of another library's message, shortened, or the exception's name if there is no message.

    The first line alone may only announce the next ones; later paragraphs give advice.
    """
    message = str(error).strip() or type(error).__name__
    return textwrap.shorten(message.partition("\n\n")[0], _LONGEST, placeholder=" …")


def printable(text: str, keep: str = "") -> str:
    """Escape control characters and undecodable bytes, as in `\\x1b`, except those in `keep`.

    File names and labels can hold them; on a terminal they would move the cursor or reverse the reading direction.
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
    """Log lines without control characters."""

    def format(self, record: logging.LogRecord) -> str:
        """Format and escape a record."""
        return printable(super().format(record), keep="\n")


def _is_part_of_writing(character: str) -> bool:
    """Whether it is a space or a (non-)joiner: unprintable to Python, but part of written languages."""
    return unicodedata.category(character) == "Zs" or character in "\u200c\u200d"


def first_few(names: Sequence[str], most: int) -> str:
    """At `most` so many of `names`, and the number of others."""
    others = len(names) - most
    more = f" and {others:,} other{'s' if others > 1 else ''}" if others > 0 else ""
    return ", ".join(names[:most]) + more


def count_of(number: int, thing: str) -> str:
    """`1 round`, `2 rounds`."""
    return f"{number:,} {thing}{'' if number == 1 else 's'}"


def span(numbers: Sequence[int]) -> str:
    """The least and the greatest of `numbers`, as in `3 to 12`; one number if they are the same."""
    least, most = min(numbers), max(numbers)
    return f"{most:,}" if least == most else f"{least:,} to {most:,}"


def span_of(numbers: Sequence[int], thing: str) -> str:
    """The `span` with what is counted, as in `1 block`, `3 to 12 blocks`."""
    return f"{span(numbers)} {thing}{'' if max(numbers) == 1 else 's'}"


def shown(value: Any) -> str:
    """A value for a message: as in YAML, with texts in quotes, and shortened."""
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    if isinstance(value, int) and abs(value) >= 10**20:
        return f"a whole number of {value.bit_length() * 0.30103:.0f} digits"
    text = repr(value)
    return text if len(text) <= _LONGEST_VALUE else f"{text[:_LONGEST_VALUE]} …"
