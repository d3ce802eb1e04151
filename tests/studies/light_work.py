"""Work for worker processes, in a module that is quick to import: every worker imports it."""

import os


def pid_or_error(item: int) -> int:
    """This process's number; an error for a negative item."""
    if item < 0:
        raise ConnectionResetError(item, "no connection of the workers") if item == -1 else AssertionError("a fault")
    return os.getpid()
