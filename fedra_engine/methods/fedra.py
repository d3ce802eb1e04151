"""FedRA (Su, Li, Xue; ECCV 2024; arXiv 2311.11227): a random allocation matrix every round.

Client i draws a uniform set S_i of capacity_i blocks, and trains the sub-model of these blocks in ascending order. The
adapters of block l are averaged over {i : l ∈ S_i}; a block that nobody drew keeps its own.

Here and in the methods built on FedRA, `method.allocation` may name another allocator.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedra_engine.federation.aggregation import Aggregator
from fedra_engine.federation.assignment import Assignment
from fedra_engine.methods.allocators import ALLOCATORS, USES, average_movement
from fedra_engine.methods.base import Federation, Method, check_full_depth, register_method
from fedra_engine.models.state import GlobalState
from fedra_engine.runtime.errors import InputError
from fedra_engine.runtime.randomness import generator


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
        self._measures_movement = "movement" in USES.get(self._allocation, ())
        if self._measures_movement and self.hides_movement is not None:
            raise InputError(
                f"method.allocation: found {self._allocation} with method.name {federation.config.name}, expected an "
                f"allocation that does not need to know how adapters move ({self.hides_movement})"
            )

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

    def aggregator(self, previous: GlobalState, round: int) -> Aggregator:
        if self._measures_movement:
            self._before = previous.adapters
        return super().aggregator(previous, round)

    def after_round(self, state: GlobalState, round: int) -> None:
        if self._measures_movement:
            norms = (state.adapters - self._before).double().norm(dim=1).cpu().numpy()
            movement = average_movement(self.federation.movement, norms)
            self.federation = replace(self.federation, movement=movement)

    def tensors(self) -> dict[str, Tensor]:
        movement = self.federation.movement
        return {} if movement is None else {"movement": torch.from_numpy(movement)}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        if "movement" in tensors:
            self.federation = replace(self.federation, movement=tensors["movement"].numpy().copy())
