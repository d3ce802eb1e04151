"""The contract of executors."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

from fedra_engine.federation.assignment import Assignment
from fedra_engine.federation.work import ClientUpdates, LocalWork
from fedra_engine.models.state import GlobalState


class Executor(Protocol):
    """Trains a round's participants. Same arguments, same updates, whichever implementation.

    Attributes:
        lanes: clients trained at a time. Can change how updates are rounded: clients trained together share products.
    """

    lanes: int

    def train(self, work: LocalWork, assignment: Assignment, state: GlobalState) -> Iterator[ClientUpdates]:
        """Train every participant of `work` by its row of `assignment`.

        Every client starts from `state`. Updates come in the order clients finish.
        """
        ...
