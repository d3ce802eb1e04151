"""Aggregation that keeps groups of clients apart until all updates are in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedra_engine.federation.aggregation import Aggregator, WeightedSum
from fedra_engine.federation.work import ClientUpdates
from fedra_engine.models.state import GlobalState


class GroupedAggregator(Aggregator):
    """Also sums the adapters of each group of clients by itself; memory is one global state per group."""

    def __init__(
        self,
        previous: GlobalState,
        groups: int,
        group_of: Callable[[NDArray[np.int64]], NDArray[np.int64]],
        *,
        weighting: Literal["uniform", "samples"],
        deterministic: bool,
    ) -> None:
        """`group_of` gives the group, below `groups`, of each of some clients."""
        super().__init__(previous, weighting=weighting, deterministic=deterministic)
        self._group_of = group_of
        self._groups = groups
        self._by_group = WeightedSum(previous.adapters.repeat(groups, 1), deterministic)

    def add(self, updates: ClientUpdates) -> None:
        """See `Aggregator.add`."""
        super().add(updates)
        rows = self._group_of(updates.clients)[updates.slot_owners] * len(self.previous.adapters) + updates.slot_blocks
        self._by_group.add(updates.adapters, updates.slots, rows, self.slot_weights(updates))

    def sums(self) -> list[Tensor]:
        """See `Aggregator.sums`."""
        return [*super().sums(), *self._by_group.sums()]

    def group_changes(self) -> tuple[Tensor, Tensor]:
        """How each group's mean differs from the previous state, [groups, blocks, slot size], and the groups' weights
        [groups, blocks]; both zero where nobody in the group trained the block."""
        previous = self.previous.adapters.repeat(self._groups, 1)
        changes = self._by_group.mean(previous) - previous
        shape = (self._groups, len(self.previous.adapters))
        return changes.unflatten(0, shape), torch.clone(self._by_group.weight).unflatten(0, shape)
