"""Methods that leave open who holds which block: `method.allocation` decides."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fedra_engine.federation.aggregation import Aggregator
from fedra_engine.federation.allocation import (
    Allocation,
    ReferenceAllocation,
    prefix_allocation,
    repair_coverage,
    uniform_allocation,
)
from fedra_engine.federation.assignment import Assignment
from fedra_engine.federation.ranked_aggregation import RankedAggregator
from fedra_engine.methods.base import Federation, Method
from fedra_engine.models.state import GlobalState
from fedra_engine.runtime.errors import InputError
from fedra_engine.runtime.randomness import generator


class AllocatedMethod(Method):
    """Blocks are drawn `uniform`ly (the default), by the `reference` procedure, `covered`, by `prefix` or `full`."""

    def __init__(self, federation: Federation) -> None:
        super().__init__(federation)
        self._allocation = federation.config.allocation or "uniform"
        clients = federation.clients
        if self._allocation == "reference":
            if federation.capacities_drawn:
                raise InputError(
                    "method.allocation: found reference with clients.capacity_schedule drawn, expected fixed capacities"
                )
            self._reference = ReferenceAllocation(clients.capacities, federation.depth, federation.seed)
        if self._allocation == "full":
            check_full_depth("method.allocation full", federation)

    def assign(self, participants: NDArray[np.int64], round: int) -> Assignment:
        """See `Method.assign`."""
        ranks = self.federation.clients.ranks
        return Assignment(self.allocate(participants, round), ranks=None if ranks is None else ranks[participants])

    def aggregator(self, previous: GlobalState, round: int) -> Aggregator:
        """See `Method.aggregator`; where ranks differ, each is averaged over the clients that have it."""
        federation = self.federation
        ranks = federation.clients.ranks
        if ranks is None:
            return super().aggregator(previous, round)
        return RankedAggregator(
            previous,
            federation.layout,
            ranks,
            weighting=federation.config.weighting,
            deterministic=federation.deterministic,
        )

    def allocate(self, participants: NDArray[np.int64], round: int) -> Allocation:
        """bool [participants, blocks], who holds which block in `round`."""
        depth, seed, capacities = self.federation.depth, self.federation.seed, self.federation.capacities(round)
        if self._allocation == "full":
            return np.ones((len(participants), depth), dtype=np.bool_)
        if self._allocation == "prefix":
            return prefix_allocation(capacities[participants], depth)
        if self._allocation == "reference":
            return self._reference(round)[participants]
        # Rows are drawn for all clients, so a client's row does not depend on who else takes part.
        rng = generator(seed, round=round, purpose="allocation")
        drawn = uniform_allocation(capacities, depth, rng)[participants]
        if self._allocation == "covered":
            return repair_coverage(drawn, generator(seed, round=round, purpose="coverage"))
        return drawn


def check_full_depth(asked: str, federation: Federation) -> None:
    """Raises InputError when no client can hold all blocks, unless the method may ignore capacities."""
    deepest = int(federation.clients.capacities.max())
    if deepest < federation.depth and not federation.config.ignore_capacities:
        raise InputError(
            f"clients.capacities: found at most {deepest} of {federation.depth} blocks with {asked}, expected a client "
            "that can hold all (or method.ignore_capacities true)"
        )


def check_own_allocation(federation: Federation) -> None:
    """Raises InputError when an allocation, or ranks, were asked of a method that has its own, and one rank."""
    config = federation.config
    if federation.clients.ranks is not None:
        raise InputError(
            f"clients.ranks: found ranks with method.name {config.name}, expected none (it needs one rank)"
        )
    if config.allocation is not None:
        raise InputError(
            f"method.allocation: found {config.allocation} with method.name {config.name}, expected null (it allocates "
            "blocks in its own way)"
        )


def check_classifier(federation: Federation, method: str) -> None:
    """Raises InputError when `method`, which looks at the logits of classes, is to train a causal language model."""
    if not federation.trains_classifier:
        raise InputError(f"method.name: found {method} with a causal language model, expected a classifier")
