"""An executor that trains nobody, to measure what a round costs beside the training."""

from __future__ import annotations

from collections.abc import Iterator

from fedra_engine.execution.lanes import LanePool
from fedra_engine.federation.assignment import Assignment
from fedra_engine.federation.work import ClientUpdates, LocalWork
from fedra_engine.models.foundation import Foundation
from fedra_engine.models.state import GlobalState


class IdleExecutor:
    """Lets all clients pass through the lanes: batches are drawn and adapters handed out, but no step is taken."""

    def __init__(self, foundation: Foundation, *, lanes: int) -> None:
        self._foundation = foundation
        self.lanes = lanes

    def train(self, work: LocalWork, assignment: Assignment, state: GlobalState) -> Iterator[ClientUpdates]:
        """See `Executor.train`."""
        pool = LanePool(work, assignment, state, self._foundation, lanes=self.lanes)
        while pool.refill():
            for lane in pool.in_training():
                lane.step = len(lane.batches)
            if updates := pool.take_finished():
                yield updates
