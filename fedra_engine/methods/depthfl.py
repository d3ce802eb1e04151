"""DepthFL (Kim et al., ICLR 2023): early exits with mutual distillation.

A client holds the blocks up to the deepest exit within its capacity and trains the classifiers of all its m exits. Its
loss is
    Σ_i CE_i + w(r) / (m − 1) Σ_i Σ_{j ≠ i} KL(p_j ‖ p_i),
where no gradient flows into the teacher p_j, and w(r) = exp(−5 (1 − min(r, R) / R)²) rises over the first R rounds r
(R = 300 in the authors' code, 500 in FedRA's comparison). Every block and every classifier is averaged over the clients
that hold it. The global model ends at the deepest exit of any client and averages the logits of its exits.

The published comparison of FedRA (arXiv 2311.11227) ran another algorithm under this name, the variant `fedra_paper`. A
client holds as many first blocks as its capacity. One final classifier, shared by all clients, follows the last block
of each; the early exits before that block have classifiers of their own. With `exit_every` 3 and 12 blocks they follow
the blocks 4, 7 and 10, counted from 1; in general 1 + k · `exit_every`, k = 1, 2, … The loss is the one above, and the
whole model predicts, by the final classifier alone.
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
        self._shared_end = self._options.variant == "fedra_paper"
        every, depth = self._options.exit_every, federation.depth
        if depth % every and not self._shared_end:
            raise InputError(
                f"method.depthfl.exit_every: found {every}, expected a divisor of the model's depth, {depth}"
            )
        # No client trains deeper exits.
        deepest = int(federation.clients.capacities.max())
        exits = range(every, deepest - 1, every) if self._shared_end else range(every - 1, deepest, every)
        if not exits:
            raise InputError(
                f"method.depthfl.exit_every: found {every} with clients that hold at most {deepest} blocks, expected "
                "an exit that one of them reaches"
            )
        self._exits = tuple(exits)

    def assign(self, participants: NDArray[np.int64], round: int) -> Assignment:
        every, ramp = self._options.exit_every, self._options.ramp_up_rounds
        depths = self.federation.capacities(round)[participants]
        held = prefix_allocation(depths if self._shared_end else depths // every * every, self.federation.depth)
        consistency = math.exp(-5 * (1 - min(round, ramp) / ramp) ** 2)
        return Assignment(held, exits=self._exits, shared_end=self._shared_end, distillation=consistency)

    def initial_state(self, state: GlobalState, base: Callable[[], tuple[Tensor, ...]]) -> GlobalState:
        # Every exit starts with the model's own classifier.
        return replace(state, heads=state.heads.repeat(len(self._exits) + self._shared_end, 1))

    def evaluated_model(self) -> EvaluatedModel:
        if self._shared_end:
            return super().evaluated_model()
        every_exit = self._options.predict == "ensemble"
        return EvaluatedModel(np.arange(self._exits[-1] + 1), exits=self._exits if every_exit else ())
