"""Lanes: places for the clients that are trained at the same time, and the banks with their parameters."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedra_engine.execution.banks import BankOptions, SpareBanks
from fedra_engine.execution.scheduling import longest_first
from fedra_engine.federation.assignment import Assignment
from fedra_engine.federation.local_terms import ClientsInTraining, training_terms
from fedra_engine.federation.updates import ClientUpdates
from fedra_engine.federation.work import LocalWork
from fedra_engine.models.foundation import Foundation
from fedra_engine.models.state import GlobalState
from fedra_kernels import to_device


@dataclass(eq=False)
class Lane:
    """A lane and the client that trains in it.

    Attributes:
        index: number of the lane.
        row: the client's row of the assignment.
        slots: int64 [blocks], the adapter bank's row of each block; -1 for blocks that the client does not hold.
        trained: int64 [blocks], as `slots`, and also -1 for blocks that it does not train.
        exits: int64 [exits], the global classifiers that the client trains, ascending.
        heads: int64 [exits], their rows of the head bank, consecutive.
        batches: sample rows of each local step.
        same_until: of each local step, the first one after it whose batch has another size, or the end.
        step: local steps done.
    """

    index: int
    row: int
    client: int
    slots: NDArray[np.int64]
    trained: NDArray[np.int64]
    exits: NDArray[np.int64]
    heads: NDArray[np.int64]
    batches: list[NDArray[np.int64]]
    same_until: list[int]
    step: int = 0

    @property
    def trained_slots(self) -> NDArray[np.int64]:
        """int64 [trained blocks], the adapter bank's rows of the trained blocks."""
        return self.trained[self.trained >= 0]

    @property
    def batch(self) -> NDArray[np.int64]:
        """Sample rows of the next local step."""
        return self.batches[self.step]


