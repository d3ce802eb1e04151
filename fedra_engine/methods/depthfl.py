"""DepthFL (Kim et al., ICLR 2023): early exits with mutual distillation.

A client holds the blocks up to the deepest exit within its capacity and trains the classifiers of all its m exits. Its
loss is
    Σ_i CE_i + w(r) / (m − 1) Σ_i Σ_{j ≠ i} KL(p_j ‖ p_i),
where no gradient flows into the teacher p_j, and w(r) = exp(−5 (1 − min(r, R) / R)²) rises over the first R rounds r
(R = 300 in the authors' code, 500 in FedRA's comparison). Every block and every classifier is averaged over the clients
that hold it. The global model ends at the deepest exit of any client and averages the logits of its exits.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from fedra_engine.config import DepthFLConfig
from fedra_engine.federation.allocation import prefix_allocation
from fedra_engine.federation.assignment import Assignment
from fedra_engine.methods.base import Federation, OwnAllocation, check_classifier, register_method
from fedra_engine.models.state import EvaluatedModel, GlobalState
from fedra_engine.runtime.errors import InputError


@register_method("depthfl")
class DepthFL(OwnAllocation):
    """Prefix allocation with early exits and mutual self-distillation."""

    def __init__(self, federation: Federation) -> None:
        super().__init__(federation)
        check_classifier(federation, "depthfl")
        self._options: DepthFLConfig = self.options
        every, depth = self._options.exit_every, federation.depth
        if depth % every:
            raise InputError(
                f"method.depthfl.exit_every: found {every}, expected a divisor of the model's depth, {depth}"
            )
        deepest = int(federation.clients.capacities.max())
        if deepest < every:
            raise InputError(
                f"method.depthfl.exit_every: found {every} with clients that hold at most {deepest} blocks, expected "
                "an exit that one of them reaches"
            )
        # No client trains deeper exits.
        self._depth = deepest // every * every
        self._exits = tuple(range(every - 1, self._depth, every))

    def assign(self, participants: NDArray[np.int64], round: int) -> Assignment:
        every, ramp = self._options.exit_every, self._options.ramp_up_rounds
        depths = self.federation.capacities(round)[participants] // every * every
        consistency = math.exp(-5 * (1 - min(round, ramp) / ramp) ** 2)
        held = prefix_allocation(depths, self.federation.depth)
        return Assignment(held, exits=self._exits, distillation=consistency)

    def initial_state(self, state: GlobalState, base: Callable[[], tuple[Tensor, ...]]) -> GlobalState:
        # Every exit starts with the model's own classifier.
        return replace(state, heads=state.heads.repeat(len(self._exits), 1))

    def evaluated_model(self) -> EvaluatedModel:
        every_exit = self._options.predict == "ensemble"
        return EvaluatedModel(np.arange(self._depth), exits=self._exits if every_exit else ())
