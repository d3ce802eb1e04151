"""Progress lines of long operations, in the engine's log, which `Console` shows and keeps in run.log."""

from __future__ import annotations

import logging
import threading
from typing import Self

_FIRST = 1.0
"""Seconds before the first line."""
_LONGEST = 60.0
"""Maximum seconds between two lines; until then each pause is twice as long as the last."""
_LOG = logging.getLogger(__name__)


class Stage:
    """A context manager that logs from time to time that an operation is still running, even without progress."""

    def __init__(self, what: str, total: int | None = None) -> None:
        """`what` is the operation, `total` the number of its steps, if known."""
        self._what = what
        self.total = total
        self._done = 0
        self._over = threading.Event()

    def __enter__(self) -> Self:
        if _LOG.isEnabledFor(logging.INFO):
            threading.Thread(target=self._talk, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()

    def advance(self, count: int) -> None:
        """Count `count` more steps as done."""
        self._done += count

    def _talk(self) -> None:
        seconds = _FIRST
        while not self._over.wait(seconds):
            _LOG.info("%s …%s", self._what, "" if self.total is None else f" {self._done:,} of {self.total:,}")
            seconds = min(2 * seconds, _LONGEST)
