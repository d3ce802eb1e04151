"""FedRA (Su, Li, Xue; ECCV 2024; arXiv 2311.11227): a random allocation matrix every round.

Client i draws a set S_i of capacity_i distinct blocks, uniformly. It trains the sub-model of these blocks in
ascending order. Block l's adapter becomes the mean over {i : l ∈ S_i}; a block that nobody drew keeps its own.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fedra_engine.federation.allocation import (
    Allocation,
    ReferenceAllocation,
    repair_coverage,
    uniform_allocation,
)
from fedra_engine.methods.base import Federation, Method
from fedra_engine.randomness import generator


class FedRA(Method):
    """Random allocation: `uniform`, as the `reference` code draws, or `covered`."""

    def __init__(self, federation: Federation) -> None:
        super().__init__(federation)
        if federation.config.allocation == "reference":
            self._reference = ReferenceAllocation(federation.clients.capacities, federation.depth, federation.seed)

    def allocate(self, participants: NDArray[np.int64], round: int) -> Allocation:
        """See `Method.allocate`."""
        federation = self.federation
        if federation.config.allocation == "reference":
            return self._reference(round)[participants]
        # Rows are drawn for all clients, so a client's row does not depend on who else takes part.
        rng = generator(federation.seed, round=round, purpose="allocation")
        drawn = uniform_allocation(federation.clients.capacities, federation.depth, rng)[participants]
        if federation.config.allocation == "covered":
            return repair_coverage(drawn, generator(federation.seed, round=round, purpose="coverage"))
        return drawn
