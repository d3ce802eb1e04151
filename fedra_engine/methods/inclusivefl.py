"""InclusiveFL (Liu et al., KDD 2022; arXiv 2202.08036): prefixes of the model, and momentum distillation.

A client holds the first `capacity` blocks. Clients of equal depth form a group; G_1 < … < G_n are the depths. With
Δ_i,l the mean change of block l in group i, the mean of Δ_i,l over the groups that hold block l, weighted by their
clients, is added to the block (heterogeneous aggregation).

Momentum distillation passes what a group learnt in its further blocks to the last block of the next shallower group:
    m_i = mean of Δ_{i+1,l} of the round before over l = G_i … G_{i+1} (counted from 1),
    Δ_i,G_i ← β m_i + (1 − β) Δ_i,G_i,
once the deeper group has taken part; blocks without adapters do not count. β = 0.2 and the range of l are those of the
authors' code, github.com/Rachelxuan11/InclusiveFL, which however takes the last of these blocks instead of their mean.
FedRA's published comparison ran InclusiveFL without this step: `method.inclusivefl.momentum 0`.
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
    """Prefix allocation with momentum distillation from deeper to shallower groups."""

    def __init__(self, federation: Federation) -> None:
        super().__init__(federation)
        self._depths = np.unique(federation.clients.capacities)
        self._momentum: Tensor | None = None
        """[groups, slot size], m_i; NaN until group i + 1 has trained a block that counts."""

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
        """Mix the momentum into the last block of each group; `changes` are [groups, blocks, slot size]."""
        beta, distilled = self.options.momentum, changes.clone()
        if self._momentum is not None:
            for group, depth in enumerate(self._depths):
                momentum = self._momentum[group].to(changes)
                if not momentum.isnan().any():
                    distilled[group, depth - 1] = beta * momentum + (1 - beta) * changes[group, depth - 1]
        return distilled

    def _remember(self, changes: Tensor, weights: Tensor) -> None:
        """Set each group's momentum for the next round, unless the next deeper group trained none of its blocks."""
        momentum = torch.full_like(changes[:, 0], torch.nan) if self._momentum is None else self._momentum.to(changes)
        for group, (depth, deeper) in enumerate(zip(self._depths[:-1], self._depths[1:], strict=True)):
            further = slice(depth - 1, deeper)
            # Blocks without adapters are trained by nobody.
            learnt = changes[group + 1, further][weights[group + 1, further] > 0]
            if len(learnt):
                momentum[group] = learnt.mean(0)
        self._momentum = momentum


class GroupedAggregator(Aggregator):
    """Also sums each group's adapters separately, in the memory of one global state per group."""

    def __init__(self, previous: GlobalState, averaging: Averaging, group_of: NDArray[np.int64], groups: int) -> None:
        """`group_of` int64 [clients] is every client's group, of `groups`."""
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
        """Mean change of each group's blocks [groups, blocks, slot size], and its weight [groups, blocks].

        Both are zero for a block that nobody in the group trained.
        """
        previous = self.previous.adapters.repeat(self._groups, 1)
        changes = self._by_group.mean(previous) - previous
        shape = (self._groups, len(self.previous.adapters))
        return changes.unflatten(0, shape), torch.clone(self._by_group.weight).unflatten(0, shape)
