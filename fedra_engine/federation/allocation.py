"""Allocation matrices: which blocks each client holds in a round (FedRA, arXiv 2311.11227, §3).

All functions return bool [clients, blocks] with `capacities[i]` ones in row i.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Allocation = NDArray[np.bool_]

_AT_A_TIME = 4096
"""Clients drawn at once: enough to keep NumPy busy, and a bound on memory."""


def uniform_allocation(capacities: NDArray[np.int64], depth: int, rng: np.random.Generator) -> Allocation:
    """Each client holds a uniformly random set of blocks of its capacity's size."""
    allocation = np.empty((len(capacities), depth), dtype=np.bool_)
    for start in range(0, len(capacities), _AT_A_TIME):
        portion = capacities[start : start + _AT_A_TIME]
        # The c smallest of i.i.d. uniforms are a uniform c-subset.
        ranks = rng.random((len(portion), depth)).argsort(axis=1).argsort(axis=1)
        allocation[start : start + _AT_A_TIME] = ranks < portion[:, None]
    return allocation


def repair_coverage(allocation: Allocation, rng: np.random.Generator) -> Allocation:
    """Move blocks between clients until every block has a holder; row sums do not change.

    For each block without a holder, a random client gives up a random one of its blocks that another client holds too.
    With less total capacity than blocks, as many blocks as possible get a holder.
    """
    repaired = allocation.copy()
    for empty in rng.permutation(np.flatnonzero(~repaired.any(axis=0))):
        spare = repaired & (repaired.sum(axis=0) > 1)
        donors = np.flatnonzero(spare.any(axis=1))
        if len(donors) == 0:
            break
        donor = rng.choice(donors)
        repaired[donor, rng.choice(np.flatnonzero(spare[donor]))] = False
        repaired[donor, empty] = True
    return repaired


def prefix_allocation(capacities: NDArray[np.int64], depth: int) -> Allocation:
    """Each client holds the first `capacity` blocks."""
    return np.arange(depth)[None, :] < capacities[:, None]


class ReferenceAllocation:
    """Draw as the published FedRA code does: from one legacy stream, for all clients in order, round after round.

    The published code drew the partition and the participants from the same stream, so its allocations were different.
    """

    def __init__(self, capacities: Sequence[int], depth: int, seed: int) -> None:
        self._capacities, self._depth, self._seed = capacities, depth, seed
        self._next_round = math.inf

    def __call__(self, round: int) -> Allocation:
        """Allocate blocks to all clients; rounds may be asked for in any order. Returns bool [clients, blocks]."""
        if round < self._next_round:
            # The stream is replayed, so that a resumed run draws what an uninterrupted one would have.
            self._stream, self._next_round = np.random.RandomState(self._seed), 0
        while self._next_round <= round:
            allocation = np.zeros((len(self._capacities), self._depth), dtype=np.bool_)
            for row, capacity in zip(allocation, self._capacities, strict=True):
                row[self._stream.choice(self._depth, capacity, replace=False)] = True
            self._next_round += 1
        return allocation