class LanePool:
    """The lanes of one round, each of which takes clients from a queue, one after another.

    Attributes:
        adapters, heads: banks of the clients in training.
        losses: float64 [lanes], training loss of each lane's client so far, summed over samples.
    """

    def __init__(
        self,
        work: LocalWork,
        assignment: Assignment,
        state: GlobalState,
        foundation: Foundation,
        *,
        lanes: int,
        spare: SpareBanks | None = None,
    ) -> None:
        """Without `spare` banks, new ones are made."""
        self.work = work
        self.assignment = assignment
        self._state = state
        self._layout = foundation.adapter_layout
        # Whether clients start from more than a copy of the global adapters.
        self._own_starts = assignment.ranks is not None or assignment.hand_out is not None
        self._queue = deque(longest_first(assignment.held, work.steps()).tolist())
        count = min(lanes, len(self._queue))
        self._lanes: list[Lane | None] = [None] * count
        # Every lane has as many adapter slots as the deepest client needs, so that any client fits any lane.
        self._places = np.where(assignment.held, assignment.held.cumsum(axis=1) - 1, -1)
        self._slots_per_lane = int(assignment.held.sum(axis=1).max(initial=0))
        self._heads_per_lane = len(state.heads)
        self._terms = (*assignment.terms, *training_terms(work.training))
        self._spare = SpareBanks() if spare is None else spare
        adapters = BankOptions(
            self._layout.size,
            work.training,
            state.adapters.dtype,
            foundation.device,
            columns=self._layout.columns(assignment.factors),
            compute_dtype=foundation.dtype,
            keeps_starts=any(term.needs_starts for term in self._terms),
            all_stepped=assignment.trained is None and not self._terms,
        )
        heads = replace(
            adapters,
            size=foundation.head_layout.size,
            columns=slice(0, foundation.head_layout.trained_size),
            compute_dtype=None,
            all_stepped=not self._terms,
        )
        self.adapters = self._spare.take(count * self._slots_per_lane, adapters)
        self.heads = self._spare.take(count * self._heads_per_lane, heads)
        self.losses = torch.zeros(count, dtype=torch.float64, device=foundation.device)

    def refill(self) -> bool:
        """Give free lanes to the next clients in the queue. Returns whether there were any."""
        free = [index for index, lane in enumerate(self._lanes) if lane is None][: len(self._queue)]
        fresh = [self._start(index, self._queue.popleft()) for index in free]
        for lane in fresh:
            self._lanes[lane.index] = lane
        if fresh:
            self._hand_out(fresh)
        return bool(fresh)

    def in_training(self) -> list[Lane]:
        """The clients in training, by falling size of their next batch.

        Clients with batches of equal size are neighbours, so that their small products run as one.
        """
        active = [lane for lane in self._lanes if lane is not None]
        return sorted(active, key=lambda lane: -len(lane.batch))

    def add_local_terms(self, slots: Tensor, heads: Tensor, ranks: Tensor) -> None:
        """Add the local terms' gradients to all rows in training; `ranks` are the LoRA ranks of the `slots`."""
        if self._terms:
            adapters, classifiers = self.adapters.in_training(slots), self.heads.in_training(heads)
            clients = ClientsInTraining(adapters, classifiers, ranks, self._layout)
            for term in self._terms:
                term.add_gradients(clients)

    def take_finished(self) -> ClientUpdates | None:
        """Free the lanes of the clients that are done, and return their updates; None when there are none."""
        done = [lane for lane in self._lanes if lane is not None and lane.step == len(lane.batches)]
        if not done:
            return None
        for lane in done:
            self._lanes[lane.index] = None
        clients = np.array([lane.client for lane in done], dtype=np.int64)
        owners, blocks = np.nonzero(np.stack([lane.trained for lane in done]) >= 0)
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
        starts: Tensor = self._state.adapters
        rows: Tensor | None = global_blocks
        if self._own_starts:
            starts, rows = starts.index_select(0, global_blocks), None
            for lane, own in zip(done, starts.split([len(lane.trained_slots) for lane in done]), strict=True):
                self.assignment.make_own(lane.row, lane.client, np.flatnonzero(lane.trained >= 0), own, self._layout)
        updates = ClientUpdates(
            clients=clients,
            samples=self.work.clients.sample_counts(clients),
            processed=np.array([sum(map(len, lane.batches)) for lane in done], dtype=np.int64),
            losses=self.losses[lanes],
            adapters=self.adapters.parameters,
            slots=slots,
            slot_owners=owners,
            slot_blocks=blocks,
            heads=self.heads.parameters,
            head_rows=head_rows,
            head_owners=np.repeat(np.arange(len(done)), [len(lane.heads) for lane in done]),
            head_exits=exits,
        )
        return updates.checked(starts, self._state.heads, rows=rows, head_rows=global_heads)

    def end(self) -> None:
        """Leave the banks to the next round; there must be no clients left."""
        self._spare.keep(self.adapters, self.heads)

    def _start(self, index: int, row: int) -> Lane:
        client, exits = int(self.work.participants[row]), self.assignment.exits_of(row)
        slots = np.where(self._places[row] < 0, -1, index * self._slots_per_lane + self._places[row])
        trained = slots if self.assignment.trained is None else np.where(self.assignment.trained[row], slots, -1)
        heads = index * self._heads_per_lane + np.arange(len(exits))
        batches = self.work.batches(client)
        return Lane(index, row, client, slots, trained, exits, heads, batches, _same_until([*map(len, batches)]))

    def _hand_out(self, lanes: Sequence[Lane]) -> None:
        """Load the start of the clients of `lanes` into the banks."""
        matrix = np.stack([lane.slots for lane in lanes])
        owners, held = np.nonzero(matrix >= 0)
        parts = [(lane.heads, lane.exits, np.array([lane.index])) for lane in lanes]
        slots, blocks, heads, exits, indices = to_device(
            [matrix[owners, held], held, *(np.concatenate(part) for part in zip(*parts, strict=True))],
            self.losses.device,
        )

        def adjust() -> None:
            for lane in lanes:
                own = self.adapters.parameters[lane.index * self._slots_per_lane : lane.slots.max() + 1]
                self.assignment.make_own(lane.row, lane.client, np.flatnonzero(lane.slots >= 0), own, self._layout)

        self.adapters.load(slots, self._state.adapters, blocks, adjust if self._own_starts else None)
        self.heads.load(heads, self._state.heads, exits)
        self.losses.index_fill_(0, indices, 0)


def _same_until(sizes: Sequence[int]) -> list[int]:
    """`Lane.same_until` for batches of these sizes."""
    until = list[int]()
    for _, same in groupby(sizes):
        count = len(list(same))
        until += [len(until) + count] * count
    return until
