"""The one exception that launchers turn into a single line and exit code 2."""


class InputError(ValueError):
    """Something the user gave (a field, a file, a folder) cannot be used.

    The message is one line: the field or file, what was found, what was expected.
    """
