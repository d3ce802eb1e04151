"""Baselines: one depth for all clients (AllLarge and AllSmall; FedRA, §4), or only clients of full depth.

ExclusiveFL, with only the clients that can hold the whole model, is a baseline of InclusiveFL (arXiv 2202.08036).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fedra_engine.federation.allocation import prefix_allocation
from fedra_engine.federation.assignment import Assignment
from fedra_engine.methods.base import Federation, OwnAllocation, check_full_depth, register_method
from fedra_engine.models.state import EvaluatedModel


@register_method("alllarge")
class AllLarge(OwnAllocation):
    """Every client trains all blocks, whatever its capacity."""

    def __init__(self, federation: Federation) -> None:
        super().__init__(federation)
        check_full_depth("method.name alllarge", federation)

    def assign(self, participants: NDArray[np.int64], round: int) -> Assignment:
        return Assignment(np.ones((len(participants), self.federation.depth), dtype=np.bool_))


@register_method("allsmall")
class AllSmall(OwnAllocation):
    """Every client trains as many first blocks as the smallest client holds; the global model has only these."""

    def assign(self, participants: NDArray[np.int64], round: int) -> Assignment:
        depths = np.full(len(participants), self._depth())
        return Assignment(prefix_allocation(depths, self.federation.depth))

    def evaluated_model(self) -> EvaluatedModel:
        return EvaluatedModel(np.arange(self._depth()))

    def _depth(self) -> int:
        return int(self.federation.clients.capacities.min())


@register_method("exclusivefl")
class ExclusiveFL(OwnAllocation):
    """Participants that cannot hold all blocks sit the round out; the others train all of them."""

    def __init__(self, federation: Federation) -> None:
        super().__init__(federation)
        check_full_depth("method.name exclusivefl", federation, always=True)

    def assign(self, participants: NDArray[np.int64], round: int) -> Assignment:
        capable = self.federation.capacities(round)[participants] >= self.federation.depth
        return Assignment(np.repeat(capable[:, None], self.federation.depth, axis=1))
