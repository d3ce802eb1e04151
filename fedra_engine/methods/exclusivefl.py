"""ExclusiveFL: only clients that can hold the whole model take part (a baseline of InclusiveFL, arXiv 2202.08036)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fedra_engine.federation.assignment import Assignment
from fedra_engine.methods.allocated import check_own_allocation
from fedra_engine.methods.base import Federation, Method
from fedra_engine.runtime.errors import InputError


class ExclusiveFL(Method):
    """Participants that cannot hold all blocks sit the round out; the others train all of them."""

    def __init__(self, federation: Federation) -> None:
        super().__init__(federation)
        check_own_allocation(federation)
        deepest = int(federation.clients.capacities.max())
        if deepest < federation.depth:
            raise InputError(
                f"clients.capacities: found at most {deepest} of {federation.depth} blocks with method.name "
                "exclusivefl, expected a client that can hold all"
            )

    def assign(self, participants: NDArray[np.int64], round: int) -> Assignment:
        """See `Method.assign`."""
        capable = self.federation.capacities(round)[participants] >= self.federation.depth
        return Assignment(np.repeat(capable[:, None], self.federation.depth, axis=1))
