"""Operations that take long: what is running and how far it is, and when it is slow enough to be mentioned."""

from __future__ import annotations

import logging
from time import monotonic
from typing import Self

LOCAL_STEPS = "local steps"
"""Name of the stage in which a process trains its share of a round."""
_FIRST = 2.0
"""Seconds before a stage is mentioned for the first time."""
_LONGEST = 300.0
"""Maximum seconds between two mentions."""
_LOG = logging.getLogger(__name__)
_RUNNING: list[Stage] = []
"""Those that are entered, the innermost last; only the main thread changes it."""


class Stage:
    """A context manager around an operation that may take long. It only counts; others show it (`running_stage`).

    Attributes:
        what: the operation.
        total: the number of its steps; None if that is not known.
        done: how many of them are done.
    """

    def __init__(self, what: str, total: int | None = None) -> None:
        self.what = what
        self.total = total
        self.done = 0
        self._began = monotonic()

    def __enter__(self) -> Self:
        self._began = monotonic()
        _RUNNING.append(self)
        return self

    def __exit__(self, *error: object) -> None:
        _RUNNING.remove(self)
        _LOG.debug("%s took %.2f s", self.what, self.seconds)

    @property
    def seconds(self) -> float:
        """Since it was entered."""
        return monotonic() - self._began

    def advance(self, count: int) -> None:
        """Count `count` more steps as done."""
        self.done += count

    def __str__(self) -> str:
        return (
            f"{self.what} … {self.seconds:.0f} s"
            if self.total is None
            else f"{self.what} … {self.done:,} of {self.total:,}"
        )


def running_stage() -> Stage | None:
    """The innermost stage that is entered; for any thread."""
    # The list may become empty between two operations on it.
    last = _RUNNING[-1:]
    return last[0] if last else None


class SlowStages:
    """Decides when the running stage has taken so long that a line should say so.

    That is after `_FIRST` seconds or, if a stage of this name has run before, after twice the longest time that one has
    taken: rounds and evaluations come again and again, and are worth a line when they are slower than usual. Each pause
    until the next line is twice as long as the last, and none is longer than `_LONGEST`.
    """

    def __init__(self) -> None:
        self._longest = dict[str, float]()
        self._stage: Stage | None = None
        self._pause = self._due = 0.0

    def due(self) -> Stage | None:
        """The running stage if it should be mentioned now; to be asked every now and then."""
        stage = running_stage()
        if stage is None:
            self._stage = None
            return None
        seconds, before = stage.seconds, self._longest.get(stage.what, 0.0)
        if stage is not self._stage:
            self._stage, self._pause = stage, min(max(_FIRST, 2 * before), _LONGEST)
            self._due = self._pause
        self._longest[stage.what] = max(before, seconds)
        if seconds < self._due:
            return None
        self._pause = min(2 * self._pause, _LONGEST)
        self._due = seconds + self._pause
        return stage
