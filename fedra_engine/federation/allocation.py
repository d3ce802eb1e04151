"""Allocation matrices: which blocks each client holds in a round (FedRA, arXiv 2311.11227, §3).

All functions return bool [clients, blocks] with `capacities[i]` ones in row i.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Allocation = NDArray[np.bool_]

_AT_A_TIME = 4096
"""Clients drawn at once: enough to keep NumPy busy, and a bound on memory."""


def uniform_allocation(
    capacities: NDArray[np.int64], depth: int, rng: np.random.Generator, always: Sequence[int] = ()
) -> Allocation:
    """Each client holds a uniformly random set of blocks of its capacity's size.

    The blocks `always` come before all others, in this order.
    """
    allocation = np.empty((len(capacities), depth), dtype=np.bool_)
    for start in range(0, len(capacities), _AT_A_TIME):
        portion = capacities[start : start + _AT_A_TIME]
        # The c smallest of i.i.d. uniforms are a uniform c-subset.
        keys = rng.random((len(portion), depth))
        keys[:, list(always)] = np.arange(-len(always), 0)
        ranks = keys.argsort(axis=1).argsort(axis=1)
        allocation[start : start + _AT_A_TIME] = ranks < portion[:, None]
    return allocation


def weighted_allocation(
    capacities: NDArray[np.int64], chances: NDArray[np.float64], rng: np.random.Generator
) -> Allocation:
    """Each client draws `capacity` blocks without replacement, with the `chances` [blocks]."""
    # The order of exponential variables of rates p is that of draws without replacement in proportion to p.
    clocks = rng.exponential(size=(len(capacities), len(chances))) / chances
    return clocks.argsort(axis=1).argsort(axis=1) < capacities[:, None]


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


@dataclass(frozen=True)
class Coverage:
    """How the allocations of successive rounds cover the blocks.

    Attributes:
        complete: share of the rounds in which every block had a holder.
        holders: float64 [blocks], mean number of holders of each block in a round.
        longest_gap: most rounds in succession in which the same block had no holder.
    """

    complete: float
    holders: NDArray[np.float64]
    longest_gap: int


def measure_coverage(allocations: Iterable[Allocation]) -> Coverage:
    """The coverage of at least one round's allocation, each bool [participants, blocks]."""
    holders = np.stack([allocation.sum(axis=0) for allocation in allocations])
    gaps = longest = np.zeros(holders.shape[1], dtype=np.int64)
    for of_round in holders:
        gaps = np.where(of_round > 0, 0, gaps + 1)
        longest = np.maximum(longest, gaps)
    complete = float((holders > 0).all(axis=1).mean())
    return Coverage(complete, holders.mean(axis=0), int(longest.max()))
