"""Aggregation in which every module of every client counts by the norm of its product B·A."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedra_engine.federation.ranked_aggregation import RankedAggregator
from fedra_engine.federation.work import ClientUpdates
from fedra_engine.models.adapters import AdapterLayout
from fedra_engine.models.state import GlobalState
from fedra_kernels import to_device


class NormWeightedAggregator(RankedAggregator):
    """Means of A and B with the weights w_i ‖B_i A_i‖ / Σ w_j ‖B_j A_j‖, target by target; heads as in `Aggregator`.

    w_i is the weight of the client, as in `Aggregator`. A rank that a client lacks counts as zeros.

    Ranks that none of a block's clients has keep their values, and so does a target whose products are all zero.
    """

    def __init__(
        self,
        previous: GlobalState,
        layout: AdapterLayout,
        ranks: NDArray[np.int64],
        *,
        weighting: Literal["uniform", "samples"],
    ) -> None:
        """`ranks` [clients] are those of all clients, as they are when updates are added."""
        super().__init__(previous, layout, ranks, weighting=weighting, deterministic=False)
        like = self._adapters.weight
        self._sums = like.new_zeros(previous.adapters.shape)
        self._norms = like.new_zeros(len(previous.adapters), len(layout.targets))

    def add(self, updates: ClientUpdates) -> None:
        """See `Aggregator.add`."""
        super().add(updates)
        slots = updates.adapters[updates.slots].to(self._sums)
        (blocks,) = to_device([updates.slot_blocks], slots.device)
        norms = product_norms(slots, self._layout) * self.slot_weights(updates)[:, None]
        self._norms.index_add_(0, blocks, norms)
        self._sums.index_add_(0, blocks, slots * self._per_column(norms))

    def sums(self) -> list[Tensor]:
        """See `Aggregator.sums`."""
        return [*super().sums(), self._sums, self._norms]

    def result(self) -> GlobalState:
        """See `Aggregator.result`."""
        norms = self._per_column(self._norms)
        mean = self._sums / torch.where(norms > 0, norms, torch.ones_like(norms))
        previous = self.previous.adapters
        adapters = torch.where((norms > 0) & self.trained(), mean.to(previous), previous)
        return replace(super().result(), adapters=adapters)

    def _per_column(self, per_target: Tensor) -> Tensor:
        """[slots, targets] spread to the columns of each target's factors, [slots, slot size]."""
        spread = per_target.new_empty(len(per_target), self._layout.size)
        for target in range(len(self._layout.targets)):
            self._layout.lora_a(spread, target).copy_(per_target[:, target, None, None])
            self._layout.lora_b(spread, target).copy_(per_target[:, target, None, None])
        return spread


def product_norms(slots: Tensor, layout: AdapterLayout) -> Tensor:
    """‖B·A‖ (Frobenius) of each target, [slots, targets], without forming the products."""
    norms = []
    for target in range(len(layout.targets)):
        a, b = layout.lora_a(slots, target), layout.lora_b(slots, target)
        # ‖B A‖² = tr(Bᵀ B A Aᵀ), both [rank, rank].
        squares = ((b.transpose(1, 2) @ b) * (a @ a.transpose(1, 2))).sum((1, 2))
        norms.append(squares.clamp(min=0).sqrt())
    return torch.stack(norms, dim=1)
