"""FedRA (Su, Li, Xue; ECCV 2024; arXiv 2311.11227): a random allocation matrix every round.

Client i draws a uniform set S_i of capacity_i blocks, and trains the sub-model of these blocks in ascending order. The
adapters of block l are averaged over {i : l ∈ S_i}; a block that nobody drew keeps its own.

Here and in the methods built on FedRA, `method.allocation` may name another allocator.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from fedra_engine.config.options import registering
from fedra_engine.federation.allocation import (
    ReferenceAllocation,
    prefix_allocation,
    repair_coverage,
    uniform_allocation,
)
from fedra_engine.federation.assignment import Assignment
from fedra_engine.methods.base import Federation, Method, check_full_depth, register_method
from fedra_engine.runtime.errors import InputError
from fedra_engine.runtime.randomness import generator

Allocator = Callable[
    [int, NDArray[np.int64], NDArray[np.int64], int, np.random.Generator, Federation], NDArray[np.bool_]
]
"""`allocator(round, capacities, participants, depth, rng, federation)` gives bool [participants, blocks].

`capacities` [clients] are those of all clients, `participants` ascending client indices, `depth` is the number of
blocks, and `rng` is the generator of this round.
"""

_reference = lru_cache(maxsize=4)(ReferenceAllocation)

ALLOCATORS: dict[str, Allocator] = {
    # Drawn for all clients, so that a client's blocks do not depend on the other participants.
    "uniform": lambda round, capacities, participants, depth, rng, federation: uniform_allocation(
        capacities, depth, rng
    )[participants],
    "reference": lambda round, capacities, participants, depth, rng, federation: _reference(
        tuple(capacities.tolist()), depth, federation.seed
    )(round)[participants],
    "covered": lambda round, capacities, participants, depth, rng, federation: repair_coverage(
        uniform_allocation(capacities, depth, rng)[participants],
        generator(federation.seed, round=round, purpose="coverage"),
    ),
    "prefix": lambda round, capacities, participants, depth, rng, federation: prefix_allocation(
        capacities[participants], depth
    ),
    "full": lambda round, capacities, participants, depth, rng, federation: np.ones(
        (len(participants), depth), dtype=np.bool_
    ),
}
"""The allocators by name."""


def register_allocator(name: str) -> Callable[[Allocator], Allocator]:
    """Decorate an `Allocator`, to make it `method.allocation` `name` of configurations.

    Raises:
        InputError: there is an allocator of that name.
    """
    return registering(ALLOCATORS, "method.allocation", name)


@register_method("fedra")
class FedRA(Method):
    """Blocks by an allocator, by default `uniform`; each block is averaged over its holders."""

    def __init__(self, federation: Federation) -> None:
        super().__init__(federation)
        self.ranks = federation.clients.ranks
        self._allocation = federation.config.allocation or "uniform"
        if self._allocation not in ALLOCATORS:
            raise InputError(
                f"method.allocation: found {self._allocation!r}, expected one of {', '.join(ALLOCATORS)}, or null"
            )
        if self._allocation == "reference" and federation.capacities_drawn:
            raise InputError(
                "method.allocation: found reference with clients.capacity_schedule drawn, expected fixed capacities"
            )
        if self._allocation == "full":
            check_full_depth("method.allocation full", federation)

    def assign(self, participants: NDArray[np.int64], round: int) -> Assignment:
        federation, shape = self.federation, (len(participants), self.federation.depth)
        rng = generator(federation.seed, round=round, purpose="allocation")
        capacities, allocator = federation.capacities(round), ALLOCATORS[self._allocation]
        held = allocator(round, capacities, participants, federation.depth, rng, federation)
        if held.shape != shape or held.dtype != np.bool_:
            raise InputError(
                f"method.allocation: found {held.dtype} {list(held.shape)} from {self._allocation}, expected bool "
                f"{list(shape)} [participants, blocks]"
            )
        return Assignment(held, ranks=None if self.ranks is None else self.ranks[participants])
