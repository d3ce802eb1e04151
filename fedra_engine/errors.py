"""The exceptions that launchers turn into a single line."""


class InputError(ValueError):
    """Something the user gave (a field, a file, a folder) cannot be used; exit code 2.

    The message is one line: the field or file, what was found, what was expected.
    """


class ProcessLostError(RuntimeError):
    """Another process of the job died, hangs, or the job was ended from outside; exit code 1."""
