"""Lanes: the places in which clients are trained at the same time, and the banks that hold their parameters."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedra_engine.execution.banks import Bank
from fedra_engine.execution.scheduling import longest_first
from fedra_engine.federation.assignment import Assignment, ClientsInTraining, training_terms
from fedra_engine.federation.work import ClientUpdates, LocalWork
from fedra_engine.models.foundation import Foundation
from fedra_engine.models.state import GlobalState
from fedra_kernels import to_device


@dataclass
class Lane:
    """A client in training.

    Attributes:
        index: the lane.
        row: the client's row of the assignment.
        client: the client.
        blocks: int64 [held blocks], ascending.
        slots: int64 [held blocks], the client's rows of the adapter bank, consecutive.
        trained: bool [held blocks], whether the client trains the adapters of each.
        exits: int64 [exits], the global classifiers the client trains, ascending; the last sits after its last block.
        heads: int64 [exits], the client's rows of the head bank, consecutive.
        batches: sample rows of each local step.
        step: local steps done.
    """

    index: int
    row: int
    client: int
    blocks: NDArray[np.int64]
    slots: NDArray[np.int64]
    trained: NDArray[np.bool_]
    exits: NDArray[np.int64]
    heads: NDArray[np.int64]
    batches: list[NDArray[np.int64]]
    step: int = 0

    @property
    def trained_slots(self) -> NDArray[np.int64]:
        """int64 [trained blocks], the rows of the adapter bank that the client trains."""
        return self.slots[self.trained]

    @property
    def batch(self) -> NDArray[np.int64]:
        """Sample rows of the coming local step."""
        return self.batches[self.step]

    @property
    def finished(self) -> bool:
        """Whether all local steps are done."""
        return self.step == len(self.batches)


class LanePool:
    """The lanes of one round: clients come from a queue, train, and make room for the next."""

    def __init__(
        self,
        work: LocalWork,
        assignment: Assignment,
        state: GlobalState,
        foundation: Foundation,
        *,
        lanes: int,
    ) -> None:
        self._work = work
        self._assignment = assignment
        self._state = state
        layout, head_layout = foundation.adapter_layout, foundation.head_layout
        self._layout = layout
        self._queue = deque(longest_first(assignment.held, work.steps()).tolist())
        self._lanes: list[Lane | None] = [None] * min(lanes, len(self._queue))
        # Every lane owns as many adapter slots as the deepest client needs, so any client fits any lane.
        self._slots_per_lane = int(assignment.held.sum(axis=1).max(initial=0))
        self._heads_per_lane = len(state.heads)
        count, dtype, device = len(self._lanes), state.adapters.dtype, state.adapters.device
        self._terms = (*assignment.terms, *training_terms(work.training))
        starts = any(term.needs_starts for term in self._terms)
        self.adapters = Bank(
            count * self._slots_per_lane,
            layout.size,
            work.training,
            dtype=dtype,
            device=device,
            columns=layout.columns(assignment.factors),
            compute_dtype=foundation.dtype,
            keeps_starts=starts,
            all_stepped=assignment.trained is None and not self._terms,
        )
        self.heads = Bank(
            count * self._heads_per_lane,
            head_layout.size,
            work.training,
            dtype=dtype,
            device=device,
            columns=head_layout.trained,
            keeps_starts=starts,
            all_stepped=not self._terms,
        )
        self.losses = torch.zeros(count, dtype=torch.float64, device=device)
        """Sum over samples of the training loss of each lane's client so far."""

    def refill(self) -> bool:
        """Give free lanes to the next clients in the queue. Returns whether any lane was given."""
        fresh = []
        for index, lane in enumerate(self._lanes):
            if lane is None and self._queue:
                self._lanes[index] = self._start(index, self._queue.popleft())
                fresh.append(self._lanes[index])
        if fresh:
            self._hand_out([lane for lane in fresh if lane is not None])
        return bool(fresh)

    def in_training(self) -> list[Lane]:
        """The clients in training, those with more samples in the coming step first.

        Clients with equally many samples stand together, which lets their small products run as one.
        """
        active = [lane for lane in self._lanes if lane is not None]
        return sorted(active, key=lambda lane: -len(lane.batch))

    def add_local_terms(self, slots: Tensor, heads: Tensor, ranks: Tensor) -> None:
        """Add the local terms' gradients to these rows, all that are in training; `ranks` are those of the slots."""
        if self._terms:
            adapters, classifiers = self.adapters.as_seen_by_terms(slots), self.heads.as_seen_by_terms(heads)
            clients = ClientsInTraining(adapters, classifiers, ranks, self._layout)
            for term in self._terms:
                term.add_gradients(clients)

    def take_finished(self) -> ClientUpdates | None:
        """The updates of the clients that are done, whose lanes become free; None when there are none."""
        done = [lane for lane in self._lanes if lane is not None and lane.finished]
        if not done:
            return None
        for lane in done:
            self._lanes[lane.index] = None
        clients = np.array([lane.client for lane in done], dtype=np.int64)
        blocks = np.concatenate([lane.blocks[lane.trained] for lane in done])
        exits = np.concatenate([lane.exits for lane in done])
        slots, head_rows, lanes, global_blocks, global_heads = to_device(
            [
                np.concatenate([lane.trained_slots for lane in done]),
                np.concatenate([lane.heads for lane in done]),
                np.array([lane.index for lane in done]),
                blocks,
                exits,
            ],
            self.losses.device,
        )
        starts = self._state.adapters.index_select(0, global_blocks)
        for lane, own in zip(done, starts.split([int(lane.trained.sum()) for lane in done]), strict=True):
            self._assignment.make_own(lane.row, lane.client, lane.blocks[lane.trained], own, self._layout)
        updates = ClientUpdates(
            clients=clients,
            samples=self._work.clients.sample_counts(clients),
            processed=np.array([sum(map(len, lane.batches)) for lane in done], dtype=np.int64),
            losses=self.losses[lanes],
            adapters=self.adapters.parameters,
            slots=slots,
            slot_owners=np.repeat(np.arange(len(done)), [len(lane.trained_slots) for lane in done]),
            slot_blocks=blocks,
            heads=self.heads.parameters,
            head_rows=head_rows,
            head_owners=np.repeat(np.arange(len(done)), [len(lane.heads) for lane in done]),
            head_exits=exits,
        )
        return updates.checked(starts, self._state.heads.index_select(0, global_heads))

    def _start(self, index: int, row: int) -> Lane:
        client = int(self._work.participants[row])
        blocks = np.flatnonzero(self._assignment.held[row])
        exits = self._assignment.exits_of(row)
        return Lane(
            index=index,
            row=row,
            client=client,
            blocks=blocks,
            slots=index * self._slots_per_lane + np.arange(len(blocks)),
            trained=self._assignment.trained_blocks[row, blocks],
            exits=exits,
            heads=index * self._heads_per_lane + np.arange(len(exits)),
            batches=self._work.batches(client),
        )

    def _hand_out(self, lanes: Sequence[Lane]) -> None:
        """Load what the clients of `lanes` start from."""
        parts = [(lane.slots, lane.blocks, lane.heads, lane.exits, np.array([lane.index])) for lane in lanes]
        slots, blocks, heads, exits, indices = to_device(
            [np.concatenate(part) for part in zip(*parts, strict=True)], self.losses.device
        )

        def adjust() -> None:
            """Make handed-out slots each client's own: its rank, and what it keeps to itself."""
            for lane in lanes:
                own = self.adapters.parameters[lane.slots[0] : lane.slots[-1] + 1]
                self._assignment.make_own(lane.row, lane.client, lane.blocks, own, self._layout)

        is_adjusted = self._assignment.ranks is not None or self._assignment.hand_out is not None
        self.adapters.load(slots, self._state.adapters, blocks, adjust if is_adjusted else None)
        self.heads.load(heads, self._state.heads, exits)
        self.losses.index_fill_(0, indices, 0)
