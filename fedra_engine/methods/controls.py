"""The two ends that heterogeneous methods lie between (FedRA, §4): full depth for all, the smallest depth for all."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fedra_engine.federation.allocation import prefix_allocation
from fedra_engine.federation.assignment import Assignment
from fedra_engine.methods.allocated import check_full_depth, check_own_allocation
from fedra_engine.methods.base import Federation, Method
from fedra_engine.models.state import EvaluatedModel


class AllLarge(Method):
    """Every client trains all blocks, whatever its capacity: the upper bound."""

    def __init__(self, federation: Federation) -> None:
        super().__init__(federation)
        check_own_allocation(federation)
        check_full_depth("method.name alllarge", federation)

    def assign(self, participants: NDArray[np.int64], round: int) -> Assignment:
        """See `Method.assign`."""
        return Assignment(np.ones((len(participants), self.federation.depth), dtype=np.bool_))


class AllSmall(Method):
    """Every client trains the first min(capacity) blocks, and the global model is that deep."""

    def __init__(self, federation: Federation) -> None:
        super().__init__(federation)
        check_own_allocation(federation)

    def assign(self, participants: NDArray[np.int64], round: int) -> Assignment:
        """See `Method.assign`."""
        depths = np.full(len(participants), self._depth())
        return Assignment(prefix_allocation(depths, self.federation.depth))

    def evaluated_model(self) -> EvaluatedModel:
        """See `Method.evaluated_model`."""
        return EvaluatedModel(np.arange(self._depth()))

    def _depth(self) -> int:
        return int(self.federation.clients.capacities.min())
