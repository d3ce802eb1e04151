"""InclusiveFL (Liu et al., KDD 2022; arXiv 2202.08036): prefixes of the model, and momentum distillation.

A client holds the first blocks, as many as it can. Clients of equal depth form a group; G_1 < … < G_n are the depths.
With Δ_i,l the mean change of block l in group i, block l becomes its old value plus the mean of Δ_i,l over the groups
that hold it, each group weighted by its clients (heterogeneous aggregation).

Momentum distillation (the paper's momentum knowledge distillation; β = 0.2 and the blocks that count are those of the
authors' code, github.com/Rachelxuan11/InclusiveFL, whose loop however keeps the last of these blocks instead of their
mean): what the next deeper group learnt in its further blocks is passed to the last block of the shallower one,
    m_i = mean of Δ_{i+1,l} of the round before over l = G_i … G_{i+1} (counted from 1),
    Δ_i,G_i ← β m_i + (1 − β) Δ_i,G_i,
once the deeper group has taken part. FedRA's published comparison ran InclusiveFL without this step: that is
`method.inclusivefl.momentum 0`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedra_engine.federation.aggregation import Aggregator, Averaging, WeightedSum, mean_of
from fedra_engine.federation.allocation import prefix_allocation
from fedra_engine.federation.assignment import Assignment
from fedra_engine.federation.updates import ClientUpdates
from fedra_engine.methods.base import Federation, OwnAllocation, register_method
from fedra_engine.models.state import GlobalState


@register_method("inclusivefl")
class InclusiveFL(OwnAllocation):
    """Prefix allocation; deeper groups teach the last block of shallower ones."""

    def __init__(self, federation: Federation) -> None:
        super().__init__(federation)
        self._depths = np.unique(federation.clients.capacities)
        self._momentum: Tensor | None = None
        """[groups, slot size], m_i of the round before; NaN for a group whose next deeper one has not taken part."""

    def assign(self, participants: NDArray[np.int64], round: int) -> Assignment:
        return Assignment(prefix_allocation(self.federation.capacities(round)[participants], self.federation.depth))

    def aggregator(self, previous: GlobalState, round: int) -> GroupedAggregator:
        groups = np.searchsorted(self._depths, self.federation.capacities(round))
        return GroupedAggregator(previous, self.averaging, groups, len(self._depths))

    def aggregate(self, aggregator: Aggregator, previous: GlobalState, round: int) -> GlobalState:
        assert isinstance(aggregator, GroupedAggregator)
        changes, weights = aggregator.group_changes()
        distilled = self._distill(changes)
        self._remember(changes, weights)
        mean = mean_of((distilled * weights[..., None]).sum(0), weights.sum(0)[:, None])
        adapters = previous.adapters + mean.to(previous.adapters)
        return replace(aggregator.result(), adapters=adapters)

    def tensors(self) -> dict[str, Tensor]:
        return {} if self._momentum is None else {"momentum": self._momentum}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        self._momentum = tensors.get("momentum")

    def _distill(self, changes: Tensor) -> Tensor:
        """`changes` [groups, blocks, slot size] with every group's last block drawn to its momentum."""
        beta, distilled = self.options.momentum, changes.clone()
        if self._momentum is not None:
            for group, depth in enumerate(self._depths):
                momentum = self._momentum[group].to(changes)
                if not momentum.isnan().any():
                    distilled[group, depth - 1] = beta * momentum + (1 - beta) * changes[group, depth - 1]
        return distilled

    def _remember(self, changes: Tensor, weights: Tensor) -> None:
        """Set each group's momentum for the next round, unless the next deeper group did not take part."""
        momentum = torch.full_like(changes[:, 0], torch.nan) if self._momentum is None else self._momentum.to(changes)
        for group, (depth, deeper) in enumerate(zip(self._depths[:-1], self._depths[1:], strict=True)):
            if weights[group + 1, 0] > 0:
                momentum[group] = changes[group + 1, depth - 1 : deeper].mean(0)
        self._momentum = momentum


class GroupedAggregator(Aggregator):
    """Also sums the adapters of each group of clients by itself; memory is one global state per group."""

    def __init__(self, previous: GlobalState, averaging: Averaging, group_of: NDArray[np.int64], groups: int) -> None:
        """`group_of` [clients] gives the group, below `groups`, of every client."""
        super().__init__(previous, averaging)
        self._group_of = group_of
        self._groups = groups
        self._by_group = WeightedSum(previous.adapters.repeat(groups, 1), averaging.deterministic)

    def add(self, updates: ClientUpdates) -> None:
        super().add(updates)
        rows = self._group_of[updates.clients][updates.slot_owners] * len(self.previous.adapters) + updates.slot_blocks
        self._by_group.add(updates.adapters, updates.slots, rows, self.slot_weights(updates))

    def sums(self) -> list[Tensor]:
        return [*super().sums(), *self._by_group.sums()]

    def group_changes(self) -> tuple[Tensor, Tensor]:
        """How each group's mean differs from the previous state, [groups, blocks, slot size], and the groups' weights
        [groups, blocks]; both zero where nobody in the group trained the block."""
        previous = self.previous.adapters.repeat(self._groups, 1)
        changes = self._by_group.mean(previous) - previous
        shape = (self._groups, len(self.previous.adapters))
        return changes.unflatten(0, shape), torch.clone(self._by_group.weight).unflatten(0, shape)
