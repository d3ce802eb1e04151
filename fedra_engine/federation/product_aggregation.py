"""Aggregation of the adapters' products B·A, for methods that average what clients learnt exactly.

The mean of products is not the product of means: mean(B_i A_i) ≠ mean(B_i) mean(A_i).
"""

from __future__ import annotations

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


class ProductAggregator(RankedAggregator):
    """Also sums the products B·A of every target in every block."""

    def __init__(
        self,
        previous: GlobalState,
        layout: AdapterLayout,
        ranks: NDArray[np.int64],
        *,
        weighting: Literal["uniform", "samples"],
    ) -> None:
        """`ranks` [clients] are those of all clients."""
        super().__init__(previous, layout, ranks, weighting=weighting, deterministic=False)
        depth, like = len(previous.adapters), self._adapters.weight
        self._products = [like.new_zeros(depth, target.out_features, target.in_features) for target in layout.targets]

    def add(self, updates: ClientUpdates) -> None:
        """See `Aggregator.add`."""
        super().add(updates)
        weights = self.slot_weights(updates)
        for block in np.unique(updates.slot_blocks).tolist():
            self._add_block(updates, np.flatnonzero(updates.slot_blocks == block), weights, block)

    def sums(self) -> list[Tensor]:
        """See `Aggregator.sums`."""
        return [*super().sums(), *self._products]

    def mean_products(self) -> list[Tensor]:
        """Weighted mean of B·A per target, [blocks, out, in]; zero for a block that nobody held."""
        weight = self._adapters.weight
        divisor = torch.where(weight > 0, weight, torch.ones_like(weight))
        return [product / divisor[:, None, None] for product in self._products]

    def _add_block(self, updates: ClientUpdates, members: NDArray[np.int64], weights: Tensor, block: int) -> None:
        (of_block,) = to_device([members], updates.slots.device)
        slots = updates.adapters[updates.slots[of_block]].to(self._products[0])
        scaled = weights[of_block][:, None, None]
        for target, product in enumerate(self._products):
            # All clients' factors side by side: their sum of products is one product.
            a = self._layout.lora_a(slots, target).flatten(0, 1)
            b = (self._layout.lora_b(slots, target) * scaled).transpose(0, 1).flatten(1)
            product[block].addmm_(b, a)
