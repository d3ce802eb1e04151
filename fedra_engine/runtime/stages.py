"""Say what a run is doing where that takes long: on the engine's log, which `Console` shows and keeps in run.log."""

from __future__ import annotations

import logging
import threading
from typing import Self

_FIRST = 1.0
"""Seconds without a word; what is done by then needs none."""
_LONGEST = 60.0
"""Most seconds between two lines; each pause before is twice as long as the last."""
_LOG = logging.getLogger(__name__)


class Stage:
    """Something that may take long; a context manager that says so, from time to time, until it is left.

    A line comes even if nothing has been done yet, as the first batch of a large model alone may take a minute.
    """

    def __init__(self, what: str, total: int | None = None) -> None:
        """`what` is done, to `total` things, if these can be counted."""
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
        """Of these things, `count` more are done."""
        self._done += count

    def _talk(self) -> None:
        seconds = _FIRST
        while not self._over.wait(seconds):
            _LOG.info("%s …%s", self._what, "" if self.total is None else f" {self._done:,} of {self.total:,}")
            seconds = min(2 * seconds, _LONGEST)
