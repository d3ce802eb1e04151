"""The two ends that heterogeneous methods lie between: full depth for all, and the smallest depth for all."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fedra_engine.federation.allocation import Allocation, prefix_allocation
from fedra_engine.methods.base import Method


class AllLarge(Method):
    """Every client trains all blocks, whatever its capacity: the upper bound (FedRA, §4)."""

    def allocate(self, participants: NDArray[np.int64], round: int) -> Allocation:
        """See `Method.allocate`."""
        return np.ones((len(participants), self.federation.depth), dtype=np.bool_)


class AllSmall(Method):
    """Every client trains the first min(capacity) blocks, and the global model is that deep (FedRA, §4)."""

    def allocate(self, participants: NDArray[np.int64], round: int) -> Allocation:
        """See `Method.allocate`."""
        depths = np.full(len(participants), self._depth())
        return prefix_allocation(depths, self.federation.depth)

    def evaluated_blocks(self) -> NDArray[np.int64]:
        """See `Method.evaluated_blocks`."""
        return np.arange(self._depth())

    def _depth(self) -> int:
        return int(self.federation.clients.capacities.min())
