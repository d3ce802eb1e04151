"""The exceptions that launchers turn into a single line."""

from __future__ import annotations

import textwrap

_LONGEST = 300
"""Characters of another library's message that are kept."""


class InputError(ValueError):
    """Something the user gave (a field, a file, a folder) cannot be used; exit code 2.

    The message is one line: the field or file, what was found, what was expected.
    """


class ProcessLostError(RuntimeError):
    """Another process of the job died or hangs, or the job was ended from outside; exit code 1."""


def one_line(error: Exception) -> str:
    """What another library says is wrong: the first paragraph of its message, or the exception's name if it has none.

    A first line alone may only announce what the next ones say; later paragraphs give advice.
    """
    message = str(error).strip() or type(error).__name__
    return textwrap.shorten(message.partition("\n\n")[0], _LONGEST, placeholder=" …")
